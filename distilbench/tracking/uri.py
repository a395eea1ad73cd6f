"""Which store the settings mean: a tracking URI made absolute, and what people are told of it."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from distilbench.settings import SettingsError, TrackingSettings, root, typed_in
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import as_settings_error

_WORKFLOW = "workflowType=machine_learning"
"""Without it a link opens MLflow's pages for language models' traces."""


@dataclass(frozen=True)
class StoreAddress:
    """Where runs are kept; ``setting`` names what decided it."""

    setting: str
    uri: str
    """May hold a password: for mlflow's eyes only."""
    artifacts: Path | None = None
    """Folder of files that belong to runs; None where a server decides."""
    file: Path | None = None
    """SQLite's file; None for anything that answers over a network."""

    def asking(self) -> AbstractContextManager[None]:
        """Turn the store's trouble in a block into one :class:`SettingsError`, which says what to mend."""
        mend = "check the file and its folder" if self.file else "start it or correct the address"
        refusal = f"{self.setting} must be a store that answers, got {redact(self.uri)}"
        return as_settings_error(refusal, f"{mend}, or go without: tracking=none")

    def runs_url(self, experiment_id: str, view: str | None = None) -> str:
        """Link to the runs of an experiment, as a shared view shows them or best first.

        MLflow heeds no shared view where anything else is asked for; its own links lead to an overview without runs.
        """
        shown = f"viewStateShareKey={view}" if view else "orderByKey=metrics.%60accuracy%60&orderByAsc=false"
        return f"{self._pages}/#/experiments/{experiment_id}/runs?{shown}&{_WORKFLOW}"

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """Link to one run."""
        return f"{self._pages}/#/experiments/{experiment_id}/runs/{run_id}?{_WORKFLOW}"

    @property
    def ui_command(self) -> str | None:
        """What to type before a link can be opened; None for a server, which is there."""
        if self.artifacts is None:
            return None
        found_there = self.file is not None and self.file.name == "mlflow.db"
        store = "" if found_there else f" --backend-store-uri {shlex.quote(redact(self.uri))}"
        return f"cd {shlex.quote(str(self.artifacts.parent))} && mlflow ui{store}"

    @property
    def _pages(self) -> str:
        """Where MLflow's pages are, without a password; ``mlflow ui`` reads the same two variables."""
        if self.artifacts is None:
            return re.sub(r"//[^/]*@", "//", self.uri).rstrip("/")
        host = os.environ.get("MLFLOW_HOST", "")
        host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # what listens everywhere is asked here
        return f"http://{host}:{os.environ.get('MLFLOW_PORT', '5000')}"


def store_address_of(settings: TrackingSettings) -> StoreAddress:
    """``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` at the project's root.

    Artifacts of a SQLite store go to ``mlruns/`` beside its file, those of another database to the project's. Raises
    :class:`SettingsError` for a URI that names no such store.
    """
    asked = {"tracking.uri": settings.uri, "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI")}
    setting, uri = next(((name, uri) for name, uri in asked.items() if uri), ("tracking.uri", None))
    uri = uri or sqlite_url(root() / "mlflow.db")
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme in ("http", "https"):
        return StoreAddress(setting, uri)
    if scheme in ("postgresql", "mysql", "mssql"):
        return StoreAddress(setting, uri, artifacts=root() / "mlruns")
    file = _sqlite_file(uri)
    if file is None:
        raise SettingsError(
            f"{setting} must be sqlite:///<file>, http(s)://<server> or postgresql://<database>, got {redact(uri)!r}; "
            "in a path, ? is written %3F and % is %25; leave it out for mlflow.db at the project's root"
        )
    return StoreAddress(setting, sqlite_url(file), file.parent / "mlruns", file)


def local_folder(location: str) -> Path | None:
    """Return the folder of an artifact location, a path or a URI; None for one that is not on this machine."""
    scheme = location.partition(":")[0]
    if location.startswith("/"):
        return Path(location)
    return Path(url2pathname(urlsplit(location).path)) if scheme == "file" else None


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file; only SQLAlchemy knows how ``?``, ``%`` or ``#`` in a path are spelled there."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=file.as_posix()).render_as_string(hide_password=False)


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a plain SQLite URL; None for any other, in memory or with options."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    names_file = url.drivername == "sqlite" and url.database not in (None, "", ":memory:")
    return typed_in() / str(url.database) if names_file and not url.host and "?" not in uri else None
