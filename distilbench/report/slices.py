"""Accuracy and difference on slices of the report split, by ``data.slice_column`` or by combined hub splits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from distilbench.report.columns import CSV
from distilbench.report.comparison import correct, difference_of
from distilbench.report.rows import Row, average
from distilbench.report.statistics import spread_over_seeds

MOST_ROWS = 5
"""Maximum number of settings by slice, best first, besides the baseline; the correction counts all settings."""

MOST_SLICES = 20
"""Maximum number of slices that are shown, largest first."""

NAMELESS = "(none)"
"""Name of the slice of examples with an empty value."""

COLUMNS = (
    replace(CSV["slice"], title="slice", is_text=True),
    CSV["trial"],
    CSV["setting"],
    replace(CSV["examples"], title="examples", format_value="{:,}".format),
    *(CSV[key] for key in ("accuracy", "difference_points", "p_holm")),
)

NOTE = "By slice: p is corrected (Holm) for all slices of all settings tried; each interval is of its own comparison."


def rows_by_slice(rows: Sequence[Row], margin: float, num_settings: int) -> tuple[Row, ...]:
    """Return a row for the baseline and each of the best rows on each slice, largest slice first; empty without slices.

    Accuracy, difference and ``examples`` are those of the slice. The correction counts every slice of each of
    ``num_settings`` settings; those that are not shown count as p = 1.
    """
    others = [row for row in rows if row.trials and not row.is_baseline]
    shown = [*(row for row in rows if row.trials and row.is_baseline), *others[:MOST_ROWS]]
    slices = next((one.slices for row in shown for one in row.predictions.values() if one.slices is not None), None)
    if slices is None:
        return ()
    names = Counter(slices.tolist()).most_common()
    whole = [row for row in shown if row.examples == len(slices) and len(row.predictions) == row.num_seeds]
    base = next((row for row in whole if row.is_baseline), None)
    num_tests = len(names) * num_settings
    found = [
        _on_slice(row, name, slices == name, base, margin, num_tests)
        for name, _ in names[:MOST_SLICES]
        for row in whole
    ]
    corrected = iter(correct([row.difference for row in found if row.difference], margin, num_tests))
    return tuple(replace(row, difference=next(corrected)) if row.difference else row for row in found)


def _on_slice(row: Row, name: str, where: np.ndarray, base: Row | None, margin: float, num_tests: int) -> Row:
    """Return a row with the figures of the examples in ``where``, (examples,) bool."""
    ours, theirs = (
        {seed: one.correct[where] for seed, one in side.predictions.items()} if side else {} for side in (row, base)
    )
    accuracy, deviation = average([float(correct.mean()) for correct in ours.values()])
    is_tested = base and row.difference and where.sum() > 1
    difference = difference_of(spread_over_seeds(ours, theirs), margin, num_tests) if is_tested else None
    return replace(
        row, slice=name or NAMELESS, accuracy=accuracy, accuracy_deviation=deviation, examples=int(where.sum()),
        difference=difference, points=difference.points if difference else math.nan, loss=math.nan, verdict=None,
        has_learned=None, confirmation=None,
    )  # fmt: skip
