"""What a person sees of a sweep: a live table where trials run beside each other on a terminal, lines elsewhere.

Where trials run in the sweep's own process, one after another, each shows a progress bar of its own, and the sweep
speaks between them.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from distilbench.cli import counted
from distilbench.report import power
from distilbench.report.formats import duration
from distilbench.report.words import what_decides
from distilbench.sweep.leaderboard import Leaderboard
from distilbench.sweep.plan import SweepPlan
from distilbench.trials.prepared import prepare
from distilbench.trials.run import estimate_alone

LONGEST = 8
"""Trials of the live table beside those that run: the best ones."""


class Display:
    """A context manager that shows leaderboards and lines on ``console``."""

    def __init__(self, console: Console, is_live: bool) -> None:
        self._console = console
        self._live = Live(console=console, transient=True) if is_live and console.is_terminal else None

    @property
    def is_live(self) -> bool:
        """Whether it shows a table that changes in place."""
        return self._live is not None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, leaderboard: Leaderboard, at_once: int) -> None:
        """Show how the sweep stands now."""
        if self._live:
            self._live.update(Group(leaderboard.table(LONGEST), Text(leaderboard.line(at_once))))
        else:
            self.say(leaderboard.line(at_once))

    def show_all(self, leaderboard: Leaderboard) -> None:
        """Show every trial, at the end."""
        self._console.print(leaderboard.table())

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(f"[sweep] {line}", markup=False, highlight=False, soft_wrap=True)


LONGEST_GRID = 40
"""Points of a grid that a dry run lists."""


def print_plan(plan: SweepPlan, console: Console) -> None:
    """Print the points (or the space), their number, and a prediction from a few steps of one trial."""
    console.print(_grid_table(plan) if plan.is_grid else _space_table(plan))
    seeds = len(plan.settings.sweep.seeds or [0])
    trials = plan.total + len(plan.beside)
    what = counted(trials, "trial") + (f" of {seeds} seeds each" if seeds > 1 else "")
    prepared = prepare(plan.settings)
    seconds = estimate_alone(plan.settings, prepared)
    prediction = f"about {duration(seconds)} each, {duration(seconds * seeds * trials)} of training one after another"
    line = f"{plan.name}: {what}; {prediction}, by a few steps of one; nothing was trained or kept"
    say = Display(console, is_live=False).say
    say(line)
    if len(plan.objectives) > 1:
        say(f"trials are chosen by {plan.chosen_by}")
    if warning := _warning(plan, len(prepared.splits.report)):
        say(warning)


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


def _grid_table(plan: SweepPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("settings", overflow="fold")
    names = [("baseline", plan.name_of(point)) for point in plan.beside]
    names += [(str(number), plan.name_of(point)) for number, point in enumerate(plan.points)]
    for number, name in names[:LONGEST_GRID]:
        table.add_row(number, Text(name))
    if len(names) > LONGEST_GRID:
        table.add_row("...", f"{len(names) - LONGEST_GRID} more")
    return table


def _space_table(plan: SweepPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("setting")
    table.add_column("values", overflow="fold")
    for key, distribution in plan.space.dimensions.items():
        table.add_row(key, Text(_described(distribution)))
    return table


def _described(distribution: object) -> str:
    """Return a dimension for people: ``0, 3, 6`` or ``1e-05 to 0.0001, logarithmic``."""
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return ", ".join(map(str, choices))
    low, high, step, is_log = (getattr(distribution, name) for name in ("low", "high", "step", "log"))
    every = f" in steps of {step:g}" if step and not is_log else ""
    return f"{low:g} to {high:g}{every}" + (", logarithmic" if is_log else "")
