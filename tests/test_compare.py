"""The report command: what it finds, what it refuses in one line, and what a sweep leaves behind at its end."""

from __future__ import annotations

import csv
import errno
import io
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from distilbench.compare import compare_stored, to_hydra_argument
from distilbench.composition import default_treatment
from distilbench.report.from_store import report_sweep
from distilbench.results import Status, TrialResult, Verdict
from distilbench.settings import CompareSettings, SettingsError, settings_from
from distilbench.tracking.search import CONFIRMS_TAG, MARGIN_TAG, SWEEP_TAG
from distilbench.tracking.store import MlflowStore
from tests.commands import HEAVY, Workspace, split_imports
from tests.conftest import ROOT
from tests.made_store import add_trial, make_store, start_of

COMMAND = "distilbench.compare"
COSINE = ("scheduler=cosine", "optim.lr=3e-5", "optim.weight_decay=0.05", "scheduler.warmup_ratio=0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with a sweep, the report's three experiments, one without predictions and one of another protocol."""
    folder = tmp_path_factory.mktemp("compared")
    store = make_store(folder)
    group = store.open_parent_run("first", {SWEEP_TAG: "first"}, Path("first"))
    inside = {"parent_run_id": group.run_id, "tags": {SWEEP_TAG: "first"}}
    for seed in (1, 2):
        add_trial(store, f"seed={seed}", **inside)
        add_trial(store, f"seed={seed}", "freeze.layers=1", wrong=60, seconds=30, **inside)
        add_trial(store, f"seed={seed}", *COSINE, wrong=10, **inside)
    add_trial(store, "optim.lr=0.5", text="other", tags={SWEEP_TAG: "alien"})
    store.open_parent_run("empty", {SWEEP_TAG: "empty"}, Path("empty"))
    add_trial(store, "freeze.layers=2", predictions=False, tags={SWEEP_TAG: "blank"})
    broken = store.open_parent_run("broken", {SWEEP_TAG: "broken"}, Path("broken"))
    for seed in (1, 2):
        start = start_of(
            f"seed={seed}", "optim.lr=9", text="broken", tags={SWEEP_TAG: "broken"}, parent_run_id=broken.run_id
        )
        store.begin(start).finish(TrialResult(Status.DIVERGED, "the loss is nan"), None)
    return folder


def arguments(folder: Path, *asked: str) -> list[str]:
    return [to_hydra_argument(argument) for argument in (f"tracking.uri=sqlite:///{folder}/mlflow.db", *asked)]


def compare(folder: Path, output: Path, *asked: str) -> None:
    """Run the command in this process, where importing costs nothing."""
    with initialize_config_dir(str(ROOT / "conf")):
        config = compose("compare", arguments(folder, f"output={output}", *asked))
        compare_stored(settings_from(config, CompareSettings))


def rows(output: Path) -> dict[str, dict[str, str]]:
    return {row["setting"]: row for row in csv.DictReader(io.StringIO((output / "report.csv").read_text()))}


def test_a_sweep_is_reported_on_screen_and_in_four_files(folder, tmp_path, capsys):
    compare(folder, tmp_path, "sweep=first")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.html", "report.md", "report.tex"]
    found = rows(tmp_path)
    assert len(found) == 3
    cosine = next(row for label, row in found.items() if "cosine" in label)
    assert (cosine["seeds"], cosine["accuracy"], cosine["difference_points"]) == ("1 2", "0.95", "5.0")
    assert (cosine["verdict"], found["layers=1"]["verdict"]) == ("ahead", "worse")
    assert float(found["layers=1"]["time_gain_percent"]) == pytest.approx(50)
    shown = " ".join(capsys.readouterr().out.split())
    assert "is ahead, yet to be confirmed, +5.00 points" in shown
    assert "python -m distilbench.confirm sweep=first" in shown


def test_experiments_are_found_by_their_settings_and_named(folder, tmp_path, capsys):
    compare(folder, tmp_path, "experiment=baseline,hyperparameters", "layout=paper", "sweep=first")
    labels = list(rows(tmp_path))
    assert any(label.startswith("hyperparameters: ") for label in labels)
    assert any(label.startswith("baseline: ") for label in labels)
    assert len(labels) == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "experiment" in told
    assert "Picked from sweep first: the correction does not count its 1 other setting" in told
    assert "ahead" in {row["verdict"] for row in rows(tmp_path).values()}  # picked, so still to be confirmed


def test_experiments_are_found_that_set_what_a_plain_trial_does_not_have(tmp_path):
    store = make_store(tmp_path)
    add_trial(store)
    add_trial(store, "experiment=bias", wrong=30)
    compare(tmp_path, tmp_path / "report", "experiment=baseline,bias,lora")
    assert sorted(rows(tmp_path / "report")) == ["baseline: freeze=depth lr=2e-05", "bias: freeze=bias lr=0.001"]


def test_runs_are_found_by_id_and_compared_with_the_stores_baseline(folder, tmp_path, capsys):
    compare(folder, tmp_path / "all", "sweep=first")
    (run_id, _) = rows(tmp_path / "all")["layers=1"]["runs"].split()
    compare(folder, tmp_path / "one", f"runs={run_id}")
    found = rows(tmp_path / "one")
    assert (found["layers=1"]["verdict"], found["layers=1"]["seeds"]) == ("worse", "1")
    told = " ".join(capsys.readouterr().out.split())
    assert "The baseline is not among these trials" in told
    assert (
        "Picked from sweep first: the correction does not count its 1 other setting; python -m distilbench.compare"
        in told
    )


def test_a_run_of_its_own_is_not_picked_from_the_sweep_that_its_baseline_is_of(folder, tmp_path, capsys):
    alone = add_trial(make_store(folder), "seed=1", "optim.lr=0.1", wrong=0)
    compare(folder, tmp_path, f"runs={alone}")
    assert rows(tmp_path)["lr=0.1"]["verdict"] == "better"
    assert "Picked from" not in capsys.readouterr().out


def test_a_baseline_may_be_named_or_gone_without(folder, tmp_path):
    compare(folder, tmp_path / "all", "sweep=first")
    cosine = next(row for label, row in rows(tmp_path / "all").items() if "cosine" in label)
    compare(folder, tmp_path / "named", "sweep=first", f"baseline={cosine['runs'].split()[0]}")
    assert next(label for label, row in rows(tmp_path / "named").items() if row["is_baseline"] == "True").count(
        "cosine"
    )
    compare(folder, tmp_path / "none", "sweep=first", "baseline=none")
    assert {row["verdict"] for row in rows(tmp_path / "none").values()} == {""}


def test_where_a_sweeps_own_baseline_failed_a_finished_one_of_the_store_takes_its_place(tmp_path, capsys):
    store = make_store(tmp_path)
    add_trial(store)
    inside = {SWEEP_TAG: "halted"}
    failed = start_of(tags=inside | {"distilbench.role": "baseline"})
    store.begin(failed).finish(TrialResult(Status.FAILED, "no space left"), None)
    add_trial(store, "freeze.layers=1", wrong=60, tags=inside)
    compare(tmp_path, tmp_path / "report", "sweep=halted")
    assert rows(tmp_path / "report")["layers=1"]["verdict"] == "worse"
    assert "The baseline is not among these trials" in capsys.readouterr().out


def test_of_a_grid_over_amounts_of_text_without_a_baseline_the_largest_amount_is_the_baselines(tmp_path):
    store = make_store(tmp_path)
    for amount, wrong in ((64, 10), ("null", 20), (128, 15)):
        add_trial(store, f"data.max_train_examples={amount}", wrong=wrong, tags={SWEEP_TAG: "amounts"})
    compare(tmp_path, tmp_path / "report", "sweep=amounts")
    (base,) = [row["setting"] for row in rows(tmp_path / "report").values() if row["is_baseline"] == "True"]
    assert base == "baseline: max_train_examples=null"


def test_trials_that_repeat_a_setting_and_a_seed_are_counted_where_they_are_left_out(tmp_path, capsys):
    store = make_store(tmp_path)
    for overrides in ((), ("freeze.layers=1",), ("freeze.layers=1", "engine=trainer")):
        add_trial(store, *overrides, tags={SWEEP_TAG: "engines"})
    compare(tmp_path, tmp_path / "report", "sweep=engines")
    assert rows(tmp_path / "report")["layers=1"]["seeds"] == "42"
    assert "Left out: 1 finished trial whose setting and seed a newer one has." in capsys.readouterr().out


def test_the_margin_decides_what_is_good_enough(folder, tmp_path):
    compare(folder, tmp_path / "wide", "sweep=first", "margin=40")
    assert rows(tmp_path / "wide")["layers=1"]["verdict"] == "good enough"
    text = (tmp_path / "wide" / "report.md").read_text()
    assert "Good enough: shown to lose less than 40 points" in text
    with pytest.raises(SettingsError, match=r"^margin must be in \(0, 100\], got 0"):
        compare(folder, tmp_path, "sweep=first", "margin=0")


def test_a_sweeps_own_margin_is_kept_with_it(folder, tmp_path):
    store = make_store(folder)
    group = store.open_parent_run("wide", {SWEEP_TAG: "wide", MARGIN_TAG: "40"}, Path("wide"))
    for overrides, wrong in (((), 20), (("freeze.layers=1",), 60)):
        add_trial(store, *overrides, wrong=wrong, parent_run_id=group.run_id, tags={SWEEP_TAG: "wide"}, text="wide")
    compare(folder, tmp_path, "sweep=wide")
    assert rows(tmp_path)["layers=1"]["verdict"] == "good enough"


def test_of_rows_beyond_those_asked_for_no_predictions_are_read(folder, tmp_path, monkeypatch):
    read, really = [], MlflowStore.predictions
    monkeypatch.setattr(MlflowStore, "predictions", lambda store, run_id: read.append(run_id) or really(store, run_id))
    compare(folder, tmp_path, "sweep=first", "rows=1")
    found = rows(tmp_path)
    best = next(row for label, row in found.items() if "cosine" in label)
    base = next(row for row in found.values() if row["is_baseline"] == "True")
    assert sorted(read) == sorted(f"{best['runs']} {base['runs']}".split())


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["sweep=nowhere"], r"^sweep must be one of .*first.*, got 'nowhere' in experiment distilbench"),
        (["sweep=empty"], r"must hold a trial, got none for sweep=empty; train some first. A store that was deleted"),
        (["sweep=alien"], r"^a baseline must be there to compare with, got none of protocol .*baseline=none"),
        (["experiment=quick,nonsense"], r"^experiment must be one of baseline, .*, got 'nonsense'"),
        (["experiment=layer_freezing"], r"must hold a trial, got none for experiment=layer_freezing"),
        (["runs=[0000]"], r"^runs must be ids of trials in .*, got '0000'"),
        (["sweep=blank"], r"^finished runs must have their predictions, got none for 1 .*untested=show"),
        (["sweep=first", "baseline=0000"], r"^baseline must be the id of a run, or none, got '0000'"),
        (["sweep=first", "layout=wide"], r"^layout must be one of full, paper, got 'wide'"),
        (["sweep=first", "rows=0"], r"^rows must be 1 or more, got 0"),
        (["tracking=none", "sweep=first"], r"^tracking must be mlflow"),
        ([], r"^what to compare must be sweep=NAME"),
    ],
)
def test_what_cannot_be_reported_is_told_in_one_line_and_leaves_nothing(folder, tmp_path, asked, line):
    output = tmp_path / "report"
    with pytest.raises(SettingsError, match=line) as refused:
        compare(folder, output, *asked)
    assert "\n" not in str(refused.value)
    assert not output.exists()


