"""The one device that a trial runs on: its selection, precision, description and memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from joblib.externals import loky
from torch.utils import collect_env

from distilbench.settings import require

log = logging.getLogger(__name__)


def resolve_device(name: str, setting: str = "engine.device") -> torch.device:
    """Return the device called ``name``; ``auto`` selects CUDA, else MPS, else the CPU.

    CUDA always means one device, the first visible one: ``cuda:2`` hides the others, since Trainer uses the first that
    it sees. Raises :class:`SettingsError`, naming ``setting``, for a device that this machine or build of torch lacks.
    """
    name, _, index = name.partition(":")
    if index:
        _show_only(int(index))
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, is_there in present.items() if is_there]  # fastest first
    allowed = f"one of auto, {', '.join(there)} on this machine (torch {torch.__version__})"
    require(name in ("auto", *there), setting, allowed, name, f"use {setting}=auto")
    chosen = there[0] if name == "auto" else name
    if chosen == "cpu":
        _limit_threads()
    return torch.device("cuda", 0) if chosen == "cuda" else torch.device(chosen)


@cache
def _show_only(index: int) -> None:
    """Hide all CUDA devices but one from this process; must be called before CUDA is initialized."""
    gpus = visible_gpus()
    found = f"cuda:0 to cuda:{len(gpus) - 1}" if gpus else "none"
    require(index < len(gpus), "engine.device", f"a CUDA device that this process sees ({found})", f"cuda:{index}",
            "CUDA_VISIBLE_DEVICES says which it sees; or use engine.device=auto")  # fmt: skip
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index]


@cache
def _limit_threads() -> None:
    """Limit torch's threads to a container's CPU quota, which torch itself ignores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), loky.cpu_count()))


def visible_gpus() -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES (set by the user, Slurm or Ray), else the indices of all devices.

    Does not initialize CUDA, after which changes of the variable would have no effect.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [gpu.strip() for gpu in given.split(",") if gpu.strip()]


def resolve_precision(name: str, device: torch.device) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``; ``auto`` is bf16 on a CUDA device that supports it, fp32 elsewhere.

    Weights and optimizer state stay in float32; bf16 and fp16 mean autocast. Raises :class:`SettingsError` for a
    precision that the device does not support.
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
    """Measure and log once how slow bfloat16 is on this CPU: 130 times slower than float32 on a Zen 3 (AVX2 only)."""
    from torch.utils.benchmark import Timer  # imports setuptools: 0.4 s of every start

    squares = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fp32, bf16 = (Timer("a @ a", globals={"a": square}).timeit(1).mean for square in squares)
    log.warning(
        "train.precision=bf16: this CPU has no bfloat16 instructions, and takes %.3g times as long for a product as in "
        "float32, which train.precision=auto takes",
        bf16 / fp32,
    )


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 instructions; without them, only a CPU can emulate the type."""
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return any(flags.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    return "bf16" in _precisions(device)


def _precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions allowed on ``device``. CUDA devices before Ampere emulate bf16, slower than fp32."""
    if device.type == "cpu":
        return ("fp32", "bf16")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return ("fp32", "bf16", "fp16")
    return ("fp32", "fp16")


def describe_device(device: torch.device) -> str:
    """Return the name under which times are compared: the GPU's model, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU"
    told = Path("/proc/cpuinfo")  # Linux only; elsewhere, platform gives the architecture
    found = re.search(r"^model name\s*:\s*(.+)$", told.read_text(), re.MULTILINE) if told.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that :func:`peak_memory` returns; on a CPU, what earlier trials freed goes back to the system.

    Otherwise it counts: MiniLM on SST-2 took 955 to 1,126 MiB by its place in a sweep, now 973 to 1,039 (2026-11-27).
    """
    if device.type == "cuda":
        torch.cuda.init()  # a process that has not used the device yet has no peak to reset
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Return bytes: on CUDA the peak since :func:`reset_peak_memory`, elsewhere the current use.

    That is the driver's allocation on MPS and the process's resident set on the CPU; sample it to find the peak.
    """
    if device.type == "cuda":
        # max_memory_allocated() would collect all statistics, for each trial of a group at each log record
        return int(torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"])
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(psutil.Process().memory_info().rss)


_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|FORK_LAUNCHED|MPI_LOCAL(RANKID|NRANKS)"
    r"|(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|TORCHELASTIC|OMPI|PMI|PMIX|MV2)_\w+"
)
"""Environment variables with which torchrun, accelerate, MPI and notebooks configure a process of a group."""


@contextmanager
def single_process() -> Iterator[None]:
    """Hide a launcher's environment variables, with which accelerate would wait for processes that don't exist.

    Variables that would override a trial's settings (``ACCELERATE_MIXED_PRECISION``, ``..._TORCH_DEVICE``) as well.
    """

    def take_away() -> dict[str, str]:
        return {name: os.environ.pop(name) for name in list(os.environ) if _LAUNCHER.fullmatch(name)}

    hidden = take_away()
    try:
        yield
    finally:
        take_away()  # variables that accelerate has set meanwhile
        os.environ.update(hidden)


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Exclude existing objects from garbage collection: the libraries' objects alone take 0.25-0.5 s per collection."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy ``array`` to the device; a GPU does so in its own time, without being waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def release_memory() -> None:
    """Free the memory of a finished or failed trial for the next one."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def driver_version(device: torch.device) -> str | None:
    """Return the version of an NVIDIA driver as reported by ``nvidia-smi``, or None."""
    version: str | None = collect_env.get_nvidia_driver_version(collect_env.run) if device.type == "cuda" else None
    return version
