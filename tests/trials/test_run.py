"""Whatever ends a trial, wherever: record and run say how, agree, and keep a result that exists."""

from __future__ import annotations

import errno
import json
import signal
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from distilbench.results import PREDICTIONS, Evaluation, Owner, Record, Status, StepRecord, TrialResult, read_record
from distilbench.settings import SettingsError
from distilbench.tracking import undelivered
from distilbench.tracking.run import MlflowRun
from distilbench.trials import batch, run, summary
from distilbench.trials.card import write_card
from distilbench.trials.prepared import Job, SweepContext, prepare
from distilbench.trials.progress import ProgressBars
from tests.conftest import TINY, compose_settings
from tests.made_store import blank_figures, make_store

NUMBERS = count()


class Terminated(KeyboardInterrupt):
    """SIGTERM and SIGHUP as the command line makes exceptions of them."""


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def closed_pipe():
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def error():
    raise RuntimeError("nobody foresaw this")


def leave():
    raise SystemExit(1)


SIGNALS = {
    name: partial(signal.raise_signal, getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
}
ERRORS = {"error": error, "full disk": full_disk, "closed pipe": closed_pipe}
ENDS = {**SIGNALS, **ERRORS, "exit": leave}
SAMPLE = ("SIGTERM", "error", "exit")
"""One of each kind: tried at every point, the others where it matters most."""


def crossed(points, ends, first):
    """Each point with the sample of ends, and the ``first`` of them with all."""
    return [
        pytest.param(point, end, id=f"{point}-{end}")
        for point in points
        for end in ends
        if end in SAMPLE or point == first
    ]


@pytest.fixture(autouse=True)
def signals_as_exceptions():
    def terminate(number, frame):
        raise Terminated

    before = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def without_figures():
    with blank_figures():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(compose_settings(*TINY, f"output.dir={tmp_path_factory.mktemp('prepared')}"))


@pytest.fixture
def trials(settings, tmp_path):
    """Settings of two trials, each in a directory of its own."""
    return [settings(f"output.dir={tmp_path / str(seed)}", f"seed={seed}") for seed in (1, 2)]


class FakeEngine:
    """Takes a step and evaluates each trial once, then returns a result with logits for the whole report split."""

    def train(self, trials, splits, observer):
        logits = np.eye(2, dtype=np.float32)[splits.report.labels]
        kept = Evaluation("validation", 4, 1.0, loss=0.4, accuracy=1.0, f1=1.0, mcc=1.0, logits=logits)
        for trial in range(len(trials)):
            observer.on_step(trial, StepRecord(1, 4, 0.25, 0.7, 1e-5, 1.0, 30.0))
            observer.on_evaluation(trial, kept)
            try:
                if observer.wants_checkpoint():
                    observer.on_checkpoint()
            except RuntimeError as error:
                return [TrialResult(Status.FAILED, str(error))] * len(trials)
        done = TrialResult(Status.FINISHED, selection=kept, report=kept, history=(kept,), steps=4, train_seconds=2.0)
        return [done] * len(trials)


def ready(settings, context, prepared, store) -> run.Trial:
    """A trial that may begin."""
    return run.Trial(Job(settings, settings, str, context), prepared, store)


@pytest.fixture
def train(store, prepared, trials, monkeypatch):
    """Train both trials at once with the fake engine."""
    monkeypatch.setattr(run, "engine_for", lambda settings: FakeEngine())

    def train(**changes):
        contexts = [SweepContext(name=f"trial {next(NUMBERS)}", is_quiet=True, **changes) for _ in trials]
        return run.run_batch([ready(*given, prepared, store) for given in zip(trials, contexts, strict=True)])

    return train


def strike(monkeypatch, owner, name, end, after=False, only=lambda: True):
    """Have ``end`` happen once, before (or after) a call of ``owner.name``."""
    real, struck = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        if not after and not struck and only():
            struck.append(1)
            end()
        value = real(*args, **kwargs)
        if after and not struck and only():
            struck.append(1)
            end()
        return value

    monkeypatch.setattr(owner, name, wrapped)
    return struck


def ends_of(store, trials):
    """Status in the record, in the run's tag and in MLflow's terms, for each trial that was opened."""
    found = []
    for settings in trials:
        path = Path(settings.output.dir) / "trial.json"
        if path.exists():
            record = json.loads(path.read_text())
            tracked = store._client.get_run(record["run_id"])
            found.append((record["status"], tracked.data.tags["distilbench.status"], tracked.info.status))
    return found


def running(store):
    return store._client.search_runs(["1"], "attributes.status = 'RUNNING'")


TERMINAL = {"FINISHED": "FINISHED", "INTERRUPTED": "KILLED", "FAILED": "FAILED"}
BEFORE_RESULT = {
    "the run is made": (run, "_write_first", False),
    "the first record is written": (run, "_write_first", True),
    "the second run is made": (run, "_write_first", False),
    "the engine is made": (run, "engine_for", False),
    "the bar is shown": (ProgressBars, "__enter__", False),
    "training": (FakeEngine, "train", False),
    "a step is logged": (MlflowRun, "on_step", False),
    "a step is shown": (ProgressBars, "on_step", True),
    "an evaluation is logged": (MlflowRun, "on_evaluation", True),
    "an evaluation is shown": (ProgressBars, "on_evaluation", False),
}


@pytest.mark.parametrize(("point", "end"), crossed(BEFORE_RESULT, ENDS, "training"))
def test_a_trial_without_a_result_is_closed_whatever_ends_it(store, trials, train, monkeypatch, point, end):
    owner, name, after = BEFORE_RESULT[point]
    calls = []
    only = (lambda: calls.append(1) or len(calls) == 2) if point.startswith("the second") else lambda: True
    struck = strike(monkeypatch, owner, name, ENDS[end], after, only)
    with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError, OSError)) as raised:
        train()
    assert struck
    assert isinstance(raised.value, KeyboardInterrupt) == (end in SIGNALS)
    status = "FAILED" if end in ERRORS else "INTERRUPTED"
    ends = ends_of(store, trials)
    assert set(ends) <= {(status, status, TERMINAL[status])}
    assert running(store) == []
    if name != "_write_first":
        assert len(ends) == 2


