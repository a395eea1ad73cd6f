"""An Optuna study that keeps a sweep: which trials there are, whose they are, how they ended.

A trial counts as what ``trial.json`` in its directory says. Optuna's own states follow: FINISHED is COMPLETE, PRUNED
is PRUNED, every other end is FAIL with the true word in the attribute ``status``. Trials that are to be trained wait
in the study's own queue, so that any process may take the next one; a trial that was interrupted is void, and its
point is queued again under the next free number.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep.space import Cell, Point, Space

REUSED = "REUSED"
"""Status of a trial whose point had been evaluated before: it has that one's values and was not trained."""

FAILURES = (Status.DIVERGED, Status.OUT_OF_MEMORY, Status.FAILED)

PATIENCE = 10
"""Points drawn in a row that were all evaluated before, after which one that was not is taken at random."""

LARGEST_LISTED = 100_000

Compose = Callable[[Cell], Point]


@dataclass(frozen=True)
class Task:
    """A trial to be launched."""

    number: int
    trial_id: int
    point: Point
    is_baseline: bool


@dataclass(frozen=True)
class Standing:
    """One trial as the study has it."""

    trial: FrozenTrial

    @property
    def number(self) -> int:
        """Its number, and the name of its directory."""
        return self.trial.number

    @property
    def status(self) -> str:
        """A :class:`Status`, WAITING or REUSED."""
        if self.trial.state == TrialState.WAITING:
            return "WAITING"
        return str(self.trial.user_attrs["status"]) if self.trial.state.is_finished() else Status.RUNNING.value

    @property
    def is_baseline(self) -> bool:
        """Whether it was queued as the baseline."""
        return bool(self.attribute("baseline"))

    @property
    def point(self) -> str:
        """Equal for trials of the same parameters."""
        queued = self.trial.user_attrs.get("point")
        return str(queued) if queued else Cell(self.trial.params).point

    @property
    def params(self) -> Mapping[str, Any]:
        """Its parameters; of one that waits, those that it was queued with."""
        return self.trial.params or self.trial.system_attrs.get("fixed_params", {})

    def attribute(self, name: str) -> Any:
        """A user attribute, None where it was never set."""
        return self.trial.user_attrs.get(name)


