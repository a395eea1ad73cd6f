"""What a person sees while trials run: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console

from distilbench.report.formats import duration
from distilbench.results import Evaluation, StepRecord

LINE_SECONDS = 10.0
"""Shortest time between two plain lines about steps."""

QUICK_STEPS = 125
"""Steps of experiment=quick: 2,000 examples at batch 16."""

LONG_SECONDS = 600.0
"""What takes longer than this is announced as long."""

SURE_STEPS, SURE_SECONDS = 10, 2.0
"""What must have been seen of a trial before its time is predicted."""


@dataclass
class Pace:
    """How fast a trial goes, from its first record on: what came before is warming up."""

    first_step: int
    first_seconds: float
    step: int
    seconds: float

    def seconds_for(self, steps: int) -> float | None:
        """Predicted seconds of ``steps`` steps, evaluations that happened included; None before the second record."""
        done = self.step - self.first_step
        return steps * (self.seconds - self.first_seconds) / done if done > 0 else None

    @property
    def is_sure(self) -> bool:
        """Whether enough was seen to predict from."""
        return self.step - self.first_step >= SURE_STEPS and self.seconds - self.first_seconds >= SURE_SECONDS


class Progress:
    """Shows several trials, told apart by ``names``; a context manager and an observer that stops none of them.

    ``console`` is rich's, by default a new one on standard output; ``clock`` counts seconds.
    """

    def __init__(
        self, names: Sequence[str], console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._names = names
        self._console = console or Console()
        self._clock = clock
        self._paces: dict[int, Pace] = {}
        self._last_line = float("-inf")
        self._told_long = False
        self._bar = _Bar(self._console) if self._console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.drawn.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.drawn.stop()

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Move the bar, or print a line where the last one is old enough."""
        now = self._clock()
        pace = self._paces.setdefault(trial, Pace(record.step, now, record.step, now))
        pace.step, pace.seconds = record.step, now
        self._tell_if_long(pace, record)
        left = pace.seconds_for(record.steps - record.step)
        if self._bar:
            self._bar.show(self._count(trial), record, left)
        elif now - self._last_line >= LINE_SECONDS or record.step == record.steps:
            self._last_line = now
            self._print(f"{self._title(trial)}: {step_text(record, left)}")

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Print a line about an evaluation; returns False, since watching stops nothing."""
        self._print(f"{self._title(trial)}: {evaluation_text(evaluation)}")
        return False

    def _tell_if_long(self, pace: Pace, record: StepRecord) -> None:
        if self._told_long or not pace.is_sure:
            return
        self._told_long = True
        line = say_long(pace.seconds_for(record.steps) or 0.0, record.steps)
        if line:
            self._print(line)

    def _title(self, trial: int) -> str:
        return f"{self._count(trial)} {self._names[trial]}".lstrip()

    def _count(self, trial: int) -> str:
        return f"[{trial + 1}/{len(self._names)}]" if len(self._names) > 1 else ""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """One bar of rich's, for the trial that spoke last; without names, so that it fits eighty columns."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        whole = Column(no_wrap=True, overflow="ellipsis")
        self.drawn = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False, table_column=whole),
            console=console,
            expand=True,
            transient=True,
        )
        self._task = self.drawn.add_task("", total=None, status="first steps")

    def show(self, count: str, record: StepRecord, left: float | None) -> None:
        self.drawn.update(
            self._task, description=count, completed=record.step, total=record.steps, status=step_text(record, left)
        )


def step_text(record: StepRecord, left: float | None) -> str:
    """Epoch, step, loss, speed and time left of a step, on one line."""
    epochs = round(record.epoch * record.steps / record.step)
    remaining = f", {duration(left)} left" if left is not None else ""
    return (
        f"epoch {record.epoch:.2f}/{epochs}, step {record.step:,}/{record.steps:,}, loss {record.loss:.4f}, "
        f"{record.examples_per_second:.1f} examples/s{remaining}"
    )


def evaluation_text(evaluation: Evaluation) -> str:
    """Return what an evaluation found, on one line."""
    return (
        f"epoch {evaluation.epoch:g} on {evaluation.split}: accuracy {100 * evaluation.accuracy:.2f} %, "
        f"loss {evaluation.loss:.4f}, F1 {evaluation.f1:.4f}, MCC {evaluation.mcc:.4f}"
    )


def say_long(predicted_seconds: float, steps: int) -> str | None:
    """Return a line that warns of a long trial and names a quicker experiment if that is one; else None."""
    if predicted_seconds <= LONG_SECONDS:
        return None
    remedy = "; for a first answer in minutes: experiment=quick" if steps > QUICK_STEPS else ""
    return f"This trial will take about {duration(predicted_seconds)} on this device{remedy}"
