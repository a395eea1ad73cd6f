"""Grids and Optuna sweeps over the quick task: what is trained, in which order, and what a second call does."""

from __future__ import annotations

import os
import re
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml

from distilbench.sweep.job import directions_of
from distilbench.sweep.runner import _open_parent_run
from distilbench.sweep.storage import storage_at
from tests.made_store import make_store

pytestmark = pytest.mark.e2e
SPACE = ("hydra/sweeper=optuna", "freeze.layers=range(0,3)", "optim.lr=tag(log,interval(1e-5,1e-2))")


def done(workspace, *command, status=0, **environment):
    """Run a sweep that ends with ``status``, and return it."""
    ended = workspace.run(*command, **environment)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def test_a_grid_trains_its_baseline_first_then_each_cell_once_and_answers_at_once_when_asked_again(workspace):
    command = ("freeze.layers=2,0", "optim.lr=2e-5,1e-3", "sweep.name=grid")
    done(workspace, *command)
    assert [where for where, _ in workspace.finished()] == ["0", "1", "2", "3"]
    assert [what for _, what in workspace.finished()] == ["0/2e-05/42", "2/2e-05/42", "2/0.001/42", "0/0.001/42"]
    trials = workspace.study("grid")
    assert [t.user_attrs["baseline"] for t in trials] == [True, False, False, False]
    assert trials[1].params == {"freeze.layers": 2, "optim.lr": 2e-5}
    assert all(workspace.record("grid", t.number)["status"] == "FINISHED" for t in trials)
    again = done(workspace, *command)
    assert len(workspace.finished()) == 4
    assert "4 of 4 trials" in again.stdout
    assert "by another process" not in again.stdout, "it writes the report again"


