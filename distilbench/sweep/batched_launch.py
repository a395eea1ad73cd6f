"""Jobs described, trained together, and replayed one by one, each through Hydra's own ``run_job``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
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

    def train(self, jobs: Sequence[Any]) -> Sequence[TaskFunction]:
        """Train what :meth:`describe` returned; return a task function for each, which ends as the job did, at once."""


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
    tasks: dict[int, TaskFunction] = {i: partial(_raise, one._return_value) for i, one in enumerate(described)
             if one.status is not JobStatus.COMPLETED}  # fmt: skip
    if ready := [index for index in range(len(jobs)) if index not in tasks]:
        shared = set.intersection(*(set(jobs[index].hydra.job.env_set.items()) for index in ready))
        with env_override({str(name): str(value) for name, value in shared}):  # they train in one process
            tasks |= zip(ready, batches.train([described[index].return_value for index in ready]), strict=True)
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
