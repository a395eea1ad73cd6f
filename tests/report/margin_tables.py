"""Make the tables of docs/statistics.md and noninferiority.py: ``python -m tests.report.margin_tables level`` (or
``power``, ``compared``).

A trial is right on an example if the sum of ease, difficulty, a treatment effect on the example (the same for all
seeds), a seed effect on all examples, and noise is above zero; all are normal, difficulty with standard deviation 1.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

import numpy as np
from scipy import optimize, stats

from distilbench.report import noninferiority as ni
from distilbench.report.power import DISCORDANCE, EXAMPLE_SHARE, assume_spread, power
from distilbench.report.statistics import critical_difference, paired_accuracy_interval

ACCURACY = 0.9
SEEDS = (1, 2, 3, 5, 10)


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a trial's other effects, relative to the difficulty, which all trials share, at 1."""

    example: float = 0.0
    seed: float = 0.0
    chance: float = 0.0


MIXTURES = {
    "losses only": Noise(),
    "little noise": Noise(chance=0.05),
    "noise": Noise(chance=0.3),
    "examples": Noise(example=0.2),
    "examples and noise": Noise(example=0.15, chance=0.2),
    "the same, small seed shift": Noise(example=0.15, seed=0.02, chance=0.2),
    "seed shift": Noise(seed=0.1, chance=0.1),
    "all three": Noise(example=0.2, seed=0.3, chance=0.3),
}


def simulate(rng, draws, examples, noise, loss, seeds):
    """Return A right minus B right, int8 (draws, seeds, examples); B has ``ACCURACY``, A has ``loss`` less."""
    scale = math.sqrt(1 + noise.example**2 + noise.seed**2 + noise.chance**2)
    difficulty, right = rng.standard_normal((draws, 1, examples), np.float32), []
    for accuracy in (ACCURACY - loss, ACCURACY):
        score = difficulty + np.float32(scale * stats.norm.ppf(accuracy))
        score = score + np.float32(noise.example) * rng.standard_normal((draws, 1, examples), np.float32)
        score = score + np.float32(noise.seed) * rng.standard_normal((draws, seeds, 1), np.float32)
        if noise.chance:
            score = score + np.float32(noise.chance) * rng.standard_normal((draws, seeds, examples), np.float32)
        right.append((score > 0).view(np.int8))
    return right[0] - right[1]


def good_enough(difference, margin):
    """Apply noninferiority_over_seeds on paired seeds to many draws: (draws, seeds, examples) -> bool (draws,)."""
    draws, seeds, examples = difference.shape
    by_seed, by_example = difference.mean(2, dtype=float), difference.mean(1, dtype=float)
    mean, found, counts = by_seed.mean(1), np.ones(draws, bool), list(map(ni.effective_counts, by_example))
    if seeds > 1:
        squares = np.abs(difference).sum((1, 2), dtype=float) - examples * np.sum(by_seed**2, 1)
        squares += seeds * (examples * mean**2 - np.sum(by_example**2, 1))
        noise = squares / ((seeds - 1) * (examples - 1) * seeds * examples)
        from_seeds, observed = by_seed.var(1, ddof=1) / seeds, by_example.var(1, ddof=1) / examples
        from_examples = np.maximum(observed - noise, 0)
        t, z = (critical_difference([(1.0, df)], 2 * ni.ALPHA) for df in (seeds - 1, math.inf))
        error = np.maximum(np.sqrt(from_seeds + from_examples), 1e-300)
        expected = np.array([ni.variance_at_loss(*c, margin) for c in counts])
        growth = np.sqrt(np.maximum(expected / np.maximum(observed, 1e-300), 1))
        found = growth * (t * from_seeds + z * from_examples) / error - mean < margin
    for i in np.flatnonzero(found):
        found[i] = is_claimed(*counts[i], margin)
    return found


@cache
def is_claimed(only_a, only_b, examples, margin):
    """Return whether the exact test claims it; if Tango's score is far from critical, the score decides alone."""
    score = ni._tango_score(only_a, only_b, examples, margin)
    if score > -1.7 or (score < -2.4 and only_a + only_b >= 20):
        return score < -2
    return ni._region(only_a, only_b, examples).p(margin) < ni.ALPHA


