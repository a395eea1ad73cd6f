"""Fixtures: an empty hub cache per test, and a tiny checkpoint."""

from __future__ import annotations

import pytest

from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.models.resolve import _resolve_once
from tests.models.made_checkpoints import LABELS, random


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """Provide an empty hub cache, with no models resolved before."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    _resolve_once.cache_clear()
    yield
    _resolve_once.cache_clear()


@pytest.fixture
def checkpoint(tmp_path):
    """Return the directory of a tiny DistilBERT with two layers and two labels, with its tokenizer."""
    export_model(build_model(random(), LABELS, 0), load_tokenizer(random()), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
