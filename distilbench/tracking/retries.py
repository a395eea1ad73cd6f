"""What a store raises when it is gone, locked, broken or of another version, and what becomes of it."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator

from distilbench.settings import SettingsError
from distilbench.tracking.redaction import redact

log = logging.getLogger(__name__)

PAUSES = (0.5, 2.0)
"""Seconds between the attempts to write what must be written before the process goes on."""


def store_errors() -> tuple[type[Exception], ...]:
    """What stands for a store in trouble; requests' errors are OSErrors, an ImportError is a database's driver."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError


@contextlib.contextmanager
def as_settings_error(refusal: str, remedy: str) -> Iterator[None]:
    """Turn trouble into one :class:`SettingsError`: ``<refusal>: <reason>; <remedy>``."""
    try:
        yield
    except store_errors() as error:
        raise SettingsError(f"{refusal}: {reason_of(error)}; {remedy}") from error


def reason_of(error: BaseException) -> str:
    """The root of a chain of exceptions in one redacted line: ``Connection refused`` instead of the layers above."""
    root = error
    while cause := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
        root = cause
    said = getattr(root, "strerror", None) or str(root) or type(root).__name__
    return redact(" ".join(said.split()))[:200]


def retry_or_warn(what: str, action: Callable[[], object]) -> bool:
    """Try thrice, then warn in one line, since a trained model outweighs its record; return whether the store answers.

    An error that is not the store's (a figure that can't be drawn) is not tried again, but costs no more than that.
    """
    for pause in (*PAUSES, None):
        try:
            action()
            return True
        except store_errors() as error:
            if pause is None:
                log.warning("MLflow did not take %s: %s", what, reason_of(error))
            else:
                time.sleep(pause)
        except Exception as error:
            log.warning("MLflow did not get %s: %s: %s", what, type(error).__name__, reason_of(error))
            return True
    return False
