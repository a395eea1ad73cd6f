"""The trainer engine equals a plain PyTorch loop of the report's protocol; its checkpoints survive being cut short."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from distilbench.data.tokens import EncodedSplit, EncodedSplits
from distilbench.engines import checkpoints
from distilbench.engines.batches import BatchSchedule
from distilbench.engines.running import outcome_of
from distilbench.engines.trainer import TrainerEngine
from distilbench.models.build import build_model, load_tokenizer
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import parameter_levels
from distilbench.models.resolve import resolve_model
from distilbench.results import Status
from tests.engines.conftest import Recorder

SMALL = ("data.max_train_examples=37", "data.max_validation_examples=8", "train.batch_size=8", "train.epochs=2",
         "train.logging_steps=1", "train.eval_steps=100", "seed=5")  # fmt: skip
STEPS_PER_EPOCH, STEPS = 5, 10


@pytest.fixture
def trial(settings, model_without_dropout):
    """Return ``trial(*overrides) -> TrialSettings`` of a model without dropout: 10 steps, two of them on 5 examples."""
    return lambda *overrides: (
        settings("model=local", f"model.checkpoint={model_without_dropout}", *SMALL, *overrides).trial
    )


# The protocol, written a second time with nothing but torch.


def factor(name: str, step: int, warmup: int) -> float:
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (STEPS - warmup)
    return {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "constant_with_warmup": 1.0,
        "inverse_sqrt": math.sqrt(warmup / step) if warmup else 1 / math.sqrt((step + 10_000) / 10_000),
    }[name]


def decays(name: str) -> bool:
    return not name.endswith("bias") and "norm" not in name.lower()


def frozen(name: str, layers: int) -> bool:
    prefixes = ["distilbert.embeddings.", *(f"distilbert.transformer.layer.{i}." for i in range(layers))]
    return layers > 0 and name.startswith(tuple(prefixes))


def batches(train: EncodedSplit, settings, epoch: int):
    """Rows in the order of accelerate's sampler: a permutation seeded with seed + epoch."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed + epoch)).tolist()
    size = settings.train.batch_size
    for start in range(0, len(order), size):
        yield order[start : start + size]


def batch_loss(model, train: EncodedSplit, examples: list[int]) -> torch.Tensor:
    """Mean cross-entropy, each row by itself, so that there is nothing to pad."""
    logits = [model(input_ids=torch.from_numpy(train.row(i).astype(np.int64))[None]).logits for i in examples]
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.from_numpy(train.labels[examples]))


def plain_loop(settings, splits: EncodedSplits, model):
    """Train ``model`` in place; return losses, learning rates and gradient norms of every step."""
    optim, step, rows = settings.optim, 0, []
    named = [(n, p) for n, p in model.named_parameters() if not frozen(n, settings.freeze.layers)]
    weight_decay = [(p, optim.weight_decay if decays(n) else 0.0) for n, p in named]
    first, second = ([torch.zeros_like(p) for _, p in named] for _ in range(2))
    for epoch in range(settings.train.epochs):
        for examples in batches(splits.train, settings, epoch):
            loss = batch_loss(model, splits.train, examples)
            gradients = torch.autograd.grad(loss, [p for _, p in named])
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            clip = min(1.0, optim.max_grad_norm / (norm.item() + 1e-6)) if optim.max_grad_norm else 1.0
            lr = optim.lr * factor(settings.scheduler.name, step, settings.scheduler.warmup(STEPS))
            step += 1
            with torch.no_grad():
                for (p, decay), g, m, v in zip(weight_decay, gradients, first, second, strict=True):
                    update(optim, p, g * clip, m, v, lr, decay, step)
            rows.append((loss.item(), lr, norm.item()))
    return map(list, zip(*rows, strict=True))


