"""The confirmation: fresh seeds, one trial at a time, resumable, with both figures side by side."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from distilbench.composition import default_treatment
from distilbench.confirm import confirm
from distilbench.report.from_store import ReportRequest, make_report
from distilbench.results import Status, TrialResult, read_record
from distilbench.settings import ConfirmSettings, SettingsError, settings_from
from distilbench.tracking.search import CONFIRMS_TAG, MARGIN_TAG, PARENT_TAG, SWEEP_TAG
from distilbench.trials import batch
from distilbench.trials.prepared import Job, SweepContext, prepare
from distilbench.trials.run import Trial, run_batch
from tests.conftest import ROOT, TINY
from tests.made_store import add_trial, make_store, start_of

QUICK = (
    *TINY[:2],
    "train.epochs=1",
    "data.max_train_examples=64",
    "output.save_model=false",
    "train.checkpoints=false",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real sweep of three tiny trials of seed 1: the baseline and two learning rates."""
    folder = tmp_path_factory.mktemp("confirmed")
    store = make_store(folder)
    group = store.open_parent_run("first", {SWEEP_TAG: "first", MARGIN_TAG: "3"}, Path("first"))  # of its last call
    with initialize_config_dir(str(ROOT / "conf")):
        for number, rate in enumerate(("2e-5", "1e-2", "3e-3")):
            asked = [*QUICK, "seed=1", f"optim.lr={rate}", f"output.dir={folder}/{number}",
                     f"tracking.uri=sqlite:///{folder}/mlflow.db"]  # fmt: skip
            settings = settings_from(compose("config", asked))
            prepared = prepare(settings)
            tags = {SWEEP_TAG: "first"} | ({"distilbench.role": "baseline"} if number == 0 else {})
            job = Job(settings, settings, str, SweepContext(f"lr={rate}", {**tags, PARENT_TAG: group.run_id}))
            run_batch([Trial(job, prepared, store)])
    add_trial(store, "freeze.layers=1", text="lonely", tags={SWEEP_TAG: "lonely"})
    store.open_parent_run("diverged", {SWEEP_TAG: "diverged"}, Path("diverged"))
    add_trial(store, text="diverged", tags={SWEEP_TAG: "diverged", "distilbench.role": "baseline"})
    run = store.begin(start_of("optim.lr=10", text="diverged", tags={SWEEP_TAG: "diverged"}))
    run.finish(TrialResult(Status.DIVERGED, "the loss is nan"))
    return folder


