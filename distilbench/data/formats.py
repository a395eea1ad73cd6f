"""Read the rows of a file in any supported format as a stream, and write predictions for them in the same way."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distilbench.cli import pluralize
from distilbench.data.hub import first_line
from distilbench.results import replace_file
from distilbench.settings import SettingsError, require

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 4096
"""Rows that are read, predicted and written at a time."""

TEXTS = ("data.text_column", "data.pair_column")
"""Settings that name the columns with a model's input."""

Columns = Mapping[str, str]
"""Column names by the setting that gives them, such as ``data.text_column``."""

Row = tuple[str, tuple[Any, ...]]
"""The location of a row, such as ``data.train=reviews.csv line 7``, and its values in the order of :data:`Columns`."""


class OpenRows(NamedTuple):
    """Rows that are read lazily; ``share(count)`` is the share of all rows that ``count`` rows are, 0 to 1."""

    rows: Iterator[Row]
    share: Callable[[int], float]


@contextmanager
def open_rows(setting: str, given: str, columns: Columns) -> Iterator[OpenRows]:
    """Open the file that ``setting`` names, in the format of its extension; raises :class:`SettingsError`."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    title, path = f"{setting}={given}", Path(given).expanduser()
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")
    require(bool(ending), setting, "a file that ends in " + ", ".join(ENDINGS), given, "write it as one of these")
    try:
        with path.open("rb") as raw:
            if ending == ".parquet":
                file = ParquetFile(raw)
                check_columns(file.schema_arrow.names, columns, title)
                parts = file.iter_batches(ROWS_AT_ONCE, columns=list(dict.fromkeys(columns.values())))
                yield OpenRows(arrow_rows(parts, title, columns), lambda count: count / file.metadata.num_rows)
            else:
                size = max(path.stat().st_size, 1)
                stream: Any = gzip.GzipFile(fileobj=raw) if ending.endswith(".gz") else raw
                # UTF-8, with or without a byte order mark
                decoded = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
                rows = _TEXT_READERS[ending.removesuffix(".gz")](_decode_lines(decoded, title), title, columns)
                yield OpenRows(rows, lambda _: min(raw.tell() / size, 1.0))
    except (gzip.BadGzipFile, EOFError, zlib.error, pyarrow.ArrowException) as error:
        kind = "Parquet" if ending == ".parquet" else "gzip"
        raise SettingsError(f"{title} is not a readable {kind} file: {first_line(error)}; write it anew") from None
    except OSError as error:
        raise SettingsError(f"{title} can't be read: {error.strerror or first_line(error)}") from None


def _decode_lines(decoded: Iterable[str], title: str) -> Iterator[str]:
    """Yield the lines; raises :class:`SettingsError` for surrogate escapes, i.e. bytes that are not UTF-8."""
    for number, line in enumerate(decoded, start=1):
        broken = re.search("[\udc80-\udcff]", line)
        if broken:
            byte = ord(broken[0]) - 0xDC00
            raise SettingsError(f"{title} line {number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")
        yield line


def _csv_records(lines: Iterator[str], title: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV file, each with its first line's number; an empty line gives an empty record.

    An unclosed quote extends a field to the next quote, which may still parse. Therefore a warning lists the rows that
    span several lines.
    """
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is too small for long documents
    reader = csv.reader(lines, strict=True)
    line, count, places = 1, 0, ""
    try:
        for record in reader:
            if reader.line_num > line:
                count += 1
                places += f", {line} to {reader.line_num}" if count <= 5 else ", ..." if count == 6 else ""
            yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise SettingsError(
            f"{title} line {line}: {first_line(error)}; close double quotes, and double those within a field"
        ) from None
    if count:
        log.warning("%s: %s over several lines (lines %s); where that is not meant, a double quote is not closed",
                    title, pluralize(count, "row"), places[2:])  # fmt: skip


def _read_csv(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read CSV with a header; fields with a comma, quote or line break must be in double quotes, as in RFC 4180."""
    remedy = "put fields that hold a comma or quotes into double quotes"
    return _pick_columns(_csv_records(lines, title), title, columns, remedy)


def _read_tsv(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read TSV with a header, one row per line, without tabs or line breaks in fields (IANA's tab-separated-values).

    Quotes are text, as in GLUE's files, unless the whole line is validly quoted as in RFC 4180, as spreadsheets do.
    """
    records = enumerate((_split_tsv_line(line.rstrip("\r\n")) for line in lines), start=1)
    return _pick_columns(records, title, columns, "fields must not hold tabs or line breaks; write those as CSV")


def _split_tsv_line(line: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="\t", strict=True), [])
    except csv.Error:
        return line.split("\t")


def _pick_columns(records: Iterator[tuple[int, list[str]]], title: str, columns: Columns, remedy: str) -> Iterator[Row]:
    """Yield ``columns`` of ``records`` (first line's number, fields), of which the first is the header.

    Empty lines are skipped, except in a table of one column: there they are empty fields, if another record follows.
    """
    _, header = next((found for found in records if found[1]), (0, []))
    if not header:
        raise SettingsError(f"{title} must begin with a header line, got an empty file; check that it is the right one")
    check_columns(header, columns, title)
    chosen = [header.index(column) for column in columns.values()]
    empty: list[int] = []
    for line, record in records:
        if not record:
            empty.append(line)
            continue
        if len(header) == 1:
            yield from ((f"{title} line {number}", ("",) * len(chosen)) for number in empty)
        empty.clear()
        if len(record) != len(header):
            raise SettingsError(
                f"{title} line {line} must have {len(header)} fields like the header, got {len(record)}; {remedy}"
            )
        yield f"{title} line {line}", tuple(record[i] for i in chosen)


