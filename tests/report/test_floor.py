"""The most frequent label alone is the floor: what is not shown above it has not learned, and that is said first."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from distilbench.report.comparison import has_learned, majority_accuracy
from distilbench.report.findings import answer
from distilbench.report.tables import latex_report, markdown_report, note, print_report
from distilbench.report.trial import compare, comparison_headline
from distilbench.report.words import describe_verdict
from distilbench.results import Predictions
from tests.report.made_trials import report_of, treatment, trial

FROZEN = treatment(freeze_layers=3)
LABELS = np.repeat([1, 0], [445, 427])
"""SST-2's validation split: 50.9 sentences of a hundred are positive."""


def predictions(answers) -> Predictions:
    return Predictions(LABELS, np.eye(2)[np.asarray(answers)])


def made(answers, **changes):
    kept = predictions(answers)
    return trial(right=kept.correct, **changes, predictions=kept)


ALWAYS = np.ones(872, dtype=int)
ALMOST = np.where(np.arange(872) % 40 == 0, 0, ALWAYS)
LEARNED = np.where(np.arange(872) % 8 == 0, 1 - LABELS, LABELS)


def test_the_floor_is_the_share_of_the_most_frequent_label():
    assert majority_accuracy(LABELS) == pytest.approx(445 / 872)


@pytest.mark.parametrize(
    ("answers", "learned"), [(ALWAYS, False), (ALMOST, False), (1 - ALWAYS, False), (LEARNED, True)]
)
def test_what_answers_the_same_everywhere_has_not_learned(answers, learned):
    assert has_learned({1: predictions(answers)}) is learned
    assert has_learned({1: predictions(answers), 2: predictions(answers), 3: predictions(answers)}) is learned


def test_coins_are_called_learned_in_at_most_the_level():
    rng = np.random.default_rng(7)
    claims = sum(has_learned({1: predictions(rng.integers(0, 2, 872))}) for _ in range(400))
    assert claims / 400 <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 400)


def test_a_baseline_that_has_not_learned_is_told_of_first_and_everywhere():
    report = report_of([made(ALWAYS), made(LEARNED, place=1, settings=FROZEN)], selected_on_report_split=False)
    first = "The baseline has not learned: 51.03 %, while always predicting the most frequent label scores 51.03 %."
    assert answer(report)[0].startswith(first)
    stream = io.StringIO()
    print_report(Console(file=stream, width=200), report)
    texts = [stream.getvalue(), markdown_report(report), note(report), latex_report(report)]
    for text in texts:
        assert "has not learned" in text
        assert "always predicting the most frequent label scores 51.03" in text


@pytest.mark.parametrize(
    ("right", "expected"),
    [(LEARNED, "not judged: the baseline has not learned"), (ALWAYS, "has not learned"), (ALMOST, "has not learned")],
)
def test_nothing_is_judged_beside_a_baseline_that_has_not_learned_nor_said_to_need_more(right, expected):
    base, ours = made(ALWAYS), made(right, place=1, settings=FROZEN)
    (row,) = report_of([base, ours], selected_on_report_split=False).candidates
    assert (row.verdict, row.difference.needed) == (None, None)
    assert describe_verdict(row) == expected
    assert comparison_headline(compare(ours, base, 1.0)).startswith("The baseline has not learned: 51.03 %")


@pytest.mark.parametrize(("read", "told"), [({}, ["Nor has any other setting."]), ({"predictions": None}, [])])
def test_of_settings_that_were_not_tested_nobody_says_that_they_have_not_learned(read, told):
    report = report_of([made(ALWAYS), replace(made(ALWAYS, place=1, settings=FROZEN), **read)])
    assert answer(report)[1:] == told


def test_a_setting_that_has_not_learned_is_called_so_beside_its_verdict():
    (row,) = report_of([made(LEARNED), made(ALWAYS, place=1, settings=FROZEN)]).candidates
    assert describe_verdict(row) == "worse with this seed (n = 1), has not learned"
