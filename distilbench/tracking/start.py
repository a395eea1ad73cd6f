"""What a run contains before its trial's first step, all redacted, and how it is created, at once or later."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.identity import TABLES, ProtocolIdentity, select, short_hash
from distilbench.results import Owner, Status
from distilbench.settings import CHECKOUT, TrialSettings, require
from distilbench.tracking.redaction import redact, redact_values
from distilbench.tracking.retries import suppress_codes
from distilbench.tracking.search import CHOICES_TAG, TREATMENT_TAG, TRIAL_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

DIRECTORY = "distilbench.directory"
"""Tag with the directory of a run's ``trial.json``, from which other processes can tell how the trial ended."""

Point = tuple[str, float, int, int]
"""A metric as MLflow stores it: name, value, milliseconds since 1970, step."""

LONGEST_PARAM, LONGEST_TAG, LONGEST_NAME = 6000, 8000, 500
"""MLflow's limits (mlflow.utils.validation): characters per parameter, tag and data set name."""


@dataclass(frozen=True)
class RunStart:
    """What is known about a trial before its first step."""

    name: str
    settings: TrialSettings
    """The settings really used, after all fallbacks."""
    protocol: ProtocolIdentity
    treatment: Mapping[str, object]
    """From :func:`distilbench.identity.treatment_of`."""
    device: str
    precision: str
    measured_on: str
    versions: Mapping[str, str]
    """Library name -> version."""
    config_yaml: str
    """The resolved configuration."""
    label_names: tuple[str, ...]
    datasets: Mapping[str, int] = field(default_factory=dict)
    """MLflow's context of an input (training, selection, validation) -> number of examples."""
    alone: bool = True
    """Whether the trial has the device to itself, not shared with a batch of others."""
    choices: Mapping[str, object] = field(default_factory=dict)
    """From :func:`distilbench.composition.typed_choices`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of its sweep, with the id of its parent run."""
    run_id: str | None = None
    """An interrupted run to continue instead of making a new one."""


def params_of(settings: TrialSettings) -> dict[str, str]:
    """Return flat settings, spelled as on the command line: ``freeze.layers`` -> ``3``, None -> ``null``.

    A fallback appears only by its source; what was really used is in the tags.
    """
    values = select(settings, chain.from_iterable(TABLES))
    told = {key: format_param(getattr(value, "source", value)) for key, value in values.items()}
    return redact_values(told, LONGEST_PARAM)


def format_param(value: object) -> str:
    """Return a value as a parameter's text: strings unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def tags_of(start: RunStart) -> dict[str, str]:
    """Return all tags of a trial's run, except those of the process that trains it."""
    tags = {
        "distilbench.status": Status.RUNNING.value,
        DIRECTORY: str(Path(start.settings.output.dir).absolute()),
        "distilbench.protocol": start.protocol.id,
        "distilbench.treatment": short_hash(dict(start.treatment)),
        CHOICES_TAG: json.dumps(dict(start.choices)),
        TREATMENT_TAG: json.dumps(dict(start.treatment), sort_keys=True),
        "distilbench.seed": str(start.settings.seed),
        "distilbench.metric": start.protocol.metric,
        "distilbench.selection_split": start.protocol.selection_split,
        "distilbench.report_split": start.protocol.report_split,
        "distilbench.train_examples": str(start.datasets.get("training", 0)),
        "distilbench.labels": json.dumps(start.label_names),
        "distilbench.device": start.device,
        "distilbench.precision": start.precision,
        "distilbench.measured_on": start.measured_on,
        "distilbench.alone": json.dumps(start.alone),
        "mlflow.note.content": _note(start),
    }
    tags |= _source_tags("model", start) | _source_tags("data", start)
    tags |= {f"distilbench.version.{library}": version for library, version in start.versions.items()}
    return {**tags, **start.tags}


def _source_tags(role: str, start: RunStart) -> dict[str, str]:
    used = getattr(start.protocol, role)
    return {
        f"distilbench.{role}": used.describe(),
        f"distilbench.{role}.source": used.kind,
        f"distilbench.{role}.revision": used.revision or "",
        f"distilbench.{role}.fingerprint": used.fingerprint,
        f"distilbench.{role}.is_fallback": json.dumps(used.fallback_for is not None),
    }


def _note(start: RunStart) -> str:
    """Return the run's description in Markdown, which MLflow's page of a run shows first."""
    sizes = ", ".join(f"{examples:,} {context}" for context, examples in start.datasets.items())
    return (
        f"**Model** {start.protocol.model.describe()}  \n"
        f"**Data** {start.protocol.data.describe()}" + (f" ({sizes} examples)" if sizes else "") + "  \n"
        f"**Device** {start.device}, {start.precision}  \n"
        f"**Protocol** `{start.protocol.id}`: only runs of the same protocol are comparable"
    )


