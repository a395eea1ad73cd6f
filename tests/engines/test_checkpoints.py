"""Checkpoints that are sealed, found again, and passed over where they are not whole."""

from __future__ import annotations

from distilbench.engines import checkpoints
from distilbench.engines.checkpoints import Progress


def test_a_step_that_is_kept_twice_is_whole(tmp_path):
    """As when a signal comes during the last step of an epoch: evaluation and interruption both keep it."""
    checkpoint = tmp_path / "checkpoint-96"
    checkpoint.mkdir()
    for seconds in (1.0, 2.0):
        (checkpoint / "state").write_bytes(b"weights")
        checkpoints.seal(checkpoint, {"seed": 1}, Progress(step=96, train_seconds=seconds))
    assert checkpoints.newest(tmp_path, {"seed": 1}) == (checkpoint, Progress(step=96, train_seconds=2.0))
