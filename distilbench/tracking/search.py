"""Search MLflow for runs, and convert them to the trials and sweeps that a report needs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from distilbench.results import Status, StoredTrial
from distilbench.settings import SettingsError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000

TREATMENT_TAG = "distilbench.treatment_settings"
"""Tag that marks a run as a trial; it holds the treatment as JSON."""

SWEEP_TAG = "distilbench.sweep"
"""Tag of a sweep's own run and of all its trials: the sweep's name."""

TRIAL_TAG = "distilbench.trial"
"""Tag of a trial's run: which trial of its sweep it is."""

CHOICES_TAG = "distilbench.choices"
"""Tag of a trial's run: the choices of groups that it was typed with, as JSON; earlier versions did not write it."""

PARENT_TAG = "mlflow.parentRunId"
"""MLflow's tag with the id of the run that a run is nested below."""

CONFIRMS_TAG = "distilbench.confirms"
"""Tag of a sweep's run that confirms another sweep's best settings: that sweep's name."""

MARGIN_TAG = "distilbench.margin"
"""Tag of a sweep's run: the margin of its report, in points."""

_TEXTS = ("measured_on", "model", "data", "metric", "selection_split", "report_split")
_FIGURES = ("accuracy", "loss", "brier", "ece", "train_seconds", "train_cpu_seconds", "train_flops",
            "solo_seconds_estimate")  # fmt: skip
"""Tags and metrics that are fields of :class:`StoredTrial` under the same name."""


@dataclass(frozen=True)
class SweepRun:
    """The parent run of a sweep's trials; ``margin`` is in points.

    ``confirms`` is the sweep whose best settings it trains again; None if it is no confirmation.
    """

    run_id: str
    name: str
    confirms: str | None
    margin: float | None


def search_runs(
    client: MlflowClient, experiment_id: str, tags: Mapping[str, str], run_ids: Sequence[str] = ()
) -> list[Run]:
    """Return a server's runs that are not deleted, oldest first, through MLflow's paginated search.

    ``tags`` are exact values, all of which must match. A value must not contain both kinds of quotes.
    """
    from mlflow.utils import get_results_from_paginated_fn

    conditions = [f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items()]
    if run_ids:
        conditions.append(f"attributes.run_id IN ({', '.join(map(_quoted, run_ids))})")
    search = partial(client.search_runs, [experiment_id], " and ".join(conditions), order_by=["start_time ASC"])
    found: list[Run] = get_results_from_paginated_fn(lambda n, token: search(max_results=n, page_token=token), PAGE)
    return found


def trained_beside_others(runs: Sequence[Run]) -> set[str]:
    """Return the ids of runs whose trials shared their device with a trial of another process for a time.

    Interrupted runs don't count: if their process was killed, they ended only when that was found out.
    """
    others = ("", Status.RUNNING, Status.INTERRUPTED)
    ended = [run for run in runs if run.info.end_time and _tags_of(run, "status")[0] not in others]
    last: dict[tuple[str, ...], Run] = {}
    found: set[str] = set()
    for run in sorted(ended, key=lambda run: run.info.start_time):
        device = _tags_of(run, "host", "gpus")
        other = last.get(device, run)
        if run.info.start_time < other.info.end_time and _tags_of(run, "pid") != _tags_of(other, "pid"):
            found |= {run.info.run_id, other.info.run_id}
        last[device] = max(run, other, key=lambda one: one.info.end_time)
    return found


def _tags_of(run: Run, *names: str) -> tuple[str, ...]:
    return tuple(run.data.tags.get(f"distilbench.{name}", "") for name in names)


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def trial_of(
    run_id: str, name: str, tags: Mapping[str, str], metrics: Mapping[str, float], **others: Any
) -> StoredTrial:
    """Convert a run to a trial, with NaN for missing figures; ``others`` are fields that come from elsewhere.

    Raises :class:`SettingsError` for a run of another program, or of a version that wrote other tags.
    """
    if TREATMENT_TAG not in tags:
        raise SettingsError(f"run must be a distilbench trial, got {run_id!r}, which is not; name another one")
    try:
        same: dict[str, Any] = {name: tags[f"distilbench.{name}"] for name in _TEXTS}
        same |= {name: metrics.get(name, math.nan) for name in _FIGURES}
        return StoredTrial(
            run_id=run_id,
            name=name,
            protocol_id=tags["distilbench.protocol"],
            treatment=dict(json.loads(tags[TREATMENT_TAG])),
            seed=int(tags["distilbench.seed"]),
            status=Status(tags["distilbench.status"]),
            trainable_parameters=int(metrics.get("trainable_parameters", 0)),
            alone=tags["distilbench.alone"] == "true",
            role=tags.get("distilbench.role", ""),
            score=metrics.get(f"selection_{same['metric']}", metrics.get(same["metric"], math.nan)),
            error=tags.get("distilbench.error", ""),
            peak_memory_bytes=metrics.get("peak_memory_mb", math.nan) * 2**20,
            sweep=tags.get(SWEEP_TAG, ""),
            number=tags.get(TRIAL_TAG, ""),
            choices=json.loads(tags.get(CHOICES_TAG, "{}")),
            is_compared="difference_points" in metrics,
            train_examples=int(tags.get("distilbench.train_examples", 0)),
            **same,
            **others,
        )
    except (KeyError, ValueError) as error:
        version = tags.get("distilbench.version.distilbench", "unknown")
        raise SettingsError(
            f"run must be written by a version of distilbench that this one reads, got {run_id!r} of version "
            f"{version} ({type(error).__name__}: {error}); train it again, or leave it out with runs=[...]"
        ) from None
