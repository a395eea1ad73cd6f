"""Completion as bash asks for it: with the line so far, and the word that the cursor is at."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


def test_the_installed_command_is_asked_itself_and_its_commands_are_known(tmp_path):
    stub = tmp_path / "distilbench"
    stub.write_text('#!/bin/sh\necho "optim.lr= optim.name= $1/$2/$3/$(echo "$COMP_LINE" | tr " " /)"\n')
    stub.chmod(0o755)
    assert completed("distilbench train seed=1 optim.l", tmp_path) == "optim.lr="
    assert completed("distilbench train train/-sc", tmp_path) == "train/-sc/query=bash/app/train/-sc"
    assert completed("distilbench com", tmp_path) == "compare completion"
    assert completed("python script.py dist", tmp_path) == ""
