"""Triton's kernels against their plain versions, on a CPU through Triton's own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from distilbench.engines import kernels, tabled
from distilbench.engines.dropout import EXTENT, philox_keep

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1 that another test starts"
)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it would start")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which torch brings along with CUDA only")
def test_kernels_equal_their_plain_versions_in_tritons_interpreter():
    """In a process of its own, for the interpreter has to be chosen before the kernels are imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@inside
@pytest.mark.parametrize("whole", [(5, 16), (37, 20), (3, 2, 24, 24), (3, 2, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_the_same_bit_for_bit(whole, dtype):
    keys = torch.tensor([12345678901234567, 3])
    ours = kernels.philox_keep(keys, 4, 6554, whole, EXTENT, dtype)
    assert torch.equal(ours, philox_keep(keys, 4, 6554, whole, EXTENT, dtype))


@inside
@pytest.mark.parametrize("with_copy", [False, True])
def test_adamw_is_the_same_up_to_rounding(with_copy):
    torch.manual_seed(0)
    trials, size, decayed, low = 3, 2500, 1800, (700, 1700)
    rows, gradient, mean = (torch.randn(trials, size) for _ in range(3))
    square = torch.rand(trials, size)
    numbers, constants = torch.rand(trials, 4) * 0.1, torch.rand(trials, 6) * 0.1 + 0.1
    factors = torch.rand(trials)
    copy = torch.empty(trials, low[1] - low[0], dtype=torch.bfloat16) if with_copy else None
    expected = [t.clone() for t in (rows, mean, square)]
    tabled.adamw(expected[0], gradient, expected[1:], numbers, constants, factors, decayed)
    kernels.adamw(rows, gradient, [mean, square], copy, numbers, constants, factors, decayed, low)
    for ours, plain in zip((rows, mean, square), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-7)
    if copy is not None:
        # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(copy.float(), rows[:, slice(*low)], rtol=2**-7, atol=0)
