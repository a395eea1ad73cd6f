"""A GPU for each process: a pure choice among names, held by locks, where there is none to be seen."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from distilbench.engines import device as engine_device
from distilbench.identity import TrialIdentity
from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep import trial
from distilbench.sweep.job import Lease, SweepJob, objectives_of
from distilbench.sweep.trial import check_pruning, claim_free, claim_gpu, pruning_callback, pruning_objective
from distilbench.trials.prepared import Job


def _claim_and_stay(folder, claimed, release):
    claimed.put(claim_free(["2", "5", "7"], folder))
    release.wait(60)


def test_processes_get_different_gpus_and_a_dead_ones_is_free_again(tmp_path, caplog):
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

    def callback():
        job = SweepJob("both", "1", "", (), False, None, Owner.of_this_process(), tmp_path, objectives,
                       storage=url, trial_id=study.ask()._trial_id, grace_seconds=60,
                       prunes=True)  # fmt: skip
        return pruning_callback(job, MEDIAN)

    assert callback()(behind, 1) == f"{pruning_objective(objectives)} {behind:.4f} at evaluation 1 (median)"
    assert callback()(0.7, 1) is None
    assert callback()(float("nan"), 1) is None
    kept = optuna.load_study(storage=url, study_name="both")
    assert [trial.intermediate_values for trial in kept.trials] == [{1: 0.7}, {1: behind}, {1: 0.7}, {}]
    assert [direction.name.lower() for direction in kept.directions] == directions


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


def test_a_job_that_was_put_back_trains_the_seeds_that_are_left(settings, tmp_path):
    owner, trained = Owner.of_this_process(), []
    job = SweepJob("again", "0", "", (), False, None, owner, tmp_path / "0", ("accuracy",), "", 0, 60)
    identity = {"protocol": "p", "treatment": "t", "seed": 1}
    ends = {1: (Status.FINISHED, None), 2: (Status.INTERRUPTED, "its process was killed")}
    for seed, (status, error) in ends.items():
        Record(identity, status, owner, None, error, {}, {"accuracy": 0.5}).write(job.directory / f"seed-{seed}")

    def train(seeded):
        trained.append(seeded.settings.seed)
        done = Record(identity, Status.FINISHED, owner, None, None, {}, {"accuracy": 0.7})
        done.write(Path(seeded.settings.output.dir))

    identities = SimpleNamespace(identity_of=lambda one: TrialIdentity("p", "t", one.seed))
    runner = SimpleNamespace(prepare=lambda _: identities, train_one=train)
    given = settings("sweep.seeds=[1,2,3]")
    lease = SimpleNamespace(holds=lambda: True)
    trial._train_seeds(Job(given, given, str), job, lease, runner)
    assert trained == [2, 3]
    assert read_record(job.directory).status is Status.FINISHED


def test_a_study_that_is_deleted_meanwhile_costs_a_trial_its_heartbeat_alone(tmp_path, caplog):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=url, study_name="gone")
    owner, number = Owner.of_this_process(), study.ask()._trial_id
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
    mine, exits = Owner.of_this_process(), []
    owner = Owner(mine.host, mine.pid, mine.started - 3600 * is_dead)
    monkeypatch.setattr(os, "_exit", exits.append)
    trial.exit_if_orphaned(
        SweepJob("alone", "0", "", (), False, None, owner, tmp_path, ("accuracy",), "", 0, 60, is_quiet=is_quiet)
    )
    assert exits == left
