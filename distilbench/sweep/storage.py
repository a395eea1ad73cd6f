"""Where a sweep's study is kept: a SQLite file of its own, or a database that several hosts share."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from distilbench.settings import SettingsError, with_absolute_file
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import reason_of
from distilbench.tracking.uri import sqlite_url

ANSWER_SECONDS = 4.0

LOCK_SECONDS = 120.0
"""Longest wait for the sweep's lock; a process that starts or ends a trial holds it for well under a second."""

_LOCK_NUMBER = 0x64697374696C6265
"""Key of the PostgreSQL advisory lock: "distilbe" in ASCII, unlikely to be another program's key."""

STORAGE_ERRORS = (SQLAlchemyError, StorageInternalError)
"""Exceptions that SQLAlchemy and Optuna raise when a storage no longer answers."""

_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Module of a database driver, as SQLAlchemy imports it -> package that provides it, where the two names differ."""

_PASSWORDS = re.compile(r"//[^:/]*:([^@]+)@|[?&]password=([^&]+)")
"""Matches a password in a URL, in the places where SQLAlchemy and libpq read one."""


@dataclass(frozen=True)
class Storage:
    """The database that holds the studies; ``url_template`` is its URL before interpolation, without a password."""

    url: str
    url_template: str

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for a database server."""
        named = sqlalchemy.make_url(self.url).database if self.url.startswith("sqlite") else None
        return Path(named) if named else None

    @property
    def is_missing(self) -> bool:
        """Whether the storage is a SQLite file that does not exist."""
        return self.file is not None and not self.file.exists()

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, of_report: bool = False) -> Iterator[None]:
        """Hold the lock for starting and ending trials; the operating system releases it if its holder dies.

        ``of_report`` selects a second lock, for writing a report. SQLite has a file for each, next to the database;
        PostgreSQL has advisory locks, shared by all sweeps of the database since the first creates Optuna's tables;
        others have none. Raises :class:`SettingsError`, or one of :data:`STORAGE_ERRORS`, after ``seconds``.
        """
        with contextlib.ExitStack() as held:
            if self.file:
                name = f".{self.file.name}.report.lock" if of_report else f".{self.file.name}.lock"
                try:
                    held.enter_context(FileLock(self.file.with_name(name), timeout=seconds))
                except Timeout:
                    raise SettingsError(
                        f"hydra.sweeper.storage must be free, got {self.file}, which another process has held for "
                        f"{seconds:g} s; end that one, or wait for it"
                    ) from None
            else:
                engine = sqlalchemy.create_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
                connection = held.enter_context(engine.connect())
                if engine.dialect.name == "postgresql":
                    connection.execute(sqlalchemy.text(f"SET lock_timeout = '{seconds:g}s'"))
                    connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_LOCK_NUMBER + of_report})"))
            yield


@cache
def storage_of(url: str, grace_seconds: int) -> RDBStorage:
    """Open Optuna's storage at ``url``, once per process; interpolations in ``url`` are resolved in this process.

    A write to SQLite waits up to a minute for the file's lock, since several processes write.
    """
    url = str(OmegaConf.create({"url": url}).url)
    arguments: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # the interval only switches heartbeats on: Study.optimize alone would keep it
        return RDBStorage(url, arguments, heartbeat_interval=1, grace_period=grace_seconds)


def storage_at(url: str | None, written: str | None, directory: Path) -> Storage:
    """Return the storage of ``hydra.sweeper.storage``, by default ``study.db`` in the sweep's directory.

    ``written`` is the setting before interpolation. Raises :class:`SettingsError` for a storage that does not answer.
    """
    if url is None:
        default = sqlite_url(directory / "study.db")
        return Storage(default, default)
    storage = Storage(with_absolute_file(url), with_absolute_file(written or url))  # a job may run in another directory
    with _answering(storage):
        if not storage.file:
            sqlalchemy.create_engine(url, poolclass=NullPool).connect().close()
    return storage


@contextlib.contextmanager
def _answering(storage: Storage) -> Iterator[None]:
    """Raise :class:`SettingsError` if the SQLite file is locked, or if the storage fails in the block."""
    try:
        if storage.file:
            with contextlib.closing(sqlite3.connect(storage.file, timeout=ANSWER_SECONDS)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        yield
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(str(error.name), error.name)
        raise SettingsError(
            f"hydra.sweeper.storage must be a database whose driver is installed, got {redact(storage.url)} without "
            f"{error.name}; run: pip install '{package}'"
        ) from None
    except (*STORAGE_ERRORS, sqlite3.Error, RuntimeError, ImportError, PermissionError) as error:
        raise SettingsError(
            f"hydra.sweeper.storage must be a storage that answers and takes a study, got {redact(storage.url)}: "
            f"{reason_of(error)}; start it, end what holds it, correct the address, or leave it out"
        ) from None


def check_url(url: str, written: str) -> None:
    """Raise :class:`SettingsError` for another URL than a database's, or one with a password, as ``written``."""
    if _PASSWORDS.search(re.sub(r"\$\{[^{}]*\}", "", written)):
        raise SettingsError(
            "hydra.sweeper.storage must not hold a password, since Hydra writes settings to disk; put it into "
            "PGPASSWORD or ~/.pgpass, or the URL into a variable of the environment: "
            "'hydra.sweeper.storage=${oc.env:NAME}'"
        )
    if not re.match(r"(sqlite(\+\w+)?:/|(postgresql|mysql)(\+\w+)?:)//.", url):  # a study in memory can't be continued
        raise SettingsError(
            f"hydra.sweeper.storage must be the URL of a database, got {redact(url)!r}; for example "
            "sqlite:///sweeps.db or postgresql://user@host/name"
        )


def open_study(storage: Storage, name: str, directions: Sequence[str], pruner: Any, grace_seconds: int) -> optuna.Study:
    """Create the study or load it; raises :class:`SettingsError` if the storage is locked or can't hold a study."""
    if storage.file:
        storage.file.parent.mkdir(parents=True, exist_ok=True)
    with _answering(storage):
        return optuna.create_study(
            study_name=name, storage=storage_of(storage.url, grace_seconds), pruner=pruner, load_if_exists=True,
            directions=[StudyDirection[direction.upper()] for direction in directions],
        )  # fmt: skip
