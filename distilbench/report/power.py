"""Power of the non-inferiority test: of a given design, and the design that is needed for a given power.

A design is a number of seeds and of examples. The variance of a mean difference has three components (:class:`Spread`):
more seeds reduce two of them, more examples two; the one that no number of seeds reduces gives the *floor*. The power
is that of the test in :mod:`distilbench.report.noninferiority` in a normal approximation; simulated power differs by
a few points (``docs/statistics.md``). All quantities are shares; a margin of one point is 0.01.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from distilbench.report.noninferiority import variance_at_loss
from distilbench.report.statistics import ALPHA, SeedSpread, critical_difference

POWER = 0.8
"""Required power of a design; a margin that gives less counts as "can't be shown"."""
DISCORDANCE = 0.06
"""Assumed share of examples on which two trials of equal accuracy differ, before any trial; measured: 4 to 11 %."""
EXAMPLE_SHARE = 0.5
"""Assumed share of the discordance that does not depend on seeds, which a single seed can't show.

The intervals of two settings on SST-2's 872 sentences, three seeds each, imply 0.3 to 0.6 at such a discordance. Their
accuracies varied over seeds by 0.07 to 0.48 points, which independent noise per example explains: no shift is assumed.
"""
PLANNED_SEEDS = 5
"""Seeds that are assumed when counting the examples that a margin needs, unless more have been trained."""
MOST_SEEDS = 20
"""Beyond so many seeds, more examples are the better advice, so :func:`needed` counts both."""
_QUANTILES = (np.arange(200) + 0.5) / 200
_INFINITE = 1_000_000_000
"""Practically infinitely many seeds or examples."""


@dataclass(frozen=True)
class Spread:
    """Variance components of the difference between one trial of A and one of B.

    ``example_variance`` is per example and the same for all seeds, ``interaction_variance`` per example and pair of
    seeds, ``seed_variance`` per pair of seeds and the same for all examples.
    """

    example_variance: float
    interaction_variance: float
    seed_variance: float = 0.0

    def of_seeds(self, seeds: int, examples: int) -> float:
        """Return the variance of the mean difference that is due to having only ``seeds`` pairs of trials."""
        return (self.interaction_variance / examples + self.seed_variance) / seeds


def assume_spread(discordance: float = DISCORDANCE) -> Spread:
    """Return the assumed spread of two trials that differ on this share of examples."""
    return Spread(EXAMPLE_SHARE * discordance, (1 - EXAMPLE_SHARE) * discordance)


def estimate_spread(seed_spread: SeedSpread) -> Spread:
    """Return the observed spread; of a single pair, only the discordance is observed."""
    examples = len(seed_spread.by_example)
    if seed_spread.num_seeds == 1:
        return assume_spread((int(np.abs(seed_spread.by_example).sum()) + 1) / examples)  # + 1: never zero
    over_seeds = sum(variance for variance, _ in seed_spread.seed_components)
    return Spread(
        example_variance=seed_spread.example_variance * examples,
        interaction_variance=seed_spread.interaction_variance * seed_spread.num_seeds * examples,
        seed_variance=max(over_seeds - seed_spread.interaction_variance, 0.0) * seed_spread.num_seeds,
    )


def power(spread: Spread, seeds: int, examples: int, margin: float, alpha: float = ALPHA, loss: float = 0.0) -> float:
    """Return the probability that a true ``loss`` is shown to be below ``margin`` or shown to exist: the larger."""
    from scipy.special import ndtr

    error = math.sqrt(spread.of_seeds(seeds, examples) + spread.example_variance / examples)
    room = max(margin - loss, loss) - _half_widths(spread, seeds, examples, margin, alpha)
    return float(np.mean(ndtr(room / error) if error else room > 0))  # 0 if no example has differed


def _half_widths(spread: Spread, seeds: int, examples: int, margin: float, alpha: float) -> np.ndarray:
    """Return how far below the margin an observed loss must be, ``(draws,)`` over draws of the estimated variance.

    The variance estimated from few seeds is itself uncertain, and more often too small than too large: with its mean,
    two seeds would have no power at all.
    """
    from scipy.special import chdtri

    discordance = spread.example_variance + spread.interaction_variance
    by_example = spread.example_variance + spread.interaction_variance / seeds
    counted = max(round(examples * discordance / by_example), 1) if by_example else examples  # see effective_counts
    differ = counted * discordance / 2
    given = float(variance_at_loss(differ, differ, counted, margin))
    half = np.array([critical_difference([(given, math.inf)], 2 * alpha)])
    if seeds == 1:
        return half
    t, z = (critical_difference([(1.0, df)], 2 * alpha) for df in (seeds - 1, math.inf))
    drawn = chdtri(seeds - 1, 1 - _QUANTILES) / (seeds - 1)  # estimates of a variance of 1
    from_seeds, from_examples = spread.of_seeds(seeds, examples) * drawn, spread.example_variance / examples
    weighted = (t * from_seeds + z * from_examples) / np.sqrt(np.maximum(from_seeds + from_examples, 1e-300))
    growth = max(given * examples / by_example, 1.0) if by_example else 1.0
    return np.asarray(np.maximum(half, weighted * math.sqrt(growth)))


@dataclass(frozen=True)
class Needed:
    """The design that would decide a comparison with a power of ``POWER``.

    ``seeds``: how many on the present examples; None if no number suffices, because the examples alone leave ``floor``,
    half the width of the interval for infinitely many seeds, at the level of the corrected test. ``examples``: how many
    with ``with_seeds`` seeds; only if ``seeds`` is None or above ``MOST_SEEDS``, otherwise None.
    """

    seeds: int | None
    examples: int | None
    with_seeds: int
    floor: float


def needed(spread: Spread, seeds: int, examples: int, margin: float, rows: int = 1, loss: float = 0.0) -> Needed:
    """Count the seeds and, if these do not suffice, the examples that decide; ``seeds`` are trained or planned.

    ``rows`` tests share the level: each must pass the first step of Holm's method, which is conservative. ``loss`` is
    the assumed true loss.
    """
    alpha = ALPHA / rows

    def decides(some_seeds: int, some_examples: int) -> bool:
        return power(spread, some_seeds, some_examples, margin, alpha, loss) >= POWER

    floor = critical_difference([(spread.example_variance / examples, math.inf)], 2 * alpha)
    enough = _fewest(lambda n: decides(n, examples), at_least=2)
    with_seeds, more = max(seeds, PLANNED_SEEDS), None
    if enough is None or enough > MOST_SEEDS:
        while not decides(with_seeds, _INFINITE) and with_seeds < _INFINITE:
            with_seeds *= 2
        if enough is None or with_seeds < enough:  # otherwise the present examples suffice
            more = _fewest(lambda n: decides(with_seeds, n), at_least=examples)
    return Needed(enough, more, with_seeds, floor)


def _fewest(holds: Callable[[int], bool], at_least: int) -> int | None:
    """Return the smallest number for which a monotone predicate ``holds``; None if there is none."""
    if not holds(_INFINITE):
        return None
    return at_least + bisect_left(range(at_least, _INFINITE), True, key=holds)


def needed_to_decide(seed_spread: SeedSpread, margin: float, rows: int = 1) -> Needed:
    """Return what would decide an undecided comparison, at the spread observed so far.

    Assumes no true loss, as in planning: power at the observed loss adds little to its p (Hoenig and Heisey 2001,
    Am. Stat. 55:19). If the present seeds should have sufficed under this assumption, the row is undecided because of
    the observed loss, which is then assumed to be true: good enough and worse both decide. At least one more seed.
    """
    spread, examples = estimate_spread(seed_spread), len(seed_spread.by_example)
    found = needed(spread, seed_spread.num_seeds, examples, margin, rows)
    if found.seeds is None or found.seeds > seed_spread.num_seeds:
        return found
    found = needed(spread, seed_spread.num_seeds, examples, margin, rows, loss=max(-seed_spread.difference, 0.0))
    return found if found.seeds is None else replace(found, seeds=max(found.seeds, seed_spread.num_seeds + 1))


def plan_power(examples: int, seeds: int, margin: float, rows: int = 1) -> tuple[float, Needed]:
    """Return, before a sweep of ``rows`` settings with ``seeds`` seeds each, the power, and the design that is needed.

    The power is that to show that a setting that loses nothing is good enough; compare it with ``POWER``.
    """
    spread = assume_spread()
    return power(spread, seeds, examples, margin, ALPHA / rows), needed(spread, seeds, examples, margin, rows)
