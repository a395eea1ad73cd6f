"""The prediction command: every row accounted for, in order, as the trial itself answered; what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
from hydra import compose, initialize_config_dir

import distilbench
from distilbench.composition import default_treatment
from distilbench.predict import _glue_codes, predict
from distilbench.report.from_store import report_of_sweep
from distilbench.results import read_record
from distilbench.settings import PredictSettings, SettingsError, TrackingSettings, settings_from
from distilbench.sweep.reporting import _log_answer
from distilbench.tracking.run import read_predictions
from distilbench.tracking.search import PARENT_TAG, SWEEP_TAG
from distilbench.trials.prepared import Job, SweepContext, prepare
from distilbench.trials.run import Trial, run_batch
from tests.commands import Workspace
from tests.conftest import ROOT, TINY
from tests.made_store import make_store

TRIALS = {"baseline": "2e-5", "better": "1e-2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep of two tiny trials, of which the second learns, and one trial without a model."""
    folder = tmp_path_factory.mktemp("predicted")
    store = make_store(folder)
    group = store.open_parent_run("first", {SWEEP_TAG: "first"}, Path("first"))
    for name, rate in {**TRIALS, "bare": "1e-2"}.items():
        tags = {SWEEP_TAG: "first" if name in TRIALS else "bare"}
        tags |= {"distilbench.role": "baseline"} if name == "baseline" else {}
        asked = [*TINY[:2], f"optim.lr={rate}", f"output.dir={folder}/{name}", "train.max_length=48",
                 f"train.epochs={8 if name == 'better' else 1}", f"output.save_model={name in TRIALS}",
                 f"tracking.uri=sqlite:///{folder}/mlflow.db"]  # fmt: skip
        with initialize_config_dir(str(ROOT / "conf")):
            settings = settings_from(compose("config", asked))
        job = Job(settings, settings, str, SweepContext(name, {**tags, PARENT_TAG: group.run_id}))
        run_batch([Trial(job, prepare(settings), store)])
    return folder


@pytest.fixture(scope="module")
def validation():
    """The texts on which the trials were reported, in their order."""
    with initialize_config_dir(str(ROOT / "conf")):
        settings = settings_from(compose("config", [*TINY, "output.dir=."]))
    return list(prepare(settings).text.report.texts)


def asked(folder: Path, *overrides: str):
    """Run the command in this process; returns its counts."""
    with initialize_config_dir(str(ROOT / "conf")):
        config = compose("predict", [f"tracking.uri=sqlite:///{folder}/mlflow.db", *overrides])
        return predict(settings_from(config, PredictSettings))


def run_id(folder: Path, name: str) -> str:
    return str(read_record(folder / name).run_id)


