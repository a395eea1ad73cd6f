"""Texts of a file or of the hub a part at a time, and answers written likewise: any number takes the same memory."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distilbench.data.hub import first_line
from distilbench.data.readers import (
    _csv_records,
    _hub_builder,
    _json,
    _tsv_fields,
    hub_title,
    show,
    show_all,
)
from distilbench.settings import DataSettings, SettingsError, require

PART = 4096
"""Texts that are read, predicted and written at once."""


@dataclass(frozen=True)
class Part:
    """Some rows in order, each the values of the columns asked for; ``done`` is the share of all that is read."""

    rows: list[tuple[str | None, ...]]
    done: float


Columns = Mapping[str, str]
"""The column by the setting that names it."""

Rows = Iterator[tuple[str, Sequence[Any]]]
"""Where a row stands, and its values in the order of :data:`Columns`."""


def read_file(given: str, columns: Columns) -> Iterator[Part]:
    """Yield the rows of a file, read as its ending says; raises :class:`SettingsError` for what can't be read."""
    path = Path(given).expanduser()
    title = f"data.test={given}"
    compressed = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if compressed else path).suffix.lower()
    readable = ending in _READERS or (ending == ".parquet" and not compressed)
    require(readable, "data.test", f"a file that ends in {', '.join(_READERS)} (or .gz after it) or .parquet", given)
    try:
        if ending == ".parquet":
            yield from _parquet_parts(path, title, columns)
            return
        with path.open("rb") as raw:
            size = max(path.stat().st_size, 1)
            stream: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            yield from _parts(_READERS[ending](lines, title, columns), lambda: min(raw.tell() / size, 1.0))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{title} is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (OSError, EOFError) as error:
        raise SettingsError(f"{title} can't be read: {getattr(error, 'strerror', None) or first_line(error)}") from None


def read_split(settings: DataSettings, split: str, columns: Columns) -> Iterator[Part]:
    """Yield the rows of a split of a data set of the hub; raises :class:`SettingsError` where there is none to read."""
    title = f"{hub_title(settings)} split {split}"
    builder = _hub_builder(settings)
    require(builder is not None, "data.hub_name", "a data set that the hub or its cache can give", settings.hub_name,
            "go online, or name a file with data.test=...")  # fmt: skip
    splits = builder.as_dataset()
    require(split in splits, "data.test", f"a file, or a split of {hub_title(settings)} ({', '.join(splits)})", split)
    _check_columns(splits[split].column_names, columns, title)
    chosen, first = splits[split].select_columns(list(columns.values())), 0
    for table in chosen.with_format("arrow").iter(PART):
        yield Part(_texts(table, columns, title, first), (first + len(table)) / len(chosen))
        first += len(table)


def _parts(rows: Rows, done: Callable[[], float]) -> Iterator[Part]:
    part: list[tuple[str | None, ...]] = []
    for place, values in rows:
        part.append(_checked(values, place))
        if len(part) == PART:
            yield Part(part, done())
            part = []
    if part:
        yield Part(part, 1.0)


