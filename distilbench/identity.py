"""By what two trials are the same: every key is a selection of the tables below, and each setting stands in one table.

A new setting of a trial has to be placed; ``tests/test_identity.py`` fails for one that is in no table, or in two.
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
"""Where weights and text come from; a protocol has what was really found there instead."""

AMOUNT = "data.max_train_examples"
"""How much of the pool is trained on: the one setting of the data that is treatment, and no part of the protocol."""

METRIC = ("train.metric",)
"""What keeps an epoch and picks a winner: with the sources, the protocol."""

ADDED: dict[str, object] = {
    "data.split_seed": 0,
    **dict.fromkeys((AMOUNT, "train.patience", *_of("adapter", "rank alpha dropout"))),
    "freeze.policy": "depth",
    "adapter.name": "none",
    "optim.layer_decay": 1.0,
    "train.label_smoothing": 0.0,
    "train.class_weights": "none",
}
"""Treatment that earlier versions did not have: it stands in a trial's treatment where it is not what it was then."""

CHOICES = ("freeze.", "adapter.", "scheduler.", "optim.")
"""Beginnings of what an experiment, or a baseline, chooses as a whole."""

TREATMENT_OF_INPUT = (AMOUNT, "train.max_length", "train.precision")
"""Treatment that decides what is prepared before the first step."""

TREATMENT_OF_LOOP = (
    *_of("freeze", "policy layers embeddings dropout"),
    *_of("adapter", "name rank alpha dropout"),
    *_of("train", "epochs batch_size eval_steps label_smoothing class_weights"),
    "optim.name",
)
"""Treatment that shapes the steps: one for all trials that train at once."""

TREATMENT_OF_STEP = (
    *_of("scheduler", "name warmup_ratio warmup_steps"),
    *_of("optim", "lr layer_decay weight_decay max_grad_norm beta1 beta2 eps momentum"),
    "train.patience",
)
"""Treatment of which each trial has its own beside others too: numbers in a step, and when it ends."""

SEED = ("seed",)

ENGINE = ("engine.name",)

DEVICE = ("engine.device",)

SPEED = (*_of("train", "micro_batch_size eval_batch_size logging_steps"), "data.slice_column")
"""What changes speed, memory and records alone, and yet is one for all trials that train at once."""

OWN = (*_of("train", "checkpoints resume"), *_of("output", "dir save_model"), "adapter.merge")
"""Where a trial writes and what it keeps: part of no key."""

TABLES = (SOURCES, METRIC, TREATMENT_OF_INPUT, TREATMENT_OF_LOOP, TREATMENT_OF_STEP, SEED, ENGINE, DEVICE, SPEED, OWN)

TREATMENT = (*TREATMENT_OF_LOOP, *TREATMENT_OF_STEP, *TREATMENT_OF_INPUT)
"""What a sweep may vary within a protocol."""

SWEEP = (*SOURCES, *METRIC, *TREATMENT, *SEED)
"""What a sweep fixes where it does not vary it, and must still have when it is continued."""


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
        """Return one line for people, which says so where this stands in for something else."""
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
        """A hash of contents, not of names: the same text from two places is the same protocol."""
        return short_hash((self.model.fingerprint, self.data.fingerprint, self.metric, self.selection_split,
                           self.report_split))  # fmt: skip


@dataclass(frozen=True)
class TrialIdentity:
    """What names one trial among all: its protocol's id, its treatment's hash, its seed."""

    protocol: str
    treatment: str
    seed: int


def select(settings: TrialSettings, names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of these dotted names, flat."""
    return {name: attrgetter(name)(settings) for name in names}


def treatment_of(settings: TrialSettings, precision: str) -> dict[str, object]:
    """Return what a sweep may vary, flat and without the seed; ``precision`` is the one really used.

    What earlier versions did not have stands in it where it is another than theirs, so that a treatment stored by them
    stays the same. With an amount of text goes the seed that draws it: the protocol has the pool alone.
    """
    decided = {"freeze.embeddings": settings.freeze.freezes_embeddings, "train.precision": precision}
    drawn = ("data.split_seed",) if settings.data.max_train_examples is not None else ()
    known = select(settings, (*TREATMENT, *drawn)) | decided
    return without_defaults(known)


def without_defaults(values: Mapping[str, object]) -> dict[str, object]:
    """Return settings without those of :data:`ADDED` that are what they were in earlier versions."""
    return {name: value for name, value in values.items() if name not in ADDED or value != ADDED[name]}


def value_of(treatment: Mapping[str, object], name: str) -> object:
    """Return a setting of a treatment; one that does not stand there is what it was in earlier versions."""
    return treatment.get(name, ADDED.get(name))


def has_choices_of(treatment: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    """Whether a treatment has the same :data:`CHOICES` as another."""
    keys = {key for key in (*wanted, *ADDED) if key.startswith(CHOICES)}
    return all(value_of(treatment, key) == value_of(wanted, key) for key in keys)


def trial_identity(protocol: ProtocolIdentity, settings: TrialSettings, precision: str) -> TrialIdentity:
    """Return what names a trial of these settings; ``precision`` is the one really used."""
    return TrialIdentity(protocol.id, short_hash(treatment_of(settings, precision)), settings.seed)


def point_key(settings: TrialSettings) -> str:
    """Return a key equal for points of a search space that would train the same trial."""
    treatment = sorted(treatment_of(settings, settings.train.precision).items())
    return short_hash([select(settings, (*SOURCES, *METRIC, *SEED, *ENGINE)), treatment])


def preparation_key(settings: TrialSettings) -> str:
    """Return a key equal for trials that can share their sources, encoded, and the engine."""
    same = select(settings, (*SOURCES, *METRIC, *TREATMENT_OF_INPUT, *ENGINE, *DEVICE, "data.slice_column"))
    return short_hash([same, settings.needs_trainer])


def fusion_key(settings: TrialSettings) -> str:
    """Return a key equal for trials that the fused engine can train at once."""
    shared = (*SOURCES, *TREATMENT_OF_INPUT, *TREATMENT_OF_LOOP, *ENGINE, *DEVICE, *SPEED)
    return short_hash(select(settings, shared))


def checkpoint_identity(settings: TrialSettings, weights: str, text: str, precision: str) -> dict[str, object]:
    """Return, flat, all that must be the same for a checkpoint to be continued to the same result.

    ``weights`` and ``text`` are fingerprints of the initial weights and the token numbers, ``precision`` is the one
    really used.
    """
    names = [name for name in (*TREATMENT, *METRIC, *SEED, *ENGINE) if name != AMOUNT]  # the text itself says it
    named = without_defaults(select(settings, names))
    return named | {"model": weights, "data": text, "train.precision": precision}


def short_hash(value: object) -> str:
    """Return twelve hexadecimal digits of the sha256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:12]
