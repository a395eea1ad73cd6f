"""The physical limit: hand-counted products and traffic of a small encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distilbench.bench.roofline import Machine, StepCost, measure_machine, step_cost_of
from distilbench.models.build import build_model
from distilbench.models.freezing import freeze
from distilbench.models.resolve import resolve_model

TOKENS, SENTENCES, WORDS = 100.0, 10, 7


@pytest.fixture
def model(settings):
    return build_model(resolve_model(settings("model.layers=3").model), ("negative", "positive"), seed=1)


def frozen(model, settings, layers):
    freeze(model, settings(f"freeze.layers={layers}", "model.layers=3").freeze)
    return step_cost_of(model, TOKENS, SENTENCES, WORDS)


def sizes(model):
    """A layer's products with its matrices, per token, and within attention, per sentence; the head's, per sentence."""
    config, length = model.config, TOKENS / SENTENCES
    return (
        4 * config.dim**2 + 2 * config.dim * config.hidden_dim,
        2 * length**2 * config.dim,
        config.dim * (config.dim + 2),
    )


def test_all_products_count_thrice_and_the_last_layer_only_for_cls(model, settings):
    layer, attention, head = sizes(model)
    whole = layer * TOKENS + attention * SENTENCES
    last = whole / (TOKENS / SENTENCES)
    work = frozen(model, settings, 0)
    assert work.operations == pytest.approx(3 * 2 * (2 * whole + last + head * SENTENCES))
    assert work.shared_operations == 0


def test_a_frozen_layer_counts_once_and_the_first_products_above_it_twice(model, settings):
    layer, attention, head = sizes(model)
    whole = layer * TOKENS + attention * SENTENCES
    last = whole / (TOKENS / SENTENCES)
    work = frozen(model, settings, 1)
    assert work.shared_operations == pytest.approx(2 * whole)
    first_trained = 2 * (3 * whole - 3 * model.config.dim**2 * TOKENS)
    assert work.operations == pytest.approx(2 * whole + first_trained + 3 * 2 * (last + head * SENTENCES))


def test_everything_frozen_leaves_the_head_to_the_optimizer(model, settings):
    work = frozen(model, settings, 3)
    assert work.shared_operations > 0
    head = sum(p.numel() for p in (*model.pre_classifier.parameters(), *model.classifier.parameters()))
    assert work.optimizer_bytes == 28 * head


def test_the_optimizer_moves_28_bytes_for_every_trained_weight_and_word_that_occurs(model, settings):
    vocabulary = model.distilbert.embeddings.word_embeddings.weight
    rest = sum(p.numel() for p in model.parameters()) - vocabulary.numel()
    assert frozen(model, settings, 0).optimizer_bytes == 28 * (rest + WORDS * vocabulary.shape[1])


def test_the_limit_is_the_longer_of_products_and_traffic_and_a_batch_shares_the_prefix():
    machine = Machine({"fp32": 100.0, "bf16": 200.0}, bytes_per_second=10.0)
    work = StepCost(operations=1000.0, shared_operations=400.0, optimizer_bytes=40.0)
    assert work.seconds(machine, "fp32") == 10
    assert work.seconds(machine, "fp32", trials=4) == 7
    assert work.seconds(machine, "bf16") == 5
    assert replace(work, optimizer_bytes=80.0).seconds(machine, "bf16") == 8


def test_a_machine_is_measured_in_every_precision_asked_for(monkeypatch):
    monkeypatch.setattr("distilbench.bench.roofline._MEASURED_SECONDS", 0.01)
    monkeypatch.setattr("distilbench.bench.roofline._SIDE", 256)  # without bf16 instructions, 2,048 takes minutes
    machine = measure_machine(torch.device("cpu"), {"fp32", "bf16"})
    assert set(machine.operations_per_second) == {"fp32", "bf16"}
    assert all(rate > 1e8 for rate in (*machine.operations_per_second.values(), machine.bytes_per_second))
