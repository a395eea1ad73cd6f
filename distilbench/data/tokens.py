"""Encode text as token ids, cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from distilbench.data.text import TextSplit, TextSplits, fingerprint
from distilbench.results import replace_file
from distilbench.settings import require

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedSplit:
    """Token ids without padding, concatenated: row i is ``tokens[offsets[i]:offsets[i + 1]]``.

    ``tokens`` (total tokens,) int32, ``offsets`` (examples + 1,) int64, ``labels`` (examples,) int64. ``types`` (total
    tokens,) int8 is 0 for the first text of a pair and 1 for the second; None for single texts, and for models without
    token types.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    types: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int) -> np.ndarray:
        """Return the token ids of one example."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class EncodedSplits:
    """The three splits as token ids; ``selection is report`` if one split serves as both."""

    train: EncodedSplit
    selection: EncodedSplit
    report: EncodedSplit
    label_names: tuple[str, ...]
    pad_token_id: int


def encode(text: TextSplits, tokenizer: Any, max_length: int, cache: Path | None) -> EncodedSplits:
    """Return the token ids of every split, truncated to ``max_length`` tokens per row, special tokens included.

    In a pair, the longer text is truncated first. Token types are returned if the tokenizer's model uses them.

    ``tokenizer`` is a fast Hugging Face tokenizer. ``cache`` is a directory for files named by a hash of everything
    that determines the tokens, or None for no cache; a damaged file is written again.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if text.report.pairs is not None:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        require(max_length >= special + 2, "train.max_length", f"{special + 2} or more for pairs", max_length)
    splits = {"train": text.train, "report": text.report}
    if text.selection is not text.report:
        splits["selection"] = text.selection
    path = cache / f"{_tokens_key(text, tokenizer, max_length)}.safetensors" if cache else Path(os.devnull)
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError):  # missing or incomplete
        arrays = _tokenize(splits, tokenizer, max_length)
        if cache:
            _store_arrays(path, arrays)
    with_types = "token_type_ids" in tokenizer.model_input_names
    encoded = {
        name: EncodedSplit(arrays[f"{name}.tokens"], arrays[f"{name}.offsets"], split.labels,
                           arrays.get(f"{name}.types") if with_types else None)
        for name, split in splits.items()
    }  # fmt: skip
    selection = encoded.get("selection", encoded["report"])
    return EncodedSplits(encoded["train"], selection, encoded["report"], text.label_names, tokenizer.pad_token_id)


def _tokenize(splits: dict[str, TextSplit], tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    """Return ``<split>.tokens`` and ``<split>.offsets`` of every split, and ``<split>.types`` for pairs."""
    arrays = {}
    for name, split in splits.items():
        rows = tokenizer(
            *map(list, split.columns),
            truncation="longest_first",
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=split.pairs is not None,
        )
        lengths = np.array([len(row) for row in rows["input_ids"]], dtype=np.int64)
        require(bool(lengths.all()), "every text", "one that the model's tokenizer gives a token",
                split.texts[int(lengths.argmin())], "delete it")  # fmt: skip
        arrays[f"{name}.tokens"] = np.fromiter(chain.from_iterable(rows["input_ids"]), np.int32, lengths.sum())
        arrays[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(lengths)])
        if split.pairs is not None:
            arrays[f"{name}.types"] = np.fromiter(chain.from_iterable(rows["token_type_ids"]), np.int8, lengths.sum())
    return arrays


def _tokens_key(text: TextSplits, tokenizer: Any, max_length: int) -> str:
    """Return a sha256 of everything that determines the tokens; the leading 3 is the version of the file layout.

    It includes the texts: the pool alone does not determine them, since another ``data.split_seed`` draws others.
    """
    import tokenizers

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # state of the last call
    texts = fingerprint(text.label_names, (text.train, text.selection, text.report))
    settings = tokenizer.truncation_side, tokenizer.split_special_tokens, tokenizer.special_tokens_map, backend
    parts = (3, tokenizers.__version__, texts, text.selection is text.report, max_length, *settings)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _store_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a cache file; only warn if that fails."""
    from safetensors.numpy import save

    try:
        with replace_file(path) as partial:
            partial.write_bytes(save(arrays))
    except OSError as error:
        log.warning("Tokens can't be cached in %s: %s", path.parent, error.strerror)


def random_part(split: EncodedSplit, examples: int, rng: np.random.Generator) -> EncodedSplit:
    """Return a random subset of ``examples`` examples of a split, in its order."""
    chosen = np.sort(rng.choice(len(split), examples, replace=False))
    lengths = np.diff(split.offsets)
    kept = np.isin(np.repeat(np.arange(len(split)), lengths), chosen)  # (total tokens,)
    offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
    types = None if split.types is None else split.types[kept]
    return EncodedSplit(split.tokens[kept], offsets, split.labels[chosen], types)
