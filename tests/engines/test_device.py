"""One device, chosen and named; precision that it really has."""

from __future__ import annotations

import logging
import mmap
import os

import pytest
import torch

from distilbench.engines import device
from distilbench.engines.device import (
    describe_device,
    has_native_bf16,
    peak_memory,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
)
from distilbench.settings import SettingsError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """Return ``machine(cuda=..., mps=..., bf16=..., flags=...)``: pretend that this machine has these."""

    def pretend(cuda=False, mps=False, bf16=False, flags=("avx2", "avx512_bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True) | {"amx_bf16": False})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    return pretend


@pytest.mark.parametrize(
    ("there", "chosen"),
    [({}, CPU), ({"cuda": True}, CUDA), ({"mps": True}, MPS), ({"cuda": True, "mps": True}, CUDA)],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(machine, there, chosen):
    machine(**there)
    assert resolve_device("auto") == chosen


@pytest.mark.parametrize(
    ("cpus", "given", "threads"), [(2, None, 2), (8, None, 4), (2, "4", 4)], ids=["fewer", "more", "told otherwise"]
)
def test_a_cpu_has_no_more_threads_than_a_container_allows(machine, monkeypatch, cpus, given, threads):
    machine()
    monkeypatch.setattr(device.loky, "cpu_count", lambda: cpus)
    monkeypatch.setattr("joblib.parallel.mp", None)  # no semaphores: joblib.cpu_count() would be 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    device._limit_threads.cache_clear()
    try:
        resolve_device("cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        device._limit_threads.cache_clear()


def test_the_cpu_is_always_to_be_had(machine):
    machine(cuda=True)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_in_one_line(machine, name):
    machine()
    with pytest.raises(SettingsError, match=rf"engine\.device .* auto, cpu .* got '{name}'; use engine.device=auto"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("on", "bf16", "name", "used"),
    [
        (CPU, False, "auto", "fp32"),
        (CPU, False, "bf16", "bf16"),
        (CUDA, True, "auto", "bf16"),
        (CUDA, False, "auto", "fp32"),
        (CUDA, False, "fp16", "fp16"),
        (CUDA, True, "fp32", "fp32"),
        (MPS, False, "auto", "fp32"),
    ],
)
def test_precision_is_what_the_device_has(machine, on, bf16, name, used):
    machine(bf16=bf16)
    assert resolve_precision(name, on) == used


@pytest.mark.parametrize(
    ("flags", "native"),
    [(["avx2", "avx512_f"], False), (["avx2", "avx512_bf16"], True), (["neon"], False), (["neon", "bf16"], True)],
)
def test_a_cpu_has_bf16_where_its_flags_say_so(machine, flags, native):
    machine(flags=flags)
    assert has_native_bf16(CPU) is native


@pytest.mark.parametrize("flags", [["avx2"], ["avx2", "avx512_bf16"]])
def test_bf16_by_name_on_a_cpu_without_it_is_done_after_one_line_of_what_it_costs(machine, caplog, flags):
    machine(flags=flags)
    device._warn_of_slow_bf16.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [resolve_precision("bf16", CPU) for _ in range(2)] == ["bf16", "bf16"]
        assert resolve_precision("auto", CPU) == "fp32"
    assert [("no bfloat16 instructions" in record.getMessage()) for record in caplog.records] == [True] * (
        len(flags) == 1
    )


@pytest.mark.parametrize(("on", "name"), [(CPU, "fp16"), (CUDA, "bf16"), (MPS, "bf16")])
def test_a_precision_that_the_device_lacks_is_refused_in_one_line(machine, on, name):
    machine()
    with pytest.raises(SettingsError, match=rf"train\.precision must be one of auto, fp32.*got '{name}'; use") as error:
        resolve_precision(name, on)
    assert "\n" not in str(error.value)


def test_the_cpu_is_described_by_model_and_threads():
    model, threads = describe_device(CPU).rsplit(", ", 1)
    assert threads == f"{torch.get_num_threads()} threads"
    assert model


def test_memory_on_the_cpu_is_the_resident_set():
    size = 256 * 2**20
    before = peak_memory(CPU)
    with mmap.mmap(-1, size) as ballast:  # pages of its own: the process may have freed others
        ballast.write(b"1" * size)
        grown = peak_memory(CPU) - before
    assert 0.9 < grown / size < 2.5, "the pages, and the bytes that fill them"


@pytest.mark.parametrize(
    ("said", "expected"),
    [("| NVIDIA-SMI 580.95.05      Driver Version: 580.95.05      CUDA Version: 13.0 |", "580.95.05"), ("", None)],
)
def test_the_drivers_version_is_what_nvidia_smi_says(tmp_path, monkeypatch, said, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert device.driver_version(torch.device("cuda", 0)) == expected
    assert device.driver_version(CPU) is None


def test_memory_that_an_earlier_trial_freed_does_not_count():
    """Small blocks stay in the process: the last one holds the heap's end."""
    blocks = [bytes(60_000) for _ in range(2_000)]
    last = blocks.pop()
    del blocks
    held = peak_memory(CPU)
    reset_peak_memory(CPU)
    assert held - peak_memory(CPU) > 60_000 * 1_000
    assert len(last) == 60_000