def test_a_run_answers_as_its_trial_did_in_the_order_of_the_file(folder, validation, tmp_path, capsys):
    pandas.DataFrame({"n": range(len(validation)), "text": validation}).to_csv(tmp_path / "in.csv", index=False)
    counts = asked(folder, f"run={run_id(folder, 'better')}", f"data.test={tmp_path}/in.csv", "batch_size=7",
                   f"output={tmp_path}/made/out.csv")  # fmt: skip
    out = pandas.read_csv(tmp_path / "made" / "out.csv")
    assert list(out.columns) == ["index", "text", "prediction", "probability_negative", "probability_positive"]
    assert (list(out["index"]), list(out["text"])) == (list(range(len(validation))), validation)
    known = read_predictions(folder / "better" / "predictions.parquet")
    odds = np.exp(known.logits) / np.exp(known.logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[["probability_negative", "probability_positive"]], odds, atol=2e-6)
    assert list(out["prediction"]) == [("negative", "positive")[i] for i in known.logits.argmax(axis=1)]
    assert counts == out["prediction"].value_counts().to_dict()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out.csv"]
    assert f"predictions  {tmp_path}/made/out.csv" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_row_is_accounted_for_in_every_format(folder, ending, tmp_path, capsys):
    texts = ["aaa xx", "", "tabs\tand 'quotes\" é", None, "  ", "bbb " * 300]
    frame = pandas.DataFrame({"review": texts})
    if ending == "parquet":
        frame.to_parquet(tmp_path / "in.parquet")
        source = "in.parquet"
    else:
        frame.to_json(tmp_path / "in.jsonl.gz", orient="records", lines=True, force_ascii=False)
        source = "in.jsonl.gz"
    counts = asked(folder, f"dir={folder}/better/model", f"data.test={tmp_path}/{source}", "data.text_column=review",
                   f"output={tmp_path}/out.{ending}")  # fmt: skip
    assert (counts.total(), counts[None]) == (6, 3)
    readers = {"csv": pandas.read_csv, "parquet": pandas.read_parquet,
               "tsv": lambda path: pandas.read_csv(path, sep="\t"),
               "jsonl": lambda path: pandas.read_json(path, lines=True)}  # fmt: skip
    out = readers[ending](tmp_path / f"out.{ending}")
    assert list(out["index"]) == list(range(6))
    assert (
        list(out["prediction"].isna())
        == list(out["probability_negative"].isna())
        == [False, True, False, True, True, False]
    )
    assert out["review"][2] == (texts[2] if ending != "tsv" else texts[2].replace("\t", " "))
    assert out["prediction"][0] == "negative"
    assert "6 texts" in capsys.readouterr().out


def test_a_sweep_answers_by_its_answer_or_by_its_best(folder, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "bbb"}) + "\n")
    common = (f"data.test={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl", "sweep=first")
    asked(folder, *common)
    said = " ".join(capsys.readouterr().out.split())
    assert f"The model is that of better (run={run_id(folder, 'better')})" in said
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == "positive"
    asked(folder, *common, "best=accuracy")
    assert f"run={run_id(folder, 'better')}" in "".join(capsys.readouterr().out.split())


def test_of_a_sweep_the_answer_alone_is_logged_as_a_model(folder):
    store = make_store(folder)
    with initialize_config_dir(str(ROOT / "conf")):
        report = report_of_sweep(store, store.sweep_run("first"), default_treatment(), 1.0)
    tracking = TrackingSettings("mlflow", None, "distilbench", 0, log_model="best", register="first")
    for _ in range(2):  # as a sweep does that is continued
        _log_answer(report, store, tracking)
    logged = {name: store._client.get_run(run_id(folder, name)).outputs.model_outputs for name in TRIALS}
    assert (len(logged["better"]), len(logged["baseline"])) == (1, 0)
    assert store._client.get_model_version_by_alias("first", "champion").run_id == run_id(folder, "better")


def test_glue_gets_its_file_by_name_with_the_codes_of_its_labels(folder, tmp_path):
    (tmp_path / "test.tsv").write_text('index\tsentence\n0\taaa xx "\n1\tbbb xx\n')
    asked(folder, f"dir={folder}/better", f"data.test={tmp_path}/test.tsv", "data.text_column=sentence",
          "format=glue", f"output={tmp_path}/SST-2.tsv")  # fmt: skip
    assert (tmp_path / "SST-2.tsv").read_text() == "index\tprediction\n0\t0\n1\t1\n"
    with pytest.raises(
        SettingsError, match=r"^format must be table for a model without QNLI's labels, .* negative, pos"
    ):
        asked(folder, f"dir={folder}/better/model", f"data.test={tmp_path}/test.tsv", "data.text_column=sentence",
              "format=glue", f"output={tmp_path}/QNLI.tsv")  # fmt: skip
    assert not (tmp_path / "QNLI.tsv").exists()


