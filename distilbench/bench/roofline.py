"""What a machine could do at best: its matrix rate and copy bandwidth, and what a training step asks of them.

Nothing here knows an engine. A step's products and an optimizer's traffic are counted for the job itself (real tokens,
words that occur), so that padding, say, shows as distance from the limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

_SIDE = 2048

_COPY_BYTES = 1 << 28

_MEASURED_SECONDS = 1.0

_ADAMW_BYTES = 28
"""AdamW reads parameter, gradient and two moments and writes all but the gradient, 4 bytes each."""

_OF_INPUT = re.compile(r"\.(q_lin|k_lin|v_lin|query|key|value)\.weight$")
"""What reads a layer's input."""


@dataclass(frozen=True)
class Machine:
    """Measured rates of a device: multiply-adds count as two operations, a copied byte as one read and one written."""

    operations_per_second: dict[str, float]
    """By precision: fp32, bf16, fp16."""
    bytes_per_second: float


@dataclass(frozen=True)
class StepCost:
    """What one optimisation step of one trial asks for at least.

    ``shared_operations`` are those of the frozen prefix's forward pass, which trials trained together need once.
    """

    operations: float
    shared_operations: float
    optimizer_bytes: float

    def seconds(self, machine: Machine, precision: str, trials: int = 1) -> float:
        """Return what the machine needs at least: for the products or the optimizer's traffic, the longer one."""
        operations = self.operations - self.shared_operations * (1 - 1 / trials)
        products = operations / machine.operations_per_second[precision]
        return max(products, self.optimizer_bytes / machine.bytes_per_second)


def measure_machine(device: torch.device, precisions: tuple[str, ...]) -> Machine:
    """Measure the best rate of square products of 2,048 and of copies of 256 MiB, each for about a second."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rates = {}
    for precision in precisions:
        a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtypes[precision]) for _ in range(2))
        out = torch.empty_like(a)
        rates[precision] = 2 * _SIDE**3 / _best_seconds(partial(torch.mm, a, b, out=out), device)
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return Machine(rates, 2 * _COPY_BYTES / _best_seconds(partial(target.copy_, source), device))


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of many runs: others on the machine make runs longer, never shorter."""
    best = float("inf")
    deadline = time.perf_counter() + _MEASURED_SECONDS
    while time.perf_counter() < deadline:
        synchronise(device)
        start = time.perf_counter()
        action()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def step_cost_of(model: nn.Module, tokens: float, sentences: float, words: int) -> StepCost:
    """Count one step over ``tokens`` in ``sentences``, where ``words`` of the vocabulary occur in the whole text.

    Forward, gradient of the input and gradient of the weight take two operations a weight and token each; layers of the
    frozen prefix only the first, and the first products above it no gradient of the input. The last layer is computed
    of [CLS] alone, whose query its keys' and values' weights then meet once a sentence. Attention's own products, a few
    per cent, are left out.
    """
    placed = [(name, p, _layer(name)) for name, p in model.named_parameters() if p.dim() == 2]
    matrices = [(name, p, layer) for name, p, layer in placed if layer is not None]
    top, bottom = max(layer for _, _, layer in matrices), _lowest_trained(model)
    operations = shared = 0.0
    for name, p, layer in matrices:
        rows = sentences if layer == top else tokens
        forward = 2.0 * p.numel() * rows
        if layer < bottom:
            operations, shared = operations + forward, shared + forward
        else:
            operations += forward * (2 if layer == bottom and _OF_INPUT.search(name) else 3)
    trained = sum(_elements(name, p, words) for name, p in model.named_parameters() if p.requires_grad)
    return StepCost(operations, shared, float(_ADAMW_BYTES * trained))


def _lowest_trained(model: nn.Module) -> int:
    """Return the lowest layer that trains, past the last one where none does; -1 for the embeddings."""
    parameters = [(name, _layer(name), p.requires_grad) for name, p in model.named_parameters()]
    if any(trained and layer is None and "embeddings" in name for name, layer, trained in parameters):
        return -1
    above = 1 + max(layer for _, layer, _ in parameters if layer is not None)
    return min((layer for _, layer, trained in parameters if trained and layer is not None), default=above)


def _layer(name: str) -> int | None:
    """Return the layer that a parameter is of, None for those outside."""
    found = re.search(r"\.layers?\.(\d+)\.", name)
    return int(found[1]) if found else None


def _elements(name: str, parameter: nn.Parameter, words: int) -> int:
    is_vocabulary = name.endswith("word_embeddings.weight")
    return words * parameter.shape[1] if is_vocabulary else parameter.numel()
