"""A trial's model in MLflow: over a real store, it answers as the prediction command does, without a pickle."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import mlflow
import pandas
import pytest
from click.testing import CliRunner

from distilbench.models.classifier import load_classifier
from distilbench.tracking.model import model_directory
from distilbench.trials.batch import run_and_compare
from distilbench.trials.prepared import Job
from tests.conftest import TINY, compose_settings
from tests.made_store import make_store

TEXTS = pandas.DataFrame({"text": ["aaa xx", "", "bbb yz " * 40]})


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A trial on its own whose model is logged and registered; its store is MLflow's own for a while."""
    folder = tmp_path_factory.mktemp("logged")
    uri = f"sqlite:///{folder}/mlflow.db"
    store = make_store(folder)
    settings = compose_settings(*TINY[:2], f"tracking.uri={uri}", f"output.dir={folder}/trial", "train.max_length=32",
                                "tracking.log_model=best", "tracking.register=tiny", "optim.lr=1e-2")  # fmt: skip
    before = mlflow.get_tracking_uri()
    outcome = run_and_compare(Job(settings, settings, str))
    assert mlflow.get_tracking_uri() == before
    mlflow.set_tracking_uri(uri)
    yield outcome, store, mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def answers(logged):
    """What the prediction command writes of the same texts."""
    outcome, _, _ = logged
    return load_classifier(outcome.settings.output.dir + "/model", "cpu").predict(TEXTS)


def test_a_registered_model_answers_as_the_prediction_command_does(logged, answers):
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    pandas.testing.assert_frame_equal(model.predict(TEXTS), answers)
    assert list(answers["prediction"].isna()) == [False, True, False]
    names = model.metadata.get_input_schema().input_names(), model.metadata.get_output_schema().input_names()
    assert names == (["text"], ["prediction", "probability_negative", "probability_positive"])
    assert list(model.input_example.columns) == ["text"]


def test_a_model_is_found_where_its_checkout_was_moved_to(logged, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILBENCH_ROOT", str(tmp_path))
    (folder := tmp_path / "outputs" / "sweeps" / "first" / "0" / "model").mkdir(parents=True)
    (folder / "config.json").touch()
    _, store, _ = logged
    monkeypatch.setattr(store, "config", lambda run_id: "output: {dir: /was/here/outputs/sweeps/first/0}")
    assert model_directory(store, "any") == folder


def test_mlflows_own_command_gives_the_same_predictions(logged, answers, tmp_path):
    from mlflow.models.cli import commands

    (tmp_path / "in.json").write_text(json.dumps({"dataframe_split": TEXTS.to_dict(orient="split")}))
    asked = ["predict", "-m", "models:/tiny@champion", "-i", tmp_path / "in.json", "-o", tmp_path / "out.json",
             "-t", "json", "--env-manager", "local"]  # fmt: skip
    done = CliRunner().invoke(commands, [str(word) for word in asked], catch_exceptions=False)
    assert done.exit_code == 0
    said = pandas.DataFrame(json.loads((tmp_path / "out.json").read_text())["predictions"])
    assert [None if pandas.isna(label) else label for label in said["prediction"]] == answers["prediction"].to_list()
    for name in ("probability_negative", "probability_positive"):
        assert said[name].astype(float).to_list() == pytest.approx(answers[name].to_list(), nan_ok=True)


def test_it_holds_the_directory_as_it_is_and_pinned_requirements_and_no_pickle(logged):
    outcome, _, client = logged
    (output,) = client.get_run(outcome.run_id).outputs.model_outputs
    found = client.get_logged_model(output.model_id)
    assert (found.name, found.status.value, found.source_run_id) == ("model", "READY", outcome.run_id)
    run = client.get_run(outcome.run_id)
    assert found.params == run.data.params
    assert {one.key: one.value for one in found.metrics}["accuracy"] == run.data.metrics["accuracy"]
    assert len(client.get_metric_history(outcome.run_id, "accuracy")) == 1
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{output.model_id}"))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "requirements.txt", "data/model/model.safetensors", "data/model/README.md"} <= files
    assert "code/distilbench/models/classifier.py" in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".bin", ".pt", ".pyc"))]
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert all("==" in line and "+" not in line for line in lines)
    assert {line.partition("==")[0] for line in lines} >= {"mlflow", "torch", "transformers"}


def test_it_is_logged_once_and_a_second_version_takes_the_alias(logged, caplog):
    outcome, store, client = logged
    directory = load_classifier(outcome.settings.output.dir + "/model", "cpu").model.name_or_path
    store.log_model(outcome.run_id, directory, "tiny@other")
    assert len(client.get_run(outcome.run_id).outputs.model_outputs) == 1
    assert [v.version for v in client.search_model_versions("name='tiny'")] == [1]


def test_a_model_survives_a_moment_without_the_store(logged, monkeypatch):
    outcome, store, client = logged
    run = client.create_run(client.get_run(outcome.run_id).info.experiment_id)
    real, answers = store._client.finalize_logged_model, [ConnectionError("the server is gone")] * 2

    def finalize(*arguments):
        if answers:
            raise answers.pop()
        return real(*arguments)

    monkeypatch.setattr(store._client, "finalize_logged_model", finalize)
    monkeypatch.setattr("distilbench.tracking.retries.POLL_SECONDS", 0.01)
    store.log_model(run.info.run_id, Path(outcome.settings.output.dir) / "model", None)
    outputs = client.get_run(run.info.run_id).outputs.model_outputs
    assert "READY" in [client.get_logged_model(output.model_id).status.value for output in outputs]


def test_what_cannot_be_logged_costs_a_warning_alone(logged, tmp_path, caplog, monkeypatch):
    outcome, store, client = logged
    run = client.create_run(client.get_run(outcome.run_id).info.experiment_id)
    with caplog.at_level(logging.WARNING):
        store.log_model(run.info.run_id, tmp_path / "none", None)
    assert "MLflow did not get the model" in caplog.text
    (output,) = client.get_run(run.info.run_id).outputs.model_outputs
    assert client.get_logged_model(output.model_id).status.value == "FAILED"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["tracking.register=a"], r"^tracking.register must be null with tracking.log_model=never, got 'a'"),
        (["tracking.log_model=best", "output.save_model=false"], r"^tracking.log_model must be never with output.save"),
        (["tracking=none", "tracking.log_model=best"], r"^tracking.log_model must be never with tracking=none"),
        (
            ["tracking.log_model=best", "tracking.register=a/b"],
            r"^tracking.register must be NAME or NAME@ALIAS \(.*, got",
        ),
    ],
)
def test_contradictions_are_told_in_one_line(overrides, line):
    from distilbench.settings import SettingsError

    with pytest.raises(SettingsError, match=line):
        compose_settings(*TINY[:2], "output.dir=.", *overrides)
