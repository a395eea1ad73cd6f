"""An Optuna study that keeps a sweep: which trials there are, whose they are, how they ended.

A trial counts as what ``trial.json`` in its directory says. Optuna's own states follow: FINISHED is COMPLETE, PRUNED
is PRUNED (of several objectives FAIL: Optuna's samplers rank pruned trials by one), every other end is FAIL with the
true word in the attribute ``status``. Trials that are to be trained wait
in the study's own queue, so that any process may take the next one; a trial that was interrupted is void, and its
point is queued again under the next free number.
"""

from __future__ import annotations

import errno
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep.job import NOBODY
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.space import Point

BESIDE = "baseline"
"""Directory, and end of the study's name, of baselines that lie outside of the space."""

FAILURES = (Status.DIVERGED, Status.OUT_OF_MEMORY, Status.FAILED)

AHEAD = 32
"""Trials that wait in the study at most: it is read several times a trial, which takes 0.15 ms for each that waits."""

PATIENCE = 10
"""Points drawn in a row that were all evaluated before, after which one that was not is taken at random."""

LARGEST_LISTED = 100_000

NO_SPACE = os.strerror(errno.ENOSPC)
"""What the error of a trial says that found the disk full: no fault of its point, which is tried again."""

RESULT = ("run_id", "scores", "figures")
"""Attributes that tell what a trial came to, beside its values and its error."""

_STATES = {Status.FINISHED: TrialState.COMPLETE, Status.PRUNED: TrialState.PRUNED}


@dataclass(frozen=True)
class TrialView:
    """A trial as the study has it; ``path`` is its directory below the sweep's, by which people call it."""

    trial: FrozenTrial
    path: str

    @property
    def number(self) -> int:
        """Its number in the study."""
        return self.trial.number

    @property
    def status(self) -> Status:
        """How it stands or ended."""
        if self.trial.state.is_finished():
            return Status(self.trial.user_attrs["status"])
        return Status.WAITING if self.trial.state == TrialState.WAITING else Status.RUNNING

    @property
    def point(self) -> Point:
        """What it was queued as, or drawn."""
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
        """What varies, as its run is called."""
        return str(self.attribute("name") or "")

    @property
    def owner(self) -> Owner | None:
        """The process of the sweep that has it; None where that was killed between asking and signing."""
        signed = self.attribute("owner")
        return Owner(**signed) if signed else None

    @property
    def values(self) -> tuple[float, ...]:
        """Its objectives, empty without a result."""
        return tuple(self.trial.values) if self.trial.state == TrialState.COMPLETE else ()

    @property
    def seconds(self) -> float:
        """What it took to train, 0 if unknown or not trained."""
        figures = {} if self.status is Status.REUSED else self.attribute("figures") or {}
        return float(figures.get("train_seconds", 0.0))

    def attribute(self, name: str) -> Any:
        """Return a user attribute, None if it was never set."""
        return self.trial.user_attrs.get(name)


