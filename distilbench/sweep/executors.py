"""Hand trials to Hydra's launchers: one after another, in batches, or each to the next free worker."""

from __future__ import annotations

import contextvars
import logging
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus, configure_log, env_override, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from distilbench.settings import root
from distilbench.sweep.job import JOB, JOB_VARIABLE, SweepJob

log = logging.getLogger(__name__)

JobError = BaseException | None
"""The exception that ended a job; None if it returned."""

Launch = Callable[[Sequence[SweepJob]], Sequence[JobError]]
"""Runs jobs and returns how each ended, in the order of the jobs."""


class Executor:
    """Launches up to ``at_once`` trials at a time, None for any number.

    A batch is launched in one call, which blocks until all of its jobs have ended; with ``threads``, each trial by
    itself, in one of them. ``stop`` cancels jobs that run in other processes; those in this one end with the sweep's
    own exception.
    """

    def __init__(self, launch: Launch, at_once: int | None, stop: Callable[[], object] = lambda: None,
                 threads: ThreadPoolExecutor | None = None) -> None:  # fmt: skip
        self._launch, self.at_once, self.stop, self.threads = launch, at_once, stop, threads

    def start(self, jobs: Sequence[SweepJob]) -> list[Future[JobError]]:
        """Launch trials; a thread gets a copy of the current context variables."""
        if self.threads:
            return [self.threads.submit(contextvars.copy_context().run, self._launch_one, job) for job in jobs]
        futures: list[Future[JobError]] = [Future() for _ in jobs]
        for future, end in zip(futures, self._launch_all(jobs), strict=True):
            future.set_result(end)
        return futures

    def _launch_one(self, job: SweepJob) -> JobError:
        return self._launch_all([job])[0]

    def _launch_all(self, jobs: Sequence[SweepJob]) -> Sequence[JobError]:
        try:
            return self._launch(jobs)
        except Exception as error:  # boundary: a launcher that raises fails its trials, not the sweep
            return [error] * len(jobs)


def executor_for(launcher: Launcher, config: DictConfig, n_jobs: int | None) -> Executor:
    """Return the executor for a launcher: up to ``n_jobs`` trials at once, but one with Hydra's basic launcher."""
    launch = partial(_launch_through, launcher)
    if type(launcher) is BasicLauncher:  # the fused launcher is one, too
        if n_jobs and n_jobs > 1:
            log.warning("hydra.sweeper.n_jobs=%d: Hydra's basic launcher trains one trial at a time all the same; "
                        "add hydra/launcher=fused or joblib for several", n_jobs)  # fmt: skip
        return Executor(launch, 1)
    if config._target_.endswith(".JoblibLauncher") and config.backend in (None, "loky"):
        from joblib import effective_n_jobs

        workers = effective_n_jobs(config.n_jobs)
        if workers == 1:  # joblib then uses the calling thread, which must be the main one for signals
            return Executor(launch, 1)
        threads = ThreadPoolExecutor(at_once := min(n_jobs or workers, workers))
        return Executor(launch, at_once, partial(_kill_workers, threads), threads)
    if config._target_.endswith(".RayLauncher"):
        on_ray = partial(_launch_on_ray, launcher, launcher.task_function)  # type: ignore[attr-defined]
        from ray import shutdown  # which kills this sweep's jobs, before their trials are closed

        return Executor(on_ray, n_jobs, shutdown)
    if config._target_.startswith("hydra_plugins.hydra_submitit_launcher."):
        submitted: list[Any] = []
        return Executor(partial(_launch_by_submitit, launcher, submitted), n_jobs,
                        lambda: [job.cancel(check=False) for job in submitted])  # fmt: skip
    return Executor(launch, n_jobs)