@pytest.mark.parametrize(
    ("task", "names", "codes"),
    [
        ("SST-2", ("Positive", "Negative"), ("1", "0")),
        ("SST-2", ("LABEL_0", "LABEL_1"), ("0", "1")),
        ("CoLA", ("1", "0"), ("1", "0")),
        ("WNLI", ("entailment", "not entailment"), ("1", "0")),
        ("RTE", ("entailment", "not-entailment"), ("entailment", "not_entailment")),
        ("MNLI-mm", ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), ("contradiction", "neutral", "entailment")),
        ("MNLI-m", ("LABEL_0", "LABEL_1", "LABEL_2"), ("entailment", "neutral", "contradiction")),
    ],
)
def test_glue_gets_its_own_label_whatever_the_order_of_the_model(task, names, codes):
    assert tuple(_glue_codes(task, names).values()) == codes


def test_a_split_of_the_hub_is_named_by_the_model_itself(folder, tmp_path, monkeypatch):
    import datasets

    from distilbench.data import readers

    test = datasets.Dataset.from_dict({"text": ["aaa xx", "bbb xx", "bbb"], "label": [-1, -1, -1], "idx": [0, 1, 2]})
    asked_for = []

    class Builder:
        def as_dataset(self):
            return datasets.DatasetDict(test=test)

    monkeypatch.setattr(readers, "hub_builder", lambda data: asked_for.append(data) or Builder())
    monkeypatch.setattr(readers, "ROWS_AT_ONCE", 2)
    theirs = tmp_path / "model"
    shutil.copytree(folder / "better" / "model", theirs)
    config = json.loads((theirs / "config.json").read_text())
    said = {"text_column": None, "hub_name": "nyu-mll/glue", "hub_config": "sst2"}
    assert config["distilbench"].keys() >= said.keys()
    (theirs / "config.json").write_text(json.dumps(config | {"distilbench": said}))
    asked(folder, f"dir={theirs}", "data.test=test", "format=glue", f"output={tmp_path}/glue")
    assert (tmp_path / "glue" / "SST-2.tsv").read_text() == "index\tprediction\n0\t0\n1\t1\n2\t1\n"
    assert [(data.hub_name, data.hub_config) for data in asked_for] == [("nyu-mll/glue", "sst2")]
    with pytest.raises(SettingsError, match=r"^data.test must be a split of nyu-mll/glue/sst2 \(test\), got 'dev'"):
        asked(folder, f"dir={theirs}", "data.test=dev")
    monkeypatch.setattr(readers, "hub_builder", lambda data: None)
    with pytest.raises(SettingsError, match=r"^data.hub_name must be a data set that the hub or its cache can give"):
        asked(folder, f"dir={theirs}", "data.test=test")
    (theirs / "config.json").write_text(json.dumps(config | {"distilbench": ["of another program"]}))
    with pytest.raises(SettingsError, match=r"^data.test must be a file, or a split with data.hub_name=..., got 'tes"):
        asked(folder, f"dir={theirs}", "data.test=test")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.test=in.csv"], r"^what predicts must be one of run=ID, dir=PATH and sweep=NAME, got 'none'"),
        (["data.test=in.csv", "run=0", "sweep=first"], r"got 'run and sweep'; name one model"),
        (["run=0"], r"^data.test must be given, got nothing"),
        (["dir=MODEL", "data.test=none.csv"], r"^data.test=none.csv can't be read: No such file"),
        (["dir=MODEL", "data.test=bad.csv"], r"column 'text' is not there, columns are 'a', 'b'; set data.text_c"),
        (["dir=MODEL", "data.test=short.csv"], r"short.csv line 3 must have 2 fields like the header, got 1;"),
        (["dir=MODEL", "data.test=number.jsonl"], r"number.jsonl line 1 must be text, got 3; write it in quotes"),
        (["dir=MODEL", "data.test=latin.csv"], r"latin.csv line 2 is not UTF-8 \(byte 0xe9\)"),
        (["dir=MODEL", "data.test=empty.csv"], r"^data.test must hold a text, got none in"),
        (["dir=MODEL", "data.test=test"], r"^data.test must be a file, or a split with data.hub_name=..., got 'test'"),
        (["dir=MODEL", "data.test=in.csv", "output=out.txt"], r"^output must be a file that ends in .csv.* 'out.txt'"),
        (["dir=MODEL", "data.test=in.csv", "output=SST.tsv", "format=glue"], r"^output must be named after GLUE"),
        (["dir=MODEL", "data.test=in.csv", "best=accuracy"], r"^best must be answer without sweep=NAME"),
        (["dir=MODEL", "data.test=in.csv", "output=./in.csv"], r"^output must be another file than data.test, which"),
        (["dir=MODEL", "data.test=SST-2.tsv", "output=SST-2.tsv", "format=glue"], r"^output must be another file than"),
        (["dir=MODEL", "data.test=in.csv", "output=folder.csv"], r"^output must be a file, not a folder, got"),
        (["dir=MODEL", "data.test=in.csv", "output=in.csv/o.csv"], r"^output must be a file that can be written, got"),
        (["dir=MODEL", "data.test=in.csv", "data.pair_column=text"], r"^data.pair_column must be another column than"),
        (["dir=MODEL", "data.test=in.csv", "device=mps"], r"^device must be one of auto, cpu.* use device=auto$"),
        (["run=0", "data.test=in.csv"], r"^run must be a trial's, with config.yaml, got '0': .*not found; check its"),
        (["dir=.", "data.test=in.csv"], r"^dir must be a model with config.json"),
        (["sweep=nowhere", "data.test=in.csv"], r"^sweep must be one of first"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_told_in_one_line_and_leaves_nothing(
    folder, tmp_path, monkeypatch, overrides, line
):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "short.csv").write_text("text,b\n1,2\n1\n")
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe9\n")
    (tmp_path / "empty.csv").write_text("text\n")
    for name in ("in.csv", "SST-2.tsv"):
        (tmp_path / name).write_text("text\naaa\n")
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SettingsError, match=line) as refused:
        asked(folder, *[override.replace("MODEL", f"{folder}/better/model") for override in overrides])
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.e2e
def test_the_command_line_predicts_and_refuses_with_its_exit_status(folder):
    workspace = Workspace(folder)
    (folder / "in.csv").write_text('text\naaa xx\n""\nbbb xx\n')
    done = workspace.run("dir=better/model", "data.test=in.csv", "output=made/out.csv", program="distilbench.predict")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^3 texts in [\d.]+ s: ", done.stdout)
    assert f"predictions  {folder}/made/out.csv" in done.stdout
    assert len((folder / "made" / "out.csv").read_text().splitlines()) == 4
    refused = workspace.run("dir=made", "data.test=in.csv", program="distilbench.predict")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        line for line in refused.stderr.splitlines() if "dir must be a model" in line
    ]
    (folder / "in.csv").write_text("text\n" + "aaa xx\n" * 50_000)
    stopped = workspace.start("dir=better/model", "data.test=in.csv", "output=cut/o.csv", program="distilbench.predict")
    while not list(folder.glob("cut/.*")) and stopped.poll() is None:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 128 + signal.SIGTERM
    assert not list(folder.glob("cut/.*")), "the unfinished file is removed"


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        ("a fine film", r"^texts must be a list of texts, got 'a fine film'"),
        (["aaa", 3], r"^text 1 must be a text, got \(3,\)"),
        ([("aaa", "bbb")], r"^text 0 must be a text, got \('aaa', 'bbb'\)"),
        ([{"text": "aaa"}], r"^text 0 must be a text, got \({'text': 'aaa'},\)"),
        (["half \udcff"], r"^text 0 must be a text, got \('half \\udcff',\)"),
        (pandas.DataFrame({"text": ["aaa"]}), r"^texts must be a list of texts, got 'DataFrame'"),
        (None, r"^texts must be a list of texts, got 'NoneType'"),
    ],
)
def test_python_is_told_what_is_no_text_of_the_model(folder, texts, line):
    with pytest.raises(SettingsError, match=line):
        distilbench.predict_texts(texts, f"dir={folder}/better/model")


