"""The Hydra entrypoint: compose, check, train, compare, return the objective.

Exit status: 0 finished, 1 the trial failed, 2 a setting to mend, 130 and 143 interrupted by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig

from distilbench.composition import baseline_config, command_for
from distilbench.settings import CONF, SettingsError, register_schema, require, settings_from

if TYPE_CHECKING:
    from distilbench.together import Trained
    from distilbench.trials import Job, Outcome

register_schema()
log = logging.getLogger("distilbench.train")  # not __main__, which a command line makes of this module


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: ends a trial as cleanly as Ctrl-C does."""


class TrialFailed(RuntimeError):
    """A trial of a multirun ended without a result; the message is the trial's own error."""


class Batches:
    """How ``hydra/launcher=fused`` trains several jobs at once: each described, all trained, each concluded."""

    def __init__(self, max_trials: int) -> None:
        with _in_one_line():
            require(max_trials >= 1, "hydra.launcher.max_trials", "1 or more", max_trials)
        self._max_trials = max_trials
        self._workshop: Any = None

    def describe(self, config: DictConfig) -> Job:
        """Return what a job is to do; raises or exits as the job itself would."""
        with _in_one_line():
            return _job(config)

    def train(self, jobs: Sequence[Job]) -> Iterator[Mapping[int, TaskFunction]]:
        """Train the jobs; yields task functions that end as :func:`main` would have."""
        if not jobs:
            return
        from distilbench.together import Workshop

        self._workshop = self._workshop or Workshop(self._max_trials)
        for ended in self._workshop.train(jobs):
            yield {index: _conclusion(trained) for index, trained in ended.items()}


def _takes_batches(task: TaskFunction) -> TaskFunction:
    """Tell the launcher that :class:`Batches` can train several of these jobs at once."""
    task.takes_batches = Batches  # type: ignore[attr-defined]
    return task


@hydra.main(config_path=str(CONF), config_name="config", execution_whitelist=["distilbench.composition.CheckFirst"])
@_takes_batches
def main(config: DictConfig) -> float:
    """Train one trial; returns its objective, ``train.metric`` on the selection split."""
    with _in_one_line():
        job = _job(config)
        from distilbench.trials import run_and_compare

        return _objective(run_and_compare(job))


@contextmanager
def _in_one_line() -> Iterator[None]:
    """End a job on an error that a person can mend, or on a trial's own, with one line and its exit status."""
    try:
        yield
    except SettingsError as error:
        _fail(str(error), status=2)
    except TrialFailed as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _fail(str(error), status=1)


def _job(config: DictConfig) -> Job:
    settings = settings_from(config)
    baseline = baseline_config(config)
    choices = HydraConfig.get().runtime.choices
    from distilbench.trials import Job

    return Job(
        settings=settings,
        baseline=settings_from(baseline),
        baseline_command=command_for(baseline, choices),
    )


def _objective(outcome: Outcome) -> float:
    if outcome.result.selection is None or outcome.result.error is not None:
        raise TrialFailed(f"{outcome.name}: {outcome.result.status}: {outcome.result.error}")
    return outcome.result.selection.metric(outcome.settings.train.metric)


def _conclusion(trained: Trained | Exception) -> TaskFunction:
    """A task function that says in one line how a trial ended, and returns its objective or raises its error."""

    def conclude(config: DictConfig) -> float:
        with _in_one_line():
            if isinstance(trained, Exception):
                raise trained
            log.info(trained.line)
            return _objective(trained.outcome)

    return conclude


def _fail(line: str, status: int) -> NoReturn:
    print(f"distilbench: {line}", file=sys.stderr)
    sys.exit(status)


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise Terminated


def cli() -> None:
    """Run :func:`main` as the command line does, with exit statuses for interruption."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except Terminated:
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli()
