"""Open the store that the settings name, and create its database and experiment if they do not exist."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from functools import partial
from typing import TYPE_CHECKING, Any

from distilbench.settings import SettingsError, TrackingSettings
from distilbench.tracking.retries import retry_outage, suppress_codes
from distilbench.tracking.start import environment_tags
from distilbench.tracking.store import MlflowStore
from distilbench.tracking.uri import StoreAddress, local_folder, sqlite_url, store_address_of

if TYPE_CHECKING:
    from mlflow.entities import Experiment

log = logging.getLogger(__name__)

LOCK_SECONDS = 4.0
"""Longest wait for a locked SQLite file before anything begins; MLflow's own calls wait 20 s."""

EXPERIMENT_ID = "MLFLOW_EXPERIMENT_ID"
UNUSED_VARIABLES = ("MLFLOW_RUN_ID", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
"""Variables that MLflow's fluent API reads, which is not used here."""

_opened: dict[TrackingSettings, MlflowStore] = {}
"""The stores that this process has opened."""


def open_store(settings: TrackingSettings, patiently: bool = False) -> MlflowStore | None:
    """Open the store of ``settings``, creating a missing database or experiment; None for ``tracking=none``.

    Several processes may do so at once. Runs of killed processes are ended, unless ``patiently`` is set, which is for
    the trials of a sweep that has opened the store before: once a process, since it may be unreachable when a later one
    begins. Raises :class:`SettingsError` if the store can't be opened: at once, or ``patiently`` after
    ``tracking.patience_seconds``.
    """
    if settings.name == "none":
        return None
    if patiently and settings in _opened:
        return _opened[settings]
    address = store_address_of(settings)
    configure_mlflow()
    environment_tags()  # raises before anything is written
    for name in UNUSED_VARIABLES if not patiently else ():
        if os.environ.get(name):
            log.warning("%s is not used: every trial has a run of its own, without system metrics", name)
    with address.errors_as_settings_error():
        patience = settings.patience_seconds if patiently else 0.0
        experiment = retry_outage(patience, partial(_find_or_make, address, settings))
    _opened[settings] = store = MlflowStore(address, experiment, settings.patience_seconds)
    if not patiently:
        store.end_left_runs()
    return store


def find_store(settings: TrackingSettings) -> MlflowStore:
    """Open a store for reading; unlike :func:`open_store`, creates nothing.

    Raises :class:`SettingsError` for ``tracking=none``, a missing database, and a missing experiment.
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
    configure_mlflow()
    from mlflow import MlflowClient

    with address.errors_as_settings_error():
        try:
            if address.artifacts is not None:
                _check_database(address)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:  # the low byte of an extended code
                raise
        return MlflowStore(address, _experiment_of(MlflowClient(address.uri), settings), settings.patience_seconds)


def configure_mlflow() -> None:
    """Silence MLflow, disable its telemetry, and limit how long it waits for a server that does not answer.

    A server gets two attempts of 15 s each; PostgreSQL gets 30 s.
    """
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "PGCONNECT_TIMEOUT": "30",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  its import sets the log levels that are changed below

    levels = dict.fromkeys(("mlflow", "matplotlib", "alembic", "urllib3.connectionpool"), logging.ERROR)
    levels["mlflow.store.db.utils"] = logging.CRITICAL  # logs what it raises, with traceback
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _find_or_make(address: StoreAddress, settings: TrackingSettings) -> Experiment:
    """Return the experiment, created by one process at a time: concurrent migrations of a database break each other.

    A server decides where artifacts go; in a database, a new experiment stores them in ``address.artifacts``.
    """
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if address.artifacts is None:
        return _experiment_of(MlflowClient(address.uri), settings, creates=True)
    address.artifacts.mkdir(parents=True, exist_ok=True)
    with FileLock(address.artifacts / ".lock", timeout=60):
        file = address.file
        if file and not (file.exists() and file.stat().st_size):  # atomically: incomplete tables never open
            file.touch()  # raises if it can't be created, which MLflow would retry for an hour
            partial_file = file.with_name(f".{file.name}.partial")
            partial_file.unlink(missing_ok=True)
            SqlAlchemyStore(sqlite_url(partial_file), address.artifacts.as_uri()).engine.dispose()
            os.replace(partial_file, file)
        _check_database(address)
        return _experiment_of(SqlAlchemyStore(address.uri, address.artifacts.as_uri()), settings, creates=True)


def _check_database(address: StoreAddress) -> None:
    """Raise at once what MLflow would retry for an hour: a file that can't be written, a host that does not answer.

    In a SQLite store that was copied, moved or renamed, artifact paths are changed to the ``mlruns/`` next to it.
    MLflow stores absolute paths and has no API to change them, so the two columns of its tables are updated here. A
    folder that the user chose is kept: any but the ``mlruns/<id>`` of another store, or of one that no longer exists.
    """
    if address.file is None:
        import sqlalchemy

        sqlalchemy.create_engine(address.uri).connect().close()
        return
    own = address.file.resolve().parent / "mlruns"
    with contextlib.closing(sqlite3.connect(address.file, timeout=LOCK_SECONDS)) as database, database:
        database.execute("BEGIN IMMEDIATE")
        known = database.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for number, name, location in known:
            old, new = local_folder(location or ""), own / str(number)
            if old is None or old.parts[-2:] != new.parts[-2:] or old.resolve() == new.resolve():
                continue
            if old.is_dir() and not any(old.parents[1].glob("*.db")):
                continue  # of no other store: MLflow created the experiment there, outside of distilbench
            folder = new.as_uri()
            database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (folder, number))
            database.execute(
                "UPDATE runs SET artifact_uri = ? || '/' || run_uuid || '/artifacts' WHERE experiment_id = ? "
                "AND artifact_uri LIKE '%/' || experiment_id || '/' || run_uuid || '/artifacts'", (folder, number)
            )  # fmt: skip
            log.warning("files of the experiment %s are from now on in %s, beside their store; what is only in %s, "
                        "where they were, is to be copied", name, new, old)  # fmt: skip


def _experiment_of(store: Any, settings: TrackingSettings, creates: bool = False) -> Experiment:
    """Return the experiment of the settings or variables, which is created if it is missing and ``creates`` is set.

    ``store`` is a client or a store of MLflow's. Raises :class:`SettingsError` for one that is missing or was deleted.
    """
    variables = ("MLFLOW_EXPERIMENT_NAME", EXPERIMENT_ID)  # in MLflow's own order
    asked = {"tracking.experiment": settings.experiment, **{name: os.environ.get(name) for name in variables}}
    setting, name = next(
        ((key, value) for key, value in asked.items() if value), ("tracking.experiment", "distilbench")
    )
    find = store.get_experiment if setting == EXPERIMENT_ID else store.get_experiment_by_name
    found: Experiment | None = None
    with suppress_codes("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # of an id
        found = find(name)
    if found is None and creates and setting != EXPERIMENT_ID:
        with suppress_codes("RESOURCE_ALREADY_EXISTS"):  # another process was faster
            store.create_experiment(name)
        found = find(name)
    if found is None:
        key = "experiment_id" if setting == EXPERIMENT_ID else "name"
        known = sorted(str(getattr(one, key)) for one in store.search_experiments(max_results=20))
        remedy = "train a trial in it first, or name one with tracking.experiment=..."
        raise SettingsError(f"{setting} must be one of {', '.join(known)}, got {name!r}; {remedy}")
    if found.lifecycle_stage != "active":
        raise SettingsError(
            f"{setting} must be an active experiment, got {name!r}, which was deleted; "
            f"name another one or run: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found
