"""What a setting takes, what of that it saves beside the baseline, and how far time can be trusted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distilbench.results import StoredTrial


@dataclass(frozen=True)
class Cost:
    """Means over the trials of a setting, NaN where unknown.

    ``seconds`` are of training; trials that shared the device have none of their own, but what one would take alone
    where that ``is_estimate``. ``flops`` are exact, whatever the machine. ``memory`` is in bytes.
    """

    seconds: float
    seconds_deviation: float | None
    cpu_seconds: float
    flops: float
    memory: float
    is_estimate: bool


@dataclass(frozen=True)
class Saving:
    """Per cent of the baseline's cost that a setting saves (negative: it takes more), None where that can't be told.

    ``time_note`` says why seconds can't.
    """

    seconds: float | None = None
    cpu_seconds: float | None = None
    flops: float | None = None
    memory: float | None = None
    time_note: str = ""


NO_SAVING = Saving()


def seconds_of(trial: StoredTrial) -> float:
    """Return the seconds that a trial took alone or, where it shared the device, would have taken; NaN if unknown."""
    seconds = trial.train_seconds if trial.alone else trial.solo_seconds_estimate
    return seconds if seconds > 0 else math.nan


def cost_of(trials: Sequence[StoredTrial]) -> Cost:
    """Average what trials took."""
    alone = all(trial.alone for trial in trials)
    seconds, deviation = average([seconds_of(trial) for trial in trials])
    return Cost(
        seconds,
        deviation if alone else None,
        cpu_seconds=average([trial.train_cpu_seconds for trial in trials])[0] if alone else math.nan,
        flops=average([trial.train_flops or math.nan for trial in trials])[0],
        memory=average([trial.peak_memory_bytes for trial in trials])[0] if alone else math.nan,
        is_estimate=not alone and not math.isnan(seconds),
    )


def average(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation: NaN without a value, no deviation of a single one."""
    if len(values) < 2:  # numpy takes a second for ten thousand of these
        return (values[0] if values else math.nan), None
    return float(np.mean(values)), float(np.std(values, ddof=1))


def saving_of(trials: Sequence[StoredTrial], baselines: Sequence[StoredTrial]) -> Saving:
    """Compare what trials take with what the baseline's take; either may be empty."""
    ours, base = cost_of(trials), cost_of(baselines)
    flops = _saved(ours.flops, base.flops)
    everyone = (*trials, *baselines)
    if len({trial.measured_on for trial in everyone}) > 1:
        return Saving(flops=flops, time_note="measured on different devices, engines, precisions or library versions")
    unknown = any(math.isnan(seconds_of(trial)) for trial in everyone)
    shared = "trained beside other trials" if any(not trial.alone for trial in everyone) else "none recorded"
    return Saving(
        seconds=_saved(ours.seconds, base.seconds),
        cpu_seconds=_saved(ours.cpu_seconds, base.cpu_seconds),
        flops=flops,
        memory=_saved(ours.memory, base.memory),
        time_note=shared if unknown else "",
    )


def _saved(ours: float, base: float) -> float | None:
    return 100 * (1 - ours / base) if ours >= 0 and base > 0 else None


def noise_of_time(trials: Sequence[StoredTrial]) -> tuple[float, int]:
    """Estimate the noise of time from trials that did equal work on the same device.

    Returns its standard deviation in per cent, and from how many times; zeros where none did equal work.

    Equal work is an equal count of FLOPs. The variances of logarithms are pooled over those groups. An estimate of what
    a trial would take alone counts too, once for all that have it from the same probe: savings are told beside it.
    """
    equal: dict[tuple[str, float], set[float]] = defaultdict(set)
    for trial in trials:
        if seconds_of(trial) > 0 and trial.train_flops > 0:
            equal[trial.measured_on, trial.train_flops].add(math.log(seconds_of(trial)))
    repeated = [logs for logs in equal.values() if len(logs) > 1]
    if not repeated:
        return 0.0, 0
    freedom = sum(len(logs) - 1 for logs in repeated)
    squares = sum((value - sum(logs) / len(logs)) ** 2 for logs in repeated for value in logs)
    return 100 * math.expm1(math.sqrt(squares / freedom)), sum(map(len, repeated))
