"""The report as a whole, the Pareto front of score and cost, and the answer.

The answer names the cheapest setting that is good enough, what it saves, and what accuracy it costs at most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from distilbench.cli import pluralize
from distilbench.report import words
from distilbench.report.formats import interval, percent, points, saving
from distilbench.report.rows import PRAISE, Row, average, noise_of_time
from distilbench.results import StoredTrial, Verdict

LEAST_SAVING, LEAST_MEMORY = 5.0, 10.0
"""Savings of time and memory below this many per cent are not mentioned: repeated runs differ by as much, and in a
process that trains several trials, the first takes less memory (7 % for MiniLM)."""


@dataclass(frozen=True)
class Report:
    """The trials of one protocol as rows, best first; tables show the first ``shown`` of all ``rows``.

    ``sample`` is any trial, for what the protocol fixes; ``margin`` is in percentage points; ``majority`` the accuracy
    of always predicting the most frequent label, if there are predictions; ``url`` opens the table of runs once
    ``ui_command`` runs (None if a server is running); ``slices`` are the best rows on parts of the examples; ``curves``
    are the best rows with ``(step, accuracy)`` of one trial at each evaluation on the selection split; ``sources`` are
    the overrides that select this model and text; ``confirmation`` holds the sweep's rows that were trained again;
    ``num_settings`` is how many settings the tests are corrected for.
    """

    title: str
    rows: tuple[Row, ...]
    shown: int
    sample: StoredTrial
    margin: float
    notes: tuple[str, ...] = ()
    curves: tuple[tuple[Row, Sequence[tuple[int, float]]], ...] = ()
    confirmation: tuple[Row, ...] = ()
    url: str = ""
    ui_command: str | None = None
    majority: float | None = None
    slices: tuple[Row, ...] = ()
    num_settings: int = 0
    default_treatment: Mapping[str, object] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def table_rows(self) -> tuple[Row, ...]:
        """The rows that tables show: the best ones, and always the baseline."""
        return tuple(row for i, row in enumerate(self.rows) if i < self.shown or row.is_baseline)

    @property
    def baseline(self) -> Row | None:
        """The baseline's row."""
        return next((row for row in self.rows if row.is_baseline), None)

    @property
    def candidates(self) -> list[Row]:
        """All rows with a finished trial, except the baseline's."""
        return [row for row in self.rows if row.trials and not row.is_baseline]


def score_of(row: Row) -> float:
    """Return a row's mean score on the selection split, by which a sweep ranks it; higher is better."""
    mean, _ = average([trial.score for trial in row.trials])
    return -mean if row.trials[0].metric == "loss" else mean


