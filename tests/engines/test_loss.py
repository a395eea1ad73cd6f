"""The loss of training: smoothed, weighted, and plain where neither is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from distilbench.engines.loss import Loss

LABELS = np.array([0, 0, 0, 1, 2, 2])
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], dtype=torch.float64)


def test_without_either_it_is_the_plain_cross_entropy(settings):
    loss = Loss.of(settings().train, LABELS, 3)
    assert loss.is_plain
    expected = torch.nn.functional.cross_entropy(LOGITS, torch.tensor([0, 2]), reduction="none")
    assert torch.equal(loss.of_each(LOGITS, torch.tensor([0, 2])), expected)


def test_smoothing_spreads_a_share_of_the_target_over_all_labels(settings):
    loss = Loss.of(settings("train.label_smoothing=0.3").train, LABELS, 3)
    target = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    expected = -(target * LOGITS.log_softmax(1)).sum(1)
    assert not loss.is_plain
    torch.testing.assert_close(loss.of_each(LOGITS, torch.tensor([0, 2])), expected)


def test_balanced_weights_are_those_of_scikit_learn_and_multiply_an_examples_loss(settings):
    loss = Loss.of(settings("train.class_weights=balanced").train, LABELS, 3)
    weights = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    plain = Loss(0.0, None).of_each(LOGITS, torch.tensor([1, 2]))
    torch.testing.assert_close(loss.of_each(LOGITS, torch.tensor([1, 2])), plain * torch.from_numpy(weights[[1, 2]]))
    assert weights.mean() != pytest.approx(1)


def test_a_label_that_no_example_has_weighs_as_one_example(settings):
    loss = Loss.of(settings("train.class_weights=balanced").train, np.array([0, 0]), 3)
    assert loss.class_weights.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_examples_that_fill_up_a_batch_lose_nothing(settings):
    loss = Loss.of(settings("train.class_weights=balanced", "train.label_smoothing=0.1").train, LABELS, 3)
    assert loss.of_each(LOGITS, torch.tensor([1, -100]))[1] == 0
