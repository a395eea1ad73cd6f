"""The fused engine against plain loops over Hugging Face models: equal, up to rounding, whatever is left out."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from distilbench.engines.batches import BatchSchedule, epoch_order, padded_batch
from distilbench.engines.fused import kernels, params, prefix
from distilbench.engines.fused.dropout import Dropout, dropout_scale
from distilbench.engines.fused.engine import FusedEngine
from distilbench.engines.fused.loop import TrialGroup, train_group
from distilbench.engines.fused.packing import pack
from distilbench.engines.fused.prefix import WINDOW
from distilbench.engines.optimization import build_optimizer, lr_factors
from distilbench.engines.running import Stopwatch
from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import freeze, freeze_levels
from distilbench.models.resolve import resolve_model
from distilbench.results import Status
from distilbench.settings import ModelSettings
from tests.engines.conftest import PAIRS
from tests.models.made_checkpoints import edit_json

NAMES = ("negative", "positive")
SMALL = ("data.max_train_examples=37", "data.max_validation_examples=24", "train.batch_size=8", "train.epochs=2",
         "train.logging_steps=1", "optim.lr=1e-3", "train.checkpoints=false",
         "output.save_model=false")  # fmt: skip
SAVED = "output.save_model=true"
STEPS = 10


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directories of tiny models by architecture, ``still`` ones without dropout."""
    made = {}
    for kind in ("distilbert", "bert"):
        resolved = resolve_model(ModelSettings("random", kind, layers=2))
        for still in (False, True):
            model = build_model(resolved, NAMES, seed=3)
            for key in list(vars(model.config)) if still else []:
                if "dropout" in key:
                    model.config.update({key: 0.0})
            made[kind, still] = tmp_path_factory.mktemp(kind) / "model"
            export_model(model, load_tokenizer(resolved), made[kind, still])
    return made


@pytest.fixture
def trial(settings, models, tmp_path):
    """Return ``trial(*overrides, kind="distilbert", still=True) -> TrialSettings``, each in its own directory."""
    made = iter(range(1000))

    def make(*overrides, kind="distilbert", still=True):
        given = ("model=local", f"model.checkpoint={models[kind, still]}", *SMALL)
        return settings(*given, f"output.dir={tmp_path / str(next(made))}", *overrides).trial

    return make


def initial_model(settings, splits, dtype):
    model = build_model(resolve_model(settings.model), splits.label_names, settings.seed).to(dtype)
    freeze(model, settings.freeze)
    return model.train()


def assert_follows(losses, norms, result, seen, loss_rel=1e-11, norm_rel=1e-9):
    """Assert that the first trial finished with these losses and gradient norms at every step."""
    assert result.status is Status.FINISHED, result.error
    assert seen.losses() == pytest.approx(losses, rel=loss_rel)
    assert [r.gradient_norm for r in seen.steps[0]] == pytest.approx(norms, rel=norm_rel)


def reference(settings, splits, dtype=torch.float64, around_step=lambda step, packed: None, frozen=(0,), until=10**9):
    """Train as a textbook would: the model, and the loss and the gradient norm of every step ``until`` one.

    So many levels are ``frozen`` in each part of training.
    """
    model = initial_model(settings, splits, dtype)
    size, examples = settings.train.batch_size, len(splits.train)
    steps = settings.train.epochs * -(-examples // size)
    optimizer = build_optimizer(model, settings.optim)
    factors = lr_factors(settings.scheduler, steps, settings.optim.lr)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    is_balanced, labels = settings.train.class_weights == "balanced", splits.train.labels
    weights = compute_class_weight("balanced", classes=np.unique(labels), y=labels) if is_balanced else np.ones(9)
    weight_of = torch.from_numpy(weights).to(dtype)
    losses, norms, step = [], [], 0
    for epoch in range(settings.train.epochs):
        order = epoch_order(examples, settings.seed, epoch)
        for start in range(0, examples, size):
            rows = order[start : start + size]
            if step == until:
                return model.eval(), losses, norms
            around_step(step, rows)
            if settings.freeze.is_dynamic:
                freeze_levels(model, frozen[step // settings.train.eval_steps])
            inputs = padded_batch(splits.train, rows, splits.pad_token_id)
            labels = torch.from_numpy(splits.train.labels[rows])
            each = torch.nn.functional.cross_entropy(
                model(**inputs).logits, labels, label_smoothing=settings.train.label_smoothing, reduction="none"
            )
            loss = (weight_of[labels] * each).mean()
            loss.backward()
            limit = settings.optim.max_grad_norm or float("inf")
            trained = [p for p in model.parameters() if p.requires_grad]
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, limit)))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factors[step]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
    return model.eval(), losses, norms


def exported(settings):
    return load_file(Path(settings.output.dir) / "model" / "model.safetensors")