def _checked(values: Sequence[Any], place: str) -> tuple[str | None, ...]:
    wrong = next((value for value in values if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise SettingsError(f"{place} must hold text, got {show(wrong)}; write it in quotes")
    return tuple(values)


def _csv(lines: IO[str], title: str, columns: Columns) -> Rows:
    return _table(_csv_records(lines, title), title, columns)


def _tsv(lines: IO[str], title: str, columns: Columns) -> Rows:
    numbered = ((number, line.rstrip("\r\n")) for number, line in enumerate(lines, start=1))
    return _table(((number, _tsv_fields(line)) for number, line in numbered if line), title, columns)


def _table(records: Iterator[tuple[int, list[str]]], title: str, columns: Columns) -> Rows:
    _, header = next(records, (0, []))
    _check_columns(header, columns, title)
    places = [header.index(column) for column in columns.values()]
    for line, record in records:
        if len(record) != len(header):
            raise SettingsError(
                f"{title} line {line} must have {len(header)} fields like the header, got {len(record)}"
            )
        yield f"{title} line {line}", [record[place] for place in places]


def _jsonl(lines: IO[str], title: str, columns: Columns) -> Rows:
    numbered = ((f"{title} line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return _objects(((place, _json(line, place)) for place, line in numbered), columns)


def _json_list(lines: IO[str], title: str, columns: Columns) -> Rows:
    """The objects of one list, which is read as a whole: JSON can't be read in parts."""
    content = _json(lines.read(), title)
    if not isinstance(content, list):
        raise SettingsError(f"{title} must be a JSON list of objects, got {show(content)}; or write .jsonl, one a line")
    return _objects(((f"{title} record {number}", one) for number, one in enumerate(content, start=1)), columns)


def _objects(records: Iterator[tuple[str, Any]], columns: Columns) -> Rows:
    for place, record in records:
        if not isinstance(record, dict):
            raise SettingsError(f"{place} must be a JSON object, got {show(record)}; write objects")
        _check_columns(list(record), columns, place)
        yield place, [record[column] for column in columns.values()]


_READERS: dict[str, Callable[[IO[str], str, Columns], Rows]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json_list,
}


def _parquet_parts(path: Path, title: str, columns: Columns) -> Iterator[Part]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns, title)
            first, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(PART, columns=list(columns.values())):
                yield Part(_texts(batch, columns, title, first), (first + len(batch)) / total)
                first += len(batch)
    except pyarrow.ArrowException as error:
        raise SettingsError(f"{title} is not a readable Parquet file: {first_line(error)}; write it anew") from None


def _texts(table: Any, columns: Columns, title: str, first: int) -> list[tuple[str | None, ...]]:
    """Rows of a ``pyarrow`` table that begins with row ``first``, counted from 0."""
    values = zip(*(table[column].to_pylist() for column in columns.values()), strict=True)
    return [_checked(row, f"{title} row {number}") for number, row in enumerate(values, start=first + 1)]


def _check_columns(names: Sequence[str], columns: Columns, title: str) -> None:
    for setting, column in columns.items():
        if list(names).count(column) != 1:
            fault = "occurs twice" if column in names else "is not there"
            raise SettingsError(
                f"{title}: column {show(column)} {fault}, columns are {show_all(names)}; set {setting}=..."
            )


# ---- answers

Write = Callable[[Any], None]
"""Takes the answers to the rows of a part: a pandas DataFrame, numbered from the first row of all."""

_WRITTEN = (".csv", ".tsv", ".jsonl", ".parquet")


def check_output(path: Path) -> None:
    """Raise :class:`SettingsError` for a file whose ending does not say how answers are written."""
    require(path.suffix.lower() in _WRITTEN, "output", f"a file that ends in {', '.join(_WRITTEN)}", path.name)


@contextmanager
def open_answers(path: Path) -> Iterator[Write]:
    """Yield what writes answers to a file as its ending says: ``index``, then the columns of what it is given.

    The file is there, whole, once the block has ended well; what stood there before is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _open_parquet(partial) if path.suffix.lower() == ".parquet" else _open_text(path, partial) as write:
            yield lambda frame: write(frame.reset_index(names="index"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _open_text(path: Path, partial: Path) -> Iterator[Write]:
    ending = path.suffix.lower()
    with partial.open("w", encoding="utf-8", newline="") as file:

        def write(frame: Any) -> None:
            if ending == ".jsonl":
                frame.to_json(file, orient="records", lines=True, force_ascii=False)
                return
            if ending == ".tsv":  # which has a row a line
                frame = frame.replace(r"[\t\r\n]+", " ", regex=True)
            separator = "\t" if ending == ".tsv" else ","
            frame.to_csv(file, sep=separator, index=False, header=file.tell() == 0, lineterminator="\n")

        yield write


@contextmanager
def _open_parquet(partial: Path) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    with ExitStack() as closing:
        writers: list[Any] = []

        def write(frame: Any) -> None:
            if not writers:
                kinds = {"i": pyarrow.int64(), "f": pyarrow.float32()}
                fields = [(name, kinds.get(kind.kind, pyarrow.string())) for name, kind in frame.dtypes.items()]
                writers.append(closing.enter_context(parquet.ParquetWriter(partial, pyarrow.schema(fields))))
            writers[0].write_table(pyarrow.Table.from_pandas(frame, writers[0].schema, preserve_index=False))

        yield write
