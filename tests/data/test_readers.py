"""Text as each source has it: every format of a file, and the hub; what can't be read is refused in one line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from distilbench.data import readers as corpora
from distilbench.data.text import load_text
from distilbench.settings import DataSettings, SettingsError
from tests.data.made_files import FORMATS, files, numbered, raw, refusal, texts, write


@examples(max_examples=60)
@given(rows=st.lists(texts, min_size=4, max_size=12), strings=st.booleans())
def test_every_format_gives_the_same_texts_and_fingerprint(folder, rows, strings):
    labels = [("no", "yes")[i % 2] if strings else i % 2 for i in range(len(rows))]
    rows = [text.translate({ord(c): " " for c in "\t\r\n"}) for text in rows]  # which no TSV can hold
    pairs = list(zip(rows, labels, strict=True))
    loaded = [load_text(files(path, path)) for path in (write(folder / f"same{suffix}", pairs) for suffix in FORMATS)]
    for splits in loaded:
        assert splits.train.texts == tuple(rows)
        assert splits.train.labels.tolist() == [i % 2 for i in range(len(rows))]
        assert splits.train.labels.dtype == np.int64
    assert len({splits.used.fingerprint for splits in loaded}) == 1


def test_fingerprint_tells_texts_labels_and_names_apart(folder):
    rows = [("ab", 0), ("c", 1), ("d", 0)]
    variants = [rows, [("a", 0), ("bc", 1), ("d", 0)], [("ab", 1), ("c", 0), ("d", 0)], rows[::-1]]
    paths = [write(folder / f"variant{i}.csv", variant) for i, variant in enumerate(variants)]
    prints = {load_text(files(path, path)).used.fingerprint for path in paths}
    prints.add(load_text(files(paths[0], paths[0], label_names=["no", "yes"])).used.fingerprint)
    assert len(prints) == 5


def test_a_byte_order_mark_and_windows_line_ends_are_tolerated(folder):
    settings = raw(folder / "bom.csv", "\ufefftext,label\r\ngood,1\r\nbad,0\r\n\r\n".encode())
    splits = load_text(replace(settings, validation=settings.train))
    assert splits.train.texts == ("good", "bad")
    assert splits.label_names == ("0", "1")


def test_trailing_blanks_of_a_sentence_stay(folder):
    path = write(folder / "blanks.tsv", [("fine ", 1), (" poor", 0)])
    assert load_text(files(path, path)).train.texts == ("fine ", " poor")


def test_numeric_labels_without_names_keep_their_order(folder):
    path = write(folder / "ten.jsonl", [("a", 10), ("b", 9), ("c", -1)])
    splits = load_text(files(path, path))
    assert splits.label_names == ("-1", "9", "10")
    assert splits.train.labels.tolist() == [2, 1, 0]


def test_declared_names_are_matched_by_name_and_then_by_number(folder):
    by_name = write(folder / "by_name.csv", [("a", "bad"), ("b", "good")])
    by_number = write(folder / "by_number.csv", [("a", 1), ("b", 0)])
    names = ["good", "bad"]
    first, second = (load_text(files(path, path, label_names=names)) for path in (by_name, by_number))
    assert first.train.labels.tolist() == second.train.labels.tolist() == [1, 0]
    assert first.used.fingerprint == second.used.fingerprint


def test_names_that_look_like_numbers_are_read_one_way_for_all_rows(folder):
    train = write(folder / "train_012.csv", [("a", 0), ("b", 1), ("c", 2)])
    validation = write(folder / "validation_12.csv", [("d", 1), ("e", 2)])
    splits = load_text(files(train, validation, label_names=["1", "2", "3"]))
    assert splits.train.labels.tolist() == [0, 1, 2]
    assert splits.report.labels.tolist() == [1, 2]


def test_dictionary_encoded_parquet_is_read(folder):
    table = pa.table(
        {"text": pa.array(["a", "b"]).dictionary_encode(), "label": pa.array(["x", "y"], pa.large_string())}
    )
    pq.write_table(table, folder / "dictionary.parquet")
    assert load_text(files(folder / "dictionary.parquet", folder / "dictionary.parquet")).label_names == ("x", "y")


BROKEN = [
    (".csv", "text,label\na,0\nb,1,2\n", "line 3 must have 2 fields like the header, got 3"),
    (".csv", 'text,label\n"two\nlines",0\n"open,1\nc,0\n', "line 4: unexpected end of data"),
    (".csv", "text,label\na,0\n  ,1\n", "line 3: the text is missing; write one or delete the row"),
    (".tsv", "text\tlabel\na\t0\nb\t \n", "line 3: the label is missing"),
    (".csv", "text,label\r\na,0\r\n\r\nb\xe9,1\r\n".encode("latin-1"), "line 4 is not UTF-8 (byte 0xe9)"),
    (".csv", "text,label\na,0\n".encode("utf-16"), "line 1 is not UTF-8 (byte 0xff)"),
    (".csv", "sentence,label,id\na,0,1\n", "column 'text' is not there, columns are 'sentence', 'label', 'id'; "
     "set data.text_column=..."),
    (".csv", "text,label,text\na,0,1\n", "column 'text' occurs 2 times"),
    (".csv", "", "must begin with a header line, got an empty file"),
    (".csv", "text,label\n", "must be a file of one example or more, got 0"),
    (".csv", "text,label\na,0\nb,0\n", "must be text of 2 classes or more, got ['0']"),
    (".jsonl", '{"text": "a", "label": 0}\n\n{"text": "b", label: 1}\n', "line 3 is not valid JSON"),
    (".jsonl", '{"text": "a", "label": 0}\n["b", 1]\n', "line 2 must be a JSON object, got ['b', 1]"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": "b"}\n', "line 2: column 'label' is not there, columns are 'text'"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": null, "label": 1}\n', "line 2: the text is missing"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": NaN, "label": 1}\n', "line 2: the text is missing"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": 0.5, "label": 1}\n', "a string, got 0.5; write it as one"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": null}\n', "line 2: the label is missing"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": 5, "label": 1}\n', "line 2: the text must be a string, got 5"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": [1]}\n', "integer or a string, got [1]"),
    (".jsonl", '{"text": "a", "label": 0}\n{"text": "\\ud800", "label": 1}\n', "line 2 must be whole characters"),
    (".jsonl", "[" * 100_000, "line 1 is not valid JSON"),
    (".jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", "line 1 is not valid JSON"),
    (".json", '{"text": "a", "label": 0}', "must be a JSON list of objects, got {'text': 'a'"),
    (".json", '[{"text": "a", "label": 0}, 7]', "record 2 must be a JSON object, got 7"),
    (".json", "[", "is not valid JSON"),
    (".csv.gz", "text,label\na,0\n", "is not a readable gzip file"),
    (".csv.gz", gzip.compress(b"text,label\na,0\nb,1\n" * 99)[:-20], "is not a readable gzip file"),
    (".tsv", "text\tlabel\n\"a\tb\"\t0\nc\t1\td\n", "got 3; fields must not hold tabs"),
    (".csv", "text,label\na,3.7\nb,2.0\n", "must be text with classes for labels, got '3.7'"),
    (".jsonl", '{"text": "a", "label": 0.5}\n', "must be text with classes for labels, got '0.5'; numbers with "
     "fractions are a target for regression, which is not offered: make classes of them"),
    (".parquet", b"PAR1 is how it begins", "is not a readable Parquet file"),
    (".txt", "a 0\n", "must be a file that ends in .csv, .tsv, .jsonl, .json, .parquet, .csv.gz"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "content", "words"), BROKEN, ids=[words[:40] for _, _, words in BROKEN])
def test_a_broken_file_is_refused_with_place_and_remedy(folder, suffix, content, words):
    message = refusal(raw(folder / f"broken{suffix}", content))
    assert message.startswith("data.train")
    assert f"broken{suffix}" in message
    assert words in message


def test_a_document_longer_than_the_csv_readers_default_is_read(folder):
    long = "word " * 40_000
    settings = raw(folder / "long.csv", f"text,label\n{long},1\nshort,0\n")
    assert load_text(replace(settings, validation=settings.train)).train.texts[0] == long


@pytest.mark.parametrize("line", ['"quoted, he said', 'he said "so', '"The deal is done," he said.', '"', 'a "b" c'])
def test_stray_quotes_of_a_tsv_are_text_and_swallow_no_row(folder, line):
    settings = raw(folder / "stray.tsv", "text\tlabel\n" + "".join(f"{line} {i}\t{i % 2}\n" for i in range(6)))
    splits = load_text(replace(settings, validation=settings.train))
    assert splits.train.texts == tuple(f"{line} {i}" for i in range(6))


def test_a_line_of_a_tsv_that_is_quoted_throughout_is_unquoted(folder):
    settings = raw(folder / "quoted.tsv", 'text\tlabel\n"say ""no"" now"\t0\r\n"a\tb"\t1\r\n')
    assert load_text(replace(settings, validation=settings.train)).train.texts == ('say "no" now', "a\tb")


def test_rows_that_an_open_quote_swallowed_are_told_with_their_lines(folder, caplog):
    lines = [f"text {i},{i % 2}" for i in range(20)]
    lines[4], lines[11] = '"open 4,0', '11",1'
    settings = raw(folder / "open.csv", "text,label\n" + "\n".join(lines) + "\n")
    splits = load_text(replace(settings, validation=settings.train))
    assert len(splits.train) == 13
    assert "1 row over several lines (lines 6 to 13)" in caplog.text


@pytest.mark.parametrize(
    "pair", [("Positive", "positive"), ("good one", "good  one"), ("1", "1.0"), ("caf\u00e9", "cafe\u0301")]
)
def test_labels_that_differ_little_are_warned_of(folder, caplog, pair):
    settings = raw(folder / "alike.csv", "text,label\n" + "".join(f"t{i},{pair[i % 2]}\n" for i in range(4)))
    assert load_text(replace(settings, validation=settings.train)).label_names == tuple(sorted(pair))
    assert "labels that differ little" in caplog.text
    assert all(repr(label) in caplog.text for label in pair)


def test_texts_of_train_that_are_reported_on_are_counted(folder, caplog):
    train = write(folder / "train_shared.csv", [("Good  film", 1), ("bad", 0), ("fine", 1)])
    report = write(folder / "report_shared.csv", [("good film", 1), ("awful", 0), ("BAD", 0)])
    splits = load_text(files(train, report))
    assert splits.shared == 2
    assert splits.label_counts(splits.train) == {"0": 1, "1": 2}
    assert "texts reported on that the training text holds too: 2 of 3, of " in caplog.text


def test_booleans_are_labels_spelt_the_same_in_every_format(folder):
    paths = [write(folder / f"bool{ending}", [(f"text {i}", i % 2 == 0) for i in range(4)]) for ending in FORMATS]
    loaded = [load_text(files(path, path)) for path in paths]
    assert {splits.label_names for splits in loaded} == {("False", "True")}
    assert len({splits.used.fingerprint for splits in loaded}) == 1


def test_a_null_in_parquet_is_refused_with_its_row(folder):
    path = write(folder / "null.parquet", [("a", 0), (None, 1)])
    assert "null.parquet row 2: the text is missing" in refusal(files(path))


def test_bytes_that_are_not_utf8_in_parquet_are_refused_with_their_row(folder):
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": column, "label": [0, 1]}), folder / "bytes.parquet")
    assert "bytes.parquet row 2 is not UTF-8" in refusal(files(folder / "bytes.parquet"))


def test_whole_floats_in_parquet_are_labels_as_in_csv_and_a_missing_one_is_refused(folder):
    table = pa.table({"text": ["a", "b"] * 20, "label": [0.0, 1.0] * 20})
    pq.write_table(table, folder / "floats.parquet")
    pyarrow.csv.write_csv(pa.table({"text": table["text"], "label": ["0.0", "1.0"] * 20}), folder / "floats.csv")
    loaded = [load_text(files(folder / name)) for name in ("floats.parquet", "floats.csv")]
    assert loaded[0].used.fingerprint == loaded[1].used.fingerprint
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0.0, float("nan")]}), folder / "gap.parquet")
    assert "row 2: the label is missing" in refusal(files(folder / "gap.parquet"))


def test_a_validation_label_that_train_lacks_is_refused_with_its_line(folder):
    train, validation = write(folder / "t.csv", numbered(4)), write(folder / "v.csv", [("a", 1), ("b", 2)])
    message = refusal(files(train, validation))
    assert message.startswith("data.validation=")
    assert "v.csv line 3: the label must be one of '0', '1', got '2'" in message


def test_a_label_outside_the_declared_ones_is_refused(folder):
    path = write(folder / "neutral.csv", [("a", "bad"), ("b", "good"), ("c", "neutral")])
    message = refusal(files(path, label_names=["bad", "good"]))
    assert "line 4: the label must be one of 'bad', 'good', or all labels their numbers 0..1" in message
    assert "got 'neutral'" in message


def test_a_declared_class_absent_from_train_is_refused(folder):
    path = write(folder / "absent.csv", [("a", "bad"), ("b", "good"), ("c", "bad"), ("d", "good")])
    message = refusal(files(path, label_names=["bad", "good", "mixed"]))
    assert "must be text with examples of each class, 'mixed' too" in message


def test_too_few_examples_of_a_class_to_split_are_refused(folder):
    path = write(folder / "few.csv", [("a", 0), ("b", 0), ("c", 1)])
    assert "2 examples or more of each class, '1' too, got 1; add examples, or give" in refusal(files(path))
    assert "data.selection_fraction=0.5 must be a share of 2" in refusal(files(path, path, selection_fraction=0.5))


def test_a_file_that_went_away_is_refused(folder):
    settings = raw(folder / "gone.csv", "text,label\n")
    (folder / "gone.csv").unlink()
    assert "gone.csv can't be read: No such file or directory" in refusal(settings)


def loads_or_refuses(settings: DataSettings) -> None:
    """Anything but a SettingsError of one printable line fails the test."""
    message = "loaded"
    try:
        load_text(settings)
    except SettingsError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert message.encode()


@examples(max_examples=150)
@given(suffix=st.sampled_from(FORMATS), content=st.binary(max_size=200))
def test_arbitrary_bytes_load_or_are_refused_in_one_line(folder, suffix, content):
    loads_or_refuses(raw(folder / f"bytes{suffix}", content))


@examples(max_examples=250)
@given(suffix=st.sampled_from(FORMATS), draw=st.data())
def test_a_damaged_file_loads_or_is_refused_in_one_line(folder, suffix, draw):
    whole = write(folder / f"damaged{suffix}", numbered(8)).read_bytes()
    start = draw.draw(st.integers(0, len(whole)))
    end = draw.draw(st.integers(start, len(whole)))
    content = whole[:start] + draw.draw(st.binary(max_size=8)) + whole[end:]
    loads_or_refuses(raw(folder / f"damaged{suffix}", content))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)


@examples(max_examples=150)
@given(rows=st.lists(st.tuples(json_values, json_values), max_size=6), names=st.none() | st.just(["0", "a"]))
def test_arbitrary_values_load_or_are_refused_in_one_line(folder, rows, names):
    content = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    loads_or_refuses(raw(folder / "values.jsonl", content, label_names=names))


REVISION = "0123456789abcdef" * 2 + "01234567"


HUB = DataSettings(
    source="hub",
    hub_name="someone/reviews",
    train="train",
    validation="validation",
    text_column="sentence",
    label_column="label",
    fallback=DataSettings(source="synthetic"),
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return ``hub(train, validation)``: a hub that holds one data set with ClassLabel features and a commit."""
    import datasets

    real = datasets.load_dataset_builder

    def publish(train, validation, names=("negative", "positive")):
        features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
        paths = {}
        for split, rows in (("train", train), ("validation", validation)):
            columns = {"sentence": [text for text, _ in rows], "label": [label for _, label in rows]}
            paths[split] = str(tmp_path / f"{split}.parquet")
            datasets.Dataset.from_dict(columns, features=features).to_parquet(paths[split])

        def load(address, config, revision):
            assert (address, config, revision) == ("hf://datasets/someone/reviews", None, None)
            builder = real("parquet", data_files=paths, cache_dir=str(tmp_path / "cache"))
            builder.repo_id, builder.hash = "someone/reviews", REVISION
            return builder

        monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset_builder", load)

    return publish


