"""``hydra/launcher=fused``: Hydra's own suite for launchers, a task that takes batches, and trials end to end."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from omegaconf import OmegaConf

from distilbench.results import Owner, Record, Status
from distilbench.sweep import executors
from tests.commands import Workspace
from tests.conftest import TINY

Plugins.instance()  # once before Hydra's fixture saves and restores what plugins registered


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", [])])
class TestTasksThatAreNoTrials(LauncherTestSuite):
    """Hydra's suite for every launcher."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({"defaults": [{"override hydra/launcher": "fused"}]}, ["-m"])],
)
class TestAnApplicationOfSomeoneElse(IntegrationTestSuite):
    """Hydra's suite for launchers in a process of their own."""


class Doubling:
    """Batches of jobs whose result is twice their ``foo``; ``bar=13`` is refused."""

    def __init__(self, limit: int) -> None:
        assert limit == 5

    def describe(self, config):
        if config.bar == 13:
            raise ValueError("no thirteen")
        place = HydraConfig.get()
        return {"foo": config.foo, "out": place.runtime.output_dir, "num": place.job.num, "env": os.environ["JOB"]}

    def train(self, jobs):
        assert os.environ["SHARED"] == "all"
        return [self.conclusion(job) for job in jobs]

    def conclusion(self, job):
        def conclude(config):
            if job["foo"] == 20 and config.bar == 7:
                raise RuntimeError("seven is too much for twenty")
            return 2 * job["foo"], job

        return conclude


def task(config):
    raise AssertionError("jobs are trained together")


@pytest.fixture
def returns(hydra_restore_singletons, hydra_sweep_runner, tmpdir):
    """What four jobs came to, and their folder: two groups by ``bar`` values as given."""

    def run(bars: str):
        environment = ["+hydra.job.env_set.JOB=j${hydra.job.num}", "+hydra.job.env_set.SHARED=all"]
        overrides = ["hydra/launcher=fused", "hydra.launcher.max_trials=5", "group1=file1,file2", f"bar={bars}"]
        runner = hydra_sweep_runner(
            calling_file=None, calling_module="hydra.test_utils.a_module", task_function=task, config_path="configs",
            config_name="compose.yaml", overrides=overrides + environment, temp_dir=tmpdir,
        )  # fmt: skip
        runner.batch_trainer = Doubling  # Hydra's fixture is the task function that the launcher sees
        runner.__enter__()
        return list(runner.returns[0]), Path(str(tmpdir))

    try:
        yield run
    finally:
        logging.getLogger().handlers.clear()


def test_results_keep_the_order_of_the_jobs(returns):
    jobs, _ = returns("1,2")
    assert [job.return_value[0] for job in jobs] == [20, 20, 40, 40]
    assert [job.return_value[1]["num"] for job in jobs] == [0, 1, 2, 3]
    assert [job.overrides for job in jobs][1] == ["group1=file1", "bar=2"]


def test_a_job_is_described_in_its_own_directory_and_environment_and_trained_in_the_shared_one(returns):
    jobs, folder = returns("1,2")
    assert [job.return_value[1]["out"] for job in jobs] == [str(folder / str(i)) for i in range(4)]
    assert [job.return_value[1]["env"] for job in jobs] == ["j0", "j1", "j2", "j3"]
    assert "JOB" not in os.environ
    assert "SHARED" not in os.environ


def test_the_log_tells_what_varies_in_a_job_and_not_how_hydra_is_led_to_it(caplog):
    loader = SimpleNamespace(load_sweep_config=lambda config, overrides: OmegaConf.create({"hydra": {"job": {}}}))
    overrides = ["optim.lr=1", "+seed=2", "hydra.sweep.subdir=3", "++hydra.job.env_set.JOB='x'"]
    with caplog.at_level("INFO"):
        executors._compose(OmegaConf.create(), SimpleNamespace(config_loader=loader), overrides, 3)
    assert caplog.messages == ["\t#3 : optim.lr=1 seed=2"]


def test_every_job_has_its_own_hydra_folder(returns):
    _, folder = returns("1,2")
    for i in range(4):
        assert OmegaConf.load(folder / str(i) / ".hydra" / "hydra.yaml").hydra.job.num == i


def test_a_job_that_is_refused_or_fails_leaves_the_others_alone(returns, tmpdir):
    with pytest.raises(ValueError, match="no thirteen"):
        returns("7,13")
    said = [Path(str(tmpdir), str(i), "a_module.log").read_text() for i in range(4)]
    assert "Job failed" not in said[0]
    assert ["no thirteen" in text for text in said] == [False, True, False, True]
    assert "seven is too much for twenty" in said[2]


