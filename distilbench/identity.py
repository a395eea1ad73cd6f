"""By what two trials are the same: protocol, treatment, sources."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from distilbench.settings import TrialSettings


@dataclass(frozen=True)
class SourceUsed:
    """The text or the weights that were really used.

    ``kind`` is the source's kind (hub, package, ...), ``name`` what a person calls it, ``revision`` a commit or a
    version where there is one, ``fingerprint`` a sha256 of the content itself. ``fallback_for`` names what was asked
    for where this is a fallback.
    """

    kind: str
    name: str
    fingerprint: str
    revision: str | None = None
    fallback_for: str | None = None

    def describe(self) -> str:
        """One line for people, saying so where this stands in for something else."""
        version = f" ({self.revision[:12]})" if self.revision else ""
        instead = f", FALLBACK for {self.fallback_for}" if self.fallback_for else ""
        return f"{self.name}{version}{instead}"


@dataclass(frozen=True)
class ProtocolIdentity:
    """What must be equal for two trials to be comparable at all; ``id`` names it in twelve hexadecimal digits."""

    model: SourceUsed
    data: SourceUsed
    metric: str
    selection_split: str
    report_split: str

    @property
    def id(self) -> str:
        """A digest of contents, not of names: the same text from two places is the same protocol."""
        return digest((self.model.fingerprint, self.data.fingerprint, self.metric, self.selection_split,
                       self.report_split))  # fmt: skip


_TREATMENT_OF_TRAIN = ("epochs", "batch_size", "max_length", "eval_steps")


def treatment_of(settings: TrialSettings, precision: str) -> dict[str, object]:
    """What a sweep may vary within a protocol, flat and without the seed; ``precision`` is the one really used."""
    flat = {
        f"{group}.{f.name}": getattr(getattr(settings, group), f.name)
        for group in ("freeze", "scheduler", "optim")
        for f in fields(getattr(settings, group))
    }
    flat["freeze.embeddings"] = settings.freeze.freezes_embeddings
    return (
        flat | {f"train.{k}": getattr(settings.train, k) for k in _TREATMENT_OF_TRAIN} | {"train.precision": precision}
    )


def digest(value: object) -> str:
    """Twelve hexadecimal digits of the sha256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:12]
