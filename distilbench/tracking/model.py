"""A run's saved model: find its directory, and log and register it as an MLflow model.

It is logged as a python_function model with a loader module, which needs no pickle. MLflow's transformers flavour
needs none either, but gives neither each label's probability nor an empty answer to an empty text. The directory of
weights (safetensors), tokenizer and card is stored unchanged under ``data/``.
"""

from __future__ import annotations

import logging
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from distilbench.results import MODEL, read_record
from distilbench.settings import SettingsError, root
from distilbench.tracking.retries import suppress_codes

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

    from distilbench.tracking.store import MlflowStore

log = logging.getLogger(__name__)

LOADER = "distilbench.models.classifier"
"""The module whose ``_load_pyfunc`` loads the directory; its package is stored with the model."""

REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas")
"""Packages that this needs, pinned to the versions that trained the model."""

ALIAS = "champion"
"""Alias of a registered version if ``tracking.register`` gives none, as in MLflow's own guides."""


def log_once(client: MlflowClient, run_id: str, directory: Path) -> LoggedModel | None:
    """Log the model in ``directory`` to its run, which may have ended; returns None if the run has one already."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    run = client.get_run(run_id)
    known = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs] if run.outputs else []
    if any(model.status == LoggedModelStatus.READY for model in known):
        return None
    kind = "text-classification"
    logged = client.create_logged_model(run.info.experiment_id, MODEL, run_id, params=run.data.params, model_type=kind)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save(directory, Path(folder) / MODEL, run_id, logged.model_id)
            client.log_model_artifacts(logged.model_id, str(Path(folder) / MODEL))
        final = [one for name in run.data.metrics if "/" not in name for one in client.get_metric_history(run_id, name)]
        own = [Metric(one.key, one.value, one.timestamp, one.step, model_id=logged.model_id) for one in final]
        client.log_batch(run_id, own, synchronous=True)  # as MLflow's log_model does, for its page of models
    except BaseException:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    ready = client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    log.info("model logged as models:/%s", logged.model_id)
    return ready


def _save(directory: Path, path: Path, run_id: str, model_id: str) -> None:
    """Write the model in ``directory`` as an MLflow model to ``path``."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import Model, infer_signature

    from distilbench.models.classifier import load_classifier

    classifier = load_classifier(directory, "cpu")
    example = pandas.DataFrame([["a text"] * len(classifier.columns)], columns=classifier.columns)
    pyfunc.save_model(
        path=str(path),
        loader_module=LOADER,
        data_path=str(directory),
        code_paths=[str(Path(__file__).resolve().parents[1])],
        mlflow_model=Model(run_id=run_id, model_uuid=model_id, model_id=model_id),
        signature=infer_signature(example, classifier.predict(example)),
        input_example=example,
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
    )


def register_model(client: MlflowClient, run_id: str, logged: LoggedModel, register: str) -> None:
    """Register a logged model as the newest version of a registered model, and point the alias to it."""
    name, _, alias = register.partition("@")
    with suppress_codes("RESOURCE_ALREADY_EXISTS"):
        client.create_registered_model(name)
    source = logged.artifact_location  # MLflow would look up models:/ID in its global tracking URI
    made = client.create_model_version(name, source, run_id, model_id=logged.model_id)
    client.set_registered_model_alias(name, alias or ALIAS, made.version)
    log.info("model registered as models:/%s@%s, version %s", name, alias or ALIAS, made.version)


def model_directory(store: MlflowStore, run_id: str) -> Path:
    """Return the directory of a trial's saved model, in a moved checkout too; raises :class:`SettingsError` if none."""
    recorded = Path(yaml.safe_load(store.config(run_id))["output"]["dir"])
    directory = recorded if recorded.is_dir() else root() / "outputs" / recorded.as_posix().rpartition("/outputs/")[2]
    record = read_record(directory)
    if record is not None and record.run_id != run_id:
        raise SettingsError(
            f"run must have its directory to itself, got {run_id!r}, whose {directory} another trial has written to "
            "since; train it again"
        )
    if not (directory / MODEL / "config.json").is_file():
        raise SettingsError(
            f"run must have a saved model, got {run_id!r} with none in {directory / MODEL} (output.save_model=false, "
            "adapter.merge=false, pruned, failed, removed or moved since); train it again with output.save_model=true, "
            "or name its directory with dir=..."
        )
    return directory / MODEL