def run_confirm(folder: Path, *asked: str) -> str | None:
    with initialize_config_dir(str(ROOT / "conf")):
        config = compose("confirm", [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output={folder}/confirm", *asked])
        return confirm(settings_from(config, ConfirmSettings))


@pytest.fixture(scope="module")
def confirmation(folder):
    """The sweep's confirmation with seeds 2 and 3, which an earlier test may have trained."""
    assert run_confirm(folder, "sweep=first", "top=1", "seeds=2") is None


def confirmed(folder: Path, name="first-confirm"):
    return make_store(folder).search({SWEEP_TAG: name})


def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(folder, capsys):
    assert run_confirm(folder, "sweep=first", "top=1", "seeds=2", "dry_run=true") is None
    shown = capsys.readouterr().out
    assert "confirming sweep first: 4 trials to train, about " in shown
    assert "seeds 2-3\n" in shown
    assert confirmed(folder) == []


def test_seeds_auto_is_as_many_as_decide_or_the_line_that_says_why_none_does(folder, capsys):
    assert run_confirm(folder, "sweep=first", "top=1", "seeds=auto", "margin=60", "dry_run=true") is None
    shown = capsys.readouterr().out
    [number] = {int(last) - 1 for last in re.findall(r": seeds 2-(\d+)$", shown, re.MULTILINE)}
    assert 2 <= number <= 10
    assert f"confirming sweep first: {2 * number} trials to train" in shown
    said = r"seeds must be a number where auto finds none for a margin of 0.1 points, got auto: no number of seeds .*"
    with pytest.raises(SettingsError, match=said):
        run_confirm(folder, "sweep=first", "top=1", "seeds=auto", "margin=0.1", "dry_run=true")


def test_an_interrupted_confirmation_goes_on_where_it_was_and_reports_both_figures(folder, monkeypatch, capsys):
    real, trained = batch.run_batch, []

    def interrupted_at_the_third(begun, *arguments):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((begun[0].settings.optim.lr, begun[0].settings.seed))
        return real(begun, *arguments)

    monkeypatch.setattr(batch, "run_batch", interrupted_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_confirm(folder, "sweep=first", "top=1", "seeds=2")
    store = make_store(folder)
    parent = store.sweep_run("first-confirm")
    assert parent.confirms == "first"
    run = store._client.get_run(parent.run_id)
    assert (run.info.status, run.data.tags["distilbench.status"]) == ("KILLED", "INTERRUPTED")
    assert len({rate for rate, _ in trained}) == 2, "the baseline and the best, with the same seed"
    assert {seed for _, seed in trained} == {2}

    monkeypatch.setattr(batch, "run_batch", real)
    capsys.readouterr()
    assert run_confirm(folder, "sweep=first", "top=1", "seeds=2") is None
    found = confirmed(folder)
    assert sorted((t.treatment["optim.lr"], t.seed) for t in found) == sorted(
        (rate, seed) for rate in {rate for rate, _ in trained} for seed in (2, 3)
    )
    assert {trial.status for trial in found} == {Status.FINISHED}
    assert store.sweep_run("first-confirm").run_id == parent.run_id, "the same run goes on"
    shown = " ".join(capsys.readouterr().out.split())
    assert "The advantage of lr=" in shown
    assert " in the sweep; " in shown
    assert " in the confirmation." in shown
    run = store._client.get_run(parent.run_id)
    assert run.info.status == "FINISHED"
    assert "The advantage of" in run.data.tags["mlflow.note.content"]
    assert "lose less than 3 points (one-sided" in shown
    assert (folder / "confirm" / "report.html").is_file()
    assert [trial.role for trial in found if trial.treatment["optim.lr"] == 2e-5] == ["baseline"] * 2
    first = store._client.get_run(store.sweep_run("first").run_id).data.tags["mlflow.note.content"]
    told = first.replace("\N{NO-BREAK SPACE}", " ")
    assert "with fresh seeds (n = 2)" in told, "the sweep's own run carries the outcome"


@pytest.mark.usefixtures("confirmation")
def test_the_sweeps_own_report_carries_its_confirmation(folder):
    with initialize_config_dir(str(ROOT / "conf")):
        request = ReportRequest("Sweep first", default_treatment(), 1.0, sweep=make_store(folder).sweep_run("first"))
        report = make_report(make_store(folder), make_store(folder).search({SWEEP_TAG: "first"}), request)
    (found,) = report.confirmation
    (row,) = [row for row in report.candidates if row.confirmation]
    assert (row.confirmation, row.final_verdict, row.confirmation.seeds) == (
        found.confirmation,
        found.confirmation.verdict,
        (2, 3),
    )
    assert found.seeds == (1,)


@pytest.mark.usefixtures("confirmation")
def test_where_the_split_chose_too_the_tests_are_corrected_for_all_that_the_sweep_tried(folder):
    store = make_store(folder)
    with initialize_config_dir(str(ROOT / "conf")):
        request = ReportRequest("Again", default_treatment(), 1.0, sweep=store.sweep_run("first-confirm"))
        trials = store.search({SWEEP_TAG: "first-confirm"})
        report = make_report(store, trials, request)
        elsewhere = make_report(store, [replace(trial, selection_split="train") for trial in trials], request)
    (row,), (other,) = report.candidates, elsewhere.candidates
    assert (report.num_settings, elsewhere.num_settings) == (2, 1)
    assert row.difference.p_holm == pytest.approx(min(2 * other.difference.p, 1))
    assert row.difference.loses_at_most > other.difference.loses_at_most
    assert "so tests are corrected for all that its sweep tried (2 settings)" in " ".join(report.notes)


def test_slices_of_a_confirmation_are_corrected_for_all_that_the_sweep_tried_too(tmp_path):
    store, slices = make_store(tmp_path), np.repeat(["web", "book"], 100)
    for name, seed, rates, tags in (("a", 1, "1234", {}), ("b", 2, "1", {CONFIRMS_TAG: "a"})):
        parent = store.open_parent_run(name, {SWEEP_TAG: name, **tags}, tmp_path)
        for rate, wrong in (("2e-5", 20), *((f"{n}e-3", 34) for n in rates)):
            add_trial(store, f"seed={seed}", f"optim.lr={rate}", wrong=wrong, slices=slices, tags={SWEEP_TAG: name},
                      parent_run_id=parent.run_id)  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf")):
        request = ReportRequest("Again", default_treatment(), 1.0, sweep=store.sweep_run("b"))
        report = make_report(store, store.search({SWEEP_TAG: "b"}), request)
    (web,) = [row.difference for row in report.slices if row.slice == "web" and not row.is_baseline]
    assert web.p_holm == pytest.approx(2 * 4 * web.p), "two slices of four settings"


@pytest.mark.usefixtures("confirmation")
def test_more_seeds_are_added_and_none_is_trained_again_but_what_mlflow_lost(folder, monkeypatch):
    trained = []
    real = batch.run_batch

    def counted(begun, *arguments):
        trained.append(begun[0].settings.seed)
        return real(begun, *arguments)

    monkeypatch.setattr(batch, "run_batch", counted)
    before = len(confirmed(folder))
    assert run_confirm(folder, "sweep=first", "top=1", "seeds=3") is None
    assert trained == [4, 4]
    assert len(confirmed(folder)) == before + 2
    run_confirm(folder, "sweep=first", "top=1", "seeds=3")
    assert trained == [4, 4]
    lost = next(trial.run_id for trial in confirmed(folder) if trial.seed == 4)
    make_store(folder)._client.delete_run(lost)
    run_confirm(folder, "sweep=first", "top=1", "seeds=3")
    assert trained == [4, 4, 4], "its run was deleted in MLflow"
    kept = (folder / "confirm").rename(folder / "moved")
    assert run_confirm(folder, "sweep=first", "top=1", "seeds=3") is None
    assert trained == [4, 4, 4], "without its directory, MLflow has all of it"
    assert {path.stem for path in (folder / "confirm").iterdir()} == {"report"}
    shutil.rmtree(folder / "confirm")
    kept.rename(folder / "confirm")


@pytest.mark.usefixtures("confirmation")
def test_trials_keep_their_directories_apart_from_each_other(folder):
    numbers = sorted(int(path.name) for path in (folder / "confirm").iterdir() if path.name.isdigit())
    assert numbers == list(range(len(numbers)))
    assert all((folder / "confirm" / str(n) / "trial.json").is_file() for n in numbers)


def test_a_trial_that_fails_is_counted_and_ends_nothing(folder, monkeypatch):
    real = batch.run_batch

    def diverges(begun, *arguments):
        outcomes = real(begun, *arguments)
        if begun[0].settings.optim.lr != 2e-5:
            directory = begun[0].directory
            replace(read_record(directory), status=Status.DIVERGED, error="nan").write(directory)
        return outcomes

    monkeypatch.setattr(batch, "run_batch", diverges)
    failure = run_confirm(folder, "sweep=first", "top=1", "seeds=2", "name=other", f"output={folder}/other")
    assert failure == "2 trials did not finish; the same command trains what is missing"
    assert [read_record(folder / "other" / str(n)).status for n in range(4)].count(Status.FINISHED) == 2


@pytest.mark.usefixtures("confirmation")
@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ([], r"^sweep must be the name of a sweep, got null; add sweep=NAME"),
        (["sweep=nowhere"], r"^sweep must be one of .*, got 'nowhere'"),
        (["sweep=../x"], r"^sweep must be letters, digits and ._\+- without a path"),
        (["sweep=first", "top=0"], r"^top must be 1 or more, got 0"),
        (["sweep=first", "seeds=1"], r"^seeds must be auto, or 2 or more, got 1"),
        (["sweep=first-confirm"], r"^sweep must be a search, got 'first-confirm', itself a confirmation of first"),
        (["sweep=lonely"], r"^sweep must be one of "),
        (
            ["sweep=diverged"],
            r"^sweep must have a finished setting .*, got .diverged. with 1 DIVERGED; .* other",
        ),
        (["sweep=first", "name=first"], r"^name must be free or that of a confirmation of first, got 'first'"),
    ],
)
def test_what_cannot_be_confirmed_is_told_in_one_line(folder, asked, line):
    with pytest.raises(SettingsError, match=line):
        run_confirm(folder, *asked)
