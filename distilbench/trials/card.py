"""The model card beside a trial's model: what it was made of, what it reached, and no claim beyond the trial's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.cli import command, override
from distilbench.identity import ENGINE, METRIC, SEED, SOURCES, TREATMENT, SourceUsed, select
from distilbench.report.formats import duration, markdown, percent
from distilbench.report.rows import row_from
from distilbench.report.trial import sentence
from distilbench.results import MEASURES, MODEL
from distilbench.trials.prepared import prepared_trial

if TYPE_CHECKING:
    from distilbench.trials.run import Trial


ON_DISK = ("files", "local")
"""Sources that are named by a path of the machine that trained, which is nothing to publish."""


def write_card(trial: Trial) -> None:
    """Write ``README.md`` beside the model, as ``huggingface_hub`` reads it; nothing where the trial left no model."""
    directory = Path(trial.settings.output.dir) / MODEL
    if trial.result.report is None or trial.result.error or not (directory / "config.json").is_file():
        return
    from huggingface_hub import ModelCard

    header = f"---\n{_metadata(trial)}\n---\n\n"
    ModelCard(header + "\n".join(_lines(trial)), ignore_metadata_errors=True).save(directory / "README.md")


def _metadata(trial: Trial) -> str:
    """Return what the hub lists a model by, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    report = trial.result.report
    assert report is not None  # write_card asks
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


def _lines(trial: Trial) -> Iterator[str]:
    prepared, result = trial.prepared, trial.result
    model, data = prepared.model.used, prepared.text.used
    missing = " and ".join(markdown(used.fallback_for) for used in (model, data) if used.fallback_for)
    if missing:
        yield f"**FALLBACK: {missing} could not be reached; this model comes from stand-ins.**\n"
    labels = ", ".join(markdown(name) for name in prepared.splits.label_names)
    length = trial.settings.train.max_length
    yield f"# {markdown(trial.name)}\n"
    yield f"Gives a text one of the labels {labels}. Texts are cut at {length} tokens.\n"
    yield "## Results\n"
    yield from _results(trial)
    yield "\n## What it was made of\n"
    yield f"- weights: {_source(model)}"
    yield f"- text: {_source(data)}; {len(prepared.splits.train):,} examples trained on"
    yield f"- protocol `{prepared.protocol.id}`; run `{trial.run_id or 'not tracked'}`"
    yield f"- {markdown(prepared.measured_on)}; {duration(result.train_seconds)} of training\n"
    yield "## The command\n\nEvery value is spelled out, so that it holds whatever the defaults become.\n"
    yield f"```bash\n{_command(trial)}\n```\n"
    yield "## Asking it\n"
    yield "```bash\npython -m distilbench.predict dir=path/to/model data.test=texts.csv output=predictions.csv\n```"


def _results(trial: Trial) -> Iterator[str]:
    """Return the trial's own figures, with their interval, and what its comparison claims."""
    report, comparison = trial.result.report, trial.comparison
    assert report is not None
    examples = len(trial.prepared.splits.report)
    row = replace(row_from([trial.stored]), examples=examples)
    half = 100 * row.accuracy_half_width
    yield f"One trial, one seed ({trial.settings.seed}), on {examples:,} examples of `{report.split}`"
    yield f"(the epoch was picked on {trial.prepared.protocol.selection_split}).\n"
    yield "| measure | value |\n| --- | ---: |"
    yield f"| accuracy | {percent(report.accuracy)} ± {half:.2f} (95 %, over examples) |"
    yield from (f"| {name} | {report.metric(name):.4f} |" for name in MEASURES if name != "accuracy")
    yield f"\n{markdown(sentence(comparison)) if comparison else 'It was compared with no baseline.'}"


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
