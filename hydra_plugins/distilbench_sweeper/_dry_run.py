"""``sweep.dry_run``: what would be trained, and how long that would take."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilbench.report import duration
from distilbench.trials import estimate_alone, prepare
from hydra_plugins.distilbench_sweeper._board import name_of
from hydra_plugins.distilbench_sweeper._plan import Plan

ROWS = 40


def print_plan(plan: Plan, console: Console) -> None:
    """Print the cells (or the space), their number, and a prediction from a few steps of one trial."""
    console.print(_cells(plan) if plan.is_grid else _space(plan))
    seeds = len(plan.settings.sweep.seeds or [0])
    trials = plan.total + len(plan.beside)
    what = f"{trials} trials" + (f" of {seeds} seeds each" if seeds > 1 else "")
    seconds = estimate_alone(plan.settings, prepare(plan.settings))
    prediction = f"about {duration(seconds)} each, {duration(seconds * seeds * trials)} of training one after another"
    console.print(
        f"[sweep] {plan.name}: {what}; {prediction}, by a few steps of one; nothing was trained or kept",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _cells(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("settings", overflow="fold")
    names = [("baseline", name_of(cell, plan.space)) for cell in plan.beside]
    names += [(str(number), name_of(cell, plan.space)) for number, cell in enumerate(plan.cells)]
    for number, name in names[:ROWS]:
        table.add_row(number, Text(name))
    if len(names) > ROWS:
        table.add_row("...", f"{len(names) - ROWS} more")
    return table


def _space(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("setting")
    table.add_column("values", overflow="fold")
    for key, distribution in plan.space.dimensions.items():
        table.add_row(key, Text(described(distribution)))
    return table


def described(distribution: object) -> str:
    """A dimension for people: ``0, 3, 6`` or ``1e-05 to 0.0001, logarithmic``."""
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return ", ".join(map(str, choices))
    low, high, step, is_log = (getattr(distribution, name) for name in ("low", "high", "step", "log"))
    every = f" in steps of {step:g}" if step and not is_log else ""
    return f"{low:g} to {high:g}{every}" + (", logarithmic" if is_log else "")
