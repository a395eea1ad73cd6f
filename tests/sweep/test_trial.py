"""A GPU for each process: a pure choice among names, held by locks, where there is none to be seen."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from distilbench.engines import device as engine_device
from distilbench.settings import SettingsError
from distilbench.sweep import trial
from distilbench.sweep.trial import claim_free, claim_gpu


def _claim_and_stay(folder, claimed, release):
    claimed.put(claim_free(["2", "5", "7"], folder))
    release.wait(60)


def test_processes_get_different_gpus_and_a_dead_ones_is_free_again(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    claimed, release = context.Queue(), context.Event()
    workers = [context.Process(target=_claim_and_stay, args=(tmp_path, claimed, release)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert {claimed.get(timeout=30) for _ in workers} == {"2", "5", "7"}
    assert claim_free(["2", "5", "7"], tmp_path) == "2"
    assert "all of 3 GPUs have a worker" in caplog.text
    for worker in workers:
        worker.kill()
        worker.join(30)
    assert claim_free(["2", "5", "7"], tmp_path) == "2"
    assert claim_free(["2", "5", "7"], tmp_path) == "5"


@pytest.mark.parametrize(("device", "given", "left"), [("auto", "3,4", "3"), ("cuda", "GPU-8a,GPU-9b", "GPU-8a"),
                                                       ("auto", "6", "6"), ("cuda:1", "3,4", "3,4"),
                                                       ("cpu", "3,4", "3,4"), ("auto", "", "")])  # fmt: skip
def test_what_a_scheduler_or_a_person_shows_is_respected(monkeypatch, tmp_path, device, given, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(trial.tempfile, "gettempdir", lambda: str(tmp_path))
    claim_gpu(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_a_device_by_number_is_one_of_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    show_only = engine_device._show_only.__wrapped__
    with pytest.raises(SettingsError, match=r"engine.device must be .* \(cuda:0 to cuda:2\), got .*cuda:3"):
        show_only(3)
    show_only(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
