"""Handing trials to Hydra's launchers: one after another, in batches, or each to the next free worker."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig


@dataclass(frozen=True)
class Launch:
    """One job: the trial's number and its overrides."""

    number: int
    overrides: Sequence[str]


class Hands(Protocol):
    """What launches trials."""

    @property
    def at_once(self) -> int | None:
        """How many trials it works on at a time; None for any number."""
        ...

    def start(self, launches: Sequence[Launch]) -> dict[Future[JobReturn], int]:
        """Launch trials; the futures, by which each one's end is known, map to their numbers."""
        ...

    def stop(self) -> None:
        """End what still runs, at once."""
        ...


class InTurn:
    """A launcher that answers when its whole batch is done; ``at_once`` is the batch's size, None for all there are."""

    def __init__(self, launcher: Launcher, at_once: int | None) -> None:
        self._launcher, self.at_once = launcher, at_once

    def start(self, launches: Sequence[Launch]) -> dict[Future[JobReturn], int]:
        """Run a batch to its end, in this thread."""
        futures: dict[Future[JobReturn], int] = {Future(): launch.number for launch in launches}
        try:
            returns = self._launcher.launch([list(launch.overrides) for launch in launches], launches[0].number)
        except Exception as error:  # the batch's boundary: a launcher that broke fails its trials, not the sweep
            for future in futures:
                future.set_exception(error)
            return futures
        for future, returned in zip(futures, returns, strict=True):
            future.set_result(returned)
        return futures

    def stop(self) -> None:
        """Do nothing: what ran here has ended with the exception that ends the sweep."""


class AsFreed:
    """joblib's launcher, asked for one trial at a time from as many threads as it has workers."""

    def __init__(self, launcher: Launcher, at_once: int) -> None:
        self._launcher, self.at_once = launcher, at_once
        self._threads = ThreadPoolExecutor(at_once)

    def start(self, launches: Sequence[Launch]) -> dict[Future[JobReturn], int]:
        """Hand each trial to a thread of its own, with Hydra's context."""
        return {
            self._threads.submit(contextvars.copy_context().run, self._launch, launch): launch.number
            for launch in launches
        }

    def _launch(self, launch: Launch) -> JobReturn:
        return self._launcher.launch([list(launch.overrides)], launch.number)[0]

    def stop(self) -> None:
        """Kill the workers: a signal to the sweep's process alone never reaches them."""
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True, kill_workers=True)
        self._threads.shutdown(wait=True, cancel_futures=True)


def hands_of(launcher: Launcher, config: DictConfig, at_once: int | None) -> Hands:
    """The way that suits a launcher: ``at_once`` trials, by default one at a time where they share one process."""
    if isinstance(launcher, BasicLauncher):
        return InTurn(launcher, 1)
    if config._target_.endswith(".JoblibLauncher") and config.backend in (None, "loky"):
        from joblib import effective_n_jobs

        workers = effective_n_jobs(config.n_jobs)
        if workers == 1:  # joblib then works in the thread that asks, which must be the main one for signals
            return InTurn(launcher, 1)
        return AsFreed(launcher, min(at_once or workers, workers))
    return InTurn(launcher, at_once)


@contextlib.contextmanager
def quiet_launchers(config: DictConfig) -> Iterator[None]:
    """Keep launchers from a paragraph about each trial, of which the sweep says what there is to say itself.

    ``hydra.verbose`` lets them speak.
    """
    logs = [logging.getLogger(name) for name in ("hydra_plugins.hydra_joblib_launcher", "hydra._internal.core_plugins")]
    levels = [log.level for log in logs]
    for log in logs if not config.hydra.verbose else ():
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def error_of(future: Future[JobReturn]) -> BaseException | None:
    """What a job, or its launcher, ended with; None where it returned."""
    error = future.exception()
    if error is not None:
        return error
    returned: Any = future.result()
    if returned.status is JobStatus.COMPLETED:
        return None
    return returned._return_value if isinstance(returned._return_value, BaseException) else RuntimeError("no result")
