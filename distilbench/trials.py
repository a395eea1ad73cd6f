"""Build, train, track, compare: the only place where sources, engines, tracking and reports meet."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from distilbench.data import EncodedSplits, TextSplits, encode, load_text
from distilbench.device import describe_device, resolve_device, resolve_precision
from distilbench.engines import engine_for
from distilbench.model import ResolvedModel, check_freeze, check_length, load_tokenizer, resolve_model
from distilbench.probe import solo_seconds
from distilbench.progress import Progress
from distilbench.report import Comparison, Summary, compare, comparison_markdown, comparison_metrics, print_summary
from distilbench.results import (
    Evaluation,
    Predictions,
    ProtocolIdentity,
    Status,
    StepRecord,
    StoredTrial,
    TrialResult,
    digest,
    treatment_of,
)
from distilbench.settings import ROOT, AppSettings, SettingsError, TrialSettings
from distilbench.tracking import DatasetUsed, RunLog, RunStart, Store, open_store

log = logging.getLogger(__name__)

CACHE = ROOT / "outputs" / "cache"
LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "hydra-core", "mlflow", "distilbench")
RECORD = "trial.json"
"""What a trial's directory says of it: run, identity, status, and its result once there is one."""


@dataclass(frozen=True)
class Job:
    """One trial as a person asked for it, with what it takes to compare it."""

    settings: AppSettings
    baseline: AppSettings
    baseline_command: str
    """The command line that trains the baseline."""

    @property
    def is_baseline(self) -> bool:
        """Whether this trial's treatment is the baseline's own."""
        return treatment_of(self.settings, "") == treatment_of(self.baseline, "")


