"""What all commands share: ends by signals, streams that nobody reads, mistakes in one line, lines to be typed."""

from __future__ import annotations

import os
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from logging.config import dictConfig
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from distilbench.cli import (
    CommandFailed,
    _check_arguments,
    as_settings_error,
    errors_in_one_line,
    format_command,
    format_override,
    is_disk_full,
    run_in_process,
)
from distilbench.engines.running import outcome_of
from distilbench.results import Status
from distilbench.settings import SettingsError, register_schema, settings_from
from tests.conftest import ROOT


def mistake(*overrides: str) -> str:
    """What is said of a composition that fails."""
    register_schema()
    with pytest.raises(Exception) as caught, initialize_config_dir(str(ROOT / "conf")):  # noqa: PT011
        settings_from(compose("config", ["output.dir=.", *overrides]))
    found = as_settings_error(caught.value)
    assert isinstance(found, SettingsError), caught.value
    return str(found)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("nosuch=1", "nosuch must be a setting that there is; --help lists them"),
        ("freeze.layerz=1", "freeze.layerz must be a setting that there is; did you mean freeze.layers?"),
        ("train.lr=1", "train.lr must be a setting that there is; did you mean optim.lr?"),
        ("optim.learning_rate=1", "optim.learning_rate must be a setting that there is; did you mean optim.lr?"),
        ("data.label_names=abc", "data.label_names must be a list, [abc], got 'abc'"),
        ("data.label_names=3", "data.label_names must be a list, [3], got '3'"),
        ("train.epochs=abc", "train.epochs must be a whole number, got 'abc'"),
        ("optim.lr=abc", "optim.lr must be a number, got 'abc'"),
        ("freeze.dropout=7x", "freeze.dropout must be true or false, got '7x'"),
        ("train.epochs=null", "train.epochs must be given, got null"),
        ("~train.epochs", "train.epochs must be given, got nothing; change its value instead"),
        ("~scheduler", "scheduler must be given, got nothing; add scheduler=..."),
        ("~optim", "optim must be given, got nothing; add optim=..."),
        ("~tracking", "tracking must be given, got nothing; add tracking=..."),
        ("optim.lr=${oc.env:NOSUCH}", "the variable NOSUCH must be set, got none; run: export NOSUCH=..."),
        ("~margin", "margin must be given, got nothing; add margin=..."),
        ("++optim.lrr=1", "optim.lrr must be a setting that there is, got 1; --help lists them"),
        ("sweep.objectives=f1", "sweep.objectives must be a list, [f1], got 'f1'"),
        ("experiment=[quick,nosuch]", "experiment must name choices of the group, got 'nosuch'; --help lists them"),
        ("scheduler=null", "scheduler must name a choice of the group, got null; --help lists them"),
        ("optim=nosuch", "optim must be one of adamw, sgd, got 'nosuch'"),
        ("hydra/sweeper=nosuch", "hydra/sweeper must be one of basic, grid, optuna, got 'nosuch'"),
        ("nosuch/x=1", "nosuch/x must be a setting that there is; --help lists them"),
        ("a=b=c", "a=b=c must be key=value in Hydra's grammar; quote what is special in it: 'key=\"a=b, c\"'"),
        ("train.epochs=${nosuch}", "${nosuch} must refer to a setting with one value, got none; check its name, "
         "or list values where it is read"),
        ("~data data.source=hub", "data must be given beside settings of it, got ~data; drop that"),
        ("~optim +optim.own=1", "optim must be given beside settings of it, got ~optim; drop that"),
        ("freeze=3", "freeze must name a choice of the group, got 3; --help lists them"),
        ("train=3", "train must be set key by key, train.key=..., got '3'; a choice of a group below another is typed "
                    "with a slash"),
        ("hydra.job_logging=none", "hydra.job_logging must be set key by key, hydra.job_logging.key=..., got 'none'; "
                                   "a choice of a group below another is typed with a slash"),
        ("data.train={a:1}", "data.train must be one value, got '{a:1}'"),
        ("tracking.experiment=[a,b]", "tracking.experiment must be one value, got '[a,b]'"),
        ("+freeze=layers3", "freeze must be typed without a plus, as freeze=..."),
        ("++freeze=layers3", "freeze must be typed without a plus, as freeze=..."),
        ("hydra.job.env_set.OWN=1", "hydra.job.env_set.OWN must be a key that there is; --cfg hydra lists them, some "
                                    "depend on hydra/sweeper and hydra/launcher; a new one takes a plus"),
    ],
)  # fmt: skip
def test_what_hydra_says_in_several_lines_becomes_one(monkeypatch, typed, line):
    monkeypatch.setattr(sys, "argv", ["train.py", *typed.split()])
    assert mistake(*typed.split()) == line


