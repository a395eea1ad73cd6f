"""What may differ between two calls of one sweep."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from optuna.trial import create_trial

from distilbench.identity import OLD_DEFAULTS, SOURCES
from distilbench.results import RECORD
from distilbench.settings import SettingsError
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.resume import (
    SWEEP_FILE,
    _check_same_protocol,
    _params_in,
    check_unchanged,
    open_studies,
)
from distilbench.sweep.space import Point, Space
from distilbench.sweep.storage import storage_at
from distilbench.sweep.study import BASELINE_STUDY, SweepStudy
from distilbench.sweep.trial import SOURCES_ATTRIBUTE
from distilbench.tracking.start import format_param


def identity(**fixed: str):
    return {"space": {}, "fixed": fixed, "objectives": ["accuracy"], "directions": ["maximize"]}


def test_a_setting_that_an_older_version_did_not_have_is_null_or_what_that_version_did():
    older = identity(seed="1")
    check_unchanged(older, identity(seed="1", **{"data.pair_column": "null"}), "first", extend=False)
    former = {key: format_param(value) for key, value in OLD_DEFAULTS.items()}
    check_unchanged(older, identity(seed="1", **former), "first", extend=False)
    with pytest.raises(SettingsError, match=r"which had data\.pair_column unset \(now two\); take another name$"):
        check_unchanged(older, identity(seed="1", **{"data.pair_column": "two"}), "first", extend=False)


def test_a_setting_that_is_gone_is_a_change_and_each_is_named():
    kept = identity(seed="1", **{"data.pair_column": "two"})
    with pytest.raises(SettingsError, match=r"which had data\.pair_column two \(now unset\); take another name$"):
        check_unchanged(kept, identity(seed="1"), "first", extend=True)
    many = identity(**{f"setting{i}": "1" for i in range(8)})
    with pytest.raises(SettingsError, match=r"which had setting0 1 \(now unset\); .*; setting5 1 .* and 2 more; take"):
        check_unchanged(many, identity(), "first", extend=True)


def test_a_group_that_varies_in_one_of_two_calls_has_its_members_fixed_in_the_other():
    varies = {**identity(), "space": {"freeze": distribution_to_json(CategoricalDistribution(["none", "layers3"]))}}
    fixed = identity(**{"freeze.layers": "3", "freeze.policy": "depth"})
    for kept, now in ((varies, fixed), (fixed, varies)):
        check_unchanged(kept, now, "first", extend=True)
        with pytest.raises(SettingsError, match=r"which had freeze [^;]+; take another name or add sweep.on_change"):
            check_unchanged(kept, now, "first", extend=False)


LAYERS, RATE = IntDistribution(0, 2), FloatDistribution(1e-5, 1e-3, log=True)
KIND = CategoricalDistribution(["linear", "cosine"])
FIXED = {"train.epochs": "1", "scheduler.name": "linear", "optim.lr": "2e-05", "freeze.layers": "3"}


@pytest.mark.parametrize(
    ("had", "now", "remedy"),
    [
        (FloatDistribution(0, 1), FloatDistribution(0, 2), "take another name or add sweep.on_change=extend"),
        (CategoricalDistribution([0, 1]), CategoricalDistribution([0, 1, 2]), "take another name"),
    ],
)
def test_extending_is_only_advised_where_it_is_possible(had, now, remedy):
    kept, changed = ({**identity(), "space": {"optim.lr": distribution_to_json(one)}} for one in (had, now))
    with pytest.raises(SettingsError, match=f"; {remedy}$"):
        check_unchanged(kept, changed, "first", extend=False)


def plan(dimensions, custom=None):
    kept = {key: value for key, value in FIXED.items() if key not in dimensions}
    return SimpleNamespace(space=Space(dimensions, [], custom), fixed=kept, objectives=("accuracy",))


def trial(**params):
    kinds = {"freeze.layers": IntDistribution(0, 9), "optim.lr": FloatDistribution(1e-9, 1.0), "scheduler.name": KIND}
    named = {key.replace("__", "."): value for key, value in params.items()}
    return create_trial(params=named, distributions={key: kinds[key] for key in named}, value=0.5)


@pytest.mark.parametrize(
    ("dimensions", "params", "expected"),
    [
        ({"optim.lr": RATE}, {"optim__lr": 1e-4}, {"optim.lr": 1e-4}),
        ({"optim.lr": RATE}, {"optim__lr": 1e-1}, None),
        ({"optim.lr": RATE, "freeze.layers": IntDistribution(0, 6)}, {"optim__lr": 1e-4},
         {"optim.lr": 1e-4, "freeze.layers": 3}),
        ({"optim.lr": RATE, "freeze.layers": LAYERS}, {"optim__lr": 1e-4}, None),
        ({"scheduler.name": KIND}, {}, {"scheduler.name": "linear"}),
        ({"optim.lr": RATE}, {"optim__lr": 1e-4, "freeze__layers": 3}, {"optim.lr": 1e-4}),
        ({"optim.lr": RATE}, {"optim__lr": 1e-4, "freeze__layers": 2}, None),
        ({"model.layers": LAYERS}, {}, None),
    ],
)  # fmt: skip
def test_a_trial_lies_in_a_space_where_it_has_what_is_fixed_and_a_value_for_what_varies(dimensions, params, expected):
    assert _params_in(plan(dimensions), trial(**params), FIXED) == expected


def test_a_warm_start_keeps_what_a_custom_function_suggested():
    custom = plan({"freeze.layers": LAYERS}, custom=print)
    del custom.fixed["optim.lr"]
    assert _params_in(custom, trial(freeze__layers=1, optim__lr=5e-3), FIXED) == {
        "freeze.layers": 1, "optim.lr": 5e-3
    }  # fmt: skip
    custom.space = replace(custom.space, custom=None)
    assert _params_in(custom, trial(freeze__layers=1, optim__lr=5e-3), FIXED) is None


def test_another_protocol_or_other_objectives_are_refused():
    identity = {"fixed": {**FIXED, "train.metric": "f1"}, "objectives": ["loss"]}
    with pytest.raises(SettingsError, match=r"of the same protocol, got .old.; it had train.metric=f1 "):
        _check_same_protocol(plan({}), identity, "old")
    for source in SOURCES:
        with pytest.raises(SettingsError, match=rf"of the same protocol, .*; it had {source}=other \(now None\)"):
            _check_same_protocol(plan({}), identity | {"fixed": {**FIXED, source: "other"}}, "old")
    both = SimpleNamespace(**vars(plan({})) | {"objectives": ("loss", "accuracy")})
    with pytest.raises(SettingsError, match=r"^sweep.warm_start must be a sweep that measured loss, accuracy, got"):
        _check_same_protocol(both, identity | {"fixed": FIXED}, "old")


@pytest.fixture
def plan_of(settings, tmp_path):
    """Return ``plan_of(name, *overrides, **changes)``: a sweep over the learning rate in a folder of that name."""

    def planned(name: str, *overrides: str, **changes) -> SweepPlan:
        space = Space({"optim.lr": RATE}, [])
        return replace(SweepPlan(
            settings=settings(*overrides), space=space, points=[], outside_baselines=[], total=1, is_grid=False,
            objectives=("accuracy",), directions=["maximize"], name=name, directory=tmp_path / name, fixed={},
            result_key=str, name_of=partial(space.name_of, baseline={}),
        ), **changes)  # fmt: skip

    return planned


def study_of(plan: SweepPlan, run_ids=None) -> SweepStudy:
    return open_studies(plan, storage_at(None, None, plan.directory), run_ids)[1][0]


def ended(rate: float, status: str = "FINISHED", values: tuple[float, ...] = (0.5,), **attributes):
    return create_trial(
        params={"optim.lr": rate},
        distributions={"optim.lr": FloatDistribution(1e-9, 1.0, log=True)},
        values=values,
        intermediate_values={1: 0.25},
        user_attrs={"status": status, **attributes},
    )


def test_a_sweep_goes_on_with_its_own_settings_or_a_space_that_is_extended(plan_of):
    first = plan_of("first")
    begun = study_of(first).study.user_attrs["id"]
    assert study_of(first).study.user_attrs["identity"] == first.identity
    with pytest.raises(SettingsError, match=r"which had train.epochs unset \(now 2\); take another name$"):
        study_of(replace(first, fixed={"train.epochs": "2"}))
    wider = Space({"optim.lr": FloatDistribution(1e-6, 1e-3, log=True)}, [])
    with pytest.raises(SettingsError, match=r"add sweep.on_change=extend$"):
        study_of(replace(first, space=wider))
    extended = plan_of("first", "sweep.on_change=extend", space=wider)
    study = study_of(extended).study
    assert (study.user_attrs["id"], study.user_attrs["identity"]) == (begun, extended.identity)


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"]])
def test_a_study_that_a_person_created_with_other_directions_is_refused(plan_of, directions):
    first = plan_of("first")
    first.directory.mkdir()
    optuna.create_study(study_name="first", storage=f"sqlite:///{first.directory}/study.db", directions=directions)
    with pytest.raises(SettingsError, match=r"^sweep.name must be that of a study with the directions \['maximize'\]"):
        study_of(first)


@pytest.mark.parametrize("trial", ["0", f"{BASELINE_STUDY}/0"])
def test_trials_whose_study_is_gone_or_of_another_sweep_are_not_mixed_with_new_ones(plan_of, trial):
    first = plan_of("first")
    begun, kept = study_of(first).study.user_attrs["id"], (first.directory / SWEEP_FILE).read_text()
    assert begun in kept
    (first.directory / SWEEP_FILE).write_text(kept.replace(begun, "of a study that was deleted"))
    assert study_of(first).study.user_attrs["id"] == begun, "without trials, nothing is mixed"
    assert (first.directory / SWEEP_FILE).read_text() == kept
    (first.directory / trial).mkdir(parents=True)
    (first.directory / trial / RECORD).touch()
    assert study_of(first).study.user_attrs["id"] == begun
    (first.directory / SWEEP_FILE).unlink()
    assert study_of(first).study.user_attrs["id"] == begun, "as after a kill that cut the file short"
    (first.directory / SWEEP_FILE).write_text(kept.replace(begun, "of a study that was deleted"))
    gone = (
        "must be a new directory, or this sweep's own, got .*, which holds trials of sweep 'first' whose study is gone"
    )
    with pytest.raises(SettingsError, match=gone):
        study_of(first)
    (first.directory / "study.db").unlink()
    with pytest.raises(SettingsError, match=gone):
        study_of(first)
    with pytest.raises(SettingsError, match=r"which holds trials of sweep 'first'; take another sweep.name"):
        study_of(replace(first, name="second"))


@pytest.mark.parametrize(("name", "call"), [("add_trial", 2), ("set_user_attr", 1), ("set_user_attr", 2)])
def test_a_warm_start_that_a_kill_cuts_short_is_made_up_for_by_the_next_call(plan_of, monkeypatch, name, call):
    study_of(plan_of("old")).study.add_trials(ended(rate) for rate in (1e-5, 1e-4, 1e-3))
    new, whole, calls = plan_of("new", "sweep.warm_start=old"), getattr(optuna.Study, name), []

    def cut_short(study: optuna.Study, *given: object) -> None:
        calls.append(given)
        if len(calls) == call:
            raise KeyboardInterrupt
        whole(study, *given)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, name, cut_short)
        with pytest.raises(KeyboardInterrupt):
            study_of(new)
    for _ in range(2):
        trials = study_of(new).study.get_trials()
        assert [trial.user_attrs["reused_from"] for trial in trials] == ["old/0", "old/1", "old/2"]


def test_a_warm_start_takes_finished_trials_in_the_space_with_the_objectives_that_are_asked_for(plan_of, caplog):
    two = {"objectives": ("accuracy", "train_flops"), "directions": ["maximize", "minimize"]}
    old = study_of(plan_of("old", **two)).study
    old.add_trials([
        ended(1e-4, values=(0.5, 7.0), baseline=True),
        ended(1e-4, values=(0.6, 8.0), name="as it was", run_id="its run", owner={}),
        ended(1e-1, values=(0.7, 9.0)),
        ended(1e-4, "DIVERGED", values=(0.0, 9.0)),
    ])  # fmt: skip
    old.set_user_attr(SOURCES_ATTRIBUTE, {"model 0": {}})
    asked = plan_of("new", "sweep.warm_start=old", objectives=("train_flops",), directions=["minimize"])
    with caplog.at_level("WARNING"):
        new = study_of(asked).study
    assert "warm start: of 2 finished trials of old in this space: 1" in caplog.messages
    (copy,) = new.get_trials()
    assert (copy.params, copy.values, copy.distributions) == ({"optim.lr": 1e-4}, [8.0], {"optim.lr": RATE})
    assert copy.intermediate_values == {1: 0.25}, "which pruners compare with"
    told = {key: copy.user_attrs[key] for key in ("status", "reused_from", "point", "name", "run_id")}
    assert told == {"status": "REUSED", "reused_from": "old/1", "point": Point(copy.params).key,
                    "name": asked.name_of(Point(copy.params)), "run_id": "its run"}  # fmt: skip
    assert new.user_attrs[SOURCES_ATTRIBUTE] == {"model 0": {}}
    older = asked.directory.parent / "old"
    older.rename(older.with_name("away"))
    assert len(study_of(asked).study.get_trials()) == 1, "a sweep that has begun needs the earlier one no more"
    older.with_name("away").rename(older)
    elsewhere = replace(asked, name="far", directory=asked.directory.parent / "far", fixed={"freeze.layers": "3"})
    assert SOURCES_ATTRIBUTE not in study_of(elsewhere).study.user_attrs, "none of its trials was taken"


@pytest.mark.parametrize(
    ("given", "is_grid", "line"),
    [
        ("never", False, r"the name of an earlier sweep, got 'never'; none is in sqlite:.*/never/study.db$"),
        ("new", False, "the name of an earlier sweep, got 'new'; none is in "),
        ("old", True, "null in a grid, got 'old'; add hydra/sweeper=optuna$"),
    ],
)
def test_a_warm_start_from_no_other_sweep_is_refused_before_anything_is_written(plan_of, given, is_grid, line):
    study_of(plan_of("old"))
    new = plan_of("new", f"sweep.warm_start={given}", is_grid=is_grid)
    with pytest.raises(SettingsError, match=f"^sweep.warm_start must be {line}"):
        study_of(new)
    assert not new.directory.exists()


@pytest.mark.parametrize("name", ["never", "new"])
def test_a_warm_start_from_no_other_sweep_of_a_storage_that_has_several_is_refused(plan_of, tmp_path, name):
    storage = storage_at(f"sqlite:///{tmp_path}/all.db", None, tmp_path)
    open_studies(plan_of("new"), storage, None)
    asked = replace(plan_of("new", f"sweep.warm_start={name}"), directory=tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match=f"^sweep.warm_start must be the name of an earlier sweep, got '{name}'"):
        open_studies(asked, storage, None)


@pytest.mark.parametrize(
    ("overrides", "again"),
    [((), []), (("sweep.retry_failed=true",), [0, 2]), (("sweep.retry_lost=true",), [3]),
     (("sweep.retry_failed=true", "sweep.retry_lost=true"), [0, 2, 3])],
)  # fmt: skip
def test_what_failed_or_lost_its_run_is_trained_again_where_that_is_asked_for(plan_of, caplog, overrides, again):
    study, asked = study_of(plan_of("first")).study, plan_of("first", *overrides)
    ends = [
        ("FAILED", "kept"),
        ("DIVERGED", "kept"),
        ("OUT_OF_MEMORY", None),
        ("FINISHED", "gone"),
        ("FINISHED", "kept"),
        ("REUSED", "of another sweep"),
        ("INTERRUPTED", "gone"),
    ]
    study.add_trials(ended(k * 1e-4, status, run_id=run_id) for k, (status, run_id) in enumerate(ends, start=1))
    with caplog.at_level("WARNING"):
        assert study_of(asked, {"first": {"kept"}}.get).retry == {*again}
    line = "MLflow has no run of 1 trial any more: sweep.retry_lost=true added to the command trains what is lost"
    assert [said for said in caplog.messages if "MLflow" in said] == ([] if 3 in again else [line])
    assert study_of(asked).retry == {*again} - {3}, "without tracking"


def opened(workspace, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{workspace.sweep(name)}/study.db")


@pytest.mark.e2e
def test_an_earlier_sweeps_trials_are_known_to_a_new_study_and_count_for_nothing_else(workspace):
    space = (
        "hydra/sweeper=optuna",
        "model.layers=3",
        "optim.lr=tag(log,interval(1e-5,1e-3))",
        "hydra.sweeper.sampler.seed=1",
    )
    workspace.run(*space, "freeze.layers=0,1,2", "sweep.name=old", "sweep.trials=4")
    before = {t.number: t for t in workspace.study("old")}
    used = {"model 0123456789abcdef": {"fingerprint": "f", "is": "what the first trials used"}}
    opened(workspace, "old").set_user_attr(SOURCES_ATTRIBUTE, used)
    new = (*space, "freeze.layers=2,3", "sweep.name=new", "sweep.trials=2", "sweep.warm_start=old")
    ended = workspace.run(*new)
    inside = [
        n for n, t in before.items() if str(t.params["freeze.layers"]) == "2" and not t.user_attrs.get("baseline")
    ]
    assert 0 < len(inside) < 3
    assert f"warm start: of 3 finished trials of old in this space: {len(inside)}" in ended.stdout + ended.stderr
    assert opened(workspace, "new").user_attrs[SOURCES_ATTRIBUTE] == used, (
        "its trials are held to the earlier ones' sources"
    )
    trials = workspace.study("new")
    reused = [t for t in trials if t.user_attrs["status"] == "REUSED"]
    assert [t.user_attrs["reused_from"] for t in reused] == [f"old/{n}" for n in inside]
    assert [(t.params, t.values) for t in reused] == [(before[n].params, before[n].values) for n in inside]
    assert len(trials) == len(inside) + 2
    assert len(workspace.finished()) == 4 + 1 + 2, "and the baseline, which lies beside the new space"
