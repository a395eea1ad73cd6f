"""Rows of a report: the trials of one setting over all seeds, with accuracy, cost and the outcome of the comparison."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from distilbench.identity import TEXT_AMOUNT, has_choices_of, short_hash, value_of
from distilbench.report.names import name_of, varying_values
from distilbench.report.power import Needed
from distilbench.report.statistics import LEVEL, critical_difference
from distilbench.results import BASELINE_ROLE, Predictions, Status, StoredTrial, Verdict


@dataclass(frozen=True)
class Cost:
    """Mean costs over the trials of a setting; NaN if unknown.

    ``seconds`` is training time; for trials that were trained together, it is the estimated time alone
    (``is_estimate``). ``flops`` are exact on any machine. ``memory`` is in bytes.
    """

    seconds: float = math.nan
    cpu_seconds: float = math.nan
    flops: float = math.nan
    memory: float = math.nan
    is_estimate: bool = False


def seconds_of(trial: StoredTrial) -> float:
    """Return a trial's training time if trained alone, otherwise the estimated time alone; NaN if unknown."""
    seconds = trial.train_seconds if trial.alone else trial.solo_seconds_estimate
    return seconds if seconds > 0 else math.nan


def cost_of(trials: Sequence[StoredTrial]) -> Cost:
    """Average the costs of trials."""
    alone = all(trial.alone for trial in trials)
    seconds, _ = average([seconds_of(trial) for trial in trials])
    return Cost(
        seconds,
        cpu_seconds=average([trial.train_cpu_seconds for trial in trials])[0] if alone else math.nan,
        flops=average([trial.train_flops or math.nan for trial in trials])[0],
        memory=average([trial.peak_memory_bytes for trial in trials])[0] if alone else math.nan,
        is_estimate=not alone and not math.isnan(seconds),
    )