def failing(monkeypatch, reachable: bool, error: Exception) -> None:
    import datasets

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(corpora, "hub_reachable", lambda: reachable)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)


def test_a_hub_data_set_brings_its_label_names_and_its_commit(hub):
    hub([("good ", 1), ("bad ", 0)], [("fine ", 1)])
    splits = load_text(HUB)
    assert splits.train.texts == ("good ", "bad ")
    assert splits.train.labels.tolist() == [1, 0]
    assert splits.label_names == ("negative", "positive")
    assert (splits.used.kind, splits.used.name, splits.used.revision) == ("hub", "someone/reviews", REVISION)
    assert splits.used.fallback_for is None


def test_hub_rows_without_label_or_sentence_are_dropped_and_counted(hub):
    hub([("good", 1), ("?", -1), (" ", 0), ("bad", 0)], [("fine", 1), (" ", -1)])
    splits = load_text(HUB)
    assert splits.train.texts == ("good", "bad")
    assert splits.report.texts == ("fine",)
    assert splits.dropped == {"unlabelled": 2, "blank": 1}


def test_a_hub_split_without_any_label_is_refused(hub):
    hub([("good", 1), ("bad", 0)], [("a", -1), ("b", -1)])
    message = refusal(HUB)
    assert (
        "data.validation=validation of someone/reviews must hold labelled sentences, got 2 without a label and 0 blank"
        in message
    )
    assert "data.validation=..." in message


