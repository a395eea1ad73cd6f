"""The wording of outcomes, for all tables and sentences; never parsed."""

from __future__ import annotations

import math

from distilbench.report.formats import interval, percent, points
from distilbench.report.power import Needed
from distilbench.report.rows import Difference, Row, Untested
from distilbench.report.statistics import verdict
from distilbench.results import Verdict

VERDICTS = {verdict: verdict.value for verdict in Verdict} | {Verdict.AHEAD: "ahead, to be confirmed"}


def describe_verdict(row: Row) -> str:
    """Return a row's verdict in words, the reason for having none, or its status; empty without a baseline."""
    if not row.trials:
        return row.status
    untested = f"not {'judged' if row.difference else 'tested'}: {reason_untested(row)}" if row.untested else ""
    claim = "baseline" if row.is_baseline else untested or _verdict(row)
    return ", ".join(filter(None, (claim, "has not learned" if row.has_learned is False else "")))


def _verdict(row: Row) -> str:
    """Return the verdict with its number of seeds; for one seed, better and worse hold "with this seed" only."""
    if (fresh := row.final_row) is not row:
        unlearned = "has not learned" if fresh.trials else "diverged"
        outcome = VERDICTS[fresh.verdict] if fresh.verdict else reason_untested(fresh) or unlearned
        num_seeds = fresh.difference.num_seeds if fresh.difference else len(fresh.other_trials)
        return f"{outcome} with fresh seeds (n = {num_seeds})"
    if not row.verdict or not row.difference:
        return ""
    n = row.difference.num_seeds
    this_seed = " with this seed" if n == 1 and row.verdict in (Verdict.BETTER, Verdict.WORSE) else ""
    return f"{VERDICTS[row.verdict]}{this_seed} (n = {n})"


def describe_above_majority(accuracy: float, majority: float) -> str:
    """Compare an accuracy in words with that of always predicting the most frequent label."""
    return f"{percent(accuracy)}, while always predicting the most frequent label scores {percent(majority)}"


def reason_untested(row: Row) -> str:
    """Return why a row was not tested."""
    seeds = f" {', '.join(map(str, row.seeds))}" if row.untested is Untested.SEEDS else ""
    return f"{row.untested or ''}{seeds}"


def describe_loss(found: Difference) -> str:
    """Say how much a setting loses at most and, if the loss is significant, how much it loses."""
    if found.loses_at_most <= 0:
        return "loses nothing"
    is_shown = verdict(found.low, found.high, found.p_holm) is Verdict.WORSE
    shown = f"loses {-found.points:.2f} points, " if is_shown else "loses "
    return f"{shown}at most {found.loses_at_most:.2f} points"


def what_decides(needed: Needed | None, examples_there: int) -> str:
    """Say what would decide an undecided row, with a power of 80 %."""
    if needed is None:
        return "more seeds may decide it"
    examples = f"about {needed.examples:,} examples with {needed.with_seeds} seeds" if needed.examples else ""
    if needed.seeds is None:
        left = f"leave ± {100 * needed.floor:.1f} points" if needed.floor >= 0.0005 else "are too few"
        limit = f"the {examples_there:,} examples alone {left}"
        return f"no number of seeds would decide it, because {limit}" + (f"; {examples} would" if examples else "")
    return f"{needed.seeds} seeds would decide it" + (f", or {examples}" if examples else "")


def decided_by(row: Row) -> str:
    """Say briefly what would decide a row: ``6 seeds``, ``3,200 examples``, ``never``; empty if decided."""
    needed = row.difference.needed if row.difference else None
    if needed is None:
        return ""
    return f"{needed.seeds} seeds" if needed.seeds else f"{needed.examples:,} examples" if needed.examples else "never"


def describe_difference(row: Row) -> str:
    """State a row's difference from the baseline: points, interval, number of seeds."""
    found = row.difference
    if found is None:
        return row.status if math.isnan(row.points) else f"{points(row.points)} points, {describe_verdict(row)}"
    return f"{points(found.points)} points (95 % {interval(found.low, found.high)}, n = {found.num_seeds})"


def describe_confirmation(row: Row) -> str:
    """State whether a row's advantage survived fresh seeds, with both figures."""
    assert row.confirmation
    was_ahead, is_ahead = (round(one.points, 2) > 0 for one in (row, row.confirmation))  # as the figures are told
    survived = row.confirmation.verdict is Verdict.BETTER
    word = "survived" if survived else "is not shown by" if is_ahead else "did not survive"
    word += " fresh seeds"
    if not was_ahead:
        word = "appears only now" if survived else "was not there in the sweep either"
    then, now = describe_difference(row), describe_difference(row.confirmation)
    return f"The advantage of {row.name} {word}: {then} in the sweep; {now} in the confirmation."
