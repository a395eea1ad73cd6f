"""A sweep stopped after any one of its writes finds its total again: killed, or ended by SIGTERM, at each in turn.

The runner, the study, the records and MLflow are the real ones, an engine that learns nothing in no time stands for
training. Each call of the sweep is a process of its own, forked. SIGTERM comes after its k-th write: a commit to a
database or a file put in its place. What a kill leaves there is what stands in the folder at that moment, so one sweep
leaves it for all of its writes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sqlite3
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import optuna
import pytest
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient
from mlflow.store.db import utils as db_utils
from optuna.distributions import FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine.default import DefaultDialect

from distilbench import cli
from distilbench.results import Evaluation, Owner, Status, TrialResult, read_record
from distilbench.settings import register_schema, settings_from
from distilbench.sweep import reporting, runner
from distilbench.sweep import trial as sweep_trial
from distilbench.sweep.executors import Executor
from distilbench.sweep.job import Lease, SweepJob
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.space import Point, Space
from distilbench.sweep.storage import storage_at
from distilbench.sweep.trial import run_in_sweep
from distilbench.tracking.connect import open_store
from distilbench.tracking.undelivered import end_run
from distilbench.trials import batch
from distilbench.trials import run as trials
from distilbench.trials.prepared import Job, prepare
from tests.commands import load_migrations_once, share_statements
from tests.conftest import ROOT, TINY

SPACE = Space({"optim.lr": FloatDistribution(1e-5, 1e-2, log=True)}, [])
TESTS = Owner.of()
DONE = Evaluation("validation", 4, 1.0, loss=0.5, accuracy=0.75, f1=0.5, mcc=0.25)


class NoTraining:
    """An engine whose trials are done at once."""

    def train(self, asked, splits, observer):
        for trial in range(len(asked)):
            observer.on_evaluation(trial, DONE)
        return [TrialResult(Status.FINISHED, selection=DONE, report=DONE, steps=4, train_seconds=1.0) for _ in asked]


class Writes:
    """Counts the writes of this process, those of hearts apart, and calls ``then`` after each with its number."""

    def __init__(self, then: Callable[[int], object]) -> None:
        self.then, self.count = then, 0
        self._changes: dict[int, int] = {}
        self._is_beating = False
        beat, RDBStorage.record_heartbeat = RDBStorage.record_heartbeat, lambda *given: self.beat(beat, *given)
        self._replace, os.replace = os.replace, self.replace
        self._commit, DefaultDialect.do_commit = DefaultDialect.do_commit, lambda dialect, c: self.commit(dialect, c)

    def replace(self, *paths, **options) -> None:
        self._replace(*paths, **options)
        self._count()

    def commit(self, dialect, connection) -> None:
        self._commit(dialect, connection)
        changes = connection.total_changes
        if changes != self._changes.get(id(connection.driver_connection), 0):
            self._changes[id(connection.driver_connection)] = changes
            self._count()

    def beat(self, beat, *given) -> None:
        """Let a heart beat: of two beats in a second the latter writes nothing, so that their number is the clock's."""
        self._is_beating = True
        try:
            beat(*given)
        finally:
            self._is_beating = False

    def _count(self) -> None:
        if self._is_beating:
            return
        self.count += 1
        self.then(self.count)


