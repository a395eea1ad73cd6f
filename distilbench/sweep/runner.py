"""The loop of every sweep: take, launch, settle; and whatever happens, leave it so that it can go on."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf
from rich.console import Console

from distilbench.cli import end_cleanly
from distilbench.composition import default_treatment
from distilbench.report.from_store import report_sweep
from distilbench.results import PREDICTIONS, RECORD, Owner, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep.display import Screen, print_plan
from distilbench.sweep.executors import AsFreed, Hands, Launch, error_of, hands_of, quiet_launchers
from distilbench.sweep.job import ENVIRONMENT, SweepJob
from distilbench.sweep.leaderboard import Board, name_of, row_of
from distilbench.sweep.options import Options, Place
from distilbench.sweep.plan import Plan, make_plan
from distilbench.sweep.pruning import pruner_of
from distilbench.sweep.space import Space
from distilbench.sweep.storage import (
    UNANSWERED,
    Storage,
    check_unchanged,
    extend_study,
    open_study,
    said_by,
    sampler_of,
    storage_at,
)
from distilbench.sweep.study import FAILURES, Study, Task, quiet
from distilbench.tracking import MlflowStore, NullParentRun, ParentRun, open_store

log = logging.getLogger(__name__)

BESIDE = "baseline"
"""Directory, and end of the study's name, of baselines that lie outside of the space."""

POLL_SECONDS = 1.0


def run_sweep(options: Options, place: Place, arguments: Sequence[str]) -> str | None:
    """Run a sweep to its end, or continue it; returns None, or in one line why it failed.

    Raises :class:`SettingsError`, before anything is written, for all that a person can mend.
    """
    with quiet():
        plan = make_plan(options, place, arguments)
        if plan.settings.sweep.dry_run:
            print_plan(plan, Console())
            return None
        end_cleanly()
        storage = storage_at(options.storage, place.written("storage"), plan.directory)
        store = open_store(plan.settings.tracking)
        plan, sweep = _open(plan, storage, options)
        group = _open_group(plan, sweep, store)
        loop = Loop(plan, place, storage, sweep, group, options)
        try:
            failure = loop.run()
        except UNANSWERED as error:
            return f"hydra.sweeper.storage no longer answers: {said_by(error)}; the same command continues"
        if report_sweep(store, plan.name, plan.directory, default_treatment()) is None:
            loop.show_all()  # nothing is tracked: there is only what the study knows
        return failure


@dataclass(frozen=True)
class Studies:
    """The sweep's own study, and the one of baselines beside its space (None where there is none)."""

    main: Study
    beside: Study | None

    @property
    def all(self) -> list[Study]:
        """Both, in the order in which they are worked on."""
        return [study for study in (self.beside, self.main) if study]


def _open(plan: Plan, storage: Storage, options: Options) -> tuple[Plan, Studies]:
    """Make or load the studies; returns them with the plan, whose space has become the study's own."""
    plan.directory.mkdir(parents=True, exist_ok=True)
    owner, take_over = Owner.of_this_process(), plan.settings.sweep.take_over
    with storage.lock():
        main = open_study(storage, plan.name, plan.directions, None, pruner_of(plan.settings.sweep))
        kept = main.user_attrs.get("identity")
        if kept is not None and kept != plan.identity:
            check_unchanged(kept, plan.identity, plan.name, plan.settings.sweep.on_change == "extend")
        space = extend_study(main, plan.space, storage, lambda other: other.is_dead(take_over))
        if kept != plan.identity:
            main.set_user_attr("identity", plan.identity)
        if space != plan.space:  # the study is read again, for Optuna to see the longer lists
            plan = replace(plan, space=space)
            main = open_study(storage, plan.name, plan.directions, None, pruner_of(plan.settings.sweep))
        main.sampler = sampler_of(options.sampler, len(main.get_trials(deepcopy=False))) or main.sampler
        beside = open_study(storage, f"{plan.name}.{BESIDE}", plan.directions, None, None) if plan.beside else None
        return plan, Studies(
            Study(main, plan.directory, plan.objectives, owner, take_over, _to_retry(plan, main)),
            Study(beside, plan.directory / BESIDE, plan.objectives, owner, take_over) if beside else None,
        )


def _to_retry(plan: Plan, study: Any) -> list[int]:
    """Numbers of the failed trials that ``sweep.retry_failed`` asks for; a diverged one would diverge again."""
    again = (Status.FAILED, Status.OUT_OF_MEMORY) if plan.settings.sweep.retry_failed else ()
    return [t.number for t in study.get_trials(deepcopy=False) if t.user_attrs.get("status") in again]


def _open_group(plan: Plan, studies: Studies, store: MlflowStore | None) -> ParentRun:
    """The sweep's own run: the one that it had before, where there is one."""
    if store is None:
        return NullParentRun()
    study = studies.main.study
    tags = {"distilbench.sweep": plan.name, "distilbench.role": "sweep"}
    group = store.open_parent_run(plan.name, tags, run_id=study.user_attrs.get("run_id"))
    study.set_user_attr("run_id", group.run_id)
    return group


