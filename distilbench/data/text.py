"""Check, split and cap the text of a source: the result is one :class:`TextSplits`.

Errors in the text raise a one-line :class:`SettingsError` that names the location.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbench.cli import pluralize
from distilbench.data.formats import list_reprs
from distilbench.data.readers import SOURCES, Corpus, hub_title
from distilbench.identity import SourceUsed
from distilbench.settings import DataSettings, SettingsError, require

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

RUN_OF_WORDS = 5
"""Two texts that share this many consecutive words count as near-duplicates. SST-2's training phrases are parts of the
same sentences: if a tenth is held out, 64 % of it share such a run with the rest; of the validation split, 13 % do."""


@dataclass(frozen=True)
class TextSplit:
    """Texts with their labels: ``texts`` (examples), ``labels`` (examples,) int64 in 0..labels-1.

    ``pairs`` (examples) are the second texts, ``slices`` (examples) the groups for which results are also reported;
    each may be None.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    pairs: tuple[str, ...] | None = None
    slices: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """The model's input: the texts and, if there are pairs, the second texts."""
        return [self.texts] if self.pairs is None else [self.texts, self.pairs]

    def normalized(self) -> Iterator[tuple[str, ...]]:
        """Yield the input texts of each example with case and spacing normalised."""
        return zip(*([_normalize(text) for text in column] for column in self.columns), strict=True)

    def take(self, indices: np.ndarray) -> TextSplit:
        """Return the examples at ``indices`` (examples,), in that order."""
        texts, pairs, slices = (
            None if column is None else tuple(column[i] for i in indices)
            for column in (self.texts, self.pairs, self.slices)
        )
        return TextSplit(texts or (), self.labels[indices], pairs, slices)


@dataclass(frozen=True)
class TextSplits:
    """The splits of a source. ``selection`` is the same object as ``report`` if one split serves as both.

    ``dropped`` counts the dropped rows by reason; ``shared`` counts the examples of the report split whose text is also
    in ``train``, ignoring case and spacing.
    """

    train: TextSplit
    selection: TextSplit
    report: TextSplit
    label_names: tuple[str, ...]
    used: SourceUsed
    dropped: dict[str, int] = field(default_factory=dict)
    shared: int = 0

    def label_counts(self, split: TextSplit) -> dict[str, int]:
        """Return the number of examples of a split by label name."""
        counts = np.bincount(split.labels, minlength=len(self.label_names))
        return dict(zip(self.label_names, counts.tolist(), strict=True))


def load_text(settings: DataSettings) -> TextSplits:
    """Return the checked texts and labels, split and capped.

    The report split is the validation split or, without one, ``validation_fraction`` of train. With
    ``selection_fraction``, that part of train becomes the selection split. With ``report_fraction``, that part of train
    becomes the report split, and the former one the selection split. The rest of train is the pool; the first
    ``max_train_examples`` of one stratified order of it are trained on, so that fewer are a subset of more.
    ``max_validation_examples`` caps selection and report each. Draws depend only on ``split_seed`` and keep the order
    of the source. The fingerprint in ``used`` is that of the pool, the selection split and the report split.

    If the hub is unreachable and nothing is cached, reads ``fallback`` with the caps, ``selection_fraction``,
    ``report_fraction`` and ``split_seed`` of ``settings``. Raises :class:`SettingsError` for invalid text.
    """
    corpus = SOURCES[settings.source](settings)
    if corpus is None:
        return _fall_back(settings)
    train, report, names = _labelled_splits(corpus)
    if report is None:
        train, report = _hold_out(train, "validation", settings, names)
    selection = None
    if settings.report_fraction:
        selection = _limit_examples(report, "selection", settings)
        train, report = _hold_out(train, "report", settings, names)
    report = _limit_examples(report, "report", settings)
    if settings.selection_fraction:
        train, selection = _hold_out(train, "selection", settings, names)
        selection = _limit_examples(selection, "selection", settings)
    selection = report if selection is None else selection
    pool = fingerprint(names, (train, selection, report))
    train = _limit_examples(train, "train", settings)
    used = SourceUsed(settings.source, corpus.name, pool, corpus.revision)
    known = set(train.normalized())
    shared = sum(example in known for example in report.normalized())
    if shared:
        log.warning("texts reported on that the training text holds too: %s of %s, of %s",
                    f"{shared:,}", f"{len(report):,}", corpus.name)  # fmt: skip
    if settings.report_fraction:
        alike = _count_near_duplicates(train, report)
        log.warning("%s held out of train to report on, %s with a run of %d words that is trained on too; the more "
                    "of these, the more the figures flatter new text",
                    pluralize(len(report), "text"), f"{alike:,}", RUN_OF_WORDS)  # fmt: skip
    return TextSplits(train, selection, report, names, used, corpus.dropped, shared)


