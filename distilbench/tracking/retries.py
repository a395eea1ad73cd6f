"""Handle the errors of a store that is unreachable, locked, broken or of another version: retry, defer or report."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from distilbench.cli import is_disk_full
from distilbench.settings import SettingsError
from distilbench.tracking.redaction import redact

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Interval between two attempts to reach a store."""

RETRY_SECONDS = 30.0
"""How long a write that is not kept on disk is retried."""

_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's error codes for a server that is unreachable, restarting or overloaded; all others are permanent."""

_REMEDIES = {
    "out-of-date database schema": "back it up and run: mlflow db upgrade <its URI>; or install its own MLflow",
    "error code 401": "log in with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
}
"""Words of an error -> its own remedy."""

_Answer = TypeVar("_Answer")


def store_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that a store raises; requests' errors are OSErrors, an ImportError is a missing driver."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError


def is_outage(error: Exception) -> bool:
    """Return whether a later attempt may succeed; a refusal, a full disk and a read-only database are permanent."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import OperationalError

    if "readonly database" in str(error):
        return False
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    return isinstance(error, (RequestException, ConnectionError, TimeoutError, OperationalError, sqlite3.Error))


@contextlib.contextmanager
def as_settings_error(refusal: str, remedy: str) -> Iterator[None]:
    """Convert the store's errors to a :class:`SettingsError`: ``<refusal>: <reason>; <remedy>``."""
    try:
        yield
    except store_errors() as error:
        reason = reason_of(error)
        remedy = next((own for words, own in _REMEDIES.items() if words in reason), remedy)
        raise SettingsError(f"{refusal}: {reason}; {remedy}") from error


@contextlib.contextmanager
def suppress_codes(*codes: str) -> Iterator[None]:
    """Suppress MLflow's errors with one of these error codes."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in codes:
            raise


def reason_of(error: BaseException) -> str:
    """Return the root cause of an exception as one redacted line: ``Connection refused``, not the layers above."""
    root = error
    while cause := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
        root = cause
    said = getattr(root, "strerror", None) or str(root) or type(root).__name__
    return redact(" ".join(said.split()))[:200]


def retry_outage(seconds: float, action: Callable[[], _Answer]) -> _Answer:
    """Return ``action()``; retry an outage, but for a full disk, for up to ``seconds``, then raise its error."""
    until, has_told = time.monotonic() + seconds, False
    while True:
        try:
            return action()
        except store_errors() as error:
            if not is_outage(error) or is_disk_full(error) or time.monotonic() >= until:
                raise
            if not has_told:
                log.warning("MLflow does not answer (%s): waiting up to %g s for it", reason_of(error), seconds)
            has_told = True
            time.sleep(POLL_SECONDS)


class Connection:
    """MLflow's client for one experiment, which reports each outage only once.

    Without a client (no tracking), every write counts as done.
    """

    def __init__(self, client: Any = None, experiment_id: str = "") -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.is_unreachable = False
        """Whether the store was unreachable at the last attempt."""

    def attempt(self, what: str, action: Callable[[], object], is_kept: bool = True, is_write: bool = True) -> bool:
        """Call ``action``; returns False if the store is unreachable, and True otherwise, even after an error.

        An outage is over with the first write: on a full disk, a database still answers questions.

        An action that is not ``is_kept`` on disk for later is retried for :data:`RETRY_SECONDS`, unless the store
        was already unreachable. Never raises, since a trained model outweighs its record: permanent errors, and others
        than the store's (such as a figure that can't be drawn), are logged as a warning.
        """
        if self.client is None:
            return True
        try:
            retry_outage(0.0 if is_kept or self.is_unreachable else RETRY_SECONDS, action)
        except Exception as error:  # the store's, or any other
            if not is_outage(error):
                log.warning("MLflow did not get %s: %s", what, reason_of(error))
                return True
            if not is_kept or not self.is_unreachable:
                outcome = "what it lacks waits on disk until it is back" if is_kept else f"it did not get {what}"
                log.warning("MLflow does not answer (%s): %s", reason_of(error), outcome)
            self.is_unreachable = True
            return False
        if self.is_unreachable and is_write:
            self.is_unreachable = False
            log.info("MLflow answers again")
        return True

    def wait(self, seconds: float) -> bool:
        """Return whether the store answers within ``seconds``."""
        with contextlib.suppress(*store_errors()):
            retry_outage(seconds, lambda: self.client.get_experiment(self.experiment_id))
            return True
        return False
