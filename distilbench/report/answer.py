"""The answer that stands on top of every report: which setting, what it saves, what it costs, and how sure that is."""

from __future__ import annotations

from collections import Counter

from distilbench.report.findings import Confirmed, Report
from distilbench.report.formats import counted, interval, points
from distilbench.report.words import above_floor, reason_untested, size_of
from distilbench.results import Verdict

WORTH_TELLING = 5.0
"""Per cent of training time below which a saving is not told of: two runs of one setting differ by as much."""


def answer(report: Report) -> list[str]:
    """Return the sentence that answers what was asked, and at most one more."""
    return [sentence for sentence in (_headline(report), _saving(report)) if sentence]


def _headline(report: Report) -> str:
    """What is better than the baseline, by how much, and how sure."""
    base, candidates = report.baseline, report.candidates
    if not candidates and (base is None or not base.trials):
        return f"No trial finished: {endings(report)}."
    if base is None or not base.trials:
        return f"{counted(len(candidates), 'setting')} finished, compared with nothing: there is no finished baseline."
    if not candidates:
        return "Only the baseline finished: there is nothing to compare it with."
    said = _confirmed(report.confirmation[0]) if report.confirmation else _of_candidates(report)
    if base.has_learned is False and report.floor:
        return f"The baseline has not learned: {above_floor(base.accuracy, report.floor)}. {said}"
    return said


def _of_candidates(report: Report) -> str:
    candidates, tried = report.candidates, tried_settings(report)
    several = len(report.rows) > 2
    if not any(row.difference for row in candidates):
        reason = reason_untested(candidates[0])
        return f"{f'None of {tried}' if several else 'Nothing'} could be tested against the baseline: {reason}."
    better = [row for row in candidates if row.claim in (Verdict.BETTER, Verdict.AHEAD)]
    if not better:
        return f"{f'None of {tried}' if several else 'Nothing'} was shown to be better than the baseline."
    best = better[0]
    assert best.difference is not None
    size = f"{points(best.difference.points)} points (95 % {interval(best.difference.low, best.difference.high)})"
    sure = "ahead of the baseline, yet to be confirmed" if best.claim is Verdict.AHEAD else "better"
    more = f", and {len(better) - 1} more" if len(better) > 1 else ""
    return f"{best.label} is {sure}: {size}{more}, of {tried}."


def tried_settings(report: Report) -> str:
    """Count the settings that were tried, the baseline aside, and say how those ended that did not finish."""
    tried = [row for row in report.rows if not row.is_baseline]
    ended = Counter(row.other_trials[-1].status.lower() for row in tried if not row.trials)
    told = ", ".join(f"{count} {status}" for status, count in ended.most_common())
    count = f"the {counted(len(tried), 'setting')} tried" if len(tried) > 1 else "the setting tried"
    return f"{count} ({told})" if told else count


def _confirmed(winner: Confirmed) -> str:
    """Whether the winner's advantage survived, both figures side by side."""
    then, now = (size_of(row) for row in (winner.first, winner.again))
    word = "survived fresh seeds" if winner.survived else "did not survive fresh seeds"
    if (winner.first.points or 0) <= 0:
        word = "was none in the sweep either" if not winner.survived else "shows only now"
    return f"The advantage of {winner.label} {word}: {then} in the sweep; {now} in the confirmation."


def _saving(report: Report) -> str:
    """What the cheapest setting costs that is not shown to be worse; empty where none saves time."""
    cheap = [row for row in report.candidates if row.difference and (row.saving.seconds or 0) >= WORTH_TELLING]
    cheap = [row for row in cheap if row.claim is not Verdict.WORSE]
    if not cheap:
        return ""
    row = max(cheap, key=lambda r: r.saving.seconds or 0)
    assert row.difference is not None
    cost = f"{points(row.difference.points)} points, 95 % {interval(row.difference.low, row.difference.high)}"
    return f"Most time saved without a shown loss: {row.label}, {row.saving.seconds:.0f} % less ({cost})."


def endings(report: Report) -> str:
    """Count how the trials ended that did not finish."""
    counts = Counter(trial.status.value for row in report.rows for trial in row.other_trials)
    return ", ".join(f"{n} {status}" for status, n in counts.items())
