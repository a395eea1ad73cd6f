"""The Optuna study of a sweep: which trials there are, which process owns each, and how they ended.

A trial's status is what ``trial.json`` in its directory says. Optuna's states follow: FINISHED is COMPLETE, PRUNED is
PRUNED (with several objectives FAIL: Optuna's samplers rank pruned trials by one), and every other end is FAIL with
the status in the attribute ``status``. Trials to train wait in the study's queue, from which any process may take the
next. An interrupted trial is void, and its point is queued again under the next free number.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from distilbench.cli import is_disk_full
from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep.job import UNRESOLVED_IDENTITY
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.space import Point

log = logging.getLogger(__name__)

BASELINE_STUDY = "baseline"
"""Directory, and suffix of the study's name, for baselines that lie outside of the space."""

FAILURES = (Status.DIVERGED, Status.OUT_OF_MEMORY, Status.FAILED)

MAX_WAITING = 32
"""Maximum number of waiting trials: the study is read several times per trial, and each of them adds 0.15 ms."""

MAX_REPEATED_DRAWS = 10
"""Number of draws in a row without a new point after which an untried point is chosen at random."""

MAX_ENUMERATED_POINTS = 100_000

RESULT = ("run_id", "scores", "figures")
"""Attributes that hold a trial's result, besides its values and its error."""

_STATES = {Status.FINISHED: TrialState.COMPLETE, Status.PRUNED: TrialState.PRUNED}


@dataclass(frozen=True)
class TrialView:
    """A trial as the study has it; ``path`` is its directory relative to the sweep's, also shown in messages."""

    trial: FrozenTrial
    path: str

    @property
    def number(self) -> int:
        """Its number in the study."""
        return self.trial.number

    @property
    def status(self) -> Status:
        """Its current or final status."""
        if self.trial.state.is_finished():
            return Status(self.trial.user_attrs.get("status", Status.REUSED))  # none: another program added it
        return Status.WAITING if self.trial.state == TrialState.WAITING else Status.RUNNING

    @property
    def point(self) -> Point:
        """The point that was queued for it, or drawn."""
        params = self.trial.params or self.trial.system_attrs.get("fixed_params", {})
        return Point(dict(params), tuple(self.attribute("extra") or ()), self.is_baseline)

    @property
    def point_key(self) -> str:
        """Equal for trials of the same point."""
        return str(self.attribute("point") or self.point.key)

    @property
    def is_baseline(self) -> bool:
        """Whether it was queued as the baseline."""
        return bool(self.attribute("baseline"))

    @property
    def name(self) -> str:
        """Its display name, which says what varies."""
        return str(self.attribute("name") or "")

    @property
    def owner(self) -> Owner | None:
        """The sweep's process that owns it; None if that was killed between asking Optuna and recording itself."""
        signed = self.attribute("owner")
        return Owner(**signed) if signed else None

    @property
    def values(self) -> tuple[float, ...]:
        """Its objectives; empty without a result."""
        return tuple(self.trial.values) if self.trial.state == TrialState.COMPLETE else ()

    @property
    def seconds(self) -> float:
        """Training time in seconds; 0 if unknown or not trained."""
        figures = {} if self.status is Status.REUSED else self.attribute("figures") or {}
        return float(figures.get("train_seconds", 0.0))

    def attribute(self, name: str) -> Any:
        """Return a user attribute, None if it was never set."""
        return self.trial.user_attrs.get(name)


