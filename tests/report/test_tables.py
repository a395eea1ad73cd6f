"""The report as text, where names mean nothing but themselves."""

import csv
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from distilbench.report.columns import CSV, NARROW
from distilbench.report.formats import markdown
from distilbench.report.tables import csv_report, failures, latex_report, markdown_report, note, print_report
from distilbench.results import Status
from tests.report.made_trials import HOSTILE, failed, report_of, sweep, treatment, trial

FROZEN = treatment(freeze_layers=3)
COSINE = treatment(scheduler_name="cosine", optim_lr=3e-5)


@pytest.fixture
def report():
    """The course report's three rows with one seed each, and one that diverged."""
    return report_of(
        [
            trial(0.9071, loss=0.3255),
            trial(0.9002, 1, 1, FROZEN, loss=0.3330, train_seconds=888.0, trainable_parameters=10_600_000),
            trial(0.9060, 1, 2, COSINE, loss=0.3804, train_seconds=1366.0),
            failed(Status.DIVERGED, 3, treatment(optim_lr=1.0)),
        ],
        selected_on_report_split=False,
        notes=("A note on the sweep.",),
    )


def printed(report, width=80, layout="full", most=25) -> str:
    stream = io.StringIO()
    print_report(Console(file=stream, width=width), report, layout, most)
    return stream.getvalue()


def test_a_wide_terminal_shows_every_column_and_the_answer(report):
    text = printed(report, width=220)
    words = " ".join(text.split())
    assert (
        "None of the 3 settings tried (1 diverged) was shown to be better than the baseline, or to lose less" in words
    )
    assert "protocol 0123456789ab: all-MiniLM-L6-v2 on sst2" in words
    (frozen,) = [line for line in text.splitlines() if line.startswith(" layers=3")]
    for cell in ("90.02 %", "0.3330", "-0.69 (", "1.00", "undecided (n = 1)", "14 min 48 s (35 % less)",
                 "10.60 M"):  # fmt: skip
        assert cell in frozen
    assert "DIVERGED lr=1 (seed 1): the loss is nan; lower optim.lr" in words
    assert "A note on the sweep." in words


def test_a_narrow_or_piped_report_fits_eighty_columns_without_control_codes(report):
    text = printed(report)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "\x1b" not in text
    for words in ("undecided", "-35 %", "90.02 %", "baseline"):
        assert words in text


@pytest.mark.parametrize("width", [26, 32, 40, 50])
def test_a_terminal_of_few_columns_leaves_columns_out_and_cuts_no_figure_off(width):
    table = printed(report_of(sweep(4, seeds=2)), width).partition("setting  ")[2].partition("Good enough")[0]
    assert table.count("±") == table.count("± 0.00 %") == 4
    assert table.count("(-") == len(re.findall(r"\(-\d\.\d\d to [+-]\d\.\d\d\)", table))


def test_long_names_of_settings_cut_no_figure_off_at_eighty_columns():
    named = treatment() | {"a_setting_with_a_name_of_its_own": 128}
    base, ours = trial(0.9, train_flops=4e12), trial(0.9, 1, 1, named, train_flops=2e12)
    text = printed(report_of([base, ours, trial(0.5, 1, 2, FROZEN, train_flops=1e12)]))
    assert "FLOPs" in text
    assert "-50 %" in text
    assert "-75 %" in text


def test_how_well_probabilities_are_calibrated_stands_in_the_full_table():
    lines = markdown_report(report_of([trial(0.9, brier=0.07, ece=0.021), trial(0.9, 2, brier=0.09, ece=0.023)]))
    assert re.search(r"\| Brier \| ECE \|\n.*\n.*\| 0\.0800 \| 0\.0220 \|", lines)


def test_a_row_takes_two_lines_of_eighty_columns_and_one_where_there_is_more_room():
    report = report_of([replace(one, number=str(i), train_flops=1e15) for i, one in enumerate(sweep(20))])
    heights = {}
    for width in (80, 120):
        table = printed(report, width).partition("verdict")[2].partition("\n \n")[0]
        lines = [line for line in table.splitlines()[2:] if line.strip()]
        heights[width] = len(lines[: next(i for i, line in enumerate(lines) if line.startswith("DIVERGED"))]) / 20
    assert heights[80] <= 2
    assert heights[120] <= 1.7


