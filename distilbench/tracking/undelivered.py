"""Bring runs up to date with their directories: after an outage of the store, and after a process was killed.

While a store is unreachable, ``undelivered/`` next to a trial's record holds what MLflow lacks, for a later delivery by
any process. How a trial ended is read from ``trial.json``, never guessed. A second delivery does no harm: MLflow stores
equal points once, and files and tags are replaced.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbench.results import PREDICTIONS, Owner, Status, read_record, replace_file
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import Connection, is_outage, reason_of
from distilbench.tracking.start import (
    DIRECTORY,
    LONGEST_TAG,
    Point,
    RunContent,
    claim_run,
    fill_run,
    log_batch,
    owner_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

UNDELIVERED = "undelivered"
"""Directory next to a record: ``run.json``, and files for the run."""

RUN = "run.json"

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as a run's description."""

HEADLINE = "distilbench.headline"
"""Tag with the first sentence of the description, by which a later one can replace it."""

TERMINAL = {Status.FINISHED: "FINISHED", Status.INTERRUPTED: "KILLED", Status.PRUNED: "KILLED"}


@dataclass
class Undelivered:
    """What a run lacks; ``content`` is set if it must still be created (``run_id`` is None) or completed.

    ``status`` and ``error`` count only if no record says how the trial ended.
    """

    run_id: str | None
    content: RunContent | None = None
    metrics: list[Point] = field(default_factory=list)
    held: Mapping[str, int] = field(default_factory=dict)
    """Curve -> the last step that the run had when it was reopened."""
    tags: Mapping[str, str] = field(default_factory=dict)
    status: Status = Status.RUNNING
    error: str | None = None

    def make(self, connection: Connection) -> str:
        """Create, complete or reopen the run; returns its id, raises the store's errors."""
        if self.content:
            run = claim_run(connection.client, connection.experiment_id, self.content, self.run_id)
            self.run_id = run.info.run_id
            fill_run(connection.client, run, self.content)
            self.content = None
            stored = run.to_proto().data.metrics  # RunData.metrics has no steps
            self.held = {one.key: one.step for one in stored if "/" in one.key or one.key == "epoch"}
        assert self.run_id is not None  # it has either an id or what makes it
        return self.run_id

    def points(self) -> list[Point]:
        """Return the metrics, one a step, without steps that the run has: a continued trial measures some again."""
        one_a_step = {(name, step): (name, value, at, step) for name, value, at, step in self.metrics}
        return [point for (name, step), point in one_a_step.items() if step > self.held.get(name, -1)]

    def deliver(self, connection: Connection, files: Sequence[Path] = ()) -> None:
        """Send the run what it lacks; its end comes last, so that a FINISHED run is complete.

        Permanent errors are logged; raises the errors of an unreachable store.
        """
        run_id, client = self.make(connection), connection.client
        writes: list[tuple[str, Callable[[], object]]] = []
        if self.metrics or self.tags:
            writes.append(("metrics", partial(log_batch, client, run_id, self.points(), self.tags)))
        writes += [(file.name, partial(client.log_artifact, run_id, str(file))) for file in files]
        if self.status is not Status.RUNNING:
            writes.append(("end", partial(end_run, client, run_id, self.status, self.error)))
        for what, write in writes:
            try:
                write()
            except Exception as error:  # any error: the rest must still be sent
                if is_outage(error):
                    raise
                log.warning("MLflow did not take %s of the run: %s", what, reason_of(error))
        self.metrics, self.tags = [], {}

    def write(self, directory: Path) -> Path:
        """Replace what is kept in ``directory``; returns the folder for files that the run lacks."""
        folder = directory / UNDELIVERED
        with replace_file(folder / RUN) as partial_file:
            partial_file.write_text(json.dumps(asdict(self)))
        return folder


def read(directory: Path) -> Undelivered | None:
    """Return what is kept in ``directory``; None if there is nothing, or if a power loss truncated it."""
    try:
        kept: dict[str, Any] = json.loads((directory / UNDELIVERED / RUN).read_text())
        content = RunContent(**kept["content"]) if kept["content"] else None
        metrics = [(name, value, at, step) for name, value, at, step in kept["metrics"]]
        return Undelivered(**kept | {"content": content, "status": Status(kept["status"]), "metrics": metrics})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def discard(directory: Path) -> None:
    """Remove what was kept in ``directory``, after its delivery."""
    shutil.rmtree(directory / UNDELIVERED, ignore_errors=True)


def is_any_below(directory: Path) -> bool:
    """Return whether something is kept in ``directory`` or below."""
    return any(directory.rglob(f"{UNDELIVERED}/{RUN}"))


def deliver_below(connection: Connection, directory: Path, is_over: Callable[[Owner], bool]) -> None:
    """Deliver what is kept in ``directory`` and below, except for trials that a process still trains."""
    for file in sorted(directory.rglob(f"{UNDELIVERED}/{RUN}")):
        place = file.parents[1]
        record = read_record(place)
        if record is None or record.status is not Status.RUNNING or is_over(record.owner):
            connection.attempt(f"what {place} keeps for it", partial(_deliver_kept, connection, place))


