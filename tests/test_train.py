"""The command line end to end, in processes: exit statuses, files, and MLflow's records read back."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.commands import HEAVY, Workspace, split_imports
from tests.conftest import TINY

pytestmark = pytest.mark.e2e
TINY_TRACKED = (*TINY[:2], "train.epochs=2", "optim.lr=1e-2", "train.logging_steps=5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tracked trial with its baseline trained first."""
    workspace = Workspace(tmp_path_factory.mktemp("trained"))
    done = workspace.run(*TINY_TRACKED, "freeze.layers=1", "baseline.ensure=true", "hydra.run.dir=out")
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace, done


def test_a_trial_leaves_its_directory_complete(trained):
    workspace, _ = trained
    out = workspace.path / "out"
    assert (out / ".hydra" / "overrides.yaml").is_file()
    record = json.loads((out / "trial.json").read_text())
    assert record["status"] == "FINISHED"
    assert 0.5 < record["accuracy"] <= 1
    assert not list(out.glob("**/checkpoint-*"))
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert AutoTokenizer.from_pretrained(out / "model")("a text")["input_ids"]


def test_mlflow_holds_settings_metrics_and_artifacts_of_trial_and_baseline(trained):
    workspace, _ = trained
    baseline, trial = workspace.runs()
    assert baseline.data.params["freeze.layers"] == "0"
    assert (baseline.info.run_name, trial.info.run_name) == ("baseline seed=42", "layers=1 lr=0.01 seed=42")
    assert {baseline.info.status, trial.info.status} == {"FINISHED"}
    assert trial.data.params["freeze.layers"] == "1"
    assert trial.data.tags["distilbench.protocol"] == baseline.data.tags["distilbench.protocol"]
    assert trial.data.tags["distilbench.status"] == "FINISHED"
    for metric in ("accuracy", "loss", "f1", "mcc", "train_seconds", "setup_seconds", "trainable_parameters"):
        assert metric in trial.data.metrics
    assert 0 < trial.data.metrics["train_flops"] < baseline.data.metrics["train_flops"]
    files = workspace.artifacts(trial.info.run_id)
    assert {"config.yaml", "predictions.parquet", "confusion_matrix.png", "learning_curve.png"} <= set(files)


def test_the_summary_names_what_was_used_and_compares_with_the_baseline(trained):
    _, done = trained
    for words in ("synthetic", "baseline", "McNemar", "accuracy"):
        assert words.lower() in done.stdout.lower(), words
    assert "\x1b[" not in done.stdout, "control codes in piped output"
    assert "http://127.0.0.1:5000/#/experiments/" in done.stdout


def test_the_same_command_gives_bitwise_the_same_result(trained):
    workspace, _ = trained
    again = workspace.run(*TINY_TRACKED, "freeze.layers=1", "tracking=none", "hydra.run.dir=again", fresh=True)
    assert again.returncode == 0, again.stderr
    first, second = (workspace.path / d / "model" / "model.safetensors" for d in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["freeze.layers=9"], "freeze.layers must be 0..2"),
        (["train.epochs=0"], "train.epochs must be 1 or more, got 0"),
        (["data=files", "data.train=missing.csv"], "data.train must be an existing"),
        (["scheduler.warmup_ratio=0.1", "scheduler.warmup_steps=3"], "set one of the two"),
        (["tracking=mlflow", "tracking.uri=http://me:pw@127.0.0.1:9"], "must not hold a password"),
        (["tracking=mlflow", "tracking.uri=ftp://somewhere"], "tracking.uri must be sqlite:///<file>, http"),
        (["optim.lr=choice(1e-5,2e-5)"], "optim.lr=choice(1e-5,2e-5) must be one value, or several with --multirun"),
        (["--multirun", "freeze.layers=0,1,7"], "freeze.layers must be 0..2"),
        (["--multirun", "seed=1,2", "optim.lr=1e-5,-1"], "optim.lr must be above 0, got -1.0"),
    ],
)
def test_a_mistake_costs_one_line_and_no_heavy_import_and_leaves_nothing(workspace, arguments, line):
    done = workspace.run(*TINY[:2], *arguments, fresh=True, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 2
    (said,), imported = split_imports(done.stderr)
    assert line in said
    assert "pw" not in said
    assert "hydra" in imported
    assert imported & HEAVY == set()
    assert list(workspace.path.iterdir()) == []


def test_an_unknown_key_is_answered_by_hydra(workspace):
    done = workspace.run(*TINY, "freeze.layerz=1")
    assert done.returncode == 2
    assert "layerz" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_groups_and_examples_and_imports_nothing_heavy(workspace):
    done = workspace.run("--help", fresh=True, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    for words in (
        "experiment: baseline, bias, full, head, hyperparameters, ia3, layer_freezing, lora, quick",
        "--multirun freeze.layers=0,3",
    ):
        assert words in done.stdout
    said, imported = split_imports(done.stderr)
    assert said == []
    assert imported & {*HEAVY, "optuna"} == set()


def test_hydras_own_grid_trains_each_cell_in_its_own_directory(workspace):
    done = workspace.with_store().run("--multirun", *TINY_TRACKED, "train.epochs=1", "freeze.layers=0,1",
                         "scheduler=linear,cosine", "hydra.sweep.dir=grid", "hydra/sweeper=basic")  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads((workspace.path / "grid" / str(i) / "trial.json").read_text()) for i in range(4)]
    assert [r["status"] for r in records] == ["FINISHED"] * 4
    names = [run.info.run_name for run in workspace.runs()]
    assert names == [
        "lr=0.01 seed=42",
        "scheduler=cosine lr=0.01 seed=42",
        "layers=1 lr=0.01 seed=42",
        "layers=1 scheduler=cosine lr=0.01 seed=42",
    ]


def test_a_diverged_trial_says_what_to_change_and_ends_with_one(workspace):
    done = workspace.with_store().run(
        *TINY_TRACKED, "optim=sgd", "optim.lr=1e30", "optim.max_grad_norm=0", "hydra.run.dir=out"
    )
    assert done.returncode == 1
    assert "DIVERGED" in done.stderr
    assert "optim.lr" in done.stderr
    assert "Traceback" not in done.stderr
    (run,) = workspace.runs()
    assert (run.info.status, run.data.tags["distilbench.status"]) == ("FAILED", "DIVERGED")


def wait_for_handlers(process) -> None:
    """Until Python itself has come up and runs the command's first lines, which takes longer on a busy machine."""
    caught = 0
    while not caught & 1 << signal.SIGTERM - 1:
        assert process.poll() is None
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells when the command has come up")
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 0.6, 1.0, 1.5])
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_a_signal_before_anything_has_begun_is_one_line_at_most(workspace, signum, status, seconds):
    process = workspace.start("--multirun", *TINY, "freeze.layers=0,1", fresh=True)
    wait_for_handlers(process)
    time.sleep(seconds)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert len(err.splitlines()) <= 1, err


