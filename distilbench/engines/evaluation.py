"""What every engine evaluates alike: the metrics of logits, and which evaluation is the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from distilbench.data.tokens import EncodedSplits
from distilbench.results import Evaluation
from distilbench.settings import TrainSettings


def selection_name(splits: EncodedSplits) -> str:
    """Name the split that epochs are picked on: ``validation`` where one split does both."""
    return "validation" if splits.selection is splits.report else "selection"


def evaluate_logits(name: str, logits: np.ndarray, labels: np.ndarray, step: int, epoch: float) -> Evaluation:
    """Measure ``logits`` (examples, labels) float32 against ``labels`` (examples,) in the same order."""
    predicted = logits.argmax(axis=1)
    average = "binary" if logits.shape[1] == 2 else "macro"
    return Evaluation(
        split=name,
        step=step,
        epoch=epoch,
        loss=cross_entropy(logits, labels),
        accuracy=float(accuracy_score(labels, predicted)),
        f1=float(f1_score(labels, predicted, average=average, zero_division=0.0)),
        mcc=float(matthews_corrcoef(labels, predicted)),
        logits=logits,
    )


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy over examples, computed in float64 from ``logits`` (examples, labels)."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=1))
    return float((normaliser - shifted[np.arange(len(labels)), labels]).mean())


def best_of(history: Sequence[Evaluation], train: TrainSettings) -> int:
    """Return the position of the best evaluation by ``train.metric``, the first among equals."""
    sign = 1 if train.greater_is_better else -1
    return max(range(len(history)), key=lambda i: sign * history[i].metric(train.metric))
