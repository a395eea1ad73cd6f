"""Calls beside each other: all have ended when the caller goes on, whatever comes of one of them."""

from __future__ import annotations

import threading

import pytest
import torch

from distilbench.engines.fused.threads import MAX_STACKS, map_in_threads


@pytest.fixture(autouse=True)
def six_threads(one_thread):  # which restores the number
    torch.set_num_threads(6)


def test_each_runs_with_its_share_of_the_threads_and_gives_its_result():
    everyone = threading.Barrier(3)

    def act(item):
        everyone.wait(timeout=60)  # or none would go on: they do run at once
        return item, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    assert map_in_threads(act, "abc") == [("a", 2, False), ("b", 2, False), ("c", 2, False)]
    assert torch.get_num_threads() == 6


def test_one_alone_has_all_threads_and_stays_where_it_is():
    assert map_in_threads(lambda _: (torch.get_num_threads(), threading.current_thread()), ["a"]) == [
        (6, threading.main_thread())
    ]


def test_more_than_there_are_threads_for_have_one_each():
    torch.set_num_threads(2)
    assert map_in_threads(lambda _: torch.get_num_threads(), range(MAX_STACKS)) == [1] * MAX_STACKS


def test_an_error_is_raised_once_the_others_have_ended():
    failed, ended = threading.Event(), []

    def act(item):
        if item == "a":
            failed.set()
            raise torch.OutOfMemoryError("too small")
        assert failed.wait(timeout=60)
        ended.append(item)

    with pytest.raises(torch.OutOfMemoryError, match="too small"):
        map_in_threads(act, "abc")
    assert sorted(ended) == ["b", "c"]
    assert torch.get_num_threads() == 6
