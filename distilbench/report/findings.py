"""What many rows say together: the report as a whole, its headline, and the figures that its charts draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distilbench.report.formats import counted, interval, points
from distilbench.report.names import varying_keys
from distilbench.report.rows import Row
from distilbench.report.statistics import expected_best_of_k
from distilbench.report.words import reason_untested, size_of
from distilbench.results import Status, StoredTrial, Verdict

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_FOR_IMPORTANCE = 10
MOST_FOR_IMPORTANCE = 200
"""Trials below which a parameter's importance says nothing, and above which a sample is taken (500 took 10 s)."""


TREES = 32
"""Of fANOVA's forest; Optuna's 64 take twice as long."""
WORTH_TELLING = 5.0
"""Per cent of training time below which a saving is not told of: two runs of one setting differ by as much."""


@dataclass(frozen=True)
class Curve:
    """How one trial learned: ``(step, accuracy)`` at each evaluation on the selection split."""

    label: str
    points: tuple[tuple[int, float], ...]
    is_baseline: bool = False


@dataclass(frozen=True)
class Report:
    """Trials of one protocol as rows, best first; ``rows`` holds all of them, of which ``shown`` stand in tables.

    ``sample`` is any trial, for what the protocol shares; ``url`` opens the table of runs.
    """

    title: str
    rows: tuple[Row, ...]
    shown: int
    sample: StoredTrial
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    confirmation: tuple[Confirmed, ...] = ()
    url: str = ""

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


@dataclass(frozen=True)
class Confirmed:
    """A setting in the sweep that picked it and in its confirmation with fresh seeds."""

    label: str
    first: Row
    again: Row

    @property
    def survived(self) -> bool:
        """Whether the fresh seeds show it better than the baseline."""
        return self.again.verdict is Verdict.BETTER


def headline(report: Report) -> str:
    """The answer in one or two sentences: what is better than the baseline, by how much, and how sure."""
    others = report.candidates
    base = report.baseline
    if not others and (base is None or not base.trials):
        return f"No trial finished: {_endings(report)}."
    if base is None or not base.trials:
        return f"{counted(len(others), 'setting')} finished, compared with nothing: there is no finished baseline."
    if not others:
        return "Only the baseline finished: there is nothing to compare it with."
    if report.confirmation:
        return _confirmed(report.confirmation[0])
    better = [row for row in others if row.verdict in (Verdict.BETTER, Verdict.AHEAD)]
    tried = f"the {counted(len(others), 'setting')} tried" if len(others) > 1 else "the setting tried"
    nothing = f"None of {tried}" if len(others) > 1 else "Nothing"
    if not any(row.difference for row in others):
        return f"{nothing} could be tested against the baseline: {reason_untested(others[0])}."
    if not better:
        return f"{nothing} was shown to be better than the baseline."
    best = better[0]
    assert best.difference is not None
    size = f"{points(best.difference.points)} points (95 % {interval(best.difference.low, best.difference.high)})"
    sure = "ahead of the baseline, yet to be confirmed" if best.verdict is Verdict.AHEAD else "better"
    more = f", and {len(better) - 1} more" if len(better) > 1 else ""
    return f"{best.label} is {sure}: {size}{more}, of {tried}."


def _confirmed(winner: Confirmed) -> str:
    """Whether the winner's advantage survived, both figures side by side."""
    then, now = (size_of(row) for row in (winner.first, winner.again))
    word = "survived fresh seeds" if winner.survived else "did not survive fresh seeds"
    if (winner.first.points or 0) <= 0:
        word = "was none in the sweep either" if not winner.survived else "shows only now"
    return f"The advantage of {winner.label} {word}: {then} in the sweep; {now} in the confirmation."


def saving(report: Report) -> str:
    """What the cheapest setting costs that is not shown to be worse; empty where none saves time."""
    cheap = [row for row in report.candidates if row.difference and (row.time_gain_percent or 0) >= WORTH_TELLING]
    cheap = [row for row in cheap if row.verdict is not Verdict.WORSE]
    if not cheap:
        return ""
    row = max(cheap, key=lambda r: r.time_gain_percent or 0)
    assert row.difference is not None
    cost = f"{points(row.difference.points)} points, 95 % {interval(row.difference.low, row.difference.high)}"
    return f"Most time saved without a shown loss: {row.label}, {row.time_gain_percent:.0f} % less ({cost})."


def _endings(report: Report) -> str:
    counts: dict[str, int] = {}
    for row in report.rows:
        for trial in row.other_trials:
            counts[trial.status.value] = counts.get(trial.status.value, 0) + 1
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other one beats in both accuracy and seconds, quickest first."""
    timed = [row for row in rows if row.trials and not math.isnan(row.seconds)]
    front: list[Row] = []
    for row in sorted(timed, key=lambda r: (r.seconds, -r.accuracy)):
        if not front or row.accuracy > front[-1].accuracy:
            front.append(row)
    return front


def comparable_in_time(report: Report) -> list[Row]:
    """The rows whose seconds may stand on one axis: the baseline's and those measured as it was."""
    base = report.baseline
    if base is None or not base.trials:
        alike = len({trial.measured_on for row in report.candidates for trial in row.trials}) == 1
        return report.candidates if alike else []
    return [row for row in report.rows if row.is_baseline or row.time_gain_percent is not None]


def by_depth(rows: Sequence[Row]) -> dict[int, list[float]]:
    """Accuracies of the rows by frozen layers, shallowest first."""
    depths: dict[int, list[float]] = {}
    for row in rows:
        layers = row.treatment.get("freeze.layers")
        if row.trials and isinstance(layers, int):
            depths.setdefault(layers, []).append(row.accuracy)
    return dict(sorted(depths.items()))


def expected_best(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """``(k, accuracy expected of the best of k)`` were ``k`` of these settings drawn at random (Dodge et al. 2019)."""
    values = [row.accuracy for row in rows if row.trials]
    budgets = sorted({round(len(values) ** (i / 39)) for i in range(40)}) if len(values) > 1 else []
    return [(k, expected_best_of_k(values, k)) for k in budgets]


def importance(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the accuracy's variance by what varied, most important first; empty for too few trials.

    Optuna's fANOVA (Hutter, Hoos and Leyton-Brown 2014, ICML), on an in-memory study of the rows.
    """
    finished = [row for row in rows if row.trials]
    keys = varying_keys([row.treatment for row in finished])
    if len(finished) < FEWEST_FOR_IMPORTANCE or len(keys) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    step = math.ceil(len(finished) / MOST_FOR_IMPORTANCE)
    spaces = {key: _distribution([row.treatment.get(key) for row in finished]) for key in keys}
    study = optuna.create_study(direction="maximize")
    for row in finished[::step]:
        params = {key: _value(row.treatment.get(key), spaces[key]) for key in keys}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=row.accuracy))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(values: Sequence[object]) -> BaseDistribution:
    """The range that ``values`` span, on a log scale where they span a factor of ten; else the set of them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted({repr(v) for v in values}))
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high >= 10 * low)


def _value(value: object, space: BaseDistribution) -> object:
    from optuna.distributions import FloatDistribution

    return float(str(value)) if isinstance(space, FloatDistribution) else repr(value)


def unfinished(rows: Sequence[Row]) -> list[StoredTrial]:
    """Every trial that did not finish, for what became of it."""
    return [trial for row in rows for trial in row.other_trials if trial.status is not Status.FINISHED]
