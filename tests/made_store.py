"""A store with fabricated trials, for tests of reading, comparing and reporting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure

from distilbench.identity import ProtocolIdentity, SourceUsed
from distilbench.results import Evaluation, Predictions, Status, TrialResult
from distilbench.settings import TrackingSettings, register_schema, settings_from
from distilbench.tracking.connect import open_store
from distilbench.tracking.search import PARENT_TAG
from distilbench.tracking.start import RunContent
from distilbench.tracking.store import MlflowStore
from distilbench.tracking.uri import sqlite_url
from distilbench.trials.content import content_of
from distilbench.trials.prepared import Job, SweepContext
from tests.commands import lay_tables
from tests.conftest import ROOT, TINY

LABELS = np.arange(200) % 2
KEPT = Evaluation("validation", 20, 2.0, loss=0.4, accuracy=0.75, f1=0.8, mcc=0.5)
DONE = TrialResult(
    Status.FINISHED, selection=KEPT, report=KEPT, history=(KEPT,), steps=20, train_seconds=12.5, trainable_parameters=7
)


def make_store(folder: Path) -> MlflowStore:
    """Create a SQLite store in ``folder``, with the default experiment."""
    lay_tables(folder / "mlflow.db")
    store = open_store(TrackingSettings("mlflow", sqlite_url(folder / "mlflow.db"), "distilbench", 0))
    assert isinstance(store, MlflowStore)
    return store


def protocol_of(text: str = "text", **changes) -> ProtocolIdentity:
    """Return the protocol of a tiny model on a text."""
    sources = SourceUsed("random", "tiny", "feed"), SourceUsed("synthetic", text, text)
    return replace(ProtocolIdentity(*sources, "accuracy", "validation", "validation"), **changes)


def start_of(*overrides: str, text: str = "text", name: str = "trial", tags: Mapping[str, str] = {},
             parent_run_id: str | None = None, run_id: str | None = None, alone: bool = True,
             **changes) -> RunContent:  # fmt: skip
    """Return what the run of a tiny trial contains; another ``text`` gives another protocol.

    ``changes`` are of what it shares with other trials: ``protocol``, ``device``, ``precision``.
    """
    register_schema()
    if GlobalHydra.instance().is_initialized():
        config = compose("config", [*TINY, "output.dir=.", *overrides])
    else:
        with initialize_config_dir(str(ROOT / "conf")):
            config = compose("config", [*TINY, "output.dir=.", *overrides])
    settings = settings_from(config)
    report = range(64)
    splits = SimpleNamespace(train=range(256), selection=report, report=report, label_names=("negative", "positive"))
    shared = {"protocol": protocol_of(text), "device": "cpu", "precision": "fp32", "splits": splits,
              "engine": settings.engine, "model": SimpleNamespace(settings=settings.model)}  # fmt: skip
    tags = {**({PARENT_TAG: parent_run_id} if parent_run_id else {}), **tags}
    job = Job(settings, settings, str, SweepContext(name, tags))
    return content_of(job, SimpleNamespace(**shared | changes), run_id, alone)


def add_trial(
    store: MlflowStore, *overrides: str, wrong=20, seconds: float = 60.0, predictions=True, slices=None, **changes
):
    """Store a finished trial that is wrong on the first ``wrong`` of 200 examples; returns its run id."""
    correct = np.arange(len(LABELS)) >= wrong
    logits = np.eye(2)[np.where(correct, LABELS, 1 - LABELS)]
    end = Evaluation("validation", 20, 2.0, loss=0.4, accuracy=float(correct.mean()), f1=0.8, mcc=0.5)
    result = TrialResult(Status.FINISHED, selection=end, report=end, history=(end,), steps=20, train_seconds=seconds)
    run = store.begin(start_of(*overrides, **changes))
    run.on_evaluation(end)
    with blank_figures():
        run.finish(result, Predictions(LABELS, logits, slices) if predictions else None)
    return run.run_id


@contextmanager
def blank_figures() -> Iterator[None]:
    """Replace figures by small empty ones, since drawing takes most of a fabricated trial's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("confusion_figure", "curve_figure"):
            patch.setattr(f"distilbench.tracking.run.{name}", lambda *_: Figure(figsize=(1, 1)))
        yield
