"""Checkpoints that an interrupted trial continues from: which of them are whole, and whose they are.

A checkpoint is the directory that Hugging Face Trainer writes, made valid by ``seal.json``, which is put there last
and at once. What a kill leaves behind has no seal, and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from distilbench.data.tokens import EncodedSplits
from distilbench.identity import checkpoint_identity
from distilbench.results import Evaluation, Status
from distilbench.settings import SettingsError, TrialSettings

log = logging.getLogger(__name__)

DIRECTORY = "checkpoints"
_SEAL = "seal.json"


@dataclass
class Progress:
    """How far a trial has come, over all the processes that worked on it.

    ``train_seconds`` and ``train_cpu_seconds`` are what the result reports, ``step_seconds`` the part of the former
    without evaluations, ``gradients`` those of :class:`~distilbench.engines.moving_freeze.MovingFreeze`.
    """

    step: int = 0
    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    step_seconds: float = 0.0
    peak_memory_bytes: int = 0
    history: list[Evaluation] = field(default_factory=list)
    gradients: list[list[float]] = field(default_factory=list)


def identity_of(settings: TrialSettings, splits: EncodedSplits, weights: str, precision: str) -> dict[str, object]:
    """Return :func:`~distilbench.identity.checkpoint_identity` with the text that ``splits`` hold.

    ``weights`` is the fingerprint of the initial weights, ``precision`` the one really used.
    """
    texts = hashlib.sha256()
    for split in (splits.train, splits.selection):
        for values in (split.tokens, split.offsets, split.labels):
            texts.update(values.tobytes())
    return checkpoint_identity(settings, weights, texts.hexdigest(), precision)


def newest(directory: Path, identity: Mapping[str, object]) -> tuple[Path, Progress] | None:
    """Return the newest whole checkpoint in ``directory`` and what had been done by then; None where there is none.

    Raises :class:`SettingsError` where that checkpoint belongs to a trial of another ``identity``.
    """
    sealed = {path: json.loads((path / _SEAL).read_text()) for path in _folders(directory) if is_sealed(path)}
    if not sealed:
        return None
    path, seal = max(sealed.items(), key=lambda item: item[1]["progress"]["step"])
    theirs, ours = seal["identity"], json.loads(json.dumps(identity))
    changed = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    if changed:
        its, own = (f"{changed[0]}={given.get(changed[0])!s:.12}" for given in (theirs, ours))
        raise SettingsError(
            f"train.resume must continue with the settings of {path}, which has {its}, got {own}; "
            "use the same settings, another output.dir, or train.resume=false"
        )
    history = [Evaluation(**values) for values in seal["progress"]["history"]]
    return path, Progress(**seal["progress"] | {"history": history})


def is_sealed(path: Path) -> bool:
    """Return whether the checkpoint at ``path`` is whole, so that nothing there may be written again."""
    return (path / _SEAL).is_file()


def seal(path: Path, identity: Mapping[str, object], progress: Progress) -> None:
    """Declare the checkpoint at ``path`` whole, then remove those before it."""
    history = [asdict(replace(evaluation, logits=None)) for evaluation in progress.history]
    done = asdict(replace(progress, history=[])) | {"history": history}
    partial = path / f"{_SEAL}.partial"
    partial.write_text(json.dumps({"identity": identity, "progress": done}))
    os.replace(partial, path / _SEAL)
    for other in _folders(path.parent):
        if other != path:
            shutil.rmtree(other, ignore_errors=True)


def tidy(directory: Path, status: Status) -> None:
    """Remove what was cut short, all of a trial that ended for good, and ``directory`` where nothing is left in it."""
    if status in (Status.FINISHED, Status.PRUNED, Status.DIVERGED):
        shutil.rmtree(directory, ignore_errors=True)
    for path in _folders(directory):
        if not is_sealed(path):
            shutil.rmtree(path, ignore_errors=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _folders(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*") if path.is_dir()]