def test_runs_without_predictions_can_be_shown_untested(folder, tmp_path):
    compare(folder, tmp_path, "sweep=blank", "untested=show")
    assert rows(tmp_path)["layers=2"]["not_tested"] == "predictions are missing"


def test_protocols_are_never_mixed_and_one_can_be_chosen(folder, tmp_path):
    from distilbench.settings import TrackingSettings
    from distilbench.tracking.connect import find_store

    store = find_store(TrackingSettings("mlflow", f"sqlite:///{folder}/mlflow.db", "distilbench", 0))
    (alien,) = store.search({SWEEP_TAG: "alien"})
    first = store.search({SWEEP_TAG: "first"})
    runs = f"runs={','.join(trial.run_id for trial in (alien, *first))}"
    with pytest.raises(SettingsError, match=r"must be of one protocol, got 2: .*tiny on text.*; choose one: protocol="):
        compare(folder, tmp_path, runs)
    compare(folder, tmp_path, runs, f"protocol={first[0].protocol_id}")
    assert len(rows(tmp_path)) == 3
    with pytest.raises(SettingsError, match=f"protocol must be that of a trial, {alien.protocol_id}, got "):
        compare(folder, tmp_path, f"runs={alien.run_id}", f"protocol={first[0].protocol_id}")


def test_lists_are_typed_as_people_type_them():
    assert to_hydra_argument("experiment=a,b") == "experiments=[a,b]"
    assert to_hydra_argument("runs=a,b") == "runs=[a,b]"
    assert to_hydra_argument("runs=[a,b]") == "runs=[a,b]"
    assert to_hydra_argument("sweep=a=b") == "sweep=a=b"
    assert to_hydra_argument("--help") == "--help"


