"""The main loop of every sweep: take, launch and settle trials, so that the sweep can be continued whatever happens.

A trial's end is always written in the order ``trial.json``, MLflow, study, and counts with the last. A sweep that was
stopped between two writes finds the trial still RUNNING in the study, and writes what is missing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from distilbench.cli import is_disk_full, pluralize, raise_if_signalled, raise_on_signal, was_signalled
from distilbench.data.text import load_text
from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep.executors import Executor, JobError, executor_for, silence_launchers
from distilbench.sweep.job import Orphaned, SweepJob, send_heartbeats
from distilbench.sweep.plan import SweeperOptions, SweepPlan, make_plan
from distilbench.sweep.reporting import REPORT_ATTRIBUTE, Leaderboard, claim_report, print_plan, say, write_report
from distilbench.sweep.resume import has_begun, open_studies
from distilbench.sweep.storage import STORAGE_ERRORS, Storage, check_url, storage_at
from distilbench.sweep.study import FAILURES, SweepStudy, TrialView
from distilbench.tracking.connect import open_store
from distilbench.tracking.retries import reason_of
from distilbench.tracking.run import ParentRun
from distilbench.tracking.search import MARGIN_TAG, SWEEP_TAG
from distilbench.tracking.store import MlflowStore
from distilbench.trials.interruptions import SignalGuard

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_LIVE_ROWS = 8
"""Number of ended trials, the best ones, in the live table."""

SHUTDOWN_SECONDS = 10.0
"""Longest wait for jobs on this host that were told to stop; each records how its trial ended, if it can."""

MAX_KILLS = 3
"""Number of times that the process of a trial may be killed until the trial has failed."""

LONGEST_PAUSE = 10.0
"""Longest time between two reads of the study with nothing to do: many processes may wait for the last trial."""


def run_sweep(options: SweeperOptions, arguments: Sequence[str]) -> str | None:
    """Run a sweep to its end, or continue it; returns None, or why it failed, in one line.

    Raises :class:`SettingsError` for an invalid setting, before anything is written.
    """
    plan = make_plan(options, arguments)
    written: Any = OmegaConf.to_container(options.config.hydra.sweeper, resolve=False)
    if options.storage is not None:
        check_url(options.storage, written["storage"])
    if plan.space.custom:
        with silence_launchers():
            plan.space.suggest(plan.base, optuna.create_study().ask())  # raises now what it would raise in every trial
    if plan.settings.sweep.dry_run:
        print_plan(plan)
        return None
    if not has_begun(plan):
        for data in plan.data:
            load_text(data)  # raises now what the first trial would raise after files were written
    raise_on_signal()
    storage = storage_at(options.storage, written["storage"], plan.directory)
    executor = executor_for(options.launcher, options.config.hydra.launcher, options.at_once)
    return run_plan(plan, storage, executor, config=options.config)


@silence_launchers()
def run_plan(
    plan: SweepPlan, storage: Storage, executor: Executor, tags: Mapping[str, str] | None = None,
    config: DictConfig | None = None,
) -> str | None:  # fmt: skip
    """Run a plan, with ``tags`` on the sweep's own MLflow run; returns None, or why it failed, in one line.

    ``config`` is saved as ``multirun.yaml``, as Hydra's own sweeper does.
    """
    store = open_store(plan.settings.tracking)
    try:
        with SignalGuard() as guard:
            plan, studies = open_studies(plan, storage, store.run_ids if store else None)
            if config is not None:
                OmegaConf.save(config, plan.directory / "multirun.yaml")
            parent = _open_parent_run(plan, studies[-1].study, storage, store, tags or {})
            runner = SweepRunner(plan, studies, storage, executor, parent, guard)
            failure = runner.run()
        runner.report(store)
        return failure
    except (*STORAGE_ERRORS, OSError) as error:
        if is_disk_full(error):
            return _no_space_message(plan)
        if isinstance(error, OSError):
            raise
        return f"hydra.sweeper.storage no longer answers: {reason_of(error)}; run the same command again to continue"


def _open_parent_run(
    plan: SweepPlan, study: optuna.Study, storage: Storage, store: MlflowStore | None, tags: Mapping[str, str]
) -> ParentRun:
    """Create the sweep's own MLflow run, or reopen an earlier one."""
    if store is None:
        return ParentRun()
    known = {SWEEP_TAG: plan.name, MARGIN_TAG: f"{plan.settings.margin:g}", "distilbench.role": "sweep", **tags}
    with storage.lock():  # if several processes begin at once, only one creates it
        run_id = study.user_attrs.get("run_id")
        if run_id is None and not tags and store.sweep_run(plan.name):  # a confirmation trains what MLflow lacks
            log.warning("MLflow has trials of sweep %s, whose study is not here: all are trained again; if its "
                        "directory was moved, add hydra.sweep.dir=..., else take another sweep.name",
                        plan.name)  # fmt: skip
        parent = store.open_parent_run(plan.name, known, plan.directory, run_id=run_id)
        study.set_user_attr("run_id", parent.run_id)
    return parent


