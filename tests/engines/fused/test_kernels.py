"""Triton's kernels against their plain versions, on a CPU through Triton's own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from distilbench.engines.fused import kernels
from distilbench.engines.fused.autograd import dropout_add_layer_norm
from distilbench.engines.fused.cuda import optimizer
from distilbench.engines.fused.dropout import dropout_scale, philox_mask
from distilbench.engines.fused.engine import FusedEngine
from distilbench.engines.fused.kernels import DropoutSite, Sentences
from tests.engines.fused.test_engine import losses_of, models, trial

__all__ = ["models", "trial"]

FLOAT = torch.float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device():
    """Where kernels run: here in the interpreter; the tests of a GPU put their own device in its place."""
    if not INTERPRETED:
        pytest.skip("runs in the process with TRITON_INTERPRET=1 that another test starts")
    return torch.device("cpu")


@pytest.fixture
def on_device(device):
    """Make tensors there unless they say otherwise."""
    with device:
        yield


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it would start")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is in the test extra where it has wheels")
def test_kernels_equal_their_plain_versions_in_tritons_interpreter():
    """In a process of its own, for the interpreter has to be chosen before the kernels are imported."""
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 9):  # a CUDA build of torch chooses the version
        pytest.skip("the interpreter of triton before 3.9 does not take NumPy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.parametrize("whole", [(5, 16), (37, 20), (3, 2, 24, 24), (3, 2, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_the_same_bit_for_bit(device, whole, dtype):
    draws = DropoutSite(torch.tensor([12345678901234567, 3, 1 << 55], device=device), 4, 6554)
    assert torch.equal(kernels.dropout_mask(draws, whole, dtype), philox_mask(draws, whole, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_is_tried_before_training(device, dtype):
    details_of = {"dropout": (), "adamw": (dtype,), "rows": (FLOAT,), "sums": (dtype,), "attention": (dtype, 2, 8),
                  "norm": (dtype, 24)}  # fmt: skip
    assert details_of.keys() == kernels.SMOKE_TESTS.keys()
    for work, details in details_of.items():
        with torch.no_grad():
            assert kernels._is_working.__wrapped__(work, device, *details), work


@pytest.mark.parametrize("with_copy", [False, True])
def test_clipping_and_adamw_are_the_same_up_to_rounding(on_device, with_copy):
    torch.manual_seed(0)
    trials, size, decayed, low = 3, 2500, 1800, slice(700, 1700)
    params, grad, mean = (torch.randn(trials, size) for _ in range(3))
    square = torch.rand(trials, size)
    rule = torch.rand(trials, 4) * 0.1, torch.rand(trials, 6) * 0.1 + 0.1, torch.rand(trials)
    shape = trials, low.stop - low.start
    compute = (torch.randn(shape).bfloat16(), torch.empty(shape, dtype=torch.bfloat16)) if with_copy else (None, None)
    expected = [t.clone() for t in (params, mean, square)]
    whole = grad.clone()
    if with_copy:
        whole[:, low] = compute[0].float()
        grad[:, low] = torch.nan  # is not to be read
    optimizer.adamw(expected[0], whole, expected[1:], *rule, decayed)
    norms, limits = torch.empty(trials), torch.tensor([1.0, torch.inf, 100.0])
    factors = kernels.clip(grad, compute[0], low, limits, norms)
    torch.testing.assert_close(norms, torch.linalg.vector_norm(whole, dim=1))
    torch.testing.assert_close(factors, (limits / (norms + 1e-6)).clamp(max=1.0))
    kernels.adamw(params, grad, compute, [mean, square], rule, (decayed, low)).run()
    for ours, plain in zip((params, mean, square), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=1e-7)
    if with_copy:
        # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(compute[1].float(), params[:, low], rtol=2**-7, atol=0)


def test_a_norm_that_is_not_finite_stays_with_its_trial(on_device):
    grad = torch.ones(3, 9000)
    grad[0, 8500], grad[1, 3] = torch.nan, torch.inf
    norms = torch.empty(3)
    factors = kernels.clip(grad, None, slice(0, 0), torch.ones(3), norms)
    assert factors.isnan().tolist() == [True, False, False]
    assert factors[1:].tolist() == [0.0, pytest.approx(9000**-0.5)]
    assert norms.isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_summed_in_single_precision(on_device, dtype):
    x = torch.randn(3, 70, 48).to(dtype)
    close = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts off where a GPU rounds
    torch.testing.assert_close(kernels.sum_rows(x).float(), x.float().sum(1), rtol=close, atol=close)


@pytest.mark.parametrize("orders", [1, 3])
def test_rows_get_the_sum_of_their_values(on_device, orders):
    torch.manual_seed(0)
    index, values = torch.randint(9, (orders, 70)), torch.randn(3, 70, 200)
    index[:, 3:60:2] = 4  # a row with values in several blocks
    table = torch.randn(3, 3000)[:, 100:2300].view(3, 11, 200)
    expected = table.double().scatter_add(1, index[:, :, None].expand_as(values), values.double())
    kernels.add_rows(table, index, values)
    torch.testing.assert_close(table, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "rows"), [(24, 5), (384, 21)])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_adding_and_normalising_is_the_same_up_to_rounding(on_device, width, rows, drops, shares):
    """With an order for each trial, or with a stream and vectors of the norm that all share, which have no gradient."""
    torch.manual_seed(0)
    trials, shared = 3, 1 if shares else 3
    x = torch.randn(shared, rows, width, requires_grad=not shares)
    weight, bias = torch.randn(2, shared, width)
    leaves = [torch.randn(trials, rows, width), torch.randn(trials, 40)[:, :width] if width < 40 else
              torch.randn(trials, width)]  # fmt: skip
    leaves += [] if shares else [weight, bias]
    for leaf in leaves:
        leaf.requires_grad_()
    leaves += [] if shares else [x]
    branch, branch_bias = leaves[:2]
    draws = DropoutSite(torch.tensor([12345, 1 << 50, 7])[:shared], 3, 6554) if drops else None
    keep = philox_mask(draws, (rows, width), torch.float32) * dropout_scale(0.1) if drops else None
    added = branch + branch_bias[:, None]
    plain = dropout_add_layer_norm(x.expand(trials, -1, -1), added, keep, weight, bias, 1e-12)
    ours, copy = kernels.add_norm(x, branch, branch_bias, (weight, bias), draws, 1e-12)
    assert copy is ours
    assert error(ours, plain, leaves, leaves) < 1e-5


def test_a_copy_in_low_precision_has_its_own_gradient(on_device):
    torch.manual_seed(0)
    leaves = [torch.randn(2, 7, 768), torch.randn(2, 7, 768).bfloat16(), torch.randn(2, 768).bfloat16(),
              torch.randn(2, 768), torch.randn(2, 768)]  # fmt: skip
    for leaf in leaves:
        leaf.requires_grad_()
    x, branch, branch_bias, weight, bias = leaves
    ours, copy = kernels.add_norm(x, branch, branch_bias, (weight, bias), None, 1e-12)
    plain = dropout_add_layer_norm(x, branch.float() + branch_bias.float()[:, None], None, weight, bias, 1e-12)
    torch.testing.assert_close(copy.float(), ours, rtol=2**-7, atol=0)  # the interpreter cuts off where a GPU rounds
    weights = torch.randn_like(plain), torch.randn_like(plain).bfloat16()
    grads = torch.autograd.grad([ours, copy], leaves, list(weights))
    expected = torch.autograd.grad([plain, plain.bfloat16()], leaves, list(weights))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected, strict=True):
        assert grad.dtype == wanted.dtype
        scale = 2.0**-6 if grad.dtype == torch.bfloat16 else 1e-5
        assert float((grad.float() - wanted.float()).abs().max() / wanted.float().abs().max()) < scale


def attention_by_the_book(rows, query, sentences, draws, heads):
    """Sentence by sentence with the plain products; rows of no sentence stay zero, and so do absent sentences."""
    first, lengths, width = sentences
    size = rows.shape[2] // ((3 if query is None else 2) * heads)
    shape = (first.shape[1], heads, width if query is None else 1, width)
    keep = None if draws is None else philox_mask(draws, shape, rows.dtype) * dropout_scale(0.1)
    out = []
    for t in range(len(rows)):
        o = t if len(first) > 1 else 0
        context = torch.zeros(len(rows[t]) if query is None else first.shape[1], heads * size, dtype=rows.dtype)
        for s in range(first.shape[1]):
            start, n = int(first[o, s]), int(lengths[o, s])
            if not n:
                continue
            pieces = rows[t, start : start + n].view(n, -1, heads, size).permute(1, 2, 0, 3)
            q, k, v = pieces if query is None else (query[t, s].view(heads, 1, size), *pieces)
            own = 1 if keep is None else keep[o, s, :, : q.shape[1], :n]
            got = (((q @ k.mT / size**0.5).softmax(-1) * own) @ v).transpose(0, 1).flatten(1)
            where = torch.arange(start, start + n) if query is None else torch.tensor([s])
            context = context.index_add(0, where, got)
        out.append(context)
    return torch.stack(out)


def sentences_of(lengths, width):
    lengths = torch.tensor(lengths)
    return Sentences((lengths.cumsum(1) - lengths) * (lengths > 0), lengths, width)


def error(ours, plain, leaves, precise_leaves):
    """The largest difference of contexts and of their gradients, as a share of the largest value of each."""
    weight = torch.randn_like(plain).to(ours.dtype)
    grads = torch.autograd.grad(ours, leaves, weight)
    expected = torch.autograd.grad(plain, precise_leaves, weight.to(plain.dtype))
    pairs = zip((ours.detach(), *grads), (plain.detach(), *expected), strict=True)
    return max(float((a.to(b.dtype) - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("drops", "apart", "orders"),
    [(False, False, 2), (True, False, 1), (True, False, 2), (False, True, 1), (True, True, 2)],
)
def test_attention_and_its_gradient_are_the_same_up_to_rounding(on_device, drops, apart, orders):
    """Several sentences of a few lengths, one of them not there, in one order for all trials or in one for each."""
    torch.manual_seed(0)
    trials, heads, size, tokens = 2, 2, 8, 40
    sentences = sentences_of([[5, 20, 3, 0], [11, 1, 17, 9]][:orders], 24)
    rows = torch.randn(trials, tokens, (2 if apart else 3) * heads * size, requires_grad=True)
    query = torch.randn(trials, 4, heads * size, requires_grad=True) if apart else None
    draws = DropoutSite(torch.tensor([12345, 1 << 50])[:orders], 3, 6554) if drops else None
    ours = kernels.attention(rows, query, sentences, draws, heads)
    plain = attention_by_the_book(rows, query, sentences, draws, heads)
    leaves = [leaf for leaf in (rows, query) if leaf is not None]
    assert error(ours, plain, leaves, leaves) < 1e-5


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("width", "head_size", "apart"), [(16, 32, False), (51, 64, False), (131, 96, True)])
def test_attention_takes_sentences_of_any_length(on_device, dtype, close, width, head_size, apart):
    """Longer than a block, and of odd lengths. Of bfloat16 the interpreter makes no products."""
    torch.manual_seed(0)
    sentences = sentences_of([[width, 1, width // 2]], width)
    rows = torch.randn(1, 2 * width + 3, (2 if apart else 3) * head_size).to(dtype).requires_grad_()
    query = torch.randn(1, 3, head_size).to(dtype).requires_grad_() if apart else None
    leaves = [leaf for leaf in (rows, query) if leaf is not None]
    draws = DropoutSite(torch.tensor([7]), 2, 6554)
    ours = kernels.attention(rows, query, sentences, draws, 1)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    plain = attention_by_the_book(wide[0], wide[1] if apart else None, sentences, draws, 1)
    assert error(ours, plain, leaves, wide) < close


def test_scores_far_apart_neither_overflow_nor_vanish(on_device):
    """What was summed so far is scaled down as larger scores come, block after block."""
    tokens = 80
    rows = torch.zeros(1, tokens, 3 * 16)
    rows[..., :16], rows[0, :, 16] = 10.0, torch.linspace(-40, 40, tokens)
    rows[..., 32:] = torch.randn(tokens, 16)
    sentences = sentences_of([[tokens]], tokens)
    ours = kernels.attention(rows, None, sentences, None, 1)
    torch.testing.assert_close(ours, attention_by_the_book(rows, None, sentences, None, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "freezing"), [("distilbert", "freeze=none"), ("bert", "freeze.layers=1")])
@pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1 that another test starts")
def test_training_with_kernels_equals_training_without(trial, splits_of, recorder, monkeypatch, kind, freezing):
    """All kernels together: two orders of examples, dropout, and batches that lack a sentence; two steps."""
    common = (freezing, "train.epochs=2", "train.batch_size=3", "data.max_train_examples=2", "train.max_length=16",
              "data.max_validation_examples=4", "output.save_model=false")  # fmt: skip
    trials = [trial(*common, f"seed={seed}", kind=kind, still=False) for seed in (1, 2)]
    splits = splits_of(trials[0])
    plain, _ = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    used = []
    monkeypatch.setattr(kernels, "can_run", lambda work, *details: used.append(work) or True)
    ours, _ = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    assert set(used) == {"dropout", "adamw", "attention", "norm", "sums", *(["rows"] * (freezing == "freeze=none"))}
    np.testing.assert_allclose(ours, plain, rtol=2e-5)
