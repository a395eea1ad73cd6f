"""The model and the text that a sweep began with: all of its trials have the same, on whatever host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distilbench.identity import short_hash
from distilbench.settings import AppSettings, SettingsError
from distilbench.sweep.job import SweepJob

if TYPE_CHECKING:
    from distilbench.trials.prepared import Prepared

PINNED = "sources"
"""Attribute of a sweep's study: the model and the text that its first trials really used, by their settings."""


def pin_sources(prepared: Prepared, settings: AppSettings, job: SweepJob) -> None:
    """Keep what this trial's model and text really are, for all of its sweep's later trials to be the same.

    Raises :class:`SettingsError` if an earlier trial, of this call or another, had others under the same settings. A
    study that does not answer here, which the trial's lease tells of, can't be asked.
    """
    from omegaconf.errors import OmegaConfBaseException

    from distilbench.models.resolve import used_now
    from distilbench.sweep.storage import UNANSWERED, Storage, storage_of

    used = {"model": (settings.model, used_now(prepared.model)), "data": (settings.data, prepared.text.used)}
    found = {f"{kind} {short_hash(asked)}": {"fingerprint": it.fingerprint, "is": it.describe()}
             for kind, (asked, it) in used.items()}  # fmt: skip
    try:
        storage = storage_of(job.storage, job.grace_seconds)
        with Storage(storage.url, job.storage).lock():
            study = storage.get_study_id_from_name(job.sweep)
            known: dict[str, Any] = storage.get_study_user_attrs(study).get(PINNED, {})
            if not found.keys() <= known.keys():
                storage.set_study_user_attr(study, PINNED, {**found, **known})
    except (*UNANSWERED, OmegaConfBaseException):
        return
    for key, now in found.items():
        kept = known.get(key, now)
        if kept["fingerprint"] != now["fingerprint"]:
            raise SettingsError(_refusal(key.partition(" ")[0], kept, now, job.sweep))


def _refusal(kind: str, kept: Mapping[str, str], now: Mapping[str, str], sweep: str) -> str:
    has_same_name = kept["is"] == now["is"]
    got = "other contents under that name" if has_same_name else now["is"]
    remedy = "put the first contents back" if has_same_name else "make the first available again"
    return (
        f"{kind} must be what the sweep {sweep!r} began with, {kept['is']} ({kept['fingerprint'][:12]}), got {got} "
        f"({now['fingerprint'][:12]}); {remedy}, or take another sweep.name"
    )
