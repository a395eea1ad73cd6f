"""Build, train, track, compare: the only place where sources, engines, tracking and reports meet."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from distilbench.data.text import TextSplits, load_text
from distilbench.data.tokens import EncodedSplits, encode
from distilbench.engines import engine_for, resolve_engine
from distilbench.engines.device import describe_device, resolve_device, resolve_precision
from distilbench.identity import ProtocolIdentity, treatment_of, trial_identity
from distilbench.models.build import load_tokenizer
from distilbench.models.resolve import ResolvedModel, check_freeze, check_length, resolve_model
from distilbench.report import Comparison, Summary, compare, comparison_markdown, comparison_metrics, print_summary
from distilbench.results import (
    PREDICTIONS,
    Evaluation,
    Owner,
    Predictions,
    Record,
    Status,
    StepRecord,
    StoredTrial,
    TrialResult,
    read_record,
)
from distilbench.settings import ROOT, AppSettings, EngineSettings, SettingsError, TrialSettings
from distilbench.tracking import DatasetUsed, RunLog, RunStart, Store, final_metrics, open_store, write_predictions
from distilbench.trials.estimate import solo_seconds
from distilbench.trials.progress import Progress

log = logging.getLogger(__name__)

CACHE = ROOT / "outputs" / "cache"

LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "hydra-core", "mlflow", "distilbench")


@dataclass(frozen=True)
class Job:
    """One trial as a person asked for it, with what it takes to compare it."""

    settings: AppSettings
    baseline: AppSettings
    baseline_command: Callable[[], str]
    """Makes the command line that trains the baseline; that takes half a second, and few ask."""

    @property
    def is_baseline(self) -> bool:
        """Whether this trial's treatment is the baseline's own."""
        return treatment_of(self.settings, "") == treatment_of(self.baseline, "")


@dataclass(frozen=True)
class SweepContext:
    """What a trial has from the sweep that it belongs to; one on its own has none of it."""

    name: str | None = None
    """The run's name, where the sweep knows a shorter one than :func:`name_of`."""
    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    pruning_callback: Callable[[Evaluation], str | None] | None = None
    """Called after each evaluation; returns why the trial is to stop there, or None."""
    is_quiet: bool = False
    """Whether the trial shows nothing, since others run beside it and the sweep shows them all."""
    accept: Callable[[Prepared], None] | None = None
    """Raises :class:`SettingsError` for sources that are not those of the sweep's other trials."""


@dataclass(frozen=True)
class Prepared:
    """Everything that trials of one model, one text and one device share; ``seconds`` is what preparing took."""

    model: ResolvedModel
    text: TextSplits
    splits: EncodedSplits
    protocol: ProtocolIdentity
    engine: EngineSettings
    device: str
    precision: str
    measured_on: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A trial with its result and the run that keeps it (None without tracking)."""

    settings: AppSettings
    prepared: Prepared
    result: TrialResult
    run_id: str | None
    name: str
    """The run's name."""

    @property
    def treatment(self) -> dict[str, object]:
        """What a sweep may vary, as this trial had it."""
        return treatment_of(self.settings, self.prepared.precision)

    @cached_property
    def predictions(self) -> Predictions | None:
        """What the kept epoch said of the report split."""
        report = self.result.report
        if report is None or report.logits is None:
            return None
        return Predictions(self.prepared.splits.report.labels, report.logits)

    @property
    def stored(self) -> StoredTrial:
        """The trial as the store would give it back; only for one that has a result."""
        report, cpu_seconds = self.result.report, self.result.train_cpu_seconds
        assert report is not None
        return StoredTrial(
            run_id=self.run_id or "",
            name=self.name,
            protocol_id=self.prepared.protocol.id,
            treatment=self.treatment,
            seed=self.settings.seed,
            status=self.result.status,
            accuracy=report.accuracy,
            loss=report.loss,
            train_seconds=self.result.train_seconds,
            trainable_parameters=self.result.trainable_parameters,
            measured_on=self.prepared.measured_on,
            alone=self.result.alone,
            predictions=self.predictions,
            train_cpu_seconds=math.nan if cpu_seconds is None else cpu_seconds,
            train_flops=self.result.train_flops,
            peak_memory_bytes=self.result.peak_memory_bytes,
            brier=report.brier,
            ece=report.ece,
        )


def name_of(settings: AppSettings) -> str:
    """A run name that tells what varies most: ``freeze3-cosine-lr3e-05-wd0.05-s42``."""
    optim = settings.optim
    return (
        f"freeze{settings.freeze.layers}-{settings.scheduler.name}"
        f"-lr{optim.lr:g}-wd{optim.weight_decay:g}-s{settings.seed}"
    )


