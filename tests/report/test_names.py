"""What a setting is called: what varies, the most telling first, and short."""

import pytest
from omegaconf import OmegaConf

from distilbench.identity import METRIC, SOURCES, select, value_of
from distilbench.report.names import name_of, source_overrides, varying_keys, varying_values
from tests.conftest import compose_settings
from tests.report.made_trials import treatment


def test_the_most_telling_comes_first_and_the_seed_last():
    values = {"seed": 3, "optim.weight_decay": 0.05, "optim.lr": 3.123456e-05, "scheduler.name": "cosine",
              "train.epochs": 2, "freeze.layers": 3, "adapter.name": "lora", "output.save_model": False}  # fmt: skip
    assert name_of(values) == (
        "layers=3 adapter=lora scheduler=cosine lr=3.12e-05 epochs=2 weight_decay=0.05 save_model=false seed=3"
    )


def test_a_missing_experiment_is_left_out_of_the_name():
    assert name_of({"experiment": None, "freeze.layers": 0}) == "layers=0"


def test_a_group_that_a_sweep_chooses_stands_where_its_name_stands_in_a_report():
    space, report = ("scheduler", "optim.lr", "freeze.layers"), ("scheduler.name", "optim.lr", "freeze.layers")
    assert name_of(dict.fromkeys(space, 0)) == name_of(dict.fromkeys(report, 0)) == "layers=0 scheduler=0 lr=0"


def test_a_way_to_freeze_is_told_as_it_is_typed_and_its_embeddings_are_not_told():
    depth, bias = treatment(), treatment() | {"freeze.policy": "bias", "freeze.embeddings": True}
    assert varying_keys([depth, bias]) == ["freeze.policy"]
    assert [name_of({"freeze.policy": value_of(t, "freeze.policy")}) for t in (depth, bias)] == [
        "freeze=depth", "freeze=bias"
    ]  # fmt: skip


def test_what_an_adapters_name_tells_already_is_not_told():
    plain, lora = treatment(), treatment() | {"adapter.name": "lora", "adapter.rank": 8, "adapter.alpha": 16.0}
    wider = lora | {"adapter.rank": 16}
    assert varying_keys([plain, lora]) == ["adapter.name"]
    assert varying_keys([plain, lora, wider]) == ["adapter.name", "adapter.rank"]


def test_keys_that_end_alike_are_told_whole():
    values, baseline = {"adapter.dropout": 0.1, "freeze.dropout": 0}, {"freeze.dropout": 0}
    assert name_of(values, baseline) == "adapter.dropout=0.1"


def test_embeddings_that_follow_the_layers_do_not_vary():
    treatments = [treatment(), treatment(freeze_layers=3)]
    assert varying_keys(treatments) == ["freeze.layers"]
    treatments.append(treatment() | {"freeze.embeddings": True})
    assert varying_keys(treatments) == ["freeze.layers", "freeze.embeddings"]


def test_a_choice_of_a_group_is_told_as_it_was_typed_with_what_was_changed_of_it():
    none, three = treatment(), treatment(freeze_layers=3)
    typed = [{"freeze": "none"}, {"freeze": "layers3"}]
    assert varying_values([none, three], typed) == [{"freeze": "none"}, {"freeze": "layers3"}]
    dropout = {"freeze.dropout": False}
    told = varying_values([none, three, three | dropout], [*typed, {"freeze": "layers3", **dropout}])
    assert [name_of(one) for one in told[1:]] == ["freeze=layers3 dropout=null", "freeze=layers3 dropout=false"]


def test_settings_that_were_typed_are_told_as_settings():
    treatments = [treatment(freeze_layers=layers) for layers in (0, 3)]
    assert varying_values(treatments, [{"freeze": "none"}, {"freeze": "none", "freeze.layers": 3}])[1] == {
        "freeze.layers": 3
    }
    mixed = [{"freeze": "none"}, {"freeze": "layers3"}, {"freeze": "none", "freeze.layers": 5}]
    assert varying_values([*treatments, treatment(freeze_layers=5)], mixed)[1] == {"freeze.layers": 3}


def test_records_of_earlier_versions_are_told_by_their_settings():
    treatments = [treatment(freeze_layers=layers) for layers in (0, 3)]
    assert varying_values(treatments, [{"freeze": "none"}, {}]) == [{"freeze.layers": 0}, {"freeze.layers": 3}]


def test_two_contents_of_one_choice_are_told_apart():
    treatments = [treatment(), *(treatment(freeze_layers=layers) for layers in (3, 4))]
    told = varying_values(treatments, [{"freeze": "none"}, {"freeze": "mine"}, {"freeze": "mine"}])
    assert [one["freeze.layers"] for one in told] == [0, 3, 4]


def test_an_experiment_is_told_by_its_name_alone():
    head = treatment(optim_lr=3e-3) | {"freeze.policy": "head"}
    typed = [{"experiment": None, "freeze": "none"}, {"experiment": "head", "freeze": "head"}]
    assert name_of(varying_values([treatment(), head], typed)[1]) == "head"


@pytest.mark.parametrize("given", [
    [], ["model=tiny", "data=synthetic"], ["data=cola"], ["data=cola", "train.metric=accuracy"], ["data=mnli"],
    ["model.revision=main", "data.fallback=null"], ["model=minilm", "data=tweets", "data.max_train_examples=9"],
])  # fmt: skip
def test_the_overrides_of_a_runs_sources_give_the_same_sources(given):
    first = compose_settings("output.dir=.", *given)
    again = compose_settings("output.dir=.", *source_overrides(OmegaConf.to_yaml(OmegaConf.structured(first))))
    same = {name for name in (*SOURCES, *METRIC) if not name.endswith("fallback")}
    assert select(again, same) == select(first, same)
    for one, other in ((first.model, again.model), (first.data, again.data)):
        assert one.source != "hub" or one.fallback == other.fallback
