"""The training command: compose, check, train, compare, return the objective.

Exit status: 0 finished, 1 the trial failed, 2 a setting is invalid, 129, 130 or 143 interrupted, after printing the
command that continues.
"""

from __future__ import annotations

from distilbench.cli import exit_immediately

if __name__ == "__main__":
    exit_immediately()  # before the imports, which take half a second

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig

from distilbench.cli import (
    CommandFailed,
    errors_in_one_line,
    format_command,
    format_override,
    print_to_stderr,
    raise_on_signal,
    run_command,
)
from distilbench.composition import baseline_choices, baseline_config, command_for, typed_choices
from distilbench.identity import treatment_of
from distilbench.results import read_record
from distilbench.settings import CONF, register_schema, require, settings_from
from distilbench.sweep.job import Lease, SweepJob
from distilbench.sweep.trial import context_of, run_in_sweep

if TYPE_CHECKING:
    from distilbench.trials.batch import BatchRunner
    from distilbench.trials.prepared import Job
    from distilbench.trials.run import Trial

register_schema()


class TrialFailed(CommandFailed):
    """A trial ended without a result; the message is the trial's error."""


@dataclass(frozen=True)
class Assignment:
    """What a Hydra job has to do: train a trial, which may belong to one of our sweeps."""

    job: Job
    sweep_job: SweepJob | None

    @property
    def has_seeds(self) -> bool:
        """Whether the trial is trained once for each of its sweep's seeds, by itself."""
        return bool(self.sweep_job and self.job.settings.sweep.seeds)

    @property
    def own_job(self) -> Job:
        """The job with what its sweep, if any, gives the trial."""
        if self.sweep_job is None:
            return self.job
        return replace(self.job, context=context_of(self.sweep_job, self.job.settings, Lease(self.sweep_job)))

    def train(self, runner: BatchRunner | None = None) -> float | tuple[float, ...]:
        """Train the trial and return its objectives; a ``runner`` trains its seeds at once."""
        raise_on_signal()
        if self.sweep_job:
            return run_in_sweep(self.job, self.sweep_job, runner)
        from distilbench.trials.batch import run_and_compare

        return self.conclude(_objective(run_and_compare(self.job)))

    def conclude(self, ended: float | Exception) -> float | tuple[float, ...]:
        """Return the objective of a trial that has ended, or raise its error; a sweep's ``trial.json`` has both."""
        if self.sweep_job and (isinstance(ended, TrialFailed) or not isinstance(ended, Exception)):
            return self.sweep_job.final_objectives()
        if isinstance(ended, Exception):
            raise ended
        return ended


class BatchTrainer:
    """Trains the jobs of ``hydra/launcher=fused`` together: describes each, trains all, then concludes each."""

    def __init__(self, max_trials: int) -> None:
        with _report_errors():
            require(max_trials >= 1, "hydra.launcher.max_trials", "1 or more", max_trials)
        self._max_trials = max_trials
        self._runner: BatchRunner | None = None

    def describe(self, config: DictConfig) -> Assignment:
        """Return what a job has to do; raises or exits as the job itself would."""
        with _report_errors():
            return _assignment(config)

    def train(self, assignments: Sequence[Assignment]) -> list[TaskFunction]:
        """Train the trials; return task functions that end as :func:`main` would have.

        A trial of several seeds (``sweep.seeds``) is trained in its task function, its seeds at once unless a pruner
        decides after each.
        """
        raise_on_signal()
        from distilbench.trials.batch import BatchRunner

        self._runner = self._runner or BatchRunner(self._max_trials)
        with _report_errors():
            ended = iter(self._runner.train([own.own_job for own in assignments if not own.has_seeds], _objective))
        return [
            partial(_run, partial(own.train, self._runner) if own.has_seeds else partial(own.conclude, next(ended)))
            for own in assignments
        ]


def _mark_batchable(task: TaskFunction) -> TaskFunction:
    """Mark a task function for the fused launcher: :class:`BatchTrainer` can train several of its jobs together."""
    task.batch_trainer = BatchTrainer  # type: ignore[attr-defined]
    return task


@hydra.main(config_path=str(CONF), config_name="config", execution_whitelist=["distilbench.composition.CheckFirst"])
@_mark_batchable
def main(config: DictConfig) -> float | tuple[float, ...]:
    """Train one trial; return ``train.metric`` on the selection split, or the objectives of its sweep."""
    return _run(lambda: _assignment(config).train(), config)


@contextmanager
def _report_errors() -> Iterator[None]:
    """End a single job with a one-line error; a sweep reports the errors of its jobs itself."""
    try:
        yield
    except Exception as error:
        is_swept = SweepJob.from_environment() is not None
        if is_swept or (isinstance(error, TrialFailed) and HydraConfig.get().mode == RunMode.MULTIRUN):
            raise
        with errors_in_one_line():
            raise
    except KeyboardInterrupt:
        _print_resume_command()
        raise


def _assignment(config: DictConfig) -> Assignment:
    sweep_job = SweepJob.from_environment()
    if sweep_job:
        Lease(sweep_job).announce()  # before the imports, which take seconds
    return Assignment(job_of(config, HydraConfig.get().runtime.choices), sweep_job)


def job_of(config: DictConfig, choices: Mapping[str, str]) -> Job:
    """Return the trial of a composed config; ``choices`` are Hydra's choices by group."""
    from distilbench.trials.prepared import Job

    baseline = baseline_config(config)
    settings, usual = settings_from(config), settings_from(baseline)
    theirs = typed_choices(baseline, {**choices, **baseline_choices(config), "experiment": None})
    return Job(
        settings=settings,
        baseline=usual,
        choices=theirs if treatment_of(settings, "") == treatment_of(usual, "") else typed_choices(config, choices),
        baseline_choices=theirs,
        baseline_command=partial(command_for, baseline, choices),
    )


def _objective(trial: Trial) -> float | TrialFailed:
    if trial.result.selection is None or trial.result.error is not None:
        return TrialFailed(f"{trial.name}: {trial.result.status}: {trial.result.error}")
    return trial.result.selection.metric(trial.settings.train.metric)


def _run(act: Callable[[], float | tuple[float, ...]], config: DictConfig) -> float | tuple[float, ...]:
    with _report_errors():
        return act()


def _print_resume_command() -> None:
    """Print the command that resumes an interrupted single trial; a sweep prints its own."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.RUN:
        return
    record = read_record(Path(hydra_config.runtime.output_dir))
    if record and record.is_final:
        print_to_stderr(f"interrupted after the trial's end; it {record.status}")
        return
    given = [o for o in hydra_config.overrides.task if not o.startswith("train.resume=")]
    resuming = [format_override("hydra.run.dir", hydra_config.runtime.output_dir), "train.resume=true"]
    where = shlex.quote(hydra_config.runtime.cwd)  # relative paths refer to it
    print_to_stderr(f"interrupted; to continue: cd {where} && {format_command('train', [*given, *resuming])}")


if __name__ == "__main__":
    run_command(main)
