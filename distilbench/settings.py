"""The settings of a trial: frozen dataclasses with their ranges, and the schema that Hydra composes into.

Values live in ``conf/*.yaml``; this module states what each key means and which values it may take. The one
conversion from a composed config is :func:`settings_from`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, TypeVar, Union, get_args, get_type_hints, overload

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()
"""Where outputs/, mlruns/ and mlflow.db stand: the checkout, or the current directory of an installed package."""
CONF = _PACKAGE.parent / "conf" if (_PACKAGE.parent / "conf").is_dir() else _PACKAGE / "conf"
"""The configuration groups: beside the package in a checkout, inside it when installed."""

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
METRICS = ("accuracy", "f1", "mcc", "loss")
OPTIMIZERS = ("adamw", "sgd")
DEVICES = ("auto", "cpu", "cuda", "mps")
MODEL_SOURCES = ("hub", "package", "local", "random")
DATA_SOURCES = ("hub", "files", "tweets", "synthetic")
ENGINES = ("auto", "trainer", "fused")
PRUNERS = ("none", "median", "percentile", "patient", "successive_halving", "hyperband", "threshold", "wilcoxon")
OBJECTIVES = (*METRICS, "train_seconds", "train_flops", "trainable_parameters")
"""What a sweep may optimise; of these, accuracy, f1 and mcc are to go up, the others down."""
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""Names that ``transformers.get_scheduler`` takes without further arguments and that depend on the step alone."""


class SettingsError(ValueError):
    """A setting that the user can mend: one line with setting, value, what is allowed, and what to do."""


def require(holds: bool, setting: str, allowed: str, value: object, remedy: str = "") -> None:
    """Raise :class:`SettingsError` ``<setting> must be <allowed>, got <value>; <remedy>`` unless ``holds``."""
    if not holds:
        shown = repr(value) if isinstance(value, str) else value
        raise SettingsError(f"{setting} must be {allowed}, got {shown}" + (f"; {remedy}" if remedy else ""))


