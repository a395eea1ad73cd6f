"""Which runs are meant, what a report needs of them, and how a server is asked: page by page, by its own search."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distilbench.results import MEASURES, Status, StoredTrial
from distilbench.settings import SettingsError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


PAGE = 1000

MARK = "distilbench.treatment_settings"
"""The tag that makes a run a trial."""

REQUIRED = (MARK, "distilbench.protocol", "distilbench.seed", "distilbench.status", "distilbench.measured_on")

TAGS = (
    *REQUIRED, "distilbench.alone", "distilbench.model", "distilbench.data", "distilbench.metric",
    "distilbench.selection_split", "distilbench.report_split", "distilbench.role", "distilbench.error",
    "distilbench.sweep", "distilbench.trial", "distilbench.confirms", "distilbench.margin",
    "distilbench.train_examples",
    "distilbench.version.distilbench", "mlflow.parentRunId",
)  # fmt: skip

METRICS = (
    *MEASURES, *(f"selection_{name}" for name in MEASURES), "train_seconds", "train_cpu_seconds",
    "solo_seconds_estimate", "train_flops", "peak_memory_mb", "trainable_parameters",
)  # fmt: skip

_TEXTS = ("measured_on", "model", "data", "metric", "selection_split", "report_split")
_FIGURES = ("accuracy", "loss", "brier", "ece", "train_seconds", "train_cpu_seconds", "train_flops",
            "solo_seconds_estimate")  # fmt: skip
"""Tags and metrics that a :class:`StoredTrial` has under the same name."""


@dataclass(frozen=True)
class RunFilter:
    """Which runs are meant: all conditions hold. ``run_ids`` names them; ``tags`` and ``params`` are exact values.

    ``are_trials`` leaves the other kind away before it is read, where the store can tell; None takes both.
    """

    run_ids: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    are_trials: bool | None = None


@dataclass(frozen=True)
class RawRun:
    """The part of a run that a report needs."""

    run_id: str
    name: str
    started_ms: int
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    artifacts: str = ""
    """Where its files are, as a URI."""

    @property
    def is_trial(self) -> bool:
        """Whether it is a trial, and not a sweep or another program's run."""
        return MARK in self.tags

    @classmethod
    def of(cls, run: Run) -> RawRun:
        """Return the part of a whole run."""
        info = run.info
        started, data = info.start_time or 0, run.data
        return cls(info.run_id, info.run_name or "", started, data.tags, data.metrics, info.artifact_uri)

    def trial(self, url: str) -> StoredTrial:
        """Return the run as a trial, NaN where a figure is missing.

        Raises :class:`SettingsError` for a run of another program, or of a version that wrote other tags.
        """
        if not self.is_trial:
            raise SettingsError(f"run must be a distilbench trial, got {self.run_id!r}, which is not; name another one")
        try:
            return self._trial(url)
        except (KeyError, ValueError) as error:
            version = self.tags.get("distilbench.version.distilbench", "unknown")
            raise SettingsError(
                f"run must be written by a version of distilbench that this one reads, got {self.run_id!r} of version "
                f"{version} ({type(error).__name__}: {error}); train it again, or leave it out with runs=[...]"
            ) from None

    def _trial(self, url: str) -> StoredTrial:
        tags, metrics = self.tags, self.metrics
        same: dict[str, Any] = {name: tags[f"distilbench.{name}"] for name in _TEXTS}
        same |= {name: metrics.get(name, math.nan) for name in _FIGURES}
        return StoredTrial(
            run_id=self.run_id,
            name=self.name,
            protocol_id=tags["distilbench.protocol"],
            treatment=_mapping(tags[MARK]),
            seed=int(tags["distilbench.seed"]),
            status=Status(tags["distilbench.status"]),
            trainable_parameters=int(metrics.get("trainable_parameters", 0)),
            alone=tags["distilbench.alone"] == "true",
            role=tags.get("distilbench.role", ""),
            score=metrics.get(f"selection_{same['metric']}", metrics.get(same["metric"], math.nan)),
            error=tags.get("distilbench.error", ""),
            started_ms=self.started_ms,
            url=url,
            peak_memory_bytes=metrics.get("peak_memory_mb", math.nan) * 2**20,
            number=tags.get("distilbench.trial", ""),
            train_examples=int(tags.get("distilbench.train_examples", 0)),
            **same,
        )


def _mapping(text: str) -> dict[str, object]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{MARK} is no mapping")
    return value


def search_server(client: MlflowClient, experiment_id: str, wanted: RunFilter) -> Iterator[RawRun]:
    """Read runs of a server, a page at a time; values that hold a quote of either kind can't be asked for."""
    if wanted.run_ids:
        asked = [client.get_run(run_id) for run_id in wanted.run_ids]
        yield from (RawRun.of(run) for run in asked if run.info.lifecycle_stage == "active")
        return
    conditions = [
        f"{kind}.`{key}` = {_quoted(value)}"
        for kind, pairs in (("tags", wanted.tags), ("params", wanted.params))
        for key, value in pairs.items()
    ]
    token = None
    while token != "":
        found = client.search_runs([experiment_id], " and ".join(conditions), max_results=PAGE, page_token=token)
        yield from map(RawRun.of, found)
        token = found.token or ""


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"