class Study:
    """The trials of a plan, or of that of the baselines beside its space, as the process ``owner`` works on them.

    ``retry`` holds numbers of failed trials that are to be trained again. Whoever calls :meth:`queue`, :meth:`take` or
    :meth:`adopt_dead` holds the sweep's lock.
    """

    def __init__(self, study: optuna.Study, plan: SweepPlan, owner: Owner, is_beside: bool = False,
                 retry: Sequence[int] = ()) -> None:  # fmt: skip
        self.study, self.is_beside = study, is_beside
        self._storage: Any = study._storage  # also of its methods for hearts and for trials that wait
        self._plan, self._owner, self._retry = plan, owner, frozenset(retry)
        self.mine: dict[int, int] = {}
        """Trials that this process has to bring to their end: Optuna's id of each by its number."""
        self.left: set[Owner] = set()
        """Processes, dead or frozen, that trials were taken from."""
        self._known: list[TrialView] | None = None
        self._last: dict[str, int] = {}
        """The last trial of each point that came to an end of its own: what it repeats counts no more."""
        self._random = random.Random(0)

    def path(self, number: int) -> str:
        """Return a trial's directory below the sweep's."""
        return f"{BESIDE}/{number}" if self.is_beside else str(number)

    def directory(self, number: int) -> Path:
        """Return a trial's directory."""
        return self._plan.directory / self.path(number)

    def views(self) -> list[TrialView]:
        """Return every trial, by number, as of this process's own last change or the last :meth:`refresh`."""
        if self._known is None:
            self._known = [TrialView(t, self.path(t.number)) for t in self.study.get_trials(deepcopy=False)]
            ended = [view for view in self._known if view.status in (*_STATES, *FAILURES)]
            self._last = {view.point_key: view.number for view in ended}
        return self._known

    def refresh(self) -> None:
        """Forget what was read: other processes write, too. A reading takes as long as there are trials queued."""
        self._known = None

    def counted(self) -> list[TrialView]:
        """Return the trials that count towards the total: launched, not void, not copied from others."""
        return [v for v in self.views() if v.status not in (Status.WAITING, Status.REUSED) and not self.is_void(v)]

    def has_more(self) -> bool:
        """Return whether a further trial is to be launched: a waiting one, or one that Optuna is to choose."""
        if self._plan.is_grid:
            return self._has_waiting() or bool(self._unqueued())
        return len(self.counted()) < self._plan.total and (self._has_waiting() or not self.is_exhausted())

    def _has_waiting(self) -> bool:
        return any(view.status is Status.WAITING for view in self.views())

    def is_exhausted(self) -> bool:
        """Return whether every point of a space that can be counted stands in the study, which may hold others too."""
        if self._plan.space.size is None:
            return False
        inside = {
            v.point_key for v in self.views() if not self.is_void(v) and self._plan.space.contains(v.point.params)
        }
        return len(inside) >= self._plan.space.size

    def is_void(self, view: TrialView) -> bool:
        """Whether a trial counts for nothing: interrupted, or (to be) trained again, or a copy of one still running."""
        is_pending_copy = view.status is Status.REUSED and bool(view.attribute("pending"))
        is_retried = view.number in self._retry or view.number < self._last.get(view.point_key, 0)
        return view.status is Status.INTERRUPTED or is_pending_copy or is_retried

    def queue(self) -> None:
        """Queue the next of what is to be trained; what an earlier space had and this one lacks is taken out."""
        for view in self.views():
            if view.status is Status.WAITING and not self._plan.space.contains(view.point.params):
                ended = view.trial._trial_id  # Study.tell takes only those that run
                self._storage.set_trial_user_attr(ended, "status", Status.INTERRUPTED.value)
                self._storage.set_trial_user_attr(ended, "error", "the sweep went on with another space")
                self._storage.set_trial_state_values(ended, TrialState.FAIL)
                self.refresh()
        waiting = sum(view.status is Status.WAITING for view in self.views())
        self._enqueue(self._unqueued()[: max(0, AHEAD - waiting)])

    def _unqueued(self) -> list[Point]:
        """Those of the plan's points, and of the void trials', that no other trial stands for."""
        void = [v.point for v in self.views()
                if self.is_void(v) and v.trial.params and self._plan.space.contains(v.point.params)]  # fmt: skip
        present = {view.point_key for view in self.views() if not self.is_void(view)}
        wanted = {point.key: point for point in [*void, *self._plan.points]}
        return [point for key, point in wanted.items() if key not in present]

    def _enqueue(self, points: Sequence[Point]) -> None:
        interrupted = {v.point_key: v.number for v in self.views() if v.status is Status.INTERRUPTED and v.name}
        for point in points:
            attributes = {"point": point.key, "extra": list(point.extra), "baseline": point.is_baseline,
                          "continues": interrupted.get(point.key)}  # fmt: skip
            self.study.enqueue_trial(point.params, user_attrs=attributes)
            self.refresh()

    def take(self) -> TrialView | None:
        """Begin the next trial; None if the same point is under way elsewhere, or draws bring nothing new."""
        drawn = 0
        while self.has_more() and (drawn < 2 * PATIENCE or self._has_waiting() or self._plan.is_grid):
            if not self._has_waiting():
                self.queue()
            view, is_pending = self._draw()
            if view is not None or is_pending:
                return view
            drawn += 1
            if drawn >= PATIENCE:
                self._enqueue_untried()
        return None

    def _draw(self) -> tuple[TrialView | None, bool]:
        """Ask Optuna for one point: its trial, or none and whether the same point is under way elsewhere."""
        self.refresh()
        others = self.counted()
        trial = self._ask()
        self.mine[trial.number] = trial._trial_id
        self.beat()
        trial.set_user_attr("owner", asdict(self._owner))
        for key, distribution in self._plan.space.dimensions.items():
            trial._suggest(key, distribution)
        if self._plan.space.custom and self._plan.base is not None:
            self._plan.space.custom(self._plan.base, trial)
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
        """Begin an interrupted trial first, which has a checkpoint, or is the baseline; else Optuna's next."""
        for view in self.views():
            if view.status is Status.WAITING and view.attribute("continues") is not None:
                self._storage.set_trial_state_values(view.trial._trial_id, TrialState.RUNNING)
                return optuna.Trial(self.study, view.trial._trial_id)
        return self.study.ask()

    def _view(self, number: int) -> TrialView:
        """One of this process's trials, read by itself."""
        return TrialView(self._storage.get_trial(self.mine[number]), self.path(number))

    def _enqueue_untried(self) -> None:
        size = self._plan.space.size
        if self._plan.is_grid or size is None or size > LARGEST_LISTED:
            return
        tried = {view.point_key for view in self.views() if not self.is_void(view)}
        left = [point for point in self._plan.space.points() if point.key not in tried]
        if left:
            self._enqueue([self._random.choice(left)])

    def _reuse(self, trial: optuna.Trial, same: TrialView) -> None:
        """End ``trial`` with what its twin came to."""
        result = {name: same.attribute(name) for name in RESULT}
        result |= {"reused_from": same.number, "pending": same.status is Status.RUNNING}
        if not same.values:
            for step, value in same.trial.intermediate_values.items():
                self._storage.set_trial_intermediate_value(trial._trial_id, step, value)
        state = same.trial.state if same.trial.state.is_finished() else TrialState.FAIL
        self._tell(trial.number, Status.REUSED, same.attribute("error"), result, same.values, state)

    def end_of(self, number: int, status: Status, error: str | None) -> Record:
        """Return the record of a trial whose job is over; one without an end of its own gets ``status`` and ``error``.

        A result that Optuna can't take, an objective that is not finite, makes the trial FAILED.
        """
        directory = self.directory(number)
        record = read_record(directory) or Record(NOBODY, Status.RUNNING, self._owner)
        values = {name: record.objective(name) for name in self._plan.objectives}
        if record.status is Status.FINISHED and not all(map(math.isfinite, values.values())):
            record = replace(record, status=Status.FAILED, error=f"{values} is not finite")
        elif not record.is_over:
            record = replace(record, status=status, error=error or record.error or "its process was killed")
        elif record.status is Status.FAILED and NO_SPACE in (record.error or ""):
            record = replace(record, status=Status.INTERRUPTED)
        else:
            return record
        record.write(directory)
        return record

    def tell(self, number: int, record: Record) -> None:
        """Let the study know how a trial of this process ended: the last write of its end, with which it counts.

        Does nothing to a trial that another process has taken over; whoever calls holds the sweep's lock.
        """
        result = {"run_id": record.run_id, "scores": dict(record.scores), "figures": dict(record.figures)}
        values = [record.objective(name) for name in self._plan.objectives]
        states = _STATES if len(values) == 1 else {Status.FINISHED: TrialState.COMPLETE}
        self._tell(number, record.status, record.error, result, values, states.get(record.status, TrialState.FAIL))

    def put_right(self) -> dict[str, tuple[Status, str | None]]:
        """Give interrupted trials their ends back, which a process may have written over that had lost them.

        It was frozen, for long, between making sure that a trial is its own and writing its end. Returns how the runs
        of such trials, which others may have continued, ended.
        """
        self.refresh()
        trained = [view for view in self.views() if view.status is not Status.REUSED]
        interrupted = [view for view in trained if view.status is Status.INTERRUPTED]
        for view in interrupted:
            directory, record = self.directory(view.number), read_record(self.directory(view.number))
            if record and record.is_over:
                kept = record.identity, view.status, record.owner, record.run_id, view.attribute("error")
                Record(*kept).write(directory)
        runs = {view.attribute("run_id") for view in interrupted} - {None}
        ends = {view.attribute("run_id"): (view.status, view.attribute("error")) for view in trained}
        return {run_id: ends[run_id] for run_id in runs}

    def _tell(self, number: int, status: Status, error: str | None, attributes: Mapping[str, Any],
              values: Sequence[float] = (), state: TrialState = TrialState.FAIL) -> None:  # fmt: skip
        if self.holds(number):  # another process may have found it first
            for name, value in {**attributes, "status": status.value, "error": error}.items():
                self._storage.set_trial_user_attr(self.mine[number], name, value)
            given = list(values) if state == TrialState.COMPLETE else None
            self.study.tell(number, given, state=state, skip_if_finished=True)
        self.refresh()
        self.mine.pop(number, None)

    def holds(self, number: int) -> bool:
        """Return whether a trial is still this process's to end: none that was frozen for long can be sure of that."""
        if number not in self.mine:
            return False
        view = self._view(number)
        return view.status is Status.RUNNING and view.owner == self._owner

    def beat(self) -> None:
        """Have the hearts of this process's trials beat; whose stand still are :meth:`adopt_dead`'s, on any host."""
        for trial_id in tuple(self.mine.values()):
            self._storage.record_heartbeat(trial_id)

    def adopt_dead(self) -> list[int]:
        """Make each RUNNING trial whose process is gone one of :attr:`mine`; returns their numbers."""
        self.refresh()  # a process that is gone may have told how its last trials ended
        silent = self._storage._get_stale_trial_ids(self.study._study_id)
        running = [v for v in self.views() if v.status is Status.RUNNING and v.number not in self.mine]
        found = [view for view in running if view.trial._trial_id in silent or self._is_left(view)]
        for view in found:
            record = read_record(self.directory(view.number))
            workers = view.owner, record and record.owner  # its sweep's process and its job's, as far as they signed
            self.left |= {owner for owner in workers if owner}
            self.mine[view.number] = view.trial._trial_id
            self._storage.set_trial_user_attr(view.trial._trial_id, "owner", asdict(self._owner))
        self.beat()
        self.refresh()
        return [view.number for view in found]

    def _is_left(self, view: TrialView) -> bool:
        """Whether nobody on this host will end a trial: its sweep's process is gone, and its job has ended or is gone.

        That is the quick answer; of processes on other hosts only their hearts tell.
        """
        if view.owner and view.owner != self._owner and not view.owner.is_dead():
            return False
        record = read_record(self.directory(view.number))
        return record is None or record.status is not Status.RUNNING or record.owner.is_dead()
