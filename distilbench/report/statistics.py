"""Tests and intervals for a difference in accuracy: paired, and corrected for multiple comparisons.

*One seed each.* Two trained models on the same examples: the exact McNemar test and the interval of Bonett and Price.
Both apply only to these two models.

*Several seeds.* The question is whether one treatment beats another on new seeds and new examples, so both are random
effects. Seeds and examples are crossed (every seed sees every example), like readers and cases in diagnostic studies,
so the same decomposition into mean squares applies; see :func:`compare_over_seeds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distilbench.results import Verdict

LEVEL = 0.95
"""Confidence level of every interval; a difference is significant if p is below ``1 - LEVEL``."""
ALPHA = 0.025
"""One-sided level of the test that a loss is below the margin, and of every bound of a loss."""
Z = 1.959963984540054
"""The critical value of the normal distribution, two-sided at ``LEVEL`` and one-sided at ``ALPHA``."""


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided exact p of McNemar's test from the two discordant counts; 1.0 if both are zero.

    Under the null hypothesis, each discordant example falls to either side with probability 1/2 (McNemar 1947,
    Psychometrika 12:153; binomial form: Fagerland, Lydersen and Laake 2013, BMC Med. Res. Methodol. 13:91).
    """
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_accuracy_interval(only_a: int, only_b: int, examples: int) -> tuple[float, float, float]:
    """Return the difference in accuracy A - B on shared examples with its limits: ``(difference, low, high)``.

    Wald's interval after adding one example to each discordant count (Bonett and Price 2012, J. Educ. Behav.
    Stat. 37:479): of the three intervals that Fagerland, Lydersen and Laake (2014, Stat. Med. 33:2850) recommend, the
    one whose coverage never fell below 95 %. Its width is positive even if nothing is discordant.
    """
    if examples < 1 or only_a + only_b > examples:
        raise ValueError(f"discordant counts {only_a} and {only_b} do not fit {examples} examples")
    centre = (only_a - only_b) / (examples + 2)
    half = Z * math.sqrt(_laplace_variance(only_a + only_b, only_a - only_b, examples))
    return (only_a - only_b) / examples, max(centre - half, -1.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class SeedSpread:
    """The difference of two treatments per example, and the variance of its mean in independent components.

    ``by_example`` is ``(examples,)``, A - B averaged over seeds. ``seed_components`` are
    ``(variance, degrees of freedom)`` of the grand mean over seeds, empty for a single pair; ``interaction_variance``
    is the part of that variance that is due to seed x example noise. ``num_seeds`` counts pairs of seeds or, without
    common seeds, the seeds of the smaller side.
    """

    by_example: np.ndarray
    seed_components: tuple[tuple[float, int], ...]
    interaction_variance: float
    num_seeds: int

    @property
    def difference(self) -> float:
        """Accuracy of A minus accuracy of B over all seeds and examples, as a share."""
        return float(self.by_example.mean())

    @property
    def example_variance(self) -> float:
        """Variance of the difference due to examples, which no number of seeds reduces.

        The variance of ``by_example`` includes ``interaction_variance``, which the seed components already contain, so
        it is subtracted.
        """
        examples = len(self.by_example)
        spread = float(self.by_example.var(ddof=1)) / examples if examples > 1 else 0.0
        return max(spread - self.interaction_variance, 0.0)

    @property
    def variance_components(self) -> list[tuple[float, float]]:
        """All components ``(variance, degrees of freedom)`` of the difference's variance."""
        return [*self.seed_components, (self.example_variance, math.inf)]


def spread_over_seeds(correct_a: Mapping[int, np.ndarray], correct_b: Mapping[int, np.ndarray]) -> SeedSpread:
    """Measure how a difference varies over seeds and examples; each side maps seed -> ``(examples,)`` bool, correct.

    With two or more common seeds, these are paired and others ignored. Without common seeds (and two or more on each
    side), seeds count as independent. One seed on each side, or one common seed, is a single pair. Anything else raises
    ValueError.
    """
    shared = sorted(set(correct_a) & set(correct_b))
    is_paired = bool(shared) or len(correct_a) == len(correct_b) == 1
    if not is_paired and min(len(correct_a), len(correct_b)) < 2:
        raise ValueError(
            f"seeds must be shared, or two or more on each side, got {sorted(correct_a)} and {sorted(correct_b)}"
        )
    sides = [[side[seed] for seed in shared or sorted(side)] for side in (correct_a, correct_b)]
    lengths = sorted({len(correct) for side in sides for correct in side})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"trials must be compared on the same examples, got {lengths} of them")
    a, b = (np.stack(side).astype(float) for side in sides)  # (seeds, examples) of zeros and ones
    by_example = (a - b).mean(axis=0) if is_paired else a.mean(axis=0) - b.mean(axis=0)
    found = [(*_seed_variance(x), len(x) - 1) for x in ([a - b] if is_paired else [a, b]) if len(x) > 1]
    components, noise = tuple((variance, df) for variance, _, df in found), sum(noise for _, noise, _ in found)
    return SeedSpread(by_example, components, noise, num_seeds=min(len(a), len(b)))


