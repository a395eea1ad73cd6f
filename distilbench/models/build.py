"""Build tokenizer and model from a resolved source, and export trained models. Imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from distilbench.data.hub import first_line
from distilbench.models.architecture import BERT, DISTILBERT
from distilbench.models.resolve import ENCODER_SEED, ResolvedModel, _character_vocabulary
from distilbench.results import MODEL
from distilbench.settings import SettingsError, TrialSettings, require

if TYPE_CHECKING:
    from peft import PeftModel


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerFast:
    """Return the model's fast tokenizer, with padding (on the right) and truncation off by default.

    The packaged MiniLM gets DistilBERT's tokenizer class with the same vocabulary, a random model one with single
    characters. It returns ``token_type_ids`` if the model has embeddings for them. Raises :class:`SettingsError` if the
    checkpoint has no fast tokenizer, or one that doesn't fit its embeddings.
    """
    source, vocabulary = resolved.settings.source, None
    if resolved.directory is None:
        vocabulary = _character_vocabulary()
    elif source == "package":
        tokens = (resolved.directory / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        vocabulary = {token: number for number, token in enumerate(tokens)}
    with silence_transformers():
        if vocabulary is None:
            tokenizer = _saved_tokenizer(resolved)
        else:
            tokenizer = DistilBertTokenizer(vocab=vocabulary, model_max_length=resolved.max_tokens)
        if source != "package":  # whose config.json is BERT's
            types = ["token_type_ids"] if getattr(_configuration(resolved), "type_vocab_size", 0) > 1 else []
            inputs = ["input_ids", *types, "attention_mask"]
            tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = inputs  # init_kwargs are saved
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # as both engines pad
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    if resolved.max_tokens is not None:  # tokenizers saved without a limit have 1e30
        tokenizer.model_max_length = min(tokenizer.model_max_length, resolved.max_tokens)
    return tokenizer


def _saved_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerFast:
    name, rows = resolved.settings.checkpoint, resolved.config.get("vocab_size")
    with _damage_as_settings_error(resolved):
        found: Any = AutoTokenizer.from_pretrained(resolved.directory, trust_remote_code=False, local_files_only=True)
    is_usable = isinstance(found, PreTrainedTokenizerFast) and found.pad_token_id is not None
    require(is_usable, "model.checkpoint", "a model with a fast tokenizer (tokenizer.json) and a padding token", name)
    tokenizer: PreTrainedTokenizerFast = found
    count = len(tokenizer)  # an empty vocabulary, made if its file is missing, has special tokens and up to two more
    require(count > len(tokenizer.all_special_tokens) + 2, "model.checkpoint", "a model with a vocabulary that its "
            "tokenizer reads", f"{name} with {count} tokens", "save the tokenizer with save_pretrained")  # fmt: skip
    require(rows is None or count <= rows, "model.checkpoint",
            f"a model with embeddings for its tokenizer's {count} tokens", f"{name} with {rows}")  # fmt: skip
    return tokenizer


@contextmanager
def _damage_as_settings_error(resolved: ResolvedModel) -> Iterator[None]:
    """Turn errors caused by a damaged checkpoint into :class:`SettingsError`."""
    try:
        yield
    except Exception as error:  # tokenizers raises no other class
        raise SettingsError(
            f"model.checkpoint must be a readable checkpoint, got {resolved.used.name!r}: {first_line(error)}; "
            "save or download it again"
        ) from None


def build_model(resolved: ResolvedModel, label_names: Sequence[str], seed: int) -> PreTrainedModel:
    """Return a float32 classifier of ``len(label_names)`` labels on the CPU, in evaluation mode.

    A head that the checkpoint lacks, or has for another number of labels, is drawn from ``seed`` alone, without
    changing torch's global random state. Raises :class:`SettingsError` if the weights can't be read or don't match
    their configuration.
    """
    with silence_transformers(), torch.random.fork_rng(devices=[]):
        weights = None
        if resolved.directory is not None and resolved.settings.source == "package":
            config, weights = _minilm_as_distilbert(resolved.directory, resolved.config)
        else:
            config = _configuration(resolved)
            if resolved.directory is None:  # the encoder does not depend on the trial's seed
                torch.default_generator.manual_seed(ENCODER_SEED)
                weights = AutoModel.from_config(config, dtype=torch.float32).state_dict()
        trained = [str(name) for _, name in sorted((config.id2label or {}).items())]
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: number for number, name in enumerate(label_names)}
        config.problem_type = "single_label_classification"
        torch.default_generator.manual_seed(seed)
        model, drawn = load_weights(resolved, config, weights)
    # the head and the pooler before it may be new, but nothing in the encoder
    encoder = f"{model.base_model_prefix}."
    lacking = sorted(name for name in drawn if name.startswith(encoder) and ".pooler." not in name)
    require(not lacking, "model.checkpoint", "a model with the weights that its config.json describes",
            f"{resolved.used.name} without {len(lacking)} of them or in other shapes, such as {', '.join(lacking[:1])}",
            "save or download it again")  # fmt: skip
    _order_head(model, trained, label_names)
    return model


def _order_head(model: PreTrainedModel, trained: Sequence[str], label_names: Sequence[str]) -> None:
    """Reorder the head's rows from ``trained`` to ``label_names``, if both are the same labels in another order."""
    had, wanted = ([name.casefold() for name in names] for names in (trained, label_names))
    if had != wanted and sorted(had) == sorted(wanted) and len(set(had)) == len(had):
        *_, head = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
        for weight in head.parameters():  # (labels, width) and (labels,)
            weight.data = weight.data[[had.index(name) for name in wanted]]


