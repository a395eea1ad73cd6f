"""What a store raises when it is gone, locked, broken or of another version, and what becomes of it."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from distilbench.settings import SettingsError
from distilbench.tracking.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Between two questions whether a store is back."""

LOST_AFTER_SECONDS = 30.0
"""How long what is not kept on disk is tried again; a locked SQLite file blocks each attempt for 20 s."""

_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's codes for a server that can't be reached, is restarted or has too much to do; the others are refusals."""

_Answer = TypeVar("_Answer")


def store_errors() -> tuple[type[Exception], ...]:
    """Return what a store in trouble raises; requests' errors are OSErrors, an ImportError is a missing driver."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError


def is_outage(error: Exception) -> bool:
    """Return whether the store may take later what it does not take now; a refusal, or a full disk, stays one."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    return isinstance(error, (RequestException, ConnectionError, TimeoutError, OperationalError, sqlite3.Error))


@contextlib.contextmanager
def as_settings_error(refusal: str, remedy: str) -> Iterator[None]:
    """Turn trouble into one :class:`SettingsError`: ``<refusal>: <reason>; <remedy>``."""
    try:
        yield
    except store_errors() as error:
        raise SettingsError(f"{refusal}: {reason_of(error)}; {remedy}") from error


def reason_of(error: BaseException) -> str:
    """Return a chain of exceptions' root in one redacted line: ``Connection refused``, not the layers above."""
    root = error
    while cause := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
        root = cause
    said = getattr(root, "strerror", None) or str(root) or type(root).__name__
    return redact(" ".join(said.split()))[:200]


def wait_out(seconds: float, action: Callable[[], _Answer]) -> _Answer:
    """Return ``action()``; where the store is gone, try again until ``seconds`` have passed, then raise its error."""
    until, has_told = time.monotonic() + seconds, False
    while True:
        try:
            return action()
        except store_errors() as error:
            if not is_outage(error) or time.monotonic() >= until:
                raise
            if not has_told:
                log.warning("MLflow does not answer (%s): waiting up to %g s for it", reason_of(error), seconds)
            has_told = True
            time.sleep(POLL_SECONDS)


class Connection:
    """MLflow's client for one experiment; an outage is told once.

    Without a client, where nothing is tracked, every write counts as made.
    """

    def __init__(self, client: MlflowClient | None = None, experiment_id: str = "") -> None:
        self.client: Any = client
        self.experiment_id = experiment_id
        self.is_gone = False
        """Whether the last attempt found nobody who answers."""

    def attempt(self, what: str, action: Callable[[], object], is_kept: bool = True) -> bool:
        """Return whether ``action`` is done with, False where the store is gone.

        What is kept on disk is to be tried later; what is not, again for some seconds where the store has only just
        gone. Never raises, since a trained model outweighs its record: what is refused for good, and an error that is
        not the store's (a figure that can't be drawn), costs a line.
        """
        if self.client is None:
            return True
        try:
            wait_out(0.0 if is_kept or self.is_gone else LOST_AFTER_SECONDS, action)
        except Exception as error:  # a store's, or a figure that can't be drawn
            if not is_outage(error):
                log.warning("MLflow did not get %s: %s", what, reason_of(error))
                return True
            if not is_kept or not self.is_gone:
                outcome = "what it lacks waits on disk until it is back" if is_kept else f"it did not get {what}"
                log.warning("MLflow does not answer (%s): %s", reason_of(error), outcome)
            self.is_gone = True
            return False
        self._answered()
        return True

    def _answered(self) -> None:
        if self.is_gone:
            self.is_gone = False
            log.info("MLflow answers again")

    def wait(self, seconds: float) -> bool:
        """Return whether the store answers, at once or within ``seconds``."""
        try:
            wait_out(seconds, lambda: self.client.get_experiment(self.experiment_id))
        except store_errors():
            return False
        self._answered()
        return True