def average(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation; NaN without values, None as the deviation of a single value."""
    if len(values) < 2:  # ten thousand such calls take numpy a second
        return (values[0] if values else math.nan), None
    return float(np.mean(values)), float(np.std(values, ddof=1))


def comparable_cost(trials: Sequence[StoredTrial], baselines: Sequence[StoredTrial]) -> tuple[Cost, str]:
    """Return the baseline's cost, as far as that of ``trials`` compares with it, and why times do not, if so.

    Either may be empty.
    """
    base, everyone = cost_of(baselines), (*trials, *baselines)
    if len({trial.measured_on for trial in everyone}) > 1:
        return Cost(flops=base.flops), "measured on different devices, engines, precisions or library versions"
    if not any(math.isnan(seconds_of(trial)) for trial in everyone):
        return base, ""
    is_shared = any(not trial.alone for trial in everyone)
    return base, "trained beside other trials, or partly elsewhere" if is_shared else "none recorded"


def noise_of_time(trials: Sequence[StoredTrial]) -> tuple[float, int]:
    """Estimate the noise of training times from trials that did equal work on the same device.

    Returns the standard deviation in per cent, and the number of times that it is based on; zeros without equal work.

    Equal work is an equal number of FLOPs. The variances of log times are pooled over these groups. Estimated times
    alone count as well, because savings are based on them, too; trials that share a probe's estimate count once.
    """
    equal: dict[tuple[str, float], set[float]] = defaultdict(set)
    for trial in trials:
        if seconds_of(trial) > 0 and trial.train_flops > 0:
            equal[trial.measured_on, trial.train_flops].add(math.log(seconds_of(trial)))
    repeated = [[*logs] for logs in equal.values() if len(logs) > 1]
    number = sum(map(len, repeated))
    squares = sum(len(logs) * float(np.var(logs)) for logs in repeated)
    return 100 * math.expm1(math.sqrt(squares / max(number - len(repeated), 1))), number


@dataclass(frozen=True)
class Difference:
    """Accuracy of a setting minus the baseline's, in percentage points: 95 % interval, p before and after Holm.

    ``loses_at_most`` is the upper bound of the loss, one-sided at 97.5 % for all settings of a report together;
    ``p_loss`` is the p of a loss of the margin or more. ``num_seeds`` counts seeds, or pairs of seeds. ``needed`` is
    what would decide an undecided comparison.
    """

    points: float
    low: float
    high: float
    p: float
    p_holm: float
    loses_at_most: float
    p_loss: float
    p_loss_holm: float
    num_seeds: int
    needed: Needed | None = None


PRAISE = (Verdict.BETTER, Verdict.AHEAD, Verdict.GOOD_ENOUGH)
"""Favourable verdicts; only given to settings that have learned."""


class Untested(StrEnum):
    """Why a row with a result was not tested against the baseline, or has no verdict in spite of a test."""

    PREDICTIONS = "predictions are missing"
    EXAMPLES = "predictions are of other examples"
    SEEDS = "the baseline lacks seeds"
    ROWS = "beyond the rows asked for"
    BASELINE = "the baseline did not finish"
    IDLE = "the baseline has not learned"
    SURVIVORS = "other seeds diverged or were pruned"


@dataclass(frozen=True)
class Row:
    """One setting: ``trials`` are finished, one per seed in seed order; ``other_trials`` are unfinished, or repeats.

    Figures are means over ``trials`` (NaN without any); deviations are None for fewer than two. ``label`` says what
    differs from the baseline; ``rank`` is the position in the report. ``points`` is the accuracy minus the baseline's:
    over common seeds if tested (``difference``), otherwise that of the means. ``verdict`` is None for the
    baseline itself, without a baseline, without a result, and for the reason in ``untested``. ``has_learned``: the
    accuracy is shown to be above that of always predicting the most frequent label; None if not tested. ``examples`` is
    the number of examples reported on, 0 if unknown. ``baseline_cost`` is the baseline's cost as far as it
    compares; ``time_note`` says why times do not. ``confirmation`` is the row of the same setting in a confirmation,
    with fresh seeds. ``slice`` names the part of the examples that the figures refer to; empty for all. ``number`` is
    that of the first trial in its sweep, prefixed with the sweep's name if another row has the same number.
    """

    label: str
    treatment: Mapping[str, object]
    trials: tuple[StoredTrial, ...]
    other_trials: tuple[StoredTrial, ...]
    accuracy: float
    accuracy_deviation: float | None
    loss: float
    cost: Cost
    is_baseline: bool = False
    rank: int = 0
    points: float = math.nan
    difference: Difference | None = None
    baseline_cost: Cost = Cost()
    time_note: str = ""
    verdict: Verdict | None = None
    untested: Untested | None = None
    has_learned: bool | None = None
    examples: int = 0
    confirmation: Row | None = None
    slice: str = ""
    number: str = ""

    @property
    def name(self) -> str:
        """The name in sentences and charts: the number, then the label."""
        return f"{self.number} {self.label}".strip()

    def saving(self, name: str) -> float:
        """Return the per cent saved of the baseline's cost ``name``, negative where more is taken; NaN if unknown."""
        ours, base = getattr(self.cost, name), getattr(self.baseline_cost, name)
        return 100 * (1 - ours / base) if base > 0 else math.nan

    @property
    def is_saving_estimate(self) -> bool:
        """Whether one of the two times of a saving is an estimate."""
        return self.cost.is_estimate or self.baseline_cost.is_estimate

    @property
    def accuracy_half_width(self) -> float:
        """Half the width of the accuracy's 95 % interval, as a share: over examples and, if several, over seeds.

        Over examples, with two right and two wrong ones added (Agresti and Coull 1998, Am. Stat. 52:119): all right in
        a few examples is no certainty.
        """
        share, num = (self.accuracy * self.examples + 2) / (self.examples + 4), self.examples + 4
        over_examples = share * (1 - share) / num if self.examples else 0.0
        over_seeds = (self.accuracy_deviation or 0.0) ** 2 / max(self.num_seeds, 1)
        components = [(over_examples, math.inf), (over_seeds, max(self.num_seeds - 1, 1))]
        return critical_difference(components, 1 - LEVEL)

    @property
    def final_row(self) -> Row:
        """The same setting's row with fresh seeds if these were tested or all diverged, otherwise this row."""
        fresh = self.confirmation
        return fresh if fresh and (fresh.difference or fresh.status == Status.DIVERGED) else self

    @property
    def final_verdict(self) -> Verdict | None:
        """The final verdict: that of fresh seeds, if any."""
        return self.final_row.verdict

    @property
    def num_seeds(self) -> int:
        """The number of seeds that finished."""
        return len(self.trials)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that finished."""
        return tuple(trial.seed for trial in self.trials)

    @property
    def unfinished_trials(self) -> list[StoredTrial]:
        """The trials that did not finish, without those whose seed another one has finished since."""
        others = [trial for trial in self.other_trials if trial.seed not in self.seeds]
        return [trial for trial in others if trial.status is not Status.FINISHED]

    @property
    def predictions(self) -> dict[int, Predictions]:
        """The predictions of its trials, by seed, as far as they are available."""
        return {trial.seed: trial.predictions for trial in self.trials if trial.predictions}

    @property
    def all_trials(self) -> tuple[StoredTrial, ...]:
        """All trials; those that count come first."""
        return (*self.trials, *self.other_trials)

    @property
    def first_trial(self) -> StoredTrial:
        """The trial whose number and run represent the row."""
        return self.all_trials[0]

    @property
    def choices(self) -> Mapping[str, object]:
        """The choices of groups that its trials were typed with; empty if they differ or are not recorded."""
        first = self.first_trial.choices
        return first if all(trial.choices == first for trial in self.all_trials) else {}

    @property
    def is_tagged(self) -> bool:
        """Whether a sweep used it as the baseline."""
        return any(trial.role == BASELINE_ROLE for trial in self.all_trials)

    @property
    def trainable_parameters(self) -> int:
        """The number of trained parameters; 0 if unknown."""
        return max(trial.trainable_parameters for trial in self.all_trials)

    @property
    def status(self) -> str:
        """The common status of all trials, such as ``FINISHED``, or a count of each."""
        counts = Counter(trial.status.value for trial in self.all_trials)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {name}" for name, n in counts.most_common())

    @property
    def started_ms(self) -> int:
        """When its first trial started, in ms since 1970."""
        return min(trial.started_ms for trial in self.all_trials)

    @property
    def accuracy_so_far(self) -> float:
        """The accuracy or, if no trial finished, that at which the last one was stopped; NaN if never evaluated."""
        stopped = [trial.accuracy for trial in self.other_trials if not math.isnan(trial.accuracy)]
        return self.accuracy if self.trials or not stopped else stopped[-1]


def rows_from(trials: Sequence[StoredTrial], names: Mapping[str, str] = {}) -> list[Row]:
    """Return the rows of one protocol's trials, best mean accuracy first, those without a finished trial last.

    ``names`` maps hashes of treatments to labels, which precede what differs.
    """
    by_treatment: dict[str, list[StoredTrial]] = defaultdict(list)
    for trial in trials:
        by_treatment[short_hash(trial.treatment)].append(trial)
    rows = [replace(row_from(members), label=names.get(key, "")) for key, members in by_treatment.items()]
    return sorted(rows, key=lambda row: (not row.trials, -row.accuracy if row.trials else 0.0))


def row_from(members: Sequence[StoredTrial]) -> Row:
    """Aggregate the trials of one treatment; of several finished ones with the same seed, the newest counts."""
    newest: dict[int, StoredTrial] = {}
    for trial in sorted(members, key=lambda t: t.started_ms):
        if trial.status is Status.FINISHED and not math.isnan(trial.accuracy):
            newest[trial.seed] = trial
    trials = tuple(newest[seed] for seed in sorted(newest))
    accuracy, accuracy_deviation = average([trial.accuracy for trial in trials])
    return Row(
        label="",
        treatment=members[0].treatment,
        trials=trials,
        other_trials=tuple(trial for trial in members if newest.get(trial.seed) is not trial),
        accuracy=accuracy,
        accuracy_deviation=accuracy_deviation,
        loss=average([trial.loss for trial in trials])[0],
        cost=cost_of(trials or members),
    )


def find_baseline(rows: Sequence[Row], expected: Mapping[str, object], run_id: str | None = None) -> int | None:
    """Return the index of the baseline's row; None if there is none.

    If ``run_id`` is given, this is its row. Otherwise it is the row that a sweep tagged as baseline; if there are
    several (a sweep over the amount of text has one per amount), the one with the most FLOPs, which left out least.
    Otherwise it is the row whose choices agree with the ``expected`` treatment; of several, the one that agrees in most
    settings, then the one trained first.
    """
    if run_id is not None:
        return next((i for i, row in enumerate(rows) if any(t.run_id == run_id for t in row.all_trials)), None)

    def rank(i: int) -> tuple[int, int]:
        return -sum(rows[i].treatment.get(key) == value for key, value in expected.items()), rows[i].started_ms

    if tagged := [i for i, row in enumerate(rows) if row.is_tagged]:
        return min(tagged, key=lambda i: (not rows[i].trials, -max(0.0, rows[i].cost.flops), rank(i)))  # 0 for NaN
    alike = [
        i
        for i, row in enumerate(rows)
        if has_choices_of(row.treatment, expected)
        and all(value_of(row.treatment, key) == value_of(expected, key) for key in (TEXT_AMOUNT, "data.split_seed"))
    ]
    return min(alike, key=rank, default=None)


def label_rows(rows: Sequence[Row], baseline: int | None) -> list[Row]:
    """Label each row with its number and what differs from the baseline, and baselines with all that varies.

    A sweep names its runs in the same way.
    """
    choices = [{k: v for k, v in row.choices.items() if k != "experiment" or not row.label} for row in rows]
    values = varying_values([row.treatment for row in rows], choices)
    numbers = Counter(row.first_trial.number for row in rows)
    tagged = baseline is not None and rows[baseline].is_tagged
    reference = values[baseline] if baseline is not None else {}
    labelled = []
    for i, row in enumerate(rows):
        is_baseline = i == baseline or (tagged and row.is_tagged)  # a sweep over amounts has one per amount
        title = " ".join(dict.fromkeys(filter(None, ("baseline" if is_baseline else "", row.label))))
        name = name_of(values[i], {} if is_baseline else reference, title) or "all settings"
        number = row.first_trial.number if row.first_trial.number.isdigit() else ""
        number = f"{row.first_trial.sweep}/{number}" if number and numbers[number] > 1 else number
        labelled.append(replace(row, label=name, is_baseline=i == baseline, rank=i, number=number))
    return labelled
