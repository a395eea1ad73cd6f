"""The report at a sweep's end: of its workers one writes it, and the others stay until it has been written.

Where that one dies, or stands still for longer than ``sweep.grace_seconds``, the next of them takes over.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import optuna

from distilbench.composition import default_treatment
from distilbench.report.answer import trial_to_use
from distilbench.report.findings import Report
from distilbench.report.from_store import report_sweep
from distilbench.results import Owner
from distilbench.settings import SettingsError, TrackingSettings
from distilbench.sweep.heartbeat import beating
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.storage import UNANSWERED, Storage, beat_seconds
from distilbench.tracking import MlflowStore, model_directory
from distilbench.trials.run import compare_late

log = logging.getLogger(__name__)

CLAIM, BEAT, WRITTEN = "report", "report.beat", "report.written"
"""Attributes of the study: who writes a report, of how many ended trials; a beat of its heart; who last wrote one."""

POLL_SECONDS, LONGEST_PAUSE = 1.0, 10.0
"""Between two looks at the study, at first and at most."""


class ReportClaim:
    """Whose the report is, as one worker sees it; what was written before this worker began does not count.

    So the same command, typed again, writes the report again.
    """

    def __init__(self, study: optuna.Study, storage: Storage, grace_seconds: int) -> None:
        self._study, self._storage, self._grace = study, storage, grace_seconds
        self._before = study.user_attrs.get(WRITTEN)
        self._claim: dict[str, object] = {}

    def take(self, ends: int) -> bool:
        """Return whether this process writes the report of ``ends`` trials, at once or after another that died of it.

        Returns False once another has written it.
        """
        seen: object = None
        since, pause = time.monotonic(), POLL_SECONDS
        while True:
            with self._storage.lock():
                known = self._study.user_attrs
                claim, written = known.get(CLAIM), known.get(WRITTEN)
                if written and written != self._before and written["ends"] == ends:
                    return False
                if (claim, known.get(BEAT)) != seen:
                    seen, since = (claim, known.get(BEAT)), time.monotonic()
                is_free = (
                    claim is None or claim == written or claim["ends"] != ends or Owner(**claim["owner"]).is_dead()
                )
                if is_free or time.monotonic() - since > self._grace:
                    self._claim = {"ends": ends, "owner": asdict(Owner.of_this_process()), "at": time.time()}
                    self._study.set_user_attr(CLAIM, self._claim)
                    return True
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Have the heart of the report beat while it is written, then say that it is."""
        with beating(self._beat, beat_seconds(self._grace)):
            yield
        with contextlib.suppress(*UNANSWERED):
            self._study.set_user_attr(WRITTEN, self._claim)

    def _beat(self) -> None:
        with contextlib.suppress(*UNANSWERED):
            self._study.set_user_attr(BEAT, time.time())


def write_report(plan: SweepPlan, store: MlflowStore | None) -> bool:
    """Write the report, and log the model of its answer where that is asked; returns whether there is a report.

    What can't be made costs the ended sweep no more than that.
    """
    if store is None:
        return False
    compare_late(store, plan.directory, plan.settings.margin)
    try:
        report = report_sweep(store, plan.name, plan.directory, default_treatment(), plan.settings.margin)
    except Exception as error:  # the report's boundary
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
    except SettingsError as error:  # its directory is gone, or another's by now
        log.warning("the sweep's answer is not logged as a model: %s", error)
