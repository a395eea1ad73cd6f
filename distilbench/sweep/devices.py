"""A GPU for each process that trains trials of sweeps: the first one that no other process of this host has taken."""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from distilbench.engines.device import visible_gpus

log = logging.getLogger(__name__)

_held: list[FileLock] = []
"""Kept for as long as the process lives; the system lets go of a lock whose holder dies."""


def claim_gpu(device: str) -> None:
    """Leave this process one GPU, before CUDA starts in it, where ``engine.device`` names none and several are seen."""
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = claim_free(gpus, Path(tempfile.gettempdir()))


def claim_free(gpus: Sequence[str], folder: Path) -> str:
    """Lock, in ``folder``, the first GPU that is free; the first of all where none is, which a line tells."""
    for gpu in gpus:
        lock = FileLock(folder / f"distilbench-{getpass.getuser()}-gpu-{gpu}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        return gpu
    log.warning("all of %d GPUs have a worker: this one shares GPU %s", len(gpus), gpus[0])
    return gpus[0]