def _count_near_duplicates(train: TextSplit, report: TextSplit) -> int:
    """Count the examples of ``report`` that share a run of words, or a whole shorter text, with one of ``train``.

    In a pair, one such text is enough.
    """

    def word_ngrams(example: tuple[str, ...]) -> set[tuple[str, ...]]:
        texts = [text.split() for text in example]
        return {
            tuple(words[i : i + RUN_OF_WORDS]) for words in texts for i in range(max(1, len(words) - RUN_OF_WORDS + 1))
        }

    seen = set().union(*map(word_ngrams, train.normalized()))
    return sum(not seen.isdisjoint(word_ngrams(example)) for example in report.normalized())


def _normalize_label(name: str) -> str:
    return re.sub(r"\.0+$", "", _normalize(name))


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def _fall_back(settings: DataSettings) -> TextSplits:
    """Read ``settings.fallback`` instead of the unreachable hub."""
    asked = hub_title(settings)
    if settings.fallback is None:
        raise SettingsError(
            f"data.hub_name={asked} must be on a hub that can be reached or in the local cache, got neither; "
            "connect once, use data=files with a copy of it, or allow a stand-in with data.fallback"
        )
    kept = ("max_train_examples", "max_validation_examples", "selection_fraction", "report_fraction", "split_seed")
    splits = load_text(replace(settings.fallback, **{name: getattr(settings, name) for name in kept}))
    log.warning("The hub can't be reached and %s is not cached: using %s instead", asked, splits.used.name)
    return replace(splits, used=replace(splits.used, fallback_for=asked))


def _labelled_splits(corpus: Corpus) -> tuple[TextSplit, TextSplit | None, tuple[str, ...]]:
    """Return train, validation (or None) and the label names, with every example checked.

    Labels are read as names, or all as numbers if they don't all match declared names: with names 1, 2, 3 and data
    0, 1, 2, deciding label by label would mix the two readings.
    """
    rows = [_check_rows(part) for part in (corpus.train, corpus.validation) if part is not None]
    title, declared = str(corpus.train.index.name), corpus.label_names is not None
    names = corpus.label_names or _find_label_names(rows[0]["label"], title)
    numbers, by_number = ({key(i): i for i in range(len(names))} for key in (names.__getitem__, str))
    written = set().union(*(part["label"] for part in rows))
    if declared and not written <= numbers.keys() and written <= by_number.keys():
        numbers = by_number
    allowed = f"one of {list_reprs(names)}" + (f", or all labels their numbers 0..{len(names) - 1}" if declared else "")
    for part in rows if written - numbers.keys() else ():
        for place, label in part["label"].items():
            require(label in numbers, f"{place}: the label", allowed, label, "mend it or data.label_names")
    train, *others = (
        TextSplit(
            tuple(part["text"]),
            part["label"].map(numbers).to_numpy(np.int64),
            tuple(part["pair"]) if "pair" in part else None,
            tuple(part["slice"]) if "slice" in part else None,
        )
        for part in rows
    )
    require(len(names) >= 2, title, "text of 2 classes or more", list(names), "check the label column")
    absent = [name for i, name in enumerate(names) if i not in train.labels]
    require(not absent, title, f"text with examples of each class, {list_reprs(absent)} too", "none",
            "add some, or set data.label_names to the classes that there are")  # fmt: skip
    return train, next(iter(others), None), names


def _check_rows(rows: DataFrame) -> DataFrame:
    """Return texts unchanged, and labels and slices as stripped strings.

    Thus 1 in Parquet and "1" in CSV are the same label. A missing slice becomes the slice "".
    """
    return rows.assign(**{
        str(part): [_to_text(str(part), *one) for one in zip(rows[part].tolist(), rows.index, strict=True)]
        for part in rows
    })  # fmt: skip


def _to_text(part: str, value: Any, place: Any) -> str:
    if part == "slice":
        return "" if value is None else str(value).strip()
    name = "second text" if part == "pair" else part
    if value is None or value != value or not str(value).strip():
        raise SettingsError(f"{place}: the {name} is missing; write one or delete the row")
    if part == "label" and isinstance(value, (int, float, str)):  # spelled as a CSV file spells True and 1.0
        return str(value).strip()
    allowed = "an integer or a string" if part == "label" else "a string"
    require(part != "label" and isinstance(value, str), f"{place}: the {name}", allowed, value, "write it as one")
    return str(value)


