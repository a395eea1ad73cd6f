"""What a trial begins with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import torch

from distilbench.trials import prepared


def test_a_checkout_that_runs_without_being_installed_has_an_unknown_version(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    assert torch.__version__.startswith(prepared.version_of("torch"))
    monkeypatch.setattr(prepared, "version", missing)
    assert prepared.version_of("distilbench") == "unknown"
