"""What many rows say together: the report as a whole, its rows by score, and the front of score and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from distilbench.report.costs import average
from distilbench.report.rows import Row
from distilbench.results import StoredTrial


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
