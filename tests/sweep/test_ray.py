"""Sweeps through ``hydra/launcher=ray``: a node that dies, and a signal; on a cluster that is started here.

The cluster knows neither the directory nor the variables of the sweep, as one that was there before.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec

import psutil
import pytest

from distilbench.results import Status, read_record
from tests.commands import ROOT, lay_tables

LACKING = find_spec("ray") is None or find_spec("hydra_plugins.hydra_ray_launcher") is None
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(LACKING, reason="needs the extra ray"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs several addresses of the loopback interface"),
]


QUICK_TO_NOTICE = {
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 has a trial wait for all other tests that run beside it
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Cluster:
    """Ray on the loopback interface: a head that trains nothing, and nodes of one processor, each with its address."""

    def __init__(self, folder: str) -> None:
        self._folder, self._nodes = folder, []
        with socket.socket() as one, socket.socket() as another:
            ports = []
            for free in (one, another):
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
        self.address = f"127.0.0.1:{ports[0]}"
        self._start("127.0.0.1", "--head", "--num-cpus=0", f"--port={ports[0]}", f"--temp-dir={folder}",
                    f"--ray-client-server-port={ports[1]}", "--include-dashboard=false")  # fmt: skip
        self.add_node()

    def add_node(self) -> None:
        self._start(f"127.0.0.{len(self._nodes) + 1}", "--num-cpus=1", f"--address={self.address}")

    def _start(self, host: str, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host}",
                   *options, "--disable-usage-stats", "--object-store-memory=100000000",
                   "--dashboard-agent-listen-port=0"]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICK_TO_NOTICE
        process = subprocess.Popen(command, cwd=self._folder, env=environment, stdout=subprocess.PIPE, text=True)
        self._nodes.append(process)
        assert process.stdout
        assert any("Ray runtime started" in line for line in process.stdout)

    def kill_node(self) -> None:
        """Kill the newest node, all of its processes at once, as a host that loses its power."""
        self._kill(self._nodes[-1])
        self._nodes[-1].communicate(timeout=60)

    @staticmethod
    def _kill(process: subprocess.Popen) -> None:
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    def end(self) -> None:
        for process in reversed(self._nodes):
            if process.poll() is None:
                self._kill(process)
                process.communicate(timeout=60)


@pytest.fixture(scope="module")
def cluster():
    """Start a cluster that all tests here share; whoever kills its node adds another."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: it holds sockets
        cluster = Cluster(folder)
        try:
            yield cluster
        finally:
            cluster.end()


def start(workspace, cluster: Cluster, epochs: int):
    """Start a sweep of two trials whose study and runs stand where only its own environment says."""
    study, workspace.uri = (f"sqlite:///{workspace.path}/{name}" for name in ("study.db", "runs/mlflow.db"))
    lay_tables(workspace.path / "runs" / "mlflow.db")
    return workspace.start("hydra/launcher=ray", f"hydra.launcher.ray.init.address={cluster.address}",
                           "seed=1,2", "hydra.sweeper.storage=${oc.env:SWEEP_DB}", "sweep.name=rays",
                           "sweep.baseline=false", f"train.epochs={epochs}", "output.save_model=false", real=True,
                           MLFLOW_TRACKING_URI=workspace.uri, SWEEP_DB=study)  # fmt: skip


def worker_of(workspace, process) -> int:
    """Wait until a trial trains; returns the pid of the process that it trains in."""
    deadline = time.monotonic() + 120
    while True:
        records = [read_record(workspace.sweep("rays") / number) for number in ("0", "1")]
        running = [record for record in records if record and record.run_id and record.status is Status.RUNNING]
        if running:
            return running[0].owner.pid
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def statuses_of_trials(workspace, name: str = "rays") -> list[Counter[str]]:
    """How the trials ended by the study, and their runs by MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(workspace.uri)
    runs = client.search_runs([client.get_experiment_by_name("distilbench").experiment_id])
    trials = workspace.study(name, url=f"sqlite:///{workspace.path}/study.db")
    return [
        Counter(trial.user_attrs["status"] for trial in trials),
        Counter(run.info.status for run in runs if "distilbench.trial" in run.data.tags),
    ]


def test_a_trial_whose_node_is_killed_is_tried_again_and_study_records_and_runs_agree(workspace, cluster):
    process = start(workspace, cluster, epochs=20)
    worker_of(workspace, process)
    cluster.kill_node()
    cluster.add_node()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err, err

    assert statuses_of_trials(workspace) == [{"FINISHED": 2}, {"FINISHED": 2, "KILLED": 1}]
    for number in (0, 1):
        assert workspace.record("rays", number)["status"] == "FINISHED"
        assert (workspace.sweep("rays") / str(number) / "predictions.parquet").exists()
    assert sorted(path.name for path in workspace.path.iterdir()) == [
        ".study.db.lock", ".study.db.report.lock", "outputs", "runs", "study.db"]  # fmt: skip


def test_a_signal_that_ray_takes_for_itself_ends_the_trials_of_the_cluster_and_leaves_no_run_running(
    workspace, cluster
):
    process = start(workspace, cluster, epochs=20000)
    worker = psutil.Process(worker_of(workspace, process))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "SIGTERM received" not in err, "Ray's trace"
    worker.wait(20)

    study, runs = statuses_of_trials(workspace)
    assert study == {"INTERRUPTED": 2}
    assert runs == {"KILLED": 1}, "of the trial that waited for a processor there is no run"
    assert {workspace.record("rays", number)["status"] for number in (0, 1)} == {"INTERRUPTED"}


def test_the_guides_worker_is_a_task_of_the_cluster(workspace, cluster):
    guide = (ROOT / "docs" / "many-machines.md").read_text()
    script = re.search(r"```text\n(import os, ray.*?)```", guide, re.DOTALL)[1]
    for typed, here in {"127.0.0.1:6379": cluster.address, "seed=1,2,3,4": "seed=1", "range(2)": "range(1)"}.items():
        assert typed in script
        script = script.replace(typed, here)
    (workspace.path / "tasks.py").write_text(script)
    study, workspace.uri = (f"sqlite:///{workspace.path}/{name}" for name in ("study.db", "runs/mlflow.db"))
    lay_tables(workspace.path / "runs" / "mlflow.db")
    ended = workspace.run(program=workspace.path / "tasks.py", MLFLOW_TRACKING_URI=workspace.uri, SWEEP_DB=study)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert statuses_of_trials(workspace, "big") == [{"FINISHED": 1}, {"FINISHED": 1}]
