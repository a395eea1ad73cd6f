"""Steps through static buffers: the same training as ever, and nothing in a step that a recording could not repeat."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import distilbench.engines.fused.cuda.graph_step as graph_step
from distilbench.engines.fused.dropout import CounterDropout, key_of
from distilbench.engines.fused.engine import FusedEngine
from distilbench.engines.fused.packing import pack
from distilbench.results import Status
from tests.engines.fused.test_engine import (  # the ladder, and the loop that it is compared with
    EIGHT,
    LADDER,
    LAST_EPOCH,
    SAVED,
    STEPS,
    SameMasks,
    assert_follows,
    eager,
    exported,
    losses_of,
    models,
    reference,
    trial,
)
from tests.engines.recording import FakeGraphs, Recording

__all__ = ["models", "trial"]


@pytest.fixture
def graphs(monkeypatch):
    """Groups record their steps, every bucket that comes again: the recordings, one set for each stack."""
    made: list[FakeGraphs] = []
    monkeypatch.setattr(
        "distilbench.engines.fused.cuda.graph_step.runner_for", lambda device: made.append(FakeGraphs()) or made[-1]
    )
    monkeypatch.setattr(graph_step, "MIN_REPLAYS", 1)
    return made


@pytest.fixture
def steps_taken(monkeypatch):
    """The :class:`GraphSteps` in the order in which they were made."""
    made = []
    run = graph_step.GraphSteps.__init__
    monkeypatch.setattr(graph_step.GraphSteps, "__init__", lambda self, *args: made.append(self) or run(self, *args))
    return made


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("case", LADDER)
def test_static_steps_equal_a_plain_loop_in_float64(trial, splits_of, recorder, kind, case):
    settings = trial(*LADDER[case], LAST_EPOCH, SAVED, kind=kind)
    splits, seen = splits_of(settings), recorder()
    model, losses, norms = reference(settings, splits)
    [result] = FusedEngine(torch.float64, graph_steps=True).train([settings], splits, seen)
    assert_follows(losses, norms, result, seen)
    for name, values in exported(settings).items():
        torch.testing.assert_close(values.double(), model.state_dict()[name].float().double(), rtol=0, atol=1e-7)


class SameCountedMasks(SameMasks):
    """The masks that static steps draw: one sentence a bin, numbered whatever the bucket."""

    def around_step(self, step, rows):
        super().around_step(step, rows)
        self.packed = pack(self.split, rows, share=False)
        self.drawn = CounterDropout(torch.tensor([key_of(self.settings.seed, "step", step)]))


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize(
    "freezing",
    ["freeze=none", "freeze.layers=1", "freeze.layers=2", "freeze.layers=1 freeze.dropout=false", "freeze=bias",
     "optim.layer_decay=0.5 train.label_smoothing=0.1", "optim=sgd optim.layer_decay=0.5 train.class_weights=balanced"],
)  # fmt: skip
def test_with_the_same_masks_dropout_is_that_of_the_architecture(
    trial, splits_of, recorder, monkeypatch, kind, freezing
):
    settings = trial(*freezing.split(), LAST_EPOCH, kind=kind, still=False)
    splits, seen = splits_of(settings), recorder()
    [result] = FusedEngine(torch.float64, graph_steps=True).train([settings], splits, seen)
    masks = SameCountedMasks(settings, splits)
    monkeypatch.setattr(torch.nn.functional, "dropout", masks)
    monkeypatch.setattr(PreTrainedModel, "train", eager(PreTrainedModel.train))
    _, losses, norms = reference(settings, splits, around_step=masks.around_step)
    assert_follows(losses, norms, result, seen)


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("freezing", ["freeze=none", "freeze.layers=1", "freeze.layers=2", "freeze=bias"])
def test_a_trial_alone_in_two_and_in_eight_is_the_same_trial(trial, splits_of, recorder, kind, freezing):
    """Eight orders of examples make other buckets than one, and other neighbours."""
    trials = [trial(freezing, *own, "train.epochs=1", kind=kind, still=False) for own in EIGHT]
    splits = splits_of(trials[0])
    engine = FusedEngine(torch.float64, graph_steps=True)
    eight, _ = losses_of(engine, trials, splits, recorder)
    two, _ = losses_of(engine, trials[3:5], splits, recorder)
    np.testing.assert_allclose(two, eight[3:5], rtol=1e-11)
    for t in (0, 3, 7):
        alone, _ = losses_of(engine, [trials[t]], splits, recorder)
        np.testing.assert_allclose(alone[0], eight[t], rtol=1e-11)


RECORDED = [
    ("distilbert", ("freeze=none",)),
    ("distilbert", ("freeze.layers=1",)),
    ("distilbert", ("freeze.layers=1", "train.precision=bf16")),
    ("distilbert", ("optim=sgd", "optim.momentum=0.9")),
    ("bert", ("freeze=none", "train.precision=bf16")),
    ("bert", ("freeze.layers=2",)),
]


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["one order", "two orders"])
@pytest.mark.parametrize(("kind", "overrides"), RECORDED)
def test_replayed_steps_are_the_steps_bit_for_bit(
    trial, splits_of, recorder, graphs, monkeypatch, kind, overrides, seeds
):
    """Everything that differs between steps reaches a recording through its buffers, the partial last batch too."""
    trials = [trial(*overrides, f"seed={seed}", f"optim.lr=1e-{3 + i}", kind=kind, still=False)
              for i, seed in enumerate(seeds)]  # fmt: skip
    splits = splits_of(trials[0])
    replayed, results = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    [made] = graphs
    assert len(made.graphs) > 1
    assert made.replays > STEPS / 2
    assert made.replays + made.direct == STEPS
    assert all(result.setup_seconds > 100 * len(made.graphs) for result in results), "recording belongs to set-up"
    monkeypatch.setattr("distilbench.engines.fused.cuda.graph_step.runner_for", lambda device: None)
    taken, expected = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    np.testing.assert_array_equal(replayed, taken)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(one.report.logits, other.report.logits)


@pytest.mark.parametrize("freezing", ["freeze=gradual", "freeze=scheduled freeze.layers=2"])
def test_steps_are_recorded_anew_where_what_is_frozen_moves(trial, splits_of, recorder, graphs, monkeypatch, freezing):
    common = (*freezing.split(), "train.eval_steps=5", "train.epochs=3", "train.precision=bf16")
    trials = [trial(f"seed={seed}", *common, still=False) for seed in (1, 2)]
    splits = splits_of(trials[0])
    replayed, _ = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    assert [made.replays > 0 for made in graphs] == [True] * 3
    assert all(made.used == made.graphs.keys() for made in graphs), "none is recorded for steps that others will take"
    monkeypatch.setattr("distilbench.engines.fused.cuda.graph_step.runner_for", lambda device: None)
    taken, _ = losses_of(FusedEngine(graph_steps=True), trials, splits, recorder)
    np.testing.assert_array_equal(replayed, taken)


@pytest.mark.parametrize(("kind", "overrides"), RECORDED)
def test_two_steps_of_a_bucket_issue_the_same_operations_on_the_same_buffers(
    trial, splits_of, recorder, steps_taken, kind, overrides
):
    settings = trial(*overrides, "train.epochs=5", LAST_EPOCH, kind=kind, still=False)
    outlines: dict = {}
    run = graph_step.GraphSteps._step

    def recorded(steps, bucket):
        with Recording() as recording:
            run(steps, bucket)
        outlines.setdefault(bucket, []).append(recording.outline())

    graph_step.GraphSteps._step, before = recorded, run
    try:
        losses_of(FusedEngine(graph_steps=True), [settings], splits_of(settings), recorder)
    finally:
        graph_step.GraphSteps._step = before
    assert len(steps_taken) == 1
    again = [steps for steps in outlines.values() if len(steps) > 1]
    assert len(again) > 1
    for first, *others in again:
        assert len(first) > 100
        for other in others:
            assert other == first


UNSAFE = [
    lambda x: x.sum().item(),
    lambda x: x.sum().tolist(),
    lambda x: x.numpy(),
    lambda x: x.cpu(),
    lambda x: x.to("cpu"),
    lambda x: bool(x.sum() > 0),
    lambda x: x.nonzero(),
    lambda x: x.unique(),
    lambda x: x[x > 0],
    lambda x: x + torch.tensor(1.0),
    lambda x: x + torch.from_numpy(np.ones(3)),
    lambda x: torch.where(x > 0, x, 1.0),
    lambda x: torch.nn.functional.dropout(x, 0.5),
]


def test_the_check_refuses_what_waits_for_the_device():
    for unsafe in UNSAFE:
        with pytest.raises(AssertionError), Recording():
            unsafe(torch.ones(3))


def test_a_number_that_passes_through_python_shows_in_a_replay():
    place, out, leaked = torch.ones(2), torch.zeros(2), [1.0]

    def step():
        out.copy_(place * leaked[0])

    graphs = FakeGraphs()
    graphs.record("key", lambda: None, step)
    assert out.tolist() == [0, 0], "recording leaves everything as it was"
    place.fill_(3.0)
    leaked[0] = 2.0
    graphs.run("key", step)
    assert out.tolist() == [3, 3]


def poison(weights):
    """Fill the gradient with NaN, but for what lies between two weights."""
    for gradient in (weights.grad, weights.compute_grad):
        if gradient is not None:
            gradient.fill_(torch.nan)
    for gap in weights.layout.gaps:
        weights._view_columns(gap, weights.grad, weights.compute_grad).zero_()


@pytest.mark.parametrize("freezing", ["freeze=none", "freeze.layers=1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reads_nothing_that_is_left_over(trial, splits_of, recorder, monkeypatch, freezing, precision):
    """Buffers and the gradient are full of NaN before each step, or of ids that are none: nothing of it comes out."""
    settings = trial(freezing, f"train.precision={precision}", still=False)
    splits = splits_of(settings)
    clean, _ = losses_of(FusedEngine(graph_steps=True), [settings], splits, recorder)
    fill = graph_step.GraphSteps._fill

    def poisoned(steps, step, buffers):
        steps._step_scalars.fill_(torch.nan)
        steps.norms.fill_(torch.nan)
        poison(steps.weights)
        buffers.inputs.fill_(1 << 40)
        if buffers.hidden is not None:
            buffers.hidden.fill_(torch.nan)
        fill(steps, step, buffers)

    monkeypatch.setattr(graph_step.GraphSteps, "_fill", poisoned)
    dirty, _ = losses_of(FusedEngine(graph_steps=True), [settings], splits, recorder)
    np.testing.assert_array_equal(clean, dirty)


def test_a_pruned_trial_leaves_and_the_others_are_recorded_anew(trial, splits_of, recorder, graphs, steps_taken):
    trials = [trial(f"seed={seed}", still=False) for seed in (1, 2, 3)]
    splits, seen = splits_of(trials[0]), recorder(prune={1})
    results = FusedEngine(torch.float64, graph_steps=True).train(trials, splits, seen)
    assert [r.status for r in results] == [Status.FINISHED, Status.PRUNED, Status.FINISHED]
    assert len(steps_taken) == 2
    for t in (0, 2):
        alone, _ = losses_of(FusedEngine(torch.float64, graph_steps=True), [trials[t]], splits, recorder)
        np.testing.assert_allclose(seen.losses(t), alone[0], rtol=1e-11)


@pytest.mark.parametrize(("precision", "dtype", "close"), [("fp32", torch.float64, 1e-9), ("bf16", torch.float32, 0.1)])
def test_out_of_memory_halves_the_group_and_then_the_batch(
    trial, splits_of, recorder, monkeypatch, precision, dtype, close
):
    trials = [trial(f"seed={seed}", f"train.precision={precision}") for seed in (1, 2)]
    splits, expected = splits_of(trials[0]), recorder()
    FusedEngine(dtype).train(trials, splits, expected)
    run = graph_step.GraphSteps.take_steps

    def short_of_memory(steps, step, stop):
        if step >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(steps, step, stop)

    monkeypatch.setattr(graph_step.GraphSteps, "take_steps", short_of_memory)
    seen = recorder()
    results = FusedEngine(dtype, graph_steps=True).train(trials, splits, seen)
    assert [r.status for r in results] == [Status.FINISHED] * 2
    for t in (0, 1):
        np.testing.assert_allclose(seen.losses(t), expected.losses(t), rtol=close / 10)
        norms = [[r.gradient_norm for r in each.steps[t]] for each in (seen, expected)]
        np.testing.assert_allclose(*norms, rtol=close)


def test_gradients_of_tokens_are_added_up_to_those_of_their_rows():
    from distilbench.engines.fused.params import _scatter_add_rows

    values = torch.randn(2, 50, 8, dtype=torch.float64)
    index = torch.randint(0, 7, (2, 50))
    table = torch.zeros(2, 7, 8, dtype=torch.float64)
    expected = torch.stack([table[t].index_add(0, index[t], values[t]) for t in range(2)])
    _scatter_add_rows(table, index, values)
    torch.testing.assert_close(table, expected)
    assert len(index.unique()) < 50, "some rows have several tokens"
