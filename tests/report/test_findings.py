"""What many rows say together: the figures behind the charts."""

from dataclasses import replace

import pytest

from distilbench.report.figures import (
    by_depth,
    comparable_in_time,
    cost_of_halving_text,
    data_curve,
    history,
    importance,
)
from distilbench.report.findings import by_score, pareto_front
from distilbench.report.rows import rows_from
from distilbench.results import Status
from tests.report.made_trials import failed, report_of, sweep, treatment, trial

FROZEN, COSINE = treatment(freeze_layers=3), treatment(scheduler_name="cosine")


def test_the_pareto_front_holds_what_no_other_beats_in_both():
    rows = rows_from([
        trial(0.90, 1, 0, train_seconds=100.0),
        trial(0.88, 1, 1, FROZEN, train_seconds=50.0),
        trial(0.87, 1, 2, COSINE, train_seconds=60.0),
        trial(0.90, 1, 3, treatment(optim_lr=1.0), train_seconds=120.0),
        trial(0.99, 1, 4, treatment(optim_lr=2.0), alone=False),  # its time is not known
        replace(failed(Status.PRUNED, 5, treatment(optim_lr=3.0)), score=0.99, train_seconds=10.0),
    ])  # fmt: skip
    assert [row.cost.seconds for row in pareto_front(rows, lambda row: row.cost.seconds)] == [50.0, 100.0]


def test_the_pareto_front_ranks_by_the_selection_score_and_keeps_ties():
    rows = rows_from([
        trial(0.90, 1, 0, train_seconds=100.0, score=0.80),
        trial(0.88, 1, 1, FROZEN, train_seconds=100.0, score=0.80),
        trial(0.95, 1, 2, COSINE, train_seconds=200.0, score=0.80),
    ])  # fmt: skip
    assert [row.trials[0].name for row in pareto_front(rows, lambda row: row.cost.seconds)] == ["run 0", "run 1"]
    losses = rows_from([trial(0.9, 1, n, treatment(optim_lr=n + 1.0), metric="loss", score=n / 10) for n in (1, 2)])
    assert [row.trials[0].name for row in pareto_front(losses, lambda row: row.cost.seconds)] == ["run 1"]


@pytest.mark.parametrize(("metric", "first"), [("accuracy", "a"), ("loss", "b")])
def test_a_sweep_picks_by_its_metric_on_the_selection_split(metric, first):
    rows = rows_from([
        trial(0.80, 1, 1, FROZEN, name="a", metric=metric, score=0.9),
        trial(0.95, 1, 2, COSINE, name="b", metric=metric, score=0.3),
        trial(0.99, 1, 3, name="c", metric=metric, score=float("nan")),
    ])  # fmt: skip
    assert [row.trials[0].name for row in by_score(rows)] == [first, "b" if first == "a" else "a", "c"]


def test_times_measured_elsewhere_stay_off_the_axis():
    report = report_of([trial(0.9), trial(0.9, 1, 1, FROZEN, measured_on="cuda"), trial(0.9, 1, 2, COSINE)])
    assert len(comparable_in_time(report)) == 2


def test_accuracies_by_depth_shallowest_first():
    rows = rows_from([trial(0.88, 1, 1, FROZEN), trial(0.90), trial(0.91, 1, 2, COSINE)])
    found = by_depth(rows)
    assert list(found) == [0, 3]
    assert [row.accuracy for row in found[0]] == pytest.approx([0.91, 0.90], abs=0.001)


def test_history_is_in_the_order_of_start_with_the_best_so_far_and_where_trials_were_stopped():
    stopped = replace(failed(Status.PRUNED, 3, treatment(optim_lr=1e-3)), accuracy=0.6)
    nothing = failed(Status.DIVERGED, 4, treatment(optim_lr=1.0))
    report = report_of([trial(0.90, 1, 2, COSINE), trial(0.85), trial(0.80, 1, 1, FROZEN), stopped, nothing])
    told = [(row.started_ms, round(row.accuracy_so_far, 2), round(best, 2)) for row, best in history(report)]
    assert told == [(0, 0.85, 0.85), (1, 0.8, 0.85), (2, 0.9, 0.9), (3, 0.6, 0.9)]


def test_importance_finds_the_parameter_that_moves_accuracy():
    rates = [10 ** (-5 + i / 20) for i in range(40)]
    rows = rows_from([
        trial(0.8 + 0.003 * i, 1, i, treatment(optim_lr=rate, scheduler_name=("linear", "cosine")[i % 2]))
        for i, rate in enumerate(rates)
    ])  # fmt: skip
    shares = importance(rows)
    assert list(shares) == ["optim.lr", "scheduler.name"]
    assert shares["optim.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_importance_of_few_trials_or_of_equal_ones_is_not_told():
    assert importance(rows_from(sweep(6))) == {}
    equal = [
        trial(0.8, 1, i, treatment(optim_lr=10**-i, scheduler_name=("linear", "cosine")[i % 2])) for i in range(40)
    ]
    assert importance(rows_from(equal)) == {}


def on_text(examples: int, accuracy: float, depth: int, rate: float = 2e-5):
    settings = treatment(freeze_layers=depth, optim_lr=rate) | {"data.max_train_examples": examples}
    place = examples * 10 + depth + round(rate * 1e6)
    return trial(accuracy, 1, place, settings, train_examples=examples, train_flops=examples * 1e9)


def test_the_data_curve_has_the_best_setting_of_each_amount_a_line_a_depth():
    trials = [on_text(n, a, depth) for n, a, depth in ((500, 0.8, 0), (1000, 0.84, 0), (2000, 0.9, 0), (1000, 0.83, 3))]
    worse = on_text(1000, 0.7, 0, rate=1e-3)
    curves = data_curve(report_of([trial(0.9, train_examples=2000), *trials, worse]))
    assert list(curves) == [0], "one amount makes no line"
    assert [(row.first_trial.train_examples, round(row.accuracy, 2)) for row in curves[0]] == [
        (500, 0.8),
        (1000, 0.84),
        (2000, 0.9),
    ]
    assert data_curve(report_of([trial(0.9, train_examples=500), trial(0.9, 1, 1, FROZEN, train_examples=500)])) == {}


def test_half_of_the_text_is_read_off_the_curve():
    rows = [rows_from([on_text(n, a, 0)])[0] for n, a in ((500, 0.8), (1000, 0.84), (2000, 0.9))]
    assert cost_of_halving_text(rows) == pytest.approx(6.0, abs=0.1)
    assert cost_of_halving_text([rows[0], rows[2]]) == pytest.approx(5.0, abs=0.1), (
        "half of the way, on a logarithmic axis"
    )
    far = rows_from([on_text(8000, 0.9, 0)])[0]
    assert cost_of_halving_text([rows[0], far]) == pytest.approx(2.5, abs=0.1)
