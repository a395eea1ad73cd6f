"""Write files of text and labels in every format, and catch the errors of reading them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from distilbench.data.text import load_text
from distilbench.settings import DataSettings, SettingsError

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz", ".jsonl.gz")

texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def write(path: Path, rows) -> Path:
    """Write rows of (text, label) in the format of the path's suffix."""
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": t, "label": y, "id": 7} for t, y in rows]), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [y for _, y in rows]}), path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"label": y, "text": t}, ensure_ascii=len(t) % 2 == 0) for t, y in rows)
        path.write_bytes("".join(line + "\n" for line in lines).encode())
    else:
        out = io.StringIO(newline="")
        delimiter = "\t" if path.suffix == ".tsv" else ","
        csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
        path.write_bytes(out.getvalue().encode())
    return path


def files(train: Path, validation: Path | None = None, **settings) -> DataSettings:
    given = {"text_column": "text", "label_column": "label"} | settings
    return DataSettings(source="files", train=str(train), validation=str(validation) if validation else None, **given)


def raw(path: Path, content: str | bytes, **settings) -> DataSettings:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return files(path, **settings)


def numbered(count: int, classes: int = 2):
    """Return distinct sentences, with labels in rotation."""
    return [(f"sentence {i}", i % classes) for i in range(count)]


def refusal(settings: DataSettings) -> str:
    """Return the one-line error message for these settings."""
    with pytest.raises(SettingsError) as caught:
        load_text(settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)
