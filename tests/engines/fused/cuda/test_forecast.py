"""A step's launches, bytes and operations are counted right, and docs/gpus.md says what comes of them."""

from __future__ import annotations

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from distilbench.bench.roofline import Machine, step_cost_of
from tests.conftest import ROOT
from tests.engines.fused.cuda.forecast import (
    BUCKET,
    META,
    POSITIONS,
    WORDS,
    Gpu,
    Launched,
    forecast,
    step_launches,
    table,
)


@pytest.fixture(scope="module")
def launches():
    return step_launches(layers=0, trials=1, precision="bf16")


def test_products_are_those_of_the_limit_and_what_cls_needs_none_of(launches):
    """The kernels make keys and values in the last layer too, and count no products; tables are added up by some."""
    with META:
        model = DistilBertForSequenceClassification(DistilBertConfig())
    limit = step_cost_of(model, BUCKET.tokens, BUCKET.sentences, WORDS)
    last_keys_and_values = 3 * 2 * (2 * 768**2) * BUCKET.tokens
    tables = 2 * 2 * BUCKET.tokens**2 * 768
    counted = sum(launch.operations for launch in launches)
    assert counted == pytest.approx(limit.operations + last_keys_and_values + tables, rel=0.01)
    positions = 28 * (model.config.max_position_embeddings - POSITIONS) * 768
    [adamw] = [launch for launch in launches if launch.name == "adamw"]
    assert adamw.bytes == pytest.approx(limit.optimizer_bytes - positions, rel=1e-4)


def test_a_step_launches_no_more_than_it_did(launches):
    ours = [launch.name for launch in launches if launch.name in ("attention_forward", "attention_backward", "adamw")]
    assert sorted(ours) == ["adamw", *["attention_backward"] * 6, *["attention_forward"] * 6]
    assert len(launches) <= 256


def test_each_launch_takes_the_longest_of_its_bounds():
    gpu = Gpu(Machine({"bf16": 100.0, "fp32": 10.0}, 10.0), processors=4, launch_seconds=1.0, precision="bf16")
    small, wide = Launched("add", bytes=1.0), Launched("copy_", bytes=40.0)
    product = Launched("mm", bytes=1.0, operations=300.0, tiles=2, dtype=torch.bfloat16)  # half of it works
    found = forecast(gpu, [small, wide, product])
    assert found.milliseconds == pytest.approx(1000 * (1 + 4 + 6))
    assert found.shares == pytest.approx({"launches": 1 / 11, "bytes": 4 / 11, "operations": 6 / 11})


def test_the_page_says_what_is_computed():
    page = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith(("| T4", "| A100", "| H100", "| H200"))] == table()
