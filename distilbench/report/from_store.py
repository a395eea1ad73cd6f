"""Make reports from stored trials: find the baseline, compare, write files, attach them to the sweep's run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode, multimode

from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from distilbench.cli import format_command, format_override, pluralize
from distilbench.identity import TEXT_AMOUNT, short_hash, value_of, without_defaults
from distilbench.report import tables
from distilbench.report.comparison import compare_with_baseline
from distilbench.report.findings import Report, by_score
from distilbench.report.names import source_overrides
from distilbench.report.page import page
from distilbench.report.rows import Row, Untested, find_baseline, label_rows, rows_from
from distilbench.report.slices import rows_by_slice
from distilbench.report.trial import compare, comparison_metrics
from distilbench.results import Status, StoredTrial, Verdict, replace_file
from distilbench.settings import SettingsError
from distilbench.tracking.search import SWEEP_TAG, SweepRun
from distilbench.tracking.store import MlflowStore

CURVES = 8
"""Number of settings whose learning curves are drawn, besides the baseline's."""


@dataclass(frozen=True)
class ReportRequest:
    """What a report is to contain.

    ``default_treatment`` is without precision. ``margin`` is in percentage points. ``baseline`` is the id of a run,
    ``none``, or None to find it. ``shown`` is the number of rows in tables. ``names`` labels treatments by hash.
    ``sweep`` is the trials' sweep.
    """

    title: str
    default_treatment: Mapping[str, object]
    margin: float
    baseline: str | None = None
    shown: int = 200
    names: Mapping[str, str] = field(default_factory=dict)
    sweep: SweepRun | None = None


def check_protocol(trials: Sequence[StoredTrial]) -> None:
    """Raise :class:`SettingsError` if trials have different protocols, which are never compared."""
    samples = {trial.protocol_id: trial for trial in trials}
    if len(samples) < 2:
        return
    told = "; ".join(
        f"{name} ({one.model} on {one.data}, {one.metric} on {one.selection_split})" for name, one in samples.items()
    )
    most_common = mode(trial.protocol_id for trial in trials)
    raise SettingsError(
        f"runs to compare must be of one protocol, got {len(samples)}: {told}; choose one: protocol={most_common}"
    )


def check_tested(report: Report) -> None:
    """Raise :class:`SettingsError` if a finished trial could not be tested because predictions are missing."""
    lacking = [row for row in report.table_rows if row.untested is Untested.PREDICTIONS]
    if lacking:
        raise SettingsError(
            f"finished runs must have their predictions, got none for {len(lacking)} of "
            f"{pluralize(len(report.candidates), 'setting')} ({lacking[0].name}) or for the baseline; train them "
            "again, or show them untested: untested=show"
        )


def make_report(store: MlflowStore, trials: Sequence[StoredTrial], request: ReportRequest) -> Report:
    """Compare trials of one protocol with their baseline; if they contain none that finished, look one up in the store.

    A sweep's report includes the results of its confirmations, and a confirmation's those of its sweep.
    """
    report = _compare(store, trials, request)
    confirmation = _confirmation(store, report, request)
    if request.sweep and not request.sweep.confirms:
        again = {short_hash(row.treatment): row.confirmation for row in confirmation}
        rows = (replace(row, confirmation=again.get(short_hash(row.treatment))) for row in report.rows)
        report = replace(report, rows=tuple(rows))
    notes = (*report.notes, *_notes_on_splits(request, report))
    try:
        sources = tuple(source_overrides(store.config(report.sample.run_id)))
    except (SettingsError, OmegaConfBaseException, KeyError, ValueError):  # unreadable, e.g. of an old version
        sources = ()
    return replace(report, notes=notes, curves=_curves(store, report), confirmation=confirmation, sources=sources,
                   default_treatment=request.default_treatment)  # fmt: skip


