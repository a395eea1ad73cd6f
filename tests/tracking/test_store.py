"""Runs are read back through MLflow's own client: what is there after each ending, and what must never be."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from distilbench.identity import SourceUsed
from distilbench.results import Evaluation, Owner, Predictions, Status, StepRecord, TrialResult
from distilbench.settings import SettingsError, TrackingSettings
from distilbench.tracking import retries
from distilbench.tracking import uri as address
from distilbench.tracking.connect import find_store, open_store
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import Connection, as_settings_error
from distilbench.tracking.run import LONGEST_WAIT, SHORTEST_WAIT, MlflowRun, confusion_figure
from distilbench.tracking.search import PARENT_TAG, SWEEP_TAG
from distilbench.tracking.start import params_of
from distilbench.trials.prepared import version_of
from tests.commands import lay_tables
from tests.made_store import blank_figures, protocol_of, start_of

SECRET = "correct-horse-battery"
PREDICTIONS = Predictions(
    labels=np.array([0, 1, 1, 0]), logits=np.array([[2, 1], [0, 3], [1, 0], [4, 0]], dtype=np.float32)
)
KEPT = Evaluation("validation", 20, 2.0, loss=0.4, accuracy=0.75, f1=0.8, mcc=0.5, brier=0.12, ece=0.03)
HISTORY = (replace(KEPT, step=10, epoch=1.0, accuracy=0.5), KEPT, replace(KEPT, step=30, epoch=3.0, accuracy=0.6))
DONE = TrialResult(
    Status.FINISHED, selection=KEPT, report=KEPT, history=HISTORY, steps=30, train_seconds=12.5, setup_seconds=1.5,
    examples_per_second=32.0, tokens_per_second=426.0, peak_memory_bytes=3 * 2**20, trainable_parameters=7,
    total_parameters=9, train_cpu_seconds=20.5, train_flops=6.9e14,
)  # fmt: skip


@pytest.fixture(scope="session")
def uri(tmp_path_factory):
    """One SQLite store for the whole module."""
    file = tmp_path_factory.mktemp("store") / "runs.db"
    lay_tables(file)
    return f"sqlite:///{file}"


@pytest.fixture
def store(uri):
    return open_store(TrackingSettings("mlflow", uri, "tests", 0))


@pytest.fixture
def client(uri, store):
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.fixture
def start():
    """Return ``start(*overrides, **fields) -> RunContent``; every protocol is new unless ``data`` names one."""
    fresh = f"{time.perf_counter_ns():x}"

    def make(*overrides, data=fresh, selection_split="validation", **changes):
        model = SourceUsed("package", "minilm", "feed", fallback_for="distilbert")
        text = SourceUsed("hub", "owner/text", data, "0123456789abcdef", fallback_for=None)
        return start_of(
            *overrides, protocol=protocol_of(model=model, data=text, selection_split=selection_split), **changes
        )

    return make


def step(number, steps=30, loss=0.5):
    return StepRecord(number, steps, number / 10, loss, 2e-5, 1.25, 31.0)


def finished(store, start, predictions=PREDICTIONS):
    run = store.begin(start)
    with blank_figures():
        run.finish(DONE, predictions)
    return run.run_id


def test_a_trial_is_kept_with_parameters_as_the_command_line_spells_them(store, client, start):
    run_id = finished(store, start("freeze.layers=1", "scheduler.warmup_steps=null", "optim.lr=3e-5"))
    params = client.get_run(run_id).data.params
    assert params["freeze.layers"] == "1"
    assert params["freeze.embeddings"] == "auto"
    assert params["freeze.dropout"] == "true"
    assert params["optim.lr"] == "3e-05"
    assert params["scheduler.warmup_steps"] == "null"
    assert params["data.label_names"] == '["negative", "positive"]'


def test_a_fallback_is_one_parameter_and_long_values_are_cut(settings):
    asked = settings("model=distilbert", "data.hub_name=" + "x" * 7000).trial
    params = params_of(asked)
    assert params["model.fallback"] == "package"
    assert "model.fallback.source" not in params
    assert len(params["data.hub_name"]) == 6000


def test_tags_tell_what_was_used_where_and_by_which_process(store, client, start):
    tags = client.get_run(store.begin(start(tags={"distilbench.sweep": "first"})).run_id).data.tags
    assert tags["distilbench.status"] == "RUNNING"
    assert len(tags["distilbench.protocol"]) == 12
    assert json.loads(tags["distilbench.treatment_settings"])["freeze.layers"] == 0
    assert tags["distilbench.seed"] == "42"
    assert "FALLBACK for distilbert" in tags["distilbench.model"]
    assert (tags["distilbench.model.is_fallback"], tags["distilbench.data.is_fallback"]) == ("true", "false")
    assert tags["distilbench.model.fingerprint"] == "feed"
    assert tags["distilbench.version.torch"] == version_of("torch")
    assert (tags["distilbench.host"], tags["distilbench.pid"]) == (socket.gethostname(), str(os.getpid()))
    assert float(tags["distilbench.process_started"]) == Owner.of().started
    assert tags["distilbench.sweep"] == "first"
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == (sys.argv[0], "LOCAL")
    assert "256 training, 64 validation examples" in tags["mlflow.note.content"]


def test_commit_and_dirty_flag_are_tagged_inside_a_checkout(store, client, start, tmp_path, monkeypatch):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "new.txt").write_text("staged")
    subprocess.run(["git", "-C", tmp_path, "add", "new.txt"], check=True)
    monkeypatch.setattr("distilbench.tracking.start.CHECKOUT", tmp_path)
    tags = client.get_run(store.begin(start()).run_id).data.tags
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["mlflow.source.git.dirty"] == "true"
    monkeypatch.setenv("PATH", "")
    assert "mlflow.source.git.commit" not in client.get_run(store.begin(start()).run_id).data.tags


def test_data_sets_are_recorded_as_inputs(store, client, start):
    inputs = client.get_run(store.begin(start()).run_id).inputs.dataset_inputs
    found = {entry.tags[0].value: entry.dataset for entry in inputs}
    assert set(found) == {"training", "validation"}
    assert json.loads(found["training"].profile) == {"num_rows": 256}
    assert found["training"].digest != found["validation"].digest
    assert json.loads(found["training"].source)["path"] == "owner/text"


@pytest.mark.parametrize("context", ["training", "validation"])
def test_parallel_trials_may_record_the_same_data_set_at_once(store, client, start, context):
    """Another process adds the data set after MLflow has looked for it, before it writes its own."""
    from mlflow.store.tracking.dbmodels.models import SqlDataset
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    examples = {"training": 256, "validation": 64}  # as in every start
    added = []

    def add_first(session, *_):
        for row in [row for row in session.new if isinstance(row, SqlDataset) and not added]:
            if json.loads(row.dataset_profile)["num_rows"] == examples[context]:
                fields = {column.key: getattr(row, column.key) for column in SqlDataset.__table__.columns}
                added.append(fields | {"dataset_uuid": f"{time.perf_counter_ns():032x}"})
                with session.get_bind().begin() as connection:
                    connection.execute(SqlDataset.__table__.insert(), added)

    event.listen(Session, "before_flush", add_first)
    try:
        run_id = store.begin(start()).run_id
    finally:
        event.remove(Session, "before_flush", add_first)
    (other,) = added
    inputs = client.get_run(run_id).inputs.dataset_inputs
    assert sorted(entry.tags[0].value for entry in inputs) == ["training", "validation"]
    assert other["digest"] in {entry.dataset.digest for entry in inputs}


def test_curves_have_every_point_and_the_columns_show_the_kept_epoch(store, client, start):
    run = store.begin(start())
    for number in range(1, 31):
        run.on_step(step(number, loss=1 / number))
        if number % 10 == 0:
            run.on_evaluation(HISTORY[number // 10 - 1])
    run.finish(DONE, PREDICTIONS)
    losses = client.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in losses] == [(n, 1 / n) for n in range(1, 31)]
    accuracies = client.get_metric_history(run.run_id, "validation/accuracy")
    assert [(point.step, point.value) for point in accuracies] == [(10, 0.5), (20, 0.75), (30, 0.6)]
    metrics = client.get_run(run.run_id).data.metrics
    names = ("accuracy", "loss", "f1", "mcc", "brier", "ece")
    assert [metrics[name] for name in names] == [0.75, 0.4, 0.8, 0.5, 0.12, 0.03]
    assert [metrics[f"validation/{name}"] for name in names] == [0.6, 0.4, 0.8, 0.5, 0.12, 0.03]
    assert (metrics["best_epoch"], metrics["epoch"]) == (2.0, 3.0)
    assert (metrics["train_seconds"], metrics["setup_seconds"], metrics["peak_memory_mb"]) == (12.5, 1.5, 3.0)
    assert (metrics["trainable_parameters"], metrics["total_parameters"]) == (7, 9)
    assert (metrics["train_flops"], metrics["train_cpu_seconds"]) == (6.9e14, 20.5)
    assert metrics["train/gradient_norm"] == 1.25


def test_a_run_elsewhere_than_on_a_cpu_has_no_cpu_time(store, client, start):
    run = store.begin(start())
    run.finish(replace(DONE, train_cpu_seconds=None))
    assert "train_cpu_seconds" not in client.get_run(run.run_id).data.metrics


def test_a_selection_split_of_its_own_has_curves_of_its_own(store, client, start):
    run = store.begin(start(selection_split="train (held out)"))
    run.on_evaluation(KEPT)
    run.finish(replace(DONE, report=replace(KEPT, accuracy=0.7)))
    metrics = client.get_run(run.run_id).data.metrics
    assert (metrics["selection/accuracy"], metrics["accuracy"]) == (0.75, 0.7)


@pytest.mark.parametrize(("size", "named"), [(40, 40), (41, 21), (150, 38)])
def test_a_confusion_matrix_names_every_few_of_many_labels(size, named):
    predictions = Predictions(np.arange(size), np.eye(size, dtype=np.float32))
    axes = confusion_figure(predictions, tuple(f"label {number}" for number in range(size))).axes[0]
    every = -(-size // 40)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == [f"label {number}" for number in range(0, size, every)]
        assert len(ticks) == named


def test_artifacts_are_configuration_predictions_and_figures(store, client, start, uri):
    import pyarrow.parquet

    run = store.begin(start())
    run.finish(DONE, PREDICTIONS)
    run_id = run.run_id
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlruns" / "1" / run_id / "artifacts"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "confusion_matrix.png", "learning_curve.png", "predictions.parquet",
    ]  # fmt: skip
    assert "seed: 42\n" in (folder / "config.yaml").read_text()
    table = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
    assert list(table) == ["index", "label", "prediction", "logit_0", "logit_1"]
    assert table["prediction"] == [0, 1, 0, 0]
    assert table["logit_1"] == [1.0, 3.0, 0.0, 0.0]
    assert all(
        (folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("confusion_matrix.png", "learning_curve.png")
    )


@pytest.mark.parametrize(
    ("status", "terminal"),
    [
        (Status.FINISHED, "FINISHED"),
        (Status.PRUNED, "KILLED"),
        (Status.INTERRUPTED, "KILLED"),
        (Status.DIVERGED, "FAILED"),
        (Status.OUT_OF_MEMORY, "FAILED"),
        (Status.FAILED, "FAILED"),
    ],
)
def test_the_terminal_status_is_true_in_every_ending(store, client, start, status, terminal):
    run = store.begin(start())
    assert client.get_run(run.run_id).info.status == "RUNNING"
    run.finish(TrialResult(status, error=None if status == Status.FINISHED else "loss is nan\nat step 7"))
    kept = client.get_run(run.run_id)
    assert (kept.info.status, kept.data.tags["distilbench.status"]) == (terminal, status)
    assert kept.info.end_time is not None
    assert kept.data.tags.get("distilbench.error") == (None if status == Status.FINISHED else "loss is nan at step 7")


def test_non_finite_losses_are_kept(store, client, start):
    run = store.begin(start())
    run.on_step(step(1, loss=float("nan")))
    run.on_step(step(2, loss=float("inf")))
    run.finish(TrialResult(Status.DIVERGED, "loss is nan", steps=2))
    values = [point.value for point in client.get_metric_history(run.run_id, "train/loss")]
    assert np.isnan(values[0])
    assert values[1] > 1e300


def test_an_interrupted_run_is_continued_under_its_id(store, client, start):
    run = store.begin(start())
    run.on_step(step(1))
    run.finish(TrialResult(Status.INTERRUPTED, error="Ctrl-C", steps=1))
    again = store.begin(start("train.resume=true", run_id=run.run_id))
    assert again.run_id == run.run_id
    running = client.get_run(run.run_id)
    assert (running.info.status, running.data.tags["distilbench.error"]) == ("RUNNING", "")
    assert running.data.params["train.resume"] == "false"
    again.on_step(step(2))
    again.finish(DONE)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.run_id, "train/loss")] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "alone"),
    [({}, "true"), ({"device": "another cpu"}, "false"), ({"alone": False}, "false")],
)
def test_a_run_that_began_elsewhere_or_beside_others_was_not_alone(store, client, start, changes, alone):
    run = store.begin(start(**changes))
    assert client.get_run(run.run_id).data.tags["distilbench.alone"] == str(changes.get("alone", True)).lower()
    store.begin(start("train.resume=true", run_id=run.run_id))
    assert client.get_run(run.run_id).data.tags["distilbench.alone"] == alone


def test_a_run_that_was_deleted_meanwhile_is_replaced_and_a_line_says_so(store, client, start, caplog):
    deleted = store.begin(start()).run_id
    client.delete_run(deleted)
    for missing in (deleted, "0" * 32):
        caplog.clear()
        run = store.begin(start(run_id=missing))
        assert run.run_id != missing
        assert client.get_run(run.run_id).info.status == "RUNNING"
        assert [record.getMessage() for record in caplog.records] == [
            f"run {missing} is no longer in the store; it continues as a new one"
        ]


def test_runs_nest_under_a_parent(store, client, start):
    parent = store.begin(start()).run_id
    child = store.begin(start(parent_run_id=parent)).run_id
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_the_newest_finished_baseline_of_the_same_seed_is_found(store, start):
    began = start()
    other_seed = start("seed=7")
    first, second = finished(store, began), finished(store, began)
    newest = finished(store, other_seed)
    run = store.begin(began)
    run.finish(TrialResult(Status.DIVERGED, error="loss is nan"))
    store.begin(began)

    treatment_used = json.loads(began.tags["distilbench.treatment_settings"])

    def find(seed, treatment=treatment_used, protocol=began.tags["distilbench.protocol"]):
        return store.newest_baseline(protocol, treatment, seed)

    assert first != second
    assert find(42).run_id == second
    assert find(7).run_id == newest
    assert find(8).run_id == newest
    assert find(42, protocol="000000000000") is None
    assert find(42, treatment=treatment_used | {"freeze.layers": 6}) is None


def test_a_stored_trial_equals_what_was_logged(store, start):
    began = start(alone=False)
    run_id = finished(store, began)
    (kept,) = store.search({}, (run_id,))
    assert (kept.name, kept.protocol_id, kept.seed) == (began.name, began.tags["distilbench.protocol"], 42)
    assert kept.treatment == json.loads(began.tags["distilbench.treatment_settings"])
    assert (kept.status, kept.accuracy, kept.loss, kept.train_seconds) == (Status.FINISHED, 0.75, 0.4, 12.5)
    assert (kept.trainable_parameters, kept.measured_on, kept.alone) == (
        7,
        began.tags["distilbench.measured_on"],
        False,
    )
    predictions = store.predictions(run_id)
    np.testing.assert_array_equal(predictions.logits, PREDICTIONS.logits)
    np.testing.assert_array_equal(predictions.correct, [True, True, False, True])


def test_seeds_of_a_trial_that_was_pruned_after_them_are_pruned_too(store, client, start, tmp_path):
    tags = {SWEEP_TAG: "s", "distilbench.trial": "0"}
    for status in (Status.PRUNED, Status.DIVERGED):
        parent = store.open_parent_run("0", {**tags, PARENT_TAG: "sweep"}, tmp_path)
        finished(store, start(parent_run_id=parent.run_id, tags=tags))
        parent.finish(status, "pruned after 1 seed")
    found = store.search({SWEEP_TAG: "s"})
    assert [one.status for one in found] == [Status.PRUNED, Status.FINISHED]
    assert found[0].accuracy == 0.75


def test_missing_or_broken_predictions_load_as_none(store, start, uri):
    assert store.predictions(finished(store, start(), predictions=None)) is None
    run_id = finished(store, start())
    folder = Path(uri.removeprefix("sqlite:///")).parent
    next(folder.rglob(f"{run_id}/artifacts/predictions.parquet")).write_bytes(b"half")
    assert store.predictions(run_id) is None


def test_a_comparison_is_added_to_an_ended_run(store, client, start):
    run_id = finished(store, start())
    store.add_comparison(run_id, "| a | b |", {"difference_points": -0.5}, "half a point less")
    assert client.get_run(run_id).data.tags["mlflow.note.content"].startswith("half a point less\n\n**Model** ")
    assert client.get_run(run_id).data.metrics["difference_points"] == -0.5
    assert Path(client.download_artifacts(run_id, "comparison.md")).read_text() == "| a | b |"


@pytest.fixture
def blips(store, monkeypatch):
    """Return a function that has a call of the client fail so many times; its answer tells how often it was made."""
    from mlflow.exceptions import MlflowException

    def make(name, failures):
        real, calls = getattr(store._client, name), []

        def call(*arguments, **more):
            calls.append(arguments)
            if len(calls) <= failures:
                raise MlflowException("database is locked")
            return real(*arguments, **more)

        monkeypatch.setattr(store._client, name, call)
        return calls

    monkeypatch.setattr(retries, "POLL_SECONDS", 0.01)
    return make


def test_what_is_not_kept_on_disk_is_tried_again_for_some_seconds(store, client, start, blips, tmp_path, caplog):
    run_id = finished(store, start())
    (tmp_path / "report.md").write_text("all of it")
    blips("log_text", failures=2)
    store.add_comparison(run_id, "| a | b |", {"difference_points": -0.5}, "half a point less")
    blips("log_artifact", failures=2)
    store.attach(run_id, [tmp_path / "report.md"], "a note")
    assert Path(client.download_artifacts(run_id, "comparison.md")).read_text() == "| a | b |"
    assert Path(client.download_artifacts(run_id, "report.md")).read_text() == "all of it"
    waiting = "MLflow does not answer (database is locked): waiting up to 30 s for it"
    assert [record.getMessage() for record in caplog.records] == [waiting, waiting]


def test_a_full_disk_is_not_waited_for(store, start, monkeypatch):
    from sqlalchemy.exc import OperationalError

    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=time.monotonic, sleep=None))  # it can't wait
    monkeypatch.setattr(store, "_patience", 300)
    full = OperationalError("INSERT", None, sqlite3.OperationalError("database or disk is full"))
    monkeypatch.setattr(store._client, "create_run", Mock(side_effect=full))
    with pytest.raises(SettingsError, match="database or disk is full"):
        store.begin(start())


def test_what_is_lost_is_told_and_an_outage_that_is_known_is_not_waited_for(
    store, client, start, blips, monkeypatch, caplog
):
    monkeypatch.setattr(retries, "RETRY_SECONDS", 3)
    seconds = itertools.count()  # one passes each time that somebody looks
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    run_id = finished(store, start())
    tried = blips("log_text", failures=1000)
    counts = []
    for _ in range(2):
        store.add_comparison(run_id, "| a | b |", {}, "half a point less")
        counts.append(len(tried))
    assert counts == [3, 3 + 1]
    told = [record.getMessage() for record in caplog.records]
    assert told[1:] == ["MLflow does not answer (database is locked): it did not get the comparison"] * 2


def test_the_description_of_a_failed_run_begins_with_the_reason(store, client, start):
    run = store.begin(start())
    run.finish(TrialResult(Status.DIVERGED, error="the loss is `nan`;\nlower optim.lr"))
    described = client.get_run(run.run_id).data.tags["mlflow.note.content"]
    assert described.startswith("**DIVERGED** `the loss is 'nan'; lower optim.lr`\n\n**Model** ")


def test_text_is_redacted_and_otherwise_left_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    assert (
        redact("https://juan:hunter2@example.org/x and git@example.org")
        == "https://***@example.org/x and git@example.org"
    )
    assert redact("https://ghp@example.org/a//b c") == "https://***@example.org/a//b c"
    assert redact("postgresql://h/d?password=hunter2&x=1") == "postgresql://h/d?password=***&x=1"
    assert redact(f"run with {SECRET}") == "run with ***"
    assert redact("hf_" + "a" * 30) == "***"
    unchanged = "freeze.layers=3 model: distilbert, tokens_per_second 3.5, falsehood"
    assert redact(unchanged) == unchanged


def test_no_secret_of_the_environment_reaches_the_store(uri, start, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://juan:{SECRET}@example.org")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setattr(sys, "argv", [f"https://juan:{SECRET}@example.org/train.py"])
    store = open_store(TrackingSettings("mlflow", uri, "tests", 0))
    began = start(f"data.hub_name=https://juan:{SECRET}@example.org/d", name=f"run {SECRET}", tags={"extra": SECRET})
    run = store.begin(began)
    run.finish(TrialResult(Status.FAILED, error=f"could not reach https://juan:{SECRET}@example.org"))
    store.add_comparison(run.run_id, f"made with {SECRET}", {}, f"made with {SECRET}")
    folder = Path(uri.removeprefix("sqlite:///")).parent
    holding = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == []


def test_trouble_in_mid_training_warns_once_and_loses_nothing(store, client, start, monkeypatch, caplog):
    from mlflow.exceptions import MlflowException

    caplog.set_level("INFO", logger="distilbench.tracking.retries")
    run = store.begin(start())
    real, clock = run._connection.client.log_batch, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def locked(*args, **kwargs):
        raise MlflowException("database is locked")

    monkeypatch.setattr(run._connection.client, "log_batch", locked)
    run._due = 0.0
    for number in range(1, 21):
        clock[0] += SHORTEST_WAIT
        run.on_step(step(number))
        store.end_left_runs()  # a full disk answers questions
        assert run._connection.wait(0)
    monkeypatch.setattr(run._connection.client, "log_batch", real)
    run.finish(DONE)
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow does not answer (database is locked): what it lacks waits on disk until it is back",
        "MLflow answers again",
    ]
    assert len(client.get_metric_history(run.run_id, "train/loss")) == 20
    assert client.get_run(run.run_id).info.status == "FINISHED"


def opened(client, start):
    """A run that has been made."""
    run = MlflowRun(Connection(client), replace(start, run_id="id"))
    run._pending.content = None
    return run


@pytest.mark.parametrize(("seconds", "wait"), [(0.01, SHORTEST_WAIT), (0.2, 20.0), (20.0, LONGEST_WAIT)])
def test_sending_takes_a_hundredth_of_the_time_at_most(start, monkeypatch, seconds, wait):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Client:
        def log_batch(self, *_, **__):
            clock[0] += seconds

    run = opened(Client(), start())
    run.on_evaluation(KEPT)
    assert run._due == pytest.approx(seconds + wait)


def test_a_store_that_is_gone_at_the_end_only_warns(store, start, monkeypatch, caplog):
    run = store.begin(start())

    def gone(*args, **kwargs):
        raise ConnectionError("the server is gone")

    for name in ("log_batch", "log_artifact", "log_figure", "set_terminated"):
        monkeypatch.setattr(run._connection.client, name, gone)
    run.finish(DONE, PREDICTIONS)
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow does not answer (the server is gone): what it lacks waits on disk until it is back"
    ]


def test_metrics_that_are_sent_twice_are_stored_once(store, client, start):
    run = store.begin(start())
    run.on_step(step(1))
    waiting = list(run._pending.metrics)
    run._send()
    run._pending.metrics = waiting
    run._send()
    assert len(client.get_metric_history(run.run_id, "train/loss")) == 1


def test_more_metrics_arrive_than_mlflow_takes_in_one_call(store, client, start):
    run = store.begin(start())
    for number in range(1, 301):
        run.on_step(step(number, steps=300))
    run.on_evaluation(KEPT)
    assert len(client.get_metric_history(run.run_id, "train/gradient_norm")) == 300


def test_an_end_waits_for_the_store_also_where_mlflow_is_to_log_asynchronously(store, client, start, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    run, database = store.begin(start()), store._client._tracking_client.store
    real = database.log_batch

    def refuse_tags(run_id, metrics, params, tags):
        if tags:
            raise ConnectionError("the server is gone")
        real(run_id, metrics, params, tags)

    monkeypatch.setattr(database, "log_batch", refuse_tags)
    run.finish(TrialResult(Status.FAILED, error="loss is nan"))
    assert client.get_run(run.run_id).info.status == "RUNNING"
    monkeypatch.setattr(database, "log_batch", real)
    run._send()
    kept = client.get_run(run.run_id)
    assert (kept.info.status, kept.data.tags["distilbench.error"]) == ("FAILED", "loss is nan")


def test_tracking_none_opens_no_store_and_imports_no_mlflow():
    code = (
        "import sys; from distilbench.settings import TrackingSettings;"
        "from distilbench.tracking.connect import open_store;"
        "print(open_store(TrackingSettings('none', None, 'tests', 0)), 'mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None False\n"


def test_a_sweeps_trials_share_the_store_that_their_process_opened_last(tmp_path):
    settings = TrackingSettings("mlflow", f"sqlite:///{tmp_path}/mlflow.db", "shared", 0)
    first = open_store(settings)
    assert open_store(settings, patiently=True) is first
    again = open_store(settings)
    assert again is not first
    assert open_store(settings, patiently=True) is again
    other = open_store(replace(settings, experiment="other"), patiently=True)
    assert other.describe().startswith("experiment other in ")


def test_the_address_is_the_setting_then_the_environment_then_the_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILBENCH_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = address.store_address_of(TrackingSettings("mlflow", None, "tests", 0))
    assert (found.uri, found.artifacts) == (f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlruns")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org/mlflow")
    assert address.store_address_of(TrackingSettings("mlflow", None, "tests", 0)).uri == "https://example.org/mlflow"
    found = address.store_address_of(TrackingSettings("mlflow", "sqlite:///here/x.db", "tests", 0))
    assert found.artifacts == Path("here/mlruns").absolute()


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "sqlite://", "sqlite:///:memory:", "databricks"])
def test_a_uri_of_no_known_kind_is_refused(uri):
    with pytest.raises(SettingsError, match=r"^tracking.uri must be sqlite:///<file>, http\(s\)://<server> or"):
        open_store(TrackingSettings("mlflow", uri, "tests", 0))


def test_links_open_a_view_that_the_experiment_keeps_with_the_columns_that_tell_most(store, client):
    for sweep in (None, "first"):
        page, _, query = store.runs_url(sweep).partition("?")
        assert page == "http://127.0.0.1:5000/#/experiments/1/runs"
        asked = dict(pair.split("=") for pair in query.split("&"))
        assert asked.pop("workflowType") == "machine_learning"
        view = json.loads(client.get_experiment("1").tags[f"mlflow.sharedViewState.{asked.pop('viewStateShareKey')}"])
        assert asked == {}, "MLflow heeds no view beside a search of the link's own"
        assert view.get("searchFilter") == (f"tags.`distilbench.sweep` = '{sweep}'" if sweep else None)
        assert view["selectedColumns"] == [
            "metrics.`accuracy`", "metrics.`difference_points`", "metrics.`train_seconds`", "metrics.`train_flops`",
            "params.`freeze.layers`", "tags.`distilbench.trial`",
        ]  # fmt: skip
        assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`accuracy`", False)


def test_mlflows_page_knows_every_word_of_such_a_view():
    import mlflow

    pages = Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js"
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in pages.glob("*.js"))
    for word in ("viewStateShareKey", "mlflow.sharedViewState.", "selectedColumns", "workflowType", "machine_learning",
                 '"searchFilter","orderByKey","orderByAsc"'):  # fmt: skip
        assert word in text


def test_where_the_view_is_not_taken_a_link_opens_the_plain_table(store, monkeypatch):
    def refused(*args):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(store._client, "set_experiment_tag", refused)
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.0)
    table = "runs?orderByKey=metrics.%60accuracy%60&orderByAsc=false&workflowType=machine_learning"
    assert store.runs_url() == f"http://127.0.0.1:5000/#/experiments/1/{table}"
    server = address.StoreAddress("MLFLOW_TRACKING_URI", f"https://juan:{SECRET}@example.org/mlflow/")
    assert server.runs_url("4") == f"https://example.org/mlflow/#/experiments/4/{table}"
    assert (
        server.run_url("4", "ab") == "https://example.org/mlflow/#/experiments/4/runs/ab?workflowType=machine_learning"
    )
    assert server.ui_command is None


def test_links_lead_to_where_mlflow_ui_will_be_and_say_what_to_type_first(store, uri, monkeypatch, tmp_path):
    folder = Path(uri.removeprefix("sqlite:///")).parent
    assert store.address.ui_command == f"cd {folder} && mlflow ui --backend-store-uri {uri}"
    monkeypatch.setenv("DISTILBENCH_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HOST", "0.0.0.0")
    monkeypatch.setenv("MLFLOW_PORT", "5050")
    usual = address.store_address_of(TrackingSettings("mlflow", None, "tests", 0))
    assert usual.ui_command == f"cd {tmp_path} && mlflow ui"
    assert usual.run_url("1", "ab").startswith("http://127.0.0.1:5050/#/experiments/1/runs/ab?")


def test_racing_processes_agree_on_one_database_and_experiment(workspace):
    program = workspace.path / "race.py"
    program.write_text(
        "import sys; from distilbench.settings import TrackingSettings\n"
        "from distilbench.tracking.connect import open_store\n"
        "store = open_store(TrackingSettings('mlflow', sys.argv[1], 'raced', 0)); print(store.runs_url())"
    )
    racing = [workspace.start(f"sqlite:///{workspace.path}/raced.db", program=program) for _ in range(4)]
    said = [process.communicate(timeout=600) for process in racing]
    assert [process.returncode for process in racing] == [0] * 4, said
    assert {out for out, _ in said} == {said[0][0]}
    assert {err for _, err in said} == {""}, "the terminal stays quiet"
    assert "/experiments/1/" in said[0][0]


def test_a_server_that_refuses_is_told_in_one_line_without_its_password(monkeypatch, store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://juan:{SECRET}@127.0.0.1:{port}")
    with pytest.raises(SettingsError) as refused:
        open_store(TrackingSettings("mlflow", None, "tests", 0))
    assert str(refused.value) == (
        f"MLFLOW_TRACKING_URI must be a store that answers, got http://***@127.0.0.1:{port}: Connection refused; "
        "start it or correct the address, or go without: tracking=none"
    )


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Detected out-of-date database schema (found version 1, but expected 2)", "mlflow db upgrade"),
        ("API request to endpoint /get-by-name failed with error code 401 != 200", "MLFLOW_TRACKING_USERNAME"),
        ("database is locked", "look there"),
    ],
)
def test_an_old_database_and_a_login_have_remedies_of_their_own(said, remedy):
    from mlflow.exceptions import MlflowException

    with pytest.raises(SettingsError, match=rf"^refused: .*; .*{remedy}"), as_settings_error("refused", "look there"):
        raise MlflowException(said)


def test_a_server_that_accepts_and_never_answers_is_given_up(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = pytest.raises(SettingsError, match=r"timed out; start it or correct the address")
    with socket.create_server(("127.0.0.1", 0)) as silent, said:
        open_store(TrackingSettings("mlflow", f"http://127.0.0.1:{silent.getsockname()[1]}", "tests", 0))


def test_a_database_that_cannot_be_used_is_told_in_one_line(tmp_path, monkeypatch):
    from distilbench.tracking import connect

    monkeypatch.setattr(connect, "LOCK_SECONDS", 0.1)
    (tmp_path / "text.db").write_text("no database, but a text of some length " * 100)
    with pytest.raises(SettingsError, match=r"^tracking.uri must be .*text.db: file is not a database; check the file"):
        open_store(TrackingSettings("mlflow", f"sqlite:///{tmp_path}/text.db", "tests", 0))
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"Not a directory|File exists"):
        open_store(TrackingSettings("mlflow", f"sqlite:///{tmp_path}/file/x.db", "tests", 0))


def test_a_locked_database_is_told_in_one_line(uri, store, monkeypatch):

    from distilbench.tracking import connect

    monkeypatch.setattr(connect, "LOCK_SECONDS", 0.1)
    holder = sqlite3.connect(uri.removeprefix("sqlite:///"))
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(SettingsError, match="database is locked"):
        open_store(TrackingSettings("mlflow", uri, "tests", 0))
    holder.close()


def test_a_store_that_cannot_be_written_to_is_read_and_what_it_does_not_take_is_not_waited_for(
    uri, store, start, tmp_path, monkeypatch, caplog
):
    from mlflow.exceptions import MlflowException

    run_id = finished(store, start())
    read = partial(sqlite3.connect, uri=True)
    monkeypatch.setattr(sqlite3, "connect", lambda file, *given, **more: read(f"file:{file}?mode=ro", *given, **more))
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "kept.db")
    found = find_store(TrackingSettings("mlflow", f"sqlite:///{tmp_path}/kept.db", "tests", 0))
    assert found.search({}, (run_id,))[0].accuracy == 0.75
    refused = Mock(side_effect=MlflowException("attempt to write a readonly database"))
    monkeypatch.setattr(found._client, "set_experiment_tag", refused)
    assert "viewStateShareKey" not in found.runs_url()
    told = "MLflow did not get a view of the runs: attempt to write a readonly database"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_deleted_experiment_is_refused(uri, store, client):
    deleted = client.create_experiment("deleted")
    client.delete_experiment(deleted)
    for opened in (open_store, find_store):
        with pytest.raises(SettingsError, match=f"mlflow experiments restore --experiment-id {deleted}"):
            opened(TrackingSettings("mlflow", uri, "deleted", 0))


def test_an_experiment_is_found_among_more_than_mlflow_lists_at_once(uri, store, monkeypatch):
    monkeypatch.setattr("mlflow.MlflowClient.search_experiments", lambda *_, **__: [])
    assert find_store(TrackingSettings("mlflow", uri, "tests", 0)).describe().startswith("experiment tests in ")


def test_opening_leaves_the_programs_own_logging_alone(store):
    assert logging.getLogger("distilbench").level == logging.NOTSET
    assert logging.getLogger("alembic").level == logging.ERROR


def test_a_folder_that_takes_no_database_is_told_at_once(tmp_path, monkeypatch):
    """As for a user who may write into its ``mlruns`` alone; MLflow would try for an hour."""
    (tmp_path / "mlruns").mkdir()

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", None)
    with pytest.raises(SettingsError, match=r"tracking.uri must be a store that answers, got .*Permission denied"):
        open_store(TrackingSettings("mlflow", f"sqlite:///{tmp_path}/mlflow.db", "distilbench", 0))


def test_mlflows_variables_choose_the_experiment_unless_a_setting_does(uri, store, client, start, monkeypatch):
    unnamed, named = TrackingSettings("mlflow", uri, None, 0), TrackingSettings("mlflow", uri, "tests", 0)
    number = client.get_experiment_by_name("tests").experiment_id

    def experiment_of(settings, **variables):
        for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
            monkeypatch.setenv(name, variables.get(name, ""))
        run = client.get_run(open_store(settings).begin(start()).run_id)
        return client.get_experiment(run.info.experiment_id).name

    assert experiment_of(unnamed) == "distilbench"
    assert experiment_of(unnamed, MLFLOW_EXPERIMENT_NAME="of the shell") == "of the shell"
    assert find_store(unnamed).describe().startswith("experiment of the shell in ")
    assert experiment_of(unnamed, MLFLOW_EXPERIMENT_ID=number) == "tests"
    assert find_store(unnamed).describe().startswith("experiment tests in ")
    assert experiment_of(unnamed, MLFLOW_EXPERIMENT_NAME="of the shell", MLFLOW_EXPERIMENT_ID=number) == "of the shell"
    assert experiment_of(named, MLFLOW_EXPERIMENT_NAME="of the shell") == "tests"
    for missing in ("4711", "none"):
        refused = rf"^MLFLOW_EXPERIMENT_ID must be one of .*{number}.*, got '{missing}'"
        with pytest.raises(SettingsError, match=refused):
            experiment_of(unnamed, MLFLOW_EXPERIMENT_ID=missing)
        with pytest.raises(SettingsError, match=refused):
            find_store(unnamed)


def test_tags_of_the_environment_are_on_every_run_and_others_of_mlflows_variables_are_told(
    uri, client, start, monkeypatch, caplog, tmp_path
):
    settings = TrackingSettings("mlflow", uri, "tests", 0)
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "vision", "round": 3, "distilbench.seed": "none"}')
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    store = open_store(settings)
    assert "MLFLOW_RUN_ID is not used: every trial has a run of its own" in caplog.text
    parent = store.open_parent_run("mine", {"distilbench.sweep": "mine"}, tmp_path)
    trial, sweep = (client.get_run(run_id).data.tags for run_id in (store.begin(start()).run_id, parent.run_id))
    for tags in (trial, sweep):
        assert (tags["team"], tags["round"]) == ("vision", "3")
    assert trial["distilbench.seed"] == "42", "what a report reads is ours"
    for wrong in ("team=vision", "[1]"):
        monkeypatch.setenv("MLFLOW_TAGS", wrong)
        with pytest.raises(SettingsError, match=r"^MLFLOW_TAGS must be a JSON object"):
            open_store(settings)
