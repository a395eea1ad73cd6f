"""Which parameters each family freezes, and what freezing does to gradients and dropout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BartConfig, BartForSequenceClassification

from distilbench.models.build import build_model
from distilbench.models.freezing import freeze, frozen_names, parameter_counts
from distilbench.models.resolve import resolve_model
from distilbench.settings import FreezeSettings, ModelSettings, SettingsError

DEPTH = 3
FAMILIES = {  # family -> (beginnings of the embeddings' names, beginning of a layer's names)
    "distilbert": (("distilbert.embeddings.",), "distilbert.transformer.layer.{}."),
    "bert": (("bert.embeddings.",), "bert.encoder.layer.{}."),
    "roberta": (("roberta.embeddings.",), "roberta.encoder.layer.{}."),
    "electra": (("electra.embeddings.", "electra.embeddings_project."), "electra.encoder.layer.{}."),
    "modernbert": (("model.embeddings.",), "model.layers.{}."),
}
ALBERT_EMBEDDINGS = ("albert.embeddings.", "albert.encoder.embedding_hidden_mapping_in.")


def tiny(family: str, dropout: float = 0.1):
    model = build_model(resolve_model(ModelSettings("random", family, layers=DEPTH)), ["no", "yes"], seed=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def freezing(
    layers: int = 0, embeddings: bool | str = "auto", dropout: bool = True, policy: str = "depth"
) -> FreezeSettings:
    return FreezeSettings(layers, embeddings, dropout, policy)


def names_that_begin(model, beginnings) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(beginnings))}


def run(model):
    return model(input_ids=torch.arange(5, 29).view(2, 12), labels=torch.tensor([0, 1]), output_hidden_states=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", range(DEPTH + 1))
def test_embeddings_and_lower_layers_are_frozen_and_nothing_else(family, layers):
    model = tiny(family)
    embeddings, layer = FAMILIES[family]
    beginnings = [*embeddings, *(layer.format(i) for i in range(layers))] if layers else []
    expected = names_that_begin(model, beginnings)
    assert frozen_names(model, freezing(layers)) == expected
    assert bool(expected) == bool(layers)


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("mpnet", {"mpnet.encoder.relative_attention_bias.weight"}),
        ("deberta-v2", {f"deberta.encoder.{name}" for name in
                        ("rel_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")}),
    ],
)  # fmt: skip
def test_positions_that_all_layers_read_are_frozen_with_the_embeddings(kind, beside):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    more = {"relative_attention": True, "pos_att_type": ["c2p"], "norm_rel_ebd": "layer_norm"}
    config = AutoConfig.for_model(kind, intermediate_size=64, **sizes, **(more if kind == "deberta-v2" else {}))
    model = AutoModelForSequenceClassification.from_config(config)
    frozen = frozen_names(model, freezing(1))
    assert beside < frozen
    assert not beside & frozen_names(model, freezing(1, embeddings=False))
    assert not any(name.startswith(model.base_model_prefix) for name, _ in model.named_parameters()
                   if name not in frozen_names(model, freezing(DEPTH)))  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_can_be_chosen_apart_from_the_layers(family):
    model = tiny(family)
    embeddings, layer = FAMILIES[family]
    assert frozen_names(model, freezing(0, embeddings=True)) == names_that_begin(model, embeddings)
    assert frozen_names(model, freezing(1, embeddings=False)) == names_that_begin(model, [layer.format(0)])


def test_a_distilbert_layer_has_these_sixteen_parameters():
    attention = [f"attention.{part}_lin" for part in ("q", "k", "v", "out")]
    parts = [*attention, "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"]
    layer = {f"distilbert.transformer.layer.0.{part}.{kind}" for part in parts for kind in ("bias", "weight")}
    assert frozen_names(tiny("distilbert"), freezing(1, embeddings=False)) == layer


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parameters_get_no_gradient_and_all_others_do(family):
    model = tiny(family)
    freeze(model, freezing(2))
    run(model.train()).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == frozen_names(model, freezing(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_depth_leaves_head_pooler_and_final_norm(family):
    model = tiny(family)
    freeze(model, freezing(DEPTH))
    left = {name.split(".")[0] if not name.startswith(model.base_model_prefix) else name.split(".")[1]
            for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    assert left <= {"pre_classifier", "classifier", "head", "pooler", "final_norm"}
    assert "classifier" in left


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_the_prefix_is_deterministic_whatever_mode_is_set(family):
    model = tiny(family)
    freeze(model, freezing(2, dropout=False))
    model.train().eval()
    model.train()
    first, second = run(model).hidden_states, run(model).hidden_states
    assert all(torch.equal(first[i], second[i]) for i in range(3))
    assert not torch.equal(first[3], second[3])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_dropout_the_frozen_prefix_still_varies_as_in_the_report(family):
    model = tiny(family)
    freeze(model, freezing(2))
    model.train()
    first, second = run(model).hidden_states, run(model).hidden_states
    assert not any(torch.equal(first[i], second[i]) for i in range(3))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_its_own_prefix_in_evaluation(twin):
    model = tiny("distilbert")
    freeze(model, freezing(1, dropout=False))
    other = twin(model).train()
    assert not other.distilbert.embeddings.dropout.training
    assert not other.distilbert.transformer.layer[0].attention.training
    assert other.distilbert.transformer.layer[1].attention.training


def test_albert_freezes_its_embeddings_but_no_shared_layer():
    model = tiny("albert")
    assert frozen_names(model, freezing(0)) == frozenset()
    assert frozen_names(model, freezing(0, embeddings=True)) == names_that_begin(model, ALBERT_EMBEDDINGS)


def test_a_structure_with_two_stacks_of_layers_is_refused_unless_nothing_is_frozen():
    config = BartConfig(vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=1,
                        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8)  # fmt: skip
    model = BartForSequenceClassification(config)
    assert frozen_names(model, freezing(0)) == frozenset()
    with pytest.raises(
        SettingsError, match=r"need an encoder with one list of 2 layers, got 2 in bart; use freeze=none"
    ):
        frozen_names(model, freezing(1))


@pytest.mark.parametrize("family", [*FAMILIES, "albert"])
def test_the_head_policy_leaves_what_stands_outside_of_the_base_model(family):
    model = tiny(family)
    trained = {name for name, _ in model.named_parameters()} - frozen_names(model, freezing(policy="head"))
    heads = {"distilbert": {"pre_classifier", "classifier"}, "modernbert": {"head", "classifier"}}
    assert {name.split(".")[0] for name in trained} == heads.get(family, {"classifier"})
    assert not any("pooler" in name for name in trained)


@pytest.mark.parametrize("family", [family for family in [*FAMILIES, "albert"] if family != "modernbert"])
def test_the_bias_policy_leaves_every_bias_and_the_head(family):
    model = tiny(family)
    trained = {name for name, _ in model.named_parameters()} - frozen_names(model, freezing(policy="bias"))
    head = {name for name, _ in model.named_parameters()} - frozen_names(model, freezing(policy="head"))
    assert trained == head | {name for name, _ in model.named_parameters() if name.endswith("bias")}
    freeze(model, freezing(policy="bias"))
    run(model.train()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_head_without_dropout_the_whole_encoder_is_deterministic(family):
    model = tiny(family)
    freeze(model, freezing(policy="head", dropout=False))
    model.train()
    first, second = run(model).hidden_states, run(model).hidden_states
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_counts_are_of_trainable_and_of_all_parameters():
    model = tiny("distilbert")
    total = sum(p.numel() for p in model.parameters())
    assert parameter_counts(model) == (total, total)
    freeze(model, freezing(DEPTH))
    head = 32 * 32 + 32 + 32 * 2 + 2  # pre_classifier and classifier
    assert parameter_counts(model) == (head, total)
