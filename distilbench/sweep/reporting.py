"""What a sweep prints: its progress while it runs, its report at the end, and the plan in a dry run.

The report, which reads from MLflow, gives the statistics. The leaderboard shows what the study knows, while the sweep
runs and if nothing is tracked.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import optuna
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilbench.cli import pluralize
from distilbench.composition import default_treatment
from distilbench.report import power
from distilbench.report.findings import Report, trial_to_use
from distilbench.report.formats import duration, percent
from distilbench.report.from_store import report_sweep
from distilbench.report.words import what_decides
from distilbench.results import Status
from distilbench.settings import SettingsError, TrackingSettings
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.space import describe
from distilbench.sweep.storage import STORAGE_ERRORS, Storage
from distilbench.sweep.study import FAILURES, TrialView
from distilbench.tracking.model import model_directory
from distilbench.tracking.store import MlflowStore

log = logging.getLogger(__name__)

REPORT_ATTRIBUTE = "reported"
"""Attribute of the study: when the last report was written, and for how many ended trials."""


@contextmanager
def claim_report(study: optuna.Study, storage: Storage, ends: int, before: Any, grace_seconds: float) -> Iterator[bool]:
    """Wait until no other worker writes a report; yields whether a report on ``ends`` ended trials is still due.

    If the worker that holds the lock dies, the lock is released and the next worker writes the report. The report that
    existed ``before`` this process began does not count: the same command, run again, writes the report again.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(SettingsError, *STORAGE_ERRORS):  # a holder that takes so long is stuck
            held.enter_context(storage.lock(grace_seconds, of_report=True))
        known = study.user_attrs.get(REPORT_ATTRIBUTE)
        is_due = known is None or known == before or known["ends"] != ends
        yield is_due
        with contextlib.suppress(*STORAGE_ERRORS):
            if is_due:
                study.set_user_attr(REPORT_ATTRIBUTE, {"ends": ends, "at": time.time()})


def write_report(plan: SweepPlan, store: MlflowStore | None) -> bool:
    """Write the report, and log its answer's model if ``tracking.log_model=best``; returns whether there is a report.

    Errors cost a warning only, since the sweep itself has ended.
    """
    if store is None:
        return False
    try:
        report = report_sweep(store, plan.name, plan.directory, default_treatment(), plan.settings.margin)
    except Exception as error:  # boundary: the sweep has ended
        log.warning("no report of %s: %s", plan.name, error)
        return False
    if report and plan.settings.tracking.log_model == "best":
        _log_answer(report, store, plan.settings.tracking)
    return report is not None


def _log_answer(report: Report, store: MlflowStore, tracking: TrackingSettings) -> None:
    """Log the model of the sweep's answer, which may have been trained by an earlier call."""
    trial = trial_to_use(report, "answer")
    try:
        if trial:
            store.log_model(trial.run_id, model_directory(store, trial.run_id), tracking.register)
    except SettingsError as error:  # its directory is gone, or in use by another trial
        log.warning("the sweep's answer is not logged as a model: %s", error)


LONGEST_GRID = 40
"""Number of points of a grid that a dry run lists at most."""


def say(console: Console, line: str) -> None:
    """Print one line of a sweep."""
    console.print(f"[sweep] {line}", markup=False, highlight=False, soft_wrap=True)


def print_plan(plan: SweepPlan) -> None:
    """Print the points (or the space), the number of trials, and a time estimate from a few steps of one trial."""
    console = Console()
    console.print(_plan_table(plan))
    seeds = len(plan.settings.sweep.seeds or [0])
    trials = plan.total + len(plan.outside_baselines)
    what = pluralize(trials, "trial") + (f" of {seeds} seeds each" if seeds > 1 else "")
    from distilbench.trials.estimate import estimate_alone  # torch: not needed until here
    from distilbench.trials.prepared import prepare

    prepared = prepare(plan.settings)
    seconds = estimate_alone(plan.settings, prepared)
    prediction = f"about {duration(seconds)} each, {duration(seconds * seeds * trials)} of training one after another"
    line = f"{plan.name}: {what}; {prediction}, by a few steps of one; nothing was trained or kept"
    say(console, line)
    if len(plan.objectives) > 1:
        say(console, f"trials are ranked by {plan.chosen_by}")
    if warning := _warning(plan, len(prepared.splits.report)):
        say(console, warning)


