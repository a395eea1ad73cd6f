"""Spaces: points, corners, names; sweep syntax read and refused; points composed to settings, baselines to points."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from optuna import create_study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from distilbench.composition import _composed
from distilbench.settings import SettingsError, register_schema
from distilbench.sweep.space import Composer, Point, Space, describe, edges, fixed_of, read_space
from tests.conftest import ROOT, TINY

LAYERS = IntDistribution(1, 5, step=2)
RATE = FloatDistribution(1e-5, 1e-2, log=True)
SCHEDULER = CategoricalDistribution(["linear", "cosine"])
SPACE = Space({"freeze.layers": LAYERS, "scheduler": SCHEDULER}, ["train.epochs=1"])


def test_a_point_is_a_part_of_a_command_line_and_its_key_is_what_it_says():
    point = Point({"freeze.layers": 3, "scheduler": "cosine"}, ("seed=1",))
    assert point.overrides == ["freeze.layers=3", "scheduler=cosine", "seed=1"]
    assert point.key == Point({"scheduler": "cosine", "freeze.layers": 3}, ("seed=1",), is_baseline=True).key
    others = [replace(point, extra=()), replace(point, params={"freeze.layers": 3})]
    assert len({point.key, *(other.key for other in others)}) == 3


@pytest.mark.parametrize(
    ("dimensions", "size"),
    [
        ({}, 1),
        ({"a": LAYERS}, 3),
        ({"a": LAYERS, "b": SCHEDULER}, 6),
        ({"a": FloatDistribution(0, 0.3, step=0.1)}, 4),
        ({"a": FloatDistribution(2, 2)}, 1),
        ({"a": RATE}, None),
        ({"a": LAYERS, "b": RATE}, None),
    ],
)
def test_a_space_has_a_size_if_its_points_can_be_counted(dimensions, size):
    assert Space(dimensions, []).size == size
    assert Space(dimensions, [], custom=print).size is None
    if size:
        assert len(Space(dimensions, []).points()) == size


def test_points_run_through_the_last_dimension_fastest():
    assert [tuple(point.params.values()) for point in SPACE.points()] == [
        (1, "linear"), (1, "cosine"), (3, "linear"), (3, "cosine"), (5, "linear"), (5, "cosine"),
    ]  # fmt: skip
    assert list(SPACE.points()[0].params) == ["freeze.layers", "scheduler"]
    assert [point.params["a"] for point in Space({"a": FloatDistribution(2, 2)}, []).points()] == [2]
    assert [point.params["a"] for point in Space({"a": FloatDistribution(1, 2, step=0.5)}, []).points()] == [1, 1.5, 2]


def test_a_space_with_an_interval_cannot_be_counted():
    assert Space({"freeze.layers": IntDistribution(0, 3), "optim.lr": RATE}, []).size is None


def test_corners_are_first_choices_and_low_ends_and_last_choices_and_high_ends():
    space = Space({"freeze.layers": LAYERS, "optim.lr": RATE, "scheduler": SCHEDULER}, [])
    low, high = space.corners()
    assert low == Point({"freeze.layers": 1, "optim.lr": 1e-5, "scheduler": "linear"})
    assert high == Point({"freeze.layers": 5, "optim.lr": 1e-2, "scheduler": "cosine"})
    assert edges(CategoricalDistribution([1, 2, 3])) == (1, 2, 3)


@pytest.mark.parametrize(
    ("params", "inside", "inside_of_custom"),
    [
        ({"freeze.layers": 3, "scheduler": "linear"}, True, True),
        ({"freeze.layers": 2, "scheduler": "linear"}, False, False),
        ({"freeze.layers": 7, "scheduler": "linear"}, False, False),
        ({"freeze.layers": 3, "scheduler": "polynomial"}, False, False),
        ({"freeze.layers": "deep", "scheduler": "linear"}, False, False),
        ({"freeze.layers": 3}, False, False),
        ({"freeze.layers": 3, "scheduler": "linear", "seed": 1}, False, True),
    ],
)
def test_a_space_contains_what_names_its_dimensions_with_values_that_they_have(params, inside, inside_of_custom):
    assert SPACE.contains(params) is inside
    assert SPACE.contains(params, is_partial=True) is (inside or params == {"freeze.layers": 3})
    assert replace(SPACE, custom=print).contains(params) is inside_of_custom


@pytest.mark.parametrize(
    ("point", "name"),
    [
        (Point({"scheduler": "cosine", "freeze.layers": 3}), "layers=3 scheduler=cosine"),
        (Point({"scheduler": "linear", "freeze.layers": 3}), "layers=3"),
        (Point({"freeze.layers": 0, "scheduler": "linear"}, is_baseline=True), "baseline: layers=0 scheduler=linear"),
        (Point({}, ("freeze.layers=0", "optim.lr=1"), is_baseline=True), "baseline: layers=0 scheduler=linear"),
        (Point({}, ("optim.lr=1", "seed=4")), "optim.lr=1 seed=4"),
        (Point({"freeze.layers": 0, "scheduler": "linear"}), "baseline"),  # a copy of it: drawn again, and reused
    ],
)
def test_a_trial_is_named_by_what_tells_it_from_the_baseline(point, name):
    assert SPACE.name_of(point, {"freeze.layers": 0, "scheduler": "linear"}) == name


@pytest.mark.parametrize(
    ("point", "name"),
    [
        (Point({"experiment": "layer_freezing", "seed": 1}), "layer_freezing seed=1"),
        (Point({"experiment": "baseline", "seed": 1}, is_baseline=True), "baseline: seed=1"),
        (Point({}, ("seed=2", "freeze.layers=0"), is_baseline=True), "baseline: seed=2"),
        (Point({"experiment": "quick", "seed": 1}), "quick seed=1"),
    ],
)
def test_what_a_baseline_shares_with_its_trial_is_told_of_both(point, name):
    space = Space({"experiment": CategoricalDistribution(("baseline", "layer_freezing", "quick")), "seed": LAYERS}, [])
    assert space.name_of(point, {"experiment": "baseline", "seed": 1}) == name


def test_a_dimension_is_described_in_words_its_choices_in_any_order():
    described = [describe(distribution) for distribution in SPACE.dimensions.values()]
    assert described == ["whole numbers from 1 to 5 in steps of 2", "cosine, linear"]
    assert describe(RATE) == "1e-05 to 0.01, logarithmic"
    assert describe(FloatDistribution(0, 0.5, step=0.1)) == "0 to 0.5 in steps of 0.1"
    assert describe(FloatDistribution(0, 0.5)) == "0 to 0.5"
    assert describe(IntDistribution(0, 2)) == "whole numbers from 0 to 2"
    assert describe(CategoricalDistribution(["x", 10, 1e-5, 2])) == "1e-05, 2, 10, x"


# Sweep syntax


def read(*arguments, params=None, is_grid=False, custom=None):
    return read_space(OmegaConf.create(params or {}), arguments, None, is_grid, custom)  # type: ignore[arg-type]


def test_what_varies_and_what_does_not_are_told_apart():
    space = read("freeze.layers=0,3", "train.epochs=1", "~scheduler", "+optim.lr=interval(0.1,1)")
    assert space == Space(
        {"freeze.layers": CategoricalDistribution([0, 3]), "+optim.lr": FloatDistribution(0.1, 1)},
        ["train.epochs=1", "~scheduler"],
    )


def test_the_command_line_replaces_what_the_configuration_says_of_a_key():
    params = {"freeze.layers": "0,1", "train.epochs": "1,2", "optim.lr": "choice(1,2)"}
    space = read("freeze.layers=2", "train.epochs=3,4", "train.epochs=5,6", params=params)
    assert space.dimensions == {"optim.lr": CategoricalDistribution([1, 2]),
                                "train.epochs": CategoricalDistribution([5, 6])}  # fmt: skip
    assert space.fixed == ["freeze.layers=2"]
    counted = read("optim.lr=1,2", params={"optim.lr": "interval(0,1)"}, is_grid=True)
    assert counted.dimensions == {"optim.lr": CategoricalDistribution([1, 2])}
    back = read("freeze.layers=2", "freeze.layers=0,1")
    assert (back.fixed, list(back.dimensions)) == ([], ["freeze.layers"])


def test_the_word_depth_is_asked_for_only_where_layers_vary_to_it():
    asked = []
    depth_of = lambda lines: asked.append(lines) or 6  # noqa: E731
    space = read_space(None, ["freeze.layers=range(0,depth)", "model=tiny"], None, False, None, depth_of)  # type: ignore[arg-type]
    assert space.dimensions == {"freeze.layers": IntDistribution(0, 5)}
    read_space(None, ["freeze.layers=0,1", "model=tiny"], None, False, None, depth_of)  # type: ignore[arg-type]
    assert asked == [["model=tiny"]]


@pytest.mark.parametrize("is_grid", [True, False])
def test_a_grid_lists_ranges_and_optuna_keeps_them(is_grid):
    dimension = read("freeze.layers=range(1,4)", is_grid=is_grid).dimensions["freeze.layers"]
    assert dimension == (CategoricalDistribution([1, 2, 3]) if is_grid else IntDistribution(1, 3))


def test_a_value_given_twice_is_tried_once():
    assert read("seed=1,2,1", is_grid=True).dimensions == {"seed": CategoricalDistribution([1, 2])}


@pytest.mark.parametrize(
    ("line", "is_grid", "refused"),
    [
        ("freeze.layers=0,,", False, r"the search space must be in Hydra's sweep syntax: Error when parsing [^\n]+$"),
        ("seed=range(3,3)", True, r"seed must have a value to try, got 'seed=range\(3,3\)'$"),
        (
            "seed=interval(0,1)",
            True,
            r"seed must be a list of values in a grid, got 'seed=interval\(0,1\)'; add hydra/sweeper=optuna, whose "
            "samplers take it, but for grid$",
        ),
        ("seed=interval(1,0)", False, r"seed must be a space that Optuna takes, got 'seed=interval\(1,0\)': "),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(line, is_grid, refused):
    with pytest.raises(SettingsError, match=f"^{refused}"):
        read(line, is_grid=is_grid)


@pytest.mark.parametrize("is_grid", [True, False])
@pytest.mark.parametrize("ends", ["0,1e30", "0,inf", "0,1,nan", "0,1,0"])
def test_a_range_that_would_never_be_written_out_is_refused(ends, is_grid):
    with pytest.raises(
        SettingsError, match=rf"^optim.lr must be a range of at most 10,000,000 .*range\({ends}\)'; take "
    ):
        read(f"optim.lr=range({ends})", is_grid=is_grid)


def test_optuna_takes_groups_by_a_pattern_and_each_choice_once():
    loader: Any = SimpleNamespace(get_group_options=lambda *_, **__: ["auto", "head", "none"])
    space = read_space(None, ["freeze=glob([n*,h*])", "optim.lr=1e-5,0.00001,1e-4"], loader, is_grid=False)
    assert space.dimensions["freeze"] == CategoricalDistribution(["head", "none"])
    assert space.dimensions["optim.lr"] == CategoricalDistribution([1e-5, 1e-4])


def test_a_custom_space_is_a_function_by_its_path():
    assert read().custom is None
    assert read(custom="tests.sweep.test_space.read").custom is read
    line = (r"^hydra.sweeper.custom_search_space must be the dotted path of a function \(config, trial\), "
            r"got 'no.such.function': No module named 'no'$")  # fmt: skip
    with pytest.raises(SettingsError, match=line):
        read(custom="no.such.function")


def test_what_a_custom_space_raises_is_told_in_a_line():
    def broken(config, trial):
        return {}[trial.params["a"]]

    line = r"custom_search_space must suggest values to every trial, got KeyError: 3; mend that function$"
    with pytest.raises(SettingsError, match=line):
        Space({"a": CategoricalDistribution([3])}, [], broken).suggest(None, create_study().ask())


# Composed


@pytest.fixture
def composer():
    """Return ``composer(space, *overrides)``: over the tiny model, as a sweep of that command line makes it."""
    register_schema()
    _composed.cache_clear()  # of another registration, whose classes are others

    def make(space: Space, *overrides: str) -> Composer:
        fixed = [*TINY, "output.dir=.", "sweep.name=unused", *space.fixed, *overrides]
        config = compose("config", fixed, return_hydra_config=True)
        return Composer(config, GlobalHydra.instance().config_loader(), replace(space, fixed=fixed))

    with initialize_config_dir(str(ROOT / "conf")):
        yield make


def test_a_point_is_composed_over_what_is_fixed(composer):
    made = composer(SPACE)
    settings = made.settings(Point({"freeze.layers": 1, "scheduler": "cosine"}, ("seed=3",)))
    assert (settings.freeze.layers, settings.scheduler.name, settings.train.epochs, settings.seed) == (
        1,
        "cosine",
        1,
        3,
    )
    assert made.settings(Point({"freeze.layers": 1, "scheduler": "cosine"}, ("seed=3",))) is settings
    assert (made.base.freeze.layers, made.base.scheduler.name, made.base.train.epochs) == (0, "linear", 1)
    assert "hydra" not in made.base
    assert made.settings(Point({"freeze.layers": 2})).scheduler.name == "linear", "one point changes no other"


def test_points_that_train_the_same_have_one_result_key(composer):
    made = composer(SPACE)
    linear, named, cosine = (made.result_key(Point(p)) for p in ({"scheduler": "linear"}, {"scheduler.name": "linear"},
                                                                 {"scheduler": "cosine"}))  # fmt: skip
    assert linear == named != cosine


@pytest.mark.parametrize(
    ("params", "refused"),
    [
        ({"freeze.layers": 9}, "^freeze.layers must be 0..2 "),
        ({"freeze.layerz": 1}, "^freeze.layerz must be a setting that there is; did you mean freeze.layers[?]$"),
        ({"freeze.layers": 0.5}, "^freeze.layers must be a whole number, got '0.5'$"),
        ({"+freeze.layers": 1}, "^Could not append to config. An item is already at 'freeze.layers'"),
        ({"scheduler": "cosin"}, "^scheduler must be one of constant, .*, got 'cosin'$"),
    ],
)
def test_a_point_that_is_no_trial_is_refused_in_one_line(composer, params, refused):
    with pytest.raises(SettingsError, match=refused) as caught:
        composer(SPACE).settings(Point(params))
    assert "\n" not in str(caught.value)


def test_only_what_is_added_with_a_plus_need_not_be_there(composer):
    made = composer(SPACE)
    assert made.settings(Point({"+sweep.pruner_options.lower": 0.5})).sweep.pruner_options["lower"] == 0.5
    with pytest.raises(SettingsError, match=r"^sweep.pruner_options.lower2 must be a setting"):
        made.settings(Point({"sweep.pruner_options.lower2": 0.5}))


def test_a_points_baseline_keeps_what_is_no_treatment(composer):
    made = composer(SPACE)
    baseline = made.baseline_of(Point({"freeze.layers": 2, "scheduler": "cosine"}, ("seed=3",)))
    assert baseline.params == {}
    assert baseline.is_baseline
    assert baseline.extra[:3] == ("freeze.layers=2", "scheduler=cosine", "seed=3")
    settings = made.settings(baseline)
    assert (settings.freeze.layers, settings.scheduler.name, settings.seed) == (0, "linear", 3)


def test_the_baseline_has_a_value_or_a_choice_for_each_dimension(composer):
    lists = {"freeze.layers": [2, 0], "freeze": ["none", "layers3"], "optim.lr": ["2e-05", 1.0], "data": ["tweets"]}
    dimensions = {key: CategoricalDistribution(choices) for key, choices in lists.items()}
    made = composer(Space({**dimensions, "scheduler": SCHEDULER, "seed": LAYERS}, []), "freeze.layers=2")
    assert made.baseline_params() == {
        "freeze.layers": 0, "freeze": "none", "optim.lr": "2e-05", "data": "synthetic", "scheduler": "linear",
        "seed": 42,
    }  # fmt: skip
    own = composer(Space({"scheduler": SCHEDULER}, []), "scheduler=cosine", "baseline.overrides=['freeze=none']")
    assert own.baseline_params() == {"scheduler": "cosine"}
    named = composer(
        Space({"scheduler": SCHEDULER}, []), "scheduler=cosine", "baseline.overrides=['scheduler=constant']"
    )
    assert named.baseline_params() == {"scheduler": "constant"}


def test_a_sweep_fixes_what_it_does_not_vary_and_what_all_its_trials_share(composer):
    made = composer(SPACE)
    two = [made.settings(Point({"freeze.layers": layers}, (f"seed={seed}",))) for layers, seed in ((1, 1), (2, 2))]
    fixed = fixed_of(two, SPACE)
    assert fixed["train.epochs"] == "1"
    assert fixed["sweep.seeds"] == "None"
    several = made.settings(Point({}, ("sweep.seeds=[1,2]",)))
    assert fixed_of([several], SPACE)["sweep.seeds"] == "[1, 2]"
    assert fixed["freeze.dropout"] == "true"
    assert not {"freeze.layers", "seed", "scheduler.name", "output.dir", "engine.name", "train.logging_steps"} & set(
        fixed
    )
    assert fixed_of(two[:1], SPACE)["seed"] == "1"
