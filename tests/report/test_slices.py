"""Accuracy and difference on slices: each on its own examples, corrected for all of them, in every kind of table."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from distilbench.report.page import page
from distilbench.report.slices import MOST_SLICES, NOTE, rows_by_slice
from distilbench.report.statistics import ALPHA, compare_over_seeds, holm, spread_over_seeds
from distilbench.report.tables import csv_report, latex_report, markdown_report, print_report
from tests.report.made_trials import EXAMPLES, HOSTILE, report_of, treatment, trial

NAMES = np.where(np.arange(EXAMPLES) < 600, "web", np.where(np.arange(EXAMPLES) < 850, "book", ""))


def sliced(stored, names=NAMES):
    return replace(stored, predictions=replace(stored.predictions, slices=np.array(names)))


def report_with(trials):
    report = report_of(trials, selected_on_report_split=False)
    return replace(report, slices=rows_by_slice(report.rows, report.margin, len(report.rows) - 1))


@pytest.fixture
def trials():
    """A baseline and a frozen setting that loses 30 of the 250 examples from books, and nothing elsewhere."""
    right = np.arange(EXAMPLES) % 10 > 0
    worse = right & ~((NAMES == "book") & (np.cumsum(right & (NAMES == "book")) <= 30))
    base = trial(right=right, brier=0.07)
    frozen = trial(place=1, settings=treatment(freeze_layers=3), right=worse, brier=0.07)
    return [sliced(base), frozen]  # one that knows the slices is enough


def test_each_slice_has_its_own_examples_accuracy_and_difference(trials):
    rows = report_with(trials).slices
    assert [(row.slice, row.is_baseline, row.examples) for row in rows] == [
        ("web", True, 600), ("web", False, 600), ("book", True, 250), ("book", False, 250), ("(none)", True, 22),
        ("(none)", False, 22),
    ]  # fmt: skip
    base, frozen = (trials[i].predictions.correct for i in (0, 1))
    book = rows[3]
    assert book.accuracy == frozen[NAMES == "book"].mean()
    seen = compare_over_seeds(spread_over_seeds({1: frozen[NAMES == "book"]}, {1: base[NAMES == "book"]}))
    found = book.difference
    assert (found.points, found.low, found.high, found.p) == (-12.0, 100 * seen.low, 100 * seen.high, seen.p)
    assert [row.points for row in rows if not row.is_baseline] == [0.0, -12.0, 0.0]


def test_p_values_are_corrected_for_every_slice_of_every_setting_that_was_tried(trials):
    others = [
        sliced(trial(0.6, place=place, settings=treatment(optim_lr=place * 1e-6))) for place in range(2, 10)
    ]  # more than are told
    rows = report_with([*trials, *others]).slices
    found = [row.difference for row in rows if row.difference]
    assert len({row.label for row in rows}) == 6
    hidden = [1.0] * (3 * 9 - len(found))
    assert [one.p_holm for one in found] == holm([one.p for one in found] + hidden)[: len(found)]
    assert [one.p_loss_holm for one in found] == holm([one.p_loss for one in found] + hidden)[: len(found)]
    assert all(one.loses_at_most <= 1.0 for one in found if one.p_loss_holm < ALPHA)


def test_several_seeds_are_compared_on_each_slice():
    settings = [treatment(), treatment(freeze_layers=3)]
    trials = [
        sliced(trial(0.9 - 0.02 * place, seed, place, one)) for place, one in enumerate(settings) for seed in (1, 2)
    ]
    (web,) = [row for row in report_with(trials).slices if row.slice == "web" and not row.is_baseline]
    assert (web.num_seeds, web.difference.num_seeds) == (2, 2)
    assert web.accuracy == np.mean([one.predictions.correct[NAMES == "web"].mean() for one in trials[2:]])


def test_without_slices_or_with_trials_of_other_examples_there_is_nothing_to_tell(trials):
    assert report_with([replace(trials[0], predictions=trials[1].predictions), trials[1]]).slices == ()
    other = trial(place=2, settings=treatment(optim_lr=1e-3), right=np.ones(7, dtype=bool))
    told = report_with([*trials, other]).slices
    assert {row.label.partition(":")[0] for row in told} == {"baseline", "layers=3"}


def test_a_slice_of_one_example_has_an_accuracy_and_no_difference(recwarn):
    names = np.where(np.arange(EXAMPLES) < 1, "alone", "web")
    settings = [treatment(), treatment(freeze_layers=3)]
    trials = [sliced(trial(0.9, seed, place, one), names) for place, one in enumerate(settings) for seed in (1, 2)]
    assert [(row.slice, row.difference is None) for row in report_with(trials).slices] == [
        ("web", True), ("web", False), ("alone", True), ("alone", True),
    ]  # fmt: skip
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_many_slices_are_cut_to_the_largest(trials):
    names = [f"s{i % 50 if i < 800 else 0}" for i in range(EXAMPLES)]
    rows = report_with([sliced(one, names) for one in trials]).slices
    assert len({row.slice for row in rows}) == MOST_SLICES
    assert rows[0].slice == "s0"


def test_every_kind_of_table_and_the_page_have_the_slices(trials):
    report = report_with(trials)
    stream = io.StringIO()
    print_report(Console(file=stream, width=80), report)
    assert all(len(line) <= 80 for line in stream.getvalue().splitlines())
    (line,) = [
        line for line in stream.getvalue().splitlines() if line.strip().startswith("book") and "layers=3" in line
    ]
    assert re.search(r"250 +78.00 % +-12.00 +< 0.001", line), line
    assert re.search(r"^ +\(-1\d\.\d\d to -\d", stream.getvalue(), re.MULTILINE), "an interval stands below its figure"
    assert NOTE in " ".join(stream.getvalue().split())
    assert re.search(r"\| book \| \[layers=3\].*250.*-12.00", markdown_report(report).replace("\xa0", " "))
    assert r"book & layers=3 & 250" in latex_report(report)
    rows = list(csv.DictReader(io.StringIO(csv_report(report))))
    assert [row["slice"] for row in rows] == ["", "", "web", "web", "book", "book", "(none)", "(none)"]
    assert [row["examples"] for row in rows] == ["872", "872", "600", "600", "250", "250", "22", "22"]
    assert [(row["loss"], row["brier"]) for row in rows] == [("0.35", "0.07")] * 2 + [("", "")] * 6, (
        "not of all examples"
    )
    shown = page(report)
    assert "<h2>By slice</h2>" in shown
    assert ">book</td>" in shown
    plain = report_of(trials, selected_on_report_split=False)
    assert "By slice" not in page(plain) + markdown_report(plain) + latex_report(plain)


def test_names_of_slices_mean_nothing_but_themselves(trials):
    report = report_with([sliced(one, [HOSTILE] * EXAMPLES) for one in trials])
    assert "<img" not in page(report)
    assert "<img" not in markdown_report(report)
    assert r"\input" not in latex_report(report)
    assert "\n".join(csv_report(report).splitlines()[1:]).count("\n") == len(report.rows) + len(report.slices) - 1
