"""The store that the settings name: its absolute tracking URI, and the links and commands shown for it."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from distilbench.settings import SettingsError, TrackingSettings, original_cwd, root
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import as_settings_error

_WORKFLOW = "workflowType=machine_learning"
"""Without it, a link opens MLflow's pages for LLM traces."""


@dataclass(frozen=True)
class StoreAddress:
    """The address of a store; ``setting`` names the setting or environment variable that gave it."""

    setting: str
    uri: str
    """May contain a password: only to be passed to MLflow."""
    artifacts: Path | None = None
    """Folder of the runs' artifacts; None if a server decides."""
    file: Path | None = None
    """The SQLite file; None for a server."""

    def errors_as_settings_error(self) -> AbstractContextManager[None]:
        """Convert the store's errors in a block to a :class:`SettingsError` with a remedy."""
        mend = "check the file and its folder" if self.file else "start it or correct the address"
        refusal = f"{self.setting} must be a store that answers, got {redact(self.uri)}"
        return as_settings_error(refusal, f"{mend}, or go without: tracking=none")

    def runs_url(self, experiment_id: str, view: str | None = None) -> str:
        """Return a link to the runs of an experiment, as the shared ``view`` shows them, or best first.

        MLflow ignores a shared view next to other parameters; its own links lead to an overview without runs.
        """
        shown = f"viewStateShareKey={view}" if view else "orderByKey=metrics.%60accuracy%60&orderByAsc=false"
        return f"{self._pages}/#/experiments/{experiment_id}/runs?{shown}&{_WORKFLOW}"

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """Return a link to one run."""
        return f"{self._pages}/#/experiments/{experiment_id}/runs/{run_id}?{_WORKFLOW}"

    @property
    def ui_command(self) -> str | None:
        """The command to run before a link can be opened; None for a server, which already runs."""
        if self.artifacts is None:
            return None
        found_there = self.file is not None and self.file.name == "mlflow.db"
        store = "" if found_there else f" --backend-store-uri {shlex.quote(redact(self.uri))}"
        return f"cd {shlex.quote(str(self.artifacts.parent))} && mlflow ui{store}"

    @property
    def _pages(self) -> str:
        """URL of MLflow's pages, without user and password; ``mlflow ui`` reads the same two variables."""
        if self.artifacts is None:
            return re.sub(r"//[^/]*@", "//", self.uri).rstrip("/")
        host = os.environ.get("MLFLOW_HOST", "")
        host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # a wildcard address
        return f"http://{host}:{os.environ.get('MLFLOW_PORT', '5000')}"


def store_address_of(settings: TrackingSettings) -> StoreAddress:
    """Return the address from ``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` at the project's root.

    Artifacts go to ``mlruns/``: next to the file of a SQLite store, at the project's root for other databases. Raises
    :class:`SettingsError` for any other URI.
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
    """Return the folder of an artifact location (a path or a URI); None if it is not on this machine."""
    scheme = location.partition(":")[0]
    if location.startswith("/"):
        return Path(location)
    return Path(url2pathname(urlsplit(location).path)) if scheme == "file" else None


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file; SQLAlchemy escapes ``?``, ``%`` and ``#`` in the path."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=file.as_posix()).render_as_string(hide_password=False)


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a plain SQLite URL; None for any other URL, also for one in memory or with options."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    names_file = url.drivername == "sqlite" and url.database not in (None, "", ":memory:")
    return original_cwd() / str(url.database) if names_file and not url.host and "?" not in uri else None
