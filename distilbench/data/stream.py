"""Texts of a file or of the hub a part at a time, and answers written likewise: any number takes the same memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from distilbench.data.formats import PART, Columns, FileRows, open_rows, show
from distilbench.data.hub import first_line
from distilbench.data.readers import hub_builder, open_split
from distilbench.settings import DataSettings, SettingsError, require

Part = tuple[list[tuple[str | None, ...]], float]
"""Some rows in order, each the values of the columns asked for, and the share of all rows that is read by then."""


def read_file(given: str, columns: Columns) -> Iterator[Part]:
    """Yield the rows of a file, read as its ending says; raises :class:`SettingsError` for what can't be read."""
    with open_rows("data.test", given, columns) as file:
        yield from _parts(file)


def read_split(settings: DataSettings, split: str, columns: Columns) -> Iterator[Part]:
    """Yield the rows of a split of a data set of the hub; raises :class:`SettingsError` where there is none to read."""
    builder = hub_builder(settings)
    require(builder is not None, "data.hub_name", "a data set that the hub or its cache can give", settings.hub_name,
            "go online, or name a file with data.test=...")  # fmt: skip
    yield from _parts(open_split(builder.as_dataset(), "data.test", split, settings, columns))


def _parts(file: FileRows) -> Iterator[Part]:
    count = 0
    while taken := list(islice(file.rows, PART)):
        count += len(taken)
        yield [_checked(values, f"{file.title} {file.unit} {place}") for place, values in taken], file.share(count)


def _checked(values: Sequence[Any], place: str) -> tuple[str | None, ...]:
    wrong = next((value for value in values if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise SettingsError(f"{place} must hold text, got {show(wrong)}; write it in quotes")
    return tuple(values)


# ---- answers

Write = Callable[[Any], None]
"""Takes the answers to the rows of a part: a pandas DataFrame, numbered from the first row of all."""

_WRITTEN = (".csv", ".tsv", ".jsonl", ".parquet")


def check_output(path: Path, given: str) -> None:
    """Raise :class:`SettingsError` for a file that answers to those in ``given`` can't be written to."""
    require(not path.is_dir(), "output", "a file, not a folder", str(path))
    require(path.resolve() != Path(given).expanduser().resolve(), "output",
            "another file than data.test, which it would replace", str(path))  # fmt: skip
    require(path.suffix.lower() in _WRITTEN, "output", f"a file that ends in {', '.join(_WRITTEN)}", path.name)


@contextmanager
def open_answers(path: Path) -> Iterator[Write]:
    """Yield what writes answers to a file as its ending says: ``index``, then the columns of what it is given.

    The file is there, whole, once the block has ended well; what stood there before is replaced.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_parquet(partial) if path.suffix.lower() == ".parquet" else _open_text(path, partial) as write:
            yield lambda frame: write(frame.reset_index(names="index"))
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SettingsError(f"output must be a file that can be written, got {str(path)!r}: {reason}") from None
    finally:
        with suppress(OSError):  # such as a folder that could not be made
            partial.unlink()


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
