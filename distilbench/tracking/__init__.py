"""Tracking of trials in MLflow: the only package that imports mlflow, and only once a store is opened.

A store creates one run per trial through ``MlflowClient`` with explicit run ids, not through MLflow's fluent API, so
that several runs can be open at once. Metrics are ``train/...`` per logging step, ``validation/...`` per evaluation
(``selection/...`` if a separate split picks epochs), and without a prefix the final ones: ``accuracy``, ``loss``,
``f1`` and ``mcc`` are the kept epoch's on the report split.
"""

from distilbench.tracking.connect import find_store, open_store
from distilbench.tracking.model import model_directory
from distilbench.tracking.redaction import redact
from distilbench.tracking.run import MlflowRun, ParentRun, final_metrics, write_predictions
from distilbench.tracking.search import CONFIRMS_TAG, MARGIN_TAG, SWEEP_TAG, TRIAL_TAG, SweepRun, trial_of
from distilbench.tracking.start import RunStart, params_of, tags_of
from distilbench.tracking.store import MlflowStore

__all__ = [
    "CONFIRMS_TAG",
    "MARGIN_TAG",
    "SWEEP_TAG",
    "TRIAL_TAG",
    "MlflowRun",
    "MlflowStore",
    "ParentRun",
    "RunStart",
    "SweepRun",
    "final_metrics",
    "find_store",
    "model_directory",
    "open_store",
    "params_of",
    "redact",
    "tags_of",
    "trial_of",
    "write_predictions",
]
