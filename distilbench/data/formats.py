"""The rows of a file in every format that is read, one after the other: text to train on, and text to predict."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilbench.cli import counted
from distilbench.data.hub import first_line
from distilbench.settings import SettingsError, require

log = logging.getLogger(__name__)

PART = 4096
"""Rows that are read at once; texts that are predicted and written at once."""

TEXTS = ("data.text_column", "data.pair_column")
"""Settings of the columns that a model reads."""

NO_REGRESSION = "numbers with fractions are a target for regression, which is not offered: make classes of them"

Columns = Mapping[str, str]
"""The column by the setting that names it, such as ``data.text_column``."""

Row = tuple[int, tuple[Any, ...]]
"""Where a row stands, and its values in the order of :data:`Columns`."""


@dataclass(frozen=True)
class FileRows:
    """An open file. ``rows`` are read as they are asked for; ``title`` and ``unit`` say where one stands.

    ``share`` says, from the number of rows that were read, how much of the file that is, in [0, 1].
    """

    title: str
    unit: str
    rows: Iterator[Row]
    share: Callable[[int], float]


@contextmanager
def open_rows(setting: str, given: str, columns: Columns) -> Iterator[FileRows]:
    """Open a file that ``setting`` names, read as its ending says; raises :class:`SettingsError` for what can't be."""
    title, path = f"{setting}={given}", Path(given).expanduser()
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")
    require(bool(ending), setting, "a file that ends in " + ", ".join(ENDINGS), given, "write it as one of these")
    try:
        with (_open_parquet if ending == ".parquet" else _open_text)(path, title, columns) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SettingsError(f"{title} is not a readable gzip file: {first_line(error)}; write it anew") from None
    except OSError as error:
        raise SettingsError(f"{title} can't be read: {error.strerror or first_line(error)}") from None


@contextmanager
def _open_text(path: Path, title: str, columns: Columns) -> Iterator[FileRows]:
    """Open UTF-8, with or without a byte order mark, compressed where its name ends in .gz."""
    compressed = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if compressed else path).suffix.lower()
    with path.open("rb") as raw:
        size = max(path.stat().st_size, 1)
        stream: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        decoded = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = _TEXT_READERS[ending](_lines(decoded, title), title, columns)
        yield FileRows(title, "record" if ending == ".json" else "line", rows, lambda _: min(raw.tell() / size, 1.0))


def _lines(decoded: Iterable[str], title: str) -> Iterator[str]:
    """Pass on lines in which bytes that are no UTF-8 are escaped, but refuse those."""
    for number, line in enumerate(decoded, start=1):
        broken = re.search("[\udc80-\udcff]", line)
        if broken:
            byte = ord(broken[0]) - 0xDC00
            raise SettingsError(f"{title} line {number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")
        yield line


