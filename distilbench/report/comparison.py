"""Compare rows with the baseline: differences, verdicts corrected for all rows of a report, and what would decide.

Rows are also compared with the floor, the accuracy of always predicting the most frequent label: a setting that is not
shown to be above it has not learned, and gets no favourable verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from distilbench.report.noninferiority import noninferiority_over_seeds
from distilbench.report.power import PLANNED_SEEDS, Needed, estimate_spread, needed, needed_to_decide
from distilbench.report.rows import PRAISE, Difference, Row, Untested, comparable_cost
from distilbench.report.statistics import ALPHA, SeedSpread, compare_over_seeds, holm, spread_over_seeds, verdict
from distilbench.results import Predictions, Status, Verdict

BY_OUTCOME = (Status.DIVERGED, Status.PRUNED)
"""Statuses of trials that were stopped because of what they showed."""


def compare_with_baseline(
    rows: Sequence[Row],
    baseline: int | None,
    margin: float,
    shown: int = 200,
    selected_on_report_split: bool = False,
    num_settings: int | None = None,
) -> tuple[list[Row], float | None]:
    """Compare the first ``shown`` rows with the baseline and test which have learned; return the rows and the floor.

    Their trials must have predictions. ``margin`` is in percentage points. ``selected_on_report_split``: the report
    split also selected among these rows, so that a lead still has to be confirmed. ``num_settings`` is how many the
    tests are corrected for, by default all rows but the baseline's.

    A setting that is not tested (not shown, pruned, diverged or failed) counts as one with p = 1. Its real p could only
    be smaller and weaken the correction of the others, so this keeps the level. Leaving it out would not: pruned trials
    were seen to be behind, so the remaining tests would be selected by their outcome.
    """
    result = [_with_learning(row) for row in rows]
    asked = next((row for row in result if row.examples), None)
    majority = majority_accuracy(next(iter(asked.predictions.values())).labels) if asked else None
    if baseline is None:
        return result, majority
    base, num_settings = result[baseline], num_settings or len(rows) - 1
    spreads: dict[int, SeedSpread] = {}
    for i, row in enumerate(result):
        if i == baseline or not row.trials:
            continue
        spread = _spread(row, base) if i < shown else Untested.ROWS
        if isinstance(spread, Untested):
            row = replace(row, untested=spread)
        else:
            spreads[i], row = spread, replace(row, difference=difference_of(spread, margin, num_settings))
        points = row.difference.points if row.difference else 100 * (row.accuracy - base.accuracy)
        cost, note = comparable_cost(row.trials, base.trials)
        result[i] = replace(row, points=points, baseline_cost=cost, time_note=note)
    found = {i: row.difference for i, row in enumerate(result) if row.difference}
    for i, one in zip(found, correct([*found.values()], margin, num_settings), strict=True):
        claim = verdict(one.low, one.high, one.p_holm, one.p_loss_holm)
        if claim is Verdict.UNDECIDED and base.has_learned is not False:
            one = replace(one, needed=needed_to_decide(spreads[i], margin / 100, num_settings))
        row = replace(result[i], difference=one, verdict=claim)
        result[i] = _qualify_verdict(row, base, selected_on_report_split)
    return result, majority


def correct(found: Sequence[Difference], margin: float, num_tests: int) -> list[Difference]:
    """Correct differences by Holm's method for ``num_tests``, of which those not given count as p = 1."""
    others = [1.0] * (num_tests - len(found))
    p_holm, p_loss_holm = (holm([getattr(one, p) for one in found] + others) for p in ("p", "p_loss"))
    return [
        # Holm may show a loss to be below the margin where the bounds of all settings together can't
        replace(one, p_holm=p, p_loss_holm=p_loss,
                loses_at_most=min(one.loses_at_most, margin) if p_loss < ALPHA else one.loses_at_most)
        for one, p, p_loss in zip(found, p_holm, p_loss_holm, strict=False)
    ]  # fmt: skip


