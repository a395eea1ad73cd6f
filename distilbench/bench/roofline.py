"""The roofline: a machine's peak matrix and copy rates, and the least time that a training step takes at these rates.

This is independent of engines. Operations and optimizer traffic are counted for the task itself (real tokens, words
that occur in the text), so overheads such as padding show as distance from the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from distilbench.models.flops import count_flops_by_module
from distilbench.models.freezing import layer_list, parameter_levels

_SIDE = 2048

_COPY_BYTES = 1 << 28

_MEASURED_SECONDS = 1.0

_ADAMW_BYTES = 28
"""Per parameter: AdamW reads parameter, gradient and two moments, and writes all but the gradient, 4 bytes each."""


@dataclass(frozen=True)
class Machine:
    """Measured rates of a device: a multiply-add is two operations, a copied byte one byte read and one written."""

    operations_per_second: dict[str, float]
    """By precision: fp32, bf16, fp16."""
    bytes_per_second: float


@dataclass(frozen=True)
class StepCost:
    """The least work of one optimisation step of one trial.

    ``shared_operations`` are those of the frozen prefix's forward pass, which trials trained together need only once.
    """

    operations: float
    shared_operations: float
    optimizer_bytes: float

    def seconds(self, machine: Machine, precision: str, trials: int = 1) -> float:
        """Return the least time per trial: of the operations or of the optimizer's traffic, whichever is longer."""
        operations = self.operations - self.shared_operations * (1 - 1 / trials)
        products = operations / machine.operations_per_second[precision]
        return max(products, self.optimizer_bytes / machine.bytes_per_second)


def measure_machine(device: torch.device, precisions: set[str]) -> Machine:
    """Measure the peak rates of 2,048 x 2,048 matrix products and of copies of 256 MiB, for about a second each."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rates = {}
    for precision in sorted(precisions):
        square = torch.randn(_SIDE, _SIDE, device=device).to(dtypes[precision])
        rates[precision] = 2 * _SIDE**3 / _best_seconds("torch.mm(a, a, out=out)", a=square, out=square.clone())
    source = torch.ones(_COPY_BYTES // 4, device=device)
    return Machine(rates, 2 * _COPY_BYTES / _best_seconds("out.copy_(a)", a=source, out=source.clone()))


def _best_seconds(statement: str, **tensors: torch.Tensor) -> float:
    """Return the time of the fastest run: other work on the machine makes runs slower, never faster."""
    timer = Timer(statement, globals=tensors, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=_MEASURED_SECONDS).times)


def step_cost_of(model: PreTrainedModel, tokens: float, sentences: int, words: int) -> StepCost:
    """Count one step over ``tokens`` in ``sentences``; ``words`` is the number of distinct tokens in the whole text.

    Operations are those of :mod:`distilbench.models.flops` on sentences of the mean length, except that the last layer
    is counted for [CLS] only.
    """
    length = max(1, round(tokens / sentences))
    counted = count_flops_by_module(model, length)
    path, layers = layer_list(model)
    name = ".".join([type(model).__name__, model.base_model_prefix, *path])
    each = [float(counted[f"{name}.{i}"]) for i in range(len(layers))]  # (layers,) for one sentence
    spared = each[-1] * (1 - 1 / length)
    each[-1] -= spared
    level_of, trained = parameter_levels(model), [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    frozen_layers = max(0, min(level_of[name] for name, _ in trained) - 1)  # level 0 is the embeddings
    vocabulary = model.get_input_embeddings().weight
    elements = sum(words * p.shape[1] if p is vocabulary else p.numel() for _, p in trained)
    return StepCost(
        operations=sentences * (counted["Global"] - spared),
        shared_operations=sentences * sum(each[:frozen_layers]),
        optimizer_bytes=float(_ADAMW_BYTES * elements),
    )