def prepare(settings: AppSettings) -> Prepared:
    """Resolve the sources and encode the text; raises :class:`SettingsError` for all that a person can mend."""
    start = time.perf_counter()
    device = resolve_device(settings.engine.device)
    precision = resolve_precision(settings.train.precision, device)
    model = resolve_model(settings.model)
    check_freeze(model, settings.freeze)
    check_length(model, settings.train.max_length)
    engine = resolve_engine(settings.engine, model, precision, device.type)
    text = load_text(settings.data)
    splits = encode(text, load_tokenizer(model), settings.train.max_length, CACHE)
    selection = "validation" if splits.selection is splits.report else "train (held out)"
    name = describe_device(device)
    return Prepared(
        model=model,
        text=text,
        splits=splits,
        protocol=ProtocolIdentity(model.used, text.used, settings.train.metric, selection, "validation"),
        engine=engine,
        device=name,
        precision=precision,
        measured_on=f"{name}; {engine.name}; {precision}; torch {version('torch')}; "
        f"transformers {version('transformers')}",
        seconds=time.perf_counter() - start,
    )


def run_and_compare(job: Job) -> Outcome:
    """Train one trial, with its baseline first where ``baseline.ensure`` asks for it, and print how they compare."""
    store = open_store(job.settings.tracking)
    prepared = prepare(job.settings)
    baseline = None if job.is_baseline else find_baseline(job, prepared, store, job.settings.baseline.ensure)
    outcome = run(job.settings, prepared, store)
    _print(job, outcome, add_comparison(outcome, baseline, store), store)
    return outcome


def add_comparison(outcome: Outcome, baseline: StoredTrial | None, store: Store) -> Comparison | None:
    """Compare a trial with its baseline and attach that to its run; None where one of the two has no result."""
    if baseline is None or outcome.result.report is None:
        return None
    comparison = compare(outcome.stored, baseline)
    if outcome.run_id:
        store.add_comparison(outcome.run_id, comparison_markdown(comparison), comparison_metrics(comparison))
    return comparison


def _print(job: Job, outcome: Outcome, comparison: Comparison | None, store: Store) -> None:
    text = outcome.prepared.text
    used = {"train": text.train, "validation": text.report}
    if text.selection is not text.report:
        used["selection"] = text.selection
    summary = Summary(
        name=outcome.name,
        settings=prepared_trial(outcome.settings, outcome.prepared),
        model=outcome.prepared.model.used,
        data=text.used,
        labels={name: text.label_counts(split) for name, split in used.items()},
        dropped=text.dropped,
        shared=text.shared,
        result=outcome.result,
        comparison=comparison,
        baseline_command=None if job.is_baseline or comparison else job.baseline_command(),
        run_url=store.runs_url(),
        output_dir=outcome.settings.output.dir,
    )
    print_summary(Console(), summary)


def find_baseline(job: Job, prepared: Prepared, store: Store, ensure: bool) -> StoredTrial | None:
    """The newest finished baseline of the job; with ``ensure``, one is trained where there is none."""
    wanted = treatment_of(job.baseline, prepared.precision)
    found = store.newest_baseline(prepared.protocol.id, wanted, job.baseline.seed)
    if found is not None or not ensure:
        return found
    log.info("no finished baseline of this protocol yet: training it first")
    directory = Path(job.settings.output.dir) / "baseline"
    settings = replace(job.baseline, output=replace(job.baseline.output, dir=str(directory)))
    outcome = run(settings, prepared, store)
    if outcome.result.report is None:
        log.warning("the baseline %s: %s", outcome.result.status.lower(), outcome.result.error)
        return None
    return outcome.stored


def run(settings: AppSettings, prepared: Prepared, store: Store, context: SweepContext | None = None) -> Outcome:
    """Train one trial and keep what comes of it, whatever its end."""
    return run_together([settings], prepared, store, [context or SweepContext()])[0]


def prepared_trial(settings: AppSettings, prepared: Prepared) -> TrialSettings:
    """The trial as an engine gets it: with the weights that were really resolved, and the engine resolved."""
    return replace(settings.trial, model=prepared.model.settings, engine=prepared.engine)


def run_together(
    trials: Sequence[AppSettings],
    prepared: Prepared,
    store: Store,
    contexts: Sequence[SweepContext],
    solo_seconds: float | None = None,
) -> list[Outcome]:
    """Train trials that share model, text and engine in one call; each has its own run, directory and status.

    ``solo_seconds`` is an estimate of what one of them would take alone. Ctrl-C and SIGTERM (as an exception) close
    every run as INTERRUPTED and pass through.
    """
    records = [_begin(settings, prepared) for settings in trials]
    alone = len(trials) == 1
    logs = [store.begin(_run_start(settings, prepared, record.run_id, context, alone))
            for settings, record, context in zip(trials, records, contexts, strict=True)]  # fmt: skip
    records = [replace(record, run_id=run_log.run_id) for record, run_log in zip(records, logs, strict=True)]
    for settings, record in zip(trials, records, strict=True):
        record.write(Path(settings.output.dir))
    engine = engine_for(prepared.engine)
    used = [prepared_trial(settings, prepared) for settings in trials]
    names = [context.name or name_of(settings) for settings, context in zip(trials, contexts, strict=True)]
    began = time.perf_counter()
    try:
        with Progress(names, Console(quiet=any(context.is_quiet for context in contexts))) as progress:
            observers = _Observers(logs, progress, contexts)
            results = observers.explain(engine.train(used, prepared.splits, observers))
    except KeyboardInterrupt:
        stopped = TrialResult(Status.INTERRUPTED, "interrupted; add train.resume=true to continue")
        for settings, record, run_log in zip(trials, records, logs, strict=True):
            run_log.finish(stopped, None)
            record.with_result(stopped, {}).write(Path(settings.output.dir))
        raise
    if len(trials) > 1:
        seconds = time.perf_counter() - began
        results = [_in_batch(result, len(trials), seconds, solo_seconds) for result in results]
    outcomes = [
        Outcome(settings, prepared, replace(result, setup_seconds=result.setup_seconds + prepared.seconds), log.run_id,
                name)
        for settings, result, log, name in zip(trials, results, logs, names, strict=True)
    ]  # fmt: skip
    for outcome, record, run_log in zip(outcomes, records, logs, strict=True):
        _end(outcome, record, run_log)
    return outcomes


