"""What is kept of a trial: records that survive kills and full disks, owners told apart, and figures by their names."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from distilbench.results import (
    RECORD,
    STORED_METRICS,
    Evaluation,
    Owner,
    Predictions,
    Record,
    Status,
    TrialResult,
    read_record,
    replace_file,
)

IDENTITY = {"protocol": "p", "treatment": "t", "seed": 3}
OWNER = Owner("host", 12, 34.5)
BEST = Evaluation("train (held out)", 4, 2.0, loss=0.5, accuracy=0.75, f1=0.7, mcc=0.4, brier=0.2, ece=0.1)
RUNNING = Record(IDENTITY, Status.RUNNING, OWNER, "run")
FULL = Record(IDENTITY, Status.FINISHED, OWNER, "run", None, {"accuracy": 0.75}, {"accuracy": 0.8}, {"steps": 4.0})


def test_a_metric_is_found_by_its_name():
    assert [BEST.metric(name) for name in STORED_METRICS] == [0.75, 0.5, 0.7, 0.4, 0.2, 0.1, 2.0]


def test_the_largest_logit_is_what_was_predicted():
    logits = np.array([[0.1, 0.2, 0.3], [3.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
    assert Predictions(np.array([2, 1, 1]), logits).correct.tolist() == [True, False, True]


def test_a_trial_that_failed_before_it_began_has_counted_nothing():
    values = vars(TrialResult(Status.FAILED)).items()
    counted = {name: value for name, value in values if type(value) in (int, float) and value}
    assert counted == {"num_trials_in_batch": 1}


# Owners


def test_this_process_owns_what_it_signs_and_lives():
    mine = Owner.of()
    assert (mine.host, mine.pid) == (socket.gethostname(), os.getpid())
    assert not mine.is_dead()


@pytest.mark.parametrize(("seconds", "dead"), [(0.0, False), (1.9, False), (-1.9, False), (2.5, True), (-2.5, True)])
def test_a_start_time_is_the_same_within_two_seconds(seconds, dead):
    mine = Owner.of()
    assert replace(mine, started=mine.started + seconds).is_dead() is dead


def test_a_clock_that_jumps_ends_no_process(monkeypatch):
    from psutil import _psplatform

    mine, booted = Owner.of(), psutil.boot_time()
    monkeypatch.setattr(_psplatform, "boot_time", lambda: booted + 3600)  # the kernel's: time of day less uptime
    assert psutil.Process().create_time() > booted + 3600
    assert not mine.is_dead()
    assert Owner.of() == mine


def test_another_hosts_process_is_dead_only_if_one_says_so():
    elsewhere = Owner("elsewhere", os.getpid(), 0.0)
    assert not elsewhere.is_dead()
    assert replace(elsewhere, host=socket.gethostname()).is_dead()


def test_a_process_that_ended_is_dead_even_before_its_parent_notices():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    owner = Owner.of(child.pid)
    assert not owner.is_dead()
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.status() == psutil.STATUS_ZOMBIE
    assert owner.is_dead()
    child.wait()
    assert owner.is_dead()


def test_a_process_that_may_not_be_looked_at_counts_as_alive(monkeypatch):
    def denied(self):
        raise psutil.AccessDenied

    owner = Owner.of()
    monkeypatch.setattr(psutil.Process, "create_time", denied)
    assert owner.is_dead() is False


# Records


def test_every_status_but_running_and_interrupted_is_an_end_of_its_own():
    over = {status for status in Status if replace(RUNNING, status=status).is_final}
    assert over == set(Status) - {Status.RUNNING, Status.INTERRUPTED}


def test_an_objective_is_what_the_selection_split_says_else_a_figure_else_nothing():
    record = Record(IDENTITY, Status.FINISHED, OWNER, scores={"accuracy": 0.9, "f1": 0.9},
                    selection={"accuracy": 0.8}, figures={"accuracy": 0.1, "train_flops": 5})  # fmt: skip
    assert record.objective("accuracy") == 0.8
    assert record.objective("train_flops") == 5.0
    assert math.isnan(record.objective("f1")), "the report split chooses nothing"
    assert math.isnan(record.objective("train_seconds"))


def test_only_the_time_of_a_batched_trial_is_its_estimate():
    record = replace(FULL, figures={"train_seconds": 30.0, "solo_seconds_estimate": 5.0, "train_flops": 2.0})
    assert (record.objective("train_seconds"), record.objective("train_flops")) == (5.0, 2.0)
    assert replace(FULL, figures={"train_seconds": 30.0}).objective("train_seconds") == 30.0


def test_a_result_replaces_all_of_a_record_but_who_and_what_it_is():
    reported = replace(BEST, split="validation", accuracy=0.7, epoch=2.0)
    result = TrialResult(Status.FINISHED, selection=BEST, report=reported)
    ended = replace(RUNNING, error="old", scores={"accuracy": 0.0}).with_result(result, {"steps": 4.0})
    scores = {"accuracy": 0.7, "loss": 0.5, "f1": 0.7, "mcc": 0.4, "brier": 0.2, "ece": 0.1, "epoch": 2.0}
    assert ended == Record(IDENTITY, Status.FINISHED, OWNER, "run", None, scores, scores | {"accuracy": 0.75},
                           {"steps": 4.0})  # fmt: skip


def test_a_trial_that_ended_before_its_first_evaluation_has_no_scores():
    ended = RUNNING.with_result(TrialResult(Status.DIVERGED, "the loss was nan"), {})
    assert ended == Record(IDENTITY, Status.DIVERGED, OWNER, "run", "the loss was nan")


def test_a_record_is_read_as_it_was_written_and_makes_its_folder(tmp_path):
    for record in (RUNNING, FULL, replace(FULL, status=Status.PRUNED, error="said", run_id=None)):
        record.write(tmp_path / "sweep" / "0")
        assert read_record(tmp_path / "sweep" / "0") == record
    assert [path.name for path in (tmp_path / "sweep" / "0").iterdir()] == [RECORD] == ["trial.json"]


def test_a_record_is_one_flat_file_that_people_and_scripts_read(tmp_path):
    FULL.write(tmp_path)
    text = (tmp_path / RECORD).read_text()
    assert text.startswith('{\n  "protocol": "p",\n')
    assert text.endswith("}\n")
    assert json.loads(text) == {
        **IDENTITY, "run_id": "run", "status": "FINISHED", "error": None, "accuracy": 0.75,
        "selection": {"accuracy": 0.8}, "figures": {"steps": 4.0},
        "owner": {"host": "host", "pid": 12, "started": 34.5},
    }  # fmt: skip


@pytest.fixture
def no_room(monkeypatch):
    """A disk on which no new file finds room."""
    write = Path.write_text

    def refuse(self, text):
        write(self, text[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)


def test_on_a_full_disk_a_record_is_written_over_the_one_that_is_there(tmp_path, no_room):
    long = replace(RUNNING, error="long " * 100)
    (tmp_path / RECORD).open("w").write(json.dumps({"error": "long " * 500}))
    long.write(tmp_path)
    assert read_record(tmp_path) == long
    FULL.write(tmp_path)
    assert read_record(tmp_path) == FULL, "nothing is left of what was longer"
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_on_a_full_disk_a_first_record_fails_and_leaves_nothing(tmp_path, no_room):
    with pytest.raises(OSError, match="No space left"):
        RUNNING.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_begun_the_reason_is_told_and_a_record_is_written_over(tmp_path, monkeypatch):
    def refuse(self, text):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        with pytest.raises(OSError, match="quota exceeded"):
            RUNNING.write(tmp_path)
    RUNNING.write(tmp_path)
    monkeypatch.setattr(Path, "write_text", refuse)
    FULL.write(tmp_path)
    assert read_record(tmp_path) == FULL


def content_of(tmp_path) -> dict:
    FULL.write(tmp_path)
    return json.loads((tmp_path / RECORD).read_text())


@pytest.mark.parametrize("missing", ["protocol", "seed", "status", "owner", "run_id", "error", "selection", "figures"])
def test_a_record_that_lacks_something_is_none(tmp_path, missing):
    content = content_of(tmp_path)
    del content[missing]
    (tmp_path / RECORD).write_text(json.dumps(content))
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"'])
def test_a_file_that_is_no_record_is_none(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    assert read_record(tmp_path) is None


def test_a_word_that_is_no_status_is_none_and_no_file_is_none(tmp_path):
    assert read_record(tmp_path / "nowhere") is None
    content = content_of(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps(content | {"status": "DONE"}))
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).write_text(json.dumps(content | {"owner": {"host": "a"}}))
    assert read_record(tmp_path) is None


def test_scores_are_those_kept_of_an_evaluation_and_nothing_else(tmp_path):
    content = content_of(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps(content | {"loss": 0.25, "remark": 1}))
    assert read_record(tmp_path).scores == {"accuracy": 0.75, "loss": 0.25}


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt, OSError])
def test_a_file_keeps_its_content_where_writing_a_new_one_is_interrupted(tmp_path, ended_by):
    file = tmp_path / "folder" / "file"
    with replace_file(file) as partial:
        partial.write_text("whole")

    def write_half() -> None:
        with replace_file(file) as partial:
            partial.write_text("ha")
            raise ended_by

    with pytest.raises(ended_by):
        write_half()
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]