class SweepRunner:
    """One process that works on a sweep; signals are delivered while it waits and while trials train, else deferred."""

    def __init__(self, plan: SweepPlan, studies: Sequence[SweepStudy], storage: Storage, executor: Executor,
                 parent: ParentRun, guard: SignalGuard) -> None:  # fmt: skip
        self._plan, self._studies, self._storage, self._executor = plan, studies, storage, executor
        self._parent, self._guard = parent, guard
        self._console = Console()
        self._say = partial(say, self._console)
        is_live = executor.threads and self._console.is_terminal
        self._live = Live(console=self._console, transient=True) if is_live else None
        """A table that is updated in place if trials run in parallel; otherwise each shows a progress bar."""
        self._owner = Owner.of()
        self._began = time.monotonic()
        self._ended: str | None = None
        """Why no further trial is started."""
        self._failed = False
        """Whether that counts as a failure of the sweep."""
        self._pause = POLL_SECONDS
        self._kills: Counter[str] = Counter()
        """How often the processes of a point's trials were killed."""
        self._reported = studies[-1].study.user_attrs.get(REPORT_ATTRIBUTE)

    def run(self) -> str | None:
        """Work until nothing is left to do; returns why the sweep failed, or None."""
        grace = self._plan.settings.sweep.grace_seconds
        with self._live or contextlib.nullcontext(), self._closing(), send_heartbeats(self._beat, grace):
            self._close_runs()  # before a trial begins that may continue one of them
            self._train_all()
            return self._finish()

    def _beat(self) -> None:
        """Send heartbeats for all trials of this process, also for jobs that wait in a queue or run elsewhere."""
        for study in self._studies:
            with contextlib.suppress(*STORAGE_ERRORS):  # the next heartbeat tries again
                study.beat()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Leave no trial of this process RUNNING after a signal or an error."""
        try:
            yield
        except BaseException as error:
            self._executor.stop()
            with contextlib.suppress(*STORAGE_ERRORS, OSError):  # the next call ends them
                mine = [(study, number) for study in self._studies for number in sorted(study.owned_trials)]
                self._wait_for_jobs(mine)
                self._end_all(mine, "interrupted with its sweep")
                if not self._under_way_elsewhere():
                    if any(study.has_more() for study in self._studies):
                        self._parent.finish(Status.INTERRUPTED, "interrupted; run the same command again to continue")
                    else:
                        self._parent.finish(Status.FAILED if self._failed else Status.FINISHED, self._ended)
            if isinstance(error, KeyboardInterrupt):
                self._say(f"interrupted: {self._leaderboard().line()}; run the same command again to continue")
            raise

    def _wait_for_jobs(self, trials: Sequence[tuple[SweepStudy, int]]) -> None:
        """Wait up to :data:`SHUTDOWN_SECONDS` for stopped jobs on this host to exit, before their runs are closed."""
        records = [read_record(study.directory(number)) for study, number in trials]
        owners = {record.owner for record in records if record and record.status is Status.RUNNING} - {self._owner}
        here, until = [one for one in owners if one.host == self._owner.host], time.monotonic() + SHUTDOWN_SECONDS
        while time.monotonic() < until and not all(owner.is_dead() for owner in here):
            time.sleep(0.05)

    def _end_all(self, trials: Sequence[tuple[SweepStudy, int]], error: str) -> None:
        """End trials that no longer have a job: as their records say, otherwise as INTERRUPTED."""
        trials = [(study, number) for study, number in trials if study.holds(number)]
        records = [study.finalize_record(number, Status.INTERRUPTED, error) for study, number in trials]
        self._close_runs()
        for (study, number), record in zip(trials, records, strict=True):
            self._tell(study, number, record)

    def _tell(self, study: SweepStudy, number: int, record: Record) -> None:
        with self._storage.lock():
            study.tell(number, record)

    def _close_dead_trials(self) -> None:
        """End the trials of killed processes, and print how many."""
        with self._storage.lock():
            dead = [(study, number) for study in self._studies for number in study.take_over_dead_trials()]
        if dead:
            self._end_all(dead, "its process was killed")
            self._say(f"continued: closed {pluralize(len(dead), 'trial')} that a killed process left")

    def _close_runs(self) -> None:
        """End every RUNNING run of the sweep whose process is gone, as the records say."""
        self._parent.catch_up(self._is_over)

    def _is_over(self, owner: Owner) -> bool:
        """Return whether the owner of a RUNNING run is gone; called when this process has no trial under way.

        A process on another host counts as gone if its trials were taken over and it has begun no other since.
        """
        if not any(owner in study.lost_owners for study in self._studies):
            return owner == self._owner or owner.is_dead()
        return owner not in [view.owner for _, view in self._views() if view.status is Status.RUNNING]

    def _views(self) -> list[tuple[SweepStudy, TrialView]]:
        """Read every trial again."""
        for study in self._studies:
            study.refresh()
        return [(study, view) for study in self._studies for view in study.views()]

    def _train_all(self) -> None:
        """Launch and settle trials until none is left; baselines come first, but other trials do not wait for them."""
        running: dict[Future[JobError], tuple[SweepStudy, int, int | None]] = {}
        while True:
            taken = self._take_trials(len(running))
            jobs = [self._job(study, trial) for study, trial in taken]
            with self._guard.released():
                if jobs:
                    self._pause = POLL_SECONDS
                    self._show([trial for _, trial in taken])
                    begun = [(study, trial.number, self._executor.at_once) for study, trial in taken]
                    running |= dict(zip(self._executor.start(jobs), begun, strict=True))
                elif not running and not self._wait_for_others():
                    return
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                self._end_trial(*running.pop(future), future.result())

    def _wait_for_others(self) -> bool:
        """Return whether other processes are training trials, after a pause if so."""
        others = self._under_way_elsewhere()
        if others:
            if self._pause == POLL_SECONDS:
                self._say(f"waiting for {pluralize(others, 'trial')} that another process is at work on")
            time.sleep(self._pause)
        self._pause = min(1.5 * self._pause, LONGEST_PAUSE) if others else POLL_SECONDS
        return others > 0

    def _under_way_elsewhere(self) -> int:
        """Count the trials that other processes are training."""
        return sum(
            view.status is Status.RUNNING and view.number not in study.owned_trials for study, view in self._views()
        )

    def _take_trials(self, running: int) -> list[tuple[SweepStudy, TrialView]]:
        """Begin as many trials as the executor has room for, after closing dead ones and filling the queue."""
        self._close_dead_trials()
        taken: list[tuple[SweepStudy, TrialView]] = []
        at_once = self._executor.at_once
        with self._storage.lock():
            for study in self._studies:
                study.refresh()
                study.queue()
                while not self._is_ended() and study.has_more() and (at_once is None or running + len(taken) < at_once):
                    trial = study.take()
                    if trial is None:
                        break
                    taken.append((study, trial))
        return taken

    def _is_ended(self) -> bool:
        """Return whether the sweep has reached its limit of failures or of time."""
        failed = sum(view.status in FAILURES for study in self._studies for view in study.counted())
        timeout = self._plan.settings.sweep.timeout_minutes
        if self._ended is None and failed > self._plan.max_failures:
            told = f"{pluralize(failed, 'trial')} failed, which is more than sweep.max_failures allows"
            self._ended, self._failed = told, True
        elif self._ended is None and timeout is not None and time.monotonic() - self._began > 60 * timeout:
            self._ended = f"sweep.timeout_minutes={timeout:g} have passed: no further trial is begun"
            self._say(self._ended)
        return self._ended is not None

    def _job(self, study: SweepStudy, trial: TrialView) -> SweepJob:
        """Write and return the job of a trial."""
        plan, storage = self._plan, self._storage
        continued = trial.attribute("continues")
        job = SweepJob(
            sweep=plan.name,
            trial=trial.path,
            name=trial.name,
            overrides=(*plan.space.fixed, *trial.point.overrides),
            is_baseline=trial.is_baseline,
            parent_run_id=self._parent.run_id,
            owner=self._owner,
            directory=study.directory(trial.number),
            objectives=plan.objectives,
            storage=storage.url_template,
            trial_id=trial.trial._trial_id,
            grace_seconds=plan.settings.sweep.grace_seconds,
            is_quiet=self._executor.threads is not None,
            continues=None if continued is None else study.directory(continued),
            prunes=plan.settings.sweep.pruner != "none" and not study.is_outside,
            is_selection=plan.is_selection,
        )
        job.write()
        return job

    def _end_trial(self, study: SweepStudy, number: int, at_once: int | None, end: JobError) -> None:
        """Record how a trial ended and print it; end the sweep if every other trial would end the same way.

        ``at_once`` is how many trials the executor launched at once when this one began.
        """
        if not study.holds(number):
            study.owned_trials.pop(number, None)
            raise_if_signalled()
            self._say(f"trial {study.path(number)} was taken over by another process: its result here is dropped")
            return
        is_void = isinstance(end, (SettingsError, Orphaned)) or was_signalled() or is_disk_full(end)
        said = " ".join(str(end).split())
        told = said if isinstance(end, SettingsError) else f"{type(end).__name__}: {said[:300]}"
        error = None if end is None else told
        if not is_void and end and self._was_killed(study, number, at_once, end):
            is_void, error = True, "its process was killed, perhaps for memory; it is tried again"
        record = study.finalize_record(number, Status.INTERRUPTED if is_void else Status.FAILED, error)
        if end or record.status is not Status.FINISHED or self._parent.has_pending(study.directory(number)):
            self._close_runs()
        self._tell(study, number, record)
        if isinstance(end, SettingsError):
            raise end
        raise_if_signalled()  # the interrupted code may have swallowed the exception
        if is_disk_full(end) or is_disk_full(record.error):
            self._ended, self._failed = _no_space_message(self._plan), True
        elif record.status is Status.FAILED and not any(
            view.status in (Status.FINISHED, Status.PRUNED) for study in self._studies for view in study.counted()
        ):
            self._ended, self._failed = f"the first trial failed, as every other would: {record.error}", True
        self._say(f"trial {study.path(number)} {record.status}" + (f": {record.error}" if record.error else ""))

    def _was_killed(self, study: SweepStudy, number: int, at_once: int | None, end: BaseException) -> bool:
        """Return whether a job's process was killed, and fewer than :data:`MAX_KILLS` times, so that its trial is void.

        joblib then kills its other workers too. Half as many trials run at once from then on: memory may be short.
        """
        record = read_record(study.directory(number))
        owner = record.owner if record and record.status is Status.RUNNING else self._owner
        if not isinstance(end, BrokenExecutor) and (owner == self._owner or not owner.is_dead()):
            return False
        if self._executor.threads and self._executor.at_once and at_once:
            self._executor.at_once = min(self._executor.at_once, max(1, at_once // 2))
        point = study.views()[number].point_key
        self._kills[point] += 1
        return self._kills[point] < MAX_KILLS

    def _leaderboard(self) -> Leaderboard:
        views = self._views()
        trials = [view for study, view in views if view.status is not Status.WAITING and not study.is_void(view)]
        return Leaderboard(trials, self._plan)

    def _show(self, taken: Sequence[TrialView]) -> None:
        """Show the sweep's progress, and without a table also the names of the trials that begin."""
        leaderboard = self._leaderboard()
        line = leaderboard.line(self._executor.at_once or 1)
        if self._live:
            self._live.update(Group(leaderboard.table(MAX_LIVE_ROWS), Text(line)))
        else:
            self._say(line)
        self._parent.update(leaderboard.metrics(), leaderboard.line())
        for trial in taken if not self._live else ():
            self._say(f"trial {trial.path}: {trial.name}")

    def report(self, store: MlflowStore | None) -> None:
        """Write the report, unless another worker has; if it can't be written, print the leaderboard."""
        ends = sum(view.trial.state.is_finished() for _, view in self._views())
        grace = self._plan.settings.sweep.grace_seconds
        with claim_report(self._studies[-1].study, self._storage, ends, self._reported, grace) as is_due:
            if not is_due:
                return self._say(f"the report was written by another process: {self._plan.directory}")
            for study in self._studies:
                self._parent.restore_ends(study.restore_ends())
            if not write_report(self._plan, store):
                self._console.print(self._leaderboard().table())

    def _finish(self) -> str | None:
        """Print the outcome and record it in the directory and in MLflow; returns why the sweep failed, or None."""
        plan, leaderboard = self._plan, self._leaderboard()
        with self._guard.released():
            self._parent.catch_up(self._is_over, plan.settings.tracking.patience_seconds)
        self._parent.update(leaderboard.metrics(), leaderboard.line())
        OmegaConf.save(OmegaConf.create(leaderboard.results()), plan.directory / "optimization_results.yaml")
        self._say(f"trials are ranked by {plan.chosen_by}")
        if not plan.is_grid and self._studies[-1].is_exhausted():
            self._say(f"every point of the space ({plan.space.size}) has been evaluated: no more to try")
        elif self._ended is None and self._studies[-1].has_more():
            self._say("the sampler finds no further point that was not evaluated: hydra/sweeper/sampler=random may")
        self._say(f"{plan.name}: {leaderboard.line()}; {plan.directory}")
        retriable = leaderboard.counts[Status.FAILED] + leaderboard.counts[Status.OUT_OF_MEMORY]
        if retriable and not plan.settings.sweep.retry_failed:
            self._say(
                f"{pluralize(retriable, 'failed trial')}: sweep.retry_failed=true added to the command tries again"
            )
        if not leaderboard.best and self._ended is None:
            self._ended, self._failed = "no trial of the sweep finished", True
        elif plan.requires_all and leaderboard.failed:
            failed = pluralize(leaderboard.failed, "trial")
            self._ended, self._failed = f"{failed} did not finish; the same command trains what is missing", True
        self._parent.finish(Status.FAILED if self._failed else Status.FINISHED, self._ended)
        return self._ended if self._failed else None


def _no_space_message(plan: SweepPlan) -> str:
    return f"no space left on the disk of {plan.directory}; make room, then run the same command again to continue"
