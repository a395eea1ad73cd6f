"""Accuracy and difference on parts of the report split: by the values of data.slice_column, or by splits of the hub."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from distilbench.report.columns import CSV
from distilbench.report.comparison import ReadPredictions, difference_of
from distilbench.report.formats import percent
from distilbench.report.rows import Row, average
from distilbench.report.statistics import holm
from distilbench.results import Predictions

MOST_ROWS = 5
"""Settings, best first, that are told by slice beside the baseline; the correction counts the others too."""

MOST_SLICES = 20
"""Slices that are told, those with most examples first."""

NAMELESS = "(none)"
"""The slice of examples whose column is empty."""

COLUMNS = (
    replace(CSV["slice"], title="slice", is_text=True),
    CSV["trial"],
    CSV["setting"],
    replace(CSV["examples"], title="examples", form="{:,}".format),
    *(CSV[key] for key in ("accuracy", "difference_points", "p_holm")),
)

NOTE = "By slice: p is corrected (Holm) for all slices of all settings tried; each interval is of its own comparison."


def rows_by_slice(rows: Sequence[Row], read: ReadPredictions, margin: float) -> tuple[Row, ...]:
    """Return the baseline and the best rows anew on each slice, the largest first; none where there are no slices.

    Their accuracy, difference and ``examples`` are the slice's. The correction counts every slice of every setting that
    was tried, one that is not told as one with p = 1.
    """
    others = [row for row in rows if row.trials and not row.is_baseline]
    told = [*(row for row in rows if row.trials and row.is_baseline), *others[:MOST_ROWS]]
    kept = [{trial.seed: read(trial) for trial in row.trials} for row in told]
    slices = next((p.slices for each in kept for p in each.values() if p and p.slices is not None), None)
    if slices is None:
        return ()
    names = Counter(slices.tolist()).most_common()
    pairs = [(row, each) for row, each in zip(told, kept, strict=True)
             if all(one is not None and len(one.labels) == len(slices) for one in each.values())]  # fmt: skip
    base = next((each for row, each in pairs if row.is_baseline), None)
    found = [_on_slice(*pair, name, slices == name, base, margin) for name, _ in names[:MOST_SLICES] for pair in pairs]
    differences = [row.difference for row in found if row.difference]
    untold = len(names) * sum(not row.is_baseline for row in rows) - len(differences)
    p_holm = iter(holm([one.p for one in differences] + [1.0] * untold))
    return tuple(
        replace(row, difference=replace(row.difference, p_holm=next(p_holm))) if row.difference else row
        for row in found
    )


def _on_slice(
    row: Row, predictions: dict[int, Predictions | None], name: str, where: np.ndarray,
    baseline: dict[int, Predictions | None] | None, margin: float,
) -> Row:  # fmt: skip
    """Return a row with the figures of the examples ``where`` (examples,) bool."""
    ours, theirs = (
        {seed: kept.correct[where] for seed, kept in each.items() if kept} for each in (predictions, baseline or {})
    )
    accuracy, deviation = average([float(correct.mean()) for correct in ours.values()])
    comparable = theirs and not row.is_baseline and where.sum() > 1
    difference = difference_of(ours, theirs, margin) if comparable else None
    return replace(
        row, slice=name or NAMELESS, accuracy=accuracy, accuracy_deviation=deviation, examples=int(where.sum()),
        difference=difference, points=difference.points if difference else None, loss=math.nan, verdict=None,
        has_learned=None, again=None,
    )  # fmt: skip


def by_slice(predictions: Predictions) -> str:
    """Tell the accuracy on each slice in a line, the largest first; empty where there are no slices."""
    if predictions.slices is None:
        return ""
    counts = Counter(predictions.slices.tolist()).most_common()
    told = [
        f"{name or NAMELESS} {percent(float(predictions.correct[predictions.slices == name].mean()))} of {count:,}"
        for name, count in counts[:MOST_SLICES]
    ]
    more = len(counts) - len(told)
    return ", ".join(told) + (f" and {more:,} smaller ones" if more else "")