KEEPING = {
    "the bar is put away": (ProgressBars, "__exit__", True),
    "the batch's seconds are shared": (run, "_share_batch", False),
    "the predictions are written": (run, "write_predictions", False),
    "the predictions have been written": (run, "write_predictions", True),
    "the record is written": (Record, "write", False),
    "the record has been written": (Record, "write", True),
    "the last metrics are sent": (undelivered, "log_batch", False),
    "a file is sent": (MlflowClient, "log_artifact", False),
    "the run has been ended": (MlflowRun, "finish", True),
}


@pytest.mark.parametrize(("point", "end"), crossed(KEEPING, {**SIGNALS, **ERRORS}, "the predictions are written"))
def test_a_result_that_exists_is_kept_whatever_happens_while_it_is_written(
    store, trials, train, monkeypatch, point, end
):
    owner, name, after = KEEPING[point]
    results = []
    monkeypatch.setattr(FakeEngine, "train", _noting(results, FakeEngine.train))
    struck = strike(monkeypatch, owner, name, ENDS[end], after, only=lambda: bool(results))
    try:
        train()
        assert end not in SIGNALS, "a signal that waited comes in the end"
    except KeyboardInterrupt:
        assert end in SIGNALS
    except (RuntimeError, OSError):
        assert point in ("the bar is put away", "the batch's seconds are shared")
    assert struck
    ends = [(tag, terminal) for _, tag, terminal in ends_of(store, trials)]
    assert ends == [("FINISHED", "FINISHED")] * 2
    assert running(store) == []
    records = [status for status, _, _ in ends_of(store, trials)]
    unwritten = point == "the record is written" and end not in SIGNALS
    assert records == (["RUNNING", "FINISHED"] if unwritten else ["FINISHED"] * 2)


