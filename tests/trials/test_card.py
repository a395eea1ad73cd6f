"""The model card: as the hub reads it, with a command that composes to the same trial, and no larger claim."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from distilbench.identity import point_key
from distilbench.report.trial import sentence
from distilbench.settings import TrackingSettings
from distilbench.trials.batch import compare_with, write_card_and_log_model
from distilbench.trials.card import write_card
from distilbench.trials.prepared import Job, SweepContext, prepare
from distilbench.trials.run import Trial, run_batch
from tests.conftest import compose_settings

ASKED = ("model=tiny", "data=synthetic", "tracking=none", "train.epochs=1", "scheduler=cosine", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    settings = compose_settings(*ASKED, f"output.dir={tmp_path_factory.mktemp('carded')}")
    (outcome,) = run_batch([Trial(Job(settings, settings, str), prepare(settings), None)])
    write_card_and_log_model(outcome)
    return outcome


def card_of(outcome) -> ModelCard:
    return ModelCard.load(f"{outcome.settings.output.dir}/model/README.md")


def test_a_model_says_what_it_was_made_of_and_what_it_reached(outcome):
    card = card_of(outcome)
    accuracy = outcome.result.report.accuracy
    assert (card.data.pipeline_tag, card.data.base_model, card.data.datasets) == ("text-classification", None, None)
    assert next((r.metric_type, r.metric_value) for r in card.data.eval_results) == ("accuracy", round(accuracy, 4))
    text = card.text
    share = (64 * accuracy + 2) / 68
    half = 196 * (share * (1 - share) / 68) ** 0.5
    assert f"| accuracy | {100 * accuracy:.2f} % ± {half:.2f} (95 %, over examples) |" in text
    assert "One trial, one seed (42), on 64 examples of `validation`" in text
    assert "It was compared with no baseline." in text
    for used in (outcome.prepared.model.used, outcome.prepared.text.used):
        assert f"sha256 `{used.fingerprint}`" in text
    assert "FALLBACK" not in text


def test_its_command_trains_the_same(outcome):
    (block,) = re.findall(r"```bash\n(python -m distilbench.train .*)\n```", card_of(outcome).text)
    again = compose_settings(*shlex.split(block)[3:], "output.dir=.")
    assert point_key(again.trial) == point_key(replace(outcome.settings, engine=outcome.prepared.engine).trial)


def test_a_comparison_says_no_more_than_the_trial_did(outcome):
    compared = replace(outcome)
    compare_with(lambda: replace(outcome.stored, name="other", seed=7), compared)
    write_card(compared)
    assert sentence(compared.comparison).split(":")[0] in card_of(outcome).text
    assert "Only the seed differs" in card_of(outcome).text
    assert "compared with no baseline" not in card_of(outcome).text


def test_a_fallback_says_so_in_its_first_line(outcome, tmp_path):
    used = replace(outcome.prepared.text.used, fallback_for="stanfordnlp/sst2")
    stand_in = replace(outcome.prepared, text=replace(outcome.prepared.text, used=used))
    write_card(replace(outcome, prepared=stand_in))
    first = card_of(outcome).text.strip().splitlines()[0]
    assert first == "**FALLBACK: stanfordnlp/sst2 could not be reached; this model comes from stand-ins.**"
    write_card(outcome)


def test_files_are_told_by_their_names_and_not_by_where_they_stood(outcome, tmp_path):
    (tmp_path / "own_text.csv").write_text("text,label\n")
    data = replace(outcome.settings.data, source="files", train=f"{tmp_path}/own_text.csv", text_column="text",
                   label_column="label")  # fmt: skip
    used = replace(outcome.prepared.text.used, kind="files", name=data.train)
    prepared = replace(outcome.prepared, text=replace(outcome.prepared.text, used=used))
    job = replace(outcome.job, settings=replace(outcome.settings, data=data))
    write_card(replace(outcome, job=job, prepared=prepared))
    written = Path(f"{outcome.settings.output.dir}/model/README.md").read_text()
    write_card(outcome)
    assert str(tmp_path) not in written
    assert "- text: own\\_text.csv, sha256" in written
    assert " data.train=own_text.csv " in written


def test_a_trial_without_a_model_gets_no_card(outcome, tmp_path):
    settings = replace(outcome.settings, output=replace(outcome.settings.output, dir=str(tmp_path)))
    write_card(replace(outcome, job=replace(outcome.job, settings=settings)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("log_model", "is_swept", "logs"),
    [("never", False, False), ("best", False, True), ("best", True, False), ("always", True, True)],
)
def test_a_model_is_logged_after_its_trial_as_the_settings_ask(outcome, log_model, is_swept, logs):
    tracking = TrackingSettings(
        "mlflow", None, "distilbench", 0, log_model, None if log_model == "never" else "name@best"
    )
    logged, context = [], SweepContext("0 lr=0.01") if is_swept else None
    job = replace(outcome.job, settings=replace(outcome.settings, tracking=tracking), context=context)
    store = SimpleNamespace(log_model=lambda *call: logged.append(call))
    write_card_and_log_model(replace(outcome, job=job, store=store, run=SimpleNamespace(run_id="0")))
    wanted = [("0", Path(outcome.settings.output.dir) / "model", "name@best")]
    assert logged == (wanted if logs else [])
