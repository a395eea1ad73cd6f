"""The benchmark: what is measured of a run, and the command end to end."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from hydra import compose, initialize_config_dir

from distilbench.bench import run as cases
from distilbench.bench.run import Measured, cases_of, combine_runs, precisions_to_try
from distilbench.benchmark import benchmark
from distilbench.settings import BenchmarkSettings, register_schema, settings_from
from tests.commands import FORKS
from tests.conftest import ROOT

COMMAND = "distilbench.benchmark"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY_UNTRACKED = ("model=tiny", "data=synthetic", "tracking=none")


def test_processes_at_once_take_as_long_as_the_slowest_and_as_much_as_all():
    both = combine_runs([Measured(4.0, 8.0, 1.0, 3.0, 100, 0.5), Measured(5.0, 8.0, 0.5, 2.0, 100, 0.6)])
    assert both == Measured(5.0, 16.0, 1.0, 3.0, 200, 0.5)


@pytest.mark.parametrize(
    ("device", "native", "tried"),
    [("cpu", True, ["fp32", "bf16"]), ("cpu", False, ["fp32"]), ("cuda", True, ["fp32", "bf16"]),
     ("cuda", False, ["fp32", "fp16"]), ("mps", False, ["fp32"])],
)  # fmt: skip
def test_trainer_is_tried_in_what_the_device_has_instructions_for(settings, monkeypatch, device, native, tried):
    monkeypatch.setattr(cases, "has_native_bf16", lambda device: native)
    assert precisions_to_try("auto", settings().trial, torch.device(device)) == tried


def test_only_the_fastest_way_to_tune_is_put_beside_the_others_and_never_compiled_several_times_at_once(
    benchmark_settings, monkeypatch
):
    seconds = {("fp32", False): 5.0, ("fp32", True): 4.0, ("bf16", False): 3.0, ("bf16", True): 2.0}
    monkeypatch.setattr(
        cases, "run_case", lambda case: Measured(seconds[case.precision, case.compiled], 8.0, 1.0, 3.0, 100, 0.5)
    )
    monkeypatch.setattr(cases, "has_native_bf16", lambda device: True)
    given = benchmark_settings(*TINY_UNTRACKED, "bench.processes=2", "output.dir=.")
    found = [(case.name, case.precision, case.compiled) for case in cases_of(given, given.trial, None, CUDA)[1:3]]
    assert found == [("HF tuned, compiled", "bf16", True), ("HF tuned, 2 at once", "bf16", False)]
    monkeypatch.setattr(cases, "run_case", None)  # the only way there is need not be tried
    monkeypatch.setattr(cases, "has_native_bf16", lambda device: False)
    assert [case.precision for case in cases_of(given, given.trial, None, CPU)[1:3]] == ["fp32", "fp32"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bench.steps=9"], "bench.steps must be a multiple of 8, got 9"),
        (["bench.processes=1"], "bench.processes must be 0, or 2 or more, got 1"),
        (["bench.trials=1"], "bench.trials must be 2 or more, got 1"),
        (["optim=sgd"], "optim.name must be adamw in a benchmark, got 'sgd'"),
        (["bench.steps=16"], "bench.steps must be at most 8 for 256 training examples, got 16"),
        (["data.max_train_examples=800", "model.checkpoint=electra"], "use engine=trainer"),
    ],
)
@pytest.mark.e2e
def test_a_mistake_is_one_line(workspace, arguments, line):
    done = workspace.run(*TINY_UNTRACKED, *arguments, program=COMMAND)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def benchmark_settings():
    """Return ``benchmark_settings(*overrides)``, as the command composes them."""

    def make(*overrides: str) -> BenchmarkSettings:
        with initialize_config_dir(str(ROOT / "conf")):
            return settings_from(compose("benchmark", list(overrides)), BenchmarkSettings)

    register_schema(BenchmarkSettings)
    yield make
    register_schema()


def test_the_benchmark_measures_six_rows_and_writes_table_and_figures(
    benchmark_settings, tmp_path, monkeypatch, capsys
):
    if FORKS:  # a process of its own for each run, but none that imports everything anew
        server = multiprocessing.get_context("forkserver")
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)
    short = ("bench.steps=8", "bench.trials=3", "bench.repeats=1", "bench.eval_examples=16", "train.batch_size=8",
             "bench.processes=2")  # fmt: skip
    benchmark(benchmark_settings(*TINY_UNTRACKED, *short, "freeze.layers=1", "train.precision=fp32",
                                 f"output.dir={tmp_path}"))  # fmt: skip
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "benchmark.json").read_text())
    lines = {line["name"]: line for line in figures["lines"]}
    assert list(lines) == [
        "HF as reported", "HF tuned", "HF tuned, 2 at once", "trainer", "fused, alone", "fused, 3 trials",
    ]  # fmt: skip
    assert lines["HF tuned"]["speed"] == [1, 1, 1]
    for line in lines.values():
        assert line["step_seconds"] > 0
        assert line["times_limit"] > 1
        assert line["trial_seconds"] > line["rest_seconds"] + line["evaluation_seconds"] > 0
        assert line["peak_bytes"] > 10**8
        assert line["loss"] == pytest.approx(lines["HF tuned"]["loss"], abs=0.02), "the same training"
        assert line["name"] in printed
    assert lines["fused, 3 trials"]["sweep_seconds"] == pytest.approx(3 * lines["fused, 3 trials"]["trial_seconds"])
    assert figures["day"] in figures["caption"]
    assert figures["driver"] is None, "there is no GPU here"
    assert figures["work"]["shared_operations"] > 0
