"""Which store the settings mean: a tracking URI made absolute, and what people are told of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from distilbench.settings import ROOT, SettingsError, TrackingSettings
from distilbench.tracking.redaction import redact

DATABASES = ("postgresql", "mysql", "mssql")
"""Schemes that mlflow opens through SQLAlchemy, beside sqlite."""


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

    @property
    def refusal(self) -> str:
        """How a one-line error about this store begins."""
        return f"{self.setting} must be a store that answers, got {redact(self.uri)}"

    @property
    def remedy(self) -> str:
        """How it ends."""
        mend = "check the file and its folder" if self.file else "start it or correct the address"
        return f"{mend}, or go without: tracking=none"

    def describe(self) -> str:
        """Return the address, and the command that shows it where that is not plain ``mlflow ui``."""
        if self.file is None:
            return redact(self.uri)
        plain = self.file == Path.cwd() / "mlflow.db"
        return f"{self.file} (mlflow ui{'' if plain else f' --backend-store-uri {self.uri}'})"

    def runs_url(self, experiment_id: str) -> str:
        """Link to the runs of an experiment, best first: what mlflow itself links to is an overview without runs."""
        best_first = "orderByKey=metrics.%60accuracy%60&orderByAsc=false"
        return f"{self._pages}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&{best_first}"

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """Link to one run."""
        return f"{self._pages}/#/experiments/{experiment_id}/runs/{run_id}"

    @property
    def _pages(self) -> str:
        """Where MLflow's pages are, without a password."""
        address = re.sub(r"//[^/]*@", "//", self.uri) if self.artifacts is None else "http://127.0.0.1:5000"
        return address.rstrip("/")


def store_address_of(settings: TrackingSettings) -> StoreAddress:
    """``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` at the project's root.

    Artifacts of a SQLite store go to ``mlruns/`` beside its file, those of another database to the project's. Raises
    :class:`SettingsError` for a URI that names no such store.
    """
    asked = {"tracking.uri": settings.uri, "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI")}
    setting, uri = next(((name, uri) for name, uri in asked.items() if uri), ("tracking.uri", None))
    uri = uri or f"sqlite:///{(ROOT / 'mlflow.db').as_posix()}"
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme in ("http", "https"):
        return StoreAddress(setting, uri)
    if scheme in DATABASES:
        return StoreAddress(setting, uri, artifacts=ROOT / "mlruns")
    name = re.fullmatch(r"sqlite:///([^?]+)", uri)
    if name is None or name[1] == ":memory:":
        raise SettingsError(
            f"{setting} must be sqlite:///<file>, http(s)://<server> or postgresql://<database>, got {redact(uri)!r}; "
            "leave it out for mlflow.db at the project's root"
        )
    file = Path(name[1]).absolute()
    return StoreAddress(setting, f"sqlite:///{file.as_posix()}", file.parent / "mlruns", file)