def _read_jsonl(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read one JSON object per line; empty lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{title} line {number}"
            yield place, _read_object(_parse_json(line, place), place, columns)


def _read_json(lines: Iterator[str], title: str, columns: Columns) -> Iterator[Row]:
    """Read one JSON list of objects, as a whole: JSON can't be read in parts."""
    content = _parse_json("".join(lines), title)
    require(isinstance(content, list), title, "a JSON list of objects", content, "or write .jsonl, one a line")
    for number, record in enumerate(content, start=1):
        place = f"{title} record {number}"
        yield place, _read_object(record, place, columns)


def _parse_json(content: str, place: str) -> Any:
    try:
        return json.loads(content, parse_constant=lambda _: None)  # NaN, which pandas has for a missing value
    except (ValueError, RecursionError) as error:  # too deep nesting is a RecursionError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise SettingsError(f"{place} is not valid JSON: {reason}; mend it there") from None


def _read_object(record: Any, place: str, columns: Columns) -> tuple[Any, ...]:
    require(isinstance(record, dict), place, "a JSON object", record, "write objects")
    check_columns(list(record), columns, place)
    values = tuple(record[column] for column in columns.values())
    broken = next((v for v in values if isinstance(v, str) and re.search("[\ud800-\udfff]", v)), None)
    require(broken is None, place, "whole characters", broken, "half of one is no text")
    return values


def arrow_rows(parts: Iterable[Any], title: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of ``pyarrow`` tables or batches, numbered from 1."""
    number = 0
    for part in parts:
        for cells in zip(*(part.column(column) for column in columns.values()), strict=True):
            number += 1
            place = f"{title} row {number}"
            try:
                values = tuple(cell.as_py() for cell in cells)
            except UnicodeDecodeError:  # Parquet does not check that its strings are UTF-8
                raise SettingsError(f"{place} is not UTF-8; write the file anew in UTF-8") from None
            yield place, values


def check_columns(names: Sequence[str], columns: Columns, title: str) -> None:
    """Raise :class:`SettingsError` unless each of ``columns`` occurs once among ``names``."""
    for setting, column in columns.items():
        found = list(names).count(column)
        fault = f"occurs {found} times" if found else "is not there"
        if found != 1:
            raise SettingsError(
                f"{title}: column {short_repr(column)} {fault}, columns are {list_reprs(names)}; set {setting}=..."
            )


def short_repr(value: object) -> str:
    """Return a value in one line of at most 60 characters, safe to print."""
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def list_reprs(values: Sequence[str]) -> str:
    """Return the first twelve values, and the number of values if there are more."""
    listed = ", ".join(short_repr(value) for value in values[:12])
    return listed if len(values) <= 12 else f"{listed}, ... ({len(values)} in all)"


_TEXT_READERS: dict[str, Callable[[Iterator[str], str, Columns], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}

ENDINGS = (*_TEXT_READERS, ".parquet", *(f"{ending}.gz" for ending in _TEXT_READERS))
"""Supported file extensions."""


# ---- predictions

Write = Callable[[Any], None]
"""Writes predictions for some rows: a pandas DataFrame, whose index counts from the first row of the input."""

_OUTPUTS = (".csv", ".tsv", ".jsonl", ".parquet")


def check_output(path: Path, given: str) -> None:
    """Raise :class:`SettingsError` if predictions for the texts in ``given`` can't be written to ``path``."""
    require(not path.is_dir(), "output", "a file, not a folder", str(path))
    require(path.resolve() != Path(given).expanduser().resolve(), "output",
            "another file than data.test, which it would replace", str(path))  # fmt: skip
    require(path.suffix.lower() in _OUTPUTS, "output", f"a file that ends in {', '.join(_OUTPUTS)}", path.name)


@contextmanager
def open_prediction_file(path: Path) -> Iterator[Write]:
    """Yield a function that writes predictions in the format of the extension: ``index``, then the frame's columns.

    The file appears, complete, when the block ends without an exception, and replaces an existing one.
    """
    ending = path.suffix.lower()
    try:
        with (
            replace_file(path) as unfinished,
            unfinished.open("w", encoding="utf-8", newline="") as file,
            ExitStack() as closing,
        ):
            yield _parquet_writer(file, closing) if ending == ".parquet" else partial(_write_text, file, ending)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SettingsError(f"output must be a file that can be written, got {str(path)!r}: {reason}") from None


def _write_text(file: Any, ending: str, frame: Any) -> None:
    frame = frame.reset_index(names="index")
    if ending == ".tsv":  # one row per line
        frame = frame.replace(r"[\t\r\n]+", " ", regex=True)
    if ending == ".jsonl":
        frame.to_json(file, orient="records", lines=True, force_ascii=False)
    else:
        # csv quotes only fields with its own line terminator, but readers take a lone \r for one, too
        has_returns = any("\r" in text for column in frame for text in frame[column] if isinstance(text, str))
        quoting = csv.QUOTE_NONNUMERIC if has_returns else csv.QUOTE_MINIMAL
        separator = "\t" if ending == ".tsv" else ","
        frame.to_csv(file, sep=separator, index=False, header=file.tell() == 0, lineterminator="\n", quoting=quoting)


def _parquet_writer(file: Any, closing: ExitStack) -> Write:
    from pyarrow import Table, float32, int64, parquet, schema, string

    writers: list[Any] = []

    def write(frame: Any) -> None:
        frame = frame.reset_index(names="index")
        if not writers:  # explicit types: values of the first part may all be missing
            kinds = {"i": int64(), "f": float32()}
            fields = [(name, kinds.get(kind.kind, string())) for name, kind in frame.dtypes.items()]
            writers.append(closing.enter_context(parquet.ParquetWriter(file.buffer, schema(fields))))
        writers[0].write_table(Table.from_pandas(frame, writers[0].schema, preserve_index=False))

    return write