def test_a_directory_whose_name_is_not_utf8_is_told_in_a_line(monkeypatch, tmp_path):
    folder = os.fsdecode(bytes(tmp_path) + b"/m\xfcller")
    monkeypatch.setenv("DISTILBENCH_ROOT", folder)
    with pytest.raises(SettingsError, match=r"must be UTF-8, got '.*m\\udcfcller'; rename"):
        _check_arguments([])
    monkeypatch.delenv("DISTILBENCH_ROOT")
    os.mkdir(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SettingsError, match=r"must be UTF-8"):
        _check_arguments([])


def test_a_setting_typed_as_a_flag_is_answered_in_a_line():
    with pytest.raises(SettingsError, match=r"^--seed must be a flag of Hydra's; a setting is key=value"):
        _check_arguments(["freeze.layers=0", "--seed", "3"])
    with pytest.raises(SettingsError, match=r"^--experimental-rerun must be the directory of a trial of no "):
        _check_arguments(["--experimental-rerun", "nowhere"])
    _check_arguments(["freeze.layers=0", "-m", "seed=1,2", "--config-dir", "mine", "--cfg", "job", "-p", "optim"])


@pytest.mark.parametrize(
    ("command", "typed", "line"),
    [
        ("predict", "data.tset=in.csv", "data.tset must be a setting that there is; did you mean data.test?"),
        ("predict", "outpt=out.csv", "outpt must be a setting that there is; did you mean output?"),
        ("compare", "swep=first", "swep must be a setting that there is; did you mean sweep?"),
    ],
)
def test_a_typo_is_answered_with_a_setting_of_the_same_command(command, typed, line):
    register_schema()
    with pytest.raises(Exception, match="Could not override") as caught, initialize_config_dir(str(ROOT / "conf")):
        compose(command, [typed])
    assert str(as_settings_error(caught.value)) == line


def test_a_log_that_can_not_be_set_up_is_told_in_a_line():
    with pytest.raises(ValueError, match="Unable to configure") as caught:
        dictConfig({"version": 1, "handlers": {"file": {"class": "logging.FileHandler", "filename": "/nosuch/a.log"}}})
    assert "No such file or directory: '/nosuch/a.log'" in str(as_settings_error(caught.value))


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("of our own"), FileNotFoundError(2, "no", "read.json")])
def test_errors_that_are_no_mistake_of_a_user_are_left_alone(error):
    assert as_settings_error(error) is None


@pytest.mark.parametrize("below", ["/proc/nosuch/outputs", "/dev/null/outputs"])
def test_a_directory_that_can_not_be_made_is_told_with_its_reason(below):
    with pytest.raises(OSError, match=r"No such file|Not a directory") as caught:
        Path(below).mkdir(parents=True)
    line = str(as_settings_error(caught.value))
    assert " must be a path that can be used, got No" in line
    assert "hydra.run.dir" in line


def test_a_full_disk_is_told_by_its_name():
    assert "got No space left on device" in str(as_settings_error(OSError(28, "No space left on device", "trial.json")))
    line = "the disk must have room for what is written, got [Errno 28] No space left on device; make room, then try"
    assert line in str(as_settings_error(OSError(28, "No space left on device"))), "of an open file"


