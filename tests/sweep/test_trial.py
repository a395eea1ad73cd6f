"""A trial in its sweep: its GPU, its seeds, and by what and when it is judged."""

from __future__ import annotations

import math
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from distilbench.engines import device as engine_device
from distilbench.identity import TrialIdentity
from distilbench.results import Evaluation, Owner, Record, Status, read_record
from distilbench.settings import PRUNERS, SettingsError
from distilbench.sweep import trial
from distilbench.sweep.job import UNRESOLVED_IDENTITY, Lease, SweepJob, objectives_of
from distilbench.sweep.trial import (
    check_pruning,
    claim_free,
    claim_gpu,
    context_of,
    pin_sources,
    pruner_of,
    pruning_callback,
    pruning_objective,
)
from distilbench.trials.prepared import Job


def _claim_and_stay(folder, claimed, release):
    claimed.put(claim_free(["2", "5", "7"], folder))
    release.wait(60)


def test_processes_get_different_gpus_and_a_dead_ones_is_free_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("getpass.getuser", None)  # a container's user may have no name
    context = multiprocessing.get_context("fork")
    claimed, release = context.Queue(), context.Event()
    workers = [context.Process(target=_claim_and_stay, args=(tmp_path, claimed, release)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert {claimed.get(timeout=30) for _ in workers} == {"2", "5", "7"}
    assert claim_free(["2", "5", "7"], tmp_path) == "2"
    assert "all of 3 GPUs have a worker" in caplog.text
    for worker in workers:
        worker.kill()
        worker.join(30)
    assert claim_free(["2", "5", "7"], tmp_path) == "2"
    assert claim_free(["2", "5", "7"], tmp_path) == "5"


@pytest.mark.parametrize(("device", "given", "left"), [("auto", "3,4", "3"), ("cuda", "GPU-8a,GPU-9b", "GPU-8a"),
                                                       ("auto", "6", "6"), ("cuda:1", "3,4", "3,4"),
                                                       ("cpu", "3,4", "3,4"), ("auto", "", "")])  # fmt: skip
def test_what_a_scheduler_or_a_person_shows_is_respected(monkeypatch, tmp_path, device, given, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(trial.tempfile, "gettempdir", lambda: str(tmp_path))
    claim_gpu(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_a_device_by_number_is_one_of_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    show_only = engine_device._show_only.__wrapped__
    with pytest.raises(SettingsError, match=r"engine.device must be .* \(cuda:0 to cuda:2\), got .*cuda:3"):
        show_only(3)
    show_only(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


MEDIAN = SimpleNamespace(pruner="median", pruner_options={"n_startup_trials": 1, "percentile": None}, grace_seconds=60)


@pytest.mark.parametrize(
    ("objectives", "directions", "behind"),
    [
        (("accuracy", "train_flops"), ["maximize", "minimize"], 0.6),
        (("train_flops", "loss"), ["minimize", "minimize"], 0.8),
        (("accuracy",), ["maximize"], 0.6),
    ],
)
def test_trials_are_pruned_by_the_objective_that_is_measured_on_the_way(tmp_path, objectives, directions, behind):
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=url, study_name="both", directions=directions)
    first = study.ask()
    study._storage.set_trial_intermediate_value(first._trial_id, 1, 0.7)
    study.tell(first, [0.7] * len(objectives))

    def callback(is_baseline: bool = False):
        job = SweepJob("both", "1", "", (), is_baseline, None, Owner.of(), tmp_path, objectives,
                       storage=url, trial_id=study.ask()._trial_id, grace_seconds=60,
                       prunes=True)  # fmt: skip
        return pruning_callback(job, MEDIAN)

    assert callback()(behind, 1) == f"{pruning_objective(objectives)} {behind:.4f} at evaluation 1 (median)"
    assert callback()(0.7, 1) is None
    assert callback(is_baseline=True)(behind, 1) is None
    assert callback()(float("nan"), 1) is None
    kept = optuna.load_study(storage=url, study_name="both")
    assert [trial.intermediate_values for trial in kept.trials] == [{1: 0.7}, {1: behind}, {1: 0.7}, {1: behind}, {}]
    assert [direction.name.lower() for direction in kept.directions] == directions
    goes_on = callback()
    optuna.delete_study(study_name="both", storage=url)
    assert goes_on(behind, 1) is None, "an outage of the study costs no trial"


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_is_optunas_and_what_it_does_not_take_is_refused(name):
    needed = {"percentile": {"percentile": 75.0}, "patient": {"patience": 2}, "threshold": {"lower": 0.5}}
    options = {**needed.get(name, {}), "n_startup_trials": None}
    made = pruner_of(SimpleNamespace(pruner=name, pruner_options=options))
    assert type(made).__name__.lower() == f"{name.replace('_', '')}pruner".replace("none", "nop")
    if name != "none":
        for wrong in ({"nothing": 1}, {}) if name in needed else ({"nothing": 1},):
            with pytest.raises(SettingsError, match=f"sweep.pruner_options must be what Optuna's {name} pruner takes"):
                pruner_of(SimpleNamespace(pruner=name, pruner_options=wrong))


def test_all_trials_of_a_sweep_use_the_sources_that_the_first_one_found(settings, tmp_path):
    url, given = f"sqlite:///{tmp_path / 'study.db'}", settings()
    study = optuna.create_study(storage=url, study_name="pinned")
    job = SweepJob("pinned", "0", "", (), False, None, Owner.of(), tmp_path, (), url, 0, 60)

    def pin(model: str = "m" * 20, data: str = "d" * 20, name: str = "tiny", settings=given, job=job):
        model, data = (SimpleNamespace(used=SimpleNamespace(fingerprint=one, describe=lambda: name))
                       for one in (model, data))  # fmt: skip
        pin_sources(SimpleNamespace(model=model, text=data), settings, job)

    pin()
    pin()
    with pytest.raises(SettingsError, match=r"^data must be what the sweep 'pinned' began with, tiny \(d{12}\), got "
                       r"other contents under that name \(e{12}\); make the first available again"):  # fmt: skip
        pin(data="e" * 20)
    with pytest.raises(SettingsError, match=r"^model must be .*, tiny \(m{12}\), got another \(e{12}\);"):
        pin(model="e" * 20, name="another")
    pin("e" * 20, settings=replace(given, model=replace(given.model, layers=1)))
    assert len(study.user_attrs["sources"]) == 3, "another model is another source"
    pin("e" * 20, job=replace(job, sweep="deleted"))


def test_a_pruner_that_these_objectives_leave_nothing_to_judge_is_refused():
    check_pruning(MEDIAN, ["train_flops", "f1"])
    with pytest.raises(SettingsError, match=r"sweep.pruner must be none for .*'train_flops', 'train_seconds'"):
        check_pruning(MEDIAN, ["train_flops", "train_seconds"])
    wilcoxon = SimpleNamespace(pruner="wilcoxon", pruner_options={})
    check_pruning(wilcoxon, ["loss"])
    with pytest.raises(SettingsError, match="must be another than wilcoxon"):
        check_pruning(wilcoxon, ["loss", "train_flops"])
    check_pruning(SimpleNamespace(pruner="none", pruner_options={"percentile": 75.0}), ["train_flops"])


@pytest.mark.parametrize(("alone", "cost"), [(True, "train_seconds"), (False, "train_flops")])
def test_cost_is_seconds_where_trials_run_alone_and_flops_where_they_share_a_device(alone, cost):
    settings = SimpleNamespace(sweep=SimpleNamespace(objectives=["accuracy", "cost"]))
    assert objectives_of(settings, alone) == ("accuracy", cost)


@pytest.mark.parametrize("before", ["0", "old"])
def test_a_job_that_was_put_back_trains_the_seeds_that_are_left(settings, tmp_path, before):
    owner, trained = Owner.of(), []
    job = SweepJob("again", "0", "", (), False, None, owner, tmp_path / "0", ("accuracy",), "", 0, 60,
                   continues=tmp_path / "old" if before == "old" else None)  # fmt: skip
    identity, finished = {"protocol": "p", "treatment": "t"}, Status.FINISHED
    for seed, status, treatment in (
        (1, finished, "t"),
        (2, Status.INTERRUPTED, "t"),
        (3, finished, "of other settings"),
    ):
        earlier = Record({"protocol": "p", "treatment": treatment, "seed": seed}, status, owner,
                         selection={"accuracy": 0.5}, figures={"seconds": 3.0, "other": 1.0})  # fmt: skip
        earlier.write(tmp_path / before / f"seed-{seed}")

    def train(seeded):
        trained.append((seeded.settings.seed, seeded.baseline.seed))
        done = Record(identity | {"seed": seeded.settings.seed}, finished, owner,
                      selection={"accuracy": 0.7}, figures={"seconds": 6.0})  # fmt: skip
        done.write(Path(seeded.settings.output.dir))

    identities = SimpleNamespace(identity_of=lambda one: TrialIdentity("p", "t", one.seed))
    runner = SimpleNamespace(prepare=lambda _: identities, train_one=train)
    given = settings("sweep.seeds=[1,2,3]")
    lease = SimpleNamespace(holds=lambda: True)
    trial.SeededTrial(Job(given, given, str), job, lease, runner).train()
    assert trained == [(2, 2), (3, 3)]
    record = read_record(job.directory)
    assert (record.status, record.identity) == (finished, identity | {"seed": None})
    assert record.selection == pytest.approx({"accuracy": (0.5 + 0.7 + 0.7) / 3})
    assert record.figures == pytest.approx({"seconds": 5.0, "seeds": 3.0, "accuracy_std": 0.2 / math.sqrt(3)})


@pytest.mark.parametrize(("holds", "status"), [(True, Status.INTERRUPTED), (False, Status.RUNNING)])
def test_a_signal_between_seeds_closes_the_trial_unless_another_process_took_it_over(settings, tmp_path, holds, status):
    job = SweepJob("cut", "0", "", (), False, None, Owner.of(), tmp_path, ("accuracy",), "", 0, 60)

    def train(_):
        raise KeyboardInterrupt

    runner = SimpleNamespace(prepare=lambda _: SimpleNamespace(identity_of=lambda one: TrialIdentity("p", "t", 1)),
                             train_one=train)  # fmt: skip
    given = settings("sweep.seeds=[1,2]")
    with pytest.raises(KeyboardInterrupt):
        trial.SeededTrial(Job(given, given, str), job, SimpleNamespace(holds=lambda: holds), runner).train()
    record = read_record(tmp_path)
    assert (record.status, record.error) == (status, "interrupted" if holds else None)


@pytest.mark.parametrize(
    ("ends", "reason", "trained", "told"),
    [
        ([Status.FINISHED, Status.DIVERGED], None, [1, 2], (Status.DIVERGED, "nan", 1.0)),
        ([Status.FINISHED] * 3, "behind", [1, 2], (Status.PRUNED, "pruned after 2 seeds: behind", 2.0)),
        ([Status.FINISHED] * 3, "behind at last", [1, 2, 3], (Status.FINISHED, None, 3.0)),
        ([Status.DIVERGED], "behind", [1], (Status.DIVERGED, "nan", 0.0)),
    ],
)
def test_seeds_end_with_the_first_that_did_not_finish_or_where_their_mean_is_behind(
    settings, tmp_path, monkeypatch, ends, reason, trained, told
):
    owner, seen, values = Owner.of(), [], []
    job = SweepJob("all", "0", "", (), False, None, owner, tmp_path / "0", ("accuracy",), "", 0, 60, prunes=True)

    def train(seeded):
        seen.append(seeded.settings.seed)
        status = ends[len(seen) - 1]
        error = None if status is Status.FINISHED else "nan"
        ended = Record(UNRESOLVED_IDENTITY, status, owner, None, error, {}, {"accuracy": 0.5 + 0.1 * len(seen)})
        ended.write(Path(seeded.settings.output.dir))

    def callback(value, count):
        values.append((round(value, 6), count))
        return reason if count == (2 if reason == "behind" else 3) else None

    monkeypatch.setattr(trial, "pruning_callback", lambda job, settings: callback if job.prunes else None)
    identities = SimpleNamespace(identity_of=lambda one: TrialIdentity("p", "t", one.seed))
    runner = SimpleNamespace(prepare=lambda _: identities, train_one=train)
    given = settings("sweep.seeds=[1,2,3]")
    trial.SeededTrial(Job(given, given, str), job, SimpleNamespace(holds=lambda: True), runner).train()
    record = read_record(job.directory)
    assert seen == trained
    assert values == [(0.6, 1), (0.65, 2)][: ends[: len(trained)].count(Status.FINISHED)]
    assert (record.status, record.error, record.figures["seeds"]) == told
    assert ("accuracy_std" in record.figures) == (record.figures["seeds"] > 1)


@pytest.mark.parametrize(
    ("eval_steps", "step", "epoch", "count"),
    [("null", 10, 1.0, 1), ("null", 20, 2.0, 2), ("4", 4, 0.4, 1), ("4", 8, 0.8, 2), ("4", 10, 1.0, 3)],
)
def test_a_trial_is_judged_after_each_evaluation_and_told_who_it_is(
    settings, tmp_path, monkeypatch, eval_steps, step, epoch, count
):
    job = SweepJob("one", "3", "lr=1", (), True, "parent", Owner.of(), tmp_path, ("train_flops", "f1"),
                   "", 0, 60, is_quiet=True, prunes=True, is_selection=True)  # fmt: skip
    monkeypatch.setattr(trial, "pruning_callback", lambda job, settings: lambda value, count: f"{value} {count}")
    given, lease = settings(f"train.eval_steps={eval_steps}"), object()
    context = context_of(job, given, lease)
    evaluation = Evaluation("validation", step, epoch, loss=0.5, accuracy=0.7, f1=0.6, mcc=0.4)
    assert context.pruning_callback(evaluation) == f"0.6 {count}"
    assert (context.name, context.tags["mlflow.parentRunId"], context.tags) == ("3 lr=1", "parent", job.tags)
    assert (context.is_quiet, context.is_selection, context.lease, context.continues) == (True, True, lease, tmp_path)
    assert context_of(replace(job, continues=tmp_path / "2"), given, lease).continues == tmp_path / "2"
    monkeypatch.setattr(trial, "pruning_callback", lambda job, settings: None)
    assert context_of(job, given, lease).pruning_callback(evaluation) is None


def test_a_study_that_is_deleted_meanwhile_costs_a_trial_its_heartbeat_alone(tmp_path, caplog):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=url, study_name="gone")
    owner, number = Owner.of(), study.ask()._trial_id
    study._storage.set_trial_user_attr(number, "owner", asdict(owner))
    lease = Lease(SweepJob("gone", "0", "", (), False, None, owner, tmp_path, ("accuracy",), url, number, 60))
    assert lease.holds()
    optuna.delete_study(study_name="gone", storage=url)
    with caplog.at_level("WARNING"):
        assert lease.holds()
        assert lease.holds()
    warned = [record.message.partition(" (")[0] for record in caplog.records if record.name.startswith("distilbench")]
    assert warned == ["the study of trial 0 does not answer here"]


@pytest.mark.parametrize(("is_quiet", "is_dead", "left"), [(True, True, [0]), (True, False, []), (False, True, [])])
def test_a_worker_of_joblib_leaves_after_its_trial_if_its_sweep_was_killed(
    tmp_path, monkeypatch, is_quiet, is_dead, left
):
    mine, exits = Owner.of(), []
    owner = Owner(mine.host, mine.pid, mine.started - 3600 * is_dead)
    monkeypatch.setattr(os, "_exit", exits.append)
    trial.exit_if_orphaned(
        SweepJob("alone", "0", "", (), False, None, owner, tmp_path, ("accuracy",), "", 0, 60, is_quiet=is_quiet)
    )
    assert exits == left