def _noting(results, train):
    def noting(self, *args):
        results.append(train(self, *args))
        return results[-1]

    return noting


@pytest.mark.parametrize(("is_beside_others", "device", "alone"),
                         [(False, "cpu", True), (True, "cpu", False), (True, "cuda", True)])  # fmt: skip
def test_seconds_are_a_trials_own_unless_others_train_on_its_cpu(
    store, prepared, trials, monkeypatch, is_beside_others, device, alone
):
    monkeypatch.setattr(run, "engine_for", lambda settings: FakeEngine())
    monkeypatch.setattr("distilbench.trials.run.resolve_device", lambda name: torch.device(device))
    (outcome,) = run.run_batch([ready(trials[0], SweepContext("trial", is_quiet=is_beside_others), prepared, store)])
    assert outcome.stored.alone == store.newest_baseline(
        prepared.protocol.id, outcome.stored.treatment, outcome.stored.seed
    ).alone == alone  # fmt: skip


def test_a_signal_ends_a_trial_after_its_step_and_the_next_process_continues_it_in_its_run(
    store, settings, tmp_path, monkeypatch
):
    given = ("engine=trainer", "train.epochs=1", "train.logging_steps=1", "output.save_model=false")
    first, again = (settings(*given, f"output.dir={tmp_path / name}") for name in ("first", "again"))
    sources, calls = prepare(first), []
    third = strike(monkeypatch, MlflowRun, "on_step", ENDS["SIGTERM"], only=lambda: calls.append(1) or len(calls) == 3)
    context = SweepContext("0 lr=1", is_quiet=True, tags={"distilbench.trial": "0"})
    with pytest.raises(Terminated):
        run.run_batch([ready(first, context, sources, store)])
    assert third
    assert [path.name for path in (tmp_path / "first" / "checkpoints").iterdir()] == ["checkpoint-4"]
    left = read_record(tmp_path / "first")
    assert left.status is Status.INTERRUPTED
    unsent = undelivered.Undelivered(left.run_id, metrics=[("train/loss", 0.5, 1, 5)])  # of a step taken again
    unsent.write(tmp_path / "first")
    tags = {"distilbench.trial": "8"}
    context = SweepContext("8 lr=1", is_quiet=True, continues=tmp_path / "first", tags=tags)
    (outcome,) = run.run_batch([ready(again, context, sources, store)])
    assert (outcome.result.status, outcome.run_id) == (Status.FINISHED, left.run_id)
    assert store._client.get_run(left.run_id).info.run_name == "8 lr=1", "called by the number that its row has"
    store.catch_up(tmp_path / "first")
    steps = [step for step, _ in store.history(left.run_id, "train/loss")]
    assert steps == list(range(1, outcome.result.steps + 1)), "no step was taken twice"
    assert read_record(tmp_path / "first") == left


def test_what_another_machine_left_behind_is_not_continued_which_a_line_says(
    store, settings, prepared, tmp_path, caplog
):
    caplog.set_level("INFO")
    left = Record({"protocol": "another", "treatment": "t", "seed": 1}, Status.INTERRUPTED, Owner("there", 1, 0.0), "r")
    left.write(tmp_path / "left")
    context = SweepContext("trial", is_quiet=True, continues=tmp_path / "left")
    trial = settings("engine=trainer", "output.save_model=false", "train.checkpoints=false")
    assert run.run_batch([ready(trial, context, prepared, store)])[0].run_id != "r"
    assert read_record(tmp_path / "left") == left
    assert f"no checkpoint of the interrupted trial is on this host, in {tmp_path / 'left'}: it starts" in caplog.text


class Lost:
    """A trial that another process has taken over."""

    is_lost = True

    def holds(self) -> bool:
        return False


