"""What it takes to show that a loss is below a margin: how likely a design shows it, and which design would.

A design is a number of seeds and of examples. The variance of a mean difference has three parts (:class:`Spread`): more
seeds shrink two of them, more examples two, and what examples leave after any number of seeds is the *floor*. The power
follows from the test of :mod:`distilbench.report.noninferiority`, normal chances assumed; simulated power lies within a
few points of it (``docs/statistics.md``). All shares; a margin of one point is 0.01.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from distilbench.report.noninferiority import ALPHA, variance_at_loss
from distilbench.report.statistics import SeedSpread, critical_difference

POWER = 0.8
"""Chance with which a design is to decide; less counts as "can't be shown"."""
DISCORDANCE = 0.06
"""Share of examples on which two trials of equal accuracy differ, where none has been seen; 4 to 11 % were."""
LASTING = 0.5
"""Share of the discordance that stays whatever the seeds, where one seed can't tell.

The intervals of two settings on SST-2's 872 sentences, three seeds each, imply 0.3 to 0.6 at such a discordance. Their
accuracies scattered over seeds by 0.07 to 0.48 points, which chance on single examples explains: no shift is assumed.
"""
PLANNED_SEEDS = 5
"""Seeds for which the examples are counted that a margin needs, unless more have been trained."""
MOST_SEEDS = 20
"""Beyond so many seeds, more examples are the better advice, so both are counted."""
_QUANTILES = (np.arange(200) + 0.5) / 200
_BEYOND = 1_000_000_000
"""As good as infinitely many seeds or examples."""


@dataclass(frozen=True)
class Spread:
    """Variances of the difference between one trial of A and one of B.

    ``lasting`` is that of an example whatever the seeds, ``noise`` that of an example anew with each pair of seeds,
    ``shift`` that of all examples alike with each pair of seeds.
    """

    lasting: float
    noise: float
    shift: float = 0.0

    def of_seeds(self, seeds: int, examples: int) -> float:
        """Variance of the mean difference that comes from ``seeds`` pairs of trials."""
        return (self.noise / examples + self.shift) / seeds


def spread_assumed(discordance: float = DISCORDANCE) -> Spread:
    """Return the spread of two trials that differ on a share of examples, where it has not been seen."""
    return Spread(LASTING * discordance, (1 - LASTING) * discordance)


def spread_seen(seen: SeedSpread) -> Spread:
    """Return the spread of what was seen; one pair shows its discordance only."""
    examples = len(seen.by_example)
    if seen.n == 1:
        return spread_assumed((int(np.abs(seen.by_example).sum()) + 1) / examples)  # none seen is not none
    over_seeds = sum(variance for variance, _ in seen.seed_parts)
    return Spread(
        lasting=seen.example_variance * examples,
        noise=seen.noise * seen.n * examples,
        shift=max(over_seeds - seen.noise, 0.0) * seen.n,
    )


def power(spread: Spread, seeds: int, examples: int, margin: float, alpha: float = ALPHA, loss: float = 0.0) -> float:
    """Return the chance that a true ``loss`` is shown to be below ``margin``, or shown to be one: the likelier."""
    from scipy.special import ndtr

    error = math.sqrt(spread.of_seeds(seeds, examples) + spread.lasting / examples)
    room = max(margin - loss, loss) - _half_widths(spread, seeds, examples, margin, alpha)
    return float(np.mean(ndtr(room / error) if error else room > 0))  # where nothing differed, few examples are few


def _half_widths(spread: Spread, seeds: int, examples: int, margin: float, alpha: float) -> np.ndarray:
    """How far from the margin a loss must be seen to be: as the test asks, ``(draws,)`` over draws of its variance.

    The variance between few seeds is itself badly known, and by luck small more often than large: taken at its mean,
    it would leave two seeds without any power.
    """
    from scipy.special import chdtri

    discordance, by_example = spread.lasting + spread.noise, spread.lasting + spread.noise / seeds
    counted = max(round(examples * discordance / by_example), 1) if by_example else examples  # see effective_counts
    differ = counted * discordance / 2
    given = float(variance_at_loss(differ, differ, counted, margin))
    half = np.array([critical_difference([(given, math.inf)], 2 * alpha)])
    if seeds == 1:
        return half
    t, z = (critical_difference([(1.0, df)], 2 * alpha) for df in (seeds - 1, math.inf))
    drawn = chdtri(seeds - 1, 1 - _QUANTILES) / (seeds - 1)  # of a variance that is 1
    from_seeds, from_examples = spread.of_seeds(seeds, examples) * drawn, spread.lasting / examples
    weighted = (t * from_seeds + z * from_examples) / np.sqrt(np.maximum(from_seeds + from_examples, 1e-300))
    growth = max(given * examples / by_example, 1.0) if by_example else 1.0
    return np.asarray(np.maximum(half, weighted * math.sqrt(growth)))


@dataclass(frozen=True)
class Needed:
    """What would decide a comparison with a chance of ``POWER``.

    ``seeds`` on the examples there are; None where no number of seeds will do, since examples alone leave ``floor``:
    half the width of an interval over infinitely many seeds, at the level of the corrected test. ``examples`` with
    ``with_seeds`` seeds, where ``seeds`` is None or above ``MOST_SEEDS``; None elsewhere.
    """

    seeds: int | None
    examples: int | None
    with_seeds: int
    floor: float


def needed(spread: Spread, seeds: int, examples: int, margin: float, rows: int = 1, loss: float = 0.0) -> Needed:
    """Count the seeds, and where those won't do the examples, that decide with ``seeds`` of them trained or planned.

    ``rows`` tests share the level: each is held to its first step of Holm's, which is the careful side. ``loss`` is the
    true loss that is assumed.
    """
    alpha = ALPHA / rows

    def decides(some_seeds: int, some_examples: int) -> bool:
        return power(spread, some_seeds, some_examples, margin, alpha, loss) >= POWER

    floor = critical_difference([(spread.lasting / examples, math.inf)], 2 * alpha)
    enough = _fewest(lambda n: decides(n, examples), at_least=2)
    with_seeds, more = max(seeds, PLANNED_SEEDS), None
    if enough is None or enough > MOST_SEEDS:
        while not decides(with_seeds, _BEYOND) and with_seeds < _BEYOND:
            with_seeds *= 2
        if enough is None or with_seeds < enough:  # else the examples that there are will do
            more = _fewest(lambda n: decides(with_seeds, n), at_least=examples)
    return Needed(enough, more, with_seeds, floor)


def _fewest(holds: Callable[[int], bool], at_least: int) -> int | None:
    """Return the smallest number that ``holds``, given that all above it do; None where none does."""
    if not holds(_BEYOND):
        return None
    return at_least + bisect_left(range(at_least, _BEYOND), True, key=holds)


def what_it_takes(seen: SeedSpread, margin: float, rows: int = 1) -> Needed:
    """Say what would decide an undecided comparison, at the spread seen so far.

    As trials are planned, at no true loss: power at the loss seen says little more than its p (Hoenig and Heisey 2001,
    Am. Stat. 55:19). Only where the seeds at hand should then have decided, it is the loss seen that keeps the row
    undecided; so that is assumed to be true, and either verdict, good enough or worse, decides. One more seed at least.
    """
    spread, examples = spread_seen(seen), len(seen.by_example)
    found = needed(spread, seen.n, examples, margin, rows)
    if found.seeds is None or found.seeds > seen.n:
        return found
    found = needed(spread, seen.n, examples, margin, rows, loss=max(-seen.difference, 0.0))
    return found if found.seeds is None else replace(found, seeds=max(found.seeds, seen.n + 1))


def plan(examples: int, seeds: int, margin: float, rows: int = 1) -> tuple[float, Needed]:
    """Say before a sweep how likely ``rows`` settings that lose nothing, ``seeds`` each, are shown to be good enough.

    Returns that power of each, to be compared with ``POWER``, and what it would take.
    """
    spread = spread_assumed()
    return power(spread, seeds, examples, margin, ALPHA / rows), needed(spread, seeds, examples, margin, rows)