def update(optim, p, g, m, v, lr, decay, step):
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2), or SGD with an L2 term and momentum."""
    if optim.name == "sgd":
        m.mul_(optim.momentum).add_(g + decay * p)
        p.sub_(lr * m)
        return
    p.mul_(1 - lr * decay)
    m.mul_(optim.beta1).add_((1 - optim.beta1) * g)
    v.mul_(optim.beta2).add_((1 - optim.beta2) * g.square())
    p.sub_(lr * (m / (1 - optim.beta1**step)) / ((v / (1 - optim.beta2**step)).sqrt() + optim.eps))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="the report's baseline"),
        pytest.param(
            ("scheduler=cosine", "scheduler.warmup_ratio=0.1", "optim.weight_decay=0.5"),
            id="its third row, strong decay",
        ),
        pytest.param(("freeze.layers=1",), id="frozen prefix"),
        pytest.param(("freeze.layers=2", "scheduler=inverse_sqrt"), id="frozen encoder"),
        pytest.param(("optim.max_grad_norm=0.01",), id="clipping in every step"),
        pytest.param(("optim.max_grad_norm=0",), id="no clipping"),
        pytest.param(
            (
                "optim=sgd",
                "optim.momentum=0.9",
                "optim.weight_decay=0.1",
                "optim.max_grad_norm=0.05",
                "freeze.layers=1",
                "scheduler=constant_with_warmup",
                "scheduler.warmup_steps=3",
            ),
            id="sgd",
        ),
    ],
)
def test_the_engine_equals_a_plain_loop(trial, splits_of, recorder, model_without_dropout, overrides):
    lr = "optim.lr=0.05" if "optim=sgd" in overrides else "optim.lr=1e-3"
    settings = trial(*overrides, lr)
    splits = splits_of(settings)
    observer = recorder()
    [result] = TrainerEngine().train([settings], splits, observer)
    model = AutoModelForSequenceClassification.from_pretrained(model_without_dropout).eval()
    losses, rates, norms = plain_loop(settings, splits, model)

    assert result.status is Status.FINISHED
    assert len(splits.train) % settings.train.batch_size == 5, "the last batch must be partial"
    assert observer.losses() == pytest.approx(losses, rel=1e-5)
    assert [r.learning_rate for r in observer.steps[0]] == pytest.approx(rates, rel=1e-12)
    assert [r.gradient_norm for r in observer.steps[0]] == pytest.approx(norms, rel=1e-3)
    assert_same_weights(model, Path(settings.output.dir) / "model", settings.optim.lr)


def assert_same_weights(model, directory: Path, lr: float) -> None:
    """All but the key projections' biases: their gradient is zero, and AdamW turns its rounding into steps."""
    exported = load_file(directory / "model.safetensors")
    for name, values in model.state_dict().items():
        if not name.endswith("k_lin.bias"):
            torch.testing.assert_close(exported[name], values, atol=lr * 1e-2, rtol=1e-4, msg=name)


# The same as stock Trainer, dropout and all


class Losses(TrainerCallback):
    """What stock Trainer logs."""

    def __init__(self):
        self.all = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.all.append(logs["loss"])


