"""What a group's trials predict for a split: in batches that are packed once, over hidden states that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import batches_by_length
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.packing import Batch, pack, stack_batches
from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.fused.prefix import Budget, TrainingPrefix


@dataclass
class EvaluationBatch:
    """Examples of a split, and the ``hidden`` states under the trained part where the budget holds them."""

    examples: np.ndarray
    batch: Batch
    hidden: torch.Tensor | None = None


class Predictor:
    """Predicts without dropout; hidden states of a frozen ``prefix`` are kept as far as the ``budget`` goes."""

    def __init__(self, prefix: TrainingPrefix | None, budget: Budget, device: torch.device) -> None:
        self._prefix, self._budget, self._device = prefix, budget, device
        self._batches: dict[tuple[int, int], list[EvaluationBatch]] = {}

    @torch.no_grad()
    def predict(
        self, stacks: Iterable[tuple[slice, StackedWeights]], split: EncodedSplit, batch_size: int, logits: np.ndarray
    ) -> np.ndarray:
        """Fill ``logits`` (trials, examples, labels) float32, in the order of ``split``, from stacks of trials."""
        for part in self._batches_of(split, batch_size):
            hidden = self._under_trained(part)
            for trials, weights in stacks:
                forward = Forward(weights, part.batch, None)
                x, start = (forward.embed(forward.embedded()), 0) if hidden is None else hidden
                own = forward.logits(forward.layers(x, start, weights.layout.architecture.depth))
                logits[trials, part.examples] = own.float().cpu().numpy()
        return logits

    def forget(self) -> None:
        """Let go of batches and hidden states, and give the budget back what they took."""
        kept = [part.hidden for parts in self._batches.values() for part in parts if part.hidden is not None]
        self._budget.left += sum(hidden.nbytes for hidden in kept)
        self._batches.clear()

    def _batches_of(self, split: EncodedSplit, batch_size: int) -> list[EvaluationBatch]:
        """Return the batches of ``split``, the longest examples first."""
        key = id(split), batch_size
        if key not in self._batches:
            self._batches[key] = [
                EvaluationBatch(examples, stack_batches([pack(split, examples)], self._device))
                for examples in batches_by_length(split, batch_size)
            ]
        return self._batches[key]

    def _under_trained(self, part: EvaluationBatch) -> tuple[torch.Tensor, int] | None:
        """Return the hidden states under the first layer that trains, and its number; None where embeddings train."""
        if self._prefix is None:
            return None
        hidden = part.hidden
        if hidden is None:
            hidden = self._prefix.of_batch(part.batch)
            if self._budget.take(hidden.nbytes):
                part.hidden = hidden
        return hidden, self._prefix.depth