def full_database():
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("PRAGMA max_page_count = 1")
        connection.execute("CREATE TABLE t (x)")


WRITES = {
    "a file": lambda: Path("/dev/full").write_text("x"),
    "a database": full_database,
    "torch": lambda: torch.save(torch.zeros(1000), "/dev/full"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_recognised_whoever_writes_also_behind_another_error(write):
    with pytest.raises(Exception) as full:  # noqa: PT011
        WRITES[write]()
    behind = RuntimeError("while writing")
    behind.__cause__ = full.value
    assert is_disk_full(behind)
    assert outcome_of(behind, None) == (
        Status.FAILED, "the disk is full; make room, then add train.resume=true to continue"
    )  # fmt: skip
    assert not is_disk_full(sqlite3.OperationalError("database is locked"))


@pytest.mark.parametrize(
    ("error", "status"), [(SettingsError("a must be b, got c"), 2), (CommandFailed("two trials\ndid not finish"), 1)]
)
def test_an_error_for_people_is_one_line_with_its_status(capsys, error, status):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err == f"distilbench: {' '.join(str(error).split())}\n"


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), errors_in_one_line():
        raise ZeroDivisionError


# ---- command lines

WORDS = ["null", "NULL", "true", "False", "nan", "-inf", "1", "+1", "1e3", "0x1", ".5", ".", "~/x", "a=b", "größe",
         "a,b", "[a]", "{a}", "it's", 'say "x"', "back\\slash", "end\\", "\\'", " space ", "a  b", "a: b", "$HOME", "*",
         "(a)", "a#b", "", "\t", "many, of [them] = 'all' \\ \"ü\""]  # fmt: skip


@given(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_a_string_that_is_printed_and_typed_comes_back_as_it_was(text):
    (typed,) = shlex.split(format_command("train", [format_override("data.train", text)]))[3:]
    parsed = OverridesParser.create().parse_override(typed)
    assert parsed.get_key_element() == "data.train"
    assert parsed.value() == text
    assert isinstance(parsed.value(), str)


@pytest.mark.parametrize("value", [None, True, False, 3, 2e-5, 1e-08, [], [1, "a b"], ["null", None, ["x,y"]]])
def test_a_quoted_value_is_parsed_back_to_itself(value):
    assert OverridesParser.create().parse_override(format_override("key", value)).value() == value


def test_plain_words_are_not_quoted_in_overrides():
    assert [format_override("k", v) for v in ("linear", "runs/a-1", "2e-5", 2e-5, 0)] == [
        "k=linear", "k=runs/a-1", "k='2e-5'", "k=2e-05", "k=0",
    ]  # fmt: skip


def test_a_command_is_named_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/distilbench/train.py"])
    assert format_command("train", ["a=1", "b='x y'"]) == "python -m distilbench.train a=1 'b='\"'\"'x y'\"'\"''"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/distilbench", "train"])
    assert format_command("confirm", ["sweep=first"]) == "distilbench confirm sweep=first"


# ---- signals and streams, in processes of their own


def start(code: str, **options) -> subprocess.Popen[str]:
    script = f"import os, sys, time, signal\nfrom distilbench.cli import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", script], text=True, cwd=ROOT, **options)


STATUSES = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("signum", "status"), STATUSES)
def test_before_there_is_anything_to_close_a_signal_ends_without_a_word(signum, status):
    code = f"exit_immediately(); os.kill(os.getpid(), {int(signum)}); time.sleep(60)"
    process = start(code, stderr=subprocess.PIPE)
    assert process.communicate()[1] == ""
    assert process.returncode == status