def test_what_pandas_holds_as_missing_is_a_blank(folder):
    answers = distilbench.predict_texts(pandas.Series(["aaa xx", None, np.nan, ""]), f"dir={folder}/better/model")
    assert list(answers["prediction"]) == ["negative", None, None, None]


def test_a_trial_without_a_model_is_told_with_the_remedy(folder, tmp_path):
    (tmp_path / "in.csv").write_text("text\naaa\n")
    with pytest.raises(
        SettingsError,
        match=r"^run must have a saved model, got .*; train it again with .*, or name its",
    ):
        asked(folder, f"run={run_id(folder, 'bare')}", f"data.test={tmp_path}/in.csv")


def test_a_model_of_any_origin_is_asked_by_its_own_configuration(folder, tmp_path):
    """Neither its columns nor its length were kept, its head has three labels and its tokenizer token types."""
    from transformers import BertConfig, BertForSequenceClassification

    from distilbench.models.build import load_tokenizer
    from distilbench.models.resolve import resolve_model
    from distilbench.settings import ModelSettings

    resolved = resolve_model(ModelSettings("random", "bert", layers=1))
    config = BertConfig(**{**resolved.config, "id2label": {1: "no", 2: "maybe", 3: "yes"}})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
    load_tokenizer(resolved).save_pretrained(tmp_path / "theirs")
    (tmp_path / "in.jsonl").write_text('{"text": "aaa", "other": "b"}\n{"text": "a", "other": ""}\n')
    counts = asked(folder, f"dir={tmp_path}/theirs", f"data.test={tmp_path}/in.jsonl", "data.pair_column=other",
                   f"output={tmp_path}/out.jsonl")  # fmt: skip
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["prediction"] in ("no", "maybe", "yes")
    assert sum(first[f"probability_{name}"] for name in ("no", "maybe", "yes")) == pytest.approx(1, abs=1e-5)
    assert (second["prediction"], second["probability_yes"], counts[None]) == (None, None, 1)
    encoder = BertForSequenceClassification(config).bert
    encoder.save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        SettingsError, match=r"^dir must be a model with a trained classification head, got .*missing are 2 weights"
    ):
        asked(folder, f"dir={tmp_path}/theirs", f"data.test={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl")
    assert re.search("maybe", (tmp_path / "out.jsonl").read_text())