def in_process(action: Callable[[], int]) -> int:
    """The exit status of ``action`` in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(action())
        except KeyboardInterrupt:
            os._exit(cli.STATUS[cli._received[0]] if cli._received else 70)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Ground:
    """A folder with an empty store, in which every sweep begins anew; what all its processes share is ready."""

    def __init__(self, folder: Path, settings, monkeypatch) -> None:
        self.folder, self.directory = folder, folder / "sweep"
        self.settings = _tracked_in(folder, settings)
        prepared = prepare(self.settings)
        monkeypatch.setattr(batch, "prepare", lambda settings: prepared)
        monkeypatch.setattr(trials, "engine_for", lambda settings: NoTraining())
        for module in (sweep_trial, runner):  # a thread would make its writes whenever it comes to run
            monkeypatch.setattr(module, "send_heartbeats", _beating_once)
        monkeypatch.setattr(reporting, "report_sweep", lambda *given: object())
        monkeypatch.setattr(reporting, "default_treatment", dict)
        monkeypatch.setattr("distilbench.tracking.start._git_tags", dict)
        load_migrations_once()
        share_statements()
        latest = db_utils._get_latest_schema_revision()
        monkeypatch.setattr(db_utils, "_get_latest_schema_revision", lambda: latest)  # lists a hundred files
        _warm_up(_tracked_in(folder / "warm", settings), folder / "warm" / "sweep")
        assert in_process(lambda: int(open_store(self.settings.tracking) is None)) == 0
        (folder / "mlruns").mkdir(exist_ok=True)
        self.keep("empty")

    def _written(self) -> list[Path]:
        return [path for name in ("sweep", "mlruns", "mlflow.db*") for path in self.folder.glob(name)]

    def keep(self, state: object) -> None:
        """Copy what sweeps have written, as a kill at this moment would leave it."""
        kept = self.folder / "kept" / str(state)
        kept.mkdir(parents=True, exist_ok=True)
        for path in self._written():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, kept / path.name)

    def restore(self, state: object) -> None:
        for path in self._written():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.folder / "kept" / str(state), self.folder, dirs_exist_ok=True)

    def clear(self) -> None:
        self.restore("empty")

    def sweep(self, plan: SweepPlan, settings, then: Callable[[int], object] = int, train=None) -> int:
        """Run the sweep in a process of its own, with ``then`` after each write; its exit status, 0 with its total."""

        def run() -> int:
            writes = Writes(then)
            signal.signal(signal.SIGTERM, cli._exit)
            cli.raise_on_signal()
            failure = _run(plan, settings, train)
            (self.folder / "writes").write_text(str(writes.count))
            return 1 if failure else 0

        return in_process(run)

    def query(self, database: Path, question: str) -> list[str]:
        if not database.exists():
            return []
        with closing(sqlite3.connect(database)) as connection:
            try:
                return [" ".join(map(str, found)) for found in connection.execute(question)]
            except sqlite3.OperationalError:  # stopped before there were tables
                return []

    def ends(self) -> dict[str, Counter[str]]:
        """How trials stand in the study, in their records and in MLflow."""
        records = [json.loads(path.read_text())["status"] for path in self.directory.glob("*/trial.json")]
        study = self.query(self.directory / "study.db", "SELECT state FROM trials")
        runs = self.query(self.folder / "mlflow.db", "SELECT r.status, t.value FROM runs r JOIN tags t ON r.run_uuid = "
                          "t.run_uuid AND t.key = 'distilbench.status'")  # fmt: skip
        return {"study": Counter(study), "records": Counter(records), "runs": Counter(runs)}


def _warm_up(settings, directory: Path) -> None:
    """Stop and continue a sweep here: what is imported and compiled for that need not be by every process."""
    settings = replace(settings, sweep=replace(settings.sweep, seeds=[1, 2]))

    def cut_short(jobs: list[SweepJob]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trials, "engine_for", lambda settings: signal.raise_signal(signal.SIGINT))
            return train_in(settings)(jobs)

    with contextlib.suppress(KeyboardInterrupt):
        _run(plan_of(settings, directory), settings, cut_short)
    _run(plan_of(settings, directory), settings)


@contextmanager
def _beating_once(beat, grace_seconds):
    beat()
    yield


def _tracked_in(folder: Path, settings):
    folder.mkdir(exist_ok=True)
    return replace(settings, tracking=replace(settings.tracking, name="mlflow", uri=f"sqlite:///{folder}/mlflow.db"))


def _run(plan: SweepPlan, settings, train=None) -> str | None:
    return runner.run_plan(plan, storage_at(None, None, plan.directory), Executor(train or train_in(settings), 1))


def train_in(settings):
    """What an executor calls: the trial of one job, trained in this process."""

    def train(jobs: list[SweepJob]):
        (job,) = jobs
        Lease(job).announce()
        own = replace(settings, output=replace(settings.output, dir=str(job.directory)))
        run_in_sweep(Job(own, settings, str), job)
        return [None]

    return train


def plan_of(settings, directory: Path, **changes) -> SweepPlan:
    """One draw of Optuna's; ``changes`` make a confirmation of it."""
    plan = SweepPlan(
        settings=settings, space=SPACE, points=[], outside_baselines=[], total=1, is_grid=False,
        objectives=("accuracy",), directions=["maximize"], name="stopped", directory=directory, fixed={},
        result_key=lambda point: point.key, name_of=partial(SPACE.name_of, baseline={}), max_failures=0,
    )  # fmt: skip
    return replace(plan, **changes)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    asked = ("output.save_model=false", "train.checkpoints=false", f"output.dir={folder}")
    register_schema()
    with initialize_config_dir(str(ROOT / "conf")), pytest.MonkeyPatch.context() as monkeypatch:
        yield Ground(folder, settings_from(compose("config", [*TINY, *asked])), monkeypatch)


CONFIRMATION = {"space": Space({}, []), "is_grid": True, "requires_all": True,
                "points": [Point({}, ("treatment", "seed=1"), is_baseline=True)]}  # fmt: skip


