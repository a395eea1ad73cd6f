"""Checkpoints from which an interrupted trial resumes: whether they are complete, and which trial they belong to.

A checkpoint is a directory, such as Hugging Face Trainer writes. It becomes valid with ``seal.json``, which is written
last and atomically. A checkpoint cut short by a kill or power loss has no seal, or other file sizes, and is ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from distilbench.data.tokens import EncodedSplits
from distilbench.identity import checkpoint_identity
from distilbench.results import Evaluation, Status, replace_file
from distilbench.settings import SettingsError, TrialSettings

log = logging.getLogger(__name__)

DIRECTORY = "checkpoints"
_SEAL = "seal.json"


@dataclass
class TrainingState:
    """The progress of a trial, summed over all processes that have trained it.

    ``train_seconds`` and ``train_cpu_seconds`` are reported in the result; ``step_seconds`` is ``train_seconds``
    without evaluations. ``gradients`` is described in :class:`~distilbench.engines.moving_freeze.MovingFreeze`.
    """

    step: int = 0
    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    step_seconds: float = 0.0
    peak_memory_bytes: int = 0
    history: list[Evaluation] = field(default_factory=list)
    gradients: list[list[float]] = field(default_factory=list)


def identity_of(settings: TrialSettings, splits: EncodedSplits, weights: str, precision: str) -> dict[str, object]:
    """Return :func:`~distilbench.identity.checkpoint_identity` for the tokens and labels of ``splits``.

    ``weights`` is the fingerprint of the initial weights, ``precision`` the resolved one.
    """
    texts = hashlib.sha256()
    for split in (splits.train, splits.selection):
        for values in (split.tokens, split.offsets, split.labels):
            texts.update(values.tobytes())
    return checkpoint_identity(settings, weights, texts.hexdigest(), precision)


def find_latest(directory: Path, identity: Mapping[str, object]) -> tuple[Path, TrainingState] | None:
    """Return the newest complete checkpoint in ``directory`` with its progress, or None.

    Raises :class:`SettingsError` if that checkpoint belongs to a trial of another ``identity``.
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
    known = {field.name for field in fields(TrainingState)}  # other versions may have more fields
    done = {name: value for name, value in seal["progress"].items() if name in known}
    return path, TrainingState(**done | {"history": [Evaluation(**values) for values in done["history"]]})


def read_seal(path: Path) -> dict[str, Any] | None:
    """Return the seal of a complete checkpoint, which must not be written again, or None for an incomplete one."""
    try:
        seal: dict[str, Any] = json.loads((path / _SEAL).read_text())
        is_whole = all((path / name).stat().st_size == size for name, size in seal["sizes"].items())
    except (OSError, ValueError, KeyError):  # no seal, a truncated one, or a missing file
        return None
    return seal if is_whole else None


def write_seal(path: Path, identity: Mapping[str, object], progress: TrainingState) -> None:
    """Mark the checkpoint at ``path`` as complete, then remove all other checkpoints next to it."""
    files = [file for file in path.iterdir() if not file.name.startswith((_SEAL, "."))]  # this step may have a seal
    sizes = {file.name: file.stat().st_size for file in files}
    history = [asdict(replace(evaluation, logits=None)) for evaluation in progress.history]
    done = asdict(replace(progress, history=[])) | {"history": history}
    with replace_file(path / _SEAL) as partial:
        partial.write_text(json.dumps({"identity": identity, "progress": done, "sizes": sizes}))
    for other in _folders(path.parent):
        if other != path:
            shutil.rmtree(other, ignore_errors=True)


def remove_stale(directory: Path, status: Status) -> None:
    """Remove incomplete checkpoints, or all if ``status`` is final, and ``directory`` if it is then empty."""
    if status in (Status.FINISHED, Status.PRUNED, Status.DIVERGED):
        shutil.rmtree(directory, ignore_errors=True)
    for path in _folders(directory):
        if read_seal(path) is None:
            shutil.rmtree(path, ignore_errors=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _folders(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*") if path.is_dir()]
