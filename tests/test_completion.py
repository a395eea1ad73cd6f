"""Completion as bash asks for it: with the line so far, and the word that the cursor is at."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
SCRIPT = ROOT / "distilbench" / "completion.sh"


def completed(line: str, folder: Path | None = None) -> str:
    """What bash would put, or list, at the end of ``line``; commands of ``folder`` go before all others."""
    asked = f'source "$SCRIPT"; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _distilbench; echo "${{COMPREPLY[@]}}"'
    path = os.pathsep.join([str(folder or Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "--norc", "-c", asked], capture_output=True, text=True,
                          env={**os.environ, "PATH": path, "SCRIPT": str(SCRIPT)})  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


def test_values_are_completed_by_hydra_behind_python_m():
    assert completed("python -m distilbench.train freeze.layers=3 scheduler=cos") == "cosine cosine_with_restarts"


def test_a_command_is_offered_no_group_that_it_has_not():
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()} - {"hydra"}
    offered = completed("python -m distilbench.confirm ").split()
    assert {"seeds=", "sweep=", "tracking="} <= set(offered)
    assert {word.removesuffix("=") for word in offered} & groups == {"tracking"}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_tab_key_completes_in_a_terminal(shell, tmp_path):
    """Typed into the shell itself, on a pseudo-terminal; the command is a stub that answers at once."""
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    stub = tmp_path / "distilbench"
    stub.write_text("#!/bin/sh\necho optim.lr= optim.name= seed=\n")
    stub.chmod(0o755)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PATH=f"{tmp_path}:{os.environ['PATH']}", PS1="> ", TERM="dumb", HOME=str(tmp_path))
        os.execvp(shell, [shell, *(["--norc", "--noprofile"] if shell == "bash" else ["-f"]), "-i"])
    try:
        os.write(terminal, f"source '{SCRIPT}'; echo ready_$((1 + 1))\n".encode())
        assert "ready_2" in read_until("ready_2", terminal)
        os.write(terminal, b"distilbench train optim.l\t")
        assert "optim.lr=" in read_until("optim.lr=", terminal)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def read_until(words: str, terminal: int, seconds: float = 30.0) -> str:
    """What a terminal shows up to these words, or all of it where they don't come."""
    shown, ends = "", time.monotonic() + seconds
    while words not in shown and time.monotonic() < ends:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def test_the_installed_command_is_asked_itself_and_its_commands_are_known(tmp_path):
    stub = tmp_path / "distilbench"
    stub.write_text('#!/bin/sh\necho "optim.lr= optim.name= $1/$2/$3/$(echo "$COMP_LINE" | tr " " /)"\n')
    stub.chmod(0o755)
    assert completed("distilbench train seed=1 optim.l", tmp_path) == "optim.lr="
    assert completed("distilbench train train/-sc", tmp_path) == "train/-sc/query=bash/app/train/-sc"
    assert completed("distilbench com", tmp_path) == "compare completion"
    assert completed("python script.py dist", tmp_path) == ""
