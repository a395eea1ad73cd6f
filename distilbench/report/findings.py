"""What many rows say together: the report as a whole, its headline, and the figures that its charts draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distilbench.identity import value_of
from distilbench.report.costs import average
from distilbench.report.names import varying_keys
from distilbench.report.rows import Row
from distilbench.results import StoredTrial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_FOR_IMPORTANCE = 20
MOST_FOR_IMPORTANCE = 200
"""Trials below which a parameter's importance says nothing, and above which a sample is taken (500 took 10 s)."""

TREES = 32
"""Of fANOVA's forest; Optuna's 64 take twice as long."""


@dataclass(frozen=True)
class Curve:
    """How one trial learned: ``(step, accuracy)`` at each evaluation on the selection split."""

    label: str
    points: tuple[tuple[int, float], ...]
    is_baseline: bool = False


@dataclass(frozen=True)
class Report:
    """Trials of one protocol as rows, best first; ``rows`` holds all of them, of which ``shown`` stand in tables.

    ``sample`` is any trial, for what the protocol shares; ``margin`` is in points; ``floor`` is the accuracy of
    the most frequent label alone, where predictions tell it; ``url`` opens the table of runs, once ``ui_command`` was
    typed (None where a server is there); ``slices`` are the best rows on parts of the examples. ``usual`` is the
    treatment of a plain command line, ``sources`` the overrides that choose model and text as here. ``confirmation``
    are the rows of the sweep that were trained ``again``.
    """

    title: str
    rows: tuple[Row, ...]
    shown: int
    sample: StoredTrial
    margin: float
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    confirmation: tuple[Row, ...] = ()
    url: str = ""
    ui_command: str | None = None
    floor: float | None = None
    slices: tuple[Row, ...] = ()
    usual: Mapping[str, object] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def table_rows(self) -> tuple[Row, ...]:
        """The rows that tables show: the best ones, and the baseline in any case."""
        return tuple(row for i, row in enumerate(self.rows) if i < self.shown or row.is_baseline)

    @property
    def baseline(self) -> Row | None:
        """The baseline's row."""
        return next((row for row in self.rows if row.is_baseline), None)

    @property
    def candidates(self) -> list[Row]:
        """Rows with a finished trial, without the baseline's."""
        return [row for row in self.rows if row.trials and not row.is_baseline]


def score_of(row: Row) -> float:
    """Return a row's mean score on the split that selects, the higher the better: what a sweep ranks it by."""
    mean, _ = average([trial.score for trial in row.trials])
    return -mean if row.trials[0].metric == "loss" else mean


def by_score(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in the order in which a sweep would pick them, those without a result left away."""
    scored = [(score_of(row), row) for row in rows if row.trials]
    return [row for _, row in sorted(scored, key=lambda pair: math.inf if math.isnan(pair[0]) else -pair[0])]


CostOf = Callable[[Row], float]


def pareto_front(rows: Sequence[Row], cost: CostOf) -> list[Row]:
    """Return the rows that no other beats in both score and cost, cheapest first: the front that the study has."""
    known = [row for row in rows if row.trials and not math.isnan(cost(row)) and not math.isnan(score_of(row))]
    front: list[Row] = []
    for row in sorted(known, key=lambda row: (cost(row), -score_of(row))):
        last = (score_of(front[-1]), cost(front[-1])) if front else (-math.inf, 0.0)
        if score_of(row) > last[0] or (score_of(row), cost(row)) == last:
            front.append(row)
    return front


def comparable_in_time(report: Report) -> list[Row]:
    """Return the rows whose seconds may stand on one axis: the baseline's and those measured as it was."""
    base = report.baseline
    if base is None or not base.trials:
        alike = len({trial.measured_on for row in report.candidates for trial in row.trials}) == 1
        return report.candidates if alike else []
    return [row for row in report.rows if row.is_baseline or row.saving.seconds is not None]


def by_depth(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Return the rows that have a result by frozen layers, shallowest first; other ways to freeze have no depth."""
    depths: dict[int, list[Row]] = {}
    for row in rows:
        layers = row.treatment.get("freeze.layers")
        is_depth = not {"freeze.policy", "adapter.name"} & row.treatment.keys()
        if row.trials and isinstance(layers, int) and is_depth:
            depths.setdefault(layers, []).append(row)
    return dict(sorted(depths.items()))


def data_curve(report: Report) -> dict[int, list[Row]]:
    """Return, by frozen layers, the best row of each amount of training text, least first; empty for one amount."""
    amounts = {row.first.train_examples for row in report.rows if row.trials and row.first.train_examples}
    curves = {}
    for depth, rows in by_depth(report.rows).items():
        best = {row.first.train_examples: row for row in reversed(by_score(rows)) if row.first.train_examples}
        if len(best) > 1:
            curves[depth] = [best[amount] for amount in sorted(best)]
    return curves if len(amounts) > 1 else {}


def half_of_text(curve: Sequence[Row]) -> float | None:
    """Return the points that half of the most text costs, interpolated on a logarithmic axis; None beyond the curve."""
    amounts = [row.first.train_examples for row in curve]
    if amounts[-1] / 2 < amounts[0]:
        return None
    at_half = np.interp(math.log(amounts[-1] / 2), np.log(amounts), [row.accuracy for row in curve])
    return 100 * (curve[-1].accuracy - float(at_half))


def history(report: Report) -> list[tuple[Row, float]]:
    """Return the rows that came to an accuracy in the order of their start, each with the best one so far."""
    told, best = [], math.nan
    for row in sorted(report.rows, key=lambda row: row.started_ms):
        best = max(best, row.accuracy) if best == best else row.accuracy  # NaN until the first result
        if not math.isnan(row.accuracy_so_far):
            told.append((row, best))
    return told


def importance(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the accuracy's variance by what varied, most important first; empty for too few trials, or equal ones.

    Optuna's fANOVA (Hutter, Hoos and Leyton-Brown 2014, ICML), on an in-memory study of the rows.
    """
    finished = [row for row in rows if row.trials]
    keys = varying_keys([row.treatment for row in finished])
    if len(finished) < FEWEST_FOR_IMPORTANCE or len(keys) < 2 or len({row.accuracy for row in finished}) == 1:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces, values = {}, {}
    for key in keys:
        spaces[key], values[key] = _as_parameter([value_of(row.treatment, key) for row in finished])
    study = optuna.create_study(direction="maximize")
    for i in range(0, len(finished), math.ceil(len(finished) / MOST_FOR_IMPORTANCE)):
        params = {key: values[key][i] for key in keys}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=finished[i].accuracy))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _as_parameter(values: Sequence[object]) -> tuple[BaseDistribution, Sequence[object]]:
    """Return the range that ``values`` span, logarithmic over a factor of ten, or the set of them; and them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    numbers = numbers_of(values)
    if numbers is None:
        words = [repr(value) for value in values]
        return CategoricalDistribution(sorted(set(words))), words
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high >= 10 * low), numbers


def numbers_of(values: Sequence[object]) -> list[float] | None:
    """Return values as numbers; None where one is none."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(values) else None
