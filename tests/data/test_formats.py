"""What an empty line of a table is, and that answers are as many rows as there were texts."""

from __future__ import annotations

import csv

import pandas
import pytest

from distilbench.data.formats import open_prediction_file, open_rows


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("\ntext\na\n\nb\n\n\n", ["line 3 a", "line 4 ", "line 5 b"]),
        ("text{0}n\na{0}1\n\nb{0}2\n\n", ["line 2 a", "line 4 b"]),
    ],
)
def test_an_empty_line_is_an_empty_text_where_there_is_no_other_column(tmp_path, ending, text, rows):
    file = tmp_path / f"texts{ending}"
    file.write_text(text.format("," if ending == ".csv" else "\t"))
    with open_rows("data.test", str(file), {"data.text_column": "text"}) as opened:
        assert [f"{place} {text}" for place, (text,) in opened.rows] == [f"data.test={file} {row}" for row in rows]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_answers_to_any_text_are_a_row_each_for_whoever_reads_them(tmp_path, ending):
    texts = ["a\rb", "a\r\nb", "a\nb", '"q"', "a,b", "\u2028", "nul\0", None]
    with open_prediction_file(tmp_path / f"out{ending}") as write:
        write(pandas.DataFrame({"text": texts, "probability": [0.5] * len(texts)}))
    with (tmp_path / f"out{ending}").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t" if ending == ".tsv" else ","))
    assert [row[0] for row in rows] == ["index", *map(str, range(len(texts)))]
    if ending == ".csv":
        assert [row[1] for row in rows[1:]] == [text or "" for text in texts]