def test_names_given_for_hub_labels_reorder_or_rename_them(hub):
    hub([("good", 1), ("bad", 0)], [("fine", 1)])
    assert load_text(replace(HUB, label_names=["positive", "negative"])).train.labels.tolist() == [0, 1]
    assert load_text(replace(HUB, label_names=["bad", "good"])).train.labels.tolist() == [1, 0]


def test_missing_columns_and_splits_of_a_hub_data_set_are_listed(hub):
    hub([("good", 1), ("bad", 0)], [("fine", 1)])
    assert "column 'text' is not there, columns are 'sentence', 'label'" in refusal(replace(HUB, text_column="text"))
    message = refusal(replace(HUB, validation="test"))
    assert message == "data.validation must be a split of someone/reviews (train, validation), got 'test'"


def test_a_hub_data_set_without_validation_is_split(hub):
    hub(numbered(20), [("fine", 1)])
    splits = load_text(replace(HUB, validation=None, validation_fraction=0.2))
    assert (len(splits.train), len(splits.report)) == (16, 4)


def test_a_hub_out_of_reach_falls_back_with_the_original_caps(monkeypatch, caplog):
    failing(monkeypatch, False, ConnectionError("Couldn't reach the Hugging Face Hub"))
    asked = replace(HUB, max_train_examples=100, max_validation_examples=10, selection_fraction=0.5, split_seed=7)
    splits = load_text(asked)
    assert (len(splits.train), len(splits.selection), len(splits.report)) == (100, 10, 10)
    assert (splits.used.kind, splits.used.fallback_for) == ("synthetic", "someone/reviews")
    assert "FALLBACK for someone/reviews" in splits.used.describe()
    assert "using synthetic sentences instead" in caplog.text
    assert splits.used.fingerprint != load_text(replace(asked, split_seed=8)).used.fingerprint


