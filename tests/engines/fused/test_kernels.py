"""Triton's kernels against their plain versions, on a CPU through Triton's own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from distilbench.engines.fused import kernels
from distilbench.engines.fused.cuda import optimizer as tabled
from distilbench.engines.fused.dropout import EXTENT, dropout_scale, philox_mask
from distilbench.engines.fused.engine import FusedEngine
from tests.engines.fused.test_engine import losses_of, models, trial

__all__ = ["models", "trial"]

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
@torch.no_grad()
def test_kernels_are_tried_before_they_are_trusted(monkeypatch, caplog):
    """Also where the first to ask runs without gradients, as a frozen prefix does."""
    assert kernels.works.__wrapped__("cpu")
    monkeypatch.setattr(kernels, "adamw", lambda *args: torch.empty(-1))
    assert not kernels.works.__wrapped__("cpu")
    assert [r.message for r in caplog.records if "left out: RuntimeError" in r.message]


@inside
@pytest.mark.parametrize("whole", [(5, 16), (37, 20), (3, 2, 24, 24), (3, 2, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_the_same_bit_for_bit(whole, dtype):
    keys = torch.tensor([12345678901234567, 3])
    ours = kernels.philox_mask(keys, 4, 6554, whole, EXTENT, dtype)
    assert torch.equal(ours, philox_mask(keys, 4, 6554, whole, EXTENT, dtype))


@inside
@pytest.mark.parametrize("with_copy", [False, True])
def test_adamw_is_the_same_up_to_rounding(with_copy):
    torch.manual_seed(0)
    trials, size, decayed, low = 3, 2500, 1800, slice(700, 1700)
    rows, gradient, mean = (torch.randn(trials, size) for _ in range(3))
    square = torch.rand(trials, size)
    numbers, constants = torch.rand(trials, 4) * 0.1, torch.rand(trials, 6) * 0.1 + 0.1
    factors = torch.rand(trials)
    shape = trials, low.stop - low.start
    copy = torch.empty(shape, dtype=torch.bfloat16) if with_copy else None
    compute_grad = torch.randn(shape).bfloat16() if with_copy else None
    expected = [t.clone() for t in (rows, mean, square)]
    whole = gradient.clone()
    if compute_grad is not None:
        whole[:, low] = compute_grad.float()
        gradient[:, low] = torch.nan  # is not to be read
    tabled.adamw(expected[0], whole, expected[1:], numbers, constants, factors, decayed)
    kernels.adamw(rows, gradient, compute_grad, [mean, square], copy, numbers, constants, factors, decayed, low)
    for ours, plain in zip((rows, mean, square), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-7)
    if copy is not None:
        # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(copy.float(), rows[:, low], rtol=2**-7, atol=0)


def attention_by_the_book(rows, asked, first, lengths, draws, heads, width):
    """Sentence by sentence with the plain :func:`attend`; rows of no sentence stay zero."""
    size = rows.shape[2] // ((3 if asked is None else 2) * heads)
    trials, orders, sentences = len(rows), *first.shape
    shape = (sentences, heads, width if asked is None else 1, width)
    keep = torch.ones(orders, *shape) if draws is None else philox_mask(*draws, shape, EXTENT, torch.float32)
    out = []
    for t in range(trials):
        o = t if orders > 1 else 0
        context = torch.zeros(len(rows[t]) if asked is None else sentences, heads * size)
        for s in range(sentences):
            start, n = int(first[o, s]), int(lengths[o, s])
            if not n:
                continue
            pieces = rows[t, start : start + n].view(n, -1, heads, size).permute(1, 2, 0, 3)[:, None, None]
            query = None if asked is None else asked[t, s].view(1, 1, heads, 1, size)
            own = keep[o, s, :, :n, :n][None, None] if asked is None else keep[o, s, :, :, :n][None, None]
            scale = 1 if draws is None else dropout_scale(0.1)
            q, k, v = pieces if query is None else (query, *pieces)
            got = (((q @ k.mT / size**0.5).softmax(-1) * own * scale) @ v)[0, 0].transpose(0, 1).flatten(1)
            where = torch.arange(start, start + n) if asked is None else torch.tensor([s])
            context = context.index_add(0, where, got)
        out.append(context)
    return torch.stack(out)


@inside
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("trials", "orders"), [(1, 1), (2, 1), (2, 2)])
def test_attention_and_its_gradient_are_the_same_up_to_rounding(drops, apart, trials, orders):
    torch.manual_seed(0)
    heads, size, tokens, width = 2, 8, 40, 24
    lengths = torch.tensor([[5, 20, 3, 0], [11, 1, 17, 9]])[:orders]
    first = (lengths.cumsum(1) - lengths) * (lengths > 0)
    rows = torch.randn(trials, tokens, (2 if apart else 3) * heads * size, requires_grad=True)
    asked = torch.randn(trials, 4, heads * size, requires_grad=True) if apart else None
    draws = (torch.tensor([12345, 1 << 50])[:orders], 3, 6554) if drops else None
    leaves = [rows] if asked is None else [rows, asked]
    ours = kernels.attend(rows, asked, first, lengths, draws, heads, width, EXTENT)
    plain = attention_by_the_book(rows, asked, first, lengths, draws, heads, width)
    there = torch.ones_like(plain) if asked is None else (lengths > 0).expand(trials, -1)[:, :, None].float()
    torch.testing.assert_close(ours * there, plain, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(plain) * there
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(plain, leaves, weight), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@inside
@pytest.mark.parametrize(("kind", "freezing"), [("distilbert", "freeze=none"), ("bert", "freeze.layers=1")])
def test_training_by_kernels_is_training(trial, splits_of, recorder, monkeypatch, kind, freezing):
    """All kernels together, two orders of examples, dropout on and the last batch a short one."""
    common = (freezing, "train.epochs=1", "data.max_train_examples=11", "output.save_model=false")
    trials = [trial(*common, f"seed={seed}", kind=kind, still=False) for seed in (1, 2)]
    splits = splits_of(trials[0])
    plain, _ = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    used = []
    monkeypatch.setattr(kernels, "usable", lambda tensor: used.append(tensor) or True)
    ours, _ = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    assert used
    np.testing.assert_allclose(ours, plain, rtol=2e-5)
