"""What a trial costs against torch's counter on a real step: every way to freeze, in every family, and any other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from distilbench.models import flops as flops_module
from distilbench.models.build import build_model
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import freeze
from distilbench.models.resolve import resolve_model
from distilbench.settings import FreezeSettings, ModelSettings

DEPTH = 3
FAMILIES = ("distilbert", "bert", "roberta", "electra")


def tiny(family: str, layers: int = DEPTH):
    return build_model(resolve_model(ModelSettings("random", family, layers=layers)), ["no", "yes", "maybe"], seed=1)


def counted(model, sentences: int, length: int, attention: str = "eager") -> int:
    """What torch counts in one step over a batch without padding."""
    model.set_attn_implementation(attention)
    tokens, labels = torch.full((sentences, length), 7), torch.zeros(sentences, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=labels).loss.backward()
    return counter.get_total_flops()


def total(flops: TrainFlops, *lengths: int) -> float:
    return flops.total(np.array(lengths), np.ones(len(lengths), dtype=int))


@pytest.mark.parametrize(("depth", "embeddings"), [(0, "auto"), (0, True), (1, False), (2, "auto"), (DEPTH, "auto")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_freeze_depth_costs_what_torch_counts(family, depth, embeddings):
    model = tiny(family)
    freeze(model, FreezeSettings(depth, embeddings, True, "depth"))
    flops = TrainFlops.of(model)
    for sentences, length in ((1, 2), (4, 13), (3, 40)):
        assert total(flops, *[length] * sentences) == counted(model, sentences, length)


@pytest.mark.parametrize("policy", ["head", "bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_costs_what_torch_counts(family, policy):
    model = tiny(family)
    freeze(model, FreezeSettings(0, "auto", True, policy))
    assert total(TrainFlops.of(model), 11, 11) == counted(model, 2, 11)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_set_of_trained_parameters_costs_what_torch_counts(family):
    model, draw = tiny(family), random.Random(family)
    head = ("classifier", "pre_classifier")
    choices = [lambda name, share=share: draw.random() < share or name.startswith(head) for share in (0.02, 0.1, 0.5)]
    for is_trained in choices:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name))
        assert total(TrainFlops.of(model), 11, 11) == counted(model, 2, 11)


@pytest.mark.parametrize("family", ["albert", "modernbert"])
def test_families_whose_layers_are_shared_or_made_otherwise_cost_what_torch_counts(family):
    model = tiny(family)
    freeze(model, FreezeSettings(0, True, True, "depth"))
    flops = TrainFlops.of(model)
    for length in (3, 50):
        # transformers below 5.20 has ModernBERT turn its positions by one small product for the whole batch
        assert total(flops, length, length) == pytest.approx(counted(model, 2, length), rel=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "albert", "modernbert"])
def test_a_large_model_is_counted_without_computing_anything(family, monkeypatch):
    model, count, devices = tiny(family), flops_module._count_flops_on, []
    freeze(model, FreezeSettings(1, True, True, "depth"))
    small = TrainFlops._counted(model)
    monkeypatch.setattr(flops_module, "_META_FROM", 0)
    monkeypatch.setattr(flops_module, "_count_flops_on", lambda at, *of: devices.append(at) or count(at, *of))
    assert TrainFlops._counted(model) == small
    assert devices == ["meta"] * 3


def test_a_model_that_reads_its_tokens_costs_what_torch_counts():
    config = DebertaV2Config(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=64, relative_attention=True, pos_att_type=["p2c", "c2p"])  # fmt: skip
    model = DebertaV2ForSequenceClassification(config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze(model, FreezeSettings(1, "auto", True, "depth"))
    flops = TrainFlops.of(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert total(flops, 8) == counted(model.eval(), 1, 8)


class Adapter(nn.Module):
    """Adds a product of low rank to what a matrix gives."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2), nn.Linear(2, 32)

    def forward(self, rows):
        return self.base(rows) + self.up(self.down(rows))


def test_other_matrices_in_a_layer_are_counted():
    model = tiny("distilbert")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.distilbert.transformer.layer:
        layer.attention.q_lin = Adapter(layer.attention.q_lin)
    flops = TrainFlops.of(model)
    assert total(flops, 9) == counted(model, 1, 9)


def test_a_layer_costs_what_is_reckoned_by_hand():
    model = tiny("distilbert", layers=1)
    encoder, pairs = 2 * (4 * 32 * 32 + 2 * 32 * 64), 2 * 32 * 2
    head, classifier = 2 * 32 * 32, 2 * 32 * 3
    assert TrainFlops.of(model) == TrainFlops(3 * (head + classifier), 3 * encoder, 3 * pairs)
    freeze(model, FreezeSettings(1, "auto", True, "depth"))
    assert TrainFlops.of(model) == TrainFlops(2 * head + 3 * classifier, encoder, pairs)


def test_the_reports_frozen_trial_costs_a_third_less_than_its_baseline():
    examples, tokens, squares = 67_349, 897_039, 18_084_855  # of SST-2's training sentences, cut at 128 tokens
    costs = []
    for depth in (0, 3):
        with torch.device("meta"):
            model = DistilBertForSequenceClassification(DistilBertConfig())
        freeze(model, FreezeSettings(depth, "auto", True, "depth"))
        flops = TrainFlops.of(model)
        costs.append(3 * (flops.per_example * examples + flops.per_token * tokens + flops.per_token_pair * squares))
    assert costs == [pytest.approx(6.89e14, rel=1e-3), pytest.approx(4.50e14, rel=1e-3)]
    assert 1 - costs[1] / costs[0] == pytest.approx(0.347, abs=5e-4)


def test_examples_add_up_as_often_as_they_are_seen():
    flops = TrainFlops(per_example=1000, per_token=10, per_token_pair=1)
    assert flops.total(np.array([2, 5, 9]), np.array([3, 0, 1])) == 4 * 1000 + (3 * 2 + 9) * 10 + 3 * 4 + 81
    assert flops.total(np.array([128], np.int32), np.array([300_000], np.int32)) == 300_000 * (1000 + 1280 + 128**2)


def test_counting_changes_nothing_of_the_model():
    model = tiny("albert").train()
    state = torch.random.get_rng_state()
    TrainFlops.of(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
