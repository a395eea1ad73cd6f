"""How steps are recorded and what happens where that fails, with a stand-in for CUDA."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch

from distilbench.engines.fused.cuda import side_stream
from distilbench.engines.fused.cuda.graph_step import GraphRunner, runner_for

GPU = torch.device("cuda", 0)


class Graph:
    """Counts its replays."""

    replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that there is CUDA: what was recorded, in order, as (graph, pool)."""
    recorded = []

    @contextmanager
    def graph(graph, pool, stream):
        recorded.append((graph, pool))
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return recorded


def failing(error):
    def step():
        raise error

    return step


def test_a_recorded_step_is_rehearsed_once_and_then_replayed(cuda):
    graphs, seen = GraphRunner(GPU), []
    assert graphs.record("a", lambda: seen.append("rehearsal"), lambda: seen.append("step")) >= 0
    assert seen == ["rehearsal", "step"]
    graphs.run("a", lambda: seen.append("a again"))
    graphs.run("b", lambda: seen.append("b"))
    assert seen == ["rehearsal", "step", "b"]
    assert [graph.replays for graph, _ in cuda] == [1]


def test_recordings_share_their_memory(cuda):
    graphs = GraphRunner(GPU)
    for key in "ab":
        graphs.record(key, lambda: None, lambda: None)
    assert [pool for _, pool in cuda] == ["pool", "pool"]
    assert cuda[0][0] is not cuda[1][0]


def test_an_error_is_said_once_and_steps_go_on_as_they_are(cuda, caplog):
    graphs, seen = GraphRunner(GPU), []
    graphs.record("a", lambda: None, lambda: None)
    with caplog.at_level(logging.WARNING):
        graphs.record("b", lambda: None, failing(RuntimeError("operation not permitted\nmore")))
        graphs.record("c", lambda: seen.append("rehearsal"), lambda: seen.append("step"))
    assert [r.message for r in caplog.records] == ["steps are not recorded as CUDA graphs: operation not permitted"]
    graphs.run("b", lambda: seen.append("b"))
    graphs.run("c", lambda: seen.append("c"))
    graphs.run("a", lambda: seen.append("a"))
    assert seen == ["b", "c"], "what was recorded before is still replayed"


def test_being_out_of_memory_is_the_groups_to_answer_and_keeps_none(cuda, monkeypatch):
    graphs, held = GraphRunner(GPU), [torch.zeros(1)]
    monkeypatch.setattr(side_stream, "_held", held)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.record("a", failing(torch.OutOfMemoryError("CUDA out of memory")), lambda: None)
    assert held == []


def test_on_a_cpu_no_graph_is_recorded(cuda):
    assert isinstance(runner_for(GPU), GraphRunner)
    assert runner_for(torch.device("cpu")) is None
