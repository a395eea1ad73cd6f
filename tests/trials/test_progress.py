"""What a person sees while trials run, on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from distilbench.results import Evaluation, StepRecord
from distilbench.trials.progress import LINE_SECONDS, ProgressBars, evaluation_text, step_text

EVALUATION = Evaluation("validation", 100, 1.0, loss=0.3255, accuracy=0.9071, f1=0.91, mcc=0.8142)
LONG = "for a first answer in minutes: experiment=quick"


def record(step, steps=300):
    return StepRecord(
        step, steps, step / 100, loss=0.5, learning_rate=2e-5, gradient_norm=1.0, examples_per_second=32.0
    )


class Watched:
    """A progress whose clock a test moves: ``seconds_per_step`` passes before each step."""

    def __init__(self, names=("freeze0",), terminal=False):
        self.file = io.StringIO()
        self.now = 0.0
        console = Console(file=self.file, force_terminal=terminal, width=160, color_system=None, legacy_windows=False)
        self.progress = ProgressBars(names, console, clock=lambda: self.now)

    def steps(self, first, last, seconds_per_step, steps=300, trial=0):
        for step in range(first, last + 1):
            self.now += seconds_per_step
            self.progress.on_step(trial, record(step, steps))

    @property
    def lines(self):
        return self.file.getvalue().splitlines()


def test_lines_come_about_every_ten_seconds_and_at_the_last_step():
    watched = Watched()
    watched.steps(1, 300, seconds_per_step=0.125)
    assert [line.partition(", loss")[0] for line in watched.lines] == [
        "freeze0: epoch 0.01/3, step 1/300",
        "freeze0: epoch 0.81/3, step 81/300",
        "freeze0: epoch 1.61/3, step 161/300",
        "freeze0: epoch 2.41/3, step 241/300",
        "freeze0: epoch 3.00/3, step 300/300",
    ]
    assert LINE_SECONDS == 10


def test_a_line_tells_epoch_step_loss_speed_and_time_left():
    assert step_text(record(150), left=95.0) == (
        "epoch 1.50/3, step 150/300, loss 0.5000, 32.0 examples/s, 1 min 35 s left"
    )
    assert step_text(record(150), left=None).endswith("32.0 examples/s")


def test_time_left_counts_from_the_first_record_so_that_warming_up_does_not_count():
    watched = Watched()
    watched.now = 60.0
    watched.steps(1, 101, seconds_per_step=0.5)
    assert watched.lines[-1].endswith("1 min 40 s left")
    assert "left" not in watched.lines[0]


def test_every_evaluation_has_a_line():
    watched = Watched()
    watched.progress.on_evaluation(0, EVALUATION)
    assert watched.lines == ["freeze0: " + evaluation_text(EVALUATION)]
    assert evaluation_text(EVALUATION) == (
        "epoch 1 on validation: accuracy 90.71 %, loss 0.3255, F1 0.9100, MCC 0.8142"
    )


def test_several_trials_are_numbered_and_names_are_not_markup():
    watched = Watched(names=("[red]a", "b"))
    watched.progress.on_evaluation(0, EVALUATION)
    watched.progress.on_evaluation(1, EVALUATION)
    assert [line[:12] for line in watched.lines] == ["[1/2] [red]a", "[2/2] b: epo"]


def test_plain_output_is_not_wrapped_and_holds_no_control_codes():
    watched = Watched(names=("n" * 300,))
    watched.steps(1, 1, 1.0)
    assert len(watched.lines) == 1
    assert "\x1b" not in watched.file.getvalue()


def test_a_long_trial_is_announced_once_after_ten_steps():
    watched = Watched()
    watched.steps(1, 10, seconds_per_step=0.5, steps=12630)
    assert not any(LONG in line for line in watched.lines)
    watched.steps(11, 60, seconds_per_step=0.5, steps=12630)
    assert [line for line in watched.lines if LONG in line] == [
        f"This trial will take about 1 h 45 min on this device; {LONG}"
    ]


def test_ten_quick_steps_are_not_enough_to_predict_from():
    watched = Watched()
    watched.steps(1, 30, seconds_per_step=0.05, steps=12630)
    assert not any(LONG in line for line in watched.lines)


def test_a_short_trial_is_not_announced():
    watched = Watched()
    watched.steps(1, 100, seconds_per_step=0.5, steps=375)
    assert not any(LONG in line for line in watched.lines)


def test_a_trial_of_ten_minutes_is_announced_as_long_but_the_quick_experiment_not_told_to_be_quicker():
    watched = Watched()
    watched.steps(1, 75, seconds_per_step=8.0, steps=75)
    assert not any("This trial will take" in line for line in watched.lines)
    longer = Watched()
    longer.steps(1, 75, seconds_per_step=12.0, steps=75)
    assert "This trial will take about 15 min 0 s on this device" in longer.lines


def test_a_terminal_shows_one_bar_and_evaluations_above_it():
    watched = Watched(terminal=True)
    with watched.progress:
        watched.steps(1, 150, seconds_per_step=0.1)
        watched.progress.on_evaluation(0, EVALUATION)
        watched.progress._bars.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", watched.file.getvalue())
    assert "epoch 1.50/3, step 150/300, loss 0.5000, 32.0 examples/s, 15.0 s left" in shown
    assert "freeze0: epoch 1 on validation: accuracy 90.71 %" in shown
    assert len(watched.progress._bars.tasks) == 1


def test_the_bar_fits_eighty_columns_of_a_full_run():
    text = step_text(StepRecord(1_159, 12_630, 0.28, 0.5, 2e-5, 1.0, 32.0), left=6_300.0)
    assert text == "epoch 0.28/3, step 1,159/12,630, loss 0.5000, 32.0 examples/s, 1 h 45 min left"
    assert len(text) <= 80


def test_the_bar_follows_the_trial_that_spoke_last():
    watched = Watched(names=("a", "b"), terminal=True)
    with watched.progress:
        watched.steps(1, 3, 0.1)
        watched.steps(1, 2, 0.1, trial=1)
        (task,) = [task for task in watched.progress._bars.tasks if task.visible]
    assert (task.description, task.completed, task.total) == ("[2/2]", 2, 300)


def test_the_bar_goes_away_when_a_trial_fails():
    watched = Watched(terminal=True)
    with pytest.raises(KeyboardInterrupt), watched.progress:
        raise KeyboardInterrupt
    assert watched.progress._bars.finished is False
    assert not watched.progress._bars.live.is_started
