"""The benchmark: what is measured of a run, and the command end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from distilbench.peers import _covered

COMMAND = [sys.executable, "-m", "distilbench.benchmark", "model=tiny", "data=synthetic", "tracking=none"]


def run(path, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], cwd=path, env=env, capture_output=True, text=True, check=False)


def test_time_shared_by_trials_of_a_batch_counts_once():
    assert _covered([(0.0, 4.0), (0.1, 4.1), (10.0, 12.0)]) == pytest.approx(6.1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bench.steps=9"], "bench.steps must be a multiple of 8, got 9"),
        (["bench.trials=1"], "bench.trials must be 2 or more, got 1"),
        (["optim=sgd"], "optim.name must be adamw in a benchmark, got 'sgd'"),
        (["bench.steps=16"], "bench.steps must be at most 8 for 256 training examples, got 16"),
        (["data.max_train_examples=800", "model.checkpoint=electra"], "use engine=trainer"),
    ],
)
@pytest.mark.e2e
def test_a_mistake_is_one_line(tmp_path, arguments, line):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.e2e
def test_the_benchmark_measures_five_rows_and_writes_table_plot_and_figures(tmp_path):
    short = ("bench.steps=8", "bench.trials=3", "bench.repeats=1", "bench.eval_examples=16", "train.batch_size=8")
    done = run(tmp_path, *short, "freeze.layers=1", "train.precision=fp32", "hydra.run.dir=out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    lines = {line["name"]: line for line in figures["lines"]}
    assert list(lines) == ["HF as reported", "HF tuned", "trainer", "fused, alone", "fused, 3 trials"]
    assert lines["HF tuned"]["speed"] == [1, 1, 1]
    for line in lines.values():
        assert line["step_seconds"] > 0
        assert line["times_limit"] > 1
        assert line["trial_seconds"] > line["rest_seconds"] + line["evaluation_seconds"] > 0
        assert line["peak_bytes"] > 10**8
        assert line["loss"] == pytest.approx(lines["HF tuned"]["loss"], abs=0.02), "the same training"
        assert line["name"] in done.stdout
    assert lines["fused, 3 trials"]["sweep_seconds"] == pytest.approx(3 * lines["fused, 3 trials"]["trial_seconds"])
    assert figures["work"]["shared_operations"] > 0