@pytest.mark.parametrize("is_killed", [True, False], ids=["kill", "term"])
@pytest.mark.parametrize(("seeds", "changes"), [(None, {}), ([1, 2], {}), (None, CONFIRMATION)],
                         ids=["trial", "seeds", "confirmation"])  # fmt: skip
def test_a_sweep_stopped_after_any_write_finds_its_total(ground, seeds, changes, is_killed):
    """Until a first trial exists, all three write the same: the first of them alone is stopped then."""
    settings = replace(ground.settings, sweep=replace(ground.settings.sweep, seeds=seeds))
    plan = plan_of(settings, ground.directory, **changes)
    ground.clear()
    kept = f"{plan.is_grid} {seeds} {is_killed}"
    assert ground.sweep(plan, settings, lambda count: ground.keep(f"{kept} {count}")) == 0
    whole = ground.ends()
    writes = int((ground.folder / "writes").read_text())
    assert writes > 30
    for at in range(1, writes + 1):
        ground.restore(f"{kept} {at}")
        if (seeds or changes) and not ground.ends()["study"]:
            continue
        if not is_killed:
            ground.clear()
            terminate = lambda count, at=at: signal.raise_signal(signal.SIGTERM) if count == at else None  # noqa: E731
            assert ground.sweep(plan, settings, terminate) == 143, at
            left = ground.ends()
            assert not [end for ends in left.values() for end in ends if "RUNNING" in end], (at, left)
        assert ground.sweep(plan, settings) == 0, at
        ends = ground.ends()
        assert ends["study"]["COMPLETE"] == ends["records"]["FINISHED"] == plan.total, (at, ends)
        assert set(ends["study"]) <= {"COMPLETE", "FAIL"}, (at, ends)
        assert set(ends["records"]) <= {"FINISHED", "INTERRUPTED"}, (at, ends)
        assert set(ends["runs"]) <= {"FINISHED FINISHED", "KILLED INTERRUPTED"}, (at, ends)
        assert ends["runs"]["FINISHED FINISHED"] == whole["runs"]["FINISHED FINISHED"], (at, ends)


