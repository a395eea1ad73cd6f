"""A Slurm cluster of two nodes on this host, for the time of a test: with its own key, ports, folder and daemons."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
CONFIGURATION = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=1,sched_min_interval=100000
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
KillWait=20
MinJobAge=300
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Return what this host lacks to run Slurm; None if nothing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root, as whom slurmd runs"
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"needs Slurm (apt install slurm-wlm munge): there is no {', '.join(lacking)}" if lacking else None


class Slurm:
    """A controller and two nodes, ``n1`` and ``n2``, with two processors each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._conf = folder / "slurm.conf"
        ports = free_ports(3)
        self._conf.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=ports))
        self.environment = {"SLURM_CONF": str(self._conf)}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[Slurm]:
        """Run the cluster until the block ends, then end every job and daemon."""
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        places = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log",
                  "seed-file": "munge.seed"}  # fmt: skip
        options = [f"--{name}={self._folder}/{file}" for name, file in places.items()]
        with ExitStack() as ending:
            ending.callback(self._end_nodes)
            self._daemon(ending, ["munged", "--foreground", "--force", *options])
            self._daemon(ending, ["slurmctld", "-D", "-i", "-f", str(self._conf)])
            for node in ("n1", "n2"):
                self.start_node(node)
            self.wait_for(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "two idle nodes")
            yield self
            self.ask("scancel", "--signal=KILL", "--full", "--user=root")
            self.ask("scancel", "--user=root")

    def _daemon(self, ending: ExitStack, command: Sequence[str]) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ending.callback(kill_tree, process)

    def start_node(self, node: str) -> None:
        """Start the ``slurmd`` of a node."""
        self._nodes[node] = subprocess.Popen(["slurmd", "-D", "-f", str(self._conf), "-N", node],
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    def kill_node(self, node: str) -> None:
        """Kill a node's ``slurmd``, the daemons of its steps, and its jobs at once, like a power loss of the host."""
        steps = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURMD_NODENAME") == node
                 and (p.info["environ"] or {}).get("SLURM_CONF") == str(self._conf)]  # fmt: skip
        daemons = [parent for step in steps for parent in step.parents() if parent.name() == "slurmstepd"]
        for process in {self._nodes[node].pid, *(p.pid for p in (*daemons, *steps))}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, 9)
        self._nodes.pop(node).wait(60)

    def _end_nodes(self) -> None:
        for node in tuple(self._nodes):
            self.kill_node(node)

    def ask(self, *command: str, check: bool = False) -> str:
        """Run one of Slurm's commands; returns its output."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """Submit a batch script; returns the job's id."""
        return self.ask("sbatch", "--parsable", *options, str(script), check=True)

    def states(self, job: str) -> set[str]:
        """Return the states of a job, or of an array's tasks; a job that is COMPLETING has not ended yet."""
        return set(self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split())

    def wait_for_end(self, *jobs: str) -> None:
        """Wait until all of these jobs have ended."""
        active = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        self.wait_for(lambda: not active & set().union(*(self.states(job) for job in jobs)), f"the end of {jobs}")

    def wait_for(self, happens: Any, what: str, seconds: float = 180) -> None:
        """Wait until ``happens()``; fails with the daemons' logs."""
        deadline = time.monotonic() + seconds
        while not happens():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-3000:] for path in sorted(self._folder.glob("*.log"))]
                raise AssertionError("\n".join([f"no {what}", self.ask("squeue", "-t", "all"), *logs]))
            time.sleep(0.1)


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Run a Slurm cluster in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        os.chmod(folder, 0o755)  # for munge
        with Slurm(Path(folder)).running() as running:
            yield running


def free_ports(count: int) -> list[int]:
    """Return free ports of the loopback interface."""
    with ExitStack() as held:
        bound = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in bound:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in bound]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, if it still runs."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(60)
