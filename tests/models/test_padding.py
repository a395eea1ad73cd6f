"""Which models are refused or warned about because a text's logits change with the texts beside it."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from distilbench.identity import SourceUsed
from distilbench.models.classifier import load_classifier
from distilbench.models.padding import padding_effect, set_padding
from distilbench.settings import SettingsError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "embedding_size": 32,
}
ENCODERS = ("bert", "roberta", "albert", "electra", "modernbert", "mpnet", "deberta", "deberta-v2", "squeezebert")
OTHERS = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "longformer": SIZES | {"attention_window": 4},
    "mobilebert": SIZES | {"intra_bottleneck_size": 32},
    "funnel": {"d_model": 32, "block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 64},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": SIZES,
}
FAMILIES = dict.fromkeys(ENCODERS, SIZES) | OTHERS


def tiny(family: str, seed: int = 0, **sizes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{"vocab_size": 100, "pad_token_id": 0, "eos_token_id": 3, **sizes})
    return AutoModelForSequenceClassification.from_config(config).eval()


def source(name: str) -> SourceUsed:
    return SourceUsed("local", name, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_mask_padding_change_by_rounding_only(family):
    for seed in range(3):
        assert padding_effect(tiny(family, seed, **FAMILIES[family]), 0)[1] < 2e-5


@pytest.mark.parametrize(("family", "sizes"), [("fnet", SIZES), ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2})])
def test_a_model_that_reads_its_padding_is_refused(family, sizes):
    model = tiny(family, **sizes)
    said = (
        rf"must be an architecture whose logits don't depend on padding, got '{family}'; padding changes a text's log"
    )
    for _ in range(2):
        with pytest.raises(SettingsError, match=said):
            set_padding(model, 0, source("here"))


def test_predictions_of_such_a_model_are_refused_too(checkpoint):
    tiny("fnet", **SIZES | {"vocab_size": 200}).save_pretrained(checkpoint)
    with pytest.raises(
        SettingsError, match=r"^dir must be an architecture whose logits don't depend on padding, got 'fn"
    ):
        load_classifier(checkpoint, "cpu")


def test_a_slight_dependence_on_padding_is_warned_of_once(caplog):
    for seed in range(2):
        with caplog.at_level(logging.WARNING):
            set_padding(tiny("convbert", seed, **SIZES), 0, source("conv"))
    [message] = caplog.messages
    assert message.startswith("conv: padding changes a text's logits by ")
    assert message.endswith("% of what other texts change, so results depend slightly on which texts share a batch")
