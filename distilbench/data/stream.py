"""Texts of a file or of the hub a part at a time, and answers written likewise: any number takes the same memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from distilbench.data.formats import PART, Columns, OpenRows, open_rows
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


def _parts(file: OpenRows) -> Iterator[Part]:
    count = 0
    while taken := list(islice(file.rows, PART)):
        count += len(taken)
        for place, values in taken:
            wrong = next((value for value in values if not isinstance(value, str | None)), None)
            require(wrong is None, place, "text", wrong, "write it in quotes")
        yield [values for _, values in taken], file.share(count)


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
    unfinished, ending = path.with_name(f".{path.name}.{os.getpid()}.partial"), path.suffix.lower()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8", newline="") as file, ExitStack() as closing:
            yield _parquet_writer(file, closing) if ending == ".parquet" else partial(_write_text, file, ending)
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SettingsError(f"output must be a file that can be written, got {str(path)!r}: {reason}") from None
    finally:
        with suppress(OSError):  # such as a folder that could not be made
            unfinished.unlink()


def _write_text(file: Any, ending: str, frame: Any) -> None:
    frame = frame.reset_index(names="index")
    if ending == ".tsv":  # which has a row a line
        frame = frame.replace(r"[\t\r\n]+", " ", regex=True)
    if ending == ".jsonl":
        frame.to_json(file, orient="records", lines=True, force_ascii=False)
    else:
        separator = "\t" if ending == ".tsv" else ","
        frame.to_csv(file, sep=separator, index=False, header=file.tell() == 0, lineterminator="\n")


def _parquet_writer(file: Any, closing: ExitStack) -> Write:
    from pyarrow import Table, float32, int64, parquet, schema, string

    writers: list[Any] = []

    def write(frame: Any) -> None:
        frame = frame.reset_index(names="index")
        if not writers:  # the first part may be blank, and say nothing of what its columns hold
            kinds = {"i": int64(), "f": float32()}
            fields = [(name, kinds.get(kind.kind, string())) for name, kind in frame.dtypes.items()]
            writers.append(closing.enter_context(parquet.ParquetWriter(file.buffer, schema(fields))))
        writers[0].write_table(Table.from_pandas(frame, writers[0].schema, preserve_index=False))

    return write
