"""What training minimises; evaluations measure the plain cross-entropy whatever that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from distilbench.settings import TrainSettings

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loss:
    """Cross-entropy with smoothed targets (Szegedy et al., 2016, section 7) and ``class_weights`` (labels,)."""

    label_smoothing: float
    class_weights: torch.Tensor | None

    @classmethod
    def of(cls, settings: TrainSettings, labels: np.ndarray, num_labels: int, device: torch.device = _CPU) -> Loss:
        """Return that of a trial on training ``labels``; balanced weights are those of scikit-learn.

        They stand on ``device``: a step that is recorded there may copy nothing from the host.
        """
        weights = None
        if settings.class_weights == "balanced":
            counts = np.bincount(labels, minlength=num_labels).clip(1)
            dtype = torch.float32 if device.type == "mps" else torch.float64
            weights = torch.tensor(len(labels) / (num_labels * counts), dtype=dtype, device=device)
        return cls(settings.label_smoothing, weights)

    @property
    def is_plain(self) -> bool:
        """Whether it is what Transformers' models compute by themselves."""
        return not self.label_smoothing and self.class_weights is None

    def of_each(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return what each example of ``logits`` (examples, labels) loses, ``(examples,)``.

        A batch's loss is the mean over its examples, so that each batch counts as much as its examples, whatever their
        labels; torch's own mean would divide by the sum of their weights.
        """
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        return F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=self.label_smoothing)