def test_at_a_sweeps_end_its_report_is_printed_saved_and_attached(folder, tmp_path):
    store = make_store(folder)
    stream = io.StringIO()
    with initialize_config_dir(str(ROOT / "conf")):
        report = report_sweep(store, "first", tmp_path, default_treatment(), 1.0, Console(file=stream, width=100))
    assert len(report.rows) == 3
    assert "Sweep first" in stream.getvalue()
    parent = store.sweep_run("first").run_id
    files = [file.path for file in store._client.list_artifacts(parent)]
    assert files == sorted(path.name for path in tmp_path.iterdir()) == [
        "report.csv", "report.html", "report.md", "report.tex"
    ]  # fmt: skip
    note = store._client.get_run(parent).data.tags["mlflow.note.content"]
    link = r"http://127\.0\.0\.1:5000/#/experiments/1/runs/\w{32}\?workflowType=machine_learning"
    assert re.search(rf"\| \[layers=1\]\({link}\) \| -20\.00", note)


def test_a_report_that_finds_no_room_leaves_the_last_one_whole(folder, tmp_path, monkeypatch):
    compare(folder, tmp_path, "sweep=first")
    whole, write = {path: path.read_text() for path in tmp_path.iterdir()}, Path.write_text

    def fill(path, text, **more):
        write(path, text[:100], **more)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space left"):
        compare(folder, tmp_path, "sweep=first")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == whole


