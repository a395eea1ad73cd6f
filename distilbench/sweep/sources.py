"""The model and the text that a sweep began with: all of its trials have the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from filelock import FileLock

from distilbench.identity import short_hash
from distilbench.settings import AppSettings, SettingsError
from distilbench.sweep.job import SweepJob

if TYPE_CHECKING:
    from distilbench.trials.prepared import Prepared

SOURCES = "sources.json"
"""In a sweep's directory: the model and the text that its first trials really used, by their settings."""


def pin_sources(prepared: Prepared, settings: AppSettings, job: SweepJob) -> None:
    """Keep what this trial's model and text really are, for all of its sweep's later trials to be the same.

    Raises :class:`SettingsError` if an earlier trial, of this call or another, had others under the same settings.
    """
    from distilbench.models.resolve import used_now

    found = {"model": (settings.model, used_now(prepared.model)), "data": (settings.data, prepared.text.used)}
    path = job.sweep_directory / SOURCES
    with FileLock(path.with_name(f".{SOURCES}.lock")):
        known: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
        for kind, (asked, used) in found.items():
            now = {"fingerprint": used.fingerprint, "is": used.describe()}
            kept = known.setdefault(f"{kind} {short_hash(asked)}", now)
            if kept["fingerprint"] != now["fingerprint"]:
                raise SettingsError(_refusal(kind, kept, now, job.sweep))
        partial = path.with_name(f".{SOURCES}.partial")
        partial.write_text(json.dumps(known, indent=2) + "\n")
        os.replace(partial, path)


def _refusal(kind: str, kept: Mapping[str, str], now: Mapping[str, str], sweep: str) -> str:
    has_same_name = kept["is"] == now["is"]
    got = "other contents under that name" if has_same_name else now["is"]
    remedy = "put the first contents back" if has_same_name else "make the first available again"
    return (
        f"{kind} must be what the sweep {sweep!r} began with, {kept['is']} ({kept['fingerprint'][:12]}), got {got} "
        f"({now['fingerprint'][:12]}); {remedy}, or take another sweep.name"
    )