def test_nothing_is_kept_of_a_trial_that_another_process_has_taken_over(store, trials, train, caplog):
    outcomes = train(lease=Lost())
    assert {outcome.result.status for outcome in outcomes} == {Status.FAILED}
    assert [status for status, _, _ in ends_of(store, trials)] == ["RUNNING"] * 2, "closed by whoever took it"
    assert caplog.text.count("nothing that came of it here is kept") == 4
    for outcome in outcomes:
        store._client.set_terminated(outcome.run_id)


def test_predictions_that_find_no_room_cost_a_warning_and_leave_nothing_half_written(
    store, trials, train, monkeypatch, caplog
):
    import pyarrow.parquet

    def write_half(table, path):
        Path(path).write_bytes(b"half")
        full_disk()

    monkeypatch.setattr(pyarrow.parquet, "write_table", write_half)
    outcomes = train()
    assert [outcome.result.status for outcome in outcomes] == [Status.FINISHED] * 2
    said = [record.getMessage() for record in caplog.records]
    assert f"the predictions of {outcomes[0].name} could not be written: No space left on device" in said
    for settings in trials:
        assert [path.name for path in Path(settings.output.dir).iterdir()] == ["trial.json"]
        assert json.loads((Path(settings.output.dir) / "trial.json").read_text())["accuracy"] == 1.0
    assert not list(Path(trials[0].output.dir).glob(PREDICTIONS))


def test_a_record_finds_room_in_the_place_of_the_last_one(tmp_path, monkeypatch):
    record = Record({"protocol": "p", "treatment": "t", "seed": 1}, Status.RUNNING, run.Owner.of())
    record.write(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: full_disk())
    replace(record, status=Status.FINISHED, error=None).write(tmp_path)
    assert json.loads((tmp_path / "trial.json").read_text())["status"] == "FINISHED"
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"]
    with pytest.raises(OSError, match="No space left"):
        record.write(tmp_path / "elsewhere")


def test_a_store_that_fails_in_the_middle_of_a_start_ends_that_run(store, trials, train, monkeypatch):
    monkeypatch.setattr(store._client, "log_inputs", lambda *args, **kwargs: full_disk())
    with pytest.raises(SettingsError, match=r"must be a store that answers, got .*: No space left on device; check"):
        train()
    assert ends_of(store, trials) == []
    assert running(store) == []


def test_a_directory_that_takes_no_record_is_told_in_one_line(store, trials, train, monkeypatch):
    monkeypatch.setattr(Record, "write", lambda self, directory: full_disk())
    with pytest.raises(SettingsError, match=r"^output.dir must be a directory that can be written, got .*: No space"):
        train()
    assert running(store) == []


@pytest.mark.parametrize("source", [None, "", "checkpoint-3"])
def test_a_trial_takes_the_place_of_an_earlier_one_in_its_directory(trials, prepared, monkeypatch, source):
    """But for the model that it starts from, be it in a directory of the earlier trial's model."""
    diverged = TrialResult(Status.DIVERGED, "the training loss was nan")
    monkeypatch.setattr(run, "engine_for", lambda settings: SimpleNamespace(train=lambda *_: [diverged]))
    directory = Path(trials[0].output.dir)
    earlier = [directory / name for name in ("model", "adapter", PREDICTIONS)]
    for path in earlier:
        path.mkdir(parents=True) if path.suffix == "" else path.touch()
    Record({"protocol": "", "treatment": "", "seed": 1}, Status.FINISHED, Owner("host", 1, 0.0)).write(directory)
    own = replace(prepared.model, directory=None if source is None else earlier[0].resolve() / source)
    run.run_batch([ready(trials[0], SweepContext("again"), replace(prepared, model=own), None)])
    assert [path.exists() for path in earlier] == [source is not None, False, False]