def _deliver_kept(connection: Connection, directory: Path) -> None:
    from filelock import FileLock

    with FileLock(directory / UNDELIVERED / ".lock"):  # so that no two workers create the run
        kept = read(directory)
        if kept is None:
            return discard(directory)  # another process was faster
        try:
            run_id = kept.make(connection)
        finally:
            kept.write(directory)
        record = read_record(directory)
        if record and record.run_id is None:
            replace(record, run_id=run_id).write(directory)
        tags = connection.client.get_run(run_id).data.tags
        if tags.get(DIRECTORY) == str(directory.absolute()) and (record is None or owner_of(tags) == record.owner):
            deliver_and_end(connection, run_id, directory)
        else:  # the trial was continued elsewhere or by another process, which reports how it ended
            log_batch(connection.client, run_id, kept.points())
            discard(directory)


def deliver_and_end(connection: Connection, run_id: str, directory: Path) -> Status:
    """Send a run all that it lacks and end it as its directory says, or as INTERRUPTED if that does not say."""
    kept, record = read(directory), read_record(directory)
    kept = kept if kept and kept.run_id == run_id else Undelivered(run_id)
    record = record if record and record.run_id == run_id else None  # the directory may have been used again
    if kept.status is Status.RUNNING:
        kept.status, kept.error = Status.INTERRUPTED, "its process was killed"
        kept.metrics += metric_points(record.figures, int(record.figures.get("steps", 0))) if record else []
    if record and record.status is Status.RUNNING:
        record = replace(record, status=kept.status, error=kept.error)
        record.write(directory)
    files = sorted((directory / UNDELIVERED).glob("[!.]*"))
    if record:
        kept.status, kept.error = record.status, record.error
        files.append(directory / PREDICTIONS)
    kept.deliver(connection, [file for file in files if file.is_file() and file.name != RUN])
    discard(directory)
    return kept.status


def end_left_runs(connection: Connection, is_over: Callable[[Owner], bool], sweep: str | None = None,
                  but: str | None = None) -> list[str]:  # fmt: skip
    """End RUNNING runs of the experiment, or of one sweep, whose process ``is_over``; ``but`` is a run to skip.

    Returns each run's name and how it ended.
    """
    query = "attributes.status = 'RUNNING'" + (f" and tags.`distilbench.sweep` = '{sweep}'" if sweep else "")
    running: list[Run] = []
    connection.attempt("a question for unfinished trials", lambda: running.extend(
        connection.client.search_runs([connection.experiment_id], query)), is_write=False)  # fmt: skip
    ended: list[str] = []

    def end(run: Run, directory: Path) -> None:
        ended.append(f"{run.info.run_name} {deliver_and_end(connection, run.info.run_id, directory)}")

    for run in running:
        owner = owner_of(run.data.tags)
        if owner and is_over(owner) and run.info.run_id != but:
            directory = Path(run.data.tags.get(DIRECTORY, os.devnull))
            connection.attempt(f"the end of {run.info.run_name}", partial(end, run, directory))
            if not sweep:
                deliver_below(connection, directory, is_over)  # of a sweep's parent run: what its trials keep
    return ended


def metric_points(values: Mapping[str, float], step: int = 0) -> list[Point]:
    """Return values as metrics measured now."""
    at = int(time.time() * 1000)
    return [(name, float(value), at, step) for name, value in values.items()]


def end_run(client: MlflowClient, run_id: str, status: Status, error: str | None) -> None:
    """Tag a run with its status and error, then end it with the corresponding status of MLflow."""
    tags = {"distilbench.status": status.value}
    if error:
        reason = redact(" ".join(error.split()))
        quoted = reason.replace("`", "'")
        tags["distilbench.error"] = reason[:LONGEST_TAG]
        tags |= begin_note(client.get_run(run_id).data.tags, f"**{status.value}** `{quoted}`")
    log_batch(client, run_id, tags=tags)
    client.set_terminated(run_id, TERMINAL.get(status, "FAILED"))


def restore_ends(client: MlflowClient, run_id: str, status: Status, error: str | None) -> None:
    """Restore the given end of a run if it has another."""
    run = client.get_run(run_id)
    told = run.info.status, run.data.tags.get("distilbench.status")
    if status is not Status.RUNNING and told != (TERMINAL.get(status, "FAILED"), status.value):
        log_batch(client, run_id, tags={"distilbench.error": "", **begin_note(run.data.tags, "")})
        end_run(client, run_id, status, error)


def begin_note(tags: Mapping[str, str], sentence: str) -> dict[str, str]:
    """Return the tags of a description that begins with a Markdown sentence, in place of an earlier such sentence."""
    head, rest = redact(sentence), tags.get(NOTE, "").removeprefix(tags.get(HEADLINE, "")).lstrip("\n")
    return {NOTE: "\n\n".join(filter(None, (head, rest)))[:LONGEST_TAG], HEADLINE: head[:LONGEST_TAG]}
