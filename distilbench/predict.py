"""The prediction command: writes a saved model's predictions for texts to a file, in the same order.

Exit status: 0 all was predicted, 2 a setting is invalid.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from distilbench.cli import errors_in_one_line, pluralize, raise_on_signal, run_command
from distilbench.composition import default_margin, default_treatment
from distilbench.data.formats import TEXTS
from distilbench.results import MODEL
from distilbench.settings import (
    CONF,
    DataSettings,
    PredictSettings,
    SettingsError,
    register_schema,
    require,
    settings_from,
)

if TYPE_CHECKING:
    from rich.console import Console

    from distilbench.data.readers import Part
    from distilbench.models.classifier import Classifier

register_schema()

GLUE = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI",
        "mnli": "MNLI-m", "mnli_matched": "MNLI-m", "mnli_mismatched": "MNLI-mm",
        "mnli/test_mismatched": "MNLI-mm"}  # fmt: skip
"""GLUE's submission file of each task, by the task's name (or name and split) on the hub."""
GLUE_LABELS = {
    "CoLA": ("unacceptable", "acceptable"),
    "SST-2": ("negative", "positive"),
    "MRPC": ("not_equivalent", "equivalent"),
    "QQP": ("not_duplicate", "duplicate"),
    "WNLI": ("not_entailment", "entailment"),
    **dict.fromkeys(("QNLI", "RTE"), ("entailment", "not_entailment")),
    **dict.fromkeys(("MNLI-m", "MNLI-mm"), ("entailment", "neutral", "contradiction")),
}
"""The labels of each submission file in the order of GLUE's numbers, as the hub's data sets have them."""
GLUE_WITH_LABEL_NAMES = ("MNLI-m", "MNLI-mm", "QNLI", "RTE")
"""Submission files that contain label names; the others contain label numbers."""


@hydra.main(config_path=str(CONF), config_name="predict")
def main(config: DictConfig) -> None:
    """Write the predictions and print how many there are of each label."""
    with errors_in_one_line():
        predict(settings_from(config, PredictSettings))


def predict(settings: PredictSettings) -> Counter[str | None]:
    """Predict every text and write the file; return the number of texts by label (None: blank texts).

    Raises :class:`SettingsError` before anything is written.
    """
    from rich.console import Console

    from distilbench.data.formats import check_output

    console = Console(highlight=False)
    if settings.format == "table":
        check_output(Path(settings.output), settings.data.test)
    classifier = open_model(settings)
    path = _output_path(settings, classifier)
    check_output(path, settings.data.test)
    raise_on_signal()  # so that the unfinished file is removed
    began = time.perf_counter()
    counts = _write(settings, classifier, path, console)
    named = ", ".join(f"{label or 'blank, without a prediction,'} {count:,}" for label, count in counts.most_common())
    seconds = time.perf_counter() - began
    console.print(f"{pluralize(counts.total(), 'text')} in {seconds:.1f} s: {named}", markup=False, soft_wrap=True)
    console.print(f"predictions  {path}", markup=False, soft_wrap=True)
    return counts


def open_model(settings: PredictSettings) -> Classifier:
    """Load the model that the settings name; with ``sweep``, this needs an initialised Hydra."""
    directory = _find_model(settings)
    from distilbench.engines.device import resolve_device
    from distilbench.models.classifier import load_classifier

    return load_classifier(directory, resolve_device(settings.device, "device"))


def rows_of(texts: Iterable[str | Sequence[str]], classifier: Classifier) -> list[tuple[str | None, ...]]:
    """Return one row per text or pair; a missing value (as in pandas) becomes None, a blank.

    Raises :class:`SettingsError` for other values, or if a text and a pair are mixed up.
    """
    from numpy import ndarray
    from pandas import DataFrame, isna

    is_list = isinstance(texts, Iterable) and not isinstance(texts, (str, Mapping, DataFrame))
    require(is_list, "texts", "a list of texts", texts if isinstance(texts, str) else type(texts).__name__)
    given = [tuple(text) if isinstance(text, (list, tuple, ndarray)) else (text,) for text in texts]
    rows = [tuple(None if isna(part) is True else part for part in row) for row in given]
    width = len(classifier.columns) if classifier.trained_on or not rows else len(rows[0])
    for number, row in enumerate(rows):
        is_text = len(row) == width in (1, 2) and all(isinstance(part, str | None) for part in row)
        is_text = is_text and not re.search("[\ud800-\udfff]", "".join(filter(None, row)))  # no half characters
        require(is_text, f"text {number}", "a text" if width == 1 else "a pair of texts", row)
    return rows


def _find_model(settings: PredictSettings) -> Path:
    """Return the directory of the model that the settings name; print which trial of a sweep that is."""
    if settings.dir:
        directory = Path(settings.dir)
        return directory if (directory / "config.json").exists() else next(directory.glob(MODEL), directory)
    from distilbench.tracking.connect import find_store
    from distilbench.tracking.model import model_directory

    store = find_store(settings.tracking)
    if settings.run:
        return model_directory(store, settings.run)
    from distilbench.report.findings import answer, trial_to_use
    from distilbench.report.from_store import find_sweep, report_of_sweep

    assert settings.sweep is not None  # PredictSettings requires one of three
    sweep = find_sweep(store, settings.sweep)
    report = report_of_sweep(store, sweep, default_treatment(), sweep.margin or default_margin())
    trial = report and trial_to_use(report, settings.best)
    if not report or not trial:
        raise SettingsError(f"sweep must have a finished trial, got {settings.sweep!r} with none; run it again")
    print(f"{' '.join(answer(report))} The model is that of {trial.name} (run={trial.run_id}).")
    return model_directory(store, trial.run_id)


def _write(settings: PredictSettings, classifier: Classifier, path: Path, console: Console) -> Counter[str | None]:
    from rich.progress import Progress

    from distilbench.data.formats import open_prediction_file

    columns = _columns(settings, classifier)
    codes = _glue_codes(path.stem, classifier.label_names) if settings.format == "glue" else {}
    counts: Counter[str | None] = Counter()
    parts = _read_parts(settings, classifier, columns)
    first = next(parts, None)  # so that an unreadable file raises before anything is written
    if first is None:
        raise SettingsError(f"data.test must hold a text, got none in {settings.data.test!r}; check the file")
    with (
        open_prediction_file(path) as write,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("predicting", total=1.0)
        for rows, share in chain([first], parts):
            answers = classifier.predict_texts(rows, settings.batch_size)
            answers.index += counts.total()
            counts.update(answers["prediction"])
            if settings.format == "glue":
                answers = answers["prediction"].map(codes).to_frame()
            else:
                for position, column in enumerate(columns.values()):
                    answers.insert(position, column, [row[position] for row in rows])
            write(answers)
            progress.update(bar, completed=share)
    return counts


def _columns(settings: PredictSettings, classifier: Classifier) -> dict[str, str]:
    """Return the columns to read, by the name of the setting for each."""
    given = zip(TEXTS, (settings.data.text_column, settings.data.pair_column), strict=True)
    columns = dict(zip(TEXTS, classifier.columns, strict=False)) | {key: column for key, column in given if column}
    require(len(set(columns.values())) == len(columns), "data.pair_column", "another column than data.text_column",
            columns.get("data.pair_column"))  # fmt: skip
    for setting, column in columns.items():
        taken = column in ("index", "prediction") or column.startswith("probability_")
        require(not taken, setting, "no name of a column of answers", column, "rename it in the file")
    return columns


def _read_parts(settings: PredictSettings, classifier: Classifier, columns: dict[str, str]) -> Iterator[Part]:
    """Return the texts in parts, from a file or from a split on the hub."""
    from distilbench.data.readers import read_parts

    data, own = settings.data, classifier.trained_on
    if Path(data.test).suffix:
        return read_parts(data.test, None, columns)
    name, config = (data.hub_name, data.hub_config) if data.hub_name else (own.get("hub_name"), own.get("hub_config"))
    require(name is not None, "data.test", "a file, or a split with data.hub_name=...", data.test)
    return read_parts(data.test, DataSettings("hub", name, config, data.revision), columns)


def _output_path(settings: PredictSettings, classifier: Classifier) -> Path:
    """Return the file to write; for GLUE, with the file name that its server expects for the task."""
    given = Path(settings.output)
    if settings.format == "table" or given.name in [f"{task}.tsv" for task in GLUE.values()]:
        return given
    data, own = settings.data, classifier.trained_on
    config = data.hub_config or (data.hub_name or own.get("hub_config") or own.get("hub_name") or "").rpartition("/")[2]
    task = GLUE.get(f"{config}/{data.test}") or GLUE.get(config)
    if task is None:
        names = ", ".join(dict.fromkeys(f"{name}.tsv" for name in GLUE.values()))
        raise SettingsError(f"output must be named after GLUE's task ({names}), got {given.name!r}")
    return (given.parent if given.suffix else given) / f"{task}.tsv"


def _glue_codes(task: str, names: Sequence[str]) -> dict[str, str]:
    """Return what GLUE's server expects for each of a model's labels, which may have names or GLUE's numbers."""
    labels, own = GLUE_LABELS[task], [re.sub("[ -]", "_", name.casefold()) for name in names]
    readings = (labels, *([f"{prefix}{i}" for i in range(len(labels))] for prefix in ("", "label_")))
    reading = next((reading for reading in readings if sorted(reading) == sorted(own)), None)
    if reading is None:
        raise SettingsError(
            f"format must be table for a model without {task}'s labels, which are {', '.join(labels)}, got glue and "
            f"{', '.join(names)}; if they are the same, rename them in the model's config.json (id2label, label2id)"
        )
    numbers = {name: reading.index(label) for name, label in zip(names, own, strict=True)}
    return {name: labels[i] if task in GLUE_WITH_LABEL_NAMES else str(i) for name, i in numbers.items()}


if __name__ == "__main__":
    run_command(main)
