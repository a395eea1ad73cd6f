"""Two texts an example, and the slices by which results are also reported: read, checked, counted, encoded."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbench.data.text import load_text
from distilbench.data.tokens import encode, random_part
from distilbench.settings import DataSettings, SettingsError
from tests.data.made_files import files, raw, refusal
from tests.data.test_tokens import letters

PAIRS = {"pair_column": "other", "slice_column": "source"}
ROWS = [("a b", "c", 0, "web"), ("d", "e f", 1, "book"), ("g", "h", 0, "web"), ("i", "j", 1, None)]


def pairs_file(path, rows=ROWS):
    objects = [dict(zip(("text", "other", "label", "source"), row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    else:
        mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
        path.write_text("".join(mark.join("" if v is None else str(v) for v in one) + "\n"
                                for one in [list(objects[0]), *(one.values() for one in objects)]))  # fmt: skip
    return path


def test_every_format_gives_the_same_pairs_and_slices(folder):
    paths = [pairs_file(folder / f"pairs{suffix}") for suffix in (".csv", ".tsv", ".jsonl", ".parquet")]
    loaded = [load_text(files(path, path, **PAIRS)) for path in paths]
    for splits in loaded:
        assert splits.train.texts == ("a b", "d", "g", "i")
        assert splits.train.pairs == ("c", "e f", "h", "j")
        assert splits.report.slices == ("web", "book", "web", "")
    assert len({splits.used.fingerprint for splits in loaded}) == 1


def test_the_second_text_is_part_of_the_protocol_and_the_slices_are_not(folder):
    path = pairs_file(folder / "protocol.jsonl")
    swapped = pairs_file(folder / "swapped.jsonl", [(b, a, y, s) for a, b, y, s in ROWS])
    pair, single, other = (
        load_text(files(p, p, **settings)).used.fingerprint
        for p, settings in ((path, {"pair_column": "other"}), (path, {}), (swapped, {"pair_column": "other"}))
    )
    assert len({pair, single, other}) == 3
    assert load_text(files(path, path, **PAIRS)).used.fingerprint == pair


def test_pairs_and_slices_stay_beside_their_texts_when_split_and_capped(folder):
    rows = [(f"one {i}", f"two {i}", i % 2, f"source {i}") for i in range(60)]
    splits = load_text(files(pairs_file(folder / "kept.csv", rows), selection_fraction=0.3, max_train_examples=9,
                             max_validation_examples=4, **PAIRS))  # fmt: skip
    for split in (splits.train, splits.selection, splits.report):
        numbers = [text.split()[1] for text in split.texts]
        assert [text.split()[1] for text in split.pairs] == [s.split()[1] for s in split.slices] == numbers
    assert (len(splits.train), len(splits.selection), len(splits.report)) == (9, 4, 4)


def test_a_pair_stands_in_both_splits_only_with_both_of_its_texts(folder, caplog):
    report = [("A  b", "C", 0, "x"), ("a b", "new", 1, "x"), ("new", "c", 0, "x")]
    paths = pairs_file(folder / "shared.csv"), pairs_file(folder / "shared_report.csv", report)
    assert load_text(files(*paths, pair_column="other")).shared == 1
    assert load_text(files(*paths)).shared == 2
    assert "texts reported on that the training text holds too: 1 of 3, of" in caplog.text


def test_either_text_of_a_pair_makes_it_a_near_duplicate(folder, caplog):
    rows = [(f"{i} {i}", f"{word} the same five words here", i % 2, "x") for i, word in enumerate("abcdefgh")]
    path = pairs_file(folder / "near_pairs.csv", rows)
    load_text(files(path, path, report_fraction=0.5, pair_column="other"))
    assert "4 texts held out of train to report on, 4 with a run of 5 words" in caplog.text


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("  ", "the second text is missing"),
        (None, "the second text is missing"),
        (7, "the second text must be a string"),
    ],
)
def test_a_second_text_that_is_none_is_refused_with_its_place(folder, second, words):
    path = pairs_file(folder / "second.jsonl", [*ROWS, ("k", second, 1, "web")])
    assert f"second.jsonl line 5: {words}" in refusal(files(path, path, **PAIRS))


def test_a_column_that_is_not_there_is_refused_by_its_setting(folder):
    path = pairs_file(folder / "columns.csv")
    assert "set data.pair_column=..." in refusal(files(path, pair_column="second"))
    assert "set data.slice_column=..." in refusal(files(path, slice_column="origin"))
    with pytest.raises(SettingsError, match=r"data.pair_column must be null with data.source=tweets"):
        DataSettings(source="tweets", pair_column="other")


@pytest.mark.parametrize("taken", [{"pair_column": "text"}, {"label_column": "text"}])
def test_a_column_that_is_named_twice_is_refused(folder, taken):
    with pytest.raises(SettingsError, match=r"data.label_column must be columns of their own, got 'text, .*text"):
        files(pairs_file(folder / "twice.csv"), **{"text_column": "text", "label_column": "label", **taken})


@pytest.mark.parametrize(
    ("name", "content"),
    [("ratings.csv", "text,label\na,5.000\nb,3.8\n"), ("ratings.jsonl", '{"text": "a", "label": 3.8}\n')],
)
def test_ratings_are_refused_as_a_target_for_regression(folder, name, content):
    assert "are a target for regression, which is not offered" in refusal(raw(folder / name, content))


def paired_letters():
    """The tokenizer of single characters, with a second text as BERT has it."""
    from tokenizers import processors

    tokenizer = deepcopy(letters())
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def letters_of(row: np.ndarray) -> str:
    return "".join({2: "[", 3: "]"}.get(token, chr(token - 4 + ord("a"))) for token in row.tolist())


@pytest.fixture
def long_and_short(folder):
    rows = [("abcdefgh", "xy", 0, "s"), ("ab", "uvwxyz", 1, "s"), ("abcdef", "uvwxyz", 0, "s")]
    path = pairs_file(folder / "long.csv", rows)
    return load_text(files(path, path, pair_column="other"))


def test_a_pair_is_one_row_and_its_longer_text_is_cut_first(long_and_short, tmp_path):
    for _ in range(2):  # the second time from the cache
        train = encode(long_and_short, paired_letters(), 9, tmp_path).train
        assert [letters_of(train.row(i)) for i in range(3)] == ["[abcd]xy]", "[ab]uvwx]", "[abc]uvw]"]
        assert train.types.tolist() == [0] * 6 + [1] * 3 + [0] * 4 + [1] * 5 + [0] * 5 + [1] * 4
        part = random_part(train, 2, np.random.default_rng(0))
        assert [letters_of(part.row(i)) for i in range(2)] == ["[ab]uvwx]", "[abc]uvw]"]
        assert part.types.tolist() == [0] * 4 + [1] * 5 + [0] * 5 + [1] * 4


def test_a_model_without_token_types_gets_none(long_and_short):
    tokenizer = paired_letters()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert encode(long_and_short, tokenizer, 9, None).train.types is None


def test_a_length_without_room_for_two_texts_is_refused(long_and_short):
    with pytest.raises(SettingsError, match=r"train.max_length must be 5 or more for pairs, got 4"):
        encode(long_and_short, paired_letters(), 4, None)