def _compare(store: MlflowStore, trials: Sequence[StoredTrial], request: ReportRequest) -> Report:
    """Return the report of these trials, without confirmations, curves and notes on splits."""
    rows = rows_from(trials, request.names)
    notes: tuple[str, ...] = ()
    expected = _expected(rows, request.default_treatment)
    baseline = None if request.baseline == "none" else find_baseline(rows, expected, request.baseline)
    is_lacking = request.baseline != "none" and (baseline is None or not rows[baseline].trials)
    wanted = expected if baseline is None else rows[baseline].treatment
    if is_lacking and (found := _baseline_elsewhere(store, trials[0], wanted, request)):
        rows = rows_from([*trials, *found], request.names)
        ids = {trial.run_id for trial in found}
        baseline = next(i for i, row in enumerate(rows) if ids & {t.run_id for t in row.all_trials})
        notes = ("The baseline is not among these trials: it is the newest finished one of their protocol.",)
    rows = label_rows(rows, baseline)
    if baseline is not None and not request.baseline and (several := sum(row.is_tagged for row in rows)) > 1:
        notes = (f"These trials have {several} baselines: all are compared with the one that took most FLOPs; "
                 "compare with another by baseline=ID of its run.",)  # fmt: skip
    picked = () if request.sweep else tuple(_notes_on_picked(store, rows))
    notes += picked
    asked = {trial.run_id for trial in trials}
    repeated = [one for row in rows for one in row.other_trials if one.status is Status.FINISHED]
    if repeats := sum(one.run_id in asked for one in repeated):  # such as with another engine
        notes += (f"Left out: {pluralize(repeats, 'finished trial')} whose setting and seed a newer one has.",)
    rows = [with_predictions(store, row) if i < request.shown or row.is_baseline else row for i, row in enumerate(rows)]
    is_search, sample = request.sweep is not None and not request.sweep.confirms, trials[0]
    is_chosen = bool(picked) or (is_search and len(rows) > 2)
    selected_on_report_split = is_chosen and sample.selection_split == sample.report_split
    num_settings = _num_settings(store, rows, request)
    rows, majority = compare_with_baseline(
        rows, baseline, request.margin, request.shown, selected_on_report_split, num_settings
    )
    return Report(
        title=request.title,
        rows=tuple(rows),
        shown=request.shown,
        sample=sample,
        margin=request.margin,
        notes=notes,
        url=store.runs_url(request.sweep.name if request.sweep else None),
        ui_command=store.address.ui_command,
        majority=majority,
        num_settings=num_settings,
        slices=rows_by_slice(rows, request.margin, num_settings),
    )


def _notes_on_picked(store: MlflowStore, rows: Sequence[Row]) -> Iterator[str]:
    """Say which sweeps these rows were picked from, if there was a choice: the correction does not count the others."""
    shown = {short_hash(row.treatment) for row in rows}
    picked = {trial.sweep for row in rows if not row.is_baseline for trial in row.all_trials}
    for name in sorted(picked - {""}):
        if others := {short_hash(trial.treatment) for trial in store.search({SWEEP_TAG: name})} - shown:
            command = format_command("compare", [format_override("sweep", name)])
            left = pluralize(len(others), "other setting")
            yield f"Picked from sweep {name}: the correction does not count its {left}; {command} does."


def _num_settings(store: MlflowStore, rows: Sequence[Row], request: ReportRequest) -> int:
    """Return how many settings the tests of these rows are corrected for.

    A confirmation trains the best settings of a sweep. If the split that reports also chose them, they suit its
    examples by chance, whatever the seed: all that the sweep tried count.
    """
    own, sample, sweep = {short_hash(row.treatment) for row in rows}, rows[0].first_trial, request.sweep
    if sweep is None or sweep.confirms is None or sample.selection_split != sample.report_split:
        return len(own) - 1
    tried = (one for one in store.search({SWEEP_TAG: sweep.confirms}) if one.protocol_id == sample.protocol_id)
    return len(own | {short_hash(trial.treatment) for trial in tried}) - 1


def with_predictions(store: MlflowStore, row: Row) -> Row:
    """Return a row whose trials have their predictions, read from the store."""
    return replace(row, trials=tuple(replace(one, predictions=store.predictions(one.run_id)) for one in row.trials))


