"""What every engine promises (distilbench/engines/base.py), on tiny models, without dropout but where it matters."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.special import softmax
from sklearn.metrics import log_loss
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distilbench.data.text import load_text
from distilbench.engines import engine_for
from distilbench.engines.batches import BatchSchedule, epoch_order
from distilbench.models.build import build_model
from distilbench.models.flops import TrainFlops, count_flops_by_module
from distilbench.models.freezing import freeze, freeze_levels, parameter_levels
from distilbench.models.resolve import resolve_model
from distilbench.results import MEASURES, Status
from tests.engines.conftest import PAIRS

SMALL = ("data.max_train_examples=37", "data.max_validation_examples=24", "train.batch_size=8", "train.epochs=3",
         "train.logging_steps=2", "train.checkpoints=false", "optim.lr=1e-3", "output.save_model=false")  # fmt: skip
STEPS_PER_EPOCH, STEPS = 5, 15


@pytest.fixture(params=["trainer", "fused"])
def engine_name(request):
    return request.param


@pytest.fixture
def trial(settings, model_without_dropout, tmp_path, engine_name):
    """Return ``trial(*overrides, dropout=False) -> TrialSettings``, each in a directory of its own."""
    made = iter(range(1000))

    def make(*overrides: str, dropout: bool = False):
        model = () if dropout else ("model=local", f"model.checkpoint={model_without_dropout}")
        directory = f"output.dir={tmp_path / str(next(made))}"
        return settings(f"engine.name={engine_name}", *model, *SMALL, directory, *overrides).trial

    return make


@pytest.fixture
def train(splits_of, recorder):
    """Return ``train(trials, observer=None, splits=None) -> (results, observer)``."""

    def run(trials, observer=None, splits=None):
        observer = observer or recorder()
        splits = splits or splits_of(trials[0])
        return engine_for(trials[0].engine).train(trials, splits, observer), observer

    return run


def numbers(evaluation):
    return (evaluation.step, evaluation.epoch, *(evaluation.metric(name) for name in MEASURES))


def against(split):
    """The same rows with the labels turned round: the more a model learns, the worse it does here."""
    return replace(split, labels=1 - split.labels)


def test_results_keep_the_order_of_the_trials(trial, train):
    trials = [trial("seed=1"), trial("seed=2", "optim.lr=2e-3"), trial("freeze.layers=1")]
    together, _ = train(trials)
    for settings, result in zip(trials, together, strict=True):
        [alone], _ = train([settings])
        assert result.status is alone.status is Status.FINISHED
        assert result.trainable_parameters == alone.trainable_parameters
        assert result.train_flops == alone.train_flops > 0
        np.testing.assert_allclose(result.report.logits, alone.report.logits, atol=1e-5)
    assert not np.allclose(together[0].report.logits, together[1].report.logits, atol=1e-3)


def test_the_same_seed_gives_the_same_bits(trial, train):
    [first], one = train([trial("seed=7", dropout=True)])
    [second], two = train([trial("seed=7", dropout=True)])
    np.testing.assert_array_equal(first.report.logits, second.report.logits)
    assert [numbers(e) for e in first.history] == [numbers(e) for e in second.history]
    assert one.losses() == two.losses()
    [other], _ = train([trial("seed=8", dropout=True)])
    assert not np.array_equal(other.report.logits, first.report.logits)


def test_the_result_tells_what_was_done(trial, train, splits_of):
    settings = trial()
    splits = splits_of(settings)
    [result], _ = train([settings])
    assert (result.steps, result.error) == (STEPS, None)
    assert result.trainable_parameters == result.total_parameters == 39_170
    assert 0 < result.train_seconds < 60
    assert result.train_cpu_seconds > 0
    assert 0 < result.setup_seconds < 60
    assert result.peak_memory_bytes > 10e6
    assert (result.device != "", result.precision) == (True, "fp32")
    tokens_an_example = len(splits.train.tokens) / len(splits.train)
    assert result.tokens_per_second / result.examples_per_second == pytest.approx(tokens_an_example)


def flops_of(settings, splits, examples) -> int:
    """What torch counts in a step over each of ``examples`` by itself."""
    model = build_model(resolve_model(settings.model), splits.label_names, seed=0)
    freeze(model, settings.freeze)
    counts = Counter(len(splits.train.row(i)) for i in examples)
    return sum(times * count_flops_by_module(model, length)["Global"] for length, times in counts.items())


@pytest.mark.parametrize(
    "freezing", ["freeze.layers=0", "freeze.layers=1", "freeze.layers=2", "freeze=head", "freeze=bias"]
)
def test_flops_are_those_of_each_token_that_was_trained_on(trial, train, splits_of, freezing):
    settings = trial(freezing, "train.epochs=2", "train.max_length=12")
    splits = splits_of(settings)
    [result], _ = train([settings])
    assert len({len(splits.train.row(i)) for i in range(37)}) > 1
    assert result.train_flops == 2 * flops_of(settings, splits, range(37))


def test_flops_of_a_trial_that_stops_early_are_those_of_its_steps(trial, train, recorder, splits_of):
    together = [trial("train.eval_steps=6", "train.max_length=12", f"seed={seed}") for seed in (1, 2)]
    results, _ = train(together, recorder(prune={1}))
    splits = splits_of(together[1])
    seen = [*range(37), *epoch_order(37, 2, epoch=1)[:8]]
    assert (results[1].status, results[1].steps) == (Status.PRUNED, 6)
    assert results[1].train_flops == flops_of(together[1], splits, seen)
    assert results[0].train_flops == 3 * flops_of(together[0], splits, range(37))


def test_steps_are_recorded_at_intervals_at_evaluations_and_at_the_end(trial, train):
    _, observer = train([trial("train.logging_steps=3")])
    records = observer.steps[0]
    assert [r.step for r in records] == [3, 5, 6, 9, 10, 12, 15]
    assert {r.steps for r in records} == {STEPS}
    assert [r.epoch for r in records] == pytest.approx([r.step / STEPS_PER_EPOCH for r in records])
    rates = [1e-3 * (1 - (r.step - 1) / STEPS) for r in records]
    assert [r.learning_rate for r in records] == pytest.approx(rates)
    assert all(r.gradient_norm > 0 and r.examples_per_second > 0 for r in records)


def test_a_record_holds_the_mean_loss_since_the_last_one(trial, train):
    _, each = train([trial("train.logging_steps=1")])
    _, coarse = train([trial("train.logging_steps=5")])
    means = [float(np.mean(each.losses()[start : start + 5])) for start in (0, 5, 10)]
    assert coarse.losses() == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "steps"), [("train.eval_steps=null", [5, 10, 15]), ("train.eval_steps=4", [4, 8, 12, 15])]
)
def test_it_evaluates_when_asked_and_always_at_the_end(trial, train, override, steps):
    [result], observer = train([trial(override)])
    assert [e.step for e in result.history] == steps
    assert [numbers(e) for e in observer.evaluations[0]] == [numbers(e) for e in result.history]
    assert result.history[-1].epoch == 3.0


def test_logits_come_in_the_order_of_the_split(trial, train, splits_of):
    settings = trial("train.eval_batch_size=5")
    splits = splits_of(settings)
    order = np.random.default_rng(0).permutation(len(splits.report))
    rows = [splits.report.row(i) for i in order]
    shuffled = replace(
        splits.report,
        tokens=np.concatenate(rows),
        offsets=np.cumsum([0, *map(len, rows)]),
        labels=splits.report.labels[order],
    )
    [straight], _ = train([settings], splits=splits)
    [mixed], _ = train([settings], splits=replace(splits, selection=shuffled, report=shuffled))
    np.testing.assert_allclose(mixed.report.logits, straight.report.logits[order], atol=1e-5)
    assert mixed.report.loss == pytest.approx(straight.report.loss, rel=1e-5)


def test_the_metrics_are_those_of_the_logits(trial, train, splits_of):
    settings = trial()
    labels = splits_of(settings).report.labels
    [result], _ = train([settings])
    chances = np.exp(result.report.logits) / np.exp(result.report.logits).sum(axis=1, keepdims=True)
    guesses = result.report.logits.argmax(axis=1)
    hits, called, positive = guesses == labels, guesses == 1, labels == 1
    assert result.report.logits.dtype == np.float32
    assert result.report.loss == pytest.approx(-np.log(chances[np.arange(len(labels)), labels]).mean(), rel=1e-5)
    assert result.report.accuracy == hits.mean()
    assert result.report.f1 == pytest.approx(2 * (called & positive).sum() / (called.sum() + positive.sum()))
    deviation = math.sqrt(called.mean() * (1 - called.mean()) * positive.mean() * (1 - positive.mean()))
    mcc = ((called & positive).mean() - called.mean() * positive.mean()) / deviation if deviation else 0.0
    assert result.report.mcc == pytest.approx(mcc)
    assert result.report.brier == pytest.approx(((chances[:, 1] - positive) ** 2).mean(), rel=1e-5)
    assert 0 < result.report.ece < 1


def test_many_classes_a_class_with_one_example_and_long_texts_are_trained_on(trial, train, splits_of, tmp_path):
    """150 classes, as intents have; the last occurs once in train and never in validation; some texts fill 512."""
    long = "aaa " * 200
    rows = {"train": [(f"{long if i < 4 else ''}xx {i}", f"intent{i % 150:03}") for i in range(299)],
            "validation": [(f"{long if i < 2 else ''}yz {i}", f"intent{i:03}") for i in range(40)]}  # fmt: skip
    for name, lines in rows.items():
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in lines))
    settings = trial(
        "data=files", *(f"data.{name}={tmp_path / name}.csv" for name in rows), "data.max_train_examples=null",
        "data.max_validation_examples=null",
        "train.max_length=512", "train.epochs=1", "train.batch_size=16", "train.eval_batch_size=16",
    )  # fmt: skip
    splits = splits_of(settings)
    assert np.diff(splits.train.offsets).max() == 512
    assert np.bincount(splits.train.labels)[-1] == 1
    [result], _ = train([settings], splits=splits)
    assert (result.status, result.report.logits.shape) == (Status.FINISHED, (40, 150))
    assert all(math.isfinite(result.report.metric(name)) for name in MEASURES)


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_pairs_are_read_as_the_saved_model_and_tokenizer_read_them(trial, train, splits_of, architecture):
    settings = trial(*PAIRS, "model=tiny", f"model.checkpoint={architecture}", "train.max_length=24", "train.epochs=2",
                     "optim.lr=1e-2", "output.save_model=true", dropout=True)  # fmt: skip
    splits = splits_of(settings)
    [result], _ = train([settings], splits=splits)
    assert result.status is Status.FINISHED, result.error
    saved = Path(settings.output.dir) / "model"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    report = load_text(settings.data).report
    inputs = tokenizer(list(report.texts), list(report.pairs), truncation=True, max_length=24, padding=True,
                       return_tensors="pt")  # fmt: skip
    assert model.config.distilbench["pair_column"] == "two"
    assert inputs["attention_mask"].sum() == len(splits.report.tokens)
    assert 24 in np.diff(splits.report.offsets), "some are cut"
    with torch.no_grad():
        logits = model(**inputs).logits
        swapped = model(**tokenizer(list(report.pairs), list(report.texts), padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(result.report.logits, logits, atol=2e-6)
    assert (swapped - logits).abs().max() > 5e-5, "which text comes first counts"


def test_a_split_that_selects_and_reports_is_evaluated_once(trial, train):
    [result], _ = train([trial()])
    assert result.report is result.selection
    assert result.selection.split == "validation"


def test_the_report_comes_from_the_weights_that_the_selection_split_picked(trial, train, splits_of):
    settings = trial("train.metric=loss", "output.save_model=true", "optim.lr=3e-3")
    splits = splits_of(settings)
    [plain], _ = train([trial("train.metric=loss", "optim.lr=3e-3")], splits=splits)
    picky = replace(splits, selection=against(splits.report))
    [result], _ = train([settings], splits=picky)
    losses = [e.loss for e in result.history]
    assert [e.split for e in result.history] == ["selection"] * 3
    assert losses.index(min(losses)) == 0, "the first epoch must be the best for this test to tell anything"
    assert result.selection is result.history[0]
    assert (result.report.split, result.report.step) == ("validation", STEPS_PER_EPOCH)
    assert result.report.loss == pytest.approx(plain.history[0].loss, rel=1e-5)
    np.testing.assert_allclose(result.selection.logits, result.report.logits, atol=1e-5)
    exported = logits_of(f"{settings.output.dir}/model", picky.report, picky.pad_token_id)
    np.testing.assert_allclose(exported, result.report.logits, atol=1e-5)


def logits_of(directory, split, pad_token_id):
    """What the exported model says of each row by itself."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    rows = (torch.from_numpy(split.row(i).astype(np.int64))[None] for i in range(len(split)))
    with torch.no_grad():
        return np.concatenate([model(input_ids=row).logits.numpy() for row in rows])