@pytest.mark.parametrize("eval_steps", [3, 100])
def test_losses_are_those_of_stock_trainer_bit_for_bit_and_evaluations_change_nothing(
    settings, splits_of, recorder, tmp_path, eval_steps
):
    trial = settings(*SMALL, f"train.eval_steps={eval_steps}", "optim.lr=1e-3", "scheduler.warmup_ratio=0.2").trial
    splits, observer, stock = splits_of(trial), recorder(), Losses()
    TrainerEngine().train([trial], splits, observer)

    resolved = resolve_model(trial.model)
    rows = [{"input_ids": splits.train.row(i).tolist(), "label": int(label)}
            for i, label in enumerate(splits.train.labels)]  # fmt: skip
    trainer = Trainer(
        model=build_model(resolved, splits.label_names, trial.seed),
        args=TrainingArguments(
            str(tmp_path / "stock"), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-3,
            weight_decay=0.01, warmup_steps=0.2, seed=trial.seed, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(load_tokenizer(resolved)),
        callbacks=[stock],
    )  # fmt: skip
    trainer.train()
    assert observer.losses() == stock.all


# Checkpoints


@pytest.fixture
def interrupted(settings, recorder, splits_of, tmp_path):
    """Return ``interrupted(*overrides) -> (settings, splits)`` of a trial stopped by Ctrl-C in its second epoch."""

    def make(*overrides: str):
        trial = settings(*SMALL, "train.eval_steps=null", *overrides).trial
        splits = splits_of(trial)
        with pytest.raises(KeyboardInterrupt):
            TrainerEngine().train([trial], splits, recorder(raise_at={7: KeyboardInterrupt()}))
        return trial, splits

    return make


def resume(trial, splits, observer):
    [result] = TrainerEngine().train([replace(trial, train=replace(trial.train, resume=True))], splits, observer)
    return result


def left_in(trial) -> list[str]:
    return sorted(str(p.relative_to(trial.output.dir)) for p in Path(trial.output.dir).glob("*/*"))


def test_an_interrupted_trial_leaves_one_whole_checkpoint(interrupted):
    trial, _ = interrupted()
    assert left_in(trial) == ["checkpoints/checkpoint-5"]


def test_without_checkpoints_an_interrupted_trial_leaves_nothing(interrupted):
    trial, _ = interrupted("train.checkpoints=false")
    assert list(Path(trial.output.dir).iterdir()) == []


@pytest.mark.parametrize(
    ("file", "left"),
    [("seal.json", None), ("seal.json", 0), ("seal.json", -1), ("model.safetensors", -1), ("model.safetensors", None)],
)
def test_a_checkpoint_that_a_kill_or_a_loss_of_power_cut_short_is_passed_over(
    interrupted, recorder, caplog, file, left
):
    trial, splits = interrupted()
    damaged = Path(trial.output.dir) / "checkpoints/checkpoint-5" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if left is not None:
        damaged.write_bytes(content[:left])
    observer = recorder()
    with caplog.at_level(logging.INFO, "distilbench"):
        result = resume(trial, splits, observer)
    assert (result.status, observer.steps[0][0].step) == (Status.FINISHED, 1)
    assert "checkpoint-5 was cut short" in caplog.text
    assert "starting from scratch" in caplog.text
    assert left_in(trial) == sorted(f"model/{name}" for name in MODEL_FILES)


MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_ctrl_c_while_a_checkpoint_is_written_leaves_no_half_of_it(settings, splits_of, recorder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    trial = settings(*SMALL, "train.eval_steps=null").trial
    monkeypatch.setattr(checkpoints, "write_seal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        TrainerEngine().train([trial], splits_of(trial), recorder())
    assert list(Path(trial.output.dir).iterdir()) == []


def test_a_checkpoint_of_other_settings_is_refused_in_one_line_and_kept(interrupted, recorder):
    trial, splits = interrupted()
    changed = replace(trial, optim=replace(trial.optim, lr=3e-5))
    result = resume(changed, splits, recorder())
    assert result.status is Status.FAILED
    assert "which has optim.lr=2e-05, got optim.lr=3e-05; use the same settings" in result.error
    assert "\n" not in result.error
    assert left_in(trial) == ["checkpoints/checkpoint-5"]


def test_a_checkpoint_of_other_text_is_refused(interrupted, recorder):
    trial, splits = interrupted()
    other = replace(splits, train=replace(splits.train, labels=1 - splits.train.labels))
    assert "which has data=" in resume(trial, other, recorder()).error


def test_a_checkpoint_of_another_version_is_continued(interrupted, recorder):
    trial, splits = interrupted()
    seal = Path(trial.output.dir) / "checkpoints" / "checkpoint-5" / "seal.json"
    content = json.loads(seal.read_text())
    del content["progress"]["train_cpu_seconds"]
    content["progress"]["tokens"] = 185
    for evaluation in content["progress"]["history"]:
        del evaluation["brier"], evaluation["ece"]
    seal.write_text(json.dumps(content))
    result = resume(trial, splits, recorder())
    assert (result.status, result.steps) == (Status.FINISHED, 10)
    assert [math.isnan(evaluation.brier) for evaluation in result.history] == [True, False]


def test_what_changes_speed_only_may_change_on_resuming(interrupted, recorder):
    trial, splits = interrupted()
    changed = replace(trial, train=replace(trial.train, eval_batch_size=3, logging_steps=2))
    observer = recorder()
    assert resume(changed, splits, observer).status is Status.FINISHED
    assert [r.step for r in observer.steps[0]] == [6, 8, 10]


def test_a_resumed_trial_reports_the_time_and_tokens_of_all_its_parts(interrupted, recorder):
    trial, splits = interrupted()
    _, stored = checkpoints.find_latest(Path(trial.output.dir) / "checkpoints", identity(trial, splits))
    result = resume(trial, splits, recorder())
    assert stored.step == 5
    assert result.train_seconds > stored.train_seconds > stored.step_seconds > 0
    assert result.train_cpu_seconds > stored.train_cpu_seconds > 0
    tokens_an_example = len(splits.train.tokens) / len(splits.train)
    assert result.tokens_per_second / result.examples_per_second == pytest.approx(tokens_an_example)


def identity(trial, splits):
    return checkpoints.identity_of(trial, splits, resolve_model(trial.model).used.fingerprint, "fp32")


def test_starting_again_without_resume_forgets_the_old_checkpoint(interrupted, recorder):
    trial, splits = interrupted()
    observer = recorder()
    [result] = TrainerEngine().train([trial], splits, observer)
    assert (result.status, observer.steps[0][0].step) == (Status.FINISHED, 1)
    assert not (Path(trial.output.dir) / "checkpoints").exists()


# What goes wrong inside a trial


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    ],
    ids=["python", "cuda", "cpu", "mps"],
)
def test_out_of_memory_says_what_to_change(trial, splits_of, recorder, error):
    settings = trial("output.save_model=false")
    [result] = TrainerEngine().train([settings], splits_of(settings), recorder(raise_at={2: error}))
    assert result.status is Status.OUT_OF_MEMORY
    assert result.error.endswith("; lower train.max_length (now 128), freeze more layers, or take a smaller model")
    assert "\n" not in result.error
    assert result.peak_memory_bytes > 0


def test_an_evaluation_that_does_not_fit_is_made_in_smaller_batches(trial, splits_of, recorder, monkeypatch):
    from distilbench.engines.trainer import _TrainerTrial

    settings = trial("train.eval_batch_size=8", "output.save_model=false")
    splits = splits_of(settings)
    [fitting] = TrainerEngine().train([settings], splits, recorder())
    predict = _TrainerTrial._predict

    def short_of_memory(run, split):
        if run.settings.train.eval_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return predict(run, split)

    monkeypatch.setattr(_TrainerTrial, "_predict", short_of_memory)
    [result] = TrainerEngine().train([settings], splits, recorder())
    assert (result.status, result.micro_batch_size) == (Status.FINISHED, 2)
    assert result.report.loss == pytest.approx(fitting.report.loss, rel=1e-5)


def test_an_unforeseen_error_fails_the_trial_and_logs_its_traceback(trial, splits_of, recorder, caplog):
    settings = trial("output.save_model=false")
    [result] = TrainerEngine().train([settings], splits_of(settings), recorder(raise_at={2: KeyError("lost\nit")}))
    assert (result.status, result.error) == (Status.FAILED, "KeyError: 'lost\\nit'")
    assert "Traceback" in caplog.text


def test_the_first_line_of_an_error_is_enough_for_the_user(trial):
    assert outcome_of(ValueError("one\ntwo"), trial()) == (Status.FAILED, "ValueError: one")


# Arguments


def test_several_visible_gpus_are_never_used_together(trial, monkeypatch):
    from distilbench.engines import trainer

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = trainer.training_arguments(trial(), torch.device("cuda", 0), "fp32", Path("unused"))
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)
    assert not Path("unused").exists()


