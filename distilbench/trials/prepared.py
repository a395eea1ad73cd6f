"""The inputs of a trial: its job, the context of its sweep, and the resolved sources with the encoded text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from distilbench.data.text import TextSplits, load_text
from distilbench.data.tokens import EncodedSplits, encode
from distilbench.engines import resolve_engine
from distilbench.engines.device import describe_device, resolve_device, resolve_precision
from distilbench.identity import ProtocolIdentity, TrialIdentity, treatment_of, trial_identity
from distilbench.models.build import load_tokenizer
from distilbench.models.resolve import ResolvedModel, check_trial, resolve_model
from distilbench.report.names import name_of, varying_values
from distilbench.results import Evaluation
from distilbench.settings import AppSettings, EngineSettings, TrialSettings, root


@dataclass(frozen=True)
class Job:
    """One trial as requested, with the settings of the baseline that it is compared with."""

    settings: AppSettings
    baseline: AppSettings
    baseline_command: Callable[[], str]
    """Returns the command line that trains the baseline; a function, since that takes half a second."""
    context: SweepContext | None = None
    """Set for a trial of a sweep, which trains the baseline itself."""
    choices: Mapping[str, object] = field(default_factory=dict)
    baseline_choices: Mapping[str, object] = field(default_factory=dict)
    """Their choices of groups, from :func:`distilbench.composition.typed_choices`."""

    @property
    def is_baseline(self) -> bool:
        """Whether this trial's treatment is the baseline's own."""
        return treatment_of(self.settings, "") == treatment_of(self.baseline, "")

    @property
    def name(self) -> str:
        """Name of its run: how its settings differ from the baseline's, as in reports, and the seed."""
        ours, baseline = treatment_of(self.settings, ""), treatment_of(self.baseline, "")
        told, _ = varying_values([ours, baseline], [self.choices, self.baseline_choices])
        return f"{name_of(told) or 'baseline'} seed={self.settings.seed}"


class Lease(Protocol):
    """A process's claim to its trial, which another process takes over if this one is frozen for long."""

    is_lost: bool
    """Whether the claim had ended at the last check."""

    def holds(self) -> bool:
        """Return whether the trial is still this process's."""


@dataclass(frozen=True)
class SweepContext:
    """What a trial gets from its sweep; a trial without a sweep has only a name."""

    name: str
    """The name of its run."""
    tags: Mapping[str, str] = field(default_factory=dict)
    pruning_callback: Callable[[Evaluation], str | None] | None = None
    """Called after each evaluation; returns why the trial is to stop there, or None."""
    is_quiet: bool = False
    """Whether the trial prints nothing, since others run at the same time and the sweep shows them all."""
    accept: Callable[[Prepared], None] | None = None
    """Raises :class:`SettingsError` for sources that differ from those of the sweep's other trials."""
    lease: Lease | None = None
    """Checked before anything of the trial is recorded."""
    continues: Path | None = None
    """Directory of the interrupted trial to continue (its own or an earlier one), if its checkpoint still fits."""
    is_selection: bool = False
    """Whether the sweep selects one of several settings, so that a lead on the selecting split needs confirmation."""


@dataclass(frozen=True)
class Prepared:
    """Everything that trials of one model, one text and one device share; ``seconds`` is the time to prepare it."""

    model: ResolvedModel
    text: TextSplits
    splits: EncodedSplits
    protocol: ProtocolIdentity
    engine: EngineSettings
    device: str
    precision: str
    seconds: float

    def identity_of(self, settings: AppSettings) -> TrialIdentity:
        """Return the identity of a trial with these settings: everything that its result depends on."""
        return trial_identity(self.protocol, settings, self.precision)


@cache
def version_of(library: str) -> str:
    """Return the version of an installed library; ``unknown`` without metadata, as in a checkout."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"


def prepare(settings: AppSettings) -> Prepared:
    """Resolve the sources and encode the text; raises :class:`SettingsError` if the settings do not allow it."""
    start = time.perf_counter()
    device = resolve_device(settings.engine.device)
    precision = resolve_precision(settings.train.precision, device)
    model = resolve_model(settings.model)
    check_trial(model, settings)
    engine = resolve_engine(settings, model, precision, device.type)
    text = load_text(settings.data)
    splits = encode(text, load_tokenizer(model), settings.train.max_length, root() / "outputs" / "cache")
    report = "train (held out)" if settings.data.report_fraction else "validation"
    selection = "validation" if splits.selection is splits.report or report != "validation" else "train (held out)"
    return Prepared(
        model=model,
        text=text,
        splits=splits,
        protocol=ProtocolIdentity(model.used, text.used, settings.train.metric, selection, report),
        engine=engine,
        device=describe_device(device),
        precision=precision,
        seconds=time.perf_counter() - start,
    )


def prepared_trial(settings: AppSettings, prepared: Prepared) -> TrialSettings:
    """Return the trial as an engine gets it: with the model and the engine that were really resolved."""
    return replace(settings.trial, model=prepared.model.settings, engine=prepared.engine)
