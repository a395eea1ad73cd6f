"""The Hydra entrypoint: compose, check, train, compare, return the objective.

Exit status: 0 finished, 1 the trial failed, 2 a setting to mend, 130 and 143 interrupted by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from distilbench.composition import COMMAND, baseline_config, command_for
from distilbench.settings import CONF, SettingsError, register_schema, settings_from
from distilbench.sweeps import SweepJob, run_in_sweep

register_schema()


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: ends a trial as cleanly as Ctrl-C does."""


class TrialFailed(RuntimeError):
    """A trial of a multirun ended without a result; the message is the trial's own error."""


@hydra.main(config_path=str(CONF), config_name="config", execution_whitelist=["distilbench.composition.CheckFirst"])
def main(config: DictConfig) -> float | tuple[float, ...]:
    """Train one trial; returns its objective: ``train.metric`` on the selection split, or those that its sweep has."""
    try:
        return _run(config)
    except SettingsError as error:
        if SweepJob.from_environment():
            raise  # the sweep ends in one line of its own
        _fail(str(error), status=2)
    except TrialFailed as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        _say_how_to_continue()
        raise


def _run(config: DictConfig) -> float | tuple[float, ...]:
    place = SweepJob.from_environment()
    if place:
        place.announce()
    settings = settings_from(config)
    baseline = baseline_config(config)
    choices = HydraConfig.get().runtime.choices
    from distilbench.trials import Job, run_and_compare

    job = Job(
        settings=settings,
        baseline=settings_from(baseline),
        baseline_command=command_for(baseline, choices),
    )
    if place:
        return run_in_sweep(job, place)
    outcome = run_and_compare(job)
    if outcome.result.selection is None or outcome.result.error is not None:
        raise TrialFailed(f"{outcome.name}: {outcome.result.status}: {outcome.result.error}")
    return outcome.result.selection.metric(settings.train.metric)


def _say_how_to_continue() -> None:
    """One line with the command that takes up an interrupted trial; a sweep's is said by whoever runs the sweep."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.RUN:
        given = [o for o in hydra_config.overrides.task if not o.startswith("train.resume=")]
        place = [f"hydra.run.dir={hydra_config.runtime.output_dir}", "train.resume=true"]
        print(
            f"distilbench: interrupted; to continue: {shlex.join([*COMMAND.split(), *given, *place])}", file=sys.stderr
        )


def _fail(line: str, status: int) -> NoReturn:
    print(f"distilbench: {line}", file=sys.stderr)
    sys.exit(status)


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise Terminated


def cli(entrypoint: Callable[[], object] = main) -> None:
    """Run an entrypoint as the command line does, with exit statuses for interruption."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        entrypoint()
    except Terminated:
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli()