def test_a_sweep_whose_every_trial_failed_still_gets_its_report(folder, tmp_path):
    stream = io.StringIO()
    with initialize_config_dir(str(ROOT / "conf")):
        report_sweep(make_store(folder), "broken", tmp_path, default_treatment(), 1.0, Console(file=stream, width=100))
    assert "No trial finished: 2 DIVERGED." in stream.getvalue()
    assert (tmp_path / "report.html").is_file()


def test_a_sweep_without_trials_has_no_report(folder, tmp_path):
    with initialize_config_dir(str(ROOT / "conf")):
        assert report_sweep(make_store(folder), "empty", tmp_path, default_treatment(), 1.0) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
def test_the_command_line_reports_and_refuses_with_its_exit_status(folder):
    workspace = Workspace(folder)
    done = workspace.run("experiment=baseline,hyperparameters", "sweep=first", "layout=paper", program=COMMAND)
    assert done.returncode == 0, done.stderr
    assert f"report  {folder}/outputs/reports/first/report.html" in done.stdout.replace("\n", "")
    assert "\x1b" not in done.stdout
    refused = workspace.run("sweep=nowhere", program=COMMAND)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert refused.stderr.startswith("distilbench: sweep must be one of ")


@pytest.mark.e2e
def test_help_and_mistakes_answer_without_importing_anything_heavy(folder):
    workspace = Workspace(folder)
    shown = workspace.run("--help", program=COMMAND, fresh=True, PYTHONPROFILEIMPORTTIME="1")
    assert shown.returncode == 0
    assert "experiment=baseline,layer_freezing,hyperparameters layout=paper" in shown.stdout
    refused = workspace.run(program=COMMAND, fresh=True, PYTHONPROFILEIMPORTTIME="1")
    assert refused.returncode == 2
    for ended in (shown, refused):
        imported = split_imports(ended.stderr)[1]
        assert "hydra" in imported
        assert imported & {*HEAVY, "optuna"} == set()