LAST_EPOCH = "train.eval_steps=1000"
"""One evaluation, at the end: what is exported are the last weights."""

LADDER = {
    "baseline": ("freeze=none",),
    "clipping inactive": ("optim.max_grad_norm=1000",),
    "no clipping": ("optim.max_grad_norm=0",),
    "clipping hard": ("optim.max_grad_norm=0.05",),
    "cosine with warm-up": ("scheduler=cosine", "scheduler.warmup_ratio=0.3", "optim.weight_decay=0.3"),
    "sgd": ("optim=sgd", "optim.lr=0.1", "optim.weight_decay=0.1"),
    "sgd with momentum": ("optim=sgd", "optim.lr=0.05", "optim.momentum=0.9", "optim.weight_decay=0.1"),
    "freeze 1": ("freeze.layers=1",),
    "freeze 1, sgd": ("freeze.layers=1", "optim=sgd", "optim.lr=0.1", "optim.max_grad_norm=0.1"),
    "freeze all layers": ("freeze.layers=2",),
    "freeze embeddings alone": ("freeze=embeddings",),
    "freeze a layer under trained embeddings": ("freeze.layers=1", "freeze.embeddings=false"),
    "head": ("freeze=head",),
    "bias": ("freeze=bias",),
    "bias, sgd": ("freeze=bias", "optim=sgd", "optim.lr=0.1", "optim.max_grad_norm=0.1"),
    "layer decay": ("optim.layer_decay=0.5", "optim.weight_decay=0.3"),
    "layer decay, freeze 1, sgd": ("optim.layer_decay=0.5", "freeze.layers=1", "optim=sgd", "optim.lr=0.1"),
    "label smoothing": ("train.label_smoothing=0.2",),
    "balanced weights": ("train.class_weights=balanced",),
    "whole batches": ("train.batch_size=37",),
    "batches of one": ("train.batch_size=1", "train.epochs=1"),
    "pairs": PAIRS,
    "pairs, freeze 1, cut": (*PAIRS, "freeze.layers=1", "train.max_length=20"),
}


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("case", LADDER)
def test_the_fused_engine_equals_a_plain_loop_in_float64(trial, splits_of, recorder, kind, case):
    settings = trial(*LADDER[case], LAST_EPOCH, SAVED, kind=kind)
    splits, seen = splits_of(settings), recorder()
    model, losses, norms = reference(settings, splits)
    [result] = FusedEngine(torch.float64).train([settings], splits, seen)
    assert_follows(losses, norms, result, seen)
    for name, values in exported(settings).items():
        torch.testing.assert_close(values.double(), model.state_dict()[name].float().double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("distilbert", {"pad_token_id": 28, "activation": "relu"}),  # a letter of the text, which is not trained then
        ("distilbert", {"sinusoidal_pos_embds": True}),
        ("bert", {"pad_token_id": None, "layer_norm_eps": 1e-3, "hidden_act": "relu", "return_dict": False}),
    ],
)
def test_the_fused_engine_follows_a_local_models_configuration(
    trial, models, splits_of, recorder, tmp_path, kind, changes
):
    shutil.copytree(models[kind, True], tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **changes)
    settings = trial(f"model.checkpoint={tmp_path}/model", LAST_EPOCH)
    splits = splits_of(settings)
    _, losses, norms = reference(settings, splits)
    seen = recorder()
    FusedEngine(torch.float64).train([settings], splits, seen)
    assert seen.losses() == pytest.approx(losses, rel=1e-11)
    assert [r.gradient_norm for r in seen.steps[0]] == pytest.approx(norms, rel=1e-9)


SGD = ("optim=sgd", "optim.lr=0.05", "optim.momentum=0.9", "optim.weight_decay=0.1")
MOVING = {
    "gradual": ([3, 2, 1, 0], ("freeze=gradual", "optim.weight_decay=0.3")),
    "gradual, sgd": ([3, 2, 1, 0], ("freeze=gradual", *SGD)),
    "gradual, layer decay, clipping hard": (
        [3, 2, 1, 0], ("freeze=gradual", "optim.layer_decay=0.5", "optim.max_grad_norm=0.05")),
    "gradual, never all": ([3, 2], ("freeze=gradual", "train.eval_steps=5")),
    "gradual, pairs": ([3, 2, 1, 0, 0], ("freeze=gradual", *PAIRS)),
    "scheduled": ([0, 1, 2, 3], ("freeze=scheduled", "freeze.layers=2", "optim.weight_decay=0.3")),
    "scheduled, sgd": ([0, 1, 2, 3], ("freeze=scheduled", "freeze.layers=2", *SGD)),
    "scheduled, layer decay": ([0, 1, 1, 2], ("freeze=scheduled", "freeze.layers=1", "optim.layer_decay=0.5")),
    "scheduled in parts": ([0, 1, 2, 3], ("freeze=scheduled", "freeze.layers=2", "train.micro_batch_size=2")),
}  # fmt: skip
"""How many of the levels (embeddings, two layers, the head) are frozen in each part; a boundary every three steps."""


