"""Create, complete or reopen a run, at once or later, from its content before its trial's first step."""

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
from typing import TYPE_CHECKING

from distilbench.identity import TABLES, select
from distilbench.results import Owner
from distilbench.settings import CHECKOUT, TrialSettings, require
from distilbench.tracking.redaction import redact_values
from distilbench.tracking.retries import suppress_codes
from distilbench.tracking.search import TRIAL_TAG

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
class RunContent:
    """What a run contains before its trial's first step, as MLflow gets it, redacted; can be stored as JSON."""

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str] = field(default_factory=dict)
    datasets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """MLflow's context of a split (training, selection, validation) -> its record of it."""
    config_yaml: str = ""
    """The resolved configuration."""
    directory: str = ""
    """The trial's, of its record; not redacted."""
    label_names: Sequence[str] = ()
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


def process_tags() -> dict[str, str]:
    """Return tags of this process: host, pid and start time tell whether the process of a RUNNING run is alive.

    User and source (script, notebook, job) are those that MLflow's own API and its plugins tell.
    """
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import resolve_tags

    owner = Owner.of()
    tags = {
        "mlflow.source.name": sys.argv[0],  # MLflow tells neither for a container's user without a name
        "mlflow.source.type": "LOCAL",
        **resolve_tags(ignore=[GitRunContext]),  # type: ignore[list-item]  # classes, as its text says
        **environment_tags(),
        **_git_tags(),
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