def _expected(rows: Sequence[Row], default_treatment: Mapping[str, object]) -> dict[str, object]:
    """Return the baseline's expected treatment: the default with the trials' most common train and data settings.

    Of several that are equally common, such as the amounts of text of a grid, the one that leaves out least.
    """

    def size(value: object) -> float:
        return math.inf if value is None else value if isinstance(value, int | float) else 0.0  # null: no limit

    keys = {key for row in rows for key in row.treatment if key.startswith(("train.", "data."))}
    common = {key: max(multimode(value_of(row.treatment, key) for row in rows), key=size) for key in keys}
    if common.get(TEXT_AMOUNT) is None:  # all of the text, so the seed that would draw it has no effect
        common.pop("data.split_seed", None)
    return {**default_treatment, **without_defaults(common)}


def _baseline_elsewhere(
    store: MlflowStore, sample: StoredTrial, wanted: Mapping[str, object], request: ReportRequest
) -> list[StoredTrial]:
    """Find the baseline's trials in the store: of the requested run, or finished ones with the treatment ``wanted``."""
    if request.baseline:
        found = store.search({}, [request.baseline])
        if not found:
            raise SettingsError(f"baseline must be the id of a run, or none, got {request.baseline!r}; check the id")
        check_protocol([sample, *found])
        return found
    tags = {"distilbench.protocol": sample.protocol_id, "distilbench.treatment": short_hash(wanted)}
    return store.search({**tags, "distilbench.status": Status.FINISHED.value})


DELETED_STORE_HINT = (
    "A store that was deleted took its runs along: their figures are left in each trial's trial.json, and the sweep's "
    "command trains them again with sweep.retry_lost=true"
)


def find_sweep(store: MlflowStore, sweep: str) -> SweepRun:
    """Return the run of a sweep; raises :class:`SettingsError` with the existing names if there is none."""
    found = store.sweep_run(sweep)
    if found is None:
        names = store.sweep_names()
        held = "one of " + ", ".join(names[:10]) if names else "the name of a sweep, of which there is none yet"
        raise SettingsError(
            f"sweep must be {held}, got {sweep!r} in {store.describe()}; check the name. {DELETED_STORE_HINT}"
        )
    return found


def report_of_sweep(
    store: MlflowStore, sweep: SweepRun, default_treatment: Mapping[str, object], margin: float
) -> Report | None:
    """Return a sweep's report; None if it has no trials yet.

    ``default_treatment`` is that of :func:`distilbench.composition.default_treatment`; ``margin`` is in percentage
    points. Trials with another protocol than most are left out, and a note says so.
    """
    trials = store.search({SWEEP_TAG: sweep.name})
    if not trials:
        return None
    protocol = mode(trial.protocol_id for trial in trials)
    kept = [trial for trial in trials if trial.protocol_id == protocol]
    report = make_report(store, kept, ReportRequest(f"Sweep {sweep.name}", default_treatment, margin, sweep=sweep))
    if len(kept) == len(trials):
        return report
    left = f"Left out: {pluralize(len(trials) - len(kept), 'trial')} of other protocols, which can't be compared."
    return replace(report, notes=(left, *report.notes))


def _notes_on_splits(request: ReportRequest, report: Report) -> Iterator[str]:
    """Say what a lead is worth if the split that reports it also picked it."""
    sample, sweep = report.sample, request.sweep
    if sweep is None or sample.selection_split != sample.report_split:
        return
    if sweep.confirms:
        yield (
            f"Fresh seeds rule out a lucky seed, not lucky sentences: the {sample.report_split} split also chose the "
            "winner, so tests are corrected for all that its sweep tried "
            f"({pluralize(report.num_settings, 'setting')}). A sweep with data.selection_fraction=0.1 chooses on "
            "other sentences."
        )
    elif any(row.final_verdict is Verdict.AHEAD for row in report.rows):
        confirm = format_command("confirm", [format_override("sweep", sweep.name)])
        yield (
            f"The {sample.report_split} split picked the winners and reports them: a lead is optimistic; confirm it "
            f"with fresh seeds ({confirm}), or sweep with data.selection_fraction=0.1."
        )


