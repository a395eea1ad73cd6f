"""Rows against the baseline: what was seen, what of it holds for all rows of a report together, what would decide.

And against the floor, what always answering the most frequent label scores: a setting not shown to be above it has not
learned, and is not praised for losing little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from distilbench.report.noninferiority import noninferiority_over_seeds, verdict_with_margin
from distilbench.report.power import PLANNED_SEEDS, Needed, needed, spread_seen, what_it_takes
from distilbench.report.rows import PRAISE, Difference, Row, Untested, saving_of
from distilbench.report.statistics import compare_over_seeds, holm, verdict
from distilbench.results import Predictions, StoredTrial, Verdict

ReadPredictions = Callable[[StoredTrial], Predictions | None]
"""Fetches what a trial said of every example; asked only for the trials of rows that are tested."""

_Correct = Mapping[int, np.ndarray]
"""Seed -> ``(examples,)`` bool of what was classified correctly."""


def judge(
    rows: Sequence[Row],
    baseline: int | None,
    read: ReadPredictions,
    margin: float,
    shown: int = 200,
    picked_here: bool = False,
) -> tuple[list[Row], float | None]:
    """Compare rows, the first ``shown``, with the baseline, and say which have learned; returns the floor too.

    ``margin`` is in points. ``picked_here``: the split that reports also chose among these rows, so that a lead is yet
    to be confirmed.

    A setting that is not tested, be it beyond the rows shown, pruned, diverged or failed, counts as one with p = 1. Its
    own p could only be smaller, which would lower the correction of the others, so this keeps the level; to leave it
    away would not: what was pruned was seen to be behind, so the tests that remain were chosen by their outcome.
    """
    result, floor = _mark_learned(rows, read, shown)
    if baseline is None:
        return result, floor
    base, tried = result[baseline], len(rows) - 1
    pairs: dict[int, tuple[_Correct, _Correct]] = {}
    found: dict[int, Difference] = {}
    for i, row in enumerate(result):
        if i == baseline or not row.trials:
            continue
        pair = _correct(row, base, read) if i < shown or not base.trials else Untested.ROWS
        difference = None if isinstance(pair, Untested) else difference_of(*pair, margin)
        points = 100 * (row.accuracy - base.accuracy) if base.trials else None
        why = pair if isinstance(pair, Untested) else None if difference else Untested.SEEDS
        result[i] = replace(row, points=points, saving=saving_of(row.trials, base.trials), untested=why)
        if difference and not isinstance(pair, Untested):
            pairs[i], found[i] = pair, difference
    untested = [1.0] * (tried - len(found))
    p_holm = holm([one.p for one in found.values()] + untested)
    p_loss_holm = holm([one.p_loss for one in found.values()] + untested)
    for (i, one), p, p_loss in zip(found.items(), p_holm, p_loss_holm, strict=False):
        corrected = replace(one, p_holm=p, p_loss_holm=p_loss)
        result[i] = _withheld(_judged(result[i], corrected, pairs[i], margin, tried), base, picked_here)
    return result, floor


def _withheld(row: Row, base: Row, picked_here: bool) -> Row:
    """Return a row without a claim that its evidence does not bear."""
    if base.has_learned is False and row.difference:
        why = None if row.has_learned is False else Untested.IDLE
        return replace(row, verdict=None, untested=why, difference=replace(row.difference, needed=None))
    if row.verdict in PRAISE and row.has_learned is False:
        return replace(row, verdict=None)
    return replace(row, verdict=Verdict.AHEAD) if picked_here and row.verdict is Verdict.BETTER else row


def floor_of(labels: np.ndarray) -> float:
    """Return the share of the most frequent of the ``(examples,)`` labels: what always answering it scores."""
    return float(np.mean(_is_most_frequent(labels)))


def _is_most_frequent(labels: np.ndarray) -> np.ndarray:
    return np.asarray(labels == np.bincount(labels).argmax())


def has_learned(predictions: Mapping[int, Predictions]) -> bool:
    """Whether a setting, given as seed -> predictions of the same examples, is shown to be above the floor.

    Always answering the most frequent label is one more treatment on the same examples, whose seeds all agree; the test
    is that between treatments, one-sided at 2.5 %.
    """
    ours = {seed: kept.correct for seed, kept in predictions.items()}
    always = _is_most_frequent(next(iter(predictions.values())).labels)
    found = compare_over_seeds(ours, dict.fromkeys(ours, always))
    return verdict(found.low, found.high, found.p) is Verdict.BETTER


def _mark_learned(rows: Sequence[Row], read: ReadPredictions, shown: int) -> tuple[list[Row], float | None]:
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


def needed_to_confirm(rows: Sequence[Row], base: Row, read: ReadPredictions, margin: float) -> Needed | None:
    """Return what shows of each row, by fresh seeds, that it loses less than ``margin`` points if it loses nothing.

    That of the row that needs most, at the spread which the trials so far have; None where they can't be compared.
    """
    found = []
    for pair in (_correct(row, base, read) for row in rows):
        if isinstance(pair, Untested):
            return None
        try:
            spread, examples = spread_seen(*pair), len(next(iter(pair[0].values())))
        except ValueError:
            return None
        found.append(needed(spread, PLANNED_SEEDS, examples, margin / 100, rows=len(rows)))
    return max(found, key=lambda one: (one.seeds is None, one.seeds or one.examples or 0))


def _correct(row: Row, base: Row, read: ReadPredictions) -> tuple[_Correct, _Correct] | Untested:
    """Return what both sides got right, or why they can't be compared."""
    if not base.trials:
        return Untested.BASELINE
    ours, theirs = ({trial.seed: read(trial) for trial in side.trials} for side in (row, base))
    everyone = [*ours.values(), *theirs.values()]
    if any(predictions is None for predictions in everyone):
        return Untested.PREDICTIONS
    if len({tuple(predictions.labels.tolist()) for predictions in everyone if predictions}) > 1:
        return Untested.EXAMPLES
    first, second = ({seed: kept.correct for seed, kept in side.items() if kept} for side in (ours, theirs))
    return first, second


def difference_of(ours: _Correct, theirs: _Correct, margin: float) -> Difference | None:
    """Test without correction; None where seeds can be neither paired nor taken as independent."""
    try:
        seen = compare_over_seeds(ours, theirs)
        loss = noninferiority_over_seeds(ours, theirs, margin / 100)
    except ValueError:
        return None
    return Difference(
        points=100 * seen.difference,
        low=100 * seen.low,
        high=100 * seen.high,
        p=seen.p,
        p_holm=seen.p,
        loses_at_most=100 * loss.bound,
        p_loss=loss.p,
        p_loss_holm=loss.p,
        n=seen.n,
        examples=len(next(iter(theirs.values()))),
    )


def _judged(row: Row, found: Difference, pair: tuple[_Correct, _Correct], margin: float, tried: int) -> Row:
    """Decide what may be claimed of a row and, where that is nothing, what would decide."""
    claim = verdict_with_margin(found.low, found.high, found.p_holm, found.p_loss_holm)
    if claim is Verdict.UNDECIDED:
        found = replace(found, needed=what_it_takes(*pair, margin / 100, rows=tried))
    return replace(row, difference=found, verdict=claim)
