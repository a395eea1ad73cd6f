"""Checkpoints that an interrupted trial continues from: which of them are whole, and whose they are.

A checkpoint is the directory that Hugging Face Trainer writes, made valid by ``seal.json``, which is put there last
and at once. What a kill or a loss of power cut short has no seal, or other sizes than it says, and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

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
    folders = _folders(directory)
    sealed = {path: seal for path in folders if (seal := read_seal(path))}
    for path in set(folders) - sealed.keys():
        log.info("%s was cut short while it was written: passed over", path)
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
    known = {field.name for field in fields(Progress)}  # other versions count more
    done = {name: value for name, value in seal["progress"].items() if name in known}
    return path, Progress(**done | {"history": [Evaluation(**values) for values in done["history"]]})


def read_seal(path: Path) -> dict[str, Any] | None:
    """Return the seal of a whole checkpoint, where nothing may be written again; None of one that was cut short."""
    try:
        seal: dict[str, Any] = json.loads((path / _SEAL).read_text())
        is_whole = all((path / name).stat().st_size == size for name, size in seal["sizes"].items())
    except (OSError, ValueError, KeyError):  # a seal that isn't there or is cut short, a file that is gone
        return None
    return seal if is_whole else None


def seal(path: Path, identity: Mapping[str, object], progress: Progress) -> None:
    """Declare the checkpoint at ``path`` whole, then remove those before it."""
    files = [file for file in path.iterdir() if not file.name.startswith(_SEAL)]  # of the same step, kept before
    sizes = {file.name: file.stat().st_size for file in files}
    history = [asdict(replace(evaluation, logits=None)) for evaluation in progress.history]
    done = asdict(replace(progress, history=[])) | {"history": history}
    partial = path / f"{_SEAL}.partial"
    partial.write_text(json.dumps({"identity": identity, "progress": done, "sizes": sizes}))
    os.replace(partial, path / _SEAL)
    for other in _folders(path.parent):
        if other != path:
            shutil.rmtree(other, ignore_errors=True)


def tidy(directory: Path, status: Status) -> None:
    """Remove what was cut short, all of a trial that ended for good, and ``directory`` where nothing is left in it."""
    if status in (Status.FINISHED, Status.PRUNED, Status.DIVERGED):
        shutil.rmtree(directory, ignore_errors=True)
    for path in _folders(directory):
        if read_seal(path) is None:
            shutil.rmtree(path, ignore_errors=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _folders(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*") if path.is_dir()]
