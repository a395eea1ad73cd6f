"""How a sweep stands: its trials beside the baseline, for the terminal, for MLflow, and for the results file.

What trials amount to statistically is the report's to say, which reads what MLflow keeps; this is what the study
knows, while the sweep runs and if nothing is tracked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from distilbench.cli import counted
from distilbench.report.formats import duration, percent
from distilbench.results import Status
from distilbench.sweep.study import FAILURES, TrialView

_SHARES = ("accuracy", "f1")


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a sweep that count, in order, the baselines beside its space first, of ``total`` to come."""

    trials: Sequence[TrialView]
    objectives: Sequence[str]
    directions: Sequence[str]
    total: int

    @cached_property
    def counts(self) -> Counter[Status]:
        """Trials by status."""
        return Counter(trial.status for trial in self.trials)

    @property
    def failed(self) -> int:
        """Trials that diverged, ran out of memory, or failed."""
        return sum(self.counts[status] for status in FAILURES)

    @property
    def done(self) -> int:
        """Trials that came to an end of their own."""
        return self.counts[Status.FINISHED] + self.counts[Status.PRUNED] + self.failed

    @cached_property
    def baseline(self) -> TrialView | None:
        """The first baseline that has a result."""
        return next((trial for trial in self.trials if trial.is_baseline and trial.values), None)

    @cached_property
    def best(self) -> list[TrialView]:
        """The best trial, or with several objectives all that no other beats in each of them."""
        finished = [trial for trial in self.trials if trial.values and trial.status is Status.FINISHED]
        signs = [1 if direction == "maximize" else -1 for direction in self.directions]

        def beats(a: TrialView, b: TrialView) -> bool:
            pairs = [(s * x, s * y) for s, x, y in zip(signs, a.values, b.values, strict=True)]
            return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

        front = [trial for trial in finished if not any(beats(other, trial) for other in finished)]
        return front if len(self.objectives) > 1 else front[:1]

    def line(self, at_once: int = 1) -> str:
        """Return the sweep in one line."""
        words = {"running": self.counts[Status.RUNNING], "pruned": self.counts[Status.PRUNED], "failed": self.failed,
                 "reused": self.counts[Status.REUSED]}  # fmt: skip
        parts = [f"{self.done} of {counted(self.total, 'trial')}"]
        parts += [f"{count} {word}" for word, count in words.items() if count]
        if len(self.objectives) > 1:
            parts.append(f"{len(self.best)} on the Pareto front")
        elif self.best:
            parts.append(f"best {self._against_baseline(self.best[0])}")
        seconds = [trial.seconds for trial in self.trials if trial.seconds]
        if seconds and self.done < self.total:
            parts.append(f"about {duration((self.total - self.done) * fmean(seconds) / at_once)} left")
        return ", ".join(parts)

    def _against_baseline(self, trial: TrialView) -> str:
        objective = self.objectives[0]
        text = f"{objective} {shown(objective, trial.values[0])} (trial {trial.path})"
        if self.baseline is None:
            return text
        if trial is self.baseline:
            return f"{text}, the baseline"
        return f"{text} against the baseline's {shown(objective, self.baseline.values[0])}"

    def metrics(self) -> dict[str, float]:
        """Return counts, best and baseline, as metrics of the sweep's own run."""
        values: dict[str, float] = {"trials_done": self.done, "trials_failed": self.failed}
        for status in (Status.FINISHED, Status.PRUNED, Status.RUNNING, Status.REUSED):
            values[f"trials_{status.lower()}"] = self.counts[status]
        if len(self.objectives) == 1 and self.best:
            values[f"best_{self.objectives[0]}"] = self.best[0].values[0]
        if self.baseline:
            values |= {f"baseline_{k}": v for k, v in zip(self.objectives, self.baseline.values, strict=True)}
        return values

    def results(self) -> dict[str, Any]:
        """Return what hydra-optuna-sweeper writes to ``optimization_results.yaml``, with each trial's number."""
        if len(self.objectives) > 1:
            return {"name": "optuna", "solutions": [
                {"trial": trial.path, "params": trial.trial.params, "values": list(trial.values)} for trial in self.best
            ]}  # fmt: skip
        best = self.best[0] if self.best else None
        return {"name": "optuna", "best_trial": best and best.path, "best_params": best and best.trial.params,
                "best_value": best and best.values[0]}  # fmt: skip

    def table(self, longest: int | None = None) -> Table:
        """Show the trials that run, then the best ones; ``longest`` is for a table that changes in place.

        It bounds the second part, and has a narrow terminal cut the settings alone.
        """
        running = [trial for trial in self.trials if trial.status is Status.RUNNING]
        ended = [trial for trial in self.trials if trial.status is not Status.RUNNING]
        sign = -1 if self.directions[0] == "maximize" else 1
        ended.sort(key=lambda trial: sign * trial.values[0] if trial.values else math.inf)
        is_live = longest is not None
        table = Table(box=None, pad_edge=False)
        for title in ("trial", "settings", *self.objectives, "time", "status"):
            table.add_column(title, no_wrap=title != "settings" and is_live)
        for trial in [*running, *ended[:longest]]:
            values = [shown(name, value) for name, value in zip(self.objectives, trial.values, strict=False)]
            values += [""] * (len(self.objectives) - len(values))
            seconds = duration(trial.seconds) if trial.seconds else ""
            cells = [trial.path, trial.name, *values, seconds, _status(trial, has_error=not is_live)]
            table.add_row(*(Text(cell, no_wrap=is_live, overflow="ellipsis" if is_live else "fold") for cell in cells))
        return table


def _status(trial: TrialView, has_error: bool) -> str:
    """Return the status in words, with its reason if it ``has_error``."""
    if trial.status is Status.REUSED:
        return f"REUSED from {trial.attribute('reused_from')}"
    error = trial.attribute("error") if has_error and trial.status in (*FAILURES, Status.PRUNED) else None
    return trial.status + (", baseline" if trial.is_baseline else "") + (f": {error}" if error else "")


def shown(objective: str, value: float) -> str:
    """Return a value of an objective, for people."""
    if objective in _SHARES:
        return percent(value)
    return duration(value) if objective.endswith("seconds") else f"{value:.4g}"