@pytest.mark.parametrize("graph_steps", [False, True])
@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("case", MOVING)
def test_freezing_that_moves_equals_a_plain_loop_in_float64(trial, splits_of, recorder, kind, case, graph_steps):
    frozen, overrides = MOVING[case]
    settings = trial("train.eval_steps=3", *overrides, SAVED, kind=kind)
    splits, seen = splits_of(settings), recorder()
    _, losses, norms = reference(settings, splits, frozen=frozen)
    [result] = FusedEngine(torch.float64, graph_steps=graph_steps).train([settings], splits, seen)
    assert_follows(losses, norms, result, seen)
    best, _, _ = reference(settings, splits, frozen=frozen, until=result.selection.step)
    for name, values in exported(settings).items():
        torch.testing.assert_close(values.double(), best.state_dict()[name].float().double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("trained", "depth"),
    [
        ("", None),
        ("LayerNorm.weight", None),
        ("layer.0", 0),
        ("layer.1.sa_layer_norm", 1),
        ("layer.1.ffn", 1),
        ("pre", 2),
    ],
)
def test_the_frozen_part_that_is_run_ahead_ends_below_whatever_trains(trial, trained, depth):
    """Whichever weight of a layer it is: a policy of one's own may train norms alone."""
    model = build_model(resolve_model(trial().model), NAMES, seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name or "classifier" in name)
    layout = params.FlatParamLayout(model, params.Vocabulary(np.arange(9), positions=4))
    assert layout.prefix_depth(layout.frozen) == depth


@pytest.mark.parametrize("freezing", ["head", "bias"])
def test_a_frozen_pooler_that_the_checkpoint_lacks_is_that_of_each_trials_own_seed(
    trial, splits_of, recorder, models, tmp_path, freezing
):
    lacking = tmp_path / "lacking"
    shutil.copytree(models["bert", True], lacking)
    weights = load_file(lacking / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "pooler" not in name and "classifier" not in name}
    save_file(kept, lacking / "model.safetensors", {"format": "pt"})
    trials = [trial(f"freeze={freezing}", f"model.checkpoint={lacking}", f"seed={seed}") for seed in (1, 2)]
    results = FusedEngine().train(trials, splits_of(trials[0]), recorder())
    for settings, result in zip(trials, results, strict=True):
        [alone] = FusedEngine().train([settings], splits_of(settings), recorder())
        np.testing.assert_allclose(result.report.logits, alone.report.logits, atol=1e-6)


def test_gradients_of_the_clipped_cases_are_clipped(trial, splits_of):
    """Without this, the rungs about clipping could all be the same."""
    splits = splits_of(trial())
    _, _, norms = reference(trial("optim.max_grad_norm=0.05"), splits)
    assert sum(norm > 0.05 for norm in norms) > STEPS / 2
    assert max(norms) < 1000


def test_untouched_vocabulary_rows_decay_as_they_would_have(trial, splits_of, recorder):
    settings = trial("optim.weight_decay=0.5", LAST_EPOCH, SAVED)
    splits = splits_of(settings)
    before = initial_model(settings, splits, torch.float32).state_dict()
    FusedEngine(torch.float64).train([settings], splits, recorder())
    name = "distilbert.embeddings.word_embeddings.weight"
    occurring = np.concatenate([splits.train.tokens, splits.report.tokens])
    untouched = np.setdiff1d(np.arange(len(before[name])), occurring)
    assert len(untouched) > 10
    factor = np.prod([1 - 1e-3 * (1 - step / STEPS) * 0.5 for step in range(STEPS)])
    torch.testing.assert_close(exported(settings)[name][untouched], before[name][untouched] * factor)


