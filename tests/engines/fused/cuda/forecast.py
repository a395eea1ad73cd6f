"""What a step should take on GPUs that are not there: each launch by its bound, counted on tensors without contents.

``python -m tests.engines.fused.cuda.forecast`` prints the table of docs/gpus.md, which a test compares with this.
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
from distilbench.engines.fused.optimizer import StackedOptimizer, num_moments
from distilbench.engines.fused.params import FlatParamLayout, StackedWeights, Vocabulary
from distilbench.engines.optimization import Loss
from distilbench.models.freezing import freeze
from distilbench.settings import FreezeSettings, OptimSettings

META = torch.device("meta")
BUCKET = Bucket(tokens=240, width=48, sentences=16)
"""What most steps of SST-2 at batch 16 are filled up to; 213 tokens are real in the mean."""
TOKENS, WORDS, POSITIONS, STEPS = 213, 11_572, 66, 12_630
"""Of SST-2's three epochs: tokens a step, words that occur, the longest sentence, steps."""
TILE = 64
"""Rows and columns of a product that one multiprocessor takes at a time; fewer tiles than those leave some idle."""


@dataclass(frozen=True)
class Gpu:
    """A device: its rates as far as a program reaches them, multiprocessors, and what a launch takes at least."""

    machine: Machine
    processors: int
    launch_seconds: float
    precision: str


GPUS = {
    # float32 as the report's own training reached it, four fifths of the data sheet's 320 GB/s
    "T4": Gpu(Machine({"fp32": 4.9e12}, 256e9), 40, 3e-6, "fp32"),
    # an H200 was seen to reach 790 TFLOP/s and 4.3 TB/s, 80 and 90 % of its data sheet: taken of the others as well
    "A100": Gpu(Machine({"bf16": 250e12, "fp32": 15e12}, 1.8e12), 108, 2e-6, "bf16"),
    "H100": Gpu(Machine({"bf16": 790e12, "fp32": 50e12}, 3.0e12), 132, 2e-6, "bf16"),
    "H200": Gpu(Machine({"bf16": 790e12, "fp32": 50e12}, 4.3e12), 132, 2e-6, "bf16"),
}


@dataclass(frozen=True)
class Launched:
    """One launch: bytes read and written, operations, and in how many tiles it is cut."""

    name: str
    bytes: float
    operations: float = 0.0
    tiles: int = 1 << 30
    dtype: torch.dtype = torch.float32

    def bounds(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that it takes at least, by what limits it."""
        rate = gpu.machine.operations_per_second["bf16" if self.dtype == torch.bfloat16 else "fp32"]
        return {
            "launches": gpu.launch_seconds,
            "bytes": self.bytes / gpu.machine.bytes_per_second,
            "operations": self.operations / (rate * min(1.0, self.tiles / gpu.processors)),
        }


NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
"""Operations that make room and start nothing; views do not either."""
WRITING = {"copy_", "fill_", "zero_"}
"""Operations that do not read what they write to."""
BY_INDEX = {"gather", "index_select", "embedding", "scatter_add_", "scatter_add", "scatter", "take_along_dim"}
"""Operations that touch of a table what is asked for."""


class LaunchCounter(TorchDispatchMode):
    """Notes what torch would launch; a layer norm's gradient takes two launches where it is trained, all else one."""

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
            count = len(args[0])  # one after the other, where trials lie apart
        self.launches += [Launched(name, moved / count, operations, tiles, dtype)] * count
        return out


def _moved(tensors: list[torch.Tensor]) -> float:
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)


@contextmanager
def counted() -> Iterator[list[Launched]]:
    """Count what is launched within, by torch and by our kernels."""
    counter = LaunchCounter()

    def note(launch: kernels.Launch) -> None:
        given = launch.arguments
        moved = _moved([t for t in given.values() if isinstance(t, torch.Tensor)])
        if launch.kernel == "adamw":  # it writes these three as well, and of two gradients reads one
            moved += _moved([given["param"], given["mean"], given["square"]])
            if given["compute_grad"] is not None:
                moved -= 4 * given["compute_grad"].numel()
        counter.launches.append(Launched(launch.kernel, moved))

    accepted = patch.object(kernels, "runs", lambda work, *details: True)
    with accepted, patch.object(kernels.Launch, "run", note), counter:
        yield counter.launches


def step_launches(layers: int, trials: int, precision: str) -> list[Launched]:
    """Count a recorded step of DistilBERT on SST-2 with so many frozen ``layers``, of ``trials`` in one order.

    The frozen prefix, whose pass over 64 steps comes before them, counts as one launch of its products.
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
    prefix = SimpleNamespace(depth=layers, empty=lambda batch: torch.empty(*batch.ids.shape, 768, device=META))
    losses = torch.empty(trials, device=META)
    step = GraphSteps(
        weights, StackedOptimizer(weights, moments, optim), prefix if layers else None, SimpleNamespace(seeds=(1,)),
        np.ones((1, trials)), losses, losses.clone(), Loss(0.0, None), 0, None,
    )  # fmt: skip
    step._buffers_of(BUCKET)
    with counted() as launches:
        step._step(BUCKET)
    encoder = model.distilbert.transformer.layer
    matrices = [p for i in range(layers) for p in encoder[i].parameters() if p.dim() == 2]
    prefix = Launched("prefix", 0, 2 * TOKENS * sum(p.numel() for p in matrices), dtype=dtype)
    return [*launches, prefix] if layers else launches


@dataclass(frozen=True)
class Forecast:
    """What a step of a case should take: its launches, milliseconds, and the part of them that each bound decides."""

    launches: int
    milliseconds: float
    shares: dict[str, float]


def forecast(gpu: Gpu, launches: list[Launched]) -> Forecast:
    """Add up each launch's longest bound."""
    spent = {"launches": 0.0, "bytes": 0.0, "operations": 0.0}
    for launch in launches:
        bounds = launch.bounds(gpu)
        longest = max(bounds, key=bounds.__getitem__)
        spent[longest] += bounds[longest]
    total = sum(spent.values())
    return Forecast(len(launches), 1000 * total, {bound: seconds / total for bound, seconds in spent.items()})


def table() -> list[str]:
    """The rows of docs/gpus.md."""
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