@dataclass(frozen=True)
class Prepared:
    """Everything that trials of one model, one text and one device share; ``seconds`` is what preparing took."""

    model: ResolvedModel
    text: TextSplits
    splits: EncodedSplits
    protocol: ProtocolIdentity
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

    @property
    def name(self) -> str:
        """The run's name."""
        return name_of(self.settings)

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
        assert self.result.report is not None
        return StoredTrial(
            run_id=self.run_id or "",
            name=self.name,
            protocol_id=self.prepared.protocol.id,
            treatment=self.treatment,
            seed=self.settings.seed,
            status=self.result.status,
            accuracy=self.result.report.accuracy,
            loss=self.result.report.loss,
            train_seconds=self.result.train_seconds,
            trainable_parameters=self.result.trainable_parameters,
            measured_on=self.prepared.measured_on,
            alone=self.result.alone,
            predictions=self.predictions,
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
    text = load_text(settings.data)
    splits = encode(text, load_tokenizer(model), settings.train.max_length, CACHE)
    selection = "validation" if splits.selection is splits.report else "train (held out)"
    name = describe_device(device)
    return Prepared(
        model=model,
        text=text,
        splits=splits,
        protocol=ProtocolIdentity(model.used, text.used, settings.train.metric, selection, "validation"),
        device=name,
        precision=precision,
        measured_on=f"{name}; {settings.engine.name}; {precision}; torch {version('torch')}; "
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
    from rich.console import Console

    splits, text = outcome.prepared.splits, outcome.prepared.text
    sizes = {"train": len(splits.train), "validation": len(splits.report)}
    if splits.selection is not splits.report:
        sizes["selection"] = len(splits.selection)
    summary = Summary(
        name=outcome.name,
        settings=outcome.settings.trial,
        model=outcome.prepared.model.used,
        data=text.used,
        sizes=sizes,
        dropped=text.dropped,
        result=outcome.result,
        comparison=comparison,
        baseline_command=None if job.is_baseline or comparison else job.baseline_command,
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


def run(settings: AppSettings, prepared: Prepared, store: Store) -> Outcome:
    """Train one trial and keep what comes of it, whatever its end."""
    return run_together([settings], prepared, store)[0]


def prepared_trial(settings: AppSettings, prepared: Prepared) -> TrialSettings:
    """The trial as an engine gets it: with the weights that were really resolved."""
    return replace(settings.trial, model=prepared.model.settings)


def run_together(
    trials: Sequence[AppSettings], prepared: Prepared, store: Store, solo_seconds: float | None = None
) -> list[Outcome]:
    """Train trials that share model, text and engine in one call; each has its own run, directory and status.

    ``solo_seconds`` is an estimate of what one of them would take alone. Ctrl-C and SIGTERM (as an exception) close
    every run as INTERRUPTED and pass through.
    """
    records = [_Record.open(settings, prepared) for settings in trials]
    logs = [store.begin(_run_start(settings, prepared, record.run_id, alone=len(trials) == 1))
            for settings, record in zip(trials, records, strict=True)]  # fmt: skip
    for record, run_log in zip(records, logs, strict=True):
        record.write(Status.RUNNING, run_id=run_log.run_id)
    engine = engine_for(trials[0].engine)
    used = [prepared_trial(settings, prepared) for settings in trials]
    began = time.perf_counter()
    try:
        with Progress([name_of(settings) for settings in trials]) as progress:
            results = engine.train(used, prepared.splits, _Observers(logs, progress))
    except KeyboardInterrupt:
        for record, run_log in zip(records, logs, strict=True):
            stopped = TrialResult(Status.INTERRUPTED, "interrupted; add train.resume=true to continue")
            run_log.finish(stopped, None)
            record.write(stopped.status, run_id=run_log.run_id)
        raise
    if len(trials) > 1:
        seconds = time.perf_counter() - began
        results = [_in_batch(result, len(trials), seconds, solo_seconds) for result in results]
    outcomes = [
        Outcome(settings, prepared, replace(result, setup_seconds=result.setup_seconds + prepared.seconds), log.run_id)
        for settings, result, log in zip(trials, results, logs, strict=True)
    ]
    for outcome, record, run_log in zip(outcomes, records, logs, strict=True):
        run_log.finish(outcome.result, outcome.predictions)
        record.write(outcome.result.status, run_id=run_log.run_id, result=outcome.result)
    return outcomes


def estimate_alone(settings: AppSettings, prepared: Prepared) -> float | None:
    """Predict ``train_seconds`` of a trial that has the device to itself; None where the probe fails."""
    return solo_seconds(engine_for(settings.engine), prepared_trial(settings, prepared), prepared.splits)


def _in_batch(result: TrialResult, size: int, seconds: float, solo_seconds: float | None) -> TrialResult:
    """A result that says in what company it came about; the estimate is for trials that took all of their steps."""
    whole = result.status is Status.FINISHED
    return replace(
        result, batch_size=size, batch_seconds=seconds, solo_seconds_estimate=solo_seconds if whole else None
    )


def _run_start(settings: AppSettings, prepared: Prepared, run_id: str | None, alone: bool) -> RunStart:
    from omegaconf import OmegaConf

    splits, fingerprint = prepared.splits, prepared.protocol.data.fingerprint
    parts = [("training", splits.train), ("validation", splits.report)]
    if splits.selection is not splits.report:
        parts.insert(1, ("selection", splits.selection))
    return RunStart(
        name=name_of(settings),
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
        run_id=run_id,
    )


class _Observers:
    """Hands what an engine reports to each trial's run and to the progress shown."""

    def __init__(self, logs: Sequence[RunLog], progress: Progress) -> None:
        self._logs, self._progress = logs, progress

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Log and show a step."""
        self._logs[trial].on_step(record)
        self._progress.on_step(trial, record)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Log and show an evaluation; neither stops a trial."""
        self._logs[trial].on_evaluation(evaluation)
        return self._progress.on_evaluation(trial, evaluation)


@dataclass(frozen=True)
class _Record:
    """``trial.json`` in a trial's directory: which run it is, what it is, how it stands."""

    path: Path
    identity: dict[str, object]
    run_id: str | None = None

    @classmethod
    def open(cls, settings: AppSettings, prepared: Prepared) -> _Record:
        """Start a record, or take up the one of an interrupted trial; refuses a directory of another trial."""
        path = Path(settings.output.dir) / RECORD
        treatment = treatment_of(settings, prepared.precision)
        identity = {"protocol": prepared.protocol.id, "treatment": digest(treatment), "seed": settings.seed}
        if not (settings.train.resume and path.is_file()):
            return cls(path, identity)
        found = json.loads(path.read_text())
        if found["status"] == Status.FINISHED:
            raise SettingsError(
                f"train.resume must continue an unfinished trial, got {path.parent}, which FINISHED with accuracy "
                f"{found['accuracy']:.4f}; drop train.resume=true to train it anew"
            )
        changed = [key for key, value in identity.items() if found[key] != value]
        if changed:
            raise SettingsError(
                f"train.resume must continue the trial in {path.parent}, got another {' and '.join(changed)}; "
                "use the settings it was started with, or another hydra.run.dir"
            )
        return cls(path, identity, found["run_id"])

    def write(self, status: Status, run_id: str | None, result: TrialResult | None = None) -> None:
        """Replace the file at once, so that a kill leaves the old or the new one."""
        content = self.identity | {"run_id": run_id, "status": status}
        if result is not None:
            content |= {"error": result.error, "train_seconds": result.train_seconds} | _scores(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, self.path)


def _scores(result: TrialResult) -> dict[str, object]:
    report = result.report
    return {} if report is None else {k: getattr(report, k) for k in ("accuracy", "loss", "f1", "mcc", "epoch")}
