"""A real MLflow server, with a login: busy, gone across trials' ends and starts, and shared by two checkouts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest

from tests.commands import Workspace, lay_tables
from tests.sweep.conftest import SweepWorkspace

pytestmark = pytest.mark.e2e
SECRET = "correct-horse-battery"
SMALL = ("data.max_train_examples=64", "output.save_model=false", "optim.lr=1e-2", "train.logging_steps=1",
         "baseline.overrides=['freeze=none']")  # fmt: skip


class Server:
    """``mlflow server`` on loopback that asks for a login, and comes back at the same port."""

    def __init__(self, folder) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": SECRET}
        self.config = folder / "auth.ini"
        self.config.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\n"
            f"admin_username = admin\nadmin_password = {SECRET}\n"
            "auth_cache_ttl_seconds = 600\n"  # to check a password takes 70 ms, and each request has one
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        lay_tables(folder / "runs.db")
        self.start()
        deadline = time.monotonic() + 300
        while not self.answers() and time.monotonic() < deadline:
            assert self.process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)

    def start(self) -> None:
        options = ["--app-name", "basic-auth", "--workers", "1", "--port", str(self.port),
                   "--backend-store-uri", f"sqlite:///{self.folder}/runs.db",
                   "--artifacts-destination", str(self.folder / "artifacts")]  # fmt: skip
        known = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_AUTH_CONFIG_PATH": str(self.config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs cookies",
        }
        command = [sys.executable, "-m", "mlflow", "server", *options]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | known, stdout=log, stderr=log, start_new_session=True
            )

    def answers(self) -> bool:
        try:
            return urlopen(f"{self.url}/health", timeout=1).status == 200
        except OSError:
            return False

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def take_away(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("flask_wtf", reason="MLflow's login needs Flask-WTF: pip install 'mlflow[auth]'")
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    if server.process.poll() is None:
        server.take_away()


@pytest.fixture
def workspace(tmp_path):
    workspace = SweepWorkspace(tmp_path)
    yield workspace
    workspace.end()


@pytest.fixture
def client(server, monkeypatch):
    from mlflow import MlflowClient

    for name, value in server.login.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(server.url)


def start(workspace, server, *arguments, **environment):
    known = {"MLFLOW_TRACKING_URI": server.url, **server.login}
    return workspace.start(*SMALL, *arguments, real=True, **known | environment)


def children(client, sweep):
    experiment = client.get_experiment_by_name("distilbench").experiment_id
    runs = client.search_runs([experiment], f"tags.`distilbench.sweep` = '{sweep}'")
    return {run.data.tags.get("distilbench.trial", "the sweep"): run for run in runs}


def record_of(workspace, sweep, number):
    try:
        return workspace.record(sweep, number)
    except (OSError, ValueError):
        return {}


def wait_until(process, holds) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_is_busy_then_gone_for_a_while_costs_a_sweep_nothing(server, client, workspace):
    server.send(signal.SIGSTOP)
    process = start(workspace, server, "freeze.layers=0,1,2", "sweep.name=outage", "train.epochs=3")
    time.sleep(6)  # busy: it accepts and does not answer yet
    server.send(signal.SIGCONT)
    wait_until(process, lambda: record_of(workspace, "outage", 0).get("run_id"))
    server.take_away()
    wait_until(process, lambda: record_of(workspace, "outage", 1).get("status") == "FINISHED")
    assert record_of(workspace, "outage", 0)["status"] == "FINISHED"
    assert (workspace.sweep("outage") / "1" / "undelivered" / "run.json").is_file()
    server.start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    assert "verdict" in out, "no report"
    runs = children(client, "outage")
    assert sorted(runs) == ["0", "1", "2", "the sweep"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for number in "012":
        record, run = workspace.record("outage", number), runs[number]
        assert (record["run_id"], record["status"]) == (run.info.run_id, run.data.tags["distilbench.status"])
        assert run.data.metrics.items() >= record["figures"].items()
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == list(range(1, int(record["figures"]["steps"]) + 1))
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "predictions.parquet", "confusion_matrix.png", "learning_curve.png"} <= files
        assert run.data.tags["mlflow.parentRunId"] == runs["the sweep"].info.run_id
        assert run.data.params["freeze.layers"] == number
    assert not list(workspace.path.rglob("undelivered"))
    written = [*workspace.path.rglob("*"), *server.folder.rglob("*")]
    files = [path for path in written if path.is_file() and path != server.config]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in out + err


def test_two_checkouts_that_share_a_study_and_a_server_make_one_report_that_any_third_can_read(
    server, client, tmp_path
):
    roots = [SweepWorkspace(tmp_path / "first"), SweepWorkspace(tmp_path / "second")]
    third = Workspace(tmp_path / "third")
    for workspace in (*roots, third):
        workspace.path.mkdir()
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db"
    command = ("freeze.layers=0,1", "seed=1,2", "sweep.name=shared", "train.epochs=1", storage)
    at_work = [start(workspace, server, *command) for workspace in roots]
    for process in at_work:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert "4 of 4 trials" in out
    kept = [len(list(workspace.sweep("shared").glob("*/trial.json"))) for workspace in roots]
    assert sum(kept) == 4
    assert sorted(children(client, "shared")) == ["0", "1", "2", "3", "the sweep"]
    known = {"MLFLOW_TRACKING_URI": server.url, **server.login}
    done = third.run("sweep=shared", program="distilbench.compare", **known)
    assert done.returncode == 0, done.stderr
    (reported,) = third.path.rglob("report.csv")
    lines = reported.read_text().splitlines()
    assert len(lines) == 1 + 2
    assert {dict(zip(lines[0].split(","), line.split(","), strict=True))["seeds"] for line in lines[1:]} == {"1 2"}
    assert "predictions" not in done.stdout, "a trial's predictions were not found"
