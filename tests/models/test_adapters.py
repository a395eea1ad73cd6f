"""Adapters: where they are put by structure, what trains, what is drawn, what they cost, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distilbench.models.adapters import adapt, merge
from distilbench.models.build import build_model
from distilbench.models.flops import TrainFlops, count_flops_by_module
from distilbench.models.freezing import is_head, parameter_counts
from distilbench.models.resolve import resolve_model
from distilbench.settings import AdapterSettings, ModelSettings, SettingsError

LORA, IA3 = AdapterSettings("lora", 4, 8.0, 0.1, True), AdapterSettings("ia3", None, None, None, True)
TARGETS = {  # family -> (ends of what LoRA adapts, of what IA3 does)
    "distilbert": ({"q_lin", "v_lin"}, {"k_lin", "v_lin", "lin2"}),
    "bert": ({"query", "value"}, {"key", "value", "dense"}),
    "roberta": ({"query", "value"}, {"key", "value", "dense"}),
    "electra": ({"query", "value"}, {"key", "value", "dense"}),
    "albert": ({"query", "value"}, {"key", "value", "ffn_output"}),
    "modernbert": ({"Wqkv"}, {"Wqkv", "Wo"}),
}


def adapted(family: str, settings: AdapterSettings, seed: int = 1):
    resolved = resolve_model(ModelSettings("random", family, layers=2))
    model = build_model(resolved, ["no", "yes"], seed=1)
    plain = sum(p.numel() for p in model.parameters())
    return model, adapt(model, settings, resolved, seed), plain


@pytest.mark.parametrize("settings", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("family", TARGETS)
def test_every_layer_gets_one_and_it_and_the_head_are_all_that_trains(family, settings):
    model, _, plain = adapted(family, settings)
    added = {name for name, _ in model.named_parameters() if "lora_" in name or "ia3_" in name}
    ends = {name.split(".lora_")[0].split(".ia3_")[0].rpartition(".")[2] for name in added}
    assert ends == TARGETS[family][settings.name == "ia3"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == added | {name for name in trained if is_head(model, name)}
    head = sum(p.numel() for name, p in model.named_parameters() if name in trained - added)
    sizes = sum(p.numel() for name, p in model.named_parameters() if name in added)
    assert parameter_counts(model) == (sizes + head, plain + sizes)
    assert head > 0


@pytest.mark.parametrize("settings", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("family", TARGETS)
def test_a_merged_model_answers_as_the_adapted_one(family, settings):
    model, peft_model, _ = adapted(family, settings)
    tokens = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        before = model.eval()(input_ids=tokens).logits
        merged = merge(peft_model)
        torch.testing.assert_close(merged(input_ids=tokens).logits, before, atol=1e-5, rtol=0)
    assert not any("original_module" in name or "ia3" in name or "lora" in name for name in merged.state_dict())


def test_random_adapter_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    drawn = [{n: p for n, p in adapted("distilbert", LORA, seed)[0].named_parameters() if "lora_A" in n}
             for seed in (1, 1, 2)]  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


@pytest.mark.parametrize("settings", [LORA, IA3], ids=["lora", "ia3"])
def test_its_flops_are_counted_and_hold_for_any_length(settings):
    model, _, _ = adapted("distilbert", settings)
    flops = TrainFlops.of(model)
    for length in (2, 37):
        expected = flops.per_example + flops.per_token * length + flops.per_token_pair * length**2
        assert count_flops_by_module(model, length)["Global"] == expected


def test_no_adapter_leaves_the_model_alone():
    model, found, plain = adapted("distilbert", AdapterSettings("none", None, None, None, True))
    assert found is None
    assert parameter_counts(model) == (plain, plain)


def test_layers_whose_parts_cannot_be_told_are_refused():
    resolved = resolve_model(ModelSettings("random", "distilbert", layers=2))
    model = build_model(resolved, ["no", "yes"], seed=1)
    for layer in model.distilbert.transformer.layer:
        layer.attention = nn.Identity()
    with pytest.raises(SettingsError, match=r"^adapter.name needs layers with linear maps for query, key and value"):
        adapt(model, LORA, resolved, 1)