def _warning(plan: SweepPlan, examples: int) -> str | None:
    """Return a warning if the planned seeds and the report split are likely too few to show the margin; else None."""
    in_space = len({point.params.get("seed") for point in plan.points}) if "seed" in plan.space.dimensions else 1
    seeds = max(len(plan.settings.sweep.seeds or []), in_space)
    rows = max(plan.total // in_space - any(point.is_baseline for point in plan.points), 1)
    margin = plan.settings.margin
    expected, needed = power.plan_power(examples, seeds, margin / 100, rows)
    if expected >= power.POWER:
        return None
    return (
        f"little will be shown: {pluralize(seeds, 'seed')} on {examples:,} examples would show that a setting loses "
        f"less than {pluralize(margin, 'point')} with a chance of {100 * expected:.0f} %, were it as good as the "
        f"baseline (of {pluralize(rows, 'setting')}, {100 * power.DISCORDANCE:.0f} % of examples supposed to differ); "
        f"{what_decides(needed, examples)}"
    )


def _plan_table(plan: SweepPlan) -> Table:
    """Return the points of a grid, or the dimensions of another space."""
    rows = [(key, describe(distribution)) for key, distribution in plan.space.dimensions.items()]
    if plan.is_grid:
        rows = [("baseline", plan.name_of(point)) for point in plan.outside_baselines]
        rows += [(str(number), plan.name_of(point)) for number, point in enumerate(plan.points)]
    table = Table(*(("trial", "settings") if plan.is_grid else ("setting", "values")), box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    for key, text in rows[:LONGEST_GRID]:
        table.add_row(key, Text(text))
    if len(rows) > LONGEST_GRID:
        table.add_row("...", f"{len(rows) - LONGEST_GRID} more")
    return table


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a plan that count, in order, starting with the baselines beside its space."""

    trials: Sequence[TrialView]
    plan: SweepPlan

    @property
    def total(self) -> int:
        """Number of trials of the whole plan, or of those that are done, where fewer are asked for by now."""
        return max(self.plan.total + len(self.plan.outside_baselines), self.done)

    @cached_property
    def counts(self) -> Counter[Status]:
        """Number of trials by status."""
        return Counter(trial.status for trial in self.trials)

    @property
    def failed(self) -> int:
        """Number of trials that diverged, ran out of memory, or failed."""
        return sum(self.counts[status] for status in FAILURES)

    @property
    def done(self) -> int:
        """Number of trials that finished, were pruned, or failed."""
        return self.counts[Status.FINISHED] + self.counts[Status.PRUNED] + self.failed

    @cached_property
    def baseline(self) -> TrialView | None:
        """The first baseline that has a result."""
        return next((trial for trial in self.trials if trial.is_baseline and trial.values), None)

    @cached_property
    def best(self) -> list[TrialView]:
        """The best trial, or with several objectives the Pareto front."""
        finished = [trial for trial in self.trials if trial.values and trial.status is Status.FINISHED]
        signs = [1 if direction == "maximize" else -1 for direction in self.plan.directions]

        def beats(a: TrialView, b: TrialView) -> bool:
            pairs = [(s * x, s * y) for s, x, y in zip(signs, a.values, b.values, strict=True)]
            return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

        front = [trial for trial in finished if not any(beats(other, trial) for other in finished)]
        return front if len(self.plan.objectives) > 1 else front[:1]

    def line(self, at_once: int = 1) -> str:
        """Return the sweep's progress in one line."""
        words = {"running": self.counts[Status.RUNNING], "pruned": self.counts[Status.PRUNED], "failed": self.failed,
                 "reused": self.counts[Status.REUSED]}  # fmt: skip
        parts = [f"{self.done} of {pluralize(self.total, 'trial')}"]
        parts += [f"{count} {word}" for word, count in words.items() if count]
        if len(self.plan.objectives) > 1:
            parts.append(f"{len(self.best)} on the Pareto front")
        elif self.best:
            parts.append(f"best {self._against_baseline(self.best[0])}")
        seconds = [trial.seconds for trial in self.trials if trial.seconds]
        if seconds and self.done < self.total:
            parts.append(f"about {duration((self.total - self.done) * fmean(seconds) / at_once)} left")
        return ", ".join(parts)

    def _against_baseline(self, trial: TrialView) -> str:
        objective = self.plan.objectives[0]
        text = f"{objective} {format_objective(objective, trial.values[0])} (trial {trial.path})"
        if self.baseline is None or trial.is_baseline:
            return f"{text}, the baseline" if trial.is_baseline else text
        own = {*trial.point.overrides}  # of several baselines, that of its own model, text and seed
        baselines = [one for one in self.trials if one.is_baseline and one.values]
        nearest = max(baselines, key=lambda one: len(own & {*one.point.overrides}))
        return f"{text} against the baseline's {format_objective(objective, nearest.values[0])}"

    def metrics(self) -> dict[str, float]:
        """Return counts, best and baseline values, as metrics of the sweep's own run."""
        values: dict[str, float] = {"trials_done": self.done, "trials_failed": self.failed}
        for status in (Status.FINISHED, Status.PRUNED, Status.RUNNING, Status.REUSED):
            values[f"trials_{status.lower()}"] = self.counts[status]
        if len(self.plan.objectives) == 1 and self.best:
            values[f"best_{self.plan.objectives[0]}"] = self.best[0].values[0]
        if self.baseline:
            values |= {f"baseline_{k}": v for k, v in zip(self.plan.objectives, self.baseline.values, strict=True)}
        return values

    def results(self) -> dict[str, Any]:
        """Return the contents of ``optimization_results.yaml`` as in hydra-optuna-sweeper, with the trials' numbers."""
        if len(self.plan.objectives) > 1:
            return {"name": "optuna", "solutions": [
                {"trial": trial.path, "params": trial.trial.params, "values": list(trial.values)} for trial in self.best
            ]}  # fmt: skip
        best = self.best[0] if self.best else None
        return {"name": "optuna", "best_trial": best and best.path, "best_params": best and best.trial.params,
                "best_value": best and best.values[0]}  # fmt: skip

    def table(self, longest: int | None = None) -> Table:
        """Return a table of the running trials, then the ended ones, best first.

        ``longest`` is for a table updated in place: it limits the ended ones, and a narrow terminal cuts only settings.
        """
        running = [trial for trial in self.trials if trial.status is Status.RUNNING]
        ended = [trial for trial in self.trials if trial.status is not Status.RUNNING]
        sign = -1 if self.plan.directions[0] == "maximize" else 1
        ended.sort(key=lambda trial: sign * trial.values[0] if trial.values else math.inf)
        is_live = longest is not None
        table = Table(box=None, pad_edge=False)
        time = [] if "train_seconds" in self.plan.objectives else ["time"]
        for title in ("trial", "settings", *self.plan.objectives, *time, "status"):
            table.add_column(title, no_wrap=title != "settings" and is_live)
        for trial in [*running, *ended[:longest]]:
            values = [format_objective(name, v) for name, v in zip(self.plan.objectives, trial.values, strict=False)]
            values += [""] * (len(self.plan.objectives) - len(values))
            values += [duration(trial.seconds) if trial.seconds else "" for _ in time]
            cells = [trial.path, trial.name, *values, _status(trial, has_error=not is_live)]
            table.add_row(*(Text(cell, no_wrap=is_live, overflow="ellipsis" if is_live else "fold") for cell in cells))
        return table


def _status(trial: TrialView, has_error: bool) -> str:
    """Return the status in words, with its reason if ``has_error``."""
    if trial.status is Status.REUSED:
        return f"REUSED from {trial.trial.user_attrs.get('reused_from', 'another program')}"
    error = trial.attribute("error") if has_error and trial.status in (*FAILURES, Status.PRUNED) else None
    return trial.status + (", baseline" if trial.is_baseline else "") + (f": {error}" if error else "")


def format_objective(objective: str, value: float) -> str:
    """Return an objective's value as text."""
    if objective in ("accuracy", "f1"):
        return percent(value)
    return duration(value) if objective.endswith("seconds") else f"{value:.4g}"