def test_a_model_that_is_no_trials_is_neither_replaced_nor_described(trials, prepared, monkeypatch):
    monkeypatch.setattr(run, "engine_for", lambda settings: FakeEngine())
    model = Path(trials[0].output.dir, "model")
    model.mkdir(parents=True)
    (model / "config.json").touch()
    with pytest.raises(
        SettingsError, match=r"^output\.dir must be a trial's own directory, .* its model/ is no trial's"
    ):
        run.run_batch([ready(trials[0], SweepContext("here"), prepared, None)])
    unsaved = replace(trials[0], output=replace(trials[0].output, save_model=False))
    (trial,) = run.run_batch([ready(unsaved, SweepContext("here"), prepared, None)])
    write_card(trial)
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_a_trial_that_its_callback_stops_says_why(store, trials, train, monkeypatch):
    def stopped(self, trials, splits, observer):
        results = FakeEngine.train(self, trials, splits, observer)
        return [replace(result, status=Status.PRUNED, error="pruned after step 4 of 4") for result in results]

    monkeypatch.setattr(run, "engine_for", lambda settings: type("Stopped", (), {"train": stopped})())
    outcomes = train(pruning_callback=lambda evaluation: "accuracy 1.0 is below the median")
    assert outcomes[0].result.error == "pruned after step 4 of 4: accuracy 1.0 is below the median"


def test_a_trial_of_this_process_is_compared_as_what_its_run_tells(store, train):
    outcome = train()[0]
    (kept,) = store.search({}, [outcome.run_id])
    assert repr(replace(kept, url="", started_ms=0)) == repr(replace(outcome.stored, predictions=None))
    assert kept.accuracy == 1.0


@pytest.mark.parametrize("end", ["error", "full disk"])
def test_a_comparison_that_fails_leaves_the_trial_as_it_is(store, prepared, trials, train, monkeypatch, caplog, end):
    outcome = train()[0]
    monkeypatch.setattr(batch, "compare", lambda *_: ENDS[end]())
    batch.compare_with(lambda: outcome.stored, outcome)
    assert outcome.comparison is None
    assert "could not be compared with its baseline" in caplog.text


def test_a_trial_that_was_stopped_is_not_compared(store, train, caplog):
    finished = train()[0]
    stopped = replace(finished, ended=replace(finished.result, status=Status.PRUNED))
    batch.compare_with(lambda: finished.stored, stopped)
    assert stopped.comparison is None
    assert caplog.text == ""


def test_a_store_that_is_gone_after_the_trial_leaves_it_without_a_comparison(store, train, caplog):
    def gone():
        raise SettingsError("tracking.uri must be a store that answers")

    outcome = train()[0]
    batch.compare_with(gone, outcome)
    assert outcome.comparison is None
    assert "tracking.uri must be a store that answers" in caplog.text


@pytest.mark.parametrize("end", SAMPLE)
def test_what_happens_while_the_summary_is_printed_changes_nothing_of_the_trial(
    store, prepared, trials, monkeypatch, end
):
    monkeypatch.setattr(run, "engine_for", lambda settings: FakeEngine())
    monkeypatch.setattr(batch, "open_store", lambda settings: store)
    monkeypatch.setattr(batch, "prepare", lambda settings: prepared)
    monkeypatch.setattr(summary, "_heading", lambda *_: ENDS[end]())
    with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError, OSError)):  # as it is
        batch.run_and_compare(Job(trials[0], trials[0], lambda: ""))
    assert ends_of(store, trials) == [("FINISHED", "FINISHED", "FINISHED")]
    assert running(store) == []


def test_without_a_store_the_record_alone_is_kept(prepared, trials, monkeypatch):
    monkeypatch.setattr(run, "engine_for", lambda settings: FakeEngine())
    (outcome,) = run.run_batch([ready(trials[0], SweepContext("layers=1 seed=42"), prepared, None)])
    record = json.loads((Path(trials[0].output.dir) / "trial.json").read_text())
    assert (record["status"], record["run_id"], outcome.run_id) == ("FINISHED", None, None)
