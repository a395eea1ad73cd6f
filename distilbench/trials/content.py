"""What a trial's run contains before its first step: name, tags, parameters, data sets and configuration."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from distilbench.identity import short_hash, treatment_of
from distilbench.results import Status
from distilbench.tracking.redaction import redact, redact_values
from distilbench.tracking.search import CHOICES_TAG, TREATMENT_TAG
from distilbench.tracking.start import DIRECTORY, LONGEST_NAME, LONGEST_TAG, RunContent, params_of
from distilbench.trials.prepared import Job, Prepared, SweepContext, prepared_trial, version_of

LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "hydra-core", "mlflow", "distilbench")


def content_of(job: Job, prepared: Prepared, run_id: str | None, alone: bool) -> RunContent:
    """Return what the run of a trial contains, all redacted; ``run_id`` is an interrupted run to continue.

    A trial that is ``alone`` has the device to itself, so that its training time is valid.
    """
    context, splits = job.context or SweepContext(job.name), prepared.splits
    parts = {"training": splits.train, "selection": splits.selection, "validation": splits.report}
    if splits.selection is splits.report:
        del parts["selection"]
    examples = {part: len(split) for part, split in parts.items()}
    settings = prepared_trial(job.settings, prepared)
    return RunContent(
        name=redact(context.name),
        tags=redact_values({**_tags_of(job, prepared, examples, alone), **context.tags}, LONGEST_TAG),
        params=params_of(settings),
        datasets={part: _dataset(prepared, part, count) for part, count in examples.items()},
        config_yaml=redact(OmegaConf.to_yaml(OmegaConf.create(asdict(job.settings)))),
        directory=settings.output.dir,
        label_names=splits.label_names,
        run_id=run_id,
    )


def _tags_of(job: Job, prepared: Prepared, examples: dict[str, int], alone: bool) -> dict[str, str]:
    protocol, treatment = prepared.protocol, treatment_of(job.settings, prepared.precision)
    versions = {library: version_of(library) for library in LIBRARIES}
    measured_on = prepared.device, prepared.engine.name, prepared.precision
    measured_with = (f"{library} {versions[library]}" for library in ("torch", "transformers"))
    tags = {
        "distilbench.status": Status.RUNNING.value,
        DIRECTORY: str(Path(job.settings.output.dir).absolute()),
        "distilbench.protocol": protocol.id,
        "distilbench.treatment": short_hash(treatment),
        CHOICES_TAG: json.dumps(dict(job.choices)),
        TREATMENT_TAG: json.dumps(treatment, sort_keys=True),
        "distilbench.seed": str(job.settings.seed),
        "distilbench.metric": protocol.metric,
        "distilbench.selection_split": protocol.selection_split,
        "distilbench.report_split": protocol.report_split,
        "distilbench.train_examples": str(examples["training"]),
        "distilbench.labels": json.dumps(prepared.splits.label_names),
        "distilbench.device": prepared.device,
        "distilbench.precision": prepared.precision,
        "distilbench.measured_on": "; ".join([*measured_on, *measured_with]),
        "distilbench.alone": json.dumps(alone),
        "mlflow.note.content": _note(prepared, examples),
    }
    for role, used in (("model", protocol.model), ("data", protocol.data)):
        tags |= {
            f"distilbench.{role}": used.describe(),
            f"distilbench.{role}.source": used.kind,
            f"distilbench.{role}.revision": used.revision or "",
            f"distilbench.{role}.fingerprint": used.fingerprint,
            f"distilbench.{role}.is_fallback": json.dumps(used.fallback_for is not None),
        }
    return tags | {f"distilbench.version.{library}": version for library, version in versions.items()}


def _note(prepared: Prepared, examples: dict[str, int]) -> str:
    """Return the run's description in Markdown, which MLflow's page of a run shows first."""
    sizes = ", ".join(f"{count:,} {part}" for part, count in examples.items())
    return (
        f"**Model** {prepared.protocol.model.describe()}  \n"
        f"**Data** {prepared.protocol.data.describe()} ({sizes} examples)  \n"
        f"**Device** {prepared.device}, {prepared.precision}  \n"
        f"**Protocol** `{prepared.protocol.id}`: only runs of the same protocol are comparable"
    )


def _dataset(prepared: Prepared, part: str, examples: int) -> dict[str, str]:
    """Return MLflow's record of a split; the digest is that of the split, not of the whole text."""
    source = prepared.protocol.data
    kind, key = ("hugging_face", "path") if source.kind == "hub" else ("local", "uri")
    origin = {key: source.name, "revision": source.revision, "fingerprint": source.fingerprint}
    return {
        "name": redact(source.name)[:LONGEST_NAME],
        "digest": short_hash((source.fingerprint, part, examples)),
        "source_type": kind,
        "source": redact(json.dumps(origin)),
        "profile": json.dumps({"num_rows": examples}),
    }