def test_a_long_table_keeps_the_baseline_and_says_what_it_leaves_out():
    text = printed(report_of(sweep(60)), width=220, most=5)
    assert "the best 5 of 60; the rest stands in the files" in text
    assert " baseline: " in text


def test_the_papers_layout_has_its_columns_and_its_order(report):
    lines = printed(report, width=120, layout="paper").splitlines()
    header = next(line for line in lines if "experiment" in line)
    assert re.split(r"\s{2,}", header.strip()) == ["experiment", "accuracy", "loss", "training time", "time gain"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if "min" in line]
    assert rows[0][1:] == ["90.71 %", "0.3255", "22 min 51 s", "-"]
    assert ["layers=3", "90.02 %", "0.3330", "14 min 48 s", "+35 %"] in rows
    assert ["scheduler=cosine lr=3e-05", "90.60 %", "0.3804", "22 min 46 s", "+0 %"] in rows
    shared = report_of([trial(0.9), trial(0.89, 1, 1, FROZEN, alone=False, solo_seconds_estimate=700.0)])
    assert "about 11 min 40 s" in printed(shared, width=120, layout="paper")


def test_markdown_links_each_setting_to_its_run(report):
    lines = markdown_report(report).splitlines()
    (row,) = [line for line in lines if line.startswith("| [layers=3]")]
    assert row.startswith("| [layers=3](http://127.0.0.1:5000/#/experiments/1/runs/1) | -0.69 (")
    assert any(line.startswith("| **[baseline") for line in lines)
    header = next(line for line in lines if line.startswith("| setting"))
    assert row.replace("\\|", "").count("|") == header.count("|")


def test_numbers_of_trials_stand_where_there_are_any(report):
    numbered = report_of([trial(0.9, number="0"), trial(0.89, 1, 1, FROZEN, number="12")])
    assert re.search(r"^ *12 +layers=3 ", printed(numbered, width=220), re.MULTILINE)
    assert re.search(r"^ *# +setting", printed(numbered), re.MULTILINE)
    assert not re.search(r"^ *# +setting", printed(report), re.MULTILINE)
    assert "| # | setting |" in markdown_report(numbered)
    beside = report_of([trial(0.9, number="baseline/0"), trial(0.89, 1, 1, FROZEN, number="0")])
    assert re.findall(r"^\| (\d*) ?\|", markdown_report(beside), re.MULTILINE) == ["", "0"]


def test_csv_holds_plain_numbers_of_every_row(report):
    rows = {row["setting"]: row for row in csv.DictReader(io.StringIO(csv_report(report)))}
    frozen = rows["layers=3"]
    assert frozen["verdict"] == "undecided"
    assert float(frozen["accuracy"]) == pytest.approx(0.9002, abs=1e-3)
    assert float(frozen["time_gain_percent"]) == pytest.approx(35.2, abs=0.1)
    assert float(frozen["p_holm"]) <= 1
    assert (frozen["seeds"], frozen["freeze.layers"]) == ("1", "3")
    assert rows["lr=1"]["status"] == "DIVERGED"
    assert rows["lr=1"]["accuracy"] == ""


def test_the_answer_stands_on_top_of_every_kind(report):
    said = "None of the 3 settings tried"
    for text in (printed(report), markdown_report(report), note(report), latex_report(report)):
        assert text.replace("\n", " ").index(said) < text.replace("\n", " ").index("verdict"), "before the table"


def test_latex_is_a_whole_table(report):
    text = latex_report(report)
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert r"35 \% less" in text
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
    row = next(line for line in text.splitlines() if line.startswith("layers=3"))
    assert row.count(" & ") == len(columns) - 1


@pytest.fixture
def hostile():
    return report_of(
        [
            trial(0.9, name=HOSTILE, model=HOSTILE),
            trial(0.9, 1, 1, treatment(scheduler_name=HOSTILE), name=HOSTILE, url="http://h/)|(x y"),
            trial(0.9, 1, 2, treatment(scheduler_name="=cmd()"), name=HOSTILE),
            failed(Status.FAILED, 3, treatment(scheduler_name="@x"), error=HOSTILE),
        ],
        title=HOSTILE,
    )


