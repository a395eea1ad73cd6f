"""Runs that hold other runs: a sweep's, and a trial's with several seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from distilbench.results import Owner, Status
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import Connection
from distilbench.tracking.tags import LONGEST_TAG
from distilbench.tracking.undelivered import (
    NOTE,
    Undelivered,
    deliver,
    deliver_below,
    end_left_runs,
    has_undelivered,
    points,
)


class ParentRun:
    """An open run that others name as their parent; ``sweep`` is in its and their tag ``distilbench.sweep``.

    Without arguments it stands for one where nothing is tracked. ``directory`` holds the records of all its trials.
    """

    def __init__(self, connection: Connection | None = None, run_id: str | None = None, sweep: str = "",
                 directory: Path | None = None) -> None:  # fmt: skip
        self._connection, self.run_id, self._sweep = connection or Connection(), run_id, sweep
        self._directory = directory or Path()
        self._last = Undelivered(run_id)

    def update(self, metrics: Mapping[str, float], note: str | None = None) -> None:
        """Log metrics, and replace the description that MLflow's page shows (Markdown)."""
        tags = {} if note is None else {NOTE: redact(note)[:LONGEST_TAG]}
        self._last = replace(self._last, metrics=points(metrics), tags=tags)
        self._tell("how the sweep stands", self._last)

    def finish(self, status: Status, error: str | None = None) -> None:
        """Give the run its true end; one that was opened again may be ended again."""
        ended = replace(self._last, status=status, error=error)
        if not self._tell("the end of the sweep", ended):
            with contextlib.suppress(OSError):  # no room: the next call of the sweep ends it
                ended.write(self._directory)

    def _tell(self, what: str, lacking: Undelivered) -> bool:
        return self._connection.attempt(what, lambda: deliver(self._connection.client, self.run_id or "", lacking))

    def lacks(self, directory: Path) -> bool:
        """Return whether MLflow has still to be told of trials: those in ``directory``, or what it did not take."""
        return self._connection.is_gone or (self._connection.client and has_undelivered(directory))

    def catch_up(self, is_over: Callable[[Owner], bool], patience_seconds: float = 0.0) -> None:
        """End and deliver what trials left, wherever their process ``is_over``; wait for a store that is gone."""
        for wait in (0.0, patience_seconds):
            if not wait or (self.lacks(self._directory) and self._connection.wait(wait)):
                end_left_runs(self._connection, is_over, self._sweep, self.run_id)
                deliver_below(self._connection, self._directory, is_over)