@pytest.mark.parametrize(
    "space", [["freeze.layers=0,1"], ["hydra/sweeper=optuna", "optim.lr=interval(1e-5,1e-3)", "sweep.trials=2"]]
)
def test_relative_paths_mean_where_a_sweep_was_typed_and_typed_again_it_trains_nothing_twice(workspace, space):
    (workspace.path / "p.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(40)))
    places = ("data.train=p.csv", "hydra.sweeper.storage=sqlite:///s.db", "hydra.sweep.dir=sw", "hydra.job.chdir=true")
    for _ in range(2):
        done(workspace, *space, "data=files", "data.validation_fraction=0.3", "sweep.name=a", *places)
    assert [where for where, _ in workspace.finished()] == ["0", "1"]
    assert all((workspace.path / "sw" / number / "trial.json").exists() for number in "01")
    assert len(workspace.study("a", url=f"sqlite:///{workspace.path}/s.db")) == 2


@pytest.mark.parametrize("has_moved", [True, False])
def test_a_sweep_whose_trials_only_mlflow_has_is_warned_of_before_it_trains_all_again(tmp_path, caplog, has_moved):
    store, study = make_store(tmp_path), optuna.create_study()
    plan: Any = SimpleNamespace(name="moved", directory=tmp_path, settings=SimpleNamespace(margin=1.0))
    for one in (study, optuna.create_study() if has_moved else study):
        _open_parent_run(plan, one, storage_at(None, None, tmp_path), store, {})
    assert ("MLflow has trials of sweep moved, whose study is not here" in caplog.text) is has_moved


def test_a_baseline_outside_of_the_grid_is_trained_beside_it_for_each_seed(workspace):
    done(workspace, "freeze.layers=1,2", "seed=1,2", "sweep.name=grid")
    beside = [(where, what) for where, what in workspace.finished() if where.startswith("baseline/")]
    assert beside == [("baseline/0", "0/2e-05/1"), ("baseline/1", "0/2e-05/2")]
    assert len(workspace.finished()) == 6
    assert len(workspace.study("grid")) == 4


def test_without_a_baseline_there_is_none(workspace):
    done(workspace, "freeze.layers=1,2", "sweep.baseline=false", "sweep.name=grid")
    assert [what for _, what in workspace.finished()] == ["1/2e-05/42", "2/2e-05/42"]


def test_experiments_are_a_grid_whose_baseline_is_one_of_them(workspace):
    done(workspace, "experiment=layer_freezing,baseline", "model.layers=3", "seed=1,2", "sweep.name=report")
    assert [what for _, what in workspace.finished()] == ["0/2e-05/1", "0/2e-05/2", "3/2e-05/1", "3/2e-05/2"]


def test_cells_with_the_same_settings_are_trained_once(workspace):
    ended = done(workspace, "freeze=none,layers3", "freeze.layers=0,1", "sweep.name=grid")
    assert len(workspace.finished()) == 2
    assert Counter(t.user_attrs["status"] for t in workspace.study("grid")) == {"FINISHED": 2, "REUSED": 2}
    assert Counter(t.state.name for t in workspace.study("grid")) == {"COMPLETE": 4}
    assert "REUSED from 0" in ended.stdout


def test_an_optuna_sweep_counts_its_trials_in_all_and_begins_with_the_baseline(workspace):
    done(workspace, *SPACE, "sweep.name=first", "sweep.trials=3", "hydra.sweeper.sampler.seed=7")
    first = workspace.study("first")
    assert first[0].params == {"freeze.layers": 0, "optim.lr": 2e-5}
    assert first[0].user_attrs["baseline"]
    done(workspace, *SPACE, "sweep.name=first", "sweep.trials=5", "hydra.sweeper.sampler.seed=7")
    trials = workspace.study("first")
    assert [t.number for t in trials] == [0, 1, 2, 3, 4]
    assert len({str(t.params) for t in trials}) == 5, "a sampler's seed drew its first points again"
    assert [where for where, _ in workspace.finished()] == ["0", "1", "2", "3", "4"]
    results = yaml.safe_load((workspace.sweep("first") / "optimization_results.yaml").read_text())
    best = max(trials, key=lambda t: t.value)
    assert results == {"name": "optuna", "best_trial": str(best.number), "best_params": best.params,
                       "best_value": best.value}  # fmt: skip


def test_each_text_that_a_space_of_optuna_varies_has_a_baseline_of_its_own(workspace):
    done(workspace, "hydra/sweeper=optuna", "data.split_seed=1,2", "optim.lr=interval(1e-4,1e-3)", "sweep.trials=1")
    assert [what for where, what in workspace.finished() if where.startswith("baseline/")] == ["0/2e-05/42"] * 2


def test_a_baseline_outside_of_a_space_is_not_told_to_the_study(workspace):
    done(workspace, "hydra/sweeper=optuna", "optim.lr=interval(1e-3,1e-2)", "sweep.trials=2", "sweep.name=first")
    assert len(workspace.study("first")) == 2
    assert workspace.study("first", ".baseline")[0].state.name == "COMPLETE"
    assert workspace.finished()[0] == ("baseline/0", "0/2e-05/42")


def test_a_space_of_four_points_ends_after_four_and_says_so(workspace):
    ended = done(workspace, "hydra/sweeper=optuna", "freeze.layers=0,1", "scheduler=linear,cosine",
                 "sweep.trials=30", "sweep.name=small", "hydra/sweeper/sampler=random")  # fmt: skip
    assert len(workspace.finished()) == 4
    assert "every point of the space (4) has been evaluated" in ended.stdout


def test_keys_of_the_stock_sweeper_are_taken(workspace):
    done(workspace, "hydra/sweeper=optuna", "hydra/sweeper/sampler=nsgaii", "hydra.sweeper.n_trials=2",
         "hydra.sweeper.direction=minimize", "hydra.sweeper.study_name=mine", "hydra.sweeper.n_jobs=2",
         f"hydra.sweeper.storage=sqlite:///{workspace.path}/all.db", "sweep.objectives=[loss]",
         "+hydra.sweeper.params.freeze\\.layers='choice(0,1,2)'", "hydra.sweeper.max_failure_rate=0.5")  # fmt: skip
    import optuna

    trials = optuna.load_study(study_name="mine", storage=f"sqlite:///{workspace.path}/all.db").trials
    evaluated = [t for t in trials if t.user_attrs["status"] != "REUSED"]  # the sampler may draw a point again
    assert [t.user_attrs["status"] for t in evaluated] == ["FINISHED"] * 2
    assert trials[0].value == pytest.approx(1 - 1 / (1 + 2e-5))
    assert (workspace.sweep("mine") / "0" / "trial.json").is_file(), "the study's name names the sweep's directory"


def test_flops_are_an_objective_that_goes_down(workspace):
    ended = done(workspace, "freeze.layers=0,1,2", "optim.lr=2e-5,2", "sweep.objectives=[accuracy,train_flops]",
                 "sweep.name=costs")  # fmt: skip
    front = [trial.values for trial in workspace.study("costs") if trial.values]
    assert sorted(front) == [[pytest.approx(1 / (1 + 2e-5) - 0.01 * k), (6 - k) * 1e12] for k in (2, 1, 0)]
    assert directions_of(("accuracy", "train_flops")) == ["maximize", "minimize"]
    assert "train_flops" in ended.stdout


def test_a_pruner_takes_its_options_by_their_names(workspace):
    done(workspace, "freeze.layers=0,1", "sweep.pruner=median", "sweep.pruner_options.n_startup_trials=2",
         "sweep.name=grid")  # fmt: skip
    assert workspace.states("grid") == {"COMPLETE": 2}


def test_optunas_grid_sampler_is_a_grid(workspace):
    done(workspace, "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "freeze.layers=0,1,2", "sweep.name=grid")
    assert len(workspace.finished()) == 3


def test_failures_are_told_apart_and_end_the_sweep_at_the_limit(workspace):
    ended = done(workspace, "optim.lr=2e-5,2,3,4,5,6", "sweep.max_failures=2", "sweep.name=bad", status=1)
    assert "3 trials failed, which is more than sweep.max_failures allows" in ended.stderr
    counts = Counter(t.user_attrs.get("status", t.state.name) for t in workspace.study("bad"))
    assert counts == {"FINISHED": 1, "DIVERGED": 3, "WAITING": 2}
    assert "DIVERGED: the loss was nan" in ended.stdout
    more = done(workspace, "optim.lr=2e-5,2,3,4,5,6", "sweep.max_failures=9", "sweep.name=bad")
    assert "6 of 6 trials" in more.stdout


def test_a_sweep_whose_every_trial_failed_ends_with_its_table_and_a_status(workspace):
    ended = done(workspace, "optim.lr=2,3", "sweep.baseline=false", "sweep.max_failures=null", "sweep.name=bad",
                 status=1)  # fmt: skip
    assert "no trial of the sweep finished" in ended.stderr
    assert ended.stdout.count("DIVERGED: the loss was nan") >= 2


def test_after_its_time_a_sweep_begins_no_further_trial_and_continues_when_asked(workspace):
    command = ("freeze.layers=1,2", "seed=1,2,3", "sweep.name=timed")
    ended = done(workspace, *command, "sweep.timeout_minutes=0.01")
    assert ended.stdout.count("no further trial is begun") == 1, "two studies are asked, the baselines' and the sweep's"
    assert len(workspace.finished()) < 9
    done(workspace, *command, "sweep.timeout_minutes=3")
    assert len(set(workspace.finished())) == len(workspace.finished()) == 9


def test_a_directory_takes_one_sweep(workspace):
    here = "hydra.sweep.dir=fixed"
    done(workspace, "freeze.layers=0,1", "sweep.name=first", here)
    before = {path: path.read_bytes() for path in (workspace.path / "fixed").rglob("*.json")}
    refused = done(workspace, "freeze.layers=1,2", "sweep.name=second", here, status=2)
    assert "hydra.sweep.dir must be a new directory, or this sweep's own" in refused.stderr
    assert "which holds trials of sweep 'first'; take another sweep.name or hydra.sweep.dir" in refused.stderr
    (workspace.path / "fixed" / "study.db").rename(workspace.path / "study.db")
    gone = done(workspace, "freeze.layers=0,1", "sweep.name=first", here, status=2)
    assert "which holds trials of sweep 'first' whose study is gone" in gone.stderr
    assert not (workspace.path / "fixed" / "study.db").exists()
    namesake = ("freeze.layers=0,1", "sweep.name=first", "hydra.sweeper.storage=sqlite:///theirs.db")
    done(workspace, *namesake, "hydra.sweep.dir=elsewhere")
    assert "' whose study is gone, or another" in done(workspace, *namesake, here, status=2).stderr
    (workspace.path / "study.db").rename(workspace.path / "fixed" / "study.db")
    assert "2 of 2 trials" in done(workspace, "freeze.layers=0,1", "sweep.name=first", here).stdout
    assert before == {path: path.read_bytes() for path in (workspace.path / "fixed").rglob("*.json")}


@pytest.mark.parametrize(("model", "deepest"), [((), 2), (("model.layers=3",), 3), (("model.layers=4,3",), 3)])
def test_a_space_of_depths_follows_the_model_the_shallowest_of_several(workspace, model, deepest):
    done(workspace, "hydra/sweeper=optuna", "search=accuracy", *model, "sweep.trials=1", "sweep.name=deep")
    found = workspace.study("deep")[0].distributions["freeze.layers"]
    assert (found.low, found.high) == (0, deepest)


def test_only_points_of_the_space_are_checked(workspace):
    for name in ("one", "two"):
        (workspace.path / name).mkdir()
    refused = done(workspace, "model=local", f"model.checkpoint={workspace.path}/one,{workspace.path}/two", status=2)
    assert "got nothing" not in refused.stderr
    assert f"{workspace.path}/one" in refused.stderr


def test_optunas_grid_sampler_trains_no_more_trials_than_asked_for_and_the_dry_run_counts_the_same(workspace):
    command = ("hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "freeze.layers=0,1,2", "sweep.trials=2",
               "sweep.name=grid")  # fmt: skip
    assert "grid: 2 trials;" in done(workspace, *command, "sweep.dry_run=true").stdout
    done(workspace, *command)
    assert len(workspace.finished()) == 2


def test_another_space_under_the_same_name_is_refused_with_the_difference(workspace):
    done(workspace, *SPACE, "sweep.name=first", "sweep.trials=2")
    other = (*SPACE[:2], "optim.lr=tag(log,interval(1e-6,1e-2))", "sweep.name=first", "sweep.trials=3")
    refused = done(workspace, *other, status=2)
    assert re.search(r"optim\.lr 1e-05 to 0\.01, logarithmic \(now 1e-06 to 0\.01, logarithmic\)", refused.stderr)
    assert len(refused.stderr.strip().splitlines()) == 1
    done(workspace, *other, "sweep.on_change=extend")
    assert len(workspace.finished()) == 3
    epochs = done(workspace, *other, "train.epochs=2", "sweep.on_change=extend", status=2)
    assert "train.epochs 1 (now 2)" in epochs.stderr


def test_a_grid_is_extended_by_a_dimension_and_trains_only_what_is_new(workspace):
    extend = ("sweep.name=grid", "sweep.on_change=extend")
    done(workspace, "freeze.layers=0,1,2", *extend)
    done(workspace, "freeze.layers=2,1,0", "seed=41,42", *extend)
    assert [what for _, what in workspace.finished()[:3]] == ["0/2e-05/42", "1/2e-05/42", "2/2e-05/42"]
    assert sorted(what for _, what in workspace.finished()[3:]) == ["0/2e-05/41", "1/2e-05/41", "2/2e-05/41"]
    params = [trial.params.get("freeze.layers") for trial in workspace.study("grid")[:3]]
    assert params == [0, 1, 2], "choices are kept by their places: those of finished trials must not have moved"
    again = done(workspace, "freeze.layers=2,0,1", "seed=42,41", "sweep.name=grid")
    assert "6 of 6 trials" in again.stdout
    assert len(workspace.finished()) == 6


def test_a_grid_cut_short_goes_on_with_the_cells_of_its_new_space_alone(workspace):
    done(workspace, "freeze.layers=0,1,2", "sweep.name=grid", "sweep.timeout_minutes=0.001")
    done(workspace, "freeze.layers=0,1,2", "seed=42,43", "sweep.name=grid", "sweep.on_change=extend")
    seeds = {what for _, what in workspace.finished()}
    assert seeds == {f"{layers}/2e-05/{seed}" for layers in (0, 1, 2) for seed in (42, 43)}
    assert len(workspace.finished()) == 6


def test_an_optuna_sweep_is_extended_by_ranges_and_dimensions(workspace):
    extend = ("hydra/sweeper=optuna", "sweep.name=first", "sweep.on_change=extend", "scheduler=linear,cosine")
    done(workspace, *extend, "freeze.layers=range(0,2)", "sweep.trials=2")
    done(workspace, *extend, "freeze.layers=range(1,3)", "sweep.trials=4")
    done(workspace, *extend, "optim.lr=interval(1e-5,1e-3)", "sweep.trials=6")
    assert len(workspace.finished()) in (6, 7)  # a baseline outside of the second space is trained beside it


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (
            ["freeze.layers=0,1", "optim.lr=interval(1e-5,1e-2)"],
            "freeze.layers must stay what it was in this sweep, 0, 1, 2, but for the ends of a range, got 0, 1; ",
        ),
        (
            ["freeze.layers=0,1,2", "optim.lr=tag(log,interval(1e-5,1e-2))"],
            "optim.lr must stay what it was in this sweep, 1e-05 to 0.01, but",
        ),
        (
            ["freeze.layers=range(0,3)", "optim.lr=interval(1e-5,1e-2)"],
            "freeze.layers must stay what it was in this sweep, 0, 1, 2, but",
        ),
    ],
)
def test_what_optuna_cannot_take_is_refused_with_what_to_do(workspace, now, line):
    known = ("hydra/sweeper=optuna", "sweep.name=first")
    done(workspace, *known, "freeze.layers=0,1,2", "optim.lr=interval(1e-5,1e-2)", "sweep.trials=1")
    refused = done(workspace, *known, *now, "sweep.trials=3", "sweep.on_change=extend", status=2)
    assert line in refused.stderr
    assert "take another sweep.name" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert len(workspace.finished()) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["freeze.layers=0,3"], "freeze.layers must be 0..2"),
        (["freeze.layerz=0,1"], "layerz"),
        (["optim.lr=fast,slow"], "optim.lr"),
        (["optim.lr=interval(0,1)"], "add hydra/sweeper=optuna"),
        (["sweep.trials=2,3"], "sweep.trials must be one value for a whole sweep, got '2, 3'; run a sweep for each"),
        (
            ["seed=1,2", "output.dir=here"],
            "output.dir must be left to a sweep, which gives each trial its own, got 'here'",
        ),
        (["margin=1,2"], "margin must be one value for a whole sweep"),
        (["seed=1,2", "sweep.seeds=[3,4]"], "sweep.seeds must be null where seed varies, got [3, 4]; drop one"),
        (["seed=1,2", "hydra.sweeper.n_jobs=-1"], "hydra.sweeper.n_jobs must be 1 or more, got -1"),
        (["seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "joblib takes: n_jobs == 0"),
        (["seed=1,2", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials must be 1 or more"),
        (["seed=1,2", "hydra/sweeper=optuna", "hydra.sweeper.max_failure_rate=2"], "must be a share in [0, 1], got 2"),
        (["++optim.lrr=1,2"], "optim.lrr must be a setting that there is, got 1; --help lists them"),
        (["seed=range(2000)"], "to train them all: sweep.max_grid=2000"),
        (["seed=1,2", "sweep.name=../elsewhere"], "sweep.name must be letters"),
        (["seed=1,2", "sweep.pruner=best"], "sweep.pruner must be one of none, median"),
        (["seed=1,2", "sweep.pruner=median", "sweep.pruner_options.lower=1"], "sweep.pruner_options must be what"),
        (["seed=1,2", "sweep.pruner=median", "sweep.pruner_options.n_startup_trials=-2"], "cannot be negative"),
        (["seed=1,2", "sweep.pruner=hyperband", "sweep.pruner_options.min_resource=x"], "a number, auto or null"),
        (["seed=1,2", "sweep.pruner=median", "sweep.pruner_options.steps=1"], "steps must be a setting that there is"),
        (["seed=1,2", "sweep.pruner=median", "sweep.objectives=[train_flops,cost]"], "sweep.pruner must be none"),
        (["seed=1,2", "sweep.objectives=[speed]"], "sweep.objectives must be a list of accuracy"),
        (["seed=1,2", "hydra.sweeper.storage=sweeps.db"], "hydra.sweeper.storage must be the URL of a database"),
        (["seed=1,2", "hydra.sweeper.storage=postgresql://me:pw@127.0.0.1:9/x"], "must not hold a password"),
        (["seed=1,2", "hydra.sweeper.storage='mysql://me:pw${oc.env:HOME}@127.0.0.1:9/x'"], "must not hold a password"),
        (["seed=1,2", "hydra.sweeper.storage=postgresql+pg8000://me@127.0.0.1:9/x"], "run: pip install 'pg8000'"),
        pytest.param(
            ["seed=1,2", "hydra.sweeper.storage=postgresql://me@127.0.0.1:9/x"],
            "a storage that answers",
            marks=pytest.mark.skipif(not find_spec("psycopg"), reason="needs the driver of the extra postgresql"),
        ),
        (["seed=1,2", "hydra.sweeper.storage=sqlite:////nowhere/at/all.db"], "unable to open database file"),
        ([*SPACE, "hydra.sweeper.direction=[maximize,minimize]"], "hydra.sweeper.direction must be"),
        ([*SPACE, "hydra.sweeper.custom_search_space=math.hypot"], "suggest values to every trial, got TypeError"),
        ([*SPACE, "hydra.sweeper.sampler.n_startup_trials=many"], "n_startup_trials"),
        ([*SPACE, "hydra/sweeper/sampler=motpe", "sweep.dry_run=true"], "hydra.sweeper.sampler must be a sampler"),
        pytest.param(
            [*SPACE, "hydra/sweeper/sampler=cmaes"],
            "hydra.sweeper.sampler must be another without the package cmaes, got 'cmaes'; run: pip install cmaes",
            marks=pytest.mark.skipif(bool(find_spec("cmaes")), reason="is about what lacks"),
        ),
        ([*SPACE, "hydra/sweeper/sampler=motpe"], "hydra.sweeper.sampler must be a sampler"),
        (["hydra/sweeper=optuna", "hydra/sweeper/sampler=best", "seed=1,2"], "hydra/sweeper/sampler must be one of"),
    ],
)
def test_a_mistake_is_answered_before_the_first_trial_and_leaves_nothing(workspace, arguments, line):
    ended = workspace.run(*arguments)
    assert line in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "pw" not in ended.stderr
    own = ended.stderr.startswith("distilbench:")
    assert ended.returncode == 2, ended.stderr
    assert not own or len(ended.stderr.strip().splitlines()) == 1
    assert list(workspace.path.iterdir()) == []


def test_a_storage_named_by_the_environment_is_written_nowhere_but_as_its_name(workspace):
    url = f"sqlite:///{workspace.path}/between-us.db"
    done(workspace, *SPACE, "hydra.sweeper.storage=${oc.env:SWEEP_DATABASE}", "sweep.pruner=median", "sweep.trials=2",
         "sweep.name=named", SWEEP_DATABASE=url)  # fmt: skip
    assert len(workspace.study("named", url=url)) == 2
    told = [path for path in workspace.sweep("named").rglob("*") if path.is_file()]
    assert len(told) > 8
    assert [path for path in told if b"between-us" in path.read_bytes()] == []


def test_a_locked_storage_is_one_line(workspace):
    import sqlite3

    done(workspace, "seed=1,2", "sweep.name=locked")
    with sqlite3.connect(workspace.sweep("locked") / "study.db") as connection:
        connection.execute("BEGIN EXCLUSIVE")
        ended = done(workspace, "seed=1,2", "sweep.name=locked", status=2)
    assert "database is locked" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_two_processes_share_a_sweep_without_a_trial_done_twice(workspace):
    command = ("freeze.layers=0,1,2", "seed=1,2,3,4", "sweep.name=shared")
    both = [workspace.start(*command, TASK_MEET="2") for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    trials = workspace.study("shared")
    assert Counter(t.user_attrs["status"] for t in trials) == {"FINISHED": 12}
    assert len(set(workspace.finished())) == len(workspace.finished()) == 12
    assert len({t.user_attrs["owner"]["pid"] for t in trials}) == 2, "one of the two did nothing"


def test_joblib_gives_each_free_worker_the_next_trial(workspace):
    ended = done(workspace, "hydra/launcher=joblib", "hydra.sweeper.n_jobs=2", "freeze.layers=0,1,2", "seed=1,2",
                 "sweep.name=wide", TASK_MEET="2")  # fmt: skip
    assert "2 running" in ended.stdout
    assert len(set(workspace.finished())) == len(workspace.finished()) == 6
    owners = {workspace.record("wide", number)["owner"]["pid"] for number in range(6)}
    assert len(owners) == 2


def test_a_killed_worker_of_joblib_costs_its_trials_a_try_and_only_what_kills_it_each_time_has_failed(workspace):
    grid = "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "freeze.layers=0,1,2", "sweep.name=killed"
    ended = workspace.run(*grid, TASK_KILLED="1", TASK_MEET="2", TASK_LAST="1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    trials = workspace.study("killed")
    by_layers = {n: [t.user_attrs["status"] for t in trials if t.params["freeze.layers"] == n] for n in (0, 1, 2)}
    assert by_layers[0] == ["INTERRUPTED", "FINISHED"], "it was beside the one that was killed"
    assert by_layers[1] == ["INTERRUPTED", "INTERRUPTED", "FAILED"]
    assert by_layers[2] == ["FINISHED"]
    error = "its process was killed, perhaps for memory; it is tried again"
    assert {t.user_attrs["error"] for t in trials if t.user_attrs["status"] == "INTERRUPTED"} == {error}
    assert "2 running" in ended.stdout
    assert "3 of 3 trials, 1 failed" in ended.stdout
    assert "1 failed trial: sweep.retry_failed=true added to the command tries again" in ended.stdout


def screen(workspace, command, columns):
    """What a terminal of that width is sent, control codes taken out."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = workspace.start(*command, COLUMNS=str(columns), TASK_SECONDS="0.5", TERM="xterm", output=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how a terminal says that its last program has ended
            break
        if not part:
            break
        seen += part
    assert process.wait(timeout=60) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode()).replace("\r", "\n")


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_a_table_whose_figures_are_whole_and_no_launchers_lines(workspace, columns):
    command = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "freeze.layers=0,1,2", "optim.lr=2e-5,3e-4",
               "scheduler.name=linear,cosine", "sweep.name=live")  # fmt: skip
    shown = screen(workspace, command, columns)
    assert "99.00 %" in shown
    assert re.search(r"layers=1 .*RUNNING", shown)
    assert "FINISHED, baseline" in shown, "a narrow terminal cuts the settings, not the figures"
    assert "Joblib.Parallel" not in shown
    assert "HYDRA" not in shown