def test_hostile_names_move_no_cursor_and_break_no_line(hostile):
    text = printed(hostile, width=200)
    assert "\x1b" not in text
    assert "[31m" in text


def test_hostile_names_are_text_in_markdown_and_in_mlflows_note(hostile):
    for text in (markdown_report(hostile), note(hostile)):
        assert not re.search(r"(?<!\\)<", text), "no tag"
        assert not re.search(r"(?<!\\)`", text), "no code"
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1, "no extra column"


def test_hostile_names_run_nothing_in_latex_and_in_a_spreadsheet(hostile):
    text = latex_report(hostile)
    assert r"\input" not in text
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    rows = list(csv.reader(io.StringIO(csv_report(hostile))))
    assert len({len(row) for row in rows}) == 1
    assert not any(cell.startswith(("=", "@")) for row in rows for cell in row)


def test_the_note_is_short_and_holds_the_answer_the_best_rows_and_links():
    text = note(report_of(sweep(60)))
    assert text.startswith("**None of the ")
    assert len(text) < 8000, "MLflow's limit of a tag"
    assert len([line for line in text.splitlines() if "](http://127.0.0.1:5000/#/experiments/1/runs/" in line]) == 11
    assert "49 more in report.html." in text


def test_a_trial_whose_seed_has_finished_since_is_no_longer_told():
    deep = treatment(freeze_layers=1)
    cut, other = failed(Status.INTERRUPTED, 1, deep), replace(failed(Status.FAILED, 2, deep, "no memory"), seed=2)
    report = report_of([trial(), cut, other, trial(0.9, place=3, settings=deep)])
    assert [line.partition(" ")[0] for line in failures(report)] == ["FAILED"]
    assert "1 (1 failed)" in printed(report, width=220)


def test_a_sweep_whose_every_trial_failed_gets_every_kind_of_report():
    broken = report_of([failed(Status.DIVERGED, n, treatment(optim_lr=n + 1.0)) for n in range(8)])
    text = printed(broken, width=220)
    assert "No trial finished: 8 DIVERGED." in text
    assert "Good enough" not in text
    assert "and 3 more that did not finish" in text
    assert "DIVERGED" in markdown_report(broken)
    assert "DIVERGED" in note(broken)
    assert len(csv_report(broken).splitlines()) == 9
    assert "No trial finished" in latex_report(broken)


def test_markdown_has_no_backslash_where_mlflows_page_would_show_it():
    assert markdown("p < 0.001, a_b") == "p &lt; 0.001, a\\_b"


def test_a_setting_with_a_failed_seed_says_so_beside_its_seeds():
    lost = replace(failed(Status.OUT_OF_MEMORY, 1, FROZEN), seed=2)
    text = markdown_report(report_of([trial(0.9), trial(0.89, 1, 1, FROZEN), lost]))
    assert "| 1 (1\N{NO-BREAK SPACE}out\\_of\\_memory) |" in text.replace("1 (1 ", "1 (1\N{NO-BREAK SPACE}")


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("num_choices", [1, 2, 4])
def test_a_terminal_breaks_names_between_choices_only_and_shows_costs(width, num_choices):
    choices = ["freeze=layers3", "scheduler=cosine_warmup", "lr=3e-05", "weight_decay=0.0655"][:num_choices]
    trials = [trial(0.9, seed, n, [treatment(), FROZEN][n], number=str(n), train_flops=1e15 / (n + 1))
              for n in (0, 1) for seed in (1, 2)]  # fmt: skip
    report = report_of(trials)
    rows = [row if row.is_baseline else replace(row, label=" ".join(choices)) for row in report.rows]
    words = printed(replace(report, rows=tuple(rows)), width).split()
    assert {*choices, "-50", "FLOPs"} <= {*words}
    assert ("time" in words) == (width == 100 or num_choices == 1)


def test_a_saving_is_the_same_in_every_table():
    trials = [trial(0.9, train_flops=1e15), trial(0.9, 1, 1, treatment(freeze_layers=3), train_flops=1e12)]
    report = report_of(trials, margin=5.0)
    row, base = report.candidates[0], report.baseline
    (narrow,) = [column for column in NARROW if column.key == "flops_gain_percent"]
    assert (CSV["train_flops"].text(row), narrow.text(row), narrow.text(base)) == ("1 T (99 % fewer)", "-99 %", "")