def _one_of(setting: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    require(value in allowed, setting, "one of " + ", ".join(allowed), value)


def _at_least(setting: str, value: float | None, low: float) -> None:
    finite = value is None or math.isfinite(value)
    require(finite and (value is None or value >= low), setting, f"{low} or more", value)


@dataclass(frozen=True)
class ModelSettings:
    """Where the initial weights and the tokenizer come from."""

    source: str
    """hub | package | local | random."""
    checkpoint: str
    """Hub id (hub), directory (local), distribution name (package), or architecture such as distilbert (random)."""
    revision: Optional[str] = None
    """Hub branch, tag or commit; null takes the default branch. The commit used is recorded."""
    layers: Optional[int] = None
    """Encoder layers of a random model (1 or more); null elsewhere."""
    fallback: Optional[ModelSettings] = None
    """What to use, loudly, when the hub can't be reached and nothing is cached; null refuses."""

    def __post_init__(self) -> None:
        _one_of("model.source", self.source, MODEL_SOURCES)
        require(bool(self.checkpoint), "model.checkpoint", "a name or a path", self.checkpoint)
        if self.source == "local":
            require(
                Path(self.checkpoint).expanduser().is_dir(),
                "model.checkpoint",
                "an existing directory",
                self.checkpoint,
                "give the folder that holds config.json and model.safetensors",
            )
        if self.source == "random":
            require(
                self.layers is not None and self.layers >= 1,
                "model.layers",
                "1 or more for a random model",
                self.layers,
            )


@dataclass(frozen=True)
class DataSettings:
    """Where text and labels come from, how they are split, and how many are used."""

    source: str
    """hub | files | tweets | synthetic."""
    hub_name: Optional[str] = None
    """Data set id on the hub (source=hub)."""
    hub_config: Optional[str] = None
    """Configuration of the hub data set, where it has several."""
    revision: Optional[str] = None
    """Hub branch, tag or commit; null takes the default branch. The commit used is recorded."""
    train: Optional[str] = None
    """Training split: its name (hub) or a CSV, TSV, JSONL or Parquet file (files)."""
    validation: Optional[str] = None
    """Validation split or file; null carves `validation_fraction` out of train, stratified and seeded."""
    text_column: Optional[str] = None
    """Column that holds the text."""
    label_column: Optional[str] = None
    """Column that holds the label."""
    label_names: Optional[list[str]] = None
    """Names of the labels in the order of their numbers; null takes them from the data."""
    validation_fraction: float = 0.1
    """Share of train used as validation where there is none, in (0, 1)."""
    selection_fraction: float = 0.0
    """Share of train that picks epochs and winners, in [0, 1); 0 lets validation do both, as the report did."""
    report_fraction: float = 0.0
    """Share of train carved out to report on alone, in [0, 1), for those whose validation is small: validation then
    picks epochs and winners, and `selection_fraction` stays 0."""
    split_seed: int = 0
    """Seed of every split that is carved out; part of the protocol, unlike `seed`."""
    max_train_examples: Optional[int] = None
    """Training examples, 1 or more: the first of one stratified order, seeded by `split_seed`; null uses all."""
    max_validation_examples: Optional[int] = None
    """Cap on validation examples, drawn likewise; null uses all."""
    fallback: Optional[DataSettings] = None
    """What to use, loudly, when the hub can't be reached and nothing is cached; null refuses."""

    def __post_init__(self) -> None:
        _one_of("data.source", self.source, DATA_SOURCES)
        if self.source == "hub":
            require(bool(self.hub_name), "data.hub_name", "the id of a data set on the hub", self.hub_name)
        if self.source == "files":
            self._check_files()
        require(0 < self.validation_fraction < 1, "data.validation_fraction", "in (0, 1)", self.validation_fraction)
        for name in ("selection_fraction", "report_fraction"):
            require(0 <= getattr(self, name) < 1, f"data.{name}", "in [0, 1)", getattr(self, name))
        require(not (self.selection_fraction and self.report_fraction), "data.selection_fraction",
                "0 with data.report_fraction, where validation picks", self.selection_fraction)  # fmt: skip
        for name in ("max_train_examples", "max_validation_examples"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        if self.label_names is not None:
            distinct = len(set(self.label_names)) == len(self.label_names)
            require(distinct and len(self.label_names) >= 2, "data.label_names", "2 or more distinct names",
                    list(self.label_names))  # fmt: skip

    def _check_files(self) -> None:
        require(self.train is not None, "data.train", "a file", self.train, "give data.train=path/to/train.csv")
        for name in ("train", "validation"):
            value = getattr(self, name)
            if value is not None:
                require(
                    Path(value).expanduser().is_file(),
                    f"data.{name}",
                    "an existing CSV, TSV, JSONL or Parquet file",
                    value,
                    "check the path",
                )
        for name in ("text_column", "label_column"):
            require(bool(getattr(self, name)), f"data.{name}", "the name of a column", getattr(self, name))


@dataclass(frozen=True)
class FreezeSettings:
    """How much of the encoder stays as it was."""

    layers: int
    """Encoder layers 0..layers-1 are frozen; 0 freezes nothing, the model's depth freezes the whole encoder."""
    embeddings: Union[bool, str]
    """auto (frozen when layers > 0) | true | false."""
    dropout: bool
    """Whether dropout stays active in the frozen part, as in the report."""

    def __post_init__(self) -> None:
        _at_least("freeze.layers", self.layers, 0)
        allowed = isinstance(self.embeddings, bool) or self.embeddings == "auto"
        require(allowed, "freeze.embeddings", "auto, true or false", self.embeddings)

    @property
    def freezes_embeddings(self) -> bool:
        """`embeddings` with auto decided."""
        return self.layers > 0 if self.embeddings == "auto" else bool(self.embeddings)


@dataclass(frozen=True)
class SchedulerSettings:
    """How the learning rate moves over the steps of a trial."""

    name: str
    """linear | cosine | cosine_with_restarts | polynomial | constant | constant_with_warmup | inverse_sqrt."""
    warmup_ratio: float
    """Share of all steps spent warming up, in [0, 1]; rounded up to whole steps as in transformers."""
    warmup_steps: Optional[int]
    """Steps spent warming up (0 or more); null leaves it to `warmup_ratio`."""

    def __post_init__(self) -> None:
        _one_of("scheduler.name", self.name, SCHEDULERS)
        require(0 <= self.warmup_ratio <= 1, "scheduler.warmup_ratio", "in [0, 1]", self.warmup_ratio)
        _at_least("scheduler.warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps:
            require(
                self.warmup_ratio == 0,
                "scheduler.warmup_ratio",
                f"0 when scheduler.warmup_steps={self.warmup_steps} is given",
                self.warmup_ratio,
                "set one of the two",
            )
        if self.name == "constant":
            require(
                not self.warmup_ratio and not self.warmup_steps,
                "scheduler.name",
                "a schedule that warms up when a warm-up is given",
                self.name,
                "use scheduler=constant_with_warmup",
            )

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a trial of ``steps`` steps; rounds up like ``TrainingArguments.get_warmup_steps``."""
        return self.warmup_steps or math.ceil(steps * self.warmup_ratio)


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and what bounds its steps."""

    name: str
    """adamw | sgd."""
    lr: float
    """Peak learning rate, above 0."""
    weight_decay: float
    """Decoupled for adamw, an L2 term for sgd; 0 or more; none on biases and LayerNorm."""
    max_grad_norm: float
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    beta1: float
    """AdamW's decay of the first moment, in [0, 1)."""
    beta2: float
    """AdamW's decay of the second moment, in [0, 1)."""
    eps: float
    """AdamW's term against division by zero, 0 or more."""
    momentum: float
    """SGD's momentum, in [0, 1)."""

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, OPTIMIZERS)
        require(math.isfinite(self.lr) and self.lr > 0, "optim.lr", "above 0", self.lr)
        for name in ("weight_decay", "max_grad_norm", "eps"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2", "momentum"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", "in [0, 1)", getattr(self, name))


@dataclass(frozen=True)
class TrainSettings:
    """How long, in what batches, and what is measured on the way."""

    epochs: int
    """Passes over the training examples, 1 or more."""
    batch_size: int
    """Examples a step, 1 or more; the last batch of an epoch may be smaller."""
    micro_batch_size: Optional[int]
    """Examples whose gradients are computed at once and added up to those of `batch_size`, which it must divide; null
    is all. Halved where memory runs out; changes memory and speed only."""
    eval_batch_size: int
    """Examples a batch in evaluation, 1 or more; changes speed only."""
    max_length: int
    """Tokens an input is cut at, [CLS] and [SEP] included, 3 or more."""
    precision: str
    """auto | fp32 | bf16 | fp16; auto is bf16 on a CUDA device that has it, fp32 elsewhere."""
    metric: str
    """accuracy | f1 | mcc | loss: what keeps the best epoch; part of the protocol."""
    eval_steps: Optional[int]
    """Evaluate every this many steps instead of after each epoch; null is each epoch."""
    patience: Optional[int]
    """Evaluations in a row that may fail to improve `metric`, after which the trial ends, 1 or more; null is any."""
    logging_steps: int
    """Steps between two records of loss, learning rate and gradient norm, 1 or more."""
    checkpoints: bool
    """Whether each evaluation leaves a checkpoint to resume from; they go when the trial finishes."""
    resume: bool
    """Continue an interrupted trial of the same settings from its last checkpoint in the same `output.dir`."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "eval_batch_size", "logging_steps", "eval_steps",
                     "patience"):  # fmt: skip
            _at_least(f"train.{name}", getattr(self, name), 1)
        require(self.batch_size % self.examples_at_once == 0, "train.micro_batch_size",
                f"a divisor of train.batch_size={self.batch_size}", self.micro_batch_size)  # fmt: skip
        _at_least("train.max_length", self.max_length, 3)
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.metric", self.metric, METRICS)

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger value of `metric` is better."""
        return self.metric != "loss"

    @property
    def examples_at_once(self) -> int:
        """`micro_batch_size` with null decided."""
        return self.micro_batch_size or self.batch_size

    def smaller_micro_batch(self, size: int) -> Optional[int]:
        """The largest divisor of `batch_size` that is at most half of `size`; None where that is a single example."""
        return next((part for part in range(size // 2, 0, -1) if self.batch_size % part == 0), None)


@dataclass(frozen=True)
class EngineSettings:
    """What trains the trial; changes speed, never results beyond rounding."""

    name: str
    """trainer (Hugging Face Trainer) | fused (several trials at once; encoders of DistilBERT's and BERT's shape) |
    auto (fused on a CPU where it takes the model and the precision, else trainer)."""
    device: str
    """auto | cpu | cuda | mps; auto takes CUDA, else MPS, else the CPU. Always exactly one device."""

    def __post_init__(self) -> None:
        _one_of("engine.name", self.name, ENGINES)
        _one_of("engine.device", self.device, DEVICES)


@dataclass(frozen=True)
class OutputSettings:
    """What a trial leaves in its directory."""

    dir: str
    """The trial's directory; Hydra's by default."""
    save_model: bool
    """Whether the best epoch's model and tokenizer are saved there, under `model/`."""


@dataclass(frozen=True)
class TrialSettings:
    """Everything that one trial needs; the report's baseline is what `conf/config.yaml` composes to."""

    model: ModelSettings
    data: DataSettings
    freeze: FreezeSettings
    scheduler: SchedulerSettings
    optim: OptimSettings
    train: TrainSettings
    engine: EngineSettings
    output: OutputSettings
    seed: int
    """Seeds the head, dropout and the order of examples; 0 .. 2**32 - 1."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", "0 .. 2**32 - 1", self.seed)


@dataclass(frozen=True)
class TrackingSettings:
    """Where trials are logged."""

    name: str
    """mlflow | none."""
    uri: Optional[str]
    """MLflow tracking URI; null means MLFLOW_TRACKING_URI, else mlflow.db at the project's root."""
    experiment: str
    """Name of the MLflow experiment."""

    def __post_init__(self) -> None:
        _one_of("tracking.name", self.name, ("mlflow", "none"))
        require(bool(self.experiment.strip()), "tracking.experiment", "a name", self.experiment)
        secret = self.uri is not None and re.search(r"//[^/@\s]*:[^/@\s]*@", self.uri)
        if secret:
            raise SettingsError(
                "tracking.uri must not hold a password, since Hydra writes settings to disk; put the URI into "
                "MLFLOW_TRACKING_URI, or user and password into MLFLOW_TRACKING_USERNAME and _PASSWORD"
            )


@dataclass(frozen=True)
class BaselineSettings:
    """The trial that others are compared with."""

    overrides: list[str]
    """Hydra overrides that turn a trial's settings into its baseline's; a group's choice replaces the whole group."""
    ensure: bool
    """Train the baseline first where no finished one of the same protocol is found."""


@dataclass(frozen=True)
class SweepSettings:
    """How the trials of one ``--multirun`` are chosen, counted and ended."""

    name: str
    """Names study, MLflow parent run and directory; the same name continues the same sweep."""
    trials: int
    """Trials of an Optuna sweep in all, those of earlier calls included, 1 or more; a grid has as many as cells."""
    baseline: bool
    """Whether the baseline is trained first: as a trial of the sweep where it lies in the space, else beside it."""
    objectives: Optional[list[str]]
    """What is optimised: accuracy, f1, mcc, loss (selection split), train_seconds, train_flops, trainable_parameters;
    null is `train.metric`. Several make a Pareto front."""
    seeds: Optional[list[int]]
    """Seeds of every trial, whose objective is then the mean over them; null is `seed` alone."""
    pruner: str
    """none | median | percentile | patient | successive_halving | hyperband | threshold | wilcoxon, as in Optuna."""
    pruner_options: dict[str, Any]
    """Arguments of Optuna's pruner, such as n_startup_trials: numbers (a resource may be auto); null is its default."""
    max_failures: Optional[float]
    """Failed trials that a sweep bears: a count (0 or more) or a share of all its trials (below 1); null is any."""
    timeout_minutes: Optional[float]
    """Minutes after which no new trial starts; null is no limit."""
    dry_run: bool
    """Print what would be trained, and how long that would take, and train nothing."""
    max_grid: int
    """Cells that a grid may have without a word: raise it to confirm a larger one."""
    on_change: str
    """refuse | extend: what becomes of a sweep that is continued with another space. extend takes other ends of a
    range, further values of a list, and dimensions that come or go; lists keep their values and ranges their kind, as
    Optuna asks, and what lies outside of the space must stay. More trials are no change."""
    retry_failed: bool
    """Train failed trials of a continued sweep again (DIVERGED ones excepted: they would diverge again)."""
    take_over: bool
    """Also close trials left RUNNING on other hosts; only where those hosts are known to be gone."""

    def __post_init__(self) -> None:
        require(re.fullmatch(r"\w[\w.+-]*", self.name) is not None, "sweep.name",
                "letters, digits and ._+- without a path", self.name)  # fmt: skip
        _at_least("sweep.trials", self.trials, 1)
        _one_of("sweep.pruner", self.pruner, PRUNERS)
        for name, value in self.pruner_options.items():
            takes = "a number, auto or null" if name.endswith("_resource") else "a number or null"
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            is_auto = value == "auto" and name.endswith("_resource")
            require(value is None or is_number or is_auto, f"sweep.pruner_options.{name}", takes, value)
        for objective in self.objectives or ():
            _one_of("sweep.objectives", objective, OBJECTIVES)
        for name in ("objectives", "seeds"):
            values = getattr(self, name)
            distinct = values is None or (bool(values) and len(set(values)) == len(values))
            require(distinct, f"sweep.{name}", "null or a list of different values", values)
        _at_least("sweep.max_failures", self.max_failures, 0.0)
        count_or_share = self.max_failures is None or self.max_failures < 1 or self.max_failures % 1 == 0
        require(count_or_share, "sweep.max_failures", "a whole number or a share below 1", self.max_failures)
        _at_least("sweep.timeout_minutes", self.timeout_minutes, 0)
        _at_least("sweep.max_grid", self.max_grid, 1)
        _one_of("sweep.on_change", self.on_change, ("refuse", "extend"))


@dataclass(frozen=True)
class AppSettings(TrialSettings):
    """The whole configuration of `python -m distilbench.train`."""

    tracking: TrackingSettings
    baseline: BaselineSettings
    sweep: SweepSettings

    @property
    def trial(self) -> TrialSettings:
        """The part that an engine sees."""
        return TrialSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrialSettings)})


LAYOUTS = ("full", "paper")
FORMATS = ("html", "markdown", "latex", "csv")


@dataclass(frozen=True)
class CompareSettings:
    """The whole configuration of `python -m distilbench.compare`; of the first four, all that are given must hold."""

    sweep: Optional[str]
    """Name of a sweep."""
    runs: list[str]
    """Ids of runs."""
    experiments: list[str]
    """Names of files in conf/experiment/ (typed experiment=a,b): runs that have their settings, however composed."""
    protocol: Optional[str]
    """A protocol's id, where what is asked for holds several."""
    baseline: Optional[str]
    """Id of the run (or of one of its seeds) that others are compared with; null finds it; none does without."""
    untested: str
    """refuse | show: what becomes of finished trials whose predictions are missing."""
    layout: str
    """full | paper: all columns, or those of the course report's table."""
    rows: int
    """Settings that are tested and shown, best first, 1 or more; the correction counts the others too."""
    formats: list[str]
    """Files to write: html, markdown, latex, csv."""
    output: Optional[str]
    """Folder of those files; null is outputs/reports/<what was asked for>."""
    tracking: TrackingSettings

    def __post_init__(self) -> None:
        given = self.sweep or self.runs or self.experiments
        require(bool(given), "what to compare", "sweep=NAME, runs=[ID,...] or experiment=NAME,...", "nothing",
                "add one of them")  # fmt: skip
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("untested", self.untested, ("refuse", "show"))
        for name in self.formats:
            _one_of("formats", name, FORMATS)
        _at_least("rows", self.rows, 1)


@dataclass(frozen=True)
class ConfirmSettings:
    """The whole configuration of `python -m distilbench.confirm`."""

    sweep: Optional[str]
    """Name of the sweep whose best settings are trained again."""
    top: int
    """How many of them, 1 or more."""
    seeds: int
    """Fresh seeds for each, and for the baseline; 2 or more."""
    name: Optional[str]
    """Name of the confirmation, a sweep of its own; null is `<sweep>-confirm`."""
    output: Optional[str]
    """Its folder; null is outputs/sweeps/<name>."""
    dry_run: bool
    """Say what would be trained and how long it would take, and train nothing."""
    tracking: TrackingSettings

    def __post_init__(self) -> None:
        require(bool(self.sweep), "sweep", "the name of a sweep", self.sweep, "add sweep=NAME")
        for name in ("sweep", "name"):
            value = getattr(self, name)
            plain = value is None or (value not in (".", "..") and not re.search(r"[/\\\0]", value))
            require(plain, name, "a name without a path in it", value)
        _at_least("top", self.top, 1)
        _at_least("seeds", self.seeds, 2)


BENCH_WINDOW = 8
"""Steps of a benchmark come in multiples of this: engines may run parts of so many steps ahead."""


@dataclass(frozen=True)
class BenchSettings:
    """What a benchmark measures: short runs, each in a process of its own, interleaved and repeated."""

    trials: int
    """Trials of the fused batch, 2 or more; they differ in learning rate and weight decay."""
    steps: int
    """Optimisation steps that are timed in each run, after 8 that are not; a multiple of 8."""
    eval_examples: int
    """Examples of the selection split that each run evaluates, 1 or more."""
    repeats: int
    """Times that each row is measured, 1 or more."""
    processes: int
    """Tuned Trainers that share the device as one more row, each in a process of its own; 0 for none, or 2 or more."""

    def __post_init__(self) -> None:
        _at_least("bench.trials", self.trials, 2)
        require(self.steps > 0 and self.steps % BENCH_WINDOW == 0, "bench.steps", f"a multiple of {BENCH_WINDOW}",
                self.steps)  # fmt: skip
        _at_least("bench.eval_examples", self.eval_examples, 1)
        _at_least("bench.repeats", self.repeats, 1)
        require(self.processes == 0 or self.processes >= 2, "bench.processes", "0, or 2 or more", self.processes)


@dataclass(frozen=True)
class BenchmarkSettings(AppSettings):
    """The whole configuration of `python -m distilbench.benchmark`."""

    bench: BenchSettings


Kind = TypeVar("Kind")


@overload
def settings_from(config: Any) -> AppSettings: ...
@overload
def settings_from(config: Any, kind: type[Kind]) -> Kind: ...
def settings_from(config: Any, kind: Any = AppSettings) -> Any:
    """Convert a composed config once, at the edge, to a ``kind`` of settings.

    Raises :class:`SettingsError` for a value out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

    try:
        nodes = {f.name: config[f.name] for f in dataclasses.fields(kind)}
        values = OmegaConf.to_container(OmegaConf.create(nodes, parent=config), resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
        raise SettingsError(f"{error.full_key} must be given, got nothing; add {error.full_key}=...") from None
    return _build(kind, values)


def _build(cls: Any, values: Any) -> Any:
    """Make the dataclass ``cls`` from nested dicts."""
    hints = get_type_hints(cls)
    nested = {name: _dataclass_in(hint) for name, hint in hints.items()}
    return cls(**{
        name: _build(nested[name], value) if nested[name] and value is not None else value
        for name, value in values.items()
    })  # fmt: skip


def names_of(cls: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings in ``cls``; a fallback, another whole group of sources, counts as one."""
    names: list[str] = []
    for name, hint in get_type_hints(cls).items():
        nested = _dataclass_in(hint)
        names += names_of(nested, f"{prefix}{name}.") if nested and nested is not cls else [f"{prefix}{name}"]
    return names


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that ``hint`` is, or is optionally; None for any other type."""
    return next((t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)), None)


def _schema(cls: Any, inside: tuple[Any, ...] = ()) -> Any:
    """A mutable twin of ``cls``: OmegaConf makes nodes of frozen dataclasses read-only, even while Hydra composes."""
    fields = []
    for f in dataclasses.fields(cls):
        hint = get_type_hints(cls)[f.name]
        nested = _dataclass_in(hint)
        if nested in (cls, *inside):
            hint = Any
        elif nested:
            hint = _schema(nested, (cls, *inside))
        default = f.default if f.default is not dataclasses.MISSING else "???"
        fields.append((f.name, hint, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def register_schema(app: type[AppSettings] = AppSettings) -> None:
    """Register the schemas that the main configurations in ``conf/`` build on; ``app`` is that of ``config.yaml``."""
    from hydra.core.config_store import ConfigStore

    kinds = {"schema": app, "compare_schema": CompareSettings, "confirm_schema": ConfirmSettings}
    for name, kind in kinds.items():
        ConfigStore.instance().store(name=name, node=_schema(kind), replace=True)