class Loop:
    """One process at work on a sweep."""

    def __init__(self, plan: Plan, place: Place, storage: Storage, studies: Studies, group: ParentRun,
                 options: Options) -> None:  # fmt: skip
        self._plan, self._place, self._storage = plan, place, storage
        self._studies, self._group = studies, group
        self._hands: Hands = hands_of(place.launcher, place.config.hydra.launcher, options.at_once)
        self._screen = Screen(Console(), is_live=isinstance(self._hands, AsFreed))
        self._limit = plan.failures_borne
        if options.max_failure_rate is not None:
            self._limit = options.max_failure_rate * (plan.total + len(plan.beside))
        self._owner = Owner.of_this_process()
        self._began = time.monotonic()
        self._ended: str | None = None
        """Why no further trial is taken."""
        self._failed = False
        """Whether that is a failure of the sweep."""

    def run(self) -> str | None:
        """Work until there is nothing left to do; returns why the sweep failed, if it did."""
        with quiet_launchers(self._place.config), self._screen, self._closing():
            self._close_dead()
            for study in self._studies.all:
                self._work(study)
            return self._finish()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """On a signal or an error, leave no trial of this process RUNNING."""
        try:
            yield
        except BaseException as error:
            self._hands.stop()
            with contextlib.suppress(*UNANSWERED):  # the next call closes them
                self._close_mine()
            self._group.close_dead(self._is_over)
            self._group.finish(Status.INTERRUPTED, "interrupted; the same command continues")
            if isinstance(error, KeyboardInterrupt):
                self._say(f"interrupted: {self._board().line()}; the same command continues")
            raise

    def _close_mine(self) -> None:
        with self._storage.lock():
            for study in self._studies.all:
                for number in sorted(study.mine):
                    study.settle(number, interrupted=True, error="interrupted with its sweep")

    def _close_dead(self) -> None:
        """Close what killed processes left, in the studies and in MLflow, and say so."""
        with self._storage.lock():
            closed = [number for study in self._studies.all for number in self._close_dead_in(study)]
        runs = self._group.close_dead(self._is_over)
        if closed or runs:
            self._say(f"continued: {len(closed)} trials that a killed process left were closed")

    def _close_dead_in(self, study: Study) -> list[int]:
        closed = study.close_dead()
        for number in closed:
            self._settle_runs(study, number)
        return closed

    def _settle_runs(self, study: Study, number: int) -> None:
        """End the runs of a trial (and of its seeds) that their process left RUNNING, as their records say."""
        for path in (study.directory / str(number)).rglob(RECORD):
            record = read_record(path.parent)
            if record and record.run_id:
                self._group.settle(
                    record.run_id, record.status, record.error, record.figures, path.parent / PREDICTIONS
                )

    def _is_over(self, owner: Owner) -> bool:
        """Whether a run that is RUNNING has no process: called where this one has no trial under way."""
        return owner == self._owner or owner.is_dead(self._plan.settings.sweep.take_over)

    def _work(self, study: Study) -> None:
        """Launch and settle until this study has no more trials to give."""
        running: dict[Future[JobReturn], int] = {}
        told = False
        while True:
            tasks = self._take(study, len(running))
            if tasks:
                launches = [self._launch(study, task) for task in tasks]
                self._show()
                self._tell_of(study, tasks)
                running |= self._hands.start(launches)
            elif not running:
                others = self._others(study)
                if not others:
                    return
                if not told:
                    self._say(f"waiting for {others} trials that another process is at work on")
                told = True
                time.sleep(POLL_SECONDS)
            done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                self._settle(study, running.pop(future), error_of(future))

    def _take(self, study: Study, running: int) -> list[Task]:
        """As many trials as there are free hands for, after closing and queueing what calls for it."""
        is_main = study is self._studies.main
        plan = self._plan
        space = plan.space if is_main else Space({}, plan.space.fixed)
        tasks: list[Task] = []
        with self._storage.lock():
            study.refresh()
            self._close_dead_in(study)
            study.queue(plan.cells if is_main else plan.beside, space)
            while not self._is_ended() and (self._hands.at_once is None or running + len(tasks) < self._hands.at_once):
                if not self._has_more(study, is_main):
                    break
                task = study.take(space, plan.composer.point, plan.composer.base)
                if task is None:
                    break
                tasks.append(task)
        return tasks

    def _has_more(self, study: Study, is_main: bool) -> bool:
        if not is_main or self._plan.is_grid:
            return study.waiting() > 0
        return len(study.counted()) < self._plan.total and not (
            study.is_exhausted(self._plan.space) and not study.waiting()
        )

    def _is_ended(self) -> bool:
        """Whether the sweep's limits, of failures or of time, have been reached."""
        failed = sum(s.status in FAILURES for study in self._studies.all for s in study.counted())
        timeout = self._plan.settings.sweep.timeout_minutes
        if self._ended is None and failed > self._limit:
            self._end(f"{failed} trials failed, which is more than sweep.max_failures allows", failed=True)
        elif self._ended is None and timeout is not None and time.monotonic() - self._began > 60 * timeout:
            self._end(f"sweep.timeout_minutes={timeout:g} have passed: no further trial is begun", failed=False)
        return self._ended is not None

    def _end(self, reason: str, failed: bool) -> None:
        self._ended, self._failed = reason, failed
        if not failed:
            self._say(reason)

    def _launch(self, study: Study, task: Task) -> Launch:
        """Write what the trial's job is to know, and the overrides that lead it there."""
        plan, cell = self._plan, task.point.cell
        directory = study.directory / str(task.number)
        where = directory.relative_to(plan.directory)
        cell = type(cell)(cell.params, cell.extra, task.is_baseline)
        name = name_of(cell, plan.space, task.point.settings.seed)
        study.study._storage.set_trial_user_attr(task.trial_id, "name", name)
        prunes = plan.settings.sweep.pruner != "none" and study is self._studies.main
        job = SweepJob(
            sweep=plan.name,
            trial=str(where),
            name=name,
            is_baseline=task.is_baseline,
            parent_run_id=self._group.run_id,
            owner=self._owner,
            directory=directory,
            objectives=plan.objectives,
            is_quiet=isinstance(self._hands, AsFreed),
            storage=self._storage.shown if prunes else None,
            study=study.study.study_name,
            trial_id=task.trial_id,
        )
        told = QuotedString(text=str(job.write()), quote=Quote.single).with_quotes()
        placed = [f"hydra.sweep.subdir={where}", f"++hydra.job.env_set.{ENVIRONMENT}={told}"]
        return Launch(task.number, [*plan.space.overrides(cell), *placed])

    def _settle(self, study: Study, number: int, error: BaseException | None) -> None:
        """Tell the study, MLflow and the person at the terminal how a trial ended."""
        shared = isinstance(error, SettingsError)
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}" if error else None
        with self._storage.lock():
            status, reason = study.settle(number, interrupted=shared, error=str(error) if shared else said)
        if error or status is not Status.FINISHED:
            self._settle_runs(study, number)
        if isinstance(error, SettingsError):
            raise error
        if status is Status.FAILED and self._has_nothing_yet():
            self._end(f"the first trial failed, as every other would: {reason}", failed=True)
        self._say(f"trial {self._where(study, number)} {status}" + (f": {reason}" if reason else ""))

    def _has_nothing_yet(self) -> bool:
        """Whether no trial of the sweep has ever come to a result."""
        results = (Status.FINISHED, Status.PRUNED)
        return not any(s.status in results for study in self._studies.all for s in study.counted())

    def _others(self, study: Study) -> int:
        """Trials that are under way in other processes."""
        study.refresh()
        return sum(s.status == Status.RUNNING and s.number not in study.mine for s in study.standings())

    def _board(self) -> Board:
        plan = self._plan
        rows = []
        for study in self._studies.all:
            study.refresh()
            standings = study.standings()
            prefix = "" if study is self._studies.main else f"{BESIDE}/"
            for s in standings:
                twin = s.attribute("reused_from")
                if s.status not in ("WAITING", Status.INTERRUPTED):
                    known = standings[twin] if twin is not None else None
                    rows.append(row_of(s, plan.space, len(plan.objectives), prefix, known))
        return Board(rows, plan.objectives, plan.directions, plan.total + len(plan.beside))

    def _tell_of(self, study: Study, tasks: Sequence[Task]) -> None:
        """Name what is about to be trained, where the table does not."""
        study.refresh()
        for task in tasks if not self._screen.is_live else ():
            self._say(f"trial {self._where(study, task.number)}: {study.standings()[task.number].attribute('name')}")

    def _where(self, study: Study, number: int) -> Path:
        """A trial's place in the sweep's directory."""
        return (study.directory / str(number)).relative_to(self._plan.directory)

    def _show(self) -> None:
        board = self._board()
        self._screen.show(board, self._hands.at_once or 1)
        self._group.update(board.metrics(), board.markdown(self._group.link))

    def show_all(self) -> None:
        """Print every trial as a table."""
        self._screen.show_all(self._board())

    def _finish(self) -> str | None:
        """The report, and the sweep's end in MLflow."""
        board = self._board()
        self._group.close_dead(self._is_over)
        self._group.update(board.metrics(), board.markdown(self._group.link))
        OmegaConf.save(OmegaConf.create(board.results()), self._plan.directory / "optimization_results.yaml")
        self._say(f"trials are chosen by {' and '.join(self._plan.objectives)} on the {self._plan.selection_split}")
        if (
            not self._plan.is_grid
            and self._plan.asked > self._plan.total
            and self._studies.main.is_exhausted(self._plan.space)
        ):
            self._say(f"every one of the {self._plan.total} points of the space has been evaluated: no more to try")
        self._say(f"{self._plan.name}: {board.line()}; {self._plan.directory}")
        if not board.best and self._ended is None:
            self._end("no trial of the sweep finished", failed=True)
        self._group.finish(Status.FAILED if self._failed else Status.FINISHED, self._ended)
        return self._ended if self._failed else None

    def _say(self, line: str) -> None:
        self._screen.say(line)