class SameMasks:
    """Stands in for ``torch.nn.functional.dropout``: the masks that the fused engine draws, on padded batches.

    Where the prefix drops out, its masks are those of the whole window that the step belongs to.
    """

    def __init__(self, settings, splits, depth=2, heads=2):
        self.settings, self.split, self.depth, self.heads = settings, splits.train, depth, heads
        self.schedule = BatchSchedule(len(splits.train), settings.train.batch_size, settings.train.epochs)
        self.ahead = settings.freeze.layers if settings.freeze.dropout else 0

    def around_step(self, step, rows):
        number = step // WINDOW
        steps = range(number * WINDOW, min((number + 1) * WINDOW, self.schedule.steps))
        before = [self.schedule.batch(self.settings.seed, other) for other in steps]
        self.window = pack(self.split, np.concatenate(before))
        self.offset = sum(len(b) for b in before[: step - steps[0]])
        self.packed, self.rows = pack(self.split, rows), rows
        self.drawn_ahead = Dropout([self.settings.seed], "prefix", number, torch.device("cpu"))
        self.drawn = Dropout([self.settings.seed], "step", step, torch.device("cpu"))
        self.layer = -1

    def __call__(self, x, p=0.5, training=True, inplace=False):
        self.layer += x.dim() == 4
        if not training or p == 0:
            return x
        ahead = self.ahead > 0 and self.layer < self.ahead and x.dim() > 2
        packed, drawn, offset = (self.window, self.drawn_ahead, self.offset) if ahead else (self.packed, self.drawn, 0)
        fill = {4: self.attention, 3: self.hidden, 2: self.head}[x.dim()]
        mask = torch.ones_like(x)
        fill(mask, packed, drawn, p, offset)
        return x * mask * dropout_scale(p)

    def attention(self, mask, packed, drawn, p, offset):
        last = self.layer == self.depth - 1
        bins, queries = (len(packed.first), 1) if last else (packed.bins, packed.width)
        shape = (bins, self.heads, queries, packed.width)
        keep = drawn.draw(p, [shape], shape, mask.dtype)[0]
        for row in range(len(self.rows)):
            s = row + offset
            start, length = packed.column[s], int((packed.sentence == s).sum())
            columns = slice(start, start + length)
            if last:
                mask[row, :, 0, :length] = keep[s, :, 0, :length]
            else:
                mask[row, :, :length, :length] = keep[packed.bin[s]][:, columns, columns]

    def hidden(self, mask, packed, drawn, p, offset):
        if self.layer == self.depth - 1:
            self.head(mask[:, 0], packed, drawn, p, offset)
            return
        shape = (len(packed.ids), mask.shape[2])
        keep = drawn.draw(p, [shape], shape, mask.dtype)[0]
        for row in range(len(self.rows)):
            own = keep[torch.from_numpy(packed.sentence == row + offset)]
            mask[row, : len(own)] = own

    def head(self, mask, packed, drawn, p, offset):
        shape = (len(packed.first), mask.shape[1])
        mask.copy_(drawn.draw(p, [shape], shape, mask.dtype)[0][offset : offset + len(mask)])


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("freezing", ["freeze=none", "freeze.layers=1", "freeze.layers=2", "freeze.layers=1 still"])
def test_with_the_same_masks_dropout_is_that_of_the_architecture(
    trial, splits_of, recorder, monkeypatch, kind, freezing
):
    freezing, *still = freezing.split()
    settings = trial(freezing, f"freeze.dropout={not still}", LAST_EPOCH, kind=kind, still=False)
    splits, seen = splits_of(settings), recorder()
    [result] = FusedEngine(torch.float64).train([settings], splits, seen)
    masks = SameMasks(settings, splits)
    monkeypatch.setattr(torch.nn.functional, "dropout", masks)
    monkeypatch.setattr(PreTrainedModel, "train", eager(PreTrainedModel.train))
    _, losses, norms = reference(settings, splits, around_step=masks.around_step)
    assert_follows(losses, norms, result, seen)


def eager(train):
    """Attention written out, for the fused kernel draws its own mask."""

    def wrapped(model, mode=True):
        model.set_attn_implementation("eager")
        return train(model, mode)

    return wrapped


def losses_of(engine, trials, splits, recorder):
    seen = recorder()
    results = engine.train(trials, splits, seen)
    assert all(r.status is Status.FINISHED for r in results), [r.error for r in results]
    return np.array([seen.losses(t) for t in range(len(trials))]), results


EIGHT = [
    ("optim.lr=1e-3", "seed=1"),
    ("optim.lr=3e-3", "seed=2", "optim.max_grad_norm=0.1"),
    ("optim.lr=1e-2", "seed=1", "scheduler=cosine"),
    ("optim.lr=1e-4", "seed=3", "optim.weight_decay=0.3"),
    ("optim.lr=1e-3", "seed=4", "scheduler.warmup_ratio=0.5"),
    ("optim.lr=2e-3", "seed=5", "optim.beta1=0.8"),
    ("optim.lr=5e-3", "seed=6", "scheduler=constant"),
    ("optim.lr=1e-3", "seed=7", "optim.eps=1e-4"),
]


@pytest.mark.parametrize("graph_steps", [False, True])
def test_seconds_are_read_once_the_device_has_done_what_they_are_of(
    trial, splits_of, recorder, monkeypatch, graph_steps
):
    """A GPU is given steps far ahead: a clock that is read before their results leaves out what they take."""
    settings = trial("train.epochs=1", "output.save_model=false", LAST_EPOCH)
    splits, events = splits_of(settings), []
    lap, values = Stopwatch.lap, torch.Tensor.tolist
    monkeypatch.setattr(Stopwatch, "lap", lambda watch: events.append("clock") or lap(watch))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: events.append("values") or values(tensor))

    class Observer(recorder):
        def on_step(self, trial, record):
            events.append("told")

    FusedEngine(graph_steps=graph_steps).train([settings], splits, Observer())
    told = [i for i, event in enumerate(events) if event == "told"]
    assert told
    assert all(events[i - 2 : i] == ["values", "clock"] for i in told)