class Study:
    """``study`` with the ``directory`` of its trials, as the process ``owner`` works on it.

    Whoever calls :meth:`queue`, :meth:`take`, :meth:`settle` or :meth:`close_dead` holds the sweep's lock.
    """

    def __init__(self, study: optuna.Study, directory: Path, objectives: Sequence[str], owner: Owner,
                 take_over: bool, retry: Sequence[int] = ()) -> None:  # fmt: skip
        self.study, self.directory, self.objectives = study, directory, objectives
        self._owner, self._take_over, self._retry = owner, take_over, frozenset(retry)
        self.mine: set[int] = set()
        """Numbers of trials that this process has launched and not settled yet."""
        self._known: list[Standing] | None = None
        self._random = random.Random(0)

    def standings(self) -> list[Standing]:
        """Every trial, by number, as of the last change of this process's own or the last :meth:`refresh`."""
        if self._known is None:
            self._known = [Standing(trial) for trial in self.study.get_trials(deepcopy=False)]
        return self._known

    def refresh(self) -> None:
        """Forget what was read: other processes write, too. A reading takes as long as there are trials queued."""
        self._known = None

    def _is_void(self, standing: Standing) -> bool:
        """Whether a trial counts for nothing: it was interrupted, is retried, or copied one that was still running."""
        unfinished_copy = standing.status == REUSED and standing.trial.state == TrialState.FAIL
        pending_copy = unfinished_copy and standing.attribute("pending")
        return standing.status == Status.INTERRUPTED or standing.number in self._retry or bool(pending_copy)

    def counted(self) -> list[Standing]:
        """The trials that count towards the total: launched, not void, not copied from others."""
        return [s for s in self.standings() if s.status not in ("WAITING", REUSED) and not self._is_void(s)]

    def waiting(self) -> int:
        """How many trials are queued."""
        return sum(s.status == "WAITING" for s in self.standings())

    def queue(self, cells: Sequence[Cell], space: Space) -> None:
        """Queue those of ``cells``, and of the void trials' points, that no other trial stands for.

        What an earlier ``space`` had and this one lacks is taken out of the queue.
        """
        for standing in self.standings():
            if standing.status == "WAITING" and not space.contains(standing.params):
                self._withdraw(standing.trial._trial_id)
        standings = self.standings()
        present = {s.point for s in standings if not self._is_void(s)}
        void = [Cell(s.trial.params, is_baseline=s.is_baseline) for s in standings
                if self._is_void(s) and s.trial.params and space.contains(s.params)]  # fmt: skip
        for cell in [*cells, *void]:
            if cell.point not in present:
                present.add(cell.point)
                attributes = {"point": cell.point, "extra": list(cell.extra), "baseline": cell.is_baseline}
                self.study.enqueue_trial(cell.params, user_attrs=attributes)
                self.refresh()

    def _withdraw(self, trial_id: int) -> None:
        """End a trial that waits; ``Study.tell`` takes only those that run."""
        storage = self.study._storage
        storage.set_trial_user_attr(trial_id, "status", Status.INTERRUPTED.value)
        storage.set_trial_user_attr(trial_id, "error", "the sweep went on with another space")
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
        self.refresh()

    def take(self, space: Space, compose: Compose, config: Any) -> Task | None:
        """The next trial to launch; None where only points are left that were evaluated or are under way."""
        for drawn in range(1, 2 * PATIENCE):
            task, pending = self._draw(space, compose, config)
            if task is not None:
                return task
            if pending or (self.is_exhausted(space) and not self.waiting()):
                return None
            if drawn >= PATIENCE:
                self._queue_untried(space)
        return None

    def _draw(self, space: Space, compose: Compose, config: Any) -> tuple[Task | None, bool]:
        """Ask Optuna for one point: a task, or none and whether the same point is under way elsewhere."""
        self.refresh()
        others = self.counted()
        trial = self.study.ask()
        self.refresh()
        trial.set_user_attr("owner", asdict(self._owner))
        for key, distribution in space.dimensions.items():
            trial._suggest(key, distribution)
        if space.custom:
            space.custom(config, trial)
        try:
            point = compose(Cell(dict(trial.params), tuple(trial.user_attrs.get("extra", ()))))
        except SettingsError as error:
            self._tell(trial._trial_id, Status.FAILED, str(error))
            return None, False
        trial.set_user_attr("key", point.key)
        same = next((s for s in others if s.attribute("key") == point.key), None)
        if same is not None:
            self._reuse(trial, same)
            return None, same.status == Status.RUNNING
        self.mine.add(trial.number)
        return Task(trial.number, trial._trial_id, point, bool(trial.user_attrs.get("baseline"))), False

    def is_exhausted(self, space: Space) -> bool:
        """Whether every point of a space that can be counted stands in the study, which may hold others, too."""
        if space.size is None:
            return False
        inside = {s.point for s in self.standings() if not self._is_void(s) and space.contains(s.params)}
        return len(inside) >= space.size

    def _queue_untried(self, space: Space) -> None:
        if space.size is None or space.size > LARGEST_LISTED:
            return
        tried = {s.point for s in self.standings() if not self._is_void(s)}
        left = [cell for cell in map(Cell, space.cells()) if cell.point not in tried]
        if left:
            self.queue([self._random.choice(left)], space)

    def _reuse(self, trial: optuna.Trial, same: Standing) -> None:
        """End ``trial`` with what its twin came to."""
        self.refresh()
        values = {"status": REUSED, "reused_from": same.number, "pending": same.status == Status.RUNNING}
        for name, value in values.items():
            trial.set_user_attr(name, value)
        if same.trial.state == TrialState.COMPLETE:
            self.study.tell(trial, same.trial.values)
            return
        for step, value in same.trial.intermediate_values.items():
            trial.report(value, step)
        self.study.tell(trial, state=TrialState.PRUNED if same.trial.state == TrialState.PRUNED else TrialState.FAIL)

    def settle(self, number: int, interrupted: bool = False, error: str | None = None) -> tuple[Status, str | None]:
        """Tell the study how a trial of this process ended, from its record; returns that and the error, if any.

        A trial without an end of its own was ``interrupted`` with its sweep, or failed with ``error``.
        """
        self.mine.discard(number)
        record = read_record(self.directory / str(number))
        if record is None or not record.is_over:
            return self._close(number, record, Status.INTERRUPTED if interrupted else Status.FAILED, error)
        trial_id = self._id_of(number)
        if trial_id is None:  # another process found it first
            return record.status, record.error
        return self._settle_as(trial_id, record)

    def _settle_as(self, trial_id: int, record: Record) -> tuple[Status, str | None]:
        status, error = record.status, record.error
        values = [record.objective(name) for name in self.objectives]
        if status is Status.FINISHED and any(abs(v) == float("inf") or v != v for v in values):
            status, error = Status.FAILED, f"{dict(zip(self.objectives, values, strict=True))} is not finite"
        kept = {"run_id": record.run_id, "scores": dict(record.scores), "selection": dict(record.selection),
                "figures": dict(record.figures)}  # fmt: skip
        for name, value in kept.items():
            self.study._storage.set_trial_user_attr(trial_id, name, value)
        self._tell(trial_id, status, error, values)
        return status, error

    def _close(
        self, number: int, record: Record | None, status: Status, error: str | None
    ) -> tuple[Status, str | None]:
        """End a trial that has no end of its own, in its record and in the study."""
        error = error or (record.error if record else None) or "its process was killed"
        owner = record.owner if record else self._owner
        identity = record.identity if record else {"protocol": None, "treatment": None, "seed": None}
        run_id = record.run_id if record else None
        Record(identity, status, owner, run_id, error).write(self.directory / str(number))
        trial_id = self._id_of(number)
        if trial_id is not None:
            self._tell(trial_id, status, error)
        return status, error

    def _id_of(self, number: int) -> int | None:
        """The storage's id of a trial that is RUNNING in the study."""
        self.refresh()
        trial = self.standings()[number].trial
        return trial._trial_id if trial.state == TrialState.RUNNING else None

    def _tell(self, trial_id: int, status: Status, error: str | None, values: Sequence[float] = ()) -> None:
        storage = self.study._storage
        self.refresh()
        storage.set_trial_user_attr(trial_id, "status", status.value)
        storage.set_trial_user_attr(trial_id, "error", error)
        number = storage.get_trial_number_from_id(trial_id)
        if status is Status.FINISHED:
            self.study.tell(number, list(values), skip_if_finished=True)
        else:
            state = TrialState.PRUNED if status is Status.PRUNED else TrialState.FAIL
            self.study.tell(number, state=state, skip_if_finished=True)

    def close_dead(self) -> list[int]:
        """Settle each RUNNING trial whose process is gone, by its record; returns their numbers."""
        closed = []
        for standing in self.standings():
            if standing.trial.state == TrialState.RUNNING and standing.number not in self.mine:
                record = read_record(self.directory / str(standing.number))
                if self._is_left(standing, record):
                    self.settle(standing.number, interrupted=True)
                    closed.append(standing.number)
        return closed

    def _is_left(self, standing: Standing, record: Record | None) -> bool:
        """Whether nobody will settle a trial: its sweep's process is gone, and its job has ended or is gone, too."""
        owner = standing.attribute("owner")  # None: killed between asking and signing, under the lock that we hold
        if owner is not None and owner != asdict(self._owner) and not Owner(**owner).is_dead(self._take_over):
            return False
        return (
            record is None
            or record.is_over
            or record.owner.is_dead(self._take_over)
            or (record.status is Status.INTERRUPTED)
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from announcing each step, and experimental features, to people who did not ask it."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