def test_no_fallback_refuses_in_one_line(monkeypatch):
    failing(monkeypatch, False, FileNotFoundError("not cached"))
    message = refusal(replace(HUB, fallback=None))
    assert message.startswith("data.hub_name=someone/reviews must be on a hub that can be reached")
    assert "data=files" in message


def test_another_commit_in_the_cache_does_not_stand_in_for_the_one_asked_for(hub, monkeypatch):
    import datasets

    hub([("good", 1), ("bad", 0)], [("fine", 1)])
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda address, config, revision: load(address, config, None))
    monkeypatch.setattr(corpora, "hub_reachable", lambda: False)
    assert load_text(replace(HUB, revision=REVISION)).used.kind == "hub"
    assert load_text(replace(HUB, revision="v1.0")).used.kind == "hub"
    assert load_text(replace(HUB, revision="f" * 40)).used.fallback_for == "someone/reviews"


def test_a_hub_that_has_no_such_data_set_is_an_error_and_no_fallback(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    failing(monkeypatch, True, DatasetNotFoundError("Dataset 'someone/reviews' doesn't exist on the Hub.\nSee ..."))
    message = refusal(HUB)
    assert "data.hub_name=someone/reviews can't be loaded: Dataset 'someone/reviews' doesn't exist" in message


def test_the_name_of_a_file_reader_is_no_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("sentence,label\na,0\nb,1\n")
    assert "csv is a file format, no data set" in refusal(replace(HUB, hub_name="csv"))


def test_a_path_is_no_hub_data_set_that_a_fallback_could_stand_in_for(monkeypatch):
    monkeypatch.setattr(corpora, "hub_reachable", lambda: False)
    for name in ("/data/reviews", "./reviews", "~/reviews", "a/b/c", "https://example.org/a/b"):
        message = refusal(replace(HUB, hub_name=name, fallback=DataSettings("tweets")))
        assert message == (f"data.hub_name must be a hub id such as owner/name, got {name!r}; files are given as: "
                           "data=files data.train=<file>")  # fmt: skip