def process_tags() -> dict[str, str]:
    """Return tags of this process: host, pid and start time tell whether the process of a RUNNING run is alive.

    User and source (script, notebook, job) are those that MLflow's own API and its plugins tell.
    """
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import resolve_tags

    owner = Owner.of_this_process()
    tags = {
        "mlflow.source.name": sys.argv[0],  # MLflow tells neither for a container's user without a name
        "mlflow.source.type": "LOCAL",
        **resolve_tags(ignore=[GitRunContext]),  # type: ignore[list-item]  # classes, as its text says
        **environment_tags(),
        "distilbench.host": owner.host,
        "distilbench.pid": str(owner.pid),
        "distilbench.process_started": f"{owner.started:.2f}",
        "distilbench.gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    return redact_values(tags, LONGEST_TAG)


def environment_tags() -> dict[str, object]:
    """Return the tags in ``MLFLOW_TAGS``, the variable of Transformers' MLflow callback.

    Raises :class:`SettingsError` unless it holds a JSON object.
    """
    text = os.environ.get("MLFLOW_TAGS") or "{}"
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    require(isinstance(found, dict), "MLFLOW_TAGS", 'a JSON object, such as {"team": "a"}', text)
    return dict(found)


def owner_of(tags: Mapping[str, str]) -> Owner | None:
    """Return the process that a run's tags name; None for another program's run, or if the tags were edited."""
    try:
        started = float(tags["distilbench.process_started"])
        return Owner(tags["distilbench.host"], int(tags["distilbench.pid"]), started)
    except (KeyError, ValueError):
        return None


def _git_tags() -> dict[str, str]:
    """Return commit and dirty flag of the checkout under MLflow's tag names; empty without git or a checkout."""
    command = ["git", "--no-optional-locks", "-C", str(CHECKOUT), "status", "--porcelain=2", "--branch", "-uno"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    commit = re.search("^# branch.oid ([0-9a-f]+)$", told, re.MULTILINE)
    dirty = re.search("^[^#]", told, re.MULTILINE) is not None
    return {"mlflow.source.git.commit": commit[1], "mlflow.source.git.dirty": json.dumps(dirty)} if commit else {}


@dataclass(frozen=True)
class RunContent:
    """The start of a trial as MLflow gets it, redacted; can be stored as JSON."""

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    datasets: Mapping[str, Mapping[str, str]]
    """Context of a split -> MLflow's record of it."""
    config_yaml: str

    @classmethod
    def of(cls, start: RunStart) -> RunContent:
        """Return the content of the run of a trial that begins."""
        told = {**process_tags(), **_git_tags(), **tags_of(start)}
        tags = redact_values(told, LONGEST_TAG)
        datasets = {context: _dataset(start, context, examples) for context, examples in start.datasets.items()}
        return cls(redact(start.name), tags, params_of(start.settings), datasets, redact(start.config_yaml))


def _dataset(start: RunStart, context: str, examples: int) -> dict[str, str]:
    """Return MLflow's record of a split; the digest is that of the split, not of the whole text."""
    source = start.protocol.data
    kind, key = ("hugging_face", "path") if source.kind == "hub" else ("local", "uri")
    origin = {key: source.name, "revision": source.revision, "fingerprint": source.fingerprint}
    return {
        "name": redact(source.name)[:LONGEST_NAME],
        "digest": short_hash((source.fingerprint, context, examples)),
        "source_type": kind,
        "source": redact(json.dumps(origin)),
        "profile": json.dumps({"num_rows": examples}),
    }


def log_batch(
    client: MlflowClient, run_id: str, metrics: Sequence[Point] = (), tags: Mapping[str, str] | None = None
) -> None:
    """Log metrics and tags, in as few calls as MLflow's limits allow, whatever ``MLFLOW_ENABLE_ASYNC_LOGGING`` says.

    MLflow stores metrics that are sent twice only once.
    """
    from mlflow.entities import Metric, RunTag

    sent = [Metric(*point) for point in metrics], (), [RunTag(*tag) for tag in (tags or {}).items()]
    client.log_batch(run_id, *sent, synchronous=True)


def claim_run(client: MlflowClient, experiment_id: str, content: RunContent, run_id: str | None) -> Run:
    """Create a run, or set that of ``run_id`` to RUNNING again; its tags then name this process.

    A run that was deleted in the meantime is replaced, with a warning.
    """
    before: Run | None = None
    with suppress_codes("RESOURCE_DOES_NOT_EXIST"):
        before = client.get_run(run_id) if run_id else None
    if run_id is None or before is None or before.info.lifecycle_stage != "active":
        if run_id:
            log.warning("run %s is no longer in the store; it continues as a new one", run_id)
        return client.create_run(experiment_id, tags=dict(content.tags), run_name=content.name)
    # another trial continues it
    known, times = before.data.tags, ("distilbench.measured_on", "distilbench.alone")
    is_renumbered = known.get(TRIAL_TAG) != content.tags.get(TRIAL_TAG)
    client.update_run(run_id, status="RUNNING", name=content.name if is_renumbered else None)
    tags = {**content.tags, "distilbench.resumed": "true", "distilbench.error": ""}
    if "distilbench.alone" in tags and any(known.get(name) != tags[name] for name in times):
        tags["distilbench.alone"] = "false"  # part of its time was measured elsewhere, or beside others
    log_batch(client, run_id, tags=tags)
    return client.get_run(run_id)


def fill_run(client: MlflowClient, run: Run, content: RunContent) -> None:
    """Log data sets, configuration, and those parameters that the run lacks (MLflow refuses to change one)."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    run_id = run.info.run_id
    params = [Param(key, value) for key, value in content.params.items() if key not in run.data.params]
    client.log_batch(run_id, params=params, synchronous=True)
    for context, one in content.datasets.items():
        found = [DatasetInput(Dataset(**one), [InputTag("mlflow.data.context", context)])]
        with suppress_codes("BAD_REQUEST"):  # a parallel trial created the same data set, which the next call finds
            client.log_inputs(run_id, datasets=found)
            continue
        client.log_inputs(run_id, datasets=found)
    client.log_text(run_id, content.config_yaml, "config.yaml")