LEFT = [
    {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_TORCH_DEVICE": "meta"},
    {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
    {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"},
    {"LOCAL_RANK": "", "RANK": "of nothing", "FORK_LAUNCHED": "1"},
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
]
"""What accelerate and notebooks leave in the environment."""


def test_a_trial_is_what_its_settings_say_whatever_a_launcher_left(trial, splits_of, recorder, monkeypatch):
    settings = trial("output.save_model=false")
    splits = splits_of(settings)
    (plain,) = TrainerEngine().train([settings], splits, recorder())
    for environment in LEFT:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            (result,) = TrainerEngine().train([settings], splits, recorder())
            assert {name: os.environ[name] for name in environment} == environment
        assert (result.status, result.error) == (Status.FINISHED, None), environment
        losses = [[evaluation.loss for evaluation in one.history] for one in (result, plain)]
        assert losses[0] == losses[1], environment


def test_bf16_trains_on_the_cpu(trial, splits_of, recorder):
    settings = trial("train.precision=bf16", "output.save_model=false")
    observer, exact = recorder(), recorder()
    [result] = TrainerEngine().train([settings], splits_of(settings), observer)
    full = replace(settings, train=replace(settings.train, precision="fp32"))
    TrainerEngine().train([full], splits_of(full), exact)
    assert (result.status, result.precision, result.report.logits.dtype) == (Status.FINISHED, "bf16", np.float32)
    assert observer.losses() != exact.losses()
    assert observer.losses() == pytest.approx(exact.losses(), rel=2e-2)


# Adapters


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_an_adapter_is_saved_for_peft_and_merged_for_plain_transformers(trial, splits_of, recorder, adapter):
    from peft import PeftModel

    settings = trial(f"adapter={adapter}", "optim.lr=1e-2")
    splits = splits_of(settings)
    [result] = TrainerEngine().train([settings], splits, recorder())
    assert (result.status, result.error) == (Status.FINISHED, None)
    assert result.trainable_parameters < result.total_parameters / 4
    base = build_model(resolve_model(settings.model), splits.label_names, seed=99)
    directory = Path(settings.output.dir)
    loaded = [PeftModel.from_pretrained(base, directory / "adapter"),
              AutoModelForSequenceClassification.from_pretrained(directory / "model")]  # fmt: skip
    for model in loaded:
        np.testing.assert_allclose(logits(model.eval(), splits.report), result.report.logits, atol=1e-5)
    told = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == settings.model.checkpoint
    assert not any("lora" in name or "ia3" in name for name in load_file(directory / "model" / "model.safetensors"))


@pytest.mark.parametrize("pad", [None, 5])
def test_a_decoder_answers_whatever_the_padding(trial, splits_of, recorder, model_without_dropout, tmp_path, pad):
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen2ForSequenceClassification(Qwen2Config(vocab_size=150, intermediate_size=64, pad_token_id=pad, **sizes))
    shutil.copytree(model_without_dropout, tmp_path / "decoder")
    model.save_pretrained(tmp_path / "decoder")
    settings = trial("model=local", f"model.checkpoint={tmp_path}/decoder", "train.epochs=1")
    splits = splits_of(settings)
    [result] = TrainerEngine().train([settings], splits, recorder())
    assert (result.status, result.error) == (Status.FINISHED, None)
    saved = AutoModelForSequenceClassification.from_pretrained(Path(settings.output.dir) / "model").eval()
    np.testing.assert_allclose(logits(saved, splits.report), result.report.logits, atol=1e-5)


def logits(model, split: EncodedSplit) -> np.ndarray:
    rows = (torch.from_numpy(split.row(i).astype(np.int64))[None] for i in range(len(split)))
    with torch.no_grad():
        return np.concatenate([model(input_ids=row).logits.numpy() for row in rows])


def test_an_adapter_alone_is_saved_where_it_is_not_to_be_merged(trial, splits_of, recorder):
    settings = trial("adapter=lora", "adapter.merge=false", "train.epochs=1")
    TrainerEngine().train([settings], splits_of(settings), recorder())
    assert {path.name for path in Path(settings.output.dir).iterdir()} == {"adapter"}


def test_an_interrupted_adapter_continues_to_the_same_bits(settings, splits_of, recorder, tmp_path):
    given = ("adapter=lora", *SMALL, "train.eval_steps=3", "optim.lr=1e-2", "output.save_model=false")
    whole, cut = (settings(*given, f"output.dir={tmp_path / name}").trial for name in ("whole", "cut"))
    splits = splits_of(whole)
    [expected] = TrainerEngine().train([whole], splits, recorder())
    with pytest.raises(KeyboardInterrupt):
        TrainerEngine().train([cut], splits, recorder(raise_at={8: KeyboardInterrupt()}))
    [resumed] = TrainerEngine().train([replace(cut, train=replace(cut.train, resume=True))], splits, recorder())
    np.testing.assert_array_equal(resumed.report.logits, expected.report.logits)
    assert (resumed.steps, resumed.train_flops) == (10, expected.train_flops)


# Freezing that moves: embeddings, two layers and the head are levels 0 to 3


class FrozenAt(Recorder):
    """Notes, after each step, which levels were trained in it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.trained = []
        step = torch.optim.AdamW.step

        def note(optimizer, *args, **kwargs):
            sizes = [p.numel() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.trained.append(sum(sizes))
            return step(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", note)


def sizes_by_level(settings, splits) -> list[int]:
    model = build_model(resolve_model(settings.model), splits.label_names, seed=0)
    level_of = parameter_levels(model)
    return [sum(p.numel() for n, p in model.named_parameters() if level_of[n] == level) for level in range(4)]


MOVING = ("train.eval_steps=3", "train.checkpoints=true", "optim.lr=1e-2", "train.metric=loss")


@pytest.mark.parametrize(
    ("freezing", "frozen"),
    [("freeze=gradual", [3, 2, 1, 0]), ("freeze=scheduled freeze.layers=2", [0, 1, 2, 3]), ("freeze=auto", None)],
)
def test_what_is_frozen_moves_at_evaluations_and_costs_the_sum_of_its_parts(
    trial, splits_of, monkeypatch, freezing, frozen
):
    settings = trial(*freezing.split(), *MOVING)
    splits, seen = splits_of(settings), FrozenAt(monkeypatch)
    [result] = TrainerEngine().train([settings], splits, seen)
    assert (result.status, result.error, result.steps) == (Status.FINISHED, None, STEPS)
    sizes = sizes_by_level(settings, splits)
    if frozen is None:
        frozen = [next(k for k in range(4) if sum(sizes[k:]) == seen.trained[start]) for start in (0, 3, 6, 9)]
        assert frozen[:2] == [0, 0]
    assert seen.trained == [sum(sizes[frozen[step // 3] :]) for step in range(STEPS)]
    assert result.trainable_parameters == sum(sizes[min(frozen) :])
    expected = 0
    for step in range(STEPS):
        model = build_model(resolve_model(settings.model), splits.label_names, seed=0)
        level_of = parameter_levels(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(level_of[name] >= frozen[step // 3])
        lengths = np.array([len(splits.train.row(i)) for i in BatchSchedule(37, 8, 2).batch(settings.seed, step)])
        expected += TrainFlops.of(model).total(lengths, np.ones_like(lengths))
    assert result.train_flops == expected


def test_a_trial_that_freezes_by_gradients_continues_to_the_same_bits(settings, splits_of, recorder, tmp_path):
    def make(name: str):
        return settings("freeze=auto", *SMALL, *MOVING, f"output.dir={tmp_path / name}").trial

    whole, seen = make("whole"), recorder()
    splits = splits_of(whole)
    [expected] = TrainerEngine().train([whole], splits, seen)
    wanted = load_file(tmp_path / "whole/model/model.safetensors")
    for number, left in enumerate(({"raise_at": {8: KeyboardInterrupt()}}, {"leave_at": 4}, {"leave_at": 6})):
        cut, again = make(str(number)), recorder()
        with pytest.raises(KeyboardInterrupt):
            TrainerEngine().train([cut], splits, recorder(**left))
        resumed = resume(cut, splits, again)
        assert again.losses() == seen.losses()[-len(again.losses()) :]
        np.testing.assert_array_equal(resumed.report.logits, expected.report.logits)
        assert (resumed.train_flops, resumed.trainable_parameters) == (
            expected.train_flops, expected.trainable_parameters
        )  # fmt: skip
        weights = load_file(tmp_path / str(number) / "model/model.safetensors")
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