def by_score(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have a result, best score first."""
    scored = [(score_of(row), row) for row in rows if row.trials]
    return [row for _, row in sorted(scored, key=lambda pair: math.inf if math.isnan(pair[0]) else -pair[0])]


CostOf = Callable[[Row], float]


def pareto_front(rows: Sequence[Row], cost: CostOf) -> list[Row]:
    """Return the Pareto front of score and cost, cheapest first; the study has the same one."""
    known = [row for row in rows if row.trials and not math.isnan(cost(row)) and not math.isnan(score_of(row))]
    front: list[Row] = []
    for row in sorted(known, key=lambda row: (cost(row), -score_of(row))):
        last = (score_of(front[-1]), cost(front[-1])) if front else (-math.inf, 0.0)
        if score_of(row) > last[0] or (score_of(row), cost(row)) == last:
            front.append(row)
    return front


def answer(report: Report) -> list[str]:
    """Return the sentence that states the report's outcome, and at most one more."""
    base, candidates = report.baseline, report.candidates
    if not candidates and (base is None or not base.trials):
        ended = Counter(trial.status.value for row in report.rows for trial in row.other_trials)
        return [f"No trial finished: {', '.join(f'{count} {status}' for status, count in ended.items())}."]
    if base is None or not base.trials:
        finished = pluralize(len(candidates), "setting")
        return [f"{finished} finished, but there is no finished baseline to compare with."]
    if not candidates:
        return ["Only the baseline finished: there is nothing to compare it with."]
    if base.has_learned is False and report.majority:
        best = next((row for row in candidates if row.has_learned), None)
        other = f"Most accurate: {best.name}, {percent(best.accuracy)}." if best else ""
        other = "Nor has any other setting." if all(row.has_learned is False for row in candidates) else other
        said = f"The baseline has not learned: {words.describe_above_majority(base.accuracy, report.majority)}. "
        told = (f"{said}No setting can be judged against it.", _confirmed(report.confirmation, []) or other)
    else:
        told = _of_candidates(report)
    return [sentence for sentence in told if sentence]


def _of_candidates(report: Report) -> tuple[str, str]:
    candidates, tried = report.candidates, tried_settings(report)
    nothing = f"None of {tried}" if len(report.rows) > 2 else "Nothing"
    if not any(row.final_row.difference for row in candidates):
        return f"{nothing} could be tested against the baseline: {words.reason_untested(candidates[0])}.", ""
    good = good_rows(report)
    confirmed = _confirmed(report.confirmation, good)
    if not good:
        unlearned = sum(row.has_learned is False for row in candidates)
        verb = "has" if unlearned == 1 else "have"
        beside = f"; {pluralize(unlearned, 'setting')} {verb} not learned" if unlearned else ""
        wanted = f"to be better than the baseline, or to lose less than {pluralize(report.margin, 'point')}"
        return f"{nothing} was shown {wanted}{beside}.", confirmed or _undecided(report)
    cheapest = min(good, key=cost_rank(report))
    saved = ", ".join(_savings(cheapest, report))
    first = f"{cheapest.name} {_claim(cheapest)}" + (f", and takes {saved}" if saved else "")
    rank = f"the cheapest of {len(good)} such settings, of" if len(good) > 1 else "the only one of"
    first += f"; {rank} {tried}." if len(report.rows) > 2 else "."
    best = next((row for row in good if row.final_verdict is not Verdict.GOOD_ENOUGH), cheapest)
    return first, confirmed or ("" if best is cheapest else f"Most accurate: {best.name} {_claim(best)}.")


def good_rows(report: Report) -> list[Row]:
    """Return the settings with a favourable verdict: better than the baseline, ahead, or good enough."""
    return [row for row in report.candidates if row.final_verdict in PRAISE]


def trial_to_use(report: Report, best: str) -> StoredTrial | None:
    """Return the trial whose model is to be used; None if no trial finished.

    ``answer`` takes the cheapest good setting, otherwise the baseline if it has learned, otherwise the setting with the
    best score; ``accuracy`` always takes the best mean score on the selection split. Of a setting's seeds, the one with
    the best score is taken.
    """
    scored = by_score(report.rows)
    base = report.baseline
    kept = [base] if base and base.trials and base.has_learned is not False else scored[:1]
    answers = sorted(good_rows(report), key=cost_rank(report)) or kept
    row = next(iter(scored if best == "accuracy" else answers), None)
    return max(row.trials, key=lambda trial: score_of(replace(row, trials=(trial,)))) if row else None


def cost_rank(report: Report) -> CostOf:
    """Return the sort key for cost: FLOPs if all rows have them, else comparable seconds, else trained parameters."""
    rows = report.candidates
    if all(row.cost.flops > 0 for row in rows):
        return lambda row: row.cost.flops
    if not any(math.isnan(row.saving("seconds")) for row in rows):
        return lambda row: row.cost.seconds
    return lambda row: float(row.trainable_parameters)


def _claim(row: Row) -> str:
    """State the verdict of a good row, with its figures."""
    found = row.final_row.difference
    assert found is not None
    size = f"{points(found.points)} points (95 % {interval(found.low, found.high)})"
    this_seed = " with this seed" if found.num_seeds == 1 else ""
    if row.final_verdict is Verdict.BETTER:
        return f"is better{this_seed}, {size}"
    if row.final_verdict is Verdict.AHEAD:
        return f"is ahead, yet to be confirmed, {size}"
    return f"is good enough{this_seed}: it {words.describe_loss(found)}"


def _savings(row: Row, report: Report) -> Iterator[str]:
    noise, _ = noise_of_time([trial for each in report.rows for trial in each.trials])
    least = max(LEAST_SAVING, 2 * math.sqrt(2) * noise)
    if abs(row.saving("flops")) > 0.5:
        yield f"{saving(row.saving('flops'), is_count=True)} FLOPs"
    if abs(row.saving("seconds")) >= least:
        yield f"{'about ' if row.is_saving_estimate else ''}{saving(row.saving('seconds'))} time"
    if abs(row.saving("memory")) >= LEAST_MEMORY:
        yield f"{saving(row.saving('memory'))} memory"


def _undecided(report: Report) -> str:
    """Name the cheapest undecided setting, and what would decide."""
    undecided = [row for row in report.candidates if row.final_verdict is Verdict.UNDECIDED]
    open_rows = [row for row in undecided if row.has_learned is not False]
    hopeful = [row for row in open_rows if row.points > -report.margin]
    if not open_rows:
        return ""
    row = min(hopeful or open_rows, key=cost_rank(report))
    found = row.final_row.difference
    assert found is not None
    saved = ", ".join(_savings(row, report))
    told = f"{row.name}{f' ({saved})' if saved else ''} may lose up to {max(found.loses_at_most, 0):.2f} points"
    return f"Undecided: {told}; {words.what_decides(found.needed, row.final_row.examples)}."


def tried_settings(report: Report) -> str:
    """Count the settings that were tried, without the baseline, and how the unfinished ones ended."""
    tried = [row for row in report.rows if not row.is_baseline]
    ended = Counter(row.other_trials[-1].status.lower() for row in tried if not row.trials)
    told = ", ".join(f"{count} {status}" for status, count in ended.most_common())
    count = f"the {pluralize(len(tried), 'setting')} tried" if len(tried) > 1 else "the setting tried"
    return f"{count} ({told})" if told else count


def _confirmed(confirmation: Sequence[Row], good: Sequence[Row]) -> str:
    """State whether an advantage survived fresh seeds, preferably that of one of the ``good`` rows."""
    if not confirmation:
        return ""
    named = [row for row in confirmation if any(row.treatment == other.treatment for other in good)]
    return words.describe_confirmation((named or confirmation)[0])
