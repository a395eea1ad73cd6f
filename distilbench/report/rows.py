"""Many trials as rows: one per setting with its seeds together, each against the baseline, best first."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from distilbench.identity import digest
from distilbench.report.statistics import compare_over_seeds, holm, mean_and_deviation, verdict
from distilbench.report.trial import time_saved
from distilbench.results import BASELINE_ROLE, Predictions, Status, StoredTrial
from distilbench.settings import SettingsError

ReadPredictions = Callable[[StoredTrial], Predictions | None]
"""Fetches what a trial said of every example; asked only for the trials of rows that are tested."""


@dataclass(frozen=True)
class Difference:
    """A setting minus the baseline in points of accuracy: 95 % interval, p as tested and after Holm's correction.

    ``n`` counts seeds, pairs of them where ``paired``.
    """

    points: float
    low: float
    high: float
    p: float
    p_holm: float
    n: int
    paired: bool


@dataclass(frozen=True)
class Row:
    """One setting. ``trials`` finished, one per seed in the order of seeds; ``others`` did not, or repeat a seed.

    Figures are means over ``trials`` (NaN without any), deviations are None for fewer than two. ``label`` says what
    differs from the baseline. ``points`` is its mean accuracy minus the baseline's, tested or not; ``difference`` is of
    the seeds that both have, where it was tested. ``time_gain_percent`` is the share of the baseline's training time
    saved, None for the reason in ``time_note``. ``verdict`` is what may be claimed.
    """

    label: str
    treatment: Mapping[str, object]
    trials: tuple[StoredTrial, ...]
    others: tuple[StoredTrial, ...]
    accuracy: float
    accuracy_deviation: float | None
    loss: float
    seconds: float
    seconds_deviation: float | None
    is_baseline: bool = False
    is_winner: bool = False
    points: float | None = None
    difference: Difference | None = None
    time_gain_percent: float | None = None
    time_note: str = ""
    verdict: str = ""

    @property
    def n(self) -> int:
        """How many seeds finished."""
        return len(self.trials)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that finished."""
        return tuple(trial.seed for trial in self.trials)

    @property
    def trainable_parameters(self) -> int:
        """Parameters that were trained; 0 where unknown."""
        return max((trial.trainable_parameters for trial in (*self.trials, *self.others)), default=0)

    @property
    def status(self) -> str:
        """``FINISHED``, or how many trials ended how."""
        counts = Counter(trial.status.value for trial in (*self.trials, *self.others))
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {name}" for name, n in counts.most_common())

    @property
    def url(self) -> str:
        """Opens the run of the first trial."""
        return next((trial.url for trial in (*self.trials, *self.others)), "")


