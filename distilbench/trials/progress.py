"""The progress shown while trials run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich import progress as bars
from rich.console import Console
from rich.table import Column

from distilbench.report.formats import duration
from distilbench.results import Evaluation, StepRecord

LINE_SECONDS = 10.0
"""Shortest time between two plain lines about steps."""

QUICK_STEPS = 75
"""Steps of experiment=quick: 1,200 examples at batch 16."""

LONG_SECONDS = 600.0
"""A trial predicted to take longer than this is announced as long."""

SURE_STEPS, SURE_SECONDS = 10, 2.0
"""Steps and seconds of a trial that must have passed before its time is predicted."""


class ProgressBars:
    """Shows the progress of the trials ``names``; a context manager.

    ``clock`` returns seconds. On a terminal, each trial has a bar, and only the one that moved last is visible; its
    speed is averaged since the trial's first record.
    """

    def __init__(self, names: Sequence[str], console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._names = names
        self._console = console
        self._clock = clock
        self._last_line = -math.inf
        self._told_long = False
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=None),
            bars.TextColumn(
                "{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=self._console,
            speed_estimate_period=math.inf,
            get_time=clock,
            disable=not self._console.is_terminal,
            expand=True,
            transient=True,
        )
        for trial in range(len(names)):  # without names, so that they fit eighty columns
            self._bars.add_task(self._count(trial), total=None, visible=trial == 0, status="first steps")

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Move the bar, or print a line if the last one is old enough."""
        for other, bar in enumerate(self._bars.tasks):
            self._bars.update(bar.id, visible=other == trial)
        bar = self._bars.tasks[trial]
        self._bars.update(bar.id, total=record.steps, completed=record.step)
        self._tell_if_long(bar, record)
        text, now = step_text(record, bar.time_remaining), self._clock()
        self._bars.update(bar.id, status=text)
        if self._bars.disable and (now - self._last_line >= LINE_SECONDS or record.step == record.steps):
            self._last_line = now
            self._print(trial, text)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> None:
        """Print a line about an evaluation."""
        self._print(trial, evaluation_text(evaluation))

    def _tell_if_long(self, bar: bars.Task, record: StepRecord) -> None:
        is_sure = bar.speed and record.step > SURE_STEPS and (bar.elapsed or 0.0) >= SURE_SECONDS
        if self._told_long or not is_sure:
            return
        self._told_long, seconds = True, record.steps / (bar.speed or math.inf)
        if seconds > LONG_SECONDS:
            remedy = "; for a first answer in minutes: experiment=quick" if record.steps > QUICK_STEPS else ""
            self._console.print(f"This trial will take about {duration(seconds)} on this device{remedy}",
                                markup=False, highlight=False, soft_wrap=True)  # fmt: skip

    def _count(self, trial: int) -> str:
        return f"[{trial + 1}/{len(self._names)}]" if len(self._names) > 1 else ""

    def _print(self, trial: int, text: str) -> None:
        line = f"{self._count(trial)} {self._names[trial]}: {text}".lstrip()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def step_text(record: StepRecord, left: float | None) -> str:
    """Return epoch, step, loss, speed and remaining time of a step, on one line."""
    epochs = round(record.epoch * record.steps / record.step)
    remaining = f", {duration(left)} left" if left is not None else ""
    return (
        f"epoch {record.epoch:.2f}/{epochs}, step {record.step:,}/{record.steps:,}, loss {record.loss:.4f}, "
        f"{record.examples_per_second:.1f} examples/s{remaining}"
    )


def evaluation_text(evaluation: Evaluation) -> str:
    """Return the measures of an evaluation, on one line."""
    return (
        f"epoch {evaluation.epoch:g} on {evaluation.split}: accuracy {100 * evaluation.accuracy:.2f} %, "
        f"loss {evaluation.loss:.4f}, F1 {evaluation.f1:.4f}, MCC {evaluation.mcc:.4f}"
    )