def _kill_workers(threads: ThreadPoolExecutor) -> None:
    """Kill joblib's workers, which a signal to the sweep's process alone does not reach."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    threads.shutdown(wait=True, cancel_futures=True)


def _launch_by_submitit(launcher: Launcher, submitted: list[Any], jobs: Sequence[SweepJob]) -> list[JobError]:
    """Launch jobs and keep their submitit handles in ``submitted``, since Hydra's launcher does not expose them.

    That launcher raises the error of the first job that was killed; each is asked for its own end then.
    """
    from submitit import AutoExecutor

    submit: Any = AutoExecutor.map_array
    submitted.clear()

    def map_array(*given: Any) -> list[Any]:
        submitted[:] = submit(*given)
        return list(submitted)

    AutoExecutor.map_array = map_array  # type: ignore[method-assign, assignment]
    try:
        return _launch_through(launcher, jobs)
    except Exception:
        if len(submitted) != len(jobs):  # none was submitted
            raise
        return [_error_of(job) for job in submitted]
    finally:
        AutoExecutor.map_array = submit  # type: ignore[method-assign]


def _error_of(job: Any) -> JobError:
    """Wait for a submitit job and return its error, or None."""
    try:
        end: JobReturn = job.results()[0]
    except Exception as error:  # the job's boundary
        return error
    return None if end.status is JobStatus.COMPLETED else end._return_value


def _launch_on_ray(launcher: Any, task: TaskFunction, jobs: Sequence[SweepJob]) -> list[JobError]:
    """Launch jobs with the environment variables for the study and MLflow: Ray's processes have the cluster's.

    The variables are sent with the function, which Ray keeps in memory; a setting would write passwords to disk.
    """
    from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

    before = signal.getsignal(signal.SIGTERM)
    start_ray(launcher.ray_cfg.init)
    if signal.getsignal(signal.SIGTERM) != before:  # Ray's own handler makes the process end by SIGABRT
        signal.signal(signal.SIGTERM, before)
    named = re.findall(r"\$\{oc\.env:(\w+)", " ".join(text for job in jobs for text in (job.storage, *job.overrides)))
    carried = {name: value for name, value in os.environ.items() if name in named or name.startswith("MLFLOW_")}
    launcher.task_function = partial(_run_with_variables, carried, task)
    return _launch_through(launcher, jobs)


def _run_with_variables(variables: dict[str, str], task: TaskFunction, config: DictConfig) -> Any:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:  # the cluster's: another store, perhaps
        del os.environ[name]
    os.environ.update(variables)
    return task(config)


def _launch_through(launcher: Launcher, jobs: Sequence[SweepJob]) -> list[JobError]:
    """Launch jobs as Hydra's sweepers do, each with the overrides that set its directory and its ``job.json``."""
    first = int(jobs[0].directory.name)
    returns: Sequence[Any] = launcher.launch([_job_overrides(job) for job in jobs], first)
    return [None if r.status is JobStatus.COMPLETED else r._return_value for r in returns]


def _job_overrides(job: SweepJob) -> list[str]:
    """Return a job's overrides, with absolute paths: Ray starts it in another directory and environment."""
    paths = {
        "hydra.sweep.dir": job.directory.parents[len(Path(job.trial).parts) - 1],
        f"++hydra.job.env_set.{JOB_VARIABLE}": job.directory / JOB,
        "++hydra.job.env_set.DISTILBENCH_ROOT": root().absolute(),
    }
    quoted = {key: QuotedString(text=str(path), quote=Quote.single).with_quotes() for key, path in paths.items()}
    return [*job.overrides, f"hydra.sweep.subdir={job.trial}", *(f"{key}={path}" for key, path in quoted.items())]


@contextmanager
def silence_launchers() -> Iterator[None]:
    """Silence Optuna's and the launchers' messages about each step, since the sweep reports its own progress.

    ``hydra.verbose`` keeps them. Afterwards they speak as before: a notebook goes on after its sweep.
    """
    levels = {"optuna": logging.ERROR, "hydra_plugins": logging.WARNING,
              "hydra._internal.core_plugins": logging.WARNING}  # fmt: skip
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        if not logging.getLogger(name).isEnabledFor(logging.DEBUG):
            logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage")  # Optuna sends them only in Study.optimize
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def launch_batch(
    trainer: Any, config: DictConfig, context: HydraContext, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Train jobs together, numbered from ``first``; the returns keep their order.

    ``trainer.describe(config)`` returns what ``trainer.train`` needs of a job; it is called in the job's context, and
    an exception fails that job alone. ``train`` returns for each job a task function that at once ends as the job did.
    """
    setup_globals()
    _log_as_sweep(config, context)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    log.info("Launching %d jobs together", len(job_overrides))
    jobs = [_compose(config, context, overrides, first + i) for i, overrides in enumerate(job_overrides)]
    run = partial(run_job, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir")
    unheard = HydraContext(context.config_loader, Callbacks(), context.execution_whitelist)
    described = [run(trainer.describe, job, hydra_context=unheard, configure_logging=False) for job in jobs]
    refused = {i: one._return_value for i, one in enumerate(described) if one.status is not JobStatus.COMPLETED}
    tasks: dict[int, TaskFunction] = {index: partial(_raise, error) for index, error in refused.items()}
    if ready := [index for index in range(len(jobs)) if index not in refused]:
        shared = set.intersection(*(set(jobs[index].hydra.job.env_set.items()) for index in ready))
        with env_override({str(name): str(value) for name, value in shared}):  # they train in one process
            tasks |= zip(ready, trainer.train([described[index].return_value for index in ready]), strict=True)
    returns = []
    for index, job in enumerate(jobs):
        returns.append(run(tasks[index], job, hydra_context=context))
        _log_as_sweep(config, context)
    return returns


def _log_as_sweep(config: DictConfig, context: HydraContext) -> None:
    configure_log(config.hydra.hydra_logging, config.hydra.verbose, execution_whitelist=context.execution_whitelist)


def _compose(config: DictConfig, context: HydraContext, overrides: Sequence[str], number: int) -> DictConfig:
    """Return the job's config, as Hydra's basic launcher makes it."""
    told = filter_overrides([override.lstrip("+") for override in overrides])
    log.info("\t#%d : %s", number, " ".join(told))
    job = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.id = str(number)
        job.hydra.job.num = number
    return job


def _raise(error: Exception, config: DictConfig) -> NoReturn:
    raise error