@pytest.mark.parametrize("margin", [3.0, 0.6], ids=["good enough alone", "undecided alone, by a lower bound"])
def test_at_a_sweeps_end_a_trial_says_what_the_report_does_where_it_says_more_alone(tmp_path, margin):
    """A loss of half a point, shown to be below 3 points alone, but not beside nine others."""
    store = make_store(tmp_path)
    parent = store.open_parent_run("many", {SWEEP_TAG: "many"}, tmp_path)
    ids = []
    for number in range(11):
        tags = {SWEEP_TAG: "many", "distilbench.trial": str(number)}
        ids.append(add_trial(store, *([f"optim.lr={number}e-3"] if number else []), wrong=20 + (number > 0), tags=tags,
                             parent_run_id=parent.run_id))  # fmt: skip
        told = {"difference_points": -0.5}
        store.add_comparison(ids[-1], "alone", told, "-0.50 points against the baseline. Good enough")
    for _ in range(2):  # a report made again adds nothing
        with initialize_config_dir(str(ROOT / "conf")):
            report = report_sweep(store, "many", tmp_path, default_treatment(), margin, Console(quiet=True))
    assert {(row.number, row.final_verdict) for row in report.candidates} == {
        (str(n), Verdict.UNDECIDED) for n in range(1, 11)
    }
    described = [store._client.get_run(run_id).data.tags["mlflow.note.content"] for run_id in ids]
    assert described[0].startswith("-0.50 points"), "of the baseline nothing is claimed"
    told = "against the baseline. Sweep many: undecided (n = 1), corrected for the 10 settings tried.\n\n**Model** "
    assert described[3].startswith("-0.50 points (95 % ")
    assert told in described[3]
    text = Path(store._client.download_artifacts(ids[3], "comparison.md")).read_text()
    assert "lr=0.003" in text
    assert "undecided" in text
    assert "good enough" not in text.lower()


def test_at_a_sweeps_end_trials_are_compared_that_were_not_yet(tmp_path):
    """Such as those that ended before their baseline, or while the store was gone."""
    store = make_store(tmp_path)
    inside = {"parent_run_id": store.open_parent_run("late", {SWEEP_TAG: "late"}, tmp_path).run_id}
    ids = [add_trial(store, *overrides, wrong=wrong, tags={SWEEP_TAG: "late", "distilbench.trial": str(wrong)},
                     **inside)
           for overrides, wrong in (((), 20), (("freeze.layers=1",), 60))]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf")):
        report_sweep(store, "late", tmp_path, default_treatment(), 1.0, Console(quiet=True))
    base, frozen = (store._client.get_run(run_id).data for run_id in ids)
    assert frozen.metrics["difference_points"] == pytest.approx(-20)
    assert frozen.metrics["mcnemar_p"] < 0.001
    assert "against the baseline. Sweep late: worse with this seed (n = 1)" in frozen.tags["mlflow.note.content"]
    assert "comparison.md" in [file.path for file in store._client.list_artifacts(ids[1])]
    assert "difference_points" not in base.metrics