@pytest.mark.parametrize(("signum", "status"), STATUSES)
def test_later_a_signal_is_an_exception_and_further_ones_do_not_disturb_what_is_closed(signum, status):
    code = f"""
def main():
    raise_on_signal()
    try:
        os.kill(os.getpid(), {int(signum)}); time.sleep(60)
    finally:
        os.kill(os.getpid(), {int(signum)}); os.kill(os.getpid(), signal.SIGTERM)
        print("closed")
run_command(main)
"""
    process = start(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate() == ("closed\n", "")
    assert process.returncode == status


def test_a_third_ctrl_c_ends_at_once():
    code = """
def main():
    raise_on_signal()
    try:
        os.kill(os.getpid(), signal.SIGINT); time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)
run_command(main)
"""
    assert start(code).wait() == 130


def test_nohup_is_respected():
    code = (
        "signal.signal(1, signal.SIG_IGN); exit_immediately(); raise_on_signal(); os.kill(os.getpid(), 1); print('on')"
    )
    assert start(code, stdout=subprocess.PIPE).communicate()[0] == "on\n"


NOISY = """
def main():
    for line in range(20000): print("line", line)
    sys.stdout.flush()
    print("went on", file=sys.stderr)
run_command(main)
"""


def test_a_command_goes_on_when_nobody_reads_it_any_more():
    process = start(NOISY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    assert process.communicate()[1] == "went on\n"
    assert process.returncode == 0


def test_a_command_goes_on_when_its_output_can_not_be_written():
    with open("/dev/full", "w") as full:
        process = start(NOISY, stdout=full, stderr=subprocess.PIPE)
    assert process.communicate()[1] == "went on\n"
    assert process.returncode == 0


def test_streams_that_the_shell_closed_are_not_taken_by_files():
    script = 'exec "$0" -c "$1" >&- 2>&-'
    code = ("import os\nfrom distilbench.cli import open_streams\nopen_streams()\n"
            "found = os.open('/dev/zero', os.O_RDONLY)\nraise SystemExit(found)")  # fmt: skip
    done = subprocess.run(["sh", "-c", script, sys.executable, code], cwd=ROOT)
    assert done.returncode >= 3


def test_text_that_the_terminal_can_not_show_is_replaced_and_a_width_of_zero_ignored():
    code = "import rich\nrun_command(lambda: rich.print('grün ✓'))"
    process = start(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "0"})  # fmt: skip
    assert process.communicate() == ("gr?n ?\n", "")


@pytest.mark.parametrize(
    ("given", "turns"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["by default", "another number", "another policy"],
)
def test_waiting_threads_sleep_early_unless_told_otherwise(given, turns):
    """torch's OpenMP reads the variable when it is loaded, so torch must not be there before."""
    code = "import os, sys, distilbench.train; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    without = {k: value for k, value in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.check_output([sys.executable, "-c", code], env=without | given, text=True)
    assert found.split() == [turns, "False"]


def test_a_command_run_inside_a_process_leaves_its_wish_for_tracebacks_as_it_was(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    run_in_process(lambda: None, [])
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_hydra_full_error_shows_the_traceback():
    code = "run_command(lambda: (_ for _ in ()).throw(OSError(28, 'full', 'file')))"
    lines = []
    for wish in ({}, {"HYDRA_FULL_ERROR": "1"}):
        process = start(code, stderr=subprocess.PIPE, env=os.environ | wish)
        lines.append(process.communicate()[1])
    assert len(lines[0].splitlines()) == 1
    assert "Traceback" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--version"], 0, "distilbench 0."), (["train", "--version"], 0, "distilbench 0."),
        (["--help"], 0, "usage: distilbench {train,compare,confirm,predict,benchmark}"),
        (["train", "--config-dir", "conf", "--hydra-help"], 0, "== Flags =="),
        (["nosuch"], 2, "must be one of train"),
    ],
)  # fmt: skip
def test_the_installed_command_runs_each_of_ours(arguments, status, said):
    done = subprocess.run([sys.executable, "-m", "distilbench", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status
    assert said in done.stdout + done.stderr


def test_the_completion_of_a_closed_pipe_says_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distilbench", "completion"]
    assert subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT).stderr == b""
    os.close(writer)
