"""Optuna's pruners as a trial's process asks them: of one objective, and of one among several."""

from __future__ import annotations

from types import SimpleNamespace

import optuna
import pytest

from distilbench.results import Owner
from distilbench.settings import SettingsError
from distilbench.sweep.job import SweepJob, objectives_of
from distilbench.sweep.pruning import check_pruning, judged_by, pruning_callback

MEDIAN = SimpleNamespace(pruner="median", pruner_options={"n_startup_trials": 1, "percentile": None}, grace_seconds=60)


@pytest.mark.parametrize(
    ("objectives", "directions", "behind"),
    [
        (("accuracy", "train_flops"), ["maximize", "minimize"], 0.6),
        (("train_flops", "loss"), ["minimize", "minimize"], 0.8),
        (("accuracy",), ["maximize"], 0.6),
    ],
)
def test_trials_are_pruned_by_the_objective_that_is_measured_on_the_way(tmp_path, objectives, directions, behind):
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=url, study_name="both", directions=directions)
    first = study.ask()
    study._storage.set_trial_intermediate_value(first._trial_id, 1, 0.7)
    study.tell(first, [0.7] * len(objectives))

    def callback():
        job = SweepJob("both", "1", "", (), False, None, Owner.of_this_process(), tmp_path, objectives,
                       storage=url, trial_id=study.ask()._trial_id, grace_seconds=60,
                       prunes=True)  # fmt: skip
        return pruning_callback(job, MEDIAN)

    assert callback()(behind, 1) == f"{judged_by(objectives)} {behind:.4f} at evaluation 1 (median)"
    assert callback()(0.7, 1) is None
    assert callback()(float("nan"), 1) is None
    kept = optuna.load_study(storage=url, study_name="both")
    assert [trial.intermediate_values for trial in kept.trials] == [{1: 0.7}, {1: behind}, {1: 0.7}, {}]
    assert [direction.name.lower() for direction in kept.directions] == directions


def test_a_pruner_that_these_objectives_leave_nothing_to_judge_is_refused():
    check_pruning(MEDIAN, ["train_flops", "f1"])
    with pytest.raises(SettingsError, match=r"sweep.pruner must be none for .*'train_flops', 'train_seconds'"):
        check_pruning(MEDIAN, ["train_flops", "train_seconds"])
    wilcoxon = SimpleNamespace(pruner="wilcoxon", pruner_options={})
    check_pruning(wilcoxon, ["loss"])
    with pytest.raises(SettingsError, match="must be another than wilcoxon"):
        check_pruning(wilcoxon, ["loss", "train_flops"])
    check_pruning(SimpleNamespace(pruner="none", pruner_options={"percentile": 75.0}), ["train_flops"])


@pytest.mark.parametrize(("alone", "cost"), [(True, "train_seconds"), (False, "train_flops")])
def test_cost_is_seconds_where_trials_run_alone_and_flops_where_they_share_a_device(alone, cost):
    settings = SimpleNamespace(sweep=SimpleNamespace(objectives=["accuracy", "cost"]))
    assert objectives_of(settings, alone) == ("accuracy", cost)
