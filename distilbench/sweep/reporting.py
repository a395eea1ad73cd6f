"""The report at a sweep's end: of its workers one writes it, under a lock that the others wait for.

The system lets go of a lock whose holder dies, so that the next of them writes it then.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import optuna

from distilbench.composition import default_treatment
from distilbench.report.answer import trial_to_use
from distilbench.report.findings import Report
from distilbench.report.from_store import report_sweep
from distilbench.results import Owner
from distilbench.settings import SettingsError, TrackingSettings
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.storage import UNANSWERED, Storage
from distilbench.tracking import MlflowStore, model_directory

log = logging.getLogger(__name__)

REPORTED = "reported"
"""Attribute of the study: which process last wrote a report, and of how many ended trials."""


@contextmanager
def reporting(study: optuna.Study, storage: Storage, ends: int, before: Any, grace_seconds: float) -> Iterator[bool]:
    """Wait until nobody else writes a report; yields whether there is none yet of ``ends`` trials.

    What was known ``before`` this process worked on the sweep does not count: the same command, typed again, writes
    the report again.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(SettingsError, *UNANSWERED):  # whoever takes so long stands still
            held.enter_context(storage.lock(grace_seconds, of_report=True))
        known = study.user_attrs.get(REPORTED)
        is_due = known is None or known == before or known["ends"] != ends
        yield is_due
        with contextlib.suppress(*UNANSWERED):
            if is_due:
                told = {"ends": ends, "owner": asdict(Owner.of_this_process()), "at": time.time()}
                study.set_user_attr(REPORTED, told)


def write_report(plan: SweepPlan, store: MlflowStore | None) -> bool:
    """Write the report, and log the model of its answer where that is asked; returns whether there is a report.

    What can't be made costs the ended sweep no more than that.
    """
    if store is None:
        return False
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
