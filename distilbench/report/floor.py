"""The floor: what always answering the most frequent label scores. A setting not shown above it has not learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from distilbench.report.comparison import ReadPredictions
from distilbench.report.rows import Row
from distilbench.report.statistics import compare_over_seeds, verdict
from distilbench.results import Predictions, Verdict


def floor_of(labels: np.ndarray) -> float:
    """Return the share of the most frequent of the ``(examples,)`` labels."""
    return float(np.mean(labels == most_frequent(labels)))


def most_frequent(labels: np.ndarray) -> int:
    """Return the label that most of the ``(examples,)`` have."""
    values, counts = np.unique(labels, return_counts=True)
    return int(values[counts.argmax()])


def has_learned(predictions: dict[int, Predictions]) -> bool:
    """Whether a setting, given as seed -> predictions of the same examples, is shown to be above the floor.

    Always answering the most frequent label is one more treatment on the same examples, whose seeds all agree; the test
    is that between treatments, one-sided at 2.5 %.
    """
    labels = next(iter(predictions.values())).labels
    always = labels == most_frequent(labels)
    ours = {seed: kept.correct for seed, kept in predictions.items()}
    found = compare_over_seeds(ours, dict.fromkeys(ours, always))
    return verdict(found.low, found.high, found.p) is Verdict.BETTER


def mark_learned(rows: Sequence[Row], read: ReadPredictions, shown: int) -> tuple[list[Row], float | None]:
    """Say of the first ``shown`` rows and of the baseline whether they have learned; return the floor too, if known."""
    marked, floor = [], None
    for i, row in enumerate(rows):
        asked = row.trials if i < shown or row.is_baseline else ()
        found = {trial.seed: predictions for trial in asked if (predictions := read(trial))}
        if found and len({len(kept.labels) for kept in found.values()}) == 1:
            labels = next(iter(found.values())).labels
            row = replace(row, has_learned=has_learned(found), examples=len(labels))
            floor = floor or floor_of(labels)
        marked.append(row)
    return marked, floor
