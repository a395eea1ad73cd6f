"""What a run says of its trial before the first step: parameters, tags and a note, all redacted."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

from distilbench.identity import ProtocolIdentity, short_hash
from distilbench.results import Owner, Status
from distilbench.settings import CHECKOUT, TrialSettings
from distilbench.tracking.redaction import redact

DIRECTORY = "distilbench.directory"
"""Tag of where a run's record is kept, ``trial.json``, by which others can say how it ended."""

LONGEST_PARAM = 6000

LONGEST_TAG = 8000
"""MLflow's own limits in characters (mlflow.utils.validation)."""


@dataclass(frozen=True)
class RunStart:
    """What is known of a trial before its first step."""

    name: str
    settings: TrialSettings
    """As really used, after every fallback."""
    protocol: ProtocolIdentity
    treatment: Mapping[str, object]
    """From :func:`distilbench.results.treatment_of`."""
    device: str
    precision: str
    measured_on: str
    versions: Mapping[str, str]
    """Library name -> version."""
    config_yaml: str
    """The resolved configuration."""
    label_names: tuple[str, ...]
    datasets: Mapping[str, int] = field(default_factory=dict)
    """Examples of each part of the text, by MLflow's context of an input: training, selection, validation."""
    alone: bool = True
    """Whether the trial has the device to itself, not shared with a batch of others."""
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None
    run_id: str | None = None
    """An interrupted run to continue instead of making a new one."""


def params_of(settings: TrialSettings) -> dict[str, str]:
    """Return settings flat as the command line spells them: ``freeze.layers`` -> ``3``, None -> ``null``.

    A fallback appears by its source alone: what was really used is in the tags.
    """
    return {key: redact(value)[:LONGEST_PARAM] for key, value in _flat("", settings)}


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if not is_dataclass(value):
        yield prefix, value if isinstance(value, str) else json.dumps(value)
        return
    for part in fields(value):
        inner = getattr(value, part.name)
        inner = inner.source if part.name == "fallback" and inner is not None else inner
        yield from _flat(f"{prefix}.{part.name}".lstrip("."), inner)


def tags_of(start: RunStart) -> dict[str, str]:
    """Everything that tells a run from others, redacted and cut at MLflow's limit."""
    tags = {
        "distilbench.status": Status.RUNNING.value,
        DIRECTORY: str(Path(start.settings.output.dir).absolute()),
        "distilbench.protocol": start.protocol.id,
        "distilbench.treatment": short_hash(dict(start.treatment)),
        "distilbench.treatment_settings": json.dumps(dict(start.treatment), sort_keys=True),
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
    tags |= _source_tags("model", start) | _source_tags("data", start) | process_tags() | _git_tags()
    tags |= {f"distilbench.version.{library}": version for library, version in start.versions.items()}
    if start.parent_run_id:
        tags["mlflow.parentRunId"] = start.parent_run_id
    return {name: redact(value)[:LONGEST_TAG] for name, value in {**tags, **start.tags}.items()}


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
    """Return the run's description, Markdown, first thing that MLflow's page of a run shows."""
    sizes = ", ".join(f"{examples:,} {context}" for context, examples in start.datasets.items())
    return (
        f"**Model** {start.protocol.model.describe()}  \n"
        f"**Data** {start.protocol.data.describe()}" + (f" ({sizes} examples)" if sizes else "") + "  \n"
        f"**Device** {start.device}, {start.precision}  \n"
        f"**Protocol** `{start.protocol.id}`: only runs of the same protocol are comparable"
    )


def process_tags() -> dict[str, str]:
    """Who runs this. Host, pid and start time together tell whether the process of a RUNNING run still lives."""
    owner = Owner.of_this_process()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return {
        "distilbench.host": owner.host,
        "distilbench.pid": str(owner.pid),
        "distilbench.process_started": f"{owner.started:.2f}",
        "distilbench.gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "mlflow.user": user,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": sys.argv[0],
    }


def owner_of(tags: Mapping[str, str]) -> Owner | None:
    """Return the process that a run's tags name; None for a run that is not ours, or whose tags were edited."""
    try:
        started = float(tags["distilbench.process_started"])
        return Owner(tags["distilbench.host"], int(tags["distilbench.pid"]), started)
    except (KeyError, ValueError):
        return None


def _git_tags() -> dict[str, str]:
    """Commit and dirty flag of the checkout, under MLflow's own names; nothing without git or outside a checkout."""
    command = ["git", "--no-optional-locks", "-C", str(CHECKOUT), "status", "--porcelain=2", "--branch", "-uno"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    commit = re.search("^# branch.oid ([0-9a-f]+)$", told, re.MULTILINE)
    dirty = re.search("^[^#]", told, re.MULTILINE) is not None
    return {"mlflow.source.git.commit": commit[1], "mlflow.source.git.dirty": json.dumps(dirty)} if commit else {}
