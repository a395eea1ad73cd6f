"""What every engine evaluates alike: the metrics of logits, and which evaluation is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, matthews_corrcoef

from distilbench.results import Evaluation
from distilbench.settings import TrainSettings

CALIBRATION_BINS = 15
"""As many as Guo et al. (2017, arXiv 1706.04599) take."""


def evaluate_logits(name: str, logits: np.ndarray, labels: np.ndarray, step: int, epoch: float) -> Evaluation:
    """Measure ``logits`` (examples, labels) float32 against ``labels`` (examples,) in the same order."""
    predicted = logits.argmax(axis=1)
    average = "binary" if logits.shape[1] == 2 else "macro"
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)  # (examples, labels)
    probabilities = np.exp(log_probabilities)
    names = np.arange(logits.shape[1])
    is_finite = bool(np.isfinite(probabilities).all())  # else the loss tells that the trial diverged
    return Evaluation(
        split=name,
        step=step,
        epoch=epoch,
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        accuracy=float(accuracy_score(labels, predicted)),
        f1=float(f1_score(labels, predicted, average=average, zero_division=0.0)),
        mcc=float(matthews_corrcoef(labels, predicted)),
        brier=float(brier_score_loss(labels, probabilities, labels=names)) if is_finite else math.nan,
        ece=expected_calibration_error(probabilities, labels) if is_finite else math.nan,
        logits=logits,
    )


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return how far the winning label's probability and its accuracy lie apart, 0 to 1, on average over bins.

    ``probabilities`` is (examples, labels). The measure is that of Naeini et al. (2015, AAAI); its bins hold equally
    many examples, by rank of confidence, as Nixon et al. (2019, arXiv 1904.01685) advise: of bins of equal width nearly
    all examples of a fine-tuned model share the last.
    """
    confidence = probabilities.max(axis=1)  # (examples,)
    excess = confidence - (probabilities.argmax(axis=1) == labels)
    bins = np.array_split(excess[np.argsort(confidence, kind="stable")], CALIBRATION_BINS)
    return float(sum(abs(part.sum()) for part in bins) / len(labels))


def best_of(history: Sequence[Evaluation], train: TrainSettings) -> int:
    """Return the position of the best evaluation by ``train.metric``, the first among equals."""
    sign = 1 if train.greater_is_better else -1
    return max(range(len(history)), key=lambda i: sign * history[i].metric(train.metric))