def test_a_model_of_pairs_is_asked_for_pairs_as_it_was_trained(folder, tmp_path):
    draw = [("aaa xx", "bbb"), ("aaa", "aaa yz"), ("bbb yz " * 9, "aaa"), ("bbb", "bbb xx")] * 6
    frame = pandas.DataFrame({"a": [a for a, _ in draw], "b": [b for _, b in draw], "same": [0, 1, 0, 1] * 6})
    frame["a"] += frame.index.map(str)  # no text stands there twice
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    with initialize_config_dir(str(ROOT / "conf")):
        settings = settings_from(compose("config", [
            "model=tiny", "model.checkpoint=bert", "data=files", f"data.train={tmp_path}/pairs.csv", "tracking=none",
            f"data.validation={tmp_path}/pairs.csv", "data.text_column=a", "data.pair_column=b",
            "data.label_column=same", "train.epochs=1", "train.max_length=32", f"output.dir={tmp_path}/trial",
        ]))  # fmt: skip
    (outcome,) = run_batch([Trial(Job(settings, settings, str), prepare(settings), None)])
    asked(folder, f"dir={tmp_path}/trial/model", f"data.test={tmp_path}/pairs.csv", f"output={tmp_path}/out.parquet")
    out = pandas.read_parquet(tmp_path / "out.parquet")
    assert list(out.columns) == ["index", "a", "b", "prediction", "probability_0", "probability_1"]
    logits = outcome.predictions.logits
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[["probability_0", "probability_1"]], odds, atol=2e-6)