def test_a_sweep_interrupted_once_nothing_is_left_to_do_has_finished(ground, monkeypatch):
    """As where another worker has ended the last trial, and this one only looks at what came of it."""
    plan = plan_of(ground.settings, ground.directory)
    ground.clear()
    assert ground.sweep(plan, ground.settings) == 0
    monkeypatch.setattr(runner.Leaderboard, "results", lambda self: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(runner, "SignalGuard", contextlib.nullcontext)
    monkeypatch.setattr(contextlib.nullcontext, "released", contextlib.nullcontext, raising=False)
    monkeypatch.setattr(contextlib.nullcontext, "__enter__", lambda self: self)
    assert in_process(lambda: _run(plan, ground.settings) is None) == 70
    assert ground.ends()["runs"] == Counter({"FINISHED FINISHED": 2})


def test_what_a_process_writes_late_that_had_lost_its_trial_is_put_right_at_the_sweeps_end(ground, monkeypatch):
    """It was frozen between making sure that the trial was its own, and writing how that ended."""
    plan = plan_of(ground.settings, ground.directory)

    def cut_short(jobs: list[SweepJob]):
        monkeypatch.setattr(trials, "engine_for", lambda settings: signal.raise_signal(signal.SIGINT))
        return train_in(ground.settings)(jobs)

    ground.clear()
    assert ground.sweep(plan, ground.settings, train=cut_short) == 70
    assert ground.sweep(plan, ground.settings) == 0
    before = ground.ends()
    assert before["records"] == {"INTERRUPTED": 1, "FINISHED": 1}
    assert before["runs"] == {"FINISHED FINISHED": 2, "KILLED INTERRUPTED": 1}
    first, last = (read_record(ground.directory / number) for number in "01")
    replace(last, run_id=first.run_id).write(ground.directory / "0")

    def write_late() -> int:
        end_run(MlflowClient(ground.settings.tracking.uri), first.run_id, Status.FINISHED, None)
        return 0

    assert in_process(write_late) == 0
    assert ground.ends() != before
    assert ground.sweep(plan, ground.settings) == 0
    assert ground.ends() == before
    again = read_record(ground.directory / "0")
    assert (again.status, again.error, again.scores) == (first.status, first.error, {})


def test_what_an_outage_kept_back_is_delivered_before_a_trial_begins_that_may_continue_it(ground, monkeypatch):
    ground.clear()
    seen = ground.directory.with_name("seen")
    trials_at = lambda *given: seen.open("a").write(f"{len(ground.ends()['records'])} ")  # noqa: E731
    monkeypatch.setattr(runner.ParentRun, "catch_up", trials_at)
    assert ground.sweep(plan_of(ground.settings, ground.directory), ground.settings) == 0
    assert seen.read_text().startswith("0 ")


@pytest.mark.parametrize("is_kept", [True, False], ids=["turned-into-an-error", "swallowed"])
def test_a_signal_that_a_library_makes_something_else_of_ends_the_sweep_and_fails_no_trial(ground, is_kept):
    """OmegaConf and Hydra do so in one of ten places of a composition, Python in a generator that is closed."""
    plan = plan_of(ground.settings, ground.directory, total=2)

    def interrupted(jobs: list[SweepJob]):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            if is_kept:
                raise AttributeError("while composing") from None
        return train_in(ground.settings)(jobs)

    ground.clear()
    assert ground.sweep(plan, ground.settings, train=interrupted) == 143
    finished = 0 if is_kept else 1
    assert ground.ends()["study"] == Counter({"COMPLETE": finished, "FAIL": 1 - finished})
    assert ground.sweep(plan, ground.settings) == 0
    assert ground.ends()["records"] == Counter({"FINISHED": 2, "INTERRUPTED": 1 - finished})


def test_a_full_disk_ends_the_sweep_in_one_line_and_its_trial_is_tried_again(ground, monkeypatch):
    plan = plan_of(ground.settings, ground.directory)

    def full(jobs: list[SweepJob]):
        return [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    ground.clear()
    said = ground.directory.with_name("said")
    assert in_process(lambda: said.write_text(_run(plan, ground.settings, full) or "") * 0) == 0
    assert said.read_text() == (
        f"no space left on the disk of {ground.directory}; make room, then run the same command again to continue"
    )
    assert ground.ends()["records"] == Counter({"INTERRUPTED": 1})
    assert ground.sweep(plan, ground.settings) == 0
    assert ground.ends()["study"] == Counter({"COMPLETE": 1, "FAIL": 1})


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left on the disk of {}; make room, then run "),
        (StorageInternalError("it is gone"), "hydra.sweeper.storage no longer answers: it is gone; run "),
        (OSError(errno.EIO, os.strerror(errno.EIO)), None),
    ],
)
def test_an_error_of_the_sweep_itself_ends_its_trial_and_is_told_in_one_line_if_known(ground, monkeypatch, error, line):
    def fail(*given: object) -> None:
        raise error

    ground.clear()
    said, plan = ground.directory.with_name("said"), plan_of(ground.settings, ground.directory)
    monkeypatch.setattr(runner.SweepRunner, "_show", fail)
    assert in_process(lambda: said.write_text(_run(plan, ground.settings) or "") * 0) == (0 if line else 70)
    if line:
        assert said.read_text() == f"{line.format(ground.directory)}the same command again to continue"
    assert ground.ends()["records"] == Counter({"INTERRUPTED": 1})


@pytest.mark.parametrize("is_shared", [True, False])
def test_an_interrupted_sweeps_run_is_left_to_a_process_that_still_trains_else_it_has_more_to_do(ground, is_shared):
    beside = Point({}, ("optim.lr=1e-4",), is_baseline=True)
    plan = plan_of(ground.settings, ground.directory, outside_baselines=[beside])

    def interrupted(jobs: list[SweepJob]):
        if jobs[0].is_baseline:
            return train_in(ground.settings)(jobs)
        if is_shared:
            optuna.load_study(study_name=plan.name, storage=jobs[0].storage).ask().set_user_attr("owner", asdict(TESTS))
        return signal.raise_signal(signal.SIGTERM)

    ground.clear()
    assert ground.sweep(plan, ground.settings, train=interrupted) == 143
    left = "RUNNING RUNNING" if is_shared else "KILLED INTERRUPTED"
    assert ground.ends()["runs"] == Counter({"FINISHED FINISHED": 1, left: 1})


def test_a_first_trial_that_fails_ends_the_sweep_before_the_others_do_so_too(ground):
    ground.clear()
    said, plan = ground.directory.with_name("said"), plan_of(ground.settings, ground.directory, total=3, max_failures=3)
    fail = lambda jobs: [ValueError("no such\n model")]  # noqa: E731
    assert in_process(lambda: said.write_text(_run(plan, ground.settings, fail) or "") * 0) == 0
    assert said.read_text() == "the first trial failed, as every other would: ValueError: no such model"
    assert ground.ends()["records"] == Counter({"FAILED": 1})
    assert ground.ends()["runs"] == Counter({"FAILED FAILED": 1}), "the sweep's own"