class SeedComparison(NamedTuple):
    """Accuracy of A minus accuracy of B as a share, its interval, and the p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def compare_over_seeds(spread: SeedSpread) -> SeedComparison:
    """Test a difference and compute its interval; a single pair uses McNemar and :func:`paired_accuracy_interval`.

    The variance of the mean difference has a component from the seeds and one from the examples, estimated by the mean
    squares of a seeds x examples layout (Obuchowski and Rockette 1995, Commun. Stat. Simul. Comput. 24:285; Gallas et
    al. 2009, Commun. Stat. Theory Methods 38:2586). The first has ``seeds - 1`` degrees of freedom, the second
    practically infinitely many, and the critical value is their mean weighted by variance (Cochran and Cox 1950,
    Experimental Designs; conservative: Lee and Gurland 1975, JASA 70:933). Because a few seeds may agree by chance, the
    result is never more certain than the test for fixed seeds: the wider interval and the larger p of the two are
    returned.
    """
    by_example, difference, components = spread.by_example, spread.difference, spread.variance_components
    if spread.num_seeds == 1:
        only_a, only_b = int(np.sum(by_example > 0)), int(np.sum(by_example < 0))
        interval = paired_accuracy_interval(only_a, only_b, len(by_example))
        return SeedComparison(*interval, mcnemar_exact(only_a, only_b))
    given = math.sqrt(_laplace_variance(float(np.sum(by_example**2)), float(by_example.sum()), len(by_example)))
    half = max(critical_difference(components, 1 - LEVEL), Z * given)
    p = max(p_of_difference(components, abs(difference)), math.erfc(abs(difference) / given / math.sqrt(2)))
    return SeedComparison(difference, max(difference - half, -1.0), min(difference + half, 1.0), p)


def _seed_variance(values: np.ndarray) -> tuple[float, float]:
    """Return the variance over seeds of the grand mean of ``(seeds, examples)``, and the interaction noise in it.

    These are MS(seeds) and MS(interaction) of the two-way layout without replication, divided by seeds x examples.
    """
    by_seed, by_example = values.mean(axis=1), values.mean(axis=0)
    residual = values - by_seed[:, None] - by_example + values.mean()
    seeds, examples = values.shape
    noise = np.sum(residual**2) / ((seeds - 1) * max(examples - 1, 1) * values.size)
    return float(by_seed.var(ddof=1) / seeds), float(noise)


def _laplace_variance(squares: float, total: float, examples: int) -> float:
    """Return the variance of a mean of differences in [-1, 1] from their sums, after adding a -1 and a +1."""
    mean = total / (examples + 2)
    return ((squares + 2) / (examples + 2) - mean**2) / (examples + 2)


def critical_difference(components: Sequence[tuple[float, float]], p: float) -> float:
    """Return the critical difference at two-sided ``p``, given independent ``(variance, df)`` components.

    This is Cochran and Cox's t', the mean of the critical values weighted by variance, times the standard error.
    """
    from scipy.special import stdtrit

    total = sum(variance for variance, _ in components)
    weighted = sum(-variance * stdtrit(df, p / 2) for variance, df in components)
    return float(weighted / math.sqrt(total)) if total > 0 else 0.0


def p_of_difference(components: Sequence[tuple[float, float]], difference: float) -> float:
    """Return the two-sided p whose critical difference is ``difference``; 0 if p is below 1e-200."""
    from scipy.optimize import brentq

    smallest = 1e-200
    if difference == 0:
        return 1.0
    if critical_difference(components, smallest) <= difference:
        return 0.0
    log_p = brentq(
        lambda x: critical_difference(components, math.exp(x)) - difference, math.log(smallest), 0.0, xtol=1e-10
    )
    return math.exp(log_p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple comparisons by Holm's method, keeping their order.

    Holm (1979, Scand. J. Stat. 6:65): the i-th smallest of m is multiplied by m - i + 1, and the results are made
    monotone. Controls the family-wise error rate under any dependence between the tests.
    """
    p = np.asarray(p_values)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]), 1.0)
    return [float(value) for value in corrected]


def verdict(low: float, high: float, p: float, p_loss: float = 1.0) -> Verdict:
    """Decide between better, good enough, worse and undecided from both (corrected) p-values.

    ``p`` is that of no difference, ``p_loss`` that of a loss of the margin or more; ``low`` and ``high`` are the limits
    of the difference A - B. Better and worse need both p below ``1 - LEVEL`` and an interval that excludes zero. A loss
    shown to be below the margin is good enough, even if the loss itself is significant.
    """
    differs = p < 1 - LEVEL
    if differs and low > 0:
        return Verdict.BETTER
    if p_loss < ALPHA:
        return Verdict.GOOD_ENOUGH
    return Verdict.WORSE if differs and high < 0 else Verdict.UNDECIDED