def _find_label_names(labels: Iterable[str], title: str) -> tuple[str, ...]:
    """Return the label names found in the data: integers in numerical order, anything else in alphabetical order.

    Raises :class:`SettingsError` for numbers with fractions, which are ratings, not classes; warns of similar labels.
    """
    names = sorted(set(labels))
    fraction = next((name for name in names if re.fullmatch(r"-?\d*\.\d*[1-9]\d*", name)), None)
    require(fraction is None, title, "text with classes for labels", fraction,
            "numbers with fractions are a target for regression, which is not offered: make classes of them, or name "
            "them all in data.label_names")  # fmt: skip
    for _, alike in groupby(sorted(names, key=_normalize_label), key=_normalize_label):
        if len(same := list(alike)) > 1:
            log.warning("%s has labels that differ little, and counts them as different classes: %s",
                        title, list_reprs(same))  # fmt: skip
    numeric = all(re.fullmatch("0|-?[1-9][0-9]{0,17}", name) for name in names)
    return tuple(sorted(names, key=int) if numeric else names)


def _hold_out(
    split: TextSplit, part: str, settings: DataSettings, names: tuple[str, ...]
) -> tuple[TextSplit, TextSplit]:
    """Split off about ``<part>_fraction`` of each class, never none or all of it; return the rest and the part."""
    fraction, counts = getattr(settings, f"{part}_fraction"), np.bincount(split.labels, minlength=len(names))
    remedy = "add examples" + (", or give data.validation" if part == "validation" else "")
    fewest = int(counts.argmin())
    require(counts[fewest] >= 2, f"data.{part}_fraction={fraction:g}",
            f"a share of 2 examples or more of each class, {names[fewest]!r} too",
            int(counts[fewest]), remedy)  # fmt: skip
    target = counts * fraction
    shares, high = (np.clip(bound, 1, counts - 1).astype(int) for bound in (np.floor(target), np.ceil(target)))
    open_to_more = np.flatnonzero(high > shares)
    by_remainder = open_to_more[np.argsort((shares - target)[open_to_more], kind="stable")]
    shares[by_remainder[: max(0, round(target.sum()) - shares.sum())]] += 1
    drawn = [own[:share] for own, share in zip(_shuffle_by_class(split.labels, settings, part), shares, strict=True)]
    taken = np.sort(np.concatenate(drawn))
    return split.take(np.setdiff1d(np.arange(len(split)), taken)), split.take(taken)


def _limit_examples(split: TextSplit, part: str, settings: DataSettings) -> TextSplit:
    """Return at most ``max_..._examples`` of ``split``, at least one of each class; fewer are a subset of more."""
    setting = "max_train_examples" if part == "train" else "max_validation_examples"
    most = getattr(settings, setting)
    if most is None or most >= len(split):
        return split
    classes = len(np.unique(split.labels))
    require(most >= classes, f"data.{setting}", f"{classes} or more to keep an example of each class", most)
    shuffled = _shuffle_by_class(split.labels, settings, part)
    ranks = [(np.arange(len(own)) + 0.5) / len(own) for own in shuffled]  # spread evenly, as Sainte-Lague seats parties
    for rank in ranks:
        rank[0] = 0.0
    order = np.concatenate(shuffled)[np.argsort(np.concatenate(ranks), kind="stable")]
    return split.take(np.sort(order[:most]))


def _shuffle_by_class(labels: np.ndarray, settings: DataSettings, part: str) -> list[np.ndarray]:
    """Return the indices of each class that occurs, in random order.

    Uses RandomState, because numpy guarantees its stream, but not Generator's. Each part has its own stream, so that
    a cap on one split does not change another.
    """
    words = f"{part} {settings.split_seed}".encode()
    state = np.random.RandomState(int.from_bytes(hashlib.sha256(words).digest()[:4], "big"))
    return [state.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def fingerprint(names: tuple[str, ...], splits: tuple[TextSplit, ...]) -> str:
    """Return the sha256 of label names, texts and labels in order; it includes lengths, to be unambiguous."""
    sha = hashlib.sha256(json.dumps(names).encode())
    for split in splits:
        for column in split.columns:
            texts = [text.encode() for text in column]
            sha.update(np.array([len(texts), *map(len, texts)], dtype="<i8").tobytes())
            sha.update(b"".join(texts))
        sha.update(split.labels.astype("<i8").tobytes())
    return sha.hexdigest()
