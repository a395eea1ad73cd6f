"""Names of settings in tables, on the page and in MLflow: what differs from the baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, cast

from omegaconf import OmegaConf

from distilbench.cli import format_override
from distilbench.identity import BASELINE_GROUPS, TEXT_AMOUNT, value_of
from distilbench.settings import CONF, DataSettings, ModelSettings

_KEY_ORDER = (
    "experiment", "freeze.policy", "freeze.layers", "freeze.", "adapter.name", "adapter.", "scheduler.name",
    "optim.name", "optim.lr", "data.max_train_examples", "train.epochs", "optim.weight_decay", "",
)  # fmt: skip
"""Prefixes of keys, most informative first; other keys follow, and the seed is last."""

Values = dict[str, object]

CHOICES = ("experiment", *(group.rstrip(".") for group in BASELINE_GROUPS))
"""Groups whose choices are recorded with a trial, since they name it."""

_NAMED_GROUPS = ("adapter", "scheduler")
"""Groups whose name implies their other settings, which are named only if they vary for one name."""


def sort_keys(keys: Sequence[str]) -> list[str]:
    """Sort keys, most informative first; a group as a whole takes the position of its name."""
    places = {key: next(i for i, start in enumerate(_KEY_ORDER) if f"{key}.name".startswith(start)) for key in keys}
    return sorted(keys, key=lambda key: (key == "seed", places[key], key))


def varying_keys(treatments: Sequence[Mapping[str, object]], typed: Collection[str] = ()) -> list[str]:
    """Return the keys that differ, most informative first, without those that another key implies in all treatments.

    ``freeze.layers`` may imply ``freeze.embeddings``; the name of an adapter or scheduler may imply those of its
    settings that were not ``typed``.
    """

    def follows(key: str) -> bool:
        if key == "freeze.embeddings":
            return all(map(embeddings_are_auto, treatments))
        group = key.partition(".")[0]
        values = {(value_of(t, f"{group}.name"), repr(t.get(key))) for t in treatments}
        is_implied = key != f"{group}.name" and key not in typed and len(values) == len({name for name, _ in values})
        return group in _NAMED_GROUPS and is_implied

    keys = sort_keys(list({key for treatment in treatments for key in treatment}))
    return [key for key in keys if len({repr(value_of(t, key)) for t in treatments}) > 1 and not follows(key)]


def embeddings_are_auto(treatment: Mapping[str, object]) -> bool:
    """Return whether ``freeze.embeddings`` has the value that ``auto`` gives for these layers or this policy."""
    depth, embeddings = treatment.get("freeze.layers") != 0, treatment.get("freeze.embeddings")
    return "freeze.policy" in treatment or embeddings in (None, depth)


def varying_values(treatments: Sequence[Mapping[str, object]], choices: Sequence[Mapping[str, object]]) -> list[Values]:
    """Return, for each treatment, the values that tell it from the others.

    ``choices`` are those of :func:`distilbench.composition.typed_choices`, empty for a trial of an earlier version. The
    choice of a group (``freeze=layers3``) replaces the settings that it brought along, if that makes names no longer.
    """
    changed = {key for one in choices for key in one}
    keys = varying_keys(treatments, changed)
    for group in CHOICES if treatments else ():
        own = [key for key in keys if key.startswith("" if group == "experiment" else f"{group}.")]
        chosen = [one.get(group, ...) for one in choices]
        left = [
            key
            for key in own
            if key in changed
            or len({*zip(chosen, (repr(t.get(key)) for t in treatments), strict=True)}) > len({*chosen})
        ]
        if ... not in chosen and len({*chosen}) > 1 and len(left) < len(own):
            keys = sort_keys([group, *left, *(key for key in keys if key not in own)])
    return [
        {key: one[key] if key in CHOICES else value_of(treatment, key) for key in keys}
        for treatment, one in zip(treatments, choices, strict=True)
    ]


def name_of(values: Mapping[str, object], baseline: Mapping[str, object] = {}, title: str = "") -> str:
    """Return a name for ``values`` with the last part of each key: ``freeze=bias scheduler=cosine lr=3e-05``.

    Choices (:func:`is_choice`) that equal the ``baseline``'s are left out, and behind a ``title`` the experiment is:
    ``baseline: layers=0``. Keys with the same last part are written in full.
    """
    ends = Counter(map(_end, values))
    parts = []
    for key in sort_keys([*values]):
        is_shared = is_choice(key) and baseline.get(key, ...) == values[key]
        if is_shared or (key == "experiment" and (title or values[key] is None)):
            continue
        told = "" if key == "experiment" else f"{_end(key) if ends[_end(key)] == 1 else key}="
        parts.append(f"{told}{_short(values[key])}")
    return ": ".join(filter(None, (title, " ".join(parts))))


def is_choice(key: str) -> bool:
    """Return whether a baseline resets this key, one of :data:`BASELINE_GROUPS`; it shares all others with a trial."""
    return f"{key}.".startswith((*BASELINE_GROUPS, "experiment."))


def source_overrides(config_yaml: str) -> list[str]:
    """Return the overrides that select a run's protocol, from its ``config.yaml``: ``data.source=files ...``.

    Defaults are omitted, and so is the amount of text, which belongs to the treatment.
    """
    config, overrides = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(config_yaml))), []
    for group, schema, default in (("model", ModelSettings, "distilbert"), ("data", DataSettings, "sst2")):
        file = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / group / f"{default}.yaml")))
        usual = {f.name: None if f.default is MISSING else f.default for f in fields(schema)} | file | {"fallback": {}}
        for key, value in config[group].items():
            is_told = f"{group}.{key}" != TEXT_AMOUNT and not isinstance(value, dict)  # a dict is a fallback
            overrides += [format_override(f"{group}.{key}", value)] if is_told and value != usual[key] else []
    metric = config["train"]["metric"]
    return overrides + ([format_override("train.metric", metric)] if metric != "accuracy" else [])


def _end(key: str) -> str:
    return key.removesuffix(".name").removesuffix(".policy").rpartition(".")[2]


def _short(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)
