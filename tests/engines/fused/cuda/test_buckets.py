"""Buckets that hold every batch, and batches laid out as they are packed one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import BatchSchedule
from distilbench.engines.fused.cuda import buckets as bucketed_batches
from distilbench.engines.fused.cuda.buckets import IGNORE_INDEX, BucketedBatches, batch_of, bucket_sizes
from distilbench.engines.fused.packing import PADDING, pack

CPU = torch.device("cpu")


def split_of(lengths):
    tokens = np.arange(sum(lengths), dtype=np.int32) + 100
    return EncodedSplit(tokens, np.cumsum([0, *lengths]), np.arange(len(lengths)) % 2)


@given(st.lists(st.integers(3, 60), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=40)
def test_every_batch_is_laid_out_as_it_would_be_packed(lengths, size, epochs):
    split, seeds = split_of(lengths), (3, 8)
    schedule = BatchSchedule(len(lengths), size, epochs)
    plan = BucketedBatches(split, schedule, seeds, CPU)
    for step in range(schedule.steps):
        bucket = plan.bucket(step)
        batch, keys = batch_of(plan.inputs(step), bucket)
        assert len(set(keys.tolist())) == 2
        for order, seed in enumerate(seeds):
            packed = pack(split, schedule.batch(seed, step), share=False)
            tokens, sentences = len(packed.ids), len(packed.first)
            assert plan.tokens[step, order] == tokens <= bucket.tokens
            assert packed.positions.max() < bucket.width
            np.testing.assert_array_equal(batch.ids[order, :tokens], packed.ids)
            np.testing.assert_array_equal(batch.positions[order, :tokens], packed.positions)
            np.testing.assert_array_equal(batch.first[order, :sentences], packed.first)
            np.testing.assert_array_equal(batch.labels[order, :sentences], packed.labels)
            assert (batch.labels[order, sentences:] == IGNORE_INDEX).all()
            bins = batch.unpacked.slot[order, :tokens] // bucket.width
            np.testing.assert_array_equal(bins, packed.sentence)
            assert batch.unpacked.empty[order].tolist() == [False] * tokens + [True] * (bucket.tokens - tokens)
            owner, row = batch.unpacked.owner[order], batch.unpacked.row[order]
            for sentence in range(size):
                own = np.flatnonzero(packed.sentence == sentence)
                assert owner[sentence].tolist() == [sentence] * len(own) + [PADDING] * (bucket.width - len(own))
                assert row[sentence, : len(own)].tolist() == own.tolist()
            assert (row < bucket.tokens).all()


def test_no_row_of_scores_is_masked_throughout():
    split = split_of([5, 9, 3, 7, 4])
    plan = BucketedBatches(split, BatchSchedule(5, 4, 1), (1,), CPU)
    for step in range(2):  # the second holds one sentence of four
        batch, _ = batch_of(plan.inputs(step), plan.bucket(step))
        for mask in (batch.token_mask, batch.first_mask):
            assert ((mask == 0).sum(-1) > 0).all()


def test_windows_follow_one_another(monkeypatch):
    split, schedule = split_of(list(range(3, 40))), BatchSchedule(37, 4, 2)
    whole = BucketedBatches(split, schedule, (1, 2), CPU)
    monkeypatch.setattr(bucketed_batches, "WINDOW", 3)
    parts = BucketedBatches(split, schedule, (1, 2), CPU)
    for step in [*range(schedule.steps), 4]:
        assert torch.equal(whole.inputs(step), parts.inputs(step))


def test_bucket_sizes_add_as_little_padding_as_they_can():
    sizes = np.array([10] * 50 + [20] * 5 + [30] * 40 + [90])
    assert bucket_sizes(sizes, 10, 4, power=1).tolist() == [10, 20, 30, 90]
    assert bucket_sizes(sizes, 10, 3, power=1).tolist() == [10, 30, 90]
    assert bucket_sizes(sizes, 10, 1, power=1).tolist() == [90]
    assert bucket_sizes(np.array([7, 7]), 8, 3, power=2).tolist() == [8]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=50), st.integers(1, 5))
@settings(max_examples=50)
def test_every_size_fits_a_bucket_size(sizes, most):
    found = bucket_sizes(np.array(sizes), 16, most, power=1)
    assert len(found) <= most
    assert (np.diff(found) > 0).all()
    assert max(sizes) <= found[-1] < max(sizes) + 16
    assert set(found % 16) == {0}


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_batches_share_few_buckets(seeds):
    rng = np.random.default_rng(0)
    split = split_of(rng.integers(3, 60, 2000).tolist())
    plan = BucketedBatches(split, BatchSchedule(2000, 16, 2), seeds, CPU)
    assert (
        len({plan.bucket(step) for step in range(250)}) <= bucketed_batches.TOKEN_LEVELS * bucketed_batches.WIDTH_LEVELS
    )
