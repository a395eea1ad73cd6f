"""The one device that a trial runs on: which, in what precision, and what it holds."""

from __future__ import annotations

import gc
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import torch
from torch.utils.benchmark import Timer

from distilbench.settings import require

log = logging.getLogger(__name__)


def resolve_device(name: str, setting: str = "engine.device") -> torch.device:
    """Return the device that ``setting`` names; ``auto`` takes CUDA, else MPS, else the CPU.

    CUDA means the first visible device, always exactly one: with ``cuda:2`` the others are hidden, since Trainer takes
    the first that it sees. Raises :class:`SettingsError` for a device that this machine, or this build of torch, does
    not have.
    """
    name, _, index = name.partition(":")
    if index:
        _show_only(int(index))
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, is_there in present.items() if is_there]  # the fastest first
    allowed = f"one of auto, {', '.join(there)} on this machine (torch {torch.__version__})"
    require(name in ("auto", *there), setting, allowed, name, f"use {setting}=auto")
    chosen = there[0] if name == "auto" else name
    return torch.device("cuda", 0) if chosen == "cuda" else torch.device(chosen)


@cache
def _show_only(index: int) -> None:
    """Hide all CUDA devices but one from this process, which has to come before it starts CUDA."""
    gpus = visible_gpus()
    found = f"cuda:0 to cuda:{len(gpus) - 1}" if gpus else "none"
    require(index < len(gpus), "engine.device", f"a CUDA device that this process sees ({found})", f"cuda:{index}",
            "CUDA_VISIBLE_DEVICES says which it sees; or use engine.device=auto")  # fmt: skip
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index]


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES names (a person, Slurm and Ray set it), else the numbers of all of the host.

    Does not start CUDA in the process, after which the variable would say nothing any more.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [gpu.strip() for gpu in given.split(",") if gpu.strip()]


def resolve_precision(name: str, device: torch.device) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``; ``auto`` is bf16 on a CUDA device that has it, fp32 elsewhere.

    Weights and optimizer state stay in float32; bf16 and fp16 mean autocast. Raises :class:`SettingsError` for a
    precision that the device lacks.
    """
    allowed = _precisions(device)
    if name == "auto":
        return "bf16" if device.type == "cuda" and "bf16" in allowed else "fp32"
    require(name in allowed, "train.precision", f"one of auto, {', '.join(allowed)} on this device ({device.type})",
            name, "use train.precision=auto")  # fmt: skip
    if name == "bf16" and not has_native_bf16(device):
        _warn_of_slow_bf16()
    return name


@cache
def _warn_of_slow_bf16() -> None:
    """Say once what bfloat16 costs here: on a Zen 3, with AVX2 alone, 130 times the time of float32."""
    squares = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fp32, bf16 = (Timer("a @ a", globals={"a": square}).timeit(1).mean for square in squares)
    log.warning(
        "train.precision=bf16: this CPU has no bfloat16 instructions, and takes %.3g times as long for a product as in "
        "float32, which train.precision=auto takes",
        bf16 / fp32,
    )


def has_native_bf16(device: torch.device) -> bool:
    """Say whether the device has instructions for bfloat16; a CPU without them imitates it, any other lacks it."""
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return any(flags.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    return "bf16" in _precisions(device)


def _precisions(device: torch.device) -> tuple[str, ...]:
    """Return what each kind of device computes natively; emulated bf16 (before Ampere) would be slower than fp32."""
    if device.type == "cpu":
        return ("fp32", "bf16")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return ("fp32", "bf16", "fp16")
    return ("fp32", "fp16")


def describe_device(device: torch.device) -> str:
    """Name the device as times are compared by: the GPU's model, or the CPU's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU"
    told = Path("/proc/cpuinfo")  # Linux states the model, others the architecture
    found = re.search(r"^model name\s*:\s*(.+)$", told.read_text(), re.MULTILINE) if told.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of :func:`peak_memory` where the device keeps one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return bytes: CUDA's peak since :func:`reset_peak_memory`, elsewhere what is held now.

    That is the driver's allocation on MPS and the process's resident set on the CPU; sample it to learn a peak.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(psutil.Process().memory_info().rss)


_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|FORK_LAUNCHED|MPI_LOCAL(RANKID|NRANKS)"
    r"|(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|TORCHELASTIC|OMPI|PMI|PMIX|MV2)_\w+"
)
"""Variables in which torchrun, accelerate, MPI and notebooks tell a process that it is one of several."""


@contextmanager
def single_process() -> Iterator[None]:
    """Hide what a launcher left in the environment: accelerate would wait for processes that are not there.

    Also hidden is what would change a trial behind its settings (``ACCELERATE_MIXED_PRECISION``, ``..._TORCH_DEVICE``).
    """

    def take_away() -> dict[str, str]:
        return {name: os.environ.pop(name) for name in list(os.environ) if _LAUNCHER.fullmatch(name)}

    hidden = take_away()
    try:
        yield
    finally:
        take_away()  # what accelerate set in the meantime
        os.environ.update(hidden)


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Leave what was there before out of garbage collections: 0.25-0.5 s each for the libraries' objects alone."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_memory() -> None:
    """Give back what a finished or failed trial held, so that the next one finds it free."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def driver_version(device: torch.device) -> str | None:
    """Return the version of a GPU's driver as ``nvidia-smi`` tells it; None where there is nothing to ask."""
    command = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    return (said.stdout.splitlines() or [""])[0].strip() or None
