"""GLUE's classification tasks by name, from small made files in their exact layout, on a hub that this host serves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from distilbench.data import hub as sources
from distilbench.data.text import load_text
from distilbench.models.build import load_tokenizer
from distilbench.models.resolve import resolve_model
from distilbench.predict import predict
from distilbench.settings import ModelSettings, PredictSettings, SettingsError, settings_from
from tests.conftest import ROOT, compose_settings
from tests.data.made_files import refusal
from tests.loopback_hub import COMMIT, serving_datasets

SPLITS = ("train", "validation", "test")
MNLI = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
TASKS = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), SPLITS),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), SPLITS),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), SPLITS),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), SPLITS),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), SPLITS),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment"), SPLITS),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), MNLI),
    "stsb": (("sentence1", "sentence2"), None, SPLITS),
}
ROWS = {"train": 12, "validation": 6, "test": 4}


def made_glue(folder: Path) -> None:
    """Write nyu-mll/glue as the hub has it: a folder a task, a Parquet file a split, and a card that describes them."""
    import datasets
    import yaml

    configs, infos = [], []
    for task, (texts, names, splits) in TASKS.items():
        label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
        columns = {**dict.fromkeys(texts, datasets.Value("string")), "label": label, "idx": datasets.Value("int32")}
        features = datasets.Features(columns)
        files = []
        for split in splits:
            count = ROWS[split.partition("_")[0]]
            values = {text: [f"{split} {text} {i}" for i in range(count)] for text in texts}
            labels = [-1 if "test" in split else i % len(names) if names else i / 4 for i in range(count)]
            path = folder / "nyu-mll" / "glue" / task / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            made = datasets.Dataset.from_dict({**values, "label": labels, "idx": list(range(count))}, features=features)
            made.to_parquet(str(path))
            files.append({"split": split, "path": f"{task}/{split}-*"})
        configs.append({"config_name": task, "data_files": files})
        infos.append({"config_name": task, "features": features._to_yaml_list()})
    card = yaml.safe_dump({"configs": configs, "dataset_info": infos})
    (folder / "nyu-mll" / "glue" / "README.md").write_text(f"---\n{card}---\n# GLUE\n")


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Keep the libraries on a hub of this host that holds GLUE, and on a cache of their own."""
    import datasets
    import huggingface_hub

    folder = tmp_path_factory.mktemp("hub")
    made_glue(folder)
    with pytest.MonkeyPatch.context() as patch, serving_datasets(folder) as address:
        for library in (huggingface_hub.constants, datasets.config):
            patch.setattr(library, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(datasets.config, "HF_ENDPOINT", address)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(datasets.config, "HF_CACHE_HOME", folder / "home")
        patch.setenv("HF_HUB_OFFLINE", "")
        patch.setenv("HF_ENDPOINT", address)
        sources.hub_reachable.cache_clear()
        yield address
    sources.hub_reachable.cache_clear()


def task(name: str, *overrides: str):
    return compose_settings(f"data={name}", "output.dir=unused", "sweep.name=unused", *overrides)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "stsb"])
def test_a_glue_task_is_read_by_its_name(glue, name, caplog):
    texts, names, _ = TASKS[name]
    with caplog.at_level("INFO"):
        splits = load_text(task(name).data)
    assert not [record for record in caplog.records if record.name.startswith("httpx")], "a line a request"
    assert splits.label_names == names
    assert splits.train.texts[:2] == (f"train {texts[0]} 0", f"train {texts[0]} 1")
    assert splits.train.pairs == (tuple(f"train {texts[1]} {i}" for i in range(12)) if texts[1:] else None)
    assert splits.train.labels.tolist() == [i % len(names) for i in range(12)]
    assert (splits.used.name, splits.used.revision) == (f"nyu-mll/glue/{name}", COMMIT)
    assert len(splits.report) == (12 if name == "mnli" else 6)


def test_both_validation_splits_of_mnli_are_reported_each_as_a_slice(glue):
    report = load_text(task("mnli").data).report
    assert Counter(report.slices) == {"validation_matched": 6, "validation_mismatched": 6}
    assert all(text.startswith(f"{split} ") for text, split in zip(report.texts, report.slices, strict=True))
    alone = load_text(task("mnli", "data.validation=validation_matched").data).report
    assert (len(alone), alone.slices) == (6, None)
    wrong = refusal(task("mnli", "data.validation=validation_matched+dev").data)
    assert wrong.startswith("data.validation must be a split of nyu-mll/glue/mnli (train, validation_matched")


@pytest.mark.parametrize(
    ("name", "metric"), [("cola", "mcc"), ("mrpc", "f1"), ("qqp", "f1"), ("mnli", "accuracy"), ("sst2", "accuracy")]
)
def test_a_task_picks_by_the_metric_that_it_is_known_by_unless_told_otherwise(name, metric):
    assert task(name).train.metric == metric
    assert task(name, "train.metric=loss").train.metric == "loss"


def test_the_labels_that_glue_keeps_back_are_no_class(glue):
    message = refusal(task("rte", "data.validation=test").data)
    assert (
        "data.validation=test of nyu-mll/glue/rte must hold labelled sentences, got 4 without a label and 0 blank"
        in message
    )
    assert "test splits keep their labels back: set data.validation=..." in message


@pytest.mark.parametrize(
    ("name", "split", "written"),
    [("mrpc", "test", "MRPC.tsv"), ("mnli", "test_matched", "MNLI-m.tsv"), ("mnli", "test_mismatched", "MNLI-mm.tsv")],
)
def test_the_test_split_is_predicted_into_the_file_that_the_server_takes(glue, tmp_path, name, split, written):
    from transformers import BertConfig, BertForSequenceClassification

    resolved = resolve_model(ModelSettings("random", "bert", layers=1))
    texts, names, _ = TASKS[name]
    named = BertConfig(**resolved.config | {"id2label": dict(enumerate(names))})
    BertForSequenceClassification(named).save_pretrained(tmp_path / "model")
    load_tokenizer(resolved).save_pretrained(tmp_path / "model")
    overrides = [
        f"dir={tmp_path}/model",
        f"data.test={split}",
        "data.hub_name=nyu-mll/glue",
        f"data.hub_config={name}",
        f"data.text_column={texts[0]}",
        f"data.pair_column={texts[1]}",
        "format=glue",
        f"output={tmp_path}/out",
    ]
    with initialize_config_dir(str(ROOT / "conf")):  # fmt: skip
        predict(settings_from(compose("predict", overrides), PredictSettings))
    header, *rows = (tmp_path / "out" / written).read_text().splitlines()
    labels = names if name == "mnli" else ("0", "1")
    assert (header, [row.split("\t")[0] for row in rows]) == ("index\tprediction", ["0", "1", "2", "3"])
    assert {row.split("\t")[1] for row in rows} <= set(labels)


def test_the_task_of_ratings_is_refused_as_regression(glue):
    message = refusal(task("rte", "data.hub_config=stsb").data)
    assert "a target for regression, which is not offered" in message


def test_without_a_hub_a_task_has_no_stand_in(monkeypatch):
    from tests.data.test_readers import failing

    failing(monkeypatch, False, FileNotFoundError("not cached"))
    with pytest.raises(SettingsError, match=r"data.hub_name=nyu-mll/glue/mrpc must be on a hub that can be reached"):
        load_text(task("mrpc").data)
