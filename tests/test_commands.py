"""How tests run commands: a forked one is like a fresh one but for the imports that it need not wait for."""

from __future__ import annotations

import os
import signal

import pytest

from tests.commands import FORKS, HEAVY, split_imports

SHOW = """
import json, os, sys
already = sorted({"torch", "transformers", "mlflow", "distilbench.engines.trainer"} & set(sys.modules))
print(json.dumps([__name__, sys.argv, os.getcwd(), os.environ["ASKED"], "PYTEST_CURRENT_TEST" in os.environ]), already)
print("to the other stream", file=sys.stderr)
"""
ENDS = {
    "done": ("", 0),
    "exit without a status": ("raise SystemExit", 0),
    "exit": ("raise SystemExit(3)", 3),
    "exit with words": ("raise SystemExit('words')", 1),
    "error": ("raise ValueError('words')", 1),
    "ctrl-c": (
        # a shell has its background jobs ignore it
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)",
        -signal.SIGINT,
    ),
    "sigterm": ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "sigkill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "a thread": ("import threading, time; threading.Timer(0.1, print, ['words']).start()", 0),
    "at exit": ("import atexit; atexit.register(print, 'words')", 0),
}


def written(workspace, code: str):
    file = workspace.path / "program.py"
    file.write_text(code)
    return file


@pytest.mark.parametrize("fresh", [False, True])
def test_a_command_has_its_own_name_arguments_folder_variables_and_streams(workspace, fresh):
    file = written(workspace, SHOW)
    done = workspace.run("a=1", "b", program=file, fresh=fresh, ASKED="yes")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "to the other stream\n"
    shown = f'["__main__", ["{file}", "a=1", "b"], "{workspace.path}", "yes", true] '
    heavy = ["distilbench.engines.trainer", "mlflow", "torch", "transformers"]
    assert done.stdout == shown + f"{heavy if FORKS and not fresh else []}\n"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_a_command_ends_as_python_ends_it(workspace, end, fresh):
    code, status = ENDS[end]
    done = workspace.run(program=written(workspace, code), fresh=fresh)
    assert done.returncode == status
    assert ("words" in done.stdout + done.stderr) == ("words" in code)
    assert ("Traceback" in done.stderr) == (end in ("error", "ctrl-c"))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_command_is_signalled_and_ended_with_its_test(workspace, fresh):
    file = written(workspace, "import time\nprint('up', flush=True)\nwhile True: time.sleep(0.01)")
    read, write = os.pipe()
    process = workspace.start(program=file, output=write, fresh=fresh)
    os.close(write)
    with os.fdopen(read) as lines:
        assert lines.readline() == "up\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == process.returncode == -signal.SIGTERM
    left = workspace.start(program=file, fresh=fresh)
    workspace.end()
    assert left.returncode == -signal.SIGKILL


def test_imports_are_told_from_what_a_command_says(workspace):
    file = written(workspace, "import sys, json, scipy.stats; print('words', file=sys.stderr)")
    done = workspace.run(program=file, fresh=True, PYTHONPROFILEIMPORTTIME="1")
    said, imported = split_imports(done.stderr)
    assert said == ["words"]
    assert imported & HEAVY == {"scipy"}
