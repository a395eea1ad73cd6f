"""The model card beside a trial's model: its sources, its result, and no claim beyond that one trial."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.cli import format_command, format_override
from distilbench.identity import ENGINE, METRIC, SEED, SOURCES, TREATMENT, SourceUsed, select
from distilbench.report.formats import duration, markdown, percent
from distilbench.report.rows import row_from
from distilbench.report.trial import sentence
from distilbench.results import MEASURES, MODEL
from distilbench.trials.prepared import prepared_trial

if TYPE_CHECKING:
    from distilbench.trials.run import Trial


ON_DISK = ("files", "local")
"""Sources named by a path on the machine that trained, which must not be published."""


def write_card(trial: Trial) -> None:
    """Write ``README.md`` beside the model, as ``huggingface_hub`` reads it; does nothing if there is no model."""
    directory, report, prepared = trial.directory / MODEL, trial.result.report, trial.prepared
    is_saved = trial.settings.output.save_model and (directory / "config.json").is_file()
    if report is None or trial.result.error or not is_saved:
        return
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["markdown"] = markdown
    used, examples = (prepared.model.used, prepared.text.used), len(prepared.splits.report)
    text = environment.get_template("card.md").render(
        model=used[0],
        data=used[1],
        data_name=_name(used[1]),
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


def _source(used: SourceUsed) -> str:
    return f"{markdown(replace(used, name=_name(used)).describe())}, sha256 `{used.fingerprint}`"


def _name(used: SourceUsed) -> str:
    """Return a source's public name: for files, without the author's folders."""
    return " + ".join(Path(path).name for path in used.name.split(" + ")) if used.kind in ON_DISK else used.name


def _command(trial: Trial) -> str:
    """Return the command that trains the same trial from the sources really used, fallbacks by their own names."""
    settings = prepared_trial(trial.settings, trial.prepared)
    if trial.prepared.text.used.fallback_for and settings.data.fallback:
        settings = replace(settings, data=settings.data.fallback)
    values = select(settings, (*SOURCES, *METRIC, *TREATMENT, *SEED, *ENGINE))
    values |= {"model.fallback": None, "data.fallback": None}
    for key in ("model.checkpoint", "data.train", "data.validation"):
        if values[key] and values[f"{key.partition('.')[0]}.source"] in ON_DISK:
            values[key] = Path(str(values[key])).name
    return format_command("train", [format_override(key, value) for key, value in values.items()])
