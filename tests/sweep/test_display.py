"""What a dry run says of a plan, beside its points."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from optuna.distributions import IntDistribution

from distilbench.sweep.reporting import _warning
from distilbench.sweep.space import Point


def plan(points, total, seeds=None, dimensions=("freeze.layers",), margin=1.0):
    space = SimpleNamespace(dimensions=dict.fromkeys(dimensions, IntDistribution(0, 3)))
    settings = SimpleNamespace(sweep=SimpleNamespace(seeds=seeds), margin=margin)
    return SimpleNamespace(points=points, total=total, space=space, settings=settings)


@pytest.mark.parametrize(
    ("made", "examples", "said"),
    [
        (plan([Point({}, (), True)], 12), 872, "1 seed on 872 examples would .* 1 point with .* (of 11 settings, 6 %"),
        (plan([Point({"freeze.layers": k, "seed": s}, (), k == 0) for s in (1, 2, 3) for k in (0, 1, 2)], 9,
              dimensions=("freeze.layers", "seed")), 872, "3 seeds on 872 .* (of 2 settings, .*with 5 seeds would"),
        (plan([Point({"freeze.layers": 3})], 1, seeds=[1, 2]), 3_500, "2 seeds on 3,500 .* (of 1 setting, .*; 5 seeds"),
        (plan([Point({"freeze.layers": 3})], 1, seeds=[1, 2, 3, 4, 5]), 3_500, None),
        (plan([Point({}, (), True)], 12, margin=5.0), 872, None),
    ],
)  # fmt: skip
def test_a_dry_run_warns_where_seeds_and_examples_cannot_show_the_margin(made, examples, said):
    import re

    warning = _warning(made, examples)
    assert (warning is None) == (said is None)
    if said:
        assert re.search(said.replace("(", r"\("), warning), warning