def group(trials: Sequence[StoredTrial], names: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of one protocol's trials, best first by mean accuracy, those without a finished trial last.

    ``names`` maps digests of treatments to labels that go before what differs.
    """
    by_treatment: dict[str, list[StoredTrial]] = defaultdict(list)
    for trial in trials:
        by_treatment[digest(trial.treatment)].append(trial)
    rows = [_row(members) for members in by_treatment.values()]
    named = {key: name for key, name in (names or {}).items() if key in by_treatment}
    rows = [replace(row, label=named[digest(row.treatment)]) if digest(row.treatment) in named else row for row in rows]
    return sorted(rows, key=lambda row: (not row.trials, -row.accuracy if row.trials else 0.0))


def _row(members: Sequence[StoredTrial]) -> Row:
    """Aggregate the trials of one treatment: of several finished ones of a seed the newest counts."""
    newest: dict[int, StoredTrial] = {}
    for trial in sorted(members, key=lambda t: t.started_ms):
        if trial.status is Status.FINISHED and not math.isnan(trial.accuracy):
            newest[trial.seed] = trial
    trials = tuple(newest[seed] for seed in sorted(newest))
    chosen = {id(trial) for trial in trials}
    others = tuple(trial for trial in members if id(trial) not in chosen)
    accuracy, accuracy_deviation = _mean([trial.accuracy for trial in trials])
    seconds, seconds_deviation = _mean([trial.train_seconds for trial in trials])
    return Row(
        label="",
        treatment=members[0].treatment,
        trials=trials,
        others=others,
        accuracy=accuracy,
        accuracy_deviation=accuracy_deviation,
        loss=_mean([trial.loss for trial in trials])[0],
        seconds=seconds,
        seconds_deviation=seconds_deviation,
    )


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    if len(values) < 2:  # numpy takes a second for ten thousand of these
        return (values[0] if values else math.nan), None
    return mean_and_deviation(values)


def find_baseline(rows: Sequence[Row], usual: Mapping[str, object], run_id: str | None = None) -> int | None:
    """The position of the baseline's row, None where there is none.

    It is the row of ``run_id`` where that is given, else the one that a sweep tagged as its baseline, else the one
    whose treatment agrees with ``usual`` (the report's choices); of several, the one that agrees in most, then the
    first trained. Raises :class:`SettingsError` where trials of several settings are tagged.
    """
    if run_id is not None:
        return next((i for i, row in enumerate(rows) if run_id in _run_ids(row)), None)
    tagged = [i for i, row in enumerate(rows) if any(t.role == BASELINE_ROLE for t in (*row.trials, *row.others))]
    if len(tagged) > 1:
        raise SettingsError(
            f"baseline must be one setting, got {len(tagged)} that sweeps took for theirs; name one: "
            f"baseline={(*rows[tagged[0]].trials, *rows[tagged[0]].others)[0].run_id}"
        )
    if tagged:
        return tagged[0]
    fitting = [i for i, row in enumerate(rows) if _same_choices(row.treatment, usual)]
    return min(fitting, key=lambda i: (-_agreement(rows[i].treatment, usual), _started(rows[i])), default=None)


def _run_ids(row: Row) -> set[str]:
    return {trial.run_id for trial in (*row.trials, *row.others)}


def _same_choices(treatment: Mapping[str, object], usual: Mapping[str, object]) -> bool:
    """Whether freeze, scheduler and optim are the report's choices; the rest a baseline shares with its trials."""
    return all(treatment.get(key) == value for key, value in usual.items() if not key.startswith("train."))


def _agreement(treatment: Mapping[str, object], usual: Mapping[str, object]) -> int:
    return sum(treatment.get(key) == value for key, value in usual.items())


def _started(row: Row) -> int:
    return min(trial.started_ms for trial in (*row.trials, *row.others))


def by_choice(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order in which a sweep would pick them: by the protocol's metric on the split that selects."""

    def score(row: Row) -> float:
        mean = sum(trial.score for trial in row.trials) / row.n
        return math.inf if math.isnan(mean) else mean if row.trials[0].metric == "loss" else -mean

    return sorted((row for row in rows if row.trials), key=score)


def label_rows(rows: Sequence[Row], baseline: int | None) -> list[Row]:
    """Give each row the overrides that tell it from the baseline, as they are typed: ``freeze.layers=3``."""
    varying = varying_keys([row.treatment for row in rows])
    reference = rows[baseline].treatment if baseline is not None else {}
    labelled = []
    for i, row in enumerate(rows):
        told = [key for key in varying if i == baseline or row.treatment.get(key) != reference.get(key, ...)]
        text = " ".join(f"{key.removesuffix('.name')}={_spelled(row.treatment.get(key))}" for key in told)
        parts = [part for part in ("baseline" if i == baseline and row.label != "baseline" else "", row.label) if part]
        shown = ": ".join([" ".join(parts), text]) if parts and text else " ".join(parts) or text or "all settings"
        labelled.append(replace(row, label=shown, is_baseline=i == baseline))
    return labelled


def varying_keys(treatments: Sequence[Mapping[str, object]]) -> list[str]:
    """Which keys differ among treatments; ``freeze.embeddings`` only where it does more than follow the layers."""
    keys = sorted({key for treatment in treatments for key in treatment})
    varying = [key for key in keys if len({repr(treatment.get(key)) for treatment in treatments}) > 1]
    follows = all(t.get("freeze.embeddings") == (t.get("freeze.layers") != 0) for t in treatments)
    return [key for key in varying if not (key == "freeze.embeddings" and follows)]


def _spelled(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def against_baseline(
    rows: Sequence[Row], baseline: int, read: ReadPredictions, shown: int, picked_here: bool
) -> list[Row]:
    """Compare the first ``shown`` rows with the baseline; the correction counts the settings beyond them too.

    Those could only have smaller p than assumed (1), which would lower the correction of the rows shown, so leaving
    them untested keeps the level. ``picked_here`` marks the best row as a sweep's winner that the report split chose.
    """
    base = rows[baseline]
    finished = [i for i, row in enumerate(rows) if row.trials and i != baseline]
    tested = {i: _compared(rows[i], base, read) for i in finished if i < shown} if base.trials else {}
    differences = {i: found for i, found in tested.items() if isinstance(found, Difference)}
    unseen = sum(i >= shown for i in finished)
    corrected = holm([found.p for found in differences.values()] + [1.0] * unseen)
    best = by_choice([rows[i] for i in finished]) if picked_here else []
    winner = best[0] if len(best) > 1 else None
    result = []
    for i, row in enumerate(rows):
        gain, note = time_saved(row.trials, base.trials) if row.trials and i != baseline else (None, "")
        points = 100 * (row.accuracy - base.accuracy) if row.trials and base.trials and i != baseline else None
        row = replace(row, points=points, time_gain_percent=gain, time_note=note, is_winner=row is winner)
        if i in differences:
            p_holm = corrected[list(differences).index(i)]
            row = replace(row, difference=replace(differences[i], p_holm=p_holm))
        result.append(replace(row, verdict=_verdict(row, tested.get(i), base)))
    return result


def _compared(row: Row, base: Row, read: ReadPredictions) -> Difference | str:
    """The row against the baseline, or why it was not tested."""
    ours, theirs = ({trial.seed: read(trial) for trial in side.trials} for side in (row, base))
    everyone = [*ours.values(), *theirs.values()]
    if any(found is None for found in everyone):
        return "not tested: predictions are missing"
    if len({tuple(found.labels.tolist()) for found in everyone if found}) > 1:
        return "not tested: predictions are of other examples"
    try:
        found = compare_over_seeds(
            {seed: kept.correct for seed, kept in ours.items() if kept},
            {seed: kept.correct for seed, kept in theirs.items() if kept},
        )
    except ValueError:
        return f"not tested: the baseline lacks seeds {', '.join(map(str, row.seeds))}"
    points, low, high = (100 * value for value in (found.difference, found.low, found.high))
    return Difference(points, low, high, found.p, found.p, found.n, found.paired)


def _verdict(row: Row, tested: Difference | str | None, base: Row) -> str:
    """What may be said of a row; one seed speaks of two trained models only, a winner of a split that chose it."""
    if row.is_baseline:
        return "baseline"
    if not row.trials:
        return ""
    if isinstance(tested, str):
        return tested
    if row.difference is None:
        return "not tested: beyond the rows asked for" if base.trials else "not tested: the baseline did not finish"
    difference = row.difference
    word = verdict(difference.low, difference.high, difference.p_holm, difference.n)
    if word not in ("better", "worse"):
        return word
    if row.is_winner and word == "better":
        return f"ahead, to be confirmed (n = {difference.n})"
    return f"{word} (n = {difference.n})" if difference.n > 1 else f"{word} with this seed (n = 1)"
