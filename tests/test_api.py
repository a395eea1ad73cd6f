"""The package from Python: nothing heavy at import, the commands' own results, mistakes as exceptions of one line."""

from __future__ import annotations

import logging
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import distilbench
from distilbench.cli import CommandFailed
from distilbench.results import Status, Verdict
from distilbench.settings import SettingsError
from tests.commands import HEAVY, lay_tables
from tests.conftest import ROOT, TINY


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the quickstart leaves behind: its variables."""
    folder = tmp_path_factory.mktemp("quickstart")
    lay_tables(folder / "mlflow.db")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILBENCH_ROOT", str(folder))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        arguments = list(sys.argv)
        found = runpy.run_path(str(ROOT / "docs" / "quickstart.py"))
        assert sys.argv == arguments
    yield found
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, distilbench; print(sorted(set(sys.modules) & set(sys.argv[1:])), distilbench.__version__)"
    asked = [sys.executable, "-c", code, *HEAVY, "hydra", "omegaconf", "optuna", "rich", "distilbench.settings"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {distilbench.__version__}"


def test_one_trial_comes_back_with_its_result_and_its_verdict(shown):
    trial = shown["trial"]
    assert trial.result.status is Status.FINISHED
    assert trial.settings.freeze.layers == 1
    assert trial.comparison.row.verdict in list(Verdict)
    assert trial.predictions.correct.mean() == pytest.approx(trial.result.report.accuracy)


def test_several_trials_come_back_in_their_order(shown):
    first, second = shown["trials"]
    assert (first.settings.optim.lr, second.settings.optim.lr) == (3e-3, 1e-2)
    assert first.result.num_trials_in_batch == second.result.num_trials_in_batch == 2


def test_a_sweep_is_reported_as_objects_and_as_a_table(shown):
    report, table = shown["report"], shown["table"]
    assert [row.is_baseline for row in report.rows] == list(table["is_baseline"])
    assert sorted(row.treatment["freeze.layers"] for row in report.rows) == [0, 2]
    assert list(table["accuracy"]) == pytest.approx([row.accuracy for row in report.rows], abs=1e-4)


def test_its_model_answers_texts(shown):
    answers = shown["answers"]
    assert list(answers.columns) == ["prediction", "probability_negative", "probability_positive"]
    assert list(answers["prediction"].isna()) == [False, False, True]


def test_settings_are_composed_and_checked():
    settings = distilbench.compose(*TINY, "freeze.layers=2", "output.dir=here")
    assert (settings.freeze.layers, settings.output.dir) == (2, str(Path.cwd() / "here"))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: distilbench.compose(*TINY, "freeze.layers=3"), r"^freeze.layers must be 0..2 for random"),
        (lambda: distilbench.compose("freeze.layer=3"), r"^freeze.layer must be a setting that there is; did you mean"),
        (lambda: distilbench.compose("scheduler=cosin"), r"^scheduler must be one of constant"),
        (lambda: distilbench.compose(["seed=1"]), r"^an override must be a string such as .*, got \['seed=1'\]"),
        (lambda: distilbench.train_trials(["seed=1"]), r"^a trial must be a list of overrides, got 'seed=1'"),
        (lambda: distilbench.train_trials([[*TINY, "optim.lr=0"]]), r"^optim.lr must be above 0"),
        (lambda: distilbench.make_report("layout=paper"), r"^what to compare must be"),
        (lambda: distilbench.predict_texts(["a"], "dir=nowhere"), r"^dir must be an existing directory"),
        (lambda: distilbench.run_sweep(*TINY, "freeze.layers=0,9"), r"^freeze.layers must be 0..2"),
        (lambda: distilbench.run_sweep(*TINY, "scheduler=cosin"), r"^scheduler must be one of constant"),
    ],
)
def test_a_mistake_is_an_exception_of_one_line(call, line):
    with pytest.raises(SettingsError, match=line) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_names_and_ids_in_a_table_stay_what_they_are(monkeypatch):
    header = "trial,slice,seeds,protocol,runs,p"
    monkeypatch.setattr("distilbench.report.tables.csv_report", lambda _: f"{header}\n03,NA,1,123456789e12,007,\n")
    row = distilbench.to_table(None).iloc[0]
    assert list(row[:-1]) == ["03", "NA", "1", "123456789e12", "007"]
    assert row["p"] != row["p"]


def test_a_sweep_that_fails_raises(tmp_path, monkeypatch):
    def fail(*asked):
        raise CommandFailed("3 trials failed")

    monkeypatch.setattr("distilbench.sweep.runner.run_sweep", fail)
    with pytest.raises(CommandFailed, match="3 trials failed"):
        distilbench.run_sweep(*TINY, f"hydra.sweep.dir={tmp_path}")


def test_settings_of_sweeps_are_refused_for_a_trial():
    with pytest.raises(SettingsError, match=r"^sweep.seeds must be left to a sweep, got '\[1,2\]'; add --multirun"):
        distilbench.compose(*TINY, "sweep.seeds=[1,2]")
