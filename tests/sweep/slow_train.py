"""The real command with each step logged to a file, and half a second slower while a file ``slow`` exists."""

from __future__ import annotations

import os
import time
from pathlib import Path

from distilbench.cli import run_command
from distilbench.results import StepRecord
from distilbench.train import main
from distilbench.trials import run

STEPS = Path(os.environ["FINISHED_LOG"])
_log = run._Observer.on_step


def on_step(self: run._Observer, trial: int, record: StepRecord) -> None:
    _log(self, trial, record)
    with STEPS.open("a") as log:
        log.write(f"{os.getpid()} {record.step}\n")
    if STEPS.with_name("slow").exists():
        time.sleep(0.5)


run._Observer.on_step = on_step
run_command(main)
