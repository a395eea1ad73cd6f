"""The model card beside a trial's model: what it was made of, what it reached, and no claim beyond the trial's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.cli import command, override
from distilbench.identity import ENGINE, METRIC, SEED, SOURCES, TREATMENT, SourceUsed, select
from distilbench.report.formats import duration, markdown, percent
from distilbench.report.rows import row_from
from distilbench.report.trial import sentence
from distilbench.results import MEASURES, MODEL, Evaluation
from distilbench.trials.prepared import prepared_trial

if TYPE_CHECKING:
    from distilbench.trials.run import Trial


ON_DISK = ("files", "local")
"""Sources that are named by a path of the machine that trained, which is nothing to publish."""


def write_card(trial: Trial) -> None:
    """Write ``README.md`` beside the model, as ``huggingface_hub`` reads it; nothing where the trial left no model."""
    directory, report, prepared = trial.directory / MODEL, trial.result.report, trial.prepared
    if report is None or trial.result.error or not (directory / "config.json").is_file():
        return
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["markdown"] = markdown
    used, examples = (prepared.model.used, prepared.text.used), len(prepared.splits.report)
    text = environment.get_template("card.md").render(
        metadata=_metadata(trial, report),
        missing=" and ".join(markdown(one.fallback_for) for one in used if one.fallback_for),
        trial=trial,
        labels=", ".join(map(markdown, prepared.splits.label_names)),
        examples=examples,
        report=report,
        accuracy=percent(report.accuracy),
        half=100 * replace(row_from([trial.stored]), examples=examples).accuracy_half_width,
        measures=MEASURES,
        comparison=sentence(trial.comparison) if trial.comparison else "It was compared with no baseline.",
        weights=_source(used[0]),
        text=_source(used[1]),
        seconds=duration(trial.result.train_seconds),
        command=_command(trial),
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def _metadata(trial: Trial, report: Evaluation) -> str:
    """Return what the hub lists a model by, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    model, data = trial.prepared.model.used, trial.prepared.text.used
    results = [
        EvalResult(task_type="text-classification", dataset_type=_name(data), dataset_name=_name(data),
                   dataset_split=report.split, metric_type=name, metric_value=round(report.metric(name), 4))
        for name in ("accuracy", "f1")
    ]  # fmt: skip
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["distilbench"],
        base_model=model.name if model.kind == "hub" else None,
        datasets=[data.name] if data.kind == "hub" else None,
        metrics=["accuracy", "f1"],
        model_name=trial.name,
        eval_results=results,
    )
    return str(card.to_yaml())


def _source(used: SourceUsed) -> str:
    return f"{markdown(replace(used, name=_name(used)).describe())}, sha256 `{used.fingerprint}`"


def _name(used: SourceUsed) -> str:
    """Return what others may know a source by: of files, their names without the author's folders."""
    return " + ".join(Path(path).name for path in used.name.split(" + ")) if used.kind in ON_DISK else used.name


def _command(trial: Trial) -> str:
    """Return the line that trains the same from what was really used, stand-ins by their own names."""
    settings = prepared_trial(trial.settings, trial.prepared)
    if trial.prepared.text.used.fallback_for and settings.data.fallback:
        settings = replace(settings, data=settings.data.fallback)
    values = select(settings, (*SOURCES, *METRIC, *TREATMENT, *SEED, *ENGINE))
    values |= {"model.fallback": None, "data.fallback": None}
    for key in ("model.checkpoint", "data.train", "data.validation"):
        if values[key] and values[f"{key.partition('.')[0]}.source"] in ON_DISK:
            values[key] = Path(str(values[key])).name
    return command("train", [override(key, value) for key, value in values.items()])
