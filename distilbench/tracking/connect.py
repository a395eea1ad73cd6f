"""From settings to an open store: which one, is it there, and who makes it."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from distilbench.settings import SettingsError, TrackingSettings
from distilbench.tracking.mlflow_tables import make_database, store_of_database
from distilbench.tracking.retries import wait_out
from distilbench.tracking.store import MlflowStore
from distilbench.tracking.uri import StoreAddress, store_address_of

if TYPE_CHECKING:
    from mlflow.entities import Experiment

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

ANSWER_SECONDS = 30.0
"""How long a server or a database may take to answer at the start: one that is busy is not gone."""

LOCK_SECONDS = 4.0
"""How long another process may hold the lock of an SQLite file."""


def open_store(settings: TrackingSettings, patiently: bool = False) -> MlflowStore | None:
    """Open the store that ``settings`` name, making database and experiment where missing; None for ``tracking=none``.

    ``tracking.uri`` goes before ``MLFLOW_TRACKING_URI``, that before ``mlflow.db`` at the project's root. Processes
    may race here. Runs that killed processes left are ended. Raises :class:`SettingsError` where there is no store to
    be had: at once, or for trials of a sweep, which has seen it, ``patiently`` after ``tracking.patience_seconds``.
    """
    if settings.name == "none":
        return None
    address = store_address_of(settings)
    quieten()
    with address.asking():
        open_it = partial(_open_database if address.artifacts else _open_server, address, settings)
        experiment = wait_out(settings.patience_seconds if patiently else 0.0, open_it)
    store = MlflowStore(address, experiment, settings.patience_seconds)
    store.require_own_folder()
    if not patiently:
        store.end_left_runs()
    return store


def find_store(settings: TrackingSettings) -> MlflowStore:
    """Open a store to read it: unlike :func:`open_store`, what is not there is refused, not made.

    Raises :class:`SettingsError` for ``tracking=none``, no database, and no such experiment.
    """
    if settings.name == "none":
        raise SettingsError("tracking must be mlflow to read trials, got none; drop tracking=none")
    address = store_address_of(settings)
    if address.file and not address.file.is_file():
        raise SettingsError(
            f"{address.setting} must be a store that holds trials, got {address.file}, which does not exist; train one "
            "first (python -m distilbench.train experiment=quick) or name it with tracking.uri=...; where a store "
            "was deleted, figures are left in each trial's trial.json"
        )
    quieten()
    from mlflow import MlflowClient

    with address.asking():
        if address.artifacts is not None:
            _check_database(address)
        found = _within(60, lambda: MlflowClient(address.uri).search_experiments())
    experiments = {experiment.name: experiment for experiment in found}
    if settings.experiment not in experiments:
        raise SettingsError(
            f"tracking.experiment must be one of {', '.join(sorted(experiments))}, got {settings.experiment!r}; "
            "train a trial in it first"
        )
    store = MlflowStore(address, experiments[settings.experiment], settings.patience_seconds)
    if store.foreign_folder:
        log.warning("%s", store.foreign_folder)
    return store


def quieten() -> None:
    """Keep mlflow from announcing itself, from calling home, and from waiting minutes on a server that is gone."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  its import sets the levels that the next lines change

    for name in ("mlflow", "matplotlib", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _within(seconds: float, action: Callable[[], _Answer]) -> _Answer:
    """Return ``action()``, or raise TimeoutError; in a thread: name look-ups heed no socket's timeout."""
    answer: Future[_Answer] = Future()

    def act() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _open_server(address: StoreAddress, settings: TrackingSettings) -> Experiment:
    """Find or make the experiment at a server, which keeps artifacts where it likes."""
    from mlflow import MlflowClient

    return _within(ANSWER_SECONDS, lambda: _experiment_of(MlflowClient(address.uri), settings))


def _open_database(address: StoreAddress, settings: TrackingSettings) -> Experiment:
    """Find or make the experiment in a database, one process at a time: racing ones break each other's migrations."""
    from filelock import FileLock

    assert address.artifacts is not None
    address.artifacts.mkdir(parents=True, exist_ok=True)
    with FileLock(address.artifacts / ".lock", timeout=60):
        _check_database(address)
        if address.file and not address.file.stat().st_size:
            make_database(address.file, address.artifacts)
        return _experiment_of(store_of_database(address.uri, address.artifacts), settings)


def _check_database(address: StoreAddress) -> None:
    """Raise at once what mlflow would retry for an hour: a file that can't be written, a host that does not answer."""
    if address.file:
        with contextlib.closing(sqlite3.connect(address.file, timeout=LOCK_SECONDS)) as connection:
            connection.execute("BEGIN IMMEDIATE")
        return
    import sqlalchemy

    _within(ANSWER_SECONDS, lambda: sqlalchemy.create_engine(address.uri).connect().close())


def _experiment_of(store: Any, settings: TrackingSettings) -> Experiment:
    """Return the experiment, made where it is missing; ``store`` is a client or a store of MLflow's."""
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(settings.experiment)
    if found is None:
        try:
            return cast("Experiment", store.get_experiment(store.create_experiment(settings.experiment)))
        except MlflowException:
            found = store.get_experiment_by_name(settings.experiment)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise SettingsError(
            f"tracking.experiment must be an active experiment, got {settings.experiment!r}, which was deleted; "
            f"name another one or run: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return cast("Experiment", found)