def shares(draws, examples, noise, loss, margin, seeds=SEEDS):
    """Return the share of ``draws`` called good enough, for each number of seeds.

    A single seed is a statement about two trained models only, so that it is simulated without a seed effect.
    """
    rng, found, chunk = np.random.default_rng(examples), np.zeros(len(seeds)), max(1, 400_000 // examples)
    for start in range(0, draws, chunk):
        difference = simulate(rng, min(chunk, draws - start), examples, noise, loss, max(seeds))
        found += [0 if n == 1 and noise.seed else good_enough(difference[:, :n], margin).sum() for n in seeds]
    if noise.seed and 1 in seeds:
        found[seeds.index(1)] = draws * shares(draws, examples, replace(noise, seed=0.0), loss, margin, (1,))[0]
    return found / draws


LEVELS = {64: (0.10, 10_000), 400: (0.03, 10_000), 872: (0.02, 10_000), 5_000: (0.01, 3_000)}
"""Number of examples -> the margin, which is also the true loss, and the number of draws."""


def level_table():
    """Print the chance, in per cent, of calling a treatment good enough that loses the margin."""
    for examples, (margin, draws) in LEVELS.items():
        for name, noise in MIXTURES.items():
            found = shares(draws, examples, noise, margin, margin)
            print_row(f"{examples:,}", f"{100 * margin:g}", name, *(f"{100 * x:.1f}" for x in found))


POWERS = {872: 4_000, 5_000: 1_000}
DISCORDANCES = (0.04, 0.06, 0.10)


def power_table():
    """Print the chance, in per cent, of calling a treatment good enough that loses nothing; in brackets as planned."""
    for examples, draws in POWERS.items():
        for margin in (0.01, 0.02) if examples < 1_000 else (0.005, 0.01):
            for discordance in DISCORDANCES:
                found = shares(draws, examples, noise_of(discordance, EXAMPLE_SHARE), 0.0, margin)
                planned = [power(assume_spread(discordance), n, examples, margin) for n in SEEDS]
                cells = (f"{100 * x:.0f} ({100 * y:.0f})" for x, y in zip(found, planned, strict=True))
                print_row(f"{examples:,}", f"{100 * margin:g}", f"{100 * discordance:g}", *cells)


def noise_of(discordance, example_share):
    """Return noise by which equally accurate trials differ on ``discordance``, ``example_share`` of it for any seed."""
    ease = stats.norm.ppf(ACCURACY)

    def both(correlation):
        return stats.multivariate_normal.cdf([ease, ease], cov=[[1, correlation], [correlation, 1]])

    def misses(log_deviations):
        example, chance = np.exp(log_deviations) ** 2
        same, other = (1 + example) / (1 + example + chance), 1 / (1 + example + chance)
        return 2 * (ACCURACY - both(other)) - discordance, 2 * (both(same) - both(other)) - example_share * discordance

    example, chance = np.exp(optimize.root(misses, [math.log(0.2), math.log(0.2)], tol=1e-9).x)
    return Noise(example=float(example), chance=float(chance))


COMPARED = {20: 0.05, 64: 0.05, 200: 0.02, 400: 0.02, 872: 0.01, 5_000: 0.01, 20_000: 0.005}
"""Number of examples -> the margin at which the tests for a single seed are compared."""


def compared_table(which=tuple(COMPARED)):
    """Print the largest chance, in per cent, of calling a loss of the margin good enough, and the power at no loss."""
    for examples in which:
        margin = COMPARED[examples]
        tests = {"Tango": tango, "Bonett and Price": bonett_price, "this": is_claimed}
        if examples <= 400:
            tests |= {"Sidik": sidik, "unconfined": unconfined}
        cells = []
        for test in tests.values():
            power_here = chance(*boundary(test, examples, margin), examples, 0.0, DISCORDANCE)
            cells.append(f"{100 * largest_chance(test, examples, margin):.2f} ({100 * power_here:.0f})")
        print_row(f"{examples:,}", f"{100 * margin:g}", *cells)


def largest_chance(test, examples, margin):
    """Return the largest chance, over discordances, of claiming that a loss of the margin is below it."""
    losses, fewest = boundary(test, examples, margin)
    discordances = margin + np.linspace(0, 1, 400) ** 2 * (_most_discordant(examples) - margin)
    return max(chance(losses, fewest, examples, margin, discordance) for discordance in discordances)


def _most_discordant(examples):
    """Return where enumeration ends: half of few examples, less of many; far more than equal trials differ on."""
    return 0.5 if examples <= 400 else 0.25 if examples < 5_000 else 0.12


@cache
def boundary(test, examples, margin):
    """Return counts of losses, and for each the fewest gains with which ``test`` claims good enough; both (losses,)."""
    rate = (_most_discordant(examples) + margin) / 2
    losses = np.arange(min(examples, math.ceil(examples * rate + 6 * math.sqrt(examples * rate))) + 1)
    fewest, gains = np.empty_like(losses), 0
    for count in losses:  # more losses never need fewer gains
        while gains + count <= examples and not test(gains, count, examples, margin):
            gains += 1
        fewest[count] = gains
    return losses, fewest


def chance(losses, fewest, examples, loss, discordance):
    """Return the exact chance of a claim, given a boundary."""
    lose, gain = (discordance + loss) / 2, (discordance - loss) / 2
    beside = stats.binom.sf(fewest - 1, examples - losses, gain / (1 - lose))
    return float(np.sum(stats.binom.pmf(losses, examples, lose) * beside))


def tango(gains, losses, examples, margin):
    return ni._tango_score(gains, losses, examples, margin) <= -stats.norm.isf(ni.ALPHA)


def bonett_price(gains, losses, examples, margin):
    return -paired_accuracy_interval(gains, losses, examples)[1] < margin


def unconfined(gains, losses, examples, margin):
    region = ni._region(gains, losses, examples)
    return replace(region, low=0.0, high=1.0).p(margin) - ni.BETA < ni.ALPHA


def sidik(gains, losses, examples, margin):
    """Order outcomes by the score at the margin: the region's limit is the margin at the observed score."""
    observed = -float(ni._tango_score(gains, losses, examples, margin)) - 1e-10
    with mock.patch.object(ni, "Z", observed):
        return ni._Region(examples, margin, 0.0, 1.0).p(margin) - ni.BETA < ni.ALPHA


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    {"level": level_table, "power": power_table, "compared": compared_table}[sys.argv[1]]()