TRIALS = ("--multirun", *TINY[:2], "hydra/launcher=fused", "engine=fused", "train.logging_steps=5", "train.epochs=2")
BATCH = (*TRIALS, "hydra/sweeper=basic", "hydra.sweep.dir=sweep")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four trials in two groups, the first of which holds the baselines."""
    workspace = Workspace(tmp_path_factory.mktemp("batch")).with_store()
    arguments = ("freeze.layers=1,0", "optim.lr=1e-3,1e-2", 'baseline.overrides=["freeze=none"]')
    done = workspace.run(*BATCH, *arguments, "hydra.job.chdir=false")
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace, done


@pytest.mark.e2e
def test_a_batch_leaves_every_trial_as_complete_as_one_on_its_own(trained):
    workspace, _ = trained
    for i in range(4):
        folder = workspace.path / "sweep" / str(i)
        record = json.loads((folder / "trial.json").read_text())
        assert record["status"] == "FINISHED"
        assert (folder / "model" / "model.safetensors").is_file()
        overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
        assert f"freeze.layers={1 - i // 2}" in overrides
        assert (folder / "train.log").is_file()


@pytest.mark.e2e
def test_mlflow_has_a_run_for_each_trial_that_says_in_what_company_it_was_trained(trained):
    workspace, _ = trained
    runs = workspace.runs()
    assert len(runs) == 4
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["distilbench.alone"] == "false"
        assert run.data.metrics["num_trials_in_batch"] == 2
        assert run.data.metrics["batch_seconds"] >= run.data.metrics["train_seconds"] > 0
        assert run.data.metrics["solo_seconds_estimate"] > 0


@pytest.mark.e2e
def test_trials_of_a_batch_are_compared_with_the_baselines_in_it_and_in_time_by_estimates_marked_so(trained):
    workspace, _ = trained
    runs = {run.info.run_name: run for run in workspace.runs()}
    frozen = runs["layers=1 seed=42"]
    text = workspace.artifacts(frozen.info.run_id)["comparison.md"].read_text()
    assert "This trial: layers=1. Baseline: layers=0." in text
    assert text.count("| about\N{NO-BREAK SPACE}") == 2
    base = runs["baseline seed=42"]
    assert "comparison.md" not in workspace.artifacts(base.info.run_id)


@pytest.mark.e2e
def test_a_trial_gives_the_same_result_alone_as_in_its_batch(trained):
    workspace, _ = trained
    alone = workspace.run(*TINY[:2], "engine=fused", "train.epochs=2", "freeze.layers=1", "optim.lr=1e-2",
                          "tracking=none", "hydra.run.dir=alone")  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    first, second = (json.loads((workspace.path / d / "trial.json").read_text()) for d in ("alone", "sweep/1"))
    assert first["accuracy"] == second["accuracy"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


@pytest.mark.e2e
def test_a_trial_that_diverges_fails_as_a_job_and_leaves_its_batch_alone(tmp_path):
    workspace = Workspace(tmp_path).with_store()
    done = workspace.run(*BATCH, "optim=sgd", "optim.max_grad_norm=0", "optim.lr=1e30,1e-1")
    assert done.returncode == 1
    assert "DIVERGED" in done.stderr
    assert [(r.info.status, r.data.tags["distilbench.status"]) for r in workspace.runs()] == [
        ("FAILED", "DIVERGED"),
        ("FINISHED", "FINISHED"),
    ]
    assert "TrialFailed" in (tmp_path / "sweep" / "0" / "train.log").read_text()
    assert json.loads((tmp_path / "sweep" / "1" / "trial.json").read_text())["status"] == "FINISHED"


@pytest.mark.e2e
def test_a_mistake_in_one_trial_of_a_batch_is_answered_before_any_is_trained(tmp_path):
    workspace = Workspace(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(40)))
    mine = ("data=files", "data.train=train.csv", "data.text_column=text,txet")
    done = workspace.run(*(argument for argument in BATCH if argument != "data=synthetic"), *mine)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "txet" in line
    assert not list(tmp_path.glob("sweep/*/trial.json"))
    assert workspace.runs() == []
    done = workspace.run(*BATCH, "hydra.launcher.max_trials=0")
    assert done.returncode == 2
    assert "hydra.launcher.max_trials must be 1 or more, got 0" in done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("seeds", [(), ("sweep.seeds=[1,2]",)])
def test_a_trial_of_a_sweep_that_cannot_start_has_the_reason_in_its_record_and_the_others_are_trained(tmp_path, seeds):
    given = (*TRIALS, "freeze=none,gradual", "train.eval_steps=5000", "sweep.name=mixed", "hydra.sweep.dir=sweep")
    done = Workspace(tmp_path).run(*given, "tracking=none", *seeds)
    assert done.returncode == 2, done.stdout + done.stderr
    reason = "train.eval_steps must be at most"
    (line,) = done.stderr.strip().splitlines()
    assert reason in line
    trained, refused = (json.loads((tmp_path / "sweep" / str(i) / "trial.json").read_text()) for i in range(2))
    assert trained["status"] == "FINISHED"
    assert refused["status"] == "INTERRUPTED"  # the same command takes it up, once that is mended
    assert reason in refused["error"]


@pytest.mark.e2e
def test_sigterm_ends_every_trial_of_the_batch_as_interrupted(tmp_path):
    workspace = Workspace(tmp_path).with_store()
    process = workspace.start(*BATCH, "seed=1,2", "data.max_train_examples=4000", "train.epochs=20")
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("sweep/*/checkpoints/*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert [(r.info.status, r.data.tags["distilbench.status"]) for r in workspace.runs()] == [
        ("KILLED", "INTERRUPTED")
    ] * 2
    assert {json.loads(p.read_text())["status"] for p in tmp_path.glob("sweep/*/trial.json")} == {"INTERRUPTED"}


@pytest.mark.e2e
def test_an_optuna_sweep_trains_its_batches_at_once_and_prunes_within_them(tmp_path):
    workspace = Workspace(tmp_path).with_store()
    done = workspace.run(
        *TRIALS, "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=3", "sweep.trials=3", "sweep.name=together",
        "sweep.baseline=false", "sweep.pruner=threshold", "sweep.pruner_options.lower=0.9",
        "optim.lr=choice(1e-6,1e-2,2e-2)", "hydra/sweeper/sampler=grid", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads((tmp_path / "sweep" / str(i) / "trial.json").read_text()) for i in range(3)]
    assert sorted(record["status"] for record in records) == ["FINISHED", "FINISHED", "PRUNED"]
    children = [run for run in workspace.runs() if "distilbench.trial" in run.data.tags]
    assert {run.data.metrics["num_trials_in_batch"] for run in children} == {3}
    for run in children:
        record = records[int(run.data.tags["distilbench.trial"])]
        assert run.data.tags["distilbench.status"] == record["status"]
        assert run.data.tags["distilbench.sweep"] == "together"
        assert (tmp_path / "sweep" / run.data.tags["distilbench.trial"] / ".hydra" / "config.yaml").is_file()


@pytest.mark.e2e
def test_a_grid_of_ours_trains_all_cells_at_once_and_continues_without_the_finished_ones(tmp_path):
    workspace = Workspace(tmp_path).with_store()
    arguments = (*TRIALS, "sweep.name=grid", "sweep.baseline=false", "hydra.sweep.dir=sweep")
    done = workspace.run(*arguments, "seed=1,2,3")
    assert done.returncode == 0, done.stdout + done.stderr
    children = [run for run in workspace.runs() if "distilbench.trial" in run.data.tags]
    assert [run.data.metrics["num_trials_in_batch"] for run in children] == [3, 3, 3]
    again = workspace.run(*arguments, "seed=1,2,3")
    assert again.returncode == 0, again.stdout + again.stderr
    assert len([run for run in workspace.runs() if "distilbench.trial" in run.data.tags]) == 3


@pytest.mark.e2e
def test_the_seeds_of_trials_are_trained_at_once_and_each_trial_ends_as_its_seeds_do(tmp_path):
    workspace = Workspace(tmp_path).with_store()
    done = workspace.run(
        *TRIALS, "sweep.name=seeds", "sweep.baseline=false", "sweep.seeds=[1,2]", "sweep.max_failures=1",
        "optim=sgd", "optim.max_grad_norm=0", "optim.lr=1e-2,1e30", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {run.info.run_name: run for run in workspace.runs()}
    seeds = [run for name, run in runs.items() if "seed=" in name]
    assert [run.data.metrics["num_trials_in_batch"] for run in seeds] == [4] * 4
    first, second = (json.loads((tmp_path / "sweep" / str(i) / "trial.json").read_text()) for i in range(2))
    assert (first["status"], first["figures"]["seeds"], second["status"]) == ("FINISHED", 2, "DIVERGED")
    each = [json.loads((tmp_path / "sweep" / "0" / f"seed-{i}" / "trial.json").read_text())["accuracy"] for i in (1, 2)]
    assert first["accuracy"] == pytest.approx(sum(each) / 2)
    ends = {name: run.data.tags["distilbench.status"] for name, run in runs.items()}
    assert {name: end for name, end in ends.items() if "1e+30" in name} == dict.fromkeys(
        ("1 lr=1e+30", "1 lr=1e+30 seed=1", "1 lr=1e+30 seed=2"), "DIVERGED"
    )
    assert len([end for end in ends.values() if end == "FINISHED"]) == 4


def test_a_sweep_that_minimises_time_takes_a_batched_trials_estimate_for_its_own():
    owner = Owner("host", 1, 0.0)
    alone = Record({}, Status.FINISHED, owner, figures={"train_seconds": 4.0})
    shared = Record({}, Status.FINISHED, owner, figures={"train_seconds": 30.0, "solo_seconds_estimate": 5.0})
    assert (alone.objective("train_seconds"), shared.objective("train_seconds")) == (4.0, 5.0)


@pytest.mark.e2e
def test_a_model_that_the_engine_does_not_take_is_answered_before_anything_is_written(tmp_path):
    workspace = Workspace(tmp_path)
    done = workspace.run(*BATCH, "model.checkpoint=electra", "seed=1,2")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "use engine=trainer" in line
    assert list(tmp_path.iterdir()) == []