@pytest.mark.parametrize(
    ("signum", "status", "engine"),
    [(signal.SIGINT, 130, "trainer"), (signal.SIGTERM, 143, "trainer"), (signal.SIGTERM, 143, "fused")],
    ids=["ctrl-c", "sigterm", "fused"],
)
def test_an_interrupted_trial_is_closed_and_resumes_to_the_same_result(workspace, signum, status, engine):
    long = (*TINY_TRACKED, f"engine={engine}", "data.max_train_examples=1200", "train.epochs=3", "optim.lr=1e-3")
    whole = workspace.run(*long, "tracking=none", "hydra.run.dir=whole") if signum == signal.SIGTERM else None
    process = workspace.with_store().start(*long, "hydra.run.dir=out")
    deadline = time.monotonic() + 120
    while not list(workspace.path.glob("out/**/seal.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    (line,) = err.strip().splitlines()
    continuing = f"distilbench: interrupted; to continue: cd {workspace.path} && python -m distilbench.train "
    assert line.startswith(continuing)  # wherever it is typed, relative paths stay what they were
    (run,) = workspace.runs()
    assert (run.info.status, run.data.tags["distilbench.status"]) == ("KILLED", "INTERRUPTED")
    resumed = workspace.run(*shlex.split(line.split("distilbench.train ")[1]))
    assert resumed.returncode == 0, resumed.stderr
    (run,) = workspace.runs()
    assert (run.info.status, run.data.tags["distilbench.status"]) == ("FINISHED", "FINISHED")
    if whole is None:
        again = workspace.run(*long, "train.resume=true", "hydra.run.dir=out")
        assert again.returncode == 2
        assert "which FINISHED with accuracy" in again.stderr
    else:
        assert whole.returncode == 0, whole.stderr
        a, b = (workspace.path / d / "model" / "model.safetensors" for d in ("whole", "out"))
        assert a.read_bytes() == b.read_bytes()


def test_a_server_out_of_reach_is_found_before_training(workspace):
    done = workspace.run(*TINY[:2], MLFLOW_TRACKING_URI="http://me:pw@127.0.0.1:9")
    assert done.returncode == 2
    assert re.search(r"127\.0\.0\.1:9", done.stderr)
    assert "pw" not in done.stdout + done.stderr


def test_without_a_baseline_the_summary_gives_the_command_that_makes_one(workspace):
    done = workspace.with_store().run(*TINY_TRACKED, "train.epochs=1", "freeze.layers=2", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    (command,) = re.findall(r"python -m distilbench\.train .*", done.stdout.replace("\\\n", " "))
    assert "freeze.layers" not in command
    assert "model=tiny" in command
    assert "optim.lr" not in command, "the baseline's learning rate is the report's"