def test_kernels_are_prepared_before_the_first_step_for_what_trains(trial, splits_of, recorder, monkeypatch):
    settings = trial("train.epochs=1", "output.save_model=false")
    splits, events = splits_of(settings), []
    step = TrialGroup._advance
    monkeypatch.setattr(kernels, "compile_all", lambda *what: events.append(what))
    monkeypatch.setattr(TrialGroup, "_advance", lambda group: events.append("step") or step(group))
    FusedEngine().train([settings], splits, recorder())
    config = resolve_model(settings.model).config
    heads, size = config["n_heads"], config["dim"] // config["n_heads"]
    assert events[:2] == [(torch.device("cpu"), torch.float32, heads, size), "step"]


@pytest.mark.parametrize(
    ("kind", "freezing"),
    [
        ("distilbert", "freeze=none"),
        ("distilbert", "freeze.layers=1"),
        ("bert", "freeze.layers=2"),
        ("distilbert", "freeze=head"),
        ("bert", "freeze=bias"),
        ("bert", "freeze=gradual train.eval_steps=2"),
        ("distilbert", "freeze=scheduled freeze.layers=2 train.eval_steps=2"),
    ],
)
def test_a_trial_alone_in_two_and_in_eight_is_the_same_trial(trial, splits_of, recorder, kind, freezing):
    trials = [trial(*freezing.split(), *own, "train.epochs=1", kind=kind, still=False) for own in EIGHT]
    trials[1] = replace(trials[1], output=replace(trials[1].output, save_model=True))
    splits, engine = splits_of(trials[0]), FusedEngine(torch.float64)
    together, all_results = losses_of(engine, trials, splits, recorder)
    weights = exported(trials[1])
    pair, pair_results = losses_of(engine, trials[1:3], splits, recorder)
    alone, [result] = losses_of(engine, trials[1:2], splits, recorder)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-11)
    np.testing.assert_allclose(pair[0], alone[0], rtol=1e-11)
    for other in (all_results[1], pair_results[0]):
        np.testing.assert_allclose(other.report.logits, result.report.logits, atol=1e-6)
    for name, values in exported(trials[1]).items():
        torch.testing.assert_close(weights[name], values, rtol=0, atol=1e-7)
    assert len({tuple(row) for row in together.round(6)}) == len(EIGHT)


def test_biases_are_trained_without_gradients_of_weights_and_a_head_by_one_pass(
    trial, splits_of, recorder, monkeypatch
):
    monkeypatch.setattr("distilbench.models.flops._known", {})
    nothing = TrainFlops(0, 0, 0)  # what a trial's FLOPs are is counted by products too, once in a process
    monkeypatch.setattr(TrainFlops, "_counted", classmethod(lambda cls, model: nothing))

    def products(*overrides: str) -> int:
        settings = trial(*overrides, "data.max_validation_examples=2", "output.save_model=false", still=False)
        with FlopCounterMode(display=False) as counter:
            FusedEngine().train([settings], splits_of(settings), recorder())
        return counter.get_total_flops()

    full, bias, head = (products(f"freeze={choice}") for choice in ("none", "bias", "head"))
    tokens = 2 * len(splits_of(trial()).train.tokens)  # of two epochs, in all layers but the last, which asks for [CLS]
    of_weights = 2 * tokens * (4 * 32 * 32 + 2 * 32 * 64)
    assert of_weights < full - bias < 1.3 * of_weights
    assert head < 0.4 * full
    assert products("freeze=head", "freeze.dropout=false") / head == pytest.approx(1 / 2, abs=0.06)


