"""Checkpoints that are sealed, found again, and passed over where they are not whole."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from distilbench.engines import checkpoints
from distilbench.engines.checkpoints import TrainingState
from distilbench.engines.fused.member import Member


def test_a_step_that_is_kept_twice_is_whole(tmp_path):
    """As when a signal comes during the last step of an epoch: evaluation and interruption both keep it."""
    checkpoint = tmp_path / "checkpoint-96"
    checkpoint.mkdir()
    for seconds in (1.0, 2.0):
        (checkpoint / "state").write_bytes(b"weights")
        checkpoints.write_seal(checkpoint, {"seed": 1}, TrainingState(step=96, train_seconds=seconds))
    assert checkpoints.find_latest(tmp_path, {"seed": 1}) == (checkpoint, TrainingState(step=96, train_seconds=2.0))


def test_a_complete_checkpoint_is_not_overwritten(tmp_path):
    """A kill while the same step is kept once more would leave a seal beside half of a file."""
    progress = TrainingState(step=96, train_seconds=1.0)
    trial = SimpleNamespace(folder=tmp_path, identity={"seed": 1}, progress=progress)
    member = SimpleNamespace(trial=trial, best_params=None)
    Member.save(member, torch.ones(3), [])
    (state,) = tmp_path.glob("checkpoint-96/*.safetensors")
    kept = state.stat()
    Member.save(member, torch.ones(3), [])
    assert (state.stat().st_mtime_ns, state.stat().st_ino) == (kept.st_mtime_ns, kept.st_ino)
    assert checkpoints.find_latest(tmp_path, {"seed": 1}) == (tmp_path / "checkpoint-96", progress)
