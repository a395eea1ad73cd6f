"""Where a sweep's study is kept: a SQLite file of its own, or a database that several hosts share."""

from __future__ import annotations

import contextlib
import errno
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
from distilbench.tracking import redact
from distilbench.tracking.retries import reason_of
from distilbench.tracking.uri import sqlite_url

ANSWER_SECONDS = 4.0

LOCK_SECONDS = 120.0
"""Longest wait for another process that takes or settles a trial; each holds the lock for well under a second."""

_LOCK_NUMBER = 0x64697374696C6265
"""Of PostgreSQL's advisory locks: "distilbe" in ASCII, so that another program will hardly have it."""

UNANSWERED = (SQLAlchemyError, StorageInternalError)
"""What a storage that no longer answers raises, from SQLAlchemy or from Optuna."""

_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Packages that bring a database's driver, by the module that SQLAlchemy looks for, where the two names differ."""

_PASSWORDS = re.compile(r"//[^:/]*:([^@]+)@|[?&]password=([^&]+)")
"""As SQLAlchemy and libpq read a URL."""


@dataclass(frozen=True)
class Storage:
    """Where studies are kept; ``shown`` is the URL as it may be written down, a password being an interpolation."""

    url: str
    shown: str

    @property
    def file(self) -> Path | None:
        """SQLite's file; None for a database behind a network."""
        named = sqlalchemy.make_url(self.url).database if self.url.startswith("sqlite") else None
        return Path(named) if named else None

    @property
    def is_missing(self) -> bool:
        """Whether it is a file that there is not."""
        return self.file is not None and not self.file.exists()

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, of_report: bool = False) -> Iterator[None]:
        """Keep every other process from taking or settling trials; the system lets go of a lock whose holder dies.

        Another lock, ``of_report``, keeps others from writing a report. A file has them beside it, PostgreSQL ones of
        its own, which end with their connection: for all sweeps in a database, since the first of them makes Optuna's
        tables. Others go without. Raises :class:`SettingsError`, or one of :data:`UNANSWERED`, after ``seconds``.
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


BEATS = 6
"""Beats of a trial's heart in the time after which it is taken for dead: one that is lost, or late, costs nothing."""


def beat_seconds(grace_seconds: int) -> int:
    """Return the seconds between two beats."""
    return max(1, grace_seconds // BEATS)


@cache
def storage_of(url: str, grace_seconds: int) -> RDBStorage:
    """Open Optuna's storage at ``url``, whose interpolations are resolved in this process, once for all of it.

    A SQLite file waits a minute for its lock, since several processes write.
    """
    url = str(OmegaConf.create({"url": url}).url)
    arguments: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        interval = beat_seconds(grace_seconds)
        return RDBStorage(url, arguments, heartbeat_interval=interval, grace_period=grace_seconds)


def storage_at(url: str | None, written: str | None, directory: Path) -> Storage:
    """``hydra.sweeper.storage``, by default ``study.db`` in the sweep's directory.

    ``written`` is the setting before its interpolations are resolved. Raises :class:`SettingsError` for what is no
    storage, has a password written out, or does not answer.
    """
    if url is None:
        default = sqlite_url(directory / "study.db")
        return Storage(default, default)
    _check_url(url, written or url)
    storage = Storage(with_absolute_file(url), with_absolute_file(written or url))  # a job may run elsewhere
    with _answering(storage):
        if not storage.file:
            sqlalchemy.create_engine(url, poolclass=NullPool).connect().close()
    return storage


@contextlib.contextmanager
def _answering(storage: Storage) -> Iterator[None]:
    """Raise :class:`SettingsError` where a file is locked, or the storage fails in the block."""
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
    except (*UNANSWERED, sqlite3.Error, RuntimeError, ImportError, PermissionError) as error:
        raise SettingsError(
            f"hydra.sweeper.storage must be a storage that answers and takes a study, got {redact(storage.url)}: "
            f"{reason_of(error)}; start it, end what holds it, correct the address, or leave it out"
        ) from None


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that there is no space left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_url(url: str, written: str) -> None:
    if _PASSWORDS.search(re.sub(r"\$\{[^{}]*\}", "", written)):
        raise SettingsError(
            "hydra.sweeper.storage must not hold a password, since Hydra writes settings to disk; put it into "
            "PGPASSWORD or ~/.pgpass, or the URL into a variable of the environment: "
            "'hydra.sweeper.storage=${oc.env:NAME}'"
        )
    if not re.match(r"(sqlite|postgresql|mysql)(\+\w+)?://", url):
        raise SettingsError(
            f"hydra.sweeper.storage must be the URL of a database, got {redact(url)!r}; for example "
            "sqlite:///sweeps.db or postgresql://user@host/name"
        )


def open_study(storage: Storage, name: str, directions: Sequence[str], pruner: Any, grace_seconds: int) -> optuna.Study:
    """Make the study or load it; raises :class:`SettingsError` where the file is locked or is no study."""
    if storage.file:
        storage.file.parent.mkdir(parents=True, exist_ok=True)
    with _answering(storage):
        return optuna.create_study(
            study_name=name, storage=storage_of(storage.url, grace_seconds), pruner=pruner, load_if_exists=True,
            directions=[StudyDirection[direction.upper()] for direction in directions],
        )  # fmt: skip
