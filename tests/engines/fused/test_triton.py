"""What Triton compiles the kernels to, for GPUs that need not be there: shared memory, registers, and how few they are.

All devices, precisions and head sizes take three minutes of one core: ``DISTILBENCH_ALL_PROGRAMS=1``.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import threading

import pytest
import torch

from distilbench.engines.fused import kernels
from distilbench.engines.fused.kernels import DropoutSite, Launch, Sentences

triton = pytest.importorskip("triton", reason="needs triton, which is in the test extra where it has wheels")
OutOfResources = triton.runtime.errors.OutOfResources
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, which TRITON_INTERPRET=1 replaces", allow_module_level=True)

KIB = 1024
LIMITS = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB}
"""Shared memory of a program by compute capability: T4, A100, RTX 30, L4 and RTX 40, H100 and H200."""
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HEAD_SIZES = (32, 64, 96)
WIDTHS = (16, 33, 64, 128, 200, 512)
SPILLED = 16
"""Bytes a thread may spill, of four registers: eight are the most seen. Blocks of 32 in float32 would spill 1,704."""
ALL = [(device, dtype, size, drops) for device in LIMITS for dtype in (FP32, FP16 if device == 75 else BF16)
       for size in HEAD_SIZES for drops in (True, False)]  # fmt: skip
SOME = [(75, FP32, 64, True), (75, FP32, 96, True), (80, BF16, 96, True), (90, BF16, 64, True), (90, BF16, 64, False)]
CASES = ALL if os.environ.get("DISTILBENCH_ALL_PROGRAMS") == "1" else SOME


class Absent:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def gpu(monkeypatch):
    """Return ``gpu(capability)``, which pretends that there is one: what is launched from then on is compiled."""

    def pretend(capability):
        active = "_active" if "_active" in vars(triton.runtime.driver) else "active"  # until Triton 3.5
        monkeypatch.setitem(vars(triton.runtime.driver), active, Absent(capability))
        launched = []
        monkeypatch.setattr(Launch, "run", lambda launch: launched.append(compiled(launch)))
        return launched

    return pretend


def compiled(launch):
    """What the compiler makes of it; tensors need no contents."""
    return launch.program.warmup(grid=launch.grid, **launch.arguments, enable_fp_fusion=True)


def rehearsed(launched, work, *details):
    """The programs, by hash, that are tried before a training."""
    launched.clear()
    kernels.SMOKE_TESTS[work](torch.device("meta"), *details)
    return {program.hash for program in launched}


def attend(dtype, head_size, width, one_query=False, drops=True):
    """Attention and its gradient over sentences of ``width`` tokens at most, two trials in orders of their own."""
    bounds = torch.ones(2, 3 + width, dtype=torch.int64, device="meta")
    sentences = Sentences(bounds[:, 1:4], bounds[:, 1:4], width)
    rows = torch.empty(2, 3 * width, (2 if one_query else 3) * 12 * head_size, dtype=dtype, device="meta")
    query = torch.empty(2, 3, 12 * head_size, dtype=dtype, device="meta") if one_query else None
    draws = DropoutSite(bounds[:, 0], 16, 6554) if drops else None
    context = kernels.attention(rows.requires_grad_(), query, sentences, draws, 12)
    context.backward(torch.empty_like(context))


def spilled(program, folder):
    """Bytes of registers that a thread spills."""
    path = folder / "program.cubin"
    path.write_bytes(program.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


@pytest.mark.parametrize(("capability", "dtype", "head_size", "drops"), CASES)
def test_attention_fits_the_device_at_any_width(gpu, tmp_path, capability, dtype, head_size, drops):
    launched = gpu(capability)
    for width in WIDTHS:
        attend(dtype, head_size, width, drops=drops)
        attend(dtype, head_size, width, one_query=True, drops=drops)
    programs = {program.hash: program for program in launched}
    assert len(launched) == 4 * len(WIDTHS)
    assert len(programs) == 2, "one each way, whatever the width"
    if drops:
        assert rehearsed(launched, "attention", dtype, 12, head_size) == set(programs), "what is tried is what runs"
    for program in programs.values():
        assert program.metadata.shared <= min(LIMITS[capability], 37 * KIB)
        assert spilled(program, tmp_path) <= SPILLED


@pytest.mark.parametrize(("capability", "dtype"), [(75, FP32), (90, BF16)])
def test_masks_rows_sums_clipping_and_adamw_are_six_programs_that_fit_every_device(gpu, tmp_path, capability, dtype):
    launched = gpu(capability)
    keys = torch.empty(2, dtype=torch.int64, device="meta")
    for site, shape in ((1, (208, 768)), (16, (432, 384)), (3, (16, 12, 48, 48))):
        kernels.dropout_mask(DropoutSite(keys, site, 6554), shape, FP32)
    for trials, size, low in ((1, 1024, slice(0, 512)), (32, 22_713_984, slice(4_443_648, 22_000_000))):
        params, grad, mean, square = torch.empty(4, trials, size, device="meta")
        compute = torch.empty(2, trials, low.stop - low.start, dtype=dtype, device="meta")
        rule = [torch.empty(trials, n, device="meta") for n in (4, 6)]
        kernels.clip(grad, None if dtype == FP32 else compute[0], low, rule[0][:, 0], rule[0][:, 1])
        kernels.adamw(params, grad, (None, None) if dtype == FP32 else tuple(compute), [mean, square],
                      (*rule, rule[0][:, 0]), (low.stop, low)).run()  # fmt: skip
    for trials, orders, width in ((1, 1, 768), (32, 1, 384), (3, 3, 768)):
        index = torch.empty(orders, 1000, dtype=torch.int64, device="meta")[:, 7:247]
        table = torch.empty(trials, 30_000, device="meta")[:, : 10 * width].view(trials, 10, width)
        kernels.add_rows(table, index, torch.empty(trials, 240, width, device="meta"))
        kernels.sum_rows(torch.empty(trials, 240, width, dtype=dtype, device="meta"))
    programs = {program.hash: program for program in launched}
    tried = rehearsed(launched, "dropout") | rehearsed(launched, "adamw", dtype)
    tried |= rehearsed(launched, "rows", FP32) | rehearsed(launched, "sums", dtype)
    assert tried == set(programs)
    assert len(programs) == 6
    for program in programs.values():
        assert program.metadata.shared <= 16 * KIB
        assert spilled(program, tmp_path) == 0


@pytest.mark.parametrize(("capability", "dtype"), [(75, FP32), (90, BF16)])
@pytest.mark.parametrize("width", [384, 768, 1024])
def test_adding_and_normalising_are_five_programs_for_all_batches(gpu, tmp_path, capability, dtype, width):
    """With and without dropout each way, and the sum; for trials that share the stream, too, and those that do not."""
    launched = gpu(capability)
    for trials, rows, shared in ((1, 208, 1), (32, 432, 1), (3, 16, 3)):
        for draws in (None, DropoutSite(torch.empty(shared, dtype=torch.int64, device="meta"), 16, 6554)):
            x = torch.empty(shared, rows, width, device="meta", requires_grad=shared == trials)
            branch = torch.empty(trials, rows, width, dtype=dtype, device="meta", requires_grad=True)
            vectors = torch.empty(3, trials, 40_000, device="meta")[..., :width]
            branch_bias = vectors[0].to(dtype).requires_grad_()
            each = kernels.add_norm(x, branch, branch_bias, (vectors[1], vectors[2]), draws, 1e-12)
            torch.autograd.backward(each[: 1 + (dtype != FP32)], [torch.empty_like(out) for out in dict.fromkeys(each)])
    programs = {program.hash: program for program in launched}
    assert rehearsed(launched, "norm", dtype, width) == set(programs)
    assert len(programs) == 5
    for program in programs.values():
        assert program.metadata.shared <= 16 * KIB
        assert spilled(program, tmp_path) == 0


@pytest.fixture
def judge(monkeypatch):
    """Return ``judge(error=None)``: whether attention is accepted where its kernels raise that, or nothing."""

    def ask(error=None):
        def run(launch):
            if error is not None:
                raise error

        monkeypatch.setattr(Launch, "run", run)
        return kernels._is_working.__wrapped__("attention", torch.device("cpu"), FP32, 12, 64)

    return ask


@pytest.mark.parametrize(("error", "said"), [
    (OutOfResources(98304, 65536, "shared memory"), "OutOfResources: out of resource: shared memory, Required: 98304"),
    (RuntimeError("no C compiler\nand more"), "RuntimeError: no C compiler"),
])  # fmt: skip
def test_what_does_not_fit_or_does_not_run_is_left_to_the_plain_version_and_said(judge, caplog, error, said):
    with caplog.at_level(logging.WARNING):
        assert judge()
        assert caplog.records == []
        assert not judge(error)
    [record] = caplog.records
    assert record.getMessage().startswith(f"attention takes its plain version, for Triton's fails: {said}")


def test_triton_refuses_what_takes_more_shared_memory_than_a_device_has(gpu, monkeypatch):
    launched = gpu(75)
    kernels.SMOKE_TESTS["attention"](torch.device("meta"), FP32, 12, 64)
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 8 * KIB)
    monkeypatch.setattr(Absent, "launcher_cls", lambda self, *given: None, raising=False)
    with pytest.raises(OutOfResources, match="Required: 12288, Hardware limit: 8192"):
        launched[0][1, 1, 1]()


def test_a_device_that_is_full_says_nothing_of_its_kernels(judge):
    with pytest.raises(torch.OutOfMemoryError):
        judge(torch.OutOfMemoryError("CUDA out of memory"))


def test_no_device_but_a_gpu_runs_kernels_and_none_in_double_precision():
    assert not kernels.can_run("attention", torch.device("cpu"), FP32, 12, 64)
    assert not kernels.can_run("attention", torch.device("cuda", 0), torch.float64, 12, 64)


def test_a_training_that_waits_for_the_compiler_says_so_and_one_that_does_not_is_silent(monkeypatch):
    asked, said = [], threading.Event()
    monkeypatch.setattr(kernels.log, "info", lambda *message: said.set() or asked.append(message[0] % message[1:]))
    monkeypatch.setattr(kernels, "can_run", lambda work, *details: asked.append(work))
    kernels.compile_all(torch.device("cuda", 0), BF16, 12, 64)
    assert asked == ["dropout", "adamw", "rows", "sums", "attention", "norm"]
    monkeypatch.setattr(kernels, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "can_run", lambda work, *details: said.wait(60))
    kernels.compile_all(torch.device("cuda", 0), BF16, 12, 64)
    assert asked[6:] == ["compiling Triton's kernels for cuda:0: once on a machine, up to half a minute"]
