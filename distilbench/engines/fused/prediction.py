"""What a group's trials predict for a split: in batches that are packed once, over hidden states that are kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import batches_by_length
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.packing import Batch, pack, stack_batches
from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.fused.prefix import Budget, TrainingPrefix


class Predictor:
    """Predicts without dropout; hidden states of a frozen ``prefix`` are kept as far as the ``budget`` goes."""

    def __init__(self, prefix: TrainingPrefix | None, budget: Budget, device: torch.device) -> None:
        self._prefix, self._budget, self._device = prefix, budget, device
        self._batches: dict[tuple[int, int], list[tuple[np.ndarray, Batch]]] = {}
        self._hidden: dict[Batch, torch.Tensor] = {}

    @torch.no_grad()
    def predict(
        self, stacks: Iterable[tuple[slice, StackedWeights]], split: EncodedSplit, batch_size: int, logits: np.ndarray
    ) -> np.ndarray:
        """Fill ``logits`` (trials, examples, labels) float32, in the order of ``split``, from stacks of trials."""
        key = id(split), batch_size
        if key not in self._batches:
            self._batches[key] = [
                (examples, stack_batches([pack(split, examples)], self._device))
                for examples in batches_by_length(split, batch_size)
            ]
        for examples, batch in self._batches[key]:
            hidden, start = self._under_trained(batch)
            for trials, weights in stacks:
                forward = Forward(weights, batch, None)
                own = forward.logits(forward.layers(forward.embed() if hidden is None else hidden, start))
                logits[trials, examples] = own.float().cpu().numpy()
        return logits

    def forget(self) -> None:
        """Let go of batches and hidden states, and give the budget back what they took."""
        self._budget.left += sum(hidden.nbytes for hidden in self._hidden.values())
        self._batches.clear()
        self._hidden.clear()

    def _under_trained(self, batch: Batch) -> tuple[torch.Tensor | None, int]:
        """Return the hidden states under the first layer that trains, None where embeddings train; and its number."""
        if self._prefix is None:
            return None, 0
        hidden = self._hidden.get(batch)
        if hidden is None:
            hidden = self._prefix.of_batch(batch)
            if self._budget.take(hidden.nbytes):
                self._hidden[batch] = hidden
        return hidden, self._prefix.depth