def test_at_a_sweeps_end_a_trial_claims_nothing_whose_other_seed_diverged(tmp_path):
    store = make_store(tmp_path)
    parent = store.open_parent_run("lucky", {SWEEP_TAG: "lucky"}, tmp_path)
    inside = {"parent_run_id": parent.run_id, "tags": {SWEEP_TAG: "lucky"}}
    _, _, lucky = (add_trial(store, *asked, **inside) for asked in (["seed=1"], ["seed=2"], ["seed=1", "optim.lr=1"]))
    store.begin(start_of("seed=2", "optim.lr=1", **inside)).finish(TrialResult(Status.DIVERGED, "nan"), None)
    store.add_comparison(lucky, "alone", {"difference_points": 0.0}, "0.00 points against the baseline. Good enough")
    with initialize_config_dir(str(ROOT / "conf")):
        report_sweep(store, "lucky", tmp_path, default_treatment(), 40.0, Console(quiet=True))
    described = store._client.get_run(lucky).data.tags["mlflow.note.content"]
    assert "Sweep lucky: not judged: other seeds diverged or were pruned, corrected for the setting tried." in described
    assert "Good enough" not in described


def test_seeds_that_were_not_compared_get_each_its_own_figures_not_their_settings_mean(tmp_path):
    store = make_store(tmp_path)
    inside = {
        "parent_run_id": store.open_parent_run("late", {SWEEP_TAG: "late"}, tmp_path).run_id,
        "tags": {SWEEP_TAG: "late"},
    }
    wrong = {("seed=1",): 20, ("seed=2",): 40, ("seed=1", "freeze.layers=1"): 60, ("seed=2", "freeze.layers=1"): 50}
    ids = [add_trial(store, *overrides, wrong=number, **inside) for overrides, number in wrong.items()]
    with initialize_config_dir(str(ROOT / "conf")):
        report_sweep(store, "late", tmp_path, default_treatment(), 1.0, Console(quiet=True))
    told = [store._client.get_run(run_id).data.metrics for run_id in ids[2:]]
    assert [one["difference_points"] for one in told] == pytest.approx([-20, -5])  # each against its seed's baseline
    assert all("mcnemar_p" in one for one in told)


def test_a_confirmation_with_another_margin_leaves_its_sweeps_report_to_the_sweeps_own(tmp_path):
    store = make_store(tmp_path)
    for name, seed, tags in (("first", 1, {MARGIN_TAG: "1"}), ("again", 2, {MARGIN_TAG: "30", CONFIRMS_TAG: "first"})):
        parent = store.open_parent_run(name, {SWEEP_TAG: name, **tags}, tmp_path)
        for overrides in ((), ("freeze.layers=1",)):
            add_trial(store, f"seed={seed}", *overrides, parent_run_id=parent.run_id, tags={SWEEP_TAG: name})
    with initialize_config_dir(str(ROOT / "conf")):
        report_sweep(store, "again", tmp_path, default_treatment(), 30.0, Console(quiet=True))
    again, first = (store._client.get_run(store.sweep_run(name).run_id).data for name in ("again", "first"))
    assert "is good enough with this seed: it loses at most" in again.tags["mlflow.note.content"]
    assert (
        "Nothing was shown to be better than the baseline, or to lose less than 1 point"
        in first.tags["mlflow.note.content"]
    )
