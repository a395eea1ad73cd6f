"""The training command: compose, check, train, compare, return the objective.

Exit status: 0 finished, 1 the trial failed, 2 a setting is invalid, 128 + n interrupted by signal n (130 Ctrl-C), after
printing the command that continues.
"""

from __future__ import annotations

from distilbench.cli import exit_immediately

if __name__ == "__main__":
    exit_immediately()  # before the imports, which take half a second

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
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
from distilbench.settings import CONF, SettingsError, register_schema, settings_from
from distilbench.sweep.job import Lease, SweepJob
from distilbench.sweep.trial import SeededTrial, context_of, run_in_sweep

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
    def trains_by_itself(self) -> bool:
        """Whether the trial must be trained on its own, because a pruner decides after each of its seeds."""
        return bool(self.sweep_job and self.sweep_job.prunes and self.job.settings.sweep.seeds)

    def train(self) -> float | tuple[float, ...]:
        """Train the trial and return its objectives."""
        raise_on_signal()
        if self.sweep_job:
            return run_in_sweep(self.job, self.sweep_job)
        from distilbench.trials.batch import run_and_compare

        objective = _objective(run_and_compare(self.job))
        if isinstance(objective, TrialFailed):
            raise objective
        return objective


class BatchTrainer:
    """Trains the jobs of ``hydra/launcher=fused`` together: describes each, trains all, then concludes each."""

    def __init__(self, max_trials: int) -> None:
        self._max_trials = max_trials
        self._runner: BatchRunner | None = None

    def describe(self, config: DictConfig) -> Assignment:
        """Return what a job has to do; raises or exits as the job itself would."""
        with _report_errors():
            return _assignment(config)

    def train(self, assignments: Sequence[Assignment]) -> list[TaskFunction]:
        """Train the trials; return task functions that end as :func:`main` would have.

        The seeds of a trial (``sweep.seeds``) are trained together, too, unless a pruner decides after each seed; such
        a trial is trained on its own, in its task function.
        """
        raise_on_signal()
        from distilbench.trials.batch import BatchRunner

        self._runner = self._runner or BatchRunner(self._max_trials)
        with _report_errors(), ExitStack() as closing:
            parts = [_parts_of(own, self._runner, closing) for own in assignments]
            ended = iter(self._runner.train([job for jobs, _ in parts for job in jobs], _objective))
        return [
            partial(_conclude, own, seeds, list(islice(ended, len(jobs))))
            for own, (jobs, seeds) in zip(assignments, parts, strict=True)
        ]


def _parts_of(
    own: Assignment, runner: BatchRunner, closing: ExitStack
) -> tuple[Sequence[Job], SeededTrial | SettingsError | None]:
    """Return the jobs to train for an assignment: its trial, or each of its seeds that has not finished yet.

    The second value is the object that manages the seeds, if any, or the error that keeps them from starting.
    """
    job, sweep_job = own.job, own.sweep_job
    if own.trains_by_itself:
        return [], None
    if not sweep_job:
        return [job], None
    lease = Lease(sweep_job)
    if not job.settings.sweep.seeds:
        return [replace(job, context=context_of(sweep_job, job.settings, lease))], None
    try:
        seeds = SeededTrial(job, sweep_job, lease, runner)
    except SettingsError as error:  # concerns only this trial: the others are trained
        return [], error
    closing.enter_context(seeds.closing())
    return seeds.remaining, seeds


@hydra.main(config_path=str(CONF), config_name="config", execution_whitelist=["distilbench.composition.CheckFirst"])
def main(config: DictConfig) -> float | tuple[float, ...]:
    """Train one trial; return ``train.metric`` on the selection split, or the objectives of its sweep."""
    with _report_errors():
        return _assignment(config).train()


main.__wrapped__.batch_trainer = BatchTrainer  # for the fused launcher


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
    if sweep_job := SweepJob.from_environment():
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


def _conclude(
    assignment: Assignment,
    seeds: SeededTrial | SettingsError | None,
    ended: Sequence[float | Exception],
    config: DictConfig,
) -> float | tuple[float, ...]:
    """Return a trial's objective or raise its error; a trial that trains on its own trains here."""
    with _report_errors():
        if assignment.trains_by_itself:
            return assignment.train()
        if isinstance(seeds, SettingsError):
            raise seeds
        objectives = []
        for objective in ended:
            if not isinstance(objective, Exception):
                objectives.append(objective)
            elif not (assignment.sweep_job and isinstance(objective, TrialFailed)):  # a sweep reads trial.json
                raise objective
        if seeds:
            seeds.finish()
        return assignment.sweep_job.final_objectives() if assignment.sweep_job else objectives[0]


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