def _read_csv(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read a table with a header; fields with a comma, quote or line break stand in double quotes, as in RFC 4180."""
    remedy = "put fields that hold a comma or quotes into double quotes"
    return _table(_csv_records(lines, title), title, columns, remedy)


def _csv_records(lines: Iterator[str], title: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a comma-separated table with the line on which each begins; empty ones of empty lines.

    An unclosed quote takes in the lines that follow, as far as the next quote, and may still make a table: every row
    that runs over several lines is told.
    """
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than a document may have
    reader = csv.reader(lines, strict=True)
    line, count, places = 1, 0, []
    try:
        for record in reader:
            if reader.line_num > line:
                count += 1
                places += [f"{line} to {reader.line_num}"] if count <= 5 else []
            yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise SettingsError(
            f"{title} line {line}: {first_line(error)}; close double quotes, and double those within a field"
        ) from None
    if count:
        more = f" and {count - 5:,} more" if count > 5 else ""
        log.warning("%s: %s over several lines (lines %s%s); where that is not meant, a double quote is "
                    "not closed", title, counted(count, "row"), ", ".join(places), more)  # fmt: skip


def _read_tsv(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read a table with a header, a row a line: no field holds a tab or a line break (IANA's tab-separated-values).

    Quotes are text, as in GLUE's files, unless a line as a whole is quoted as RFC 4180 has it, which is how
    spreadsheets write one.
    """
    numbered = ((number, line.rstrip("\r\n")) for number, line in enumerate(lines, start=1))
    records = ((number, _tsv_fields(line) if line else []) for number, line in numbered)
    return _table(records, title, columns, "fields must not hold tabs or line breaks; write those as CSV")


def _tsv_fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="\t", strict=True)) if '"' in line else line.split("\t")
    except csv.Error:
        return line.split("\t")


def _table(records: Iterator[tuple[int, list[str]]], title: str, columns: Columns, remedy: str) -> Iterator[Row]:
    """Take ``columns`` of ``records``, each with the line on which it begins, the first of them the header.

    An empty line is no record, unless there is but one column: there it is an empty field, if another record follows.
    """
    _, header = next((found for found in records if found[1]), (0, []))
    if not header:
        raise SettingsError(f"{title} must start with a header line, got an empty file; check that it is the right one")
    check_columns(header, columns, title)
    places = [header.index(column) for column in columns.values()]
    empty: list[int] = []
    for line, record in records:
        if not record:
            empty.append(line)
            continue
        if len(header) == 1:
            yield from ((number, ("",) * len(places)) for number in empty)
        empty.clear()
        if len(record) != len(header):
            raise SettingsError(
                f"{title} line {line} must have {len(header)} fields like the header, got {len(record)}; {remedy}"
            )
        yield line, tuple(record[place] for place in places)


def _read_jsonl(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read one JSON object a line; empty lines hold none."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{title} line {number}"
            yield number, _object(_json(line, place), place, columns)


def _read_json(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read one JSON list of objects, which is read as a whole: JSON can't be read in parts."""
    content = _json("".join(lines), title)
    if not isinstance(content, list):
        raise SettingsError(f"{title} must be a JSON list of objects, got {show(content)}; or write .jsonl, one a line")
    for number, record in enumerate(content, start=1):
        yield number, _object(record, f"{title} record {number}", columns)


def _object(record: Any, place: str, columns: Columns) -> tuple[Any, ...]:
    if not isinstance(record, dict):
        raise SettingsError(f"{place} must be a JSON object, got {show(record)}; write objects")
    check_columns(list(record), columns, place)
    return tuple(record[column] for column in columns.values())


def _json(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # nesting without end is a RecursionError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise SettingsError(f"{place} is not valid JSON: {reason}; mend it there") from None


@contextmanager
def _open_parquet(path: Path, title: str, columns: Columns) -> Iterator[FileRows]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            check_columns(file.schema_arrow.names, columns, title)
            parts = file.iter_batches(PART, columns=list(dict.fromkeys(columns.values())))
            rows = arrow_rows(parts, title, columns)
            yield FileRows(title, "row", rows, lambda count: count / file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"{title} is not a readable Parquet file: {first_line(error)}; write it anew") from None


def arrow_rows(parts: Iterable[Any], title: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of ``pyarrow`` tables or batches, numbered from 1."""
    first = 1
    for part in parts:
        values = [_values(part.column(column), title, first) for column in columns.values()]
        yield from enumerate(zip(*values, strict=True), start=first)
        first += part.num_rows


def _values(column: Any, title: str, first: int) -> list[Any]:
    values: list[Any] = []
    try:
        for value in column:
            values.append(value.as_py())
    except UnicodeDecodeError:  # Parquet does not check that its strings are UTF-8
        raise SettingsError(f"{title} row {first + len(values)} is not UTF-8; write the file anew in UTF-8") from None
    return values


def check_columns(names: Sequence[str], columns: Columns, title: str) -> None:
    """Raise :class:`SettingsError` unless each of ``columns`` occurs once among ``names``."""
    for setting, column in columns.items():
        found = list(names).count(column)
        if found != 1:
            fault = f"occurs {found} times" if found else "is not there"
            raise SettingsError(
                f"{title}: column {show(column)} {fault}, columns are {show_all(names)}; set {setting}=..."
            )


def show(value: object) -> str:
    """Return a value in one line of at most 60 characters, safe to print."""
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def show_all(values: Sequence[str]) -> str:
    """Return the first twelve values, and how many there are."""
    listed = ", ".join(show(value) for value in values[:12])
    return listed if len(values) <= 12 else f"{listed}, ... ({len(values)} in all)"


_TEXT_READERS: dict[str, Callable[[Iterator[str], str, Columns], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}

ENDINGS = (*_TEXT_READERS, ".parquet", *(f"{ending}.gz" for ending in _TEXT_READERS))
"""What files may be called."""