def _curves(store: MlflowStore, report: Report) -> tuple[tuple[Row, list[tuple[int, float]]], ...]:
    """Read the learning curves of the first seed of the best settings and of the baseline."""
    sample = report.sample
    part = "validation" if sample.selection_split == sample.report_split else "selection"
    drawn = [*report.candidates[:CURVES], *(row for row in report.rows if row.is_baseline and row.trials)]
    return tuple((row, store.history(row.trials[0].run_id, f"{part}/accuracy")) for row in drawn)


def _confirmation(store: MlflowStore, report: Report, request: ReportRequest) -> tuple[Row, ...]:
    """Return the sweep's rows that were trained again, each with its row in the confirmation; empty without any."""
    sweep = request.sweep
    if sweep is None:
        return ()
    known = [store.sweep_run(sweep.confirms)] if sweep.confirms else store.confirmations(sweep.name)
    runs = [run for run in known if run is not None]
    trials = [trial for run in runs for trial in store.search({SWEEP_TAG: run.name})
              if trial.protocol_id == report.sample.protocol_id]  # fmt: skip
    if not trials:
        return ()
    other = _compare(store, trials, replace(request, sweep=runs[-1]))
    before, after = (other, report) if sweep.confirms else (report, other)
    again = {short_hash(row.treatment): row for row in after.rows
             if not row.is_baseline and (row.trials or row.status == Status.DIVERGED)}  # fmt: skip
    return tuple(
        replace(row, confirmation=again[key])
        for row in by_score(before.candidates)
        if (key := short_hash(row.treatment)) in again
    )


def _update_trial_runs(store: MlflowStore, report: Report) -> None:
    """Write the report's verdicts to the runs of trials whose own comparison differs, or that have none yet.

    The report's verdicts and bounds are corrected for all settings, use all seeds, and are replaced by those of fresh
    seeds. A trial has no comparison yet if it ended before the baseline did, or while the store was unreachable.
    """
    bases = report.baseline.trials if report.baseline else ()
    for row in report.candidates if bases else ():
        differs = row.difference and (report.num_settings > 1 or len(row.all_trials) > 1 or row.confirmation)
        text, headline = tables.trial_note(report, row)
        for trial in row.trials:
            metrics: dict[str, float] = {}
            if not trial.is_compared:  # with the baseline's trial, if possible of its seed: figures of its own
                base = min(bases, key=lambda one: one.seed != trial.seed)
                ours = replace(trial, predictions=store.predictions(trial.run_id))  # only the rows shown have them
                metrics = comparison_metrics(compare(ours, base, report.margin))
            if differs or not trial.is_compared:
                store.add_comparison(trial.run_id, text, metrics, headline)


def write_report(report: Report, directory: Path, layout: str = "full") -> list[Path]:
    """Write ``report.html``, ``.md``, ``.tex`` and ``.csv``; return their paths."""
    texts = {
        "html": page(report),
        "md": tables.markdown_report(report, layout),
        "tex": tables.latex_report(report, layout),
        "csv": tables.csv_report(report),
    }
    for ending, text in texts.items():
        with replace_file(directory / f"report.{ending}") as partial:
            partial.write_text(text, encoding="utf-8")
    return [directory / f"report.{ending}" for ending in texts]


def report_sweep(store: MlflowStore, name: str, directory: Path, default_treatment: Mapping[str, object], margin: float,
                 console: Console | None = None) -> Report | None:  # fmt: skip
    """Report a sweep at its end: print, save in ``directory``, attach to its run, and update its trials' runs.

    Also reports if trials failed; returns None if there is no trial yet.
    """
    sweep = find_sweep(store, name)
    report = report_of_sweep(store, sweep, default_treatment, margin)
    if report is None:
        return None
    tables.print_report(console or Console(), report)
    store.attach(sweep.run_id, write_report(report, directory), tables.note(report))
    _update_trial_runs(store, report)
    searched = store.sweep_run(sweep.confirms) if sweep.confirms else None
    if searched:  # update the confirmed sweep's report, too, with its own margin
        with tempfile.TemporaryDirectory() as elsewhere:
            beside = directory.parent / searched.name
            place = beside if beside.is_dir() else Path(elsewhere)
            report_sweep(store, searched.name, place, default_treatment, searched.margin or margin, Console(quiet=True))
    return report