@pytest.mark.parametrize("freezing", ["freeze=head", "freeze=bias"])
def test_what_a_policy_freezes_stays_as_it_was_and_the_rest_is_trained(trial, train, splits_of, freezing):
    settings = trial(freezing, "output.save_model=true", dropout=True)
    splits = splits_of(settings)
    [result], _ = train([settings])
    model = build_model(resolve_model(settings.model), splits.label_names, settings.seed)
    freeze(model, settings.freeze)
    trained = load_file(f"{settings.output.dir}/model/model.safetensors")
    for name, parameter in model.named_parameters():
        key_bias = name.endswith("k_lin.bias")  # its gradient is rounding noise
        changed = not np.array_equal(trained[name], parameter.detach().numpy())
        assert changed == parameter.requires_grad or key_bias, name
    assert result.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


# Freezing that moves: embeddings, two layers and the head are levels 0 to 3, and there is a boundary every four steps
MOVING = {"freeze=gradual": [3, 2, 1, 0], "freeze=scheduled freeze.layers=2": [0, 1, 2, 3]}


@pytest.mark.parametrize("freezing", MOVING)
def test_freezing_that_moves_costs_the_sum_of_its_parts_and_trains_what_any_of_them_trains(
    trial, train, splits_of, freezing
):
    settings = trial(*freezing.split(), "train.eval_steps=4", "train.max_length=12")
    splits = splits_of(settings)
    [result], _ = train([settings])
    schedule, expected = BatchSchedule(37, 8, 3), 0
    model = build_model(resolve_model(settings.model), splits.label_names, settings.seed)
    for step in range(STEPS):
        freeze_levels(model, MOVING[freezing][step // 4])
        lengths = np.array([len(splits.train.row(i)) for i in schedule.batch(settings.seed, step)])
        expected += TrainFlops.of(model).total(lengths, np.ones_like(lengths))
    assert (result.status, result.error, result.steps) == (Status.FINISHED, None, STEPS)
    assert result.train_flops == expected
    assert result.trainable_parameters == result.total_parameters == 39_170


def test_what_gradual_has_not_come_to_stays_as_it_was(trial, train, splits_of):
    settings = trial(
        "freeze=gradual", "train.eval_steps=8", "train.metric=loss", "output.save_model=true", "optim.lr=3e-3"
    )
    [result], _ = train([settings])
    assert result.selection.step == STEPS, "the last part must be the best for this test to tell anything"
    model = build_model(resolve_model(settings.model), splits_of(settings).label_names, settings.seed)
    level_of, trained = parameter_levels(model), load_file(f"{settings.output.dir}/model/model.safetensors")
    changed = {level_of[name] for name, p in model.named_parameters()
               if not np.array_equal(trained[name], p.detach().numpy())}  # fmt: skip
    assert changed == {2, 3}
    assert result.trainable_parameters == _parameters_from(model, 2) < result.total_parameters


def _parameters_from(model, level):
    return sum(p.numel() for name, p in model.named_parameters() if parameter_levels(model)[name] >= level)


def test_a_trial_that_ends_early_has_trained_what_its_parts_so_far_did(trial, train, splits_of, recorder):
    settings = trial("freeze=gradual", "train.eval_steps=4")
    [result], _ = train([settings], recorder(prune={0}))
    model = build_model(resolve_model(settings.model), splits_of(settings).label_names, settings.seed)
    assert (result.status, result.steps) == (Status.PRUNED, 4)
    assert result.trainable_parameters == _parameters_from(model, 3) < result.total_parameters


@pytest.mark.parametrize("freezing", MOVING)
def test_a_trial_whose_freezing_moves_is_the_same_beside_others_and_after_one_has_left(
    trial, train, recorder, freezing
):
    common = (*freezing.split(), "train.eval_steps=4")
    trials = [trial(*common, f"seed={seed}", f"optim.lr={seed}e-3") for seed in (1, 2, 3)]
    together, _ = train(trials, recorder(prune={1}))
    assert [r.status for r in together] == [Status.FINISHED, Status.PRUNED, Status.FINISHED]
    for t in (0, 2):
        [alone], _ = train([trials[t]])
        assert [e.step for e in together[t].history] == [4, 8, 12, 15]
        np.testing.assert_allclose([e.loss for e in together[t].history], [e.loss for e in alone.history], rtol=1e-5)
        np.testing.assert_allclose(together[t].report.logits, alone.report.logits, atol=1e-5)


@pytest.mark.parametrize("freezing", MOVING)
def test_a_trial_cut_beside_a_boundary_continues_to_the_same_bits(trial, train, recorder, splits_of, freezing):
    """After the first step of a part, before an evaluation, and between two of them."""
    given = (*freezing.split(), "train.eval_steps=4", "train.checkpoints=true", "train.metric=loss",
             "train.logging_steps=1", "output.save_model=true", "optim.lr=3e-3")  # fmt: skip
    settings = trial(*given, dropout=True)
    [whole], seen = train([settings])
    wanted = load_file(f"{settings.output.dir}/model/model.safetensors")
    for left in ({"raise_at": {10: KeyboardInterrupt()}}, {"leave_at": 5}, {"leave_at": 8}):
        other = trial(*given, dropout=True)
        with pytest.raises(KeyboardInterrupt):
            train([other], recorder(**left))
        [resumed], again = train([replace(other, train=replace(other.train, resume=True))])
        assert again.losses() == seen.losses()[-len(again.losses()) :]
        np.testing.assert_array_equal(resumed.report.logits, whole.report.logits)
        assert resumed.train_flops == whole.train_flops
        assert resumed.trainable_parameters == whole.trainable_parameters
        weights = load_file(f"{other.output.dir}/model/model.safetensors")
        for name, values in wanted.items():
            np.testing.assert_array_equal(weights[name], values, err_msg=name)


OBJECTIVE = ("train.label_smoothing=0.2", "train.class_weights=balanced", "optim.layer_decay=0.7", "optim.lr=3e-3")


def test_smoothing_weights_and_layer_decay_change_training_and_not_what_is_measured(trial, train, splits_of):
    [result], seen = train([trial(*OBJECTIVE)])
    [plain], _ = train([trial("optim.lr=3e-3")])
    [small], parts = train([trial(*OBJECTIVE, "train.micro_batch_size=2")])
    np.testing.assert_allclose(parts.losses(), seen.losses(), rtol=2e-5)
    np.testing.assert_allclose(small.report.logits, result.report.logits, atol=1e-4)
    assert not np.allclose(result.report.logits, plain.report.logits, atol=1e-3)
    labels = splits_of(trial()).report.labels
    assert result.report.loss == pytest.approx(log_loss(labels, softmax(result.report.logits, axis=1)), rel=1e-5)
    assert seen.steps[0][0].learning_rate == pytest.approx(3e-3 * (1 - 1 / STEPS)), "the head's"


def test_of_equal_epochs_the_first_is_kept(trial, train):
    [result], _ = train([trial("optim.lr=1e-12")])
    assert len({e.accuracy for e in result.history}) == 1
    assert result.selection is result.history[0]


def test_a_trial_ends_where_its_patience_does_and_alone(trial, train):
    common = ("train.epochs=4", "optim.lr=1e-30", "output.save_model=true")
    [stopped, whole], _ = train([trial(*common, "train.patience=2"), trial(*common, "train.patience=4")])
    assert [stopped.status, whole.status] == [Status.FINISHED, Status.FINISHED]
    assert [len(stopped.history), len(whole.history)] == [3, 4]
    assert [stopped.steps, whole.steps] == [3 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH]
    assert stopped.selection is stopped.history[0]
    assert stopped.report.step == STEPS_PER_EPOCH
    assert stopped.train_flops == pytest.approx(whole.train_flops * 3 / 4)
    np.testing.assert_allclose(stopped.report.logits, whole.report.logits, atol=1e-6)


def test_the_exported_model_comes_with_its_tokenizer_and_nothing_else(trial, train):
    from transformers import AutoTokenizer

    settings = trial("output.save_model=true")
    train([settings])
    assert [path.name for path in Path(settings.output.dir).iterdir()] == ["model"]
    assert AutoTokenizer.from_pretrained(f"{settings.output.dir}/model")("ab")["input_ids"][0] == 2


def test_a_trial_that_diverges_leaves_the_others_alone(trial, train):
    wild = trial("optim=sgd", "optim.lr=1e30", "optim.max_grad_norm=0")
    results, _ = train([trial("seed=1"), wild, trial("seed=2")])
    assert [r.status for r in results] == [Status.FINISHED, Status.DIVERGED, Status.FINISHED]
    assert results[1].steps < STEPS
    assert "lower optim.lr (now 1e+30)" in results[1].error
    assert "\n" not in results[1].error
    for seed, result in ((1, results[0]), (2, results[2])):
        [alone], _ = train([trial(f"seed={seed}")])
        np.testing.assert_allclose(result.report.logits, alone.report.logits, atol=1e-5)


def test_settings_that_the_model_cannot_meet_fail_their_own_trial_only(trial, train):
    results, _ = train([trial("freeze.layers=9"), trial()])
    assert [r.status for r in results] == [Status.FAILED, Status.FINISHED]
    assert results[0].error.startswith("freeze.layers must be 0..2")
    assert (results[0].report, results[0].selection, results[0].steps, results[0].train_flops) == (None, None, 0, 0.0)


def test_a_pruned_trial_stops_at_once_and_alone(trial, train, recorder):
    results, observer = train([trial("seed=1"), trial("seed=2"), trial("seed=3")], recorder(prune={1}))
    assert [r.status for r in results] == [Status.FINISHED, Status.PRUNED, Status.FINISHED]
    assert (results[1].steps, len(results[1].history)) == (STEPS_PER_EPOCH, 1)
    assert max(r.step for r in observer.steps[1]) == STEPS_PER_EPOCH
    assert results[1].selection is results[1].history[0]
    [alone], _ = train([trial("seed=3")])
    np.testing.assert_allclose(results[2].report.logits, alone.report.logits, atol=1e-5)


@pytest.mark.parametrize("eval_steps", ["null", "2"])
@pytest.mark.parametrize("best_first", [False, True])
def test_an_interrupted_trial_continues_to_the_same_bits(trial, train, recorder, splits_of, eval_steps, best_first):
    given = (f"train.eval_steps={eval_steps}", "train.checkpoints=true", "train.metric=loss",
             "output.save_model=true", "optim.lr=3e-3")  # fmt: skip
    settings, other = trial(*given, dropout=True), trial(*given, dropout=True)
    splits = splits_of(settings)
    if best_first:
        splits = replace(splits, selection=against(splits.report))
    [whole], all_steps = train([settings], splits=splits)
    with pytest.raises(KeyboardInterrupt):
        train([other], recorder(raise_at={9: KeyboardInterrupt(), 8: KeyboardInterrupt()}), splits=splits)
    [resumed], last_steps = train([replace(other, train=replace(other.train, resume=True))], splits=splits)
    assert last_steps.steps[0][0].step == {"null": 6, "2": 8}[eval_steps]
    assert last_steps.losses() == all_steps.losses()[-len(last_steps.losses()) :]
    assert [numbers(e) for e in resumed.history] == [numbers(e) for e in whole.history]
    np.testing.assert_array_equal(resumed.selection.logits, whole.selection.logits)
    np.testing.assert_array_equal(resumed.report.logits, whole.report.logits)
    assert (resumed.steps, resumed.train_flops) == (whole.steps, whole.train_flops)
    weights, expected = (load_file(f"{s.output.dir}/model/model.safetensors") for s in (other, settings))
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values, err_msg=name)


@pytest.mark.parametrize("asked", [2, 9])
def test_a_trial_asked_to_leave_goes_on_from_that_very_step(trial, train, recorder, splits_of, asked):
    """In the first epoch, before there is a best one, and later; twice in a row."""
    given = ("train.checkpoints=true", "train.logging_steps=100", "output.save_model=true", "optim.lr=3e-3")
    settings, other = trial(*given, dropout=True), trial(*given, dropout=True)
    [whole], _ = train([settings])
    left = []
    for resume in (False, True):
        observer = recorder(leave_at=asked)
        with pytest.raises(KeyboardInterrupt):
            train([replace(other, train=replace(other.train, resume=resume))], observer)
        left.append(observer.steps[0][-1].step)
        asked = 1
    assert left[1] == left[0] + 1
    [resumed], _ = train([replace(other, train=replace(other.train, resume=True))])
    assert [numbers(e) for e in resumed.history] == [numbers(e) for e in whole.history]
    np.testing.assert_array_equal(resumed.report.logits, whole.report.logits)
    assert not list(Path(other.output.dir).glob("checkpoints/*"))


def test_micro_batches_add_up_to_their_batch(trial, train):
    for freezing in ("freeze.layers=0", "freeze.layers=1"):
        _, whole = train([trial(freezing)])
        for size in (2, 4):  # the last batch of an epoch, of 5, ends with a smaller micro-batch
            [result], parts = train([trial(freezing, f"train.micro_batch_size={size}")])
            assert (result.status, result.micro_batch_size) == (Status.FINISHED, size)
            np.testing.assert_allclose(parts.losses(), whole.losses(), rtol=2e-5)
            norms = [[r.gradient_norm for r in seen.steps[0]] for seen in (parts, whole)]
            np.testing.assert_allclose(*norms, rtol=2e-4)


def examples_that_fit(monkeypatch, most: int, calls: int = 0) -> None:
    """Let memory run out where a loss is taken over more than ``most`` examples, after so many calls."""
    cross_entropy, made = torch.nn.functional.cross_entropy, iter(range(10_000))

    def limited(inputs, target, *args, **kwargs):
        if target.numel() > most and next(made) >= calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return cross_entropy(inputs, target, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", limited)


@pytest.mark.parametrize("checkpoints", ["true", "false"])
def test_a_batch_that_does_not_fit_is_added_up_from_smaller_ones(trial, train, monkeypatch, caplog, checkpoints):
    settings = f"train.checkpoints={checkpoints}", "train.logging_steps=1"
    _, fitting = train([trial(*settings)])
    examples_that_fit(monkeypatch, most=3, calls=7)
    [result], seen = train([trial(*settings)])
    assert (result.status, result.micro_batch_size, result.steps) == (Status.FINISHED, 2, STEPS)
    last_told = {record.step: record.loss for record in seen.steps[0]}
    np.testing.assert_allclose(list(last_told.values()), fitting.losses(), rtol=2e-5)
    assert "going on with train.micro_batch_size=4" in caplog.text
    assert "going on with train.micro_batch_size=2" in caplog.text


def test_an_example_that_does_not_fit_alone_ends_the_trial_with_what_to_change(trial, train, monkeypatch):
    examples_that_fit(monkeypatch, most=0)
    [result], _ = train([trial()])
    assert result.status is Status.OUT_OF_MEMORY
    assert result.error.endswith("; lower train.max_length (now 128), freeze more layers, or take a smaller model")


def test_engines_print_nothing(trial, train, capfd):
    train([trial("output.save_model=true", "train.checkpoints=true")])
    assert capfd.readouterr() == ("", "")
