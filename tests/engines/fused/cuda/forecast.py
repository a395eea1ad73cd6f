"""Forecast the time of a step on GPUs: a roofline bound per kernel launch, counted on meta tensors, without a GPU.

``python -m tests.engines.fused.cuda.forecast`` prints the table of docs/gpus.md; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from distilbench.bench.roofline import Machine
from distilbench.engines.fused import kernels
from distilbench.engines.fused.cuda.buckets import Bucket
from distilbench.engines.fused.cuda.graph_step import GraphSteps
from distilbench.engines.fused.cuda.optimizer import CapturableOptimizer
from distilbench.engines.fused.optimizer import StackedOptimizer, num_moments
from distilbench.engines.fused.params import FlatParamLayout, StackedWeights, Vocabulary
from distilbench.models.freezing import freeze
from distilbench.settings import FreezeSettings, OptimSettings

META = torch.device("meta")
BUCKET = Bucket(tokens=240, width=48, sentences=16)
"""The bucket to which most steps of SST-2 at batch 16 are padded; on average, 213 tokens are real."""
TOKENS, WORDS, POSITIONS, STEPS = 213, 11_572, 66, 12_630
"""For three epochs of SST-2: tokens per step, distinct tokens, longest sentence in tokens, steps."""
TILE = 64
"""Rows and columns of a matrix product per multiprocessor; with fewer tiles than multiprocessors, some are idle."""


@dataclass(frozen=True)
class Gpu:
    """A device: the rates that a program reaches, the number of multiprocessors, and the minimum time of a launch."""

    machine: Machine
    processors: int
    launch_seconds: float
    precision: str


GPUS = {
    # float32 rate as reached by the report's training; 80 % of the data sheet's 320 GB/s
    "T4": Gpu(Machine({"fp32": 4.9e12}, 256e9), 40, 3e-6, "fp32"),
    # an H200 was measured at 790 TFLOP/s and 4.3 TB/s, 80 and 90 % of its data sheet: assumed for the others too
    "A100": Gpu(Machine({"bf16": 250e12, "fp32": 15e12}, 1.8e12), 108, 2e-6, "bf16"),
    "H100": Gpu(Machine({"bf16": 790e12, "fp32": 50e12}, 3.0e12), 132, 2e-6, "bf16"),
    "H200": Gpu(Machine({"bf16": 790e12, "fp32": 50e12}, 4.3e12), 132, 2e-6, "bf16"),
}


@dataclass(frozen=True)
class Launched:
    """One kernel launch: bytes read and written, operations, and number of tiles."""

    name: str
    bytes: float
    operations: float = 0.0
    tiles: int = 1 << 30
    dtype: torch.dtype = torch.float32

    def bounds(self, gpu: Gpu) -> dict[str, float]:
        """Return the minimum seconds by each limit."""
        rate = gpu.machine.operations_per_second["bf16" if self.dtype == torch.bfloat16 else "fp32"]
        return {
            "launches": gpu.launch_seconds,
            "bytes": self.bytes / gpu.machine.bytes_per_second,
            "operations": self.operations / (rate * min(1.0, self.tiles / gpu.processors)),
        }


NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
"""Operations that allocate without a kernel launch; views launch nothing either."""
WRITING = {"copy_", "fill_", "zero_"}
"""Operations that do not read what they write to."""
BY_INDEX = {"gather", "index_select", "embedding", "scatter_add_", "scatter_add", "scatter", "take_along_dim"}
"""Operations that access only the indexed part of a table."""


class LaunchCounter(TorchDispatchMode):
    """Records what torch would launch, counting one launch per operation, or per tensor of some ``_foreach`` ones."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launched] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in NOTHING:
            return out
        read = args[1:] if name in WRITING else (args, {k: v for k, v in (kwargs or {}).items() if k != "out"})
        given = [t for t in tree_leaves(read) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        moved = _moved([*given, *made])
        if name in BY_INDEX:
            moved = 2 * _moved(made) if "scatter" not in name else 2 * _moved([given[-1]])
        operations, tiles = 0.0, 1 << 30
        if func.overloadpacket in flop_registry:
            operations = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            *batch, rows, columns = made[0].shape
            tiles = math.prod(batch) * -(-rows // TILE) * -(-columns // TILE)
        dtype, count = given[0].dtype if given else torch.float32, 1
        if name.startswith("_foreach") and not all(t.is_contiguous() for t in given):
            count = len(args[0])  # one launch per tensor if trials are not contiguous
        self.launches += [Launched(name, moved / count, operations, tiles, dtype)] * count
        return out


def _moved(tensors: list[torch.Tensor]) -> float:
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)


@contextmanager
def counted() -> Iterator[list[Launched]]:
    """Record the launches in the block, by torch and by our own kernels."""
    counter = LaunchCounter()

    def note(launch: kernels.Launch) -> None:
        given = launch.arguments
        moved = _moved([t for t in given.values() if isinstance(t, torch.Tensor)])
        if launch.kernel == "adamw":  # it also writes these three
            moved += _moved([given["param"], given["mean"], given["square"]])
        if given.get("compute_grad") is not None:  # one of two gradients is read
            moved -= 4 * given["compute_grad"].numel()
        if launch.kernel == "add_rows":  # it accesses only these rows of the table
            moved = 3 * _moved([given["values"]])
        counter.launches.append(Launched(launch.kernel, moved))

    accepted = patch.object(kernels, "can_run", lambda work, *details: True)
    with accepted, patch.object(kernels.Launch, "run", note), counter:
        yield counter.launches


def step_launches(layers: int, trials: int, precision: str) -> list[Launched]:
    """Return the launches of a recorded step of DistilBERT on SST-2, with frozen ``layers`` and stacked ``trials``.

    The frozen prefix, which is computed for 64 steps at a time, counts as one launch of its matrix products.
    """
    with META:
        model = DistilBertForSequenceClassification(DistilBertConfig())
    freezing = FreezeSettings(layers, "auto", True, "depth")
    freeze(model, freezing)
    layout = FlatParamLayout(model, Vocabulary(np.arange(WORDS), POSITIONS))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = layout.frozen_weights(dict(model.named_parameters()), META, torch.float32, dtype)
    flat_params = torch.empty(trials, layout.size, device=META)
    weights = StackedWeights(layout, frozen, dtype, flat_params)
    optim = [OptimSettings("adamw", 2e-5, 0.01, 1.0, 0.9, 0.999, 1e-8, 0.0, 1.0)] * trials
    moments = [torch.empty_like(flat_params) for _ in range(num_moments(optim))]
    prefix = SimpleNamespace(zeros_for=lambda batch: torch.empty(*batch.ids.shape, 768, device=META))
    losses = torch.empty(trials, device=META)
    optimizer = CapturableOptimizer(StackedOptimizer(weights, moments, optim), np.ones((1, trials)))
    batches, loss = SimpleNamespace(seeds=(1,)), torch.nn.CrossEntropyLoss(reduction="none")
    step = GraphSteps(optimizer, prefix if layers else None, batches, loss, losses, losses.clone())
    step._buffers_of(BUCKET)
    with counted() as launches:
        step._step(BUCKET)
    encoder = model.distilbert.transformer.layer
    matrices = [p for i in range(layers) for p in encoder[i].parameters() if p.dim() == 2]
    prefix = Launched("prefix", 0, 2 * TOKENS * sum(p.numel() for p in matrices), dtype=dtype)
    return [*launches, prefix] if layers else launches


@dataclass(frozen=True)
class Forecast:
    """The forecast for a step: launches, milliseconds, and the share of the time for which each bound decides."""

    launches: int
    milliseconds: float
    shares: dict[str, float]


def forecast(gpu: Gpu, launches: list[Launched]) -> Forecast:
    """Sum the longest bound of each launch."""
    spent = {"launches": 0.0, "bytes": 0.0, "operations": 0.0}
    for launch in launches:
        bounds = launch.bounds(gpu)
        longest = max(bounds, key=bounds.__getitem__)
        spent[longest] += bounds[longest]
    total = sum(spent.values())
    return Forecast(len(launches), 1000 * total, {bound: seconds / total for bound, seconds in spent.items()})


def table() -> list[str]:
    """Return the rows of the table in docs/gpus.md."""
    rows = []
    for layers in (0, 3):
        for trials in (1, 32):
            for name, gpu in GPUS.items():
                if (name, trials) == ("T4", 32):
                    continue  # its 16 GB hold about eight
                f = forecast(gpu, step_launches(layers, trials, gpu.precision))
                shares = ", ".join(f"{bound} {share:.0%}" for bound, share in f.shares.items() if share >= 0.005)
                rows.append(
                    f"| {name}, {gpu.precision} | {layers} | {trials} | {f.launches} | {f.milliseconds:.2f} "
                    f"| {f.milliseconds * STEPS / 1000:.0f} | {shares} |"
                )
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
