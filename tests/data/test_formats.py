"""What an empty line of a table is."""

from __future__ import annotations

import pytest

from distilbench.data.formats import open_rows


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