def _qualify_verdict(row: Row, base: Row, selected_on_report_split: bool) -> Row:
    """Return a row whose verdict is withdrawn if nothing was learned, or weakened to a lead to be confirmed."""
    if base.has_learned is False:
        return replace(row, verdict=None, untested=None if row.has_learned is False else Untested.IDLE)
    if row.verdict not in PRAISE:
        return row
    if row.has_learned is False:
        return replace(row, verdict=None)
    if any(one.status in BY_OUTCOME for one in row.unfinished_trials):
        return replace(row, verdict=None, untested=Untested.SURVIVORS)  # the seeds that are left are the lucky ones
    return replace(row, verdict=Verdict.AHEAD) if selected_on_report_split and row.verdict is Verdict.BETTER else row


def majority_accuracy(labels: np.ndarray) -> float:
    """Return the share of the most frequent of the ``(examples,)`` labels: the accuracy of always predicting it."""
    return float(np.mean(_is_most_frequent(labels)))


def _is_most_frequent(labels: np.ndarray) -> np.ndarray:
    return np.asarray(labels == np.bincount(labels).argmax())


def has_learned(predictions: Mapping[int, Predictions]) -> bool:
    """Return whether a setting, given as seed -> predictions on the same examples, is shown to be above the floor.

    Always predicting the most frequent label is treated as another treatment on the same examples, identical for all
    seeds; the test is the one between treatments, one-sided at 2.5 %.
    """
    ours = {seed: kept.correct for seed, kept in predictions.items()}
    always = _is_most_frequent(next(iter(predictions.values())).labels)
    found = compare_over_seeds(spread_over_seeds(ours, dict.fromkeys(ours, always)))
    return verdict(found.low, found.high, found.p) is Verdict.BETTER


def _with_learning(row: Row) -> Row:
    """Return a row with ``has_learned`` and ``examples``, if there are predictions."""
    sizes = {len(predictions.labels) for predictions in row.predictions.values()}
    if len(sizes) != 1:
        return row
    return replace(row, has_learned=has_learned(row.predictions), examples=sizes.pop())


def needed_to_confirm(rows: Sequence[Row], base: Row, margin: float, num_settings: int) -> Needed | None:
    """Return what a confirmation needs to show that each row, if it loses nothing, loses less than ``margin`` points.

    This is for the row that needs most, at the spread observed so far, with tests corrected for ``num_settings``; None
    if the rows can't be compared.
    """
    found = []
    for row in rows:
        spread = _spread(row, base)
        if isinstance(spread, Untested):
            return None
        examples = len(spread.by_example)
        found.append(needed(estimate_spread(spread), PLANNED_SEEDS, examples, margin / 100, rows=num_settings))
    return max(found, key=lambda one: (one.seeds is None, one.seeds or one.examples or 0))


def _spread(row: Row, base: Row) -> SeedSpread | Untested:
    """Return the spread of a row's difference from the baseline, or why they can't be compared."""
    if not base.trials:
        return Untested.BASELINE
    sides = row.predictions, base.predictions
    kept = [predictions for side in sides for predictions in side.values()]
    if len(kept) < row.num_seeds + base.num_seeds:
        return Untested.PREDICTIONS
    if any(not np.array_equal(predictions.labels, kept[0].labels) for predictions in kept):
        return Untested.EXAMPLES
    ours, theirs = ({seed: predictions.correct for seed, predictions in side.items()} for side in sides)
    try:
        return spread_over_seeds(ours, theirs)
    except ValueError:
        return Untested.SEEDS


def difference_of(spread: SeedSpread, margin: float, num_settings: int) -> Difference:
    """Test a difference without correction, for a ``margin`` in percentage points.

    The largest loss alone is corrected, by Bonferroni's method: it holds whichever of ``num_settings`` is picked.
    """
    compared = compare_over_seeds(spread)
    loss = noninferiority_over_seeds(spread, margin / 100, ALPHA / num_settings)
    return Difference(
        points=100 * compared.difference,
        low=100 * compared.low,
        high=100 * compared.high,
        p=compared.p,
        p_holm=compared.p,
        loses_at_most=100 * loss.bound,
        p_loss=loss.p,
        p_loss_holm=loss.p,
        num_seeds=spread.num_seeds,
    )
