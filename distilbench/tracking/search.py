"""Which runs are meant, how MLflow is asked for them, and what a report needs of each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distilbench.results import Status, StoredTrial
from distilbench.settings import SettingsError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000

MARK = "distilbench.treatment_settings"
"""The tag that makes a run a trial."""

SWEEP = "distilbench.sweep"
"""The tag that a sweep's own run and all of its trials carry: its name."""

TRIAL = "distilbench.trial"
"""The tag that says which trial of its sweep a run is."""

CONFIRMS = "distilbench.confirms"
"""Tag of a sweep's run that trains another sweep's best again: that sweep's name."""

MARGIN = "distilbench.margin"
"""Tag of a sweep's run: the margin in points that its report holds settings to."""

_TEXTS = ("measured_on", "model", "data", "metric", "selection_split", "report_split")
_FIGURES = ("accuracy", "loss", "brier", "ece", "train_seconds", "train_cpu_seconds", "train_flops",
            "solo_seconds_estimate")  # fmt: skip
"""Tags and metrics that a :class:`StoredTrial` has under the same name."""


@dataclass(frozen=True)
class SweepRun:
    """A run that holds the trials of a sweep, started with a ``margin`` in points.

    ``confirms`` is the sweep whose best settings it trains again; None for a search.
    """

    run_id: str
    name: str
    confirms: str | None
    margin: float | None


def search_runs(
    client: MlflowClient, experiment_id: str, tags: Mapping[str, str], run_ids: Sequence[str] = ()
) -> list[Run]:
    """Return the runs of a server that are not deleted, oldest first, by its own search, page by page.

    ``tags`` are exact values, all of which hold. Values with a quote of either kind can't be asked for.
    """
    conditions = [f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items()]
    if run_ids:
        conditions.append(f"attributes.run_id IN ({', '.join(map(_quoted, run_ids))})")
    found: list[Run] = []
    token = None
    while token != "":
        asked = [experiment_id], " and ".join(conditions)
        page = client.search_runs(*asked, max_results=PAGE, order_by=["start_time ASC"], page_token=token)
        found += page
        token = page.token or ""
    return found


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def trial_of(
    run_id: str, name: str, tags: Mapping[str, str], metrics: Mapping[str, float], **others: Any
) -> StoredTrial:
    """Return a trial as its run tells of it, NaN where a figure is missing; ``others`` are fields that no run has.

    Raises :class:`SettingsError` for a run of another program, or of a version that wrote other tags.
    """
    if MARK not in tags:
        raise SettingsError(f"run must be a distilbench trial, got {run_id!r}, which is not; name another one")
    try:
        same: dict[str, Any] = {name: tags[f"distilbench.{name}"] for name in _TEXTS}
        same |= {name: metrics.get(name, math.nan) for name in _FIGURES}
        return StoredTrial(
            run_id=run_id,
            name=name,
            protocol_id=tags["distilbench.protocol"],
            treatment=dict(json.loads(tags[MARK])),
            seed=int(tags["distilbench.seed"]),
            status=Status(tags["distilbench.status"]),
            trainable_parameters=int(metrics.get("trainable_parameters", 0)),
            alone=tags["distilbench.alone"] == "true",
            role=tags.get("distilbench.role", ""),
            score=metrics.get(f"selection_{same['metric']}", metrics.get(same["metric"], math.nan)),
            error=tags.get("distilbench.error", ""),
            peak_memory_bytes=metrics.get("peak_memory_mb", math.nan) * 2**20,
            sweep=tags.get(SWEEP, ""),
            number=tags.get(TRIAL, ""),
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
