"""What a sweep says, and what a dry run prints of a plan."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilbench.cli import counted
from distilbench.report import power
from distilbench.report.formats import duration
from distilbench.report.words import what_decides
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.space import describe
from distilbench.trials.estimate import estimate_alone
from distilbench.trials.prepared import prepare

LONGEST_GRID = 40
"""Points of a grid that a dry run lists."""


def say(console: Console, line: str) -> None:
    """Print one line of a sweep."""
    console.print(f"[sweep] {line}", markup=False, highlight=False, soft_wrap=True)


def print_plan(plan: SweepPlan, console: Console) -> None:
    """Print the points (or the space), their number, and a prediction from a few steps of one trial."""
    console.print(_table(plan))
    seeds = len(plan.settings.sweep.seeds or [0])
    trials = plan.total + len(plan.beside)
    what = counted(trials, "trial") + (f" of {seeds} seeds each" if seeds > 1 else "")
    prepared = prepare(plan.settings)
    seconds = estimate_alone(plan.settings, prepared)
    prediction = f"about {duration(seconds)} each, {duration(seconds * seeds * trials)} of training one after another"
    line = f"{plan.name}: {what}; {prediction}, by a few steps of one; nothing was trained or kept"
    say(console, line)
    if len(plan.objectives) > 1:
        say(console, f"trials are chosen by {plan.chosen_by}")
    if warning := _warning(plan, len(prepared.splits.report)):
        say(console, warning)


def _warning(plan: SweepPlan, examples: int) -> str | None:
    """Say beforehand where the margin can't be shown with the seeds planned and the examples that report."""
    in_space = len({point.params.get("seed") for point in plan.points}) if "seed" in plan.space.dimensions else 1
    seeds = max(len(plan.settings.sweep.seeds or []), in_space)
    rows = max(plan.total // in_space - any(point.is_baseline for point in plan.points), 1)
    margin = plan.settings.margin
    expected, needed = power.plan(examples, seeds, margin / 100, rows)
    if expected >= power.POWER:
        return None
    return (
        f"little will be shown: {counted(seeds, 'seed')} on {examples:,} examples would show that a setting loses "
        f"less than {counted(margin, 'point')} with a chance of {100 * expected:.0f} %, were it as good as the "
        f"baseline (of {counted(rows, 'setting')}, {100 * power.DISCORDANCE:.0f} % of examples supposed to differ); "
        f"{what_decides(needed, examples)}"
    )


def _table(plan: SweepPlan) -> Table:
    """Return the points of a grid, or the dimensions of another space."""
    rows = [(key, describe(distribution)) for key, distribution in plan.space.dimensions.items()]
    if plan.is_grid:
        rows = [("baseline", plan.name_of(point)) for point in plan.beside]
        rows += [(str(number), plan.name_of(point)) for number, point in enumerate(plan.points)]
    table = Table(*(("trial", "settings") if plan.is_grid else ("setting", "values")), box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    for key, text in rows[:LONGEST_GRID]:
        table.add_row(key, Text(text))
    if len(rows) > LONGEST_GRID:
        table.add_row("...", f"{len(rows) - LONGEST_GRID} more")
    return table
