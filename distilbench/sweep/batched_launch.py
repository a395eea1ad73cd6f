"""Jobs composed, trained together, and replayed one by one through Hydra's own ``run_job``."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, env_override, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

log = logging.getLogger(__name__)


class Batches(Protocol):
    """What trains several jobs at once; lives as long as the sweep."""

    def describe(self, config: DictConfig) -> Any:
        """Say what a job is to do. Called as the job would be: with its HydraConfig, output directory and environment.

        An exception becomes the job's own; the others go on.
        """

    def train(self, jobs: Sequence[Any]) -> Iterator[Mapping[int, TaskFunction]]:
        """Train what :meth:`describe` returned, as it suits.

        Yields, whenever some are done, a task function by the job's index: it returns the job's result, or raises its
        error, at once.
        """


TakesBatches = Callable[[int], Batches]
"""Makes a :class:`Batches`, given how many jobs may be trained at once."""


def launch(
    batches: Batches, config: DictConfig, context: HydraContext, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Train jobs numbered from ``first`` on; returns keep their order."""
    setup_globals()
    _log_as_sweep(config, context)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    log.info("Launching %d jobs together", len(job_overrides))
    jobs = [_compose(config, context, overrides, first + i) for i, overrides in enumerate(job_overrides)]
    returns: dict[int, JobReturn] = {}
    for tasks in _trained(batches, jobs):
        for index, task in tasks.items():
            returns[index] = run_job(
                hydra_context=context,
                task_function=task,
                config=jobs[index],
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
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


def _trained(batches: Batches, configs: Sequence[DictConfig]) -> Iterator[dict[int, TaskFunction]]:
    """Yield the jobs that failed before training, then the trained ones; each replays what was logged meanwhile."""
    described: dict[int, Any] = {}
    failed: dict[int, TaskFunction] = {}
    for index, config in enumerate(configs):
        try:
            with _as_in_job(config) as task_config:
                described[index] = batches.describe(task_config)
        except Exception as error:  # the job's boundary: run_job hands it to the sweeper
            failed[index] = _raises(error)
    yield failed
    places = list(described)
    training = batches.train(list(described.values()))
    environment = _shared_environment([configs[index] for index in places])
    while True:
        with env_override(environment), _kept_records() as records:
            tasks = next(training, None)
        if tasks is None:
            return
        yield {places[index]: _replay(task, records) for index, task in tasks.items()}


@contextmanager
def _as_in_job(config: DictConfig) -> Iterator[DictConfig]:
    """Do what ``run_job`` does around a task, but directory, logging and callbacks; yield the task's config."""
    hydra_config = HydraConfig.instance()
    before = hydra_config.cfg
    hydra_config.set_config(config)
    try:
        parts = (str(OmegaConf.select(config, f"hydra.sweep.{key}")) for key in ("dir", "subdir"))
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = os.path.abspath(os.path.join(*parts))
        hydra_config.set_config(config)
        task_config = copy.deepcopy(config)
        with read_write(task_config), open_dict(task_config):
            del task_config["hydra"]
        with env_override(_environment(config)):
            yield task_config
    finally:
        hydra_config.cfg = before


def _environment(config: DictConfig) -> dict[str, str]:
    values = OmegaConf.to_container(config.hydra.job.env_set, resolve=True)
    assert isinstance(values, dict)
    return {str(name): str(value) for name, value in values.items()}


def _shared_environment(configs: Sequence[DictConfig]) -> dict[str, str]:
    """Return the variables of ``hydra.job.env_set`` on which all jobs agree: they train in one process."""
    return dict(set.intersection(*(set(_environment(config).items()) for config in configs))) if configs else {}


class _Keeper(logging.Handler):
    """Keeps what is logged while jobs train together, when none of them has its log file yet."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _kept_records() -> Iterator[list[logging.LogRecord]]:
    keeper = _Keeper()
    root = logging.getLogger()
    root.addHandler(keeper)
    try:
        yield keeper.records
    finally:
        root.removeHandler(keeper)


def _replay(task: TaskFunction, records: Sequence[logging.LogRecord]) -> TaskFunction:
    """``task``, after writing ``records`` to the files of the job's log; the console has shown them already."""

    def run(config: DictConfig) -> Any:
        files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
        for handler in files:
            for record in records:
                if record.levelno >= handler.level:
                    handler.handle(record)
        return task(config)

    return run


def _raises(error: Exception) -> TaskFunction:
    def run(config: DictConfig) -> Any:
        raise error

    return run