class SweepStudy:
    """The trials of a plan, or of the baselines beside its space, for the process ``owner`` that works on them.

    Callers of :meth:`queue`, :meth:`take` and :meth:`take_over_dead_trials` must hold the sweep's lock.
    """

    def __init__(self, study: optuna.Study, plan: SweepPlan, owner: Owner, is_outside: bool = False) -> None:
        self.study, self.is_outside = study, is_outside
        self._storage: Any = study._storage  # Any: private methods are used as well
        self._plan, self._owner = plan, owner
        self.retry: set[int] = set()
        """Numbers of ended trials to train again."""
        self.owned_trials: dict[int, int] = {}
        """Trials that this process must bring to an end: number -> Optuna's trial id."""
        self.lost_owners: set[Owner] = set()
        """Dead or frozen processes whose trials were taken over."""
        self._known: list[TrialView] | None = None
        self._last: dict[str, int] = {}
        """Point key -> number of its last trial that ended by itself; earlier ones no longer count."""
        self._random = random.Random(0)

    def path(self, number: int) -> str:
        """Return a trial's directory relative to the sweep's."""
        return f"{BASELINE_STUDY}/{number}" if self.is_outside else str(number)

    def directory(self, number: int) -> Path:
        """Return a trial's directory."""
        return self._plan.directory / self.path(number)

    def views(self) -> list[TrialView]:
        """Return every trial by number, as of this process's last change or the last :meth:`refresh`."""
        if self._known is None:
            self._known = [TrialView(t, self.path(t.number)) for t in self.study.get_trials(deepcopy=False)]
            ended = [view for view in self._known if view.status in (*_STATES, *FAILURES)]
            self._last = {view.point_key: view.number for view in ended}
        return self._known

    def refresh(self) -> None:
        """Drop what was read, since other processes write too; reading takes time in proportion to queued trials."""
        self._known = None

    def counted(self) -> list[TrialView]:
        """Return the trials that count towards the total: launched, not void, and not copies of others."""
        return [v for v in self.views() if v.status not in (Status.WAITING, Status.REUSED) and not self.is_void(v)]

    def has_more(self) -> bool:
        """Return whether there is another trial to launch: a waiting one, or one that Optuna is to choose."""
        if self._plan.is_grid:
            return self._has_waiting() or bool(self._unqueued(self._plan.points))
        return len(self.counted()) < self._plan.total and (self._has_waiting() or not self.is_exhausted())

    def _has_waiting(self) -> bool:
        return any(view.status is Status.WAITING for view in self.views())

    def is_exhausted(self) -> bool:
        """Return whether the study contains every point of a finite space; it may contain other points as well."""
        if self._plan.space.size is None:
            return False
        inside = {
            v.point_key for v in self.views() if not self.is_void(v) and self._plan.space.contains(v.point.params)
        }
        return len(inside) >= self._plan.space.size

    def is_void(self, view: TrialView) -> bool:
        """Return whether a trial does not count: interrupted, (to be) trained again, or a copy of one without a result.

        While that one runs, the copy counts, or its point would be queued again every second.
        """
        pending = view.attribute("pending")
        is_pending_copy = pending and self.views()[view.attribute("reused_from")].status is not Status.RUNNING
        is_retried = view.number in self.retry or view.number < self._last.get(view.point_key, 0)
        return bool(view.status is Status.INTERRUPTED or is_pending_copy or is_retried)

    def queue(self) -> None:
        """Queue the next trials to train, and remove waiting ones that lie outside of the current space.

        A person may enqueue some values of a trial, whose others are then drawn.
        """
        for view in self.views():
            params, is_own = view.point.params, view.attribute("point") is not None
            if view.status is Status.WAITING and not self._plan.space.contains(params, is_partial=not is_own):
                if not is_own:
                    log.warning("trial %s, enqueued as %s, lies outside of the space: it is dropped", view.path, params)
                ended = view.trial._trial_id  # Study.tell accepts only running trials
                self._storage.set_trial_user_attr(ended, "status", Status.INTERRUPTED.value)
                self._storage.set_trial_user_attr(ended, "error", "the sweep went on with another space")
                self._storage.set_trial_state_values(ended, TrialState.FAIL)
                self.refresh()
        waiting = sum(view.status is Status.WAITING for view in self.views())
        self._enqueue(self._unqueued(self._plan.points)[: max(0, MAX_WAITING - waiting)])

    def _unqueued(self, points: Sequence[Point]) -> list[Point]:
        """Return the points of void trials, and of ``points``, that no other trial covers."""
        void = [v.point for v in self.views()
                if self.is_void(v) and v.trial.params and self._plan.space.contains(v.point.params)]  # fmt: skip
        present = {view.point_key for view in self.views() if not self.is_void(view)}
        wanted = {point.key: point for point in [*void, *points]}
        return [point for key, point in wanted.items() if key not in present]

    def _enqueue(self, points: Sequence[Point]) -> None:
        interrupted = {v.point_key: v.number for v in self.views() if v.status is Status.INTERRUPTED and v.name}
        for point in points:
            attributes = {"point": point.key, "extra": list(point.extra), "baseline": point.is_baseline,
                          "continues": interrupted.get(point.key)}  # fmt: skip
            self.study.enqueue_trial(point.params, user_attrs=attributes)
            self.refresh()

    def take(self) -> TrialView | None:
        """Begin the next trial; None if its point is being trained elsewhere, or if draws give no new point."""
        drawn, space = 0, self._plan.space
        while self.has_more() and drawn < 2 * MAX_REPEATED_DRAWS:
            if not self._has_waiting():
                self.queue()
            drawn += not self._has_waiting()
            view, is_pending = self._sample()
            if view is not None or is_pending:
                return view
            can_list = drawn >= MAX_REPEATED_DRAWS and (space.size or math.inf) <= MAX_ENUMERATED_POINTS
            if can_list and (left := self._unqueued(space.points())):
                self._enqueue([self._random.choice(left)])
        return None

    def _sample(self) -> tuple[TrialView | None, bool]:
        """Draw a point; returns its trial, or None if it is not new, and whether it is being trained elsewhere."""
        self.refresh()
        others = self.counted()
        trial = self._ask()
        self.owned_trials[trial.number] = trial._trial_id
        self.beat()
        trial.set_user_attr("owner", asdict(self._owner))
        self._plan.space.suggest(self._plan.base, trial)
        point = self._view(trial.number).point
        trial.set_user_attr("name", self._plan.name_of(point))
        try:
            key = self._plan.result_key(point)
        except SettingsError as error:
            self._tell(trial.number, Status.FAILED, str(error), {})
            return None, False
        trial.set_user_attr("key", key)
        self.refresh()
        same = next((view for view in others if view.attribute("key") == key), None)
        if same is not None:
            self._reuse(trial, same)
            return None, same.status is Status.RUNNING
        return self._view(trial.number), False

    def _ask(self) -> optuna.Trial:
        """Begin an interrupted trial first, since it may have a checkpoint or be the baseline; else Optuna's next."""
        for view in self.views():
            if view.status is Status.WAITING and view.attribute("continues") is not None:
                self._storage.set_trial_state_values(view.trial._trial_id, TrialState.RUNNING)
                return optuna.Trial(self.study, view.trial._trial_id)
        return self.study.ask()

    def _view(self, number: int) -> TrialView:
        """Read one of this process's trials by itself."""
        return TrialView(self._storage.get_trial(self.owned_trials[number]), self.path(number))

    def _reuse(self, trial: optuna.Trial, same: TrialView) -> None:
        """End ``trial`` with the result of ``same``, a trial of the same settings."""
        result = {name: same.attribute(name) for name in RESULT}
        result |= {"reused_from": same.number, "pending": same.status is Status.RUNNING}
        if not same.values:
            for step, value in same.trial.intermediate_values.items():
                self._storage.set_trial_intermediate_value(trial._trial_id, step, value)
        state = same.trial.state if same.trial.state.is_finished() else TrialState.FAIL
        self._tell(trial.number, Status.REUSED, same.attribute("error"), result, same.values, state)

    def finalize_record(self, number: int, status: Status, error: str | None) -> Record:
        """Return the record of a trial whose job is over; a record still RUNNING gets ``status`` and ``error``.

        A result that is not finite, which Optuna refuses, becomes FAILED, and a full disk becomes INTERRUPTED.
        """
        directory = self.directory(number)
        record = read_record(directory) or Record(UNRESOLVED_IDENTITY, Status.RUNNING, self._owner)
        values = {name: record.objective(name) for name in self._plan.objectives}
        if record.status is Status.FINISHED and not all(map(math.isfinite, values.values())):
            record = replace(record, status=Status.FAILED, error=f"{values} is not finite")
        elif not record.is_final:
            record = replace(record, status=status, error=error or record.error or "its process was killed")
        elif record.status is Status.FAILED and is_disk_full(record.error):
            record = replace(record, status=Status.INTERRUPTED)
        else:
            return record
        record.write(directory)
        return record

    def tell(self, number: int, record: Record) -> None:
        """Record in the study how a trial of this process ended: the last write of its end, which makes it count.

        Does nothing if another process has taken the trial over. Callers must hold the sweep's lock.
        """
        result = {"run_id": record.run_id, "scores": dict(record.scores), "figures": dict(record.figures)}
        values = [record.objective(name) for name in self._plan.objectives]
        states = _STATES if len(values) == 1 else {Status.FINISHED: TrialState.COMPLETE}
        self._tell(number, record.status, record.error, result, values, states.get(record.status, TrialState.FAIL))

    def restore_ends(self) -> dict[str, tuple[Status, str | None]]:
        """Restore the records of interrupted trials where a process that had lost them wrote another end.

        Such a process was frozen between checking that it owned the trial and writing the end. Returns the true ends of
        the trials' MLflow runs by run id; a later trial may have continued a run.
        """
        self.refresh()
        trained = [view for view in self.views() if view.status is not Status.REUSED]
        interrupted = [view for view in trained if view.status is Status.INTERRUPTED]
        for view in interrupted:
            directory, record = self.directory(view.number), read_record(self.directory(view.number))
            if record and record.is_final:
                kept = record.identity, view.status, record.owner, record.run_id, view.attribute("error")
                Record(*kept).write(directory)
        runs = {view.attribute("run_id") for view in interrupted} - {None}
        ends = {view.attribute("run_id"): (view.status, view.attribute("error")) for view in trained}
        return {run_id: ends[run_id] for run_id in runs}

    def _tell(self, number: int, status: Status, error: str | None, attributes: dict[str, Any],
              values: Sequence[float] = (), state: TrialState = TrialState.FAIL) -> None:  # fmt: skip
        if self.holds(number):  # another process may have taken it over
            told = attributes | {"status": status.value} | ({"error": error} if error else {})
            for name, value in told.items():
                self._storage.set_trial_user_attr(self.owned_trials[number], name, value)
            given = list(values) if state == TrialState.COMPLETE else None
            self.study.tell(number, given, state=state, skip_if_finished=True)
        self.refresh()
        self.owned_trials.pop(number, None)

    def holds(self, number: int) -> bool:
        """Return whether this process still owns a trial; another may have taken it over while this one was frozen."""
        view = self._view(number)  # ended, if the storage went silent after this process's last write
        return view.status is Status.RUNNING and view.owner == self._owner

    def beat(self) -> None:
        """Send heartbeats for this process's trials: without them, :meth:`take_over_dead_trials` acts, on any host."""
        for trial_id in tuple(self.owned_trials.values()):
            self._storage.record_heartbeat(trial_id)

    def take_over_dead_trials(self) -> list[int]:
        """Take over each RUNNING trial whose process is gone, into :attr:`owned_trials`; returns their numbers."""
        self.refresh()  # a dead process may have recorded the ends of its last trials
        silent = self._storage._get_stale_trial_ids(self.study._study_id)
        running = [v for v in self.views() if v.status is Status.RUNNING and v.number not in self.owned_trials]
        found = [view for view in running if view.trial._trial_id in silent or self._is_abandoned(view)]
        for view in found:
            record = read_record(self.directory(view.number))
            workers = view.owner, record and record.owner  # the sweep's process and the job's, where recorded
            self.lost_owners |= {owner for owner in workers if owner}
            self.owned_trials[view.number] = view.trial._trial_id
            self._storage.set_trial_user_attr(view.trial._trial_id, "owner", asdict(self._owner))
        self.beat()
        return [view.number for view in found]

    def _is_abandoned(self, view: TrialView) -> bool:
        """Return whether a trial is abandoned: its sweep's process is gone, and its job has ended or is gone.

        This is the fast check, for this host; for other hosts, only missing heartbeats tell.
        """
        if view.owner and view.owner != self._owner and not view.owner.is_dead():
            return False
        record = read_record(self.directory(view.number))
        return record is None or record.status is not Status.RUNNING or record.owner.is_dead()