def estimate_alone(settings: AppSettings, prepared: Prepared) -> float:
    """Predict ``train_seconds`` of a trial that has the device to itself.

    Raises :class:`SettingsError` where a trial of these settings fails within its first steps.
    """
    return solo_seconds(engine_for(prepared.engine), prepared_trial(settings, prepared), prepared.splits)


def _in_batch(result: TrialResult, size: int, seconds: float, solo_seconds: float | None) -> TrialResult:
    """A result that says in what company it came about; the estimate is for trials that took all of their steps."""
    whole = result.status is Status.FINISHED
    return replace(
        result, num_trials_in_batch=size, batch_seconds=seconds, solo_seconds_estimate=solo_seconds if whole else None
    )


def _run_start(
    settings: AppSettings, prepared: Prepared, run_id: str | None, context: SweepContext, alone: bool
) -> RunStart:
    from omegaconf import OmegaConf

    splits, fingerprint = prepared.splits, prepared.protocol.data.fingerprint
    parts = [("training", splits.train), ("validation", splits.report)]
    if splits.selection is not splits.report:
        parts.insert(1, ("selection", splits.selection))
    return RunStart(
        name=context.name or name_of(settings),
        settings=prepared_trial(settings, prepared),
        protocol=prepared.protocol,
        treatment=treatment_of(settings, prepared.precision),
        device=prepared.device,
        precision=prepared.precision,
        measured_on=prepared.measured_on,
        versions={library: version(library) for library in LIBRARIES},
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(settings)),
        label_names=splits.label_names,
        datasets=tuple(DatasetUsed(part, len(split), fingerprint) for part, split in parts),
        alone=alone,
        tags=context.tags,
        parent_run_id=context.parent_run_id,
        run_id=run_id,
    )


class _Observers:
    """Hands what an engine reports to each trial's run, to the progress shown, and to who may stop the trial."""

    def __init__(self, logs: Sequence[RunLog], progress: Progress, contexts: Sequence[SweepContext]) -> None:
        self._logs, self._progress, self._contexts = logs, progress, contexts
        self._reasons: dict[int, str] = {}

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Log and show a step."""
        self._logs[trial].on_step(record)
        self._progress.on_step(trial, record)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Log and show an evaluation; the trial's pruning callback says whether it goes on."""
        self._logs[trial].on_evaluation(evaluation)
        self._progress.on_evaluation(trial, evaluation)
        prune = self._contexts[trial].pruning_callback
        reason = prune(evaluation) if prune else None
        if reason:
            self._reasons[trial] = reason
        return bool(reason)

    def explain(self, results: Sequence[TrialResult]) -> list[TrialResult]:
        """The results, with the pruner's reason in those that were stopped."""
        return [
            replace(result, error=f"{result.error}: {self._reasons[trial]}")
            if result.status is Status.PRUNED and trial in self._reasons
            else result
            for trial, result in enumerate(results)
        ]


def _begin(settings: AppSettings, prepared: Prepared) -> Record:
    """Start a record, or take up the one of an interrupted trial; refuses a directory of another trial."""
    directory = Path(settings.output.dir)
    identity = asdict(trial_identity(prepared.protocol, settings, prepared.precision))
    found = read_record(directory) if settings.train.resume else None
    if found and found.status is Status.FINISHED:
        raise SettingsError(
            f"train.resume must continue an unfinished trial, got {directory}, which FINISHED with accuracy "
            f"{found.scores['accuracy']:.4f}; drop train.resume=true to train it anew"
        )
    changed = [key for key, value in identity.items() if found and found.identity[key] != value]
    if changed:
        raise SettingsError(
            f"train.resume must continue the trial in {directory}, got another {' and '.join(changed)}; "
            "use the settings it was started with, or another hydra.run.dir"
        )
    return Record(identity, Status.RUNNING, Owner.of_this_process(), found.run_id if found else None)


def _end(outcome: Outcome, record: Record, run_log: RunLog) -> None:
    """Keep a trial's result: in its directory first, which is at once and settles it, then in the store."""
    directory = Path(outcome.settings.output.dir)
    if outcome.predictions is not None:
        write_predictions(outcome.predictions, directory / PREDICTIONS)
    record.with_result(outcome.result, final_metrics(outcome.result)).write(directory)
    run_log.finish(outcome.result, outcome.predictions)
