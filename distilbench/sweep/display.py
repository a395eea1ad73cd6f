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

from distilbench.report import duration
from distilbench.results import Status
from distilbench.sweep.leaderboard import Board, Row, name_of, shown
from distilbench.sweep.plan import Plan
from distilbench.trials.prepared import prepare
from distilbench.trials.run import estimate_alone

SHOWN = 8
"""Rows of the live table: the best trials, after those that run."""


class Screen:
    """A context manager that shows boards and lines on ``console``."""

    def __init__(self, console: Console, is_live: bool) -> None:
        self._console = console
        self._live = Live(console=console, transient=True) if is_live and console.is_terminal else None

    @property
    def is_live(self) -> bool:
        """Whether it shows a table that changes in place."""
        return self._live is not None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, board: Board, at_once: int) -> None:
        """Show how the sweep stands now."""
        if self._live:
            self._live.update(Group(live_table(board), Text(board.line(at_once))))
        else:
            self.say(board.line(at_once))

    def show_all(self, board: Board) -> None:
        """Show every trial, at the end."""
        self._console.print(board.table())

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(f"[sweep] {line}", markup=False, highlight=False, soft_wrap=True)


def live_table(board: Board) -> Table:
    """The trials that run, then the best of those that have ended."""
    running = [row for row in board.rows if row.status == Status.RUNNING]
    ended = [row for row in board.ordered if row.values and row.status != Status.RUNNING]
    table = Table(box=None, pad_edge=False)
    for title in ("trial", "settings", *board.objectives, "time", "status"):
        table.add_column(title, no_wrap=title != "settings")  # the one that a narrow terminal makes narrower
    for row in [*running, *ended[:SHOWN]]:
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in _cells(row, board)))
    return table


def _cells(row: Row, board: Board) -> list[str]:
    values = [shown(name, value) for name, value in zip(board.objectives, row.values, strict=False)]
    values += [""] * (len(board.objectives) - len(values))
    mark = ", baseline" if row.is_baseline else ""
    return [row.number, row.name, *values, duration(row.seconds) if row.seconds else "", row.status + mark]


ROWS = 40


def print_plan(plan: Plan, console: Console) -> None:
    """Print the cells (or the space), their number, and a prediction from a few steps of one trial."""
    console.print(_cell_table(plan) if plan.is_grid else _space_table(plan))
    seeds = len(plan.settings.sweep.seeds or [0])
    trials = plan.total + len(plan.beside)
    what = f"{trials} trials" + (f" of {seeds} seeds each" if seeds > 1 else "")
    seconds = estimate_alone(plan.settings, prepare(plan.settings))
    prediction = f"about {duration(seconds)} each, {duration(seconds * seeds * trials)} of training one after another"
    console.print(
        f"[sweep] {plan.name}: {what}; {prediction}, by a few steps of one; nothing was trained or kept",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _cell_table(plan: Plan) -> Table:
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


def _space_table(plan: Plan) -> Table:
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