def _configuration(resolved: ResolvedModel) -> PreTrainedConfig:
    if resolved.directory is None:
        return AutoConfig.for_model(**resolved.config)
    with _damage_as_settings_error(resolved):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(resolved.directory), trust_remote_code=False, local_files_only=True
        )
    return config


def _minilm_as_distilbert(directory: Path, bert: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Return MiniLM's configuration and weights with DistilBERT's names, which give the same last hidden states.

    DistilBERT (Sanh et al., 2019, section 3) is BERT without token types and pooler. All tokens of a single text have
    type 0, so that type's embedding is added to every position embedding.
    """
    config = DistilBertConfig(
        vocab_size=bert["vocab_size"],
        max_position_embeddings=bert["max_position_embeddings"],
        n_layers=bert["num_hidden_layers"],
        n_heads=bert["num_attention_heads"],
        dim=bert["hidden_size"],
        hidden_dim=bert["intermediate_size"],
        activation=bert["hidden_act"],
        dropout=bert["hidden_dropout_prob"],
        attention_dropout=bert["attention_probs_dropout_prob"],
        initializer_range=bert["initializer_range"],
        pad_token_id=bert["pad_token_id"],
    )
    weights = load_file(directory / "model.safetensors")
    token_types = weights.pop("embeddings.token_type_embeddings.weight")  # (2, width)
    weights["embeddings.position_embeddings.weight"] += token_types[0]  # (positions, width)
    kept = {name: w for name, w in weights.items() if not name.startswith(("pooler", "embeddings.position_ids"))}
    for part, ours in DISTILBERT.items():  # in this order: "attention.output.dense" ends in "output.dense"
        ours, theirs = ours.removeprefix("distilbert."), BERT[part].removeprefix("bert.")
        kept = {name.replace(theirs, ours): w for name, w in kept.items()}
    return config, kept


def load_weights(
    resolved: ResolvedModel, config: PreTrainedConfig | None = None, weights: dict[str, torch.Tensor] | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """Return a classifier with ``weights``, by default the directory's, and the names of newly drawn parameters.

    ``config`` is the directory's by default. Weights that are missing or have another shape are drawn. Raises
    :class:`SettingsError` if the weights can't be read, or the architecture has no sequence classifier.
    """
    config = config or _configuration(resolved)
    config.return_dict = True  # else the model would return tuples
    require(type(config) in CLASSIFIERS, "model.checkpoint", "an architecture that classifies sequences",
            f"{resolved.settings.checkpoint} ({config.model_type})")  # fmt: skip
    classifier: Any = CLASSIFIERS[type(config)]
    with _damage_as_settings_error(resolved):
        model, report = classifier.from_pretrained(
            resolved.directory if weights is None else None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    broken = [name for name, weight in model.named_parameters() if not weight.sum().isfinite()]
    require(not broken, "model.checkpoint", "a model of finite weights",
            f"nan or inf in {', '.join(broken[:1])} of {resolved.used.name}", "download it again")  # fmt: skip
    return model, report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress the log messages of transformers, such as that a head is new, and its progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def export_trial(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: TrialSettings) -> None:
    """Write a trial's model to ``model/`` in its directory, with what is needed to use it as it was trained.

    The tokenizer has the maximum length as its limit; config.json names the text columns and the hub's data set.
    """
    tokenizer.model_max_length = settings.train.max_length
    said = ("text_column", "pair_column", "hub_name", "hub_config")
    model.config.distilbench = {name: getattr(settings.data, name) for name in said}
    export_model(model, tokenizer, Path(settings.output.dir) / MODEL)


def export_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write ``model`` as safetensors, with ``tokenizer``; if that fails, ``directory`` keeps its previous content.

    Both load with ``from_pretrained(directory)`` of the auto classes, an adapter with peft. Replaces an existing
    directory. Only one process at a time may write to a directory.
    """
    # otherwise peft would ask the hub whether the vocabulary has changed
    options: dict[str, Any] = {} if isinstance(model, PreTrainedModel) else {"save_embedding_layers": False}
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh, former = directory.with_name(f".{directory.name}.new"), directory.with_name(f".{directory.name}.old")
    for leftover in (fresh, former):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with silence_transformers():
            model.save_pretrained(str(fresh), **options)
            tokenizer.save_pretrained(fresh)
        if directory.exists():
            directory.rename(former)  # a directory can't be renamed over one that holds files
        fresh.rename(directory)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
