"""Keys that decide whether two trials are "the same": each combines some of the tables of settings below.

Every setting of a trial belongs to exactly one table; ``tests/test_identity.py`` checks that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from distilbench.settings import TrialSettings


def _of(group: str, names: str) -> tuple[str, ...]:
    return tuple(f"{group}.{name}" for name in names.split())


SOURCES = (
    *_of("model", "source checkpoint revision layers fallback"),
    *_of("data", "source hub_name hub_config revision train validation fallback"),
    *_of("data", "text_column pair_column label_column label_names"),
    *_of("data", "validation_fraction selection_fraction report_fraction split_seed max_validation_examples"),
)
"""Where weights and text come from. A protocol contains what was really found there instead."""

TEXT_AMOUNT = "data.max_train_examples"
"""The amount of training text: the only setting in ``data`` that belongs to the treatment, not to the protocol."""

METRIC = ("train.metric",)
"""The metric that picks epochs and winners; part of the protocol, with the sources."""

OLD_DEFAULTS: dict[str, object] = {
    "data.split_seed": 0,
    **dict.fromkeys((TEXT_AMOUNT, "train.patience", *_of("adapter", "rank alpha dropout"))),
    "freeze.policy": "depth",
    "adapter.name": "none",
    "optim.layer_decay": 1.0,
    "train.label_smoothing": 0.0,
    "train.class_weights": "none",
}
"""Treatment settings that earlier versions lacked, with their values then; a treatment contains only other values."""

BASELINE_GROUPS = ("freeze.", "adapter.", "scheduler.", "optim.")
"""Prefixes of the settings that an experiment or a baseline sets."""

TREATMENT_OF_INPUT = (TEXT_AMOUNT, "train.max_length", "train.precision")
"""Treatment that affects what is prepared before the first step."""

TREATMENT_OF_LOOP = (
    *_of("freeze", "policy layers embeddings dropout"),
    *_of("adapter", "name rank alpha dropout"),
    *_of("train", "epochs batch_size eval_steps label_smoothing class_weights"),
    "optim.name",
)
"""Treatment that must be equal for trials that are trained together."""

TREATMENT_OF_STEP = (
    *_of("scheduler", "name warmup_ratio warmup_steps"),
    *_of("optim", "lr layer_decay weight_decay max_grad_norm beta1 beta2 eps momentum"),
    "train.patience",
)
"""Treatment that may differ between trials that are trained together."""

SEED = ("seed",)

ENGINE = ("engine.name",)

DEVICE = ("engine.device",)

SPEED = (*_of("train", "micro_batch_size eval_batch_size logging_steps"), "data.slice_column")
"""Affects only speed, memory and records, but must be equal for trials that are trained together."""

OUTPUT = (*_of("train", "checkpoints resume"), *_of("output", "dir save_model"), "adapter.merge")
"""Where a trial writes and what it keeps; part of no key."""

TABLES = (SOURCES, METRIC, TREATMENT_OF_INPUT, TREATMENT_OF_LOOP, TREATMENT_OF_STEP, SEED, ENGINE, DEVICE, SPEED,
          OUTPUT)  # fmt: skip

TREATMENT = (*TREATMENT_OF_LOOP, *TREATMENT_OF_STEP, *TREATMENT_OF_INPUT)
"""What a sweep may vary within a protocol."""

SWEEP = (*SOURCES, *METRIC, *TREATMENT, *SEED)
"""Settings that, if a sweep does not vary them, must not change when it is continued."""


@dataclass(frozen=True)
class SourceUsed:
    """The text or the weights that were really used.

    ``kind`` is the kind of source (hub, package, ...), ``name`` its name for people, ``revision`` its commit or
    version, if any, and ``fingerprint`` the sha256 of its content. If this is a fallback, ``fallback_for`` names the
    source that was asked for.
    """

    kind: str
    name: str
    fingerprint: str
    revision: str | None = None
    fallback_for: str | None = None

    def describe(self) -> str:
        """Return one line for people, which says so if this is a fallback."""
        version = f" ({self.revision[:12]})" if self.revision else ""
        instead = f", FALLBACK for {self.fallback_for}" if self.fallback_for else ""
        return f"{self.name}{version}{instead}"


@dataclass(frozen=True)
class ProtocolIdentity:
    """What must be equal for two trials to be comparable at all; ``id`` has twelve hexadecimal digits."""

    model: SourceUsed
    data: SourceUsed
    metric: str
    selection_split: str
    report_split: str

    @property
    def id(self) -> str:
        """A hash of contents, not of names: the same text from two sources gives the same protocol."""
        return short_hash((self.model.fingerprint, self.data.fingerprint, self.metric, self.selection_split,
                           self.report_split))  # fmt: skip


@dataclass(frozen=True)
class TrialIdentity:
    """What identifies a trial: its protocol's id, its treatment's hash, its seed."""

    protocol: str
    treatment: str
    seed: int


def select(settings: TrialSettings, names: Iterable[str]) -> dict[str, Any]:
    """Return the settings with these dotted names as a flat dict."""
    return {name: attrgetter(name)(settings) for name in names}


def treatment_of(settings: TrialSettings, precision: str) -> dict[str, object]:
    """Return the treatment as a flat dict, without the seed; ``precision`` is the one really used.

    Settings of :data:`OLD_DEFAULTS` are left out if they have their former value, so that stored treatments of earlier
    versions stay equal. If the amount of text is limited, ``data.split_seed``, which draws it, is included.
    """
    decided = {"freeze.embeddings": settings.freeze.freezes_embeddings, "train.precision": precision}
    drawn = ("data.split_seed",) if settings.data.max_train_examples is not None else ()
    known = select(settings, (*TREATMENT, *drawn)) | decided
    return without_defaults(known)


def without_defaults(values: Mapping[str, object]) -> dict[str, object]:
    """Drop the settings of :data:`OLD_DEFAULTS` that have the value of earlier versions."""
    return {name: value for name, value in values.items() if name not in OLD_DEFAULTS or value != OLD_DEFAULTS[name]}


def value_of(treatment: Mapping[str, object], name: str) -> object:
    """Return a setting of a treatment; if it is missing there, its value in earlier versions."""
    return treatment.get(name, OLD_DEFAULTS.get(name))


def has_choices_of(treatment: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    """Return whether two treatments agree in all settings of :data:`BASELINE_GROUPS`."""
    keys = {key for key in (*wanted, *OLD_DEFAULTS) if key.startswith(BASELINE_GROUPS)}
    return all(value_of(treatment, key) == value_of(wanted, key) for key in keys)


def trial_identity(protocol: ProtocolIdentity, settings: TrialSettings, precision: str) -> TrialIdentity:
    """Return the identity of a trial with these settings; ``precision`` is the one really used."""
    return TrialIdentity(protocol.id, short_hash(treatment_of(settings, precision)), settings.seed)


def point_key(settings: TrialSettings) -> str:
    """Return a key that is equal for points of a search space that give the same trial."""
    treatment = sorted(treatment_of(settings, settings.train.precision).items())
    return short_hash([select(settings, (*SOURCES, *METRIC, *SEED, *ENGINE)), treatment])


def preparation_key(settings: TrialSettings) -> str:
    """Return a key that is equal for trials that can share encoded text, resolved model and engine."""
    same = select(settings, (*SOURCES, *METRIC, *TREATMENT_OF_INPUT, *ENGINE, *DEVICE, "data.slice_column"))
    return short_hash([same, settings.adapter.name != "none" or settings.freeze.policy == "auto"])  # needs Trainer


def fusion_key(settings: TrialSettings) -> str:
    """Return a key that is equal for trials that the fused engine can train together."""
    shared = (*SOURCES, *TREATMENT_OF_INPUT, *TREATMENT_OF_LOOP, *ENGINE, *DEVICE, *SPEED)
    return short_hash(select(settings, shared))


def checkpoint_identity(settings: TrialSettings, weights: str, text: str, precision: str) -> dict[str, object]:
    """Return, as a flat dict, all that must be equal for a resumed checkpoint to give the same result.

    ``weights`` and ``text`` are fingerprints of the initial weights and the token ids, ``precision`` is the one
    really used.
    """
    names = [name for name in (*TREATMENT, *METRIC, *SEED, *ENGINE) if name != TEXT_AMOUNT]  # covered by ``text``
    named = without_defaults(select(settings, names))
    return named | {"model": weights, "data": text, "train.precision": precision}


def short_hash(value: object) -> str:
    """Return twelve hexadecimal digits of the sha256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:12]
