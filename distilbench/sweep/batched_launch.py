"""Jobs described, trained together, and replayed one by one, each through Hydra's own ``run_job``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NoReturn, Protocol

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    env_override,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)


class Batches(Protocol):
    """What trains several jobs at once."""

    def describe(self, config: DictConfig) -> Any:
        """Say what a job is to do, called as the job would be; an exception becomes the job's own, the others go on."""

    def train(self, jobs: Sequence[Any]) -> Iterator[Mapping[int, TaskFunction]]:
        """Train what :meth:`describe` returned; yield, whenever some are done, a task function by the job's index.

        It returns the job's result, or raises its error, at once.
        """


def launch(
    batches: Batches, config: DictConfig, context: HydraContext, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Train jobs numbered from ``first`` on; returns keep their order."""
    setup_globals()
    _log_as_sweep(config, context)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    log.info("Launching %d jobs together", len(job_overrides))
    jobs = [_compose(config, context, overrides, first + i) for i, overrides in enumerate(job_overrides)]
    run = partial(run_job, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir")
    unheard = HydraContext(context.config_loader, Callbacks(), context.execution_whitelist)
    described = [run(batches.describe, job, hydra_context=unheard, configure_logging=False) for job in jobs]
    returns: dict[int, JobReturn] = {}
    for tasks, said in _trained(batches, jobs, described):
        for index, task in tasks.items():
            returns[index] = run(partial(_replay, task, said), jobs[index], hydra_context=context)
            _log_as_sweep(config, context)
    return [returns[index] for index in range(len(jobs))]


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


def _trained(
    batches: Batches, configs: Sequence[DictConfig], described: Sequence[JobReturn]
) -> Iterator[tuple[dict[int, TaskFunction], Sequence[logging.LogRecord]]]:
    """Yield the jobs that were refused before training, then the trained ones, with what was logged meanwhile."""
    ready = [index for index, one in enumerate(described) if one.status is JobStatus.COMPLETED]
    yield {i: partial(_raise, one._return_value) for i, one in enumerate(described) if i not in ready}, []
    training = batches.train([described[index].return_value for index in ready])
    environments = [set(configs[i].hydra.job.env_set.items()) for i in ready]
    shared = {str(name): str(value) for name, value in set.intersection(*environments)} if ready else {}
    root = logging.getLogger()
    while True:
        kept = BufferingHandler(capacity=2**31)  # none of the jobs has its log file yet
        root.addHandler(kept)
        try:
            with env_override(shared):  # they train in one process
                tasks = next(training, None)
        finally:
            root.removeHandler(kept)
        if tasks is None:
            return
        yield {ready[index]: task for index, task in tasks.items()}, list(kept.buffer)


def _replay(task: TaskFunction, said: Sequence[logging.LogRecord], config: DictConfig) -> Any:
    """Run ``task`` after writing what was ``said`` to the files of the job's log; the console has shown it already."""
    for handler in logging.getLogger().handlers:
        for record in said if isinstance(handler, logging.FileHandler) else ():
            if record.levelno >= handler.level:
                handler.handle(record)
    return task(config)


def _raise(error: Exception, config: DictConfig) -> NoReturn:
    raise error