def test_trials_of_one_seed_share_one_batch_to_the_same_bits(trial, splits_of, recorder):
    """No filling up is needed there; what differs from a trial alone is which product kernel is called."""
    trials = [trial(f"optim.lr={rate}", still=False) for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
    splits = splits_of(trials[0])
    together, _ = losses_of(FusedEngine(), trials, splits, recorder)
    pair, _ = losses_of(FusedEngine(), trials[1:3], splits, recorder)
    np.testing.assert_array_equal(together[1:3], pair)
    alone, _ = losses_of(FusedEngine(), trials[1:2], splits, recorder)
    np.testing.assert_allclose(together[1], alone[0], rtol=2e-5)


@pytest.mark.parametrize("freezing", ["freeze=none", "freeze=gradual", "freeze=scheduled freeze.layers=2"])
def test_the_fused_engine_follows_the_trainer_engine_step_by_step(trial, splits_of, recorder, freezing):
    """Same order of examples, same schedule, same records, on the way that users take."""
    from distilbench.engines.trainer import TrainerEngine

    settings = trial(
        *freezing.split(), "scheduler=cosine", "scheduler.warmup_ratio=0.2", "train.epochs=3", "output.save_model=false"
    )
    splits, ours, theirs = splits_of(settings), recorder(), recorder()
    [fused] = FusedEngine().train([settings], splits, ours)
    [trainer] = TrainerEngine().train([settings], splits, theirs)
    for own, other in zip(ours.steps[0], theirs.steps[0], strict=True):
        assert (own.step, own.steps, own.epoch) == (other.step, other.steps, other.epoch)
        assert own.loss == pytest.approx(other.loss, rel=1e-5)
        assert own.learning_rate == pytest.approx(other.learning_rate, rel=1e-12)
        assert own.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
    np.testing.assert_allclose(fused.report.logits, trainer.report.logits, atol=1e-5)
    assert (fused.train_flops, fused.selection.step) == (trainer.train_flops, trainer.selection.step)
    assert fused.trainable_parameters == trainer.trainable_parameters
    assert fused.total_parameters == trainer.total_parameters


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prefix_without_dropout_is_the_same_cached_or_computed_again(trial, splits_of, recorder, monkeypatch, depth):
    settings = trial(f"freeze.layers={depth}", "freeze.dropout=false", still=False)
    splits = splits_of(settings)
    kept, _ = losses_of(FusedEngine(torch.float64), [settings], splits, recorder)
    monkeypatch.setattr(prefix, "CACHE_BYTES", 0)
    anew, _ = losses_of(FusedEngine(torch.float64), [settings], splits, recorder)
    np.testing.assert_allclose(kept, anew, rtol=1e-12)


def test_a_prefix_with_dropout_draws_anew_in_every_epoch(trial, splits_of, recorder, monkeypatch):
    from distilbench.engines.fused.prefix import Prefix

    seen = []
    original = Prefix.hidden
    monkeypatch.setattr(Prefix, "hidden", lambda *args, out: seen.append(original(*args, out)) or seen[-1])
    settings = trial("freeze.layers=1", "train.batch_size=37", "seed=3", "train.epochs=3", still=False)
    FusedEngine().train([settings], splits_of(settings), recorder())
    sums = [states.pow(3).sum().item() for states in seen]  # the same examples each time, in another order
    assert len(set(np.round(sums, 3))) == 3


@pytest.mark.parametrize(
    "freezing",
    ["freeze=none", "freeze=gradual train.eval_steps=3", "freeze=scheduled freeze.layers=2 train.eval_steps=3"],
)
@pytest.mark.parametrize(
    ("count", "threads", "short", "taken"),
    [
        (3, 1, lambda group, stack: len(group.members) > 1, []),
        (6, 1, lambda group, stack: stack.trial_slice.start > 0, [0, 1, 2]),
        (6, 2, lambda group, stack: len(group.members) == 6 and stack.trial_slice.start == 2, [0, 1, 4]),
    ],
    ids=["within a stack", "between two stacks", "in one of two threads"],
)
def test_a_group_that_does_not_fit_is_halved_without_repeating_a_step(
    trial, splits_of, recorder, monkeypatch, count, threads, short, taken, freezing
):
    """Those that wait go on from that step, whatever is frozen by then in those before."""
    torch.set_num_threads(threads)
    own = [(f"optim.lr={seed}e-3", f"seed={seed}") for seed in range(1, count + 1)]
    trials = [trial(*freezing.split(), *overrides, still=False) for overrides in own]
    splits = splits_of(trials[0])
    fitting, _ = losses_of(FusedEngine(), trials, splits, recorder)
    run, halves, ahead = TrialGroup._forward_backward, TrialGroup._halves, []

    def short_of_memory(group, stack):
        if group.step >= 4 and short(group, stack):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(group, stack)

    monkeypatch.setattr(TrialGroup, "_forward_backward", short_of_memory)
    monkeypatch.setattr(TrialGroup, "_halves", lambda group: ahead.append(sorted(group.taken)) or halves(group))
    seen = recorder()
    results = FusedEngine().train(trials, splits, seen)
    assert [r.status for r in results] == [Status.FINISHED] * count
    assert ahead[0] == taken
    for t in range(count):
        assert [r.step for r in seen.steps[t]] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(seen.losses(t), fitting[t], rtol=2e-5)


@pytest.mark.parametrize("seeds", [(1,) * 5, (1, 2, 3, 4, 5)], ids=["one order", "orders of their own"])
@pytest.mark.parametrize("freezing", ["freeze=none", "freeze.layers=1", "freeze.layers=1 freeze.dropout=false",
                                      "freeze=gradual train.eval_steps=3"])  # fmt: skip
def test_stacks_in_threads_train_as_they_do_one_after_the_other(trial, splits_of, recorder, freezing, seeds):
    own = [(f"optim.lr={rate}e-3", f"seed={seed}") for rate, seed in enumerate(seeds, start=1)]
    trials = [trial(*freezing.split(), "train.micro_batch_size=4", *overrides, still=False) for overrides in own]
    splits = splits_of(trials[0])
    in_turn, _ = losses_of(FusedEngine(torch.float64), trials, splits, recorder)
    torch.set_num_threads(3)
    in_threads, _ = losses_of(FusedEngine(torch.float64), trials, splits, recorder)
    np.testing.assert_allclose(in_threads, in_turn, rtol=1e-11)


def test_a_group_that_the_device_does_not_even_hold_is_halved(trial, splits_of, recorder, monkeypatch):
    trials = [trial(f"optim.lr={seed}e-3") for seed in (1, 2, 3)]
    splits = splits_of(trials[0])
    fitting, _ = losses_of(FusedEngine(), trials, splits, recorder)
    load, refused = TrialGroup._load, []

    def short_of_memory(group, state):
        if len(group.members) > 1:
            refused.append(len(group.members))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        load(group, state)

    monkeypatch.setattr(TrialGroup, "_load", short_of_memory)
    halved, results = losses_of(FusedEngine(), trials, splits, recorder)
    assert refused == [3, 2]
    np.testing.assert_allclose(halved, fitting, rtol=2e-5)
    assert all(result.setup_seconds > 0 for result in results)


def test_only_the_trial_that_does_not_fit_goes_on_with_smaller_batches(trial, splits_of, recorder, monkeypatch):
    trials = [trial(f"optim.lr={seed}e-3", f"seed={seed}", "freeze.layers=1") for seed in (1, 2)]
    splits = splits_of(trials[0])
    fitting, _ = losses_of(FusedEngine(torch.float64), trials, splits, recorder)
    run, predict = TrialGroup._forward_backward_part, TrialGroup._predict

    def short_of_memory(group, stack, examples, part):
        if group.step >= 4 and (
            len(group.members) > 1 or (group.members[0].trial.index == 0 and part.stop - part.start > 2)
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(group, stack, examples, part)

    def short_of_memory_too(group, split):
        if len(group.members) == 1 and group.members[0].trial.index == 0 and group.members[0].eval_batch > 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return predict(group, split)

    monkeypatch.setattr(TrialGroup, "_forward_backward_part", short_of_memory)
    monkeypatch.setattr(TrialGroup, "_predict", short_of_memory_too)
    seen = recorder()
    results = FusedEngine(torch.float64).train(trials, splits, seen)
    assert [(r.status, r.micro_batch_size) for r in results] == [(Status.FINISHED, 2), (Status.FINISHED, None)]
    for t in range(2):
        assert [r.step for r in seen.steps[t]] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(seen.losses(t), fitting[t], rtol=1e-10)


def test_a_last_evaluation_that_does_not_fit_is_taken_in_smaller_parts(trial, splits_of, recorder, monkeypatch):
    """The report split's texts may be longer than those of the split that selects."""
    trials = [trial(f"seed={seed}", "train.epochs=1") for seed in (1, 2)]
    splits = splits_of(trials[0])
    splits = replace(splits, selection=replace(splits.report))
    _, fitting = losses_of(FusedEngine(), trials, splits, recorder)
    predict = TrialGroup._predict

    def short_of_memory(group, split):
        if split is group.context.splits.report and (len(group.members) > 1 or group.members[0].eval_batch > 7):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return predict(group, split)

    monkeypatch.setattr(TrialGroup, "_predict", short_of_memory)
    _, results = losses_of(FusedEngine(), trials, splits, recorder)
    for result, expected in zip(results, fitting, strict=True):
        np.testing.assert_allclose(result.report.logits, expected.report.logits, atol=1e-6)


def test_a_trial_without_checkpoints_writes_none_beside_one_with_them(trial, splits_of, recorder):
    trials = [trial(f"train.checkpoints={kept}", "train.eval_steps=2") for kept in ("true", "false")]
    with pytest.raises(KeyboardInterrupt):
        FusedEngine().train(trials, splits_of(trials[0]), recorder(raise_at={3: KeyboardInterrupt()}))
    assert [(Path(t.output.dir) / "checkpoints").exists() for t in trials] == [True, False]


def test_groups_are_planned_by_the_memory_that_is_free(trial, splits_of, recorder, monkeypatch):
    import distilbench.engines.fused.engine as fused

    trials = [trial(f"optim.lr={rate}", "output.save_model=false") for rate in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)]
    splits, sizes = splits_of(trials[0]), []
    context = fused._group_context(trials[0], splits, torch.float32)
    needed = fused.bytes_per_trial(context, trials[0])
    assert needed > 5 * 4 * context.layout.size
    free = namedtuple("free", "available")(int(2.5 * needed / fused.MEMORY_SHARE))
    monkeypatch.setattr(fused.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(fused, "train_group", lambda *given: sizes.append(len(given[0])) or train_group(*given))
    results = FusedEngine().train(trials, splits, recorder())
    assert [r.status for r in results] == [Status.FINISHED] * 5
    assert sizes == [2, 2, 1]


def test_a_checkpoint_of_another_layout_is_refused_in_one_line(trial, splits_of, recorder, monkeypatch):
    settings = trial("train.checkpoints=true", "train.eval_steps=3", "output.save_model=false")
    splits = splits_of(settings)
    with pytest.raises(KeyboardInterrupt):
        FusedEngine().train([settings], splits, recorder(raise_at={4: KeyboardInterrupt()}))
    monkeypatch.setattr(params, "ALIGNMENT", 1)
    again = replace(settings, train=replace(settings.train, resume=True))
    [result] = FusedEngine().train([again], splits, recorder())
    assert result.status is Status.FAILED
    assert result.error.startswith(
        "train.resume must be false where another version of distilbench left the checkpoint"
    )


def test_trials_interrupted_at_different_steps_resume_together(trial, splits_of, recorder):
    common = ("train.checkpoints=true", "train.eval_steps=3", "output.save_model=false")
    trials = [trial(f"seed={seed}", *common, still=False) for seed in (1, 2)]
    whole = [trial(f"seed={seed}", *common, still=False) for seed in (1, 2)]
    splits = splits_of(trials[0])
    for settings, step in zip(trials, (4, 8), strict=True):
        with pytest.raises(KeyboardInterrupt):
            FusedEngine().train([settings], splits, recorder(raise_at={step: KeyboardInterrupt()}))
    again = [replace(t, train=replace(t.train, resume=True)) for t in trials]
    seen = recorder()
    resumed = FusedEngine().train(again, splits, seen)
    assert [seen.steps[t][0].step for t in (0, 1)] == [4, 7]
    for settings, result in zip(whole, resumed, strict=True):
        [expected] = FusedEngine().train([settings], splits, recorder())
        np.testing.assert_allclose(result.report.logits, expected.report.logits, atol=1e-6)
        assert [e.step for e in result.history] == [e.step for e in expected.history]


@pytest.mark.parametrize("whole", [True, False], ids=["whole batches", "in parts"])
@pytest.mark.parametrize(
    "freezing", ["freeze.layers=0", "freeze.layers=1", "freeze=bias", "freeze=scheduled freeze.layers=2"]
)
def test_bf16_follows_autocast(trial, splits_of, recorder, freezing, whole):
    """With clipping that bites in most steps, and beside a neighbour: parts of a batch add up in float32."""
    from distilbench.engines.trainer import TrainerEngine

    common = ("train.precision=bf16", "train.epochs=4", "optim.max_grad_norm=0.1", *freezing.split(),
              "output.save_model=false", *(() if whole else ("train.micro_batch_size=2",)))  # fmt: skip
    trials = [trial(f"optim.lr={rate}", *common) for rate in (1e-3, 3e-3)]
    splits, ours, theirs = splits_of(trials[0]), recorder(), recorder()
    fused = FusedEngine().train(trials, splits, ours)
    trainer = TrainerEngine().train(trials, splits, theirs)
    for t in range(2):
        assert (fused[t].precision, trainer[t].precision) == ("bf16", "bf16")
        np.testing.assert_allclose(ours.losses(t), theirs.losses(t), atol=5e-3)
        norms = [np.array([r.gradient_norm for r in seen.steps[t]]) for seen in (ours, theirs)]
        assert np.mean(norms[0] > 0.1) > 0.5
        np.testing.assert_allclose(*norms, rtol=0.05, atol=1e-3)


def test_the_fused_engine_trains_two_labels_or_more(trial, splits_of, recorder):
    settings = trial(LAST_EPOCH)
    splits = splits_of(settings)
    labels = np.arange(len(splits.train)) % 3
    three = replace(splits, train=replace(splits.train, labels=labels), label_names=("bad", "fair", "good"))
    _, losses, _ = reference(settings, three)
    ours, _ = losses_of(FusedEngine(torch.float64), [settings], three, recorder)
    assert ours[0] == pytest.approx(losses, rel=1e-11)


def test_an_architecture_it_does_not_know_fails_its_trials_with_the_remedy(settings, splits_of, recorder):
    other = settings("model.checkpoint=roberta").trial
    results = FusedEngine().train([other], splits_of(other), recorder())
    assert results[0].status is Status.FAILED
    assert results[0].error.endswith("use engine=trainer")
