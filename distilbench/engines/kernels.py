"""What a GPU does in one launch each: dropout's masks and AdamW over stacked rows, written in Triton.

Every kernel here has a plain PyTorch version beside its only caller, which the tests compare it with and which runs
where Triton or CUDA is not there. Kernels are compiled at their first use, about a second each, and kept on disk.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)


def usable(tensor: torch.Tensor) -> bool:
    """Whether kernels run on the device of ``tensor``."""
    return tensor.device.type == "cuda" and _compile()


@cache
def _compile() -> bool:
    """Try the kernels once; where they fail, say so, and leave the work to their plain versions."""
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: a step takes thousands of launches instead of hundreds")
        return False
    try:
        philox_keep(torch.zeros(1, dtype=torch.int64, device="cuda"), 1, 6554, (8, 8), 512, torch.float32)
        rows = torch.zeros(6, 1, 8, device="cuda")
        one = torch.ones(1, 6, device="cuda")
        adamw(rows[0], rows[1], [rows[2], rows[3]], None, one, one, one[0], 8, (0, 0))
        torch.cuda.synchronize()
    except Exception as error:  # a compiler's errors have no common class
        log.warning("Triton's kernels are left out: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return False
    return True


def philox_keep(
    keys: torch.Tensor, site: int, dropped: int, whole: Sequence[int], extent: int, dtype: torch.dtype
) -> torch.Tensor:
    """The same masks as :func:`distilbench.engines.dropout.philox_keep`, bit for bit."""
    *outer, rows, columns = whole
    blocks = -(-columns // 8)
    numbered = (extent, extent // 8) if outer else (rows, blocks)
    kept = torch.empty(len(keys), *whole, dtype=dtype, device=keys.device)
    count = math.prod(outer) * rows * blocks
    size = 256
    _compiled().keep[(-(-count // size), len(keys))](
        keys, kept, site, dropped, count, rows, blocks, columns, numbered[0], numbered[1], math.prod(whole), SIZE=size
    )
    return kept


def adamw(
    rows: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor], copy: torch.Tensor | None,
    numbers: torch.Tensor, constants: torch.Tensor, factors: torch.Tensor, decayed: int, low: tuple[int, int],
) -> None:  # fmt: skip
    """Do what :func:`distilbench.engines.tabled.adamw` does, and write ``copy`` of columns ``low`` along the way."""
    trials, size = rows.shape
    block = 1024
    _compiled().adamw[(-(-size // block), trials)](
        rows, gradient, *moments, rows if copy is None else copy, numbers, constants, factors,
        size, decayed, low[0], low[1], numbers.stride(0), constants.stride(0), COPIES=copy is not None, BLOCK=block,
    )  # fmt: skip


@cache
def _compiled() -> Any:
    """Import the kernels, which needs Triton."""
    from distilbench.engines import _triton

    return _triton
