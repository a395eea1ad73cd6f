"""The settings of a trial: frozen dataclasses with their ranges, and the schema that Hydra composes into.

Values live in ``conf/*.yaml``; this module states what each key means and which values it may take. The one
conversion from a composed config is :func:`settings_from`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional, TypeVar, Union, get_args, get_type_hints, overload
from urllib.parse import quote

_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()
"""The checkout, or the current directory of an installed package."""
os.environ["DISTILBENCH_ROOT"] = os.path.abspath(os.environ.get("DISTILBENCH_ROOT") or CHECKOUT)  # as conf/ has it
CONF = _PACKAGE.parent / "conf" if (_PACKAGE.parent / "conf").is_dir() else _PACKAGE / "conf"
"""The configuration groups: beside the package in a checkout, inside it when installed."""

METRICS = ("accuracy", "f1", "mcc", "loss")
ADAPTERS = ("none", "lora", "ia3")
FREEZE_POLICIES = ("depth", "head", "bias", "gradual", "scheduled", "auto")
DATA_SOURCES = ("hub", "files", "tweets", "synthetic")
ENGINES = ("auto", "trainer", "fused")
PRUNERS = ("none", "median", "percentile", "patient", "successive_halving", "hyperband", "threshold", "wilcoxon")
OBJECTIVES = (*METRICS, "train_seconds", "train_flops", "cost", "trainable_parameters")
"""What a sweep may optimise; of these, accuracy, f1 and mcc are to go up, the others down."""
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt")  # fmt: skip
"""Names that ``transformers.get_scheduler`` takes without further arguments and that depend on the step alone."""


def root() -> Path:
    """Return where outputs/, mlruns/ and mlflow.db stand: ``DISTILBENCH_ROOT``, unless set :data:`CHECKOUT`."""
    return Path(os.environ.get("DISTILBENCH_ROOT") or CHECKOUT)


class SettingsError(ValueError):
    """A setting that the user can mend: one line with setting, value, what is allowed, and what to do."""


def require(holds: bool, setting: str, allowed: str, value: object, remedy: str = "") -> None:
    """Raise :class:`SettingsError` ``<setting> must be <allowed>, got <value>; <remedy>`` unless ``holds``."""
    if not holds:
        shown = repr(value) if isinstance(value, str) else str(value)
        shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
        raise SettingsError(f"{setting} must be {allowed}, got {shown}" + (f"; {remedy}" if remedy else ""))


@dataclass(frozen=True)
class Rule:
    """Which values a setting may have, in words and as a test; ``each`` asks it of every element of a list."""

    allowed: str
    holds: Callable[[Any], bool]
    each: bool = False


def one_of(allowed: Sequence[str], each: bool = False) -> Rule:
    """Allow these words, or lists of them."""
    return Rule("one of " + ", ".join(allowed), allowed.__contains__, each)


def at_least(low: float) -> Rule:
    """Allow finite numbers from ``low`` on."""
    return Rule(f"{low} or more", lambda value: math.isfinite(value) and value >= low)


ABOVE_ZERO = Rule("above 0", lambda value: 0 < value < math.inf)
DISTINCT = Rule("null or a list of different values", lambda values: 0 < len(set(values)) == len(values))


def within(interval: str) -> Rule:
    """Allow the numbers of an interval as mathematics writes it: ``[0, 1)`` has 0 and not 1."""
    low, high = map(float, interval[1:-1].split(","))
    ends = {end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "[]"}
    return Rule(f"in {interval}", lambda value: low < value < high or value in ends)


def named(allowed: str, pattern: str, most: int) -> Rule:
    """Allow texts that match ``pattern`` and have at most so many bytes."""
    return Rule(allowed, lambda value: len(value.encode()) <= most and bool(re.fullmatch(pattern, value, re.DOTALL)))


@dataclass(frozen=True)
class PathIf:
    """Marks a path, which means the directory in which the command was typed; one where ``source`` is that, or None."""

    source: str | None = None


MARGIN = within("(0, 100]")
LABEL_NAMES = Rule("2 or more distinct names", lambda names: 1 < len(set(names) - {None}) == len(names))
DEVICE = named("auto, cpu, cuda, cuda:NUMBER or mps", r"auto|cpu|cuda(:\d+)?|mps", 20)
REGISTERED = named("NAME or NAME@ALIAS (MLflow keeps latest and v1 for itself)",
                   r"(?=\s*[^\s@])[^/:@]+(@(?!(?i:latest|v\d+)\Z)[\w-]+)?", 256)  # fmt: skip

DATABASE = "database"
"""Marks a URL that may name a file of SQLite, in the directory in which the command was typed."""

AS_TYPED = "as typed"
"""Marks words that the command line takes for more: ``true`` and ``1`` are names here."""


@cache
def _marks(cls: Any) -> dict[str, tuple[Any, ...]]:
    """Return what the annotations of a dataclass say of its fields beside their types, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__ for name, hint in hints.items() if hasattr(hint, "__metadata__")}


@dataclass(frozen=True)
class Checked:
    """Settings that hold their rules: fields one by one, null against none, then what they must be together."""

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, group: str = "") -> None:
        cls._prefix = f"{group}." if group else ""

    def __post_init__(self) -> None:
        for name, marks in _marks(type(self)).items():  # type: ignore[arg-type]  # mypy takes no dataclass for Hashable
            value = getattr(self, name)
            for rule in marks:
                if isinstance(rule, Rule) and value is not None:
                    for one in value if rule.each else [value]:
                        require(rule.holds(one), self._prefix + name, rule.allowed, one)
        self._check()

    def _check(self) -> None:
        """Raise :class:`SettingsError` for fields that contradict each other."""


@dataclass(frozen=True)
class ModelSettings(Checked, group="model"):
    """Where the initial weights and the tokenizer come from."""

    source: Annotated[str, one_of(("hub", "package", "local", "random"))]
    """hub | package | local | random."""
    checkpoint: Annotated[str, PathIf("local"), Rule("a name or a path", bool)]
    """Hub id (hub), directory (local), distribution name (package), or architecture such as distilbert (random)."""
    revision: Optional[str] = None
    """Hub branch, tag or commit; null takes the default branch. The commit used is recorded."""
    layers: Optional[int] = None
    """Encoder layers of a random model (1 or more); null elsewhere."""
    fallback: Optional[ModelSettings] = None
    """What to use, loudly, when the hub can't be reached and nothing is cached; null refuses."""

    def _check(self) -> None:
        if self.source == "local":
            require(Path(self.checkpoint).is_dir(), "model.checkpoint", "an existing directory", self.checkpoint,
                    "give the folder that holds config.json and model.safetensors")  # fmt: skip
        if self.source == "random":
            require((self.layers or 0) >= 1, "model.layers", "1 or more for a random model", self.layers)


@dataclass(frozen=True)
class DataSettings(Checked, group="data"):
    """Where text and labels come from, how they are split, and how many are used."""

    source: Annotated[str, one_of(DATA_SOURCES)]
    """hub | files | tweets | synthetic."""
    hub_name: Optional[str] = None
    """Data set id on the hub (source=hub)."""
    hub_config: Optional[str] = None
    """Configuration of the hub data set, where it has several."""
    revision: Optional[str] = None
    """Hub branch, tag or commit; null takes the default branch. The commit used is recorded."""
    train: Annotated[Optional[str], PathIf("files")] = None
    """Training split: its name (hub) or a CSV, TSV, JSON, JSONL or Parquet file (files)."""
    validation: Annotated[Optional[str], PathIf("files")] = None
    """Validation split or file; null carves `validation_fraction` out of train, stratified and seeded. Of the hub also
    several, `one+another`, which are reported as slices."""
    text_column: Optional[str] = None
    """Column that holds the text."""
    pair_column: Optional[str] = None
    """Column that holds a second text, which is encoded with the first as a pair; null is single texts."""
    label_column: Optional[str] = None
    """Column that holds the label."""
    slice_column: Optional[str] = None
    """Column, such as source, by whose values results are also reported; null reports them as a whole."""
    label_names: Annotated[Optional[list[str]], AS_TYPED, LABEL_NAMES] = None
    """Names of the labels in the order of their numbers, as they are written; null takes them from the data."""
    validation_fraction: Annotated[float, within("(0, 1)")] = 0.1
    """Share of train used as validation where there is none, in (0, 1)."""
    selection_fraction: Annotated[float, within("[0, 1)")] = 0.0
    """Share of train that picks epochs and winners, in [0, 1); 0 lets validation do both, as the report did."""
    report_fraction: Annotated[float, within("[0, 1)")] = 0.0
    """Share of train carved out to report on alone, in [0, 1), for those whose validation is small: validation then
    picks epochs and winners, and `selection_fraction` stays 0."""
    split_seed: int = 0
    """Seed of every split that is carved out; part of the protocol, unlike `seed`."""
    max_train_examples: Annotated[Optional[int], at_least(1)] = None
    """Training examples, 1 or more: the first of one stratified order, seeded by `split_seed`; null uses all."""
    max_validation_examples: Annotated[Optional[int], at_least(1)] = None
    """Cap on validation examples, drawn likewise; null uses all."""
    fallback: Optional[DataSettings] = None
    """What to use, loudly, when the hub can't be reached and nothing is cached; null refuses."""

    def _check(self) -> None:
        source, files = self.source, {"train": self.train, "validation": self.validation}
        is_named = source != "hub" or bool(self.hub_name)
        require(is_named, "data.hub_name", "the id of a data set on the hub", self.hub_name)
        if source == "files":
            for name in ("train", "text_column", "label_column"):
                value = getattr(self, name)
                require(bool(value), f"data.{name}", "given with data=files", value, f"add data.{name}=...")
            for name, file in files.items():
                require(file is None or Path(file).is_file(), f"data.{name}",
                        "an existing CSV, TSV, JSON, JSONL or Parquet file", file, "check the path")  # fmt: skip
        columns = [name for name in (self.text_column, self.pair_column, self.label_column) if name is not None]
        require(len(set(columns)) == len(columns), "data.text_column, data.pair_column and data.label_column",
                "columns of their own", ", ".join(columns))  # fmt: skip
        for name in ("pair_column", "slice_column"):
            value, has_columns = getattr(self, name), source in ("hub", "files")
            require(has_columns or value is None, f"data.{name}", f"null with data.source={source}", value)
        require(not (self.selection_fraction and self.report_fraction), "data.selection_fraction",
                "0 with data.report_fraction, where validation picks", self.selection_fraction)  # fmt: skip


@dataclass(frozen=True)
class FreezeSettings(Checked, group="freeze"):
    """How much of the encoder stays as it was."""

    layers: Annotated[int, at_least(0)]
    """Encoder layers 0..layers-1 are frozen; 0 freezes nothing, the model's depth freezes the whole encoder."""
    embeddings: Annotated[Union[bool, str], Rule("auto, true or false", (True, False, "auto").__contains__)]
    """auto (frozen when layers > 0) | true | false."""
    dropout: bool
    """Whether dropout stays active in the frozen part, as in the report."""
    policy: Annotated[str, one_of(FREEZE_POLICIES)]
    """depth (`layers` and `embeddings` say what is frozen) | head (all but the classifier is frozen) | bias (all but
    biases and the classifier is, as in BitFit) | and, moving at each evaluation: gradual (from the head alone, one more
    layer from the top) | scheduled (from nothing to `layers`) | auto (from nothing to what gradients say)."""

    def _check(self) -> None:
        given = f"with freeze.policy={self.policy}, which says what is frozen"
        if self.policy == "scheduled":
            require(self.layers >= 1, "freeze.layers", "1 or more with freeze.policy=scheduled", self.layers)
        elif self.policy != "depth":
            require(self.layers == 0, "freeze.layers", f"0 {given}", self.layers)
        if self.policy != "depth":
            require(self.embeddings == "auto", "freeze.embeddings", f"auto {given}", spelled(self.embeddings))
        if self.policy not in ("depth", "head"):
            require(self.dropout, "freeze.dropout", f"true with freeze.policy={self.policy}", spelled(self.dropout))

    @property
    def moves(self) -> bool:
        """Whether what is frozen changes at evaluations."""
        return self.policy in ("gradual", "scheduled", "auto")

    @property
    def fewest_parts(self) -> int:
        """In how many parts evaluations must cut a trial for anything to move; auto compares two before it does."""
        return 3 if self.policy == "auto" else 2

    @property
    def freezes_embeddings(self) -> bool:
        """`embeddings` with auto decided."""
        frozen = self.layers > 0 or self.policy in ("head", "bias")
        return frozen if self.embeddings == "auto" else bool(self.embeddings)

    def deterministic_layers(self, depth: int) -> int:
        """Return how many of `depth` encoder layers go without dropout, from the bottom."""
        return 0 if self.dropout else depth if self.policy == "head" else self.layers


@dataclass(frozen=True)
class AdapterSettings(Checked, group="adapter"):
    """What is trained beside an encoder that stays as it was, through peft."""

    name: Annotated[str, one_of(ADAPTERS)]
    """none | lora | ia3."""
    rank: Annotated[Optional[int], at_least(1)]
    """LoRA's rank, 1 .. the model's width; null for other adapters."""
    alpha: Annotated[Optional[float], ABOVE_ZERO]
    """LoRA's scale, above 0: what it adds is multiplied by alpha / rank; null for other adapters."""
    dropout: Annotated[Optional[float], within("[0, 1)")]
    """Dropout in front of LoRA's maps, in [0, 1); null for other adapters."""
    merge: bool
    """Whether `model/` is saved too, with the adapter merged into the weights, for plain Transformers; `adapter/`
    always is, for peft."""

    def _check(self) -> None:
        is_lora = self.name == "lora"
        for name in ("rank", "alpha", "dropout"):
            value, allowed = getattr(self, name), f"{'a number' if is_lora else 'null'} with adapter.name={self.name}"
            require((value is not None) == is_lora, f"adapter.{name}", allowed, value)


@dataclass(frozen=True)
class SchedulerSettings(Checked, group="scheduler"):
    """How the learning rate moves over the steps of a trial."""

    name: Annotated[str, one_of(SCHEDULERS)]
    """linear | cosine | cosine_with_restarts | polynomial | constant | constant_with_warmup | inverse_sqrt."""
    warmup_ratio: Annotated[float, within("[0, 1]")]
    """Share of all steps spent warming up, in [0, 1]; rounded up to whole steps as in transformers."""
    warmup_steps: Annotated[Optional[int], at_least(0)]
    """Steps spent warming up (0 or more); null leaves it to `warmup_ratio`."""

    def _check(self) -> None:
        require(not self.warmup_steps or self.warmup_ratio == 0, "scheduler.warmup_ratio",
                f"0 when scheduler.warmup_steps={self.warmup_steps} is given", self.warmup_ratio,
                "set one of the two")  # fmt: skip
        warms_up = self.warmup_ratio or self.warmup_steps
        require(self.name != "constant" or not warms_up, "scheduler.name",
                "a schedule that warms up when a warm-up is given", self.name,
                "use scheduler=constant_with_warmup")  # fmt: skip

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a trial of ``steps`` steps; rounds up like ``TrainingArguments.get_warmup_steps``."""
        return self.warmup_steps or math.ceil(steps * self.warmup_ratio)


@dataclass(frozen=True)
class OptimSettings(Checked, group="optim"):
    """The optimizer and what bounds its steps."""

    name: Annotated[str, one_of(("adamw", "sgd"))]
    """adamw | sgd."""
    lr: Annotated[float, ABOVE_ZERO]
    """Peak learning rate, above 0."""
    weight_decay: Annotated[float, at_least(0)]
    """Decoupled for adamw, an L2 term for sgd; 0 or more; none on biases and LayerNorm."""
    max_grad_norm: Annotated[float, at_least(0)]
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    beta1: Annotated[float, within("[0, 1)")]
    """AdamW's decay of the first moment, in [0, 1)."""
    beta2: Annotated[float, within("[0, 1)")]
    """AdamW's decay of the second moment, in [0, 1)."""
    eps: Annotated[float, at_least(0)]
    """AdamW's term against division by zero, 0 or more."""
    momentum: Annotated[float, within("[0, 1)")]
    """SGD's momentum, in [0, 1)."""
    layer_decay: Annotated[float, within("(0, 1]")]
    """What each encoder layer's learning rate is of that of the layer above, in (0, 1]: the head has `lr`, the
    embeddings the least."""


@dataclass(frozen=True)
class TrainSettings(Checked, group="train"):
    """How long, in what batches, and what is measured on the way."""

    epochs: Annotated[int, at_least(1)]
    """Passes over the training examples, 1 or more."""
    batch_size: Annotated[int, at_least(1)]
    """Examples a step, 1 or more; the last batch of an epoch may be smaller."""
    micro_batch_size: Annotated[Optional[int], at_least(1)]
    """Examples whose gradients are computed at once and added up to those of `batch_size`, which it must divide; null
    is all. Halved where memory runs out; changes memory and speed only."""
    eval_batch_size: Annotated[int, at_least(1)]
    """Examples a batch in evaluation, 1 or more; changes speed only."""
    max_length: Annotated[int, at_least(3)]
    """Tokens an input is cut at, [CLS] and [SEP] included, 3 or more."""
    precision: Annotated[str, one_of(("auto", "fp32", "bf16", "fp16"))]
    """auto | fp32 | bf16 | fp16; auto is bf16 on a CUDA device that has it, fp32 elsewhere."""
    metric: Annotated[str, one_of(METRICS)]
    """accuracy | f1 | mcc | loss: what keeps the best epoch; part of the protocol."""
    eval_steps: Annotated[Optional[int], at_least(1)]
    """Evaluate every this many steps instead of after each epoch; null is each epoch."""
    patience: Annotated[Optional[int], at_least(1)]
    """Evaluations in a row that may fail to improve `metric`, after which the trial ends, 1 or more; null is any."""
    label_smoothing: Annotated[float, within("[0, 1)")]
    """Share of each training target that is spread over all labels, in [0, 1); evaluations know nothing of it."""
    class_weights: Annotated[str, one_of(("none", "balanced"))]
    """none | balanced: what an example's loss is multiplied by in training; balanced is examples / (labels x examples
    of its label)."""
    logging_steps: Annotated[int, at_least(1)]
    """Steps between two records of loss, learning rate and gradient norm, 1 or more."""
    checkpoints: bool
    """Whether each evaluation leaves a checkpoint to resume from; they go when the trial finishes."""
    resume: bool
    """Continue an interrupted trial of the same settings from its last checkpoint in the same `output.dir`."""

    def _check(self) -> None:
        require(self.batch_size % self.examples_at_once == 0, "train.micro_batch_size",
                f"a divisor of train.batch_size={self.batch_size}", self.micro_batch_size)  # fmt: skip

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger value of `metric` is better."""
        return self.metric != "loss"

    @property
    def examples_at_once(self) -> int:
        """`micro_batch_size` with null decided."""
        return self.micro_batch_size or self.batch_size

    def smaller_micro_batch(self, size: int) -> Optional[int]:
        """Return the largest divisor of `batch_size` that is at most half of `size`; None for a single example."""
        return next((part for part in range(size // 2, 0, -1) if self.batch_size % part == 0), None)


@dataclass(frozen=True)
class EngineSettings(Checked, group="engine"):
    """What trains the trial; changes speed, never results beyond rounding."""

    name: Annotated[str, one_of(ENGINES)]
    """trainer (Hugging Face Trainer) | fused (several trials at once; encoders of DistilBERT's and BERT's shape) |
    auto (fused on a CPU or CUDA device where it takes the model and the precision, else trainer)."""
    device: Annotated[str, DEVICE]
    """auto | cpu | cuda | cuda:NUMBER (of those that CUDA_VISIBLE_DEVICES shows) | mps; auto takes CUDA, else MPS, else
    the CPU. Always exactly one device."""


@dataclass(frozen=True)
class OutputSettings:
    """What a trial leaves in its directory."""

    dir: Annotated[str, PathIf()]
    """The trial's directory; Hydra's by default."""
    save_model: bool
    """Whether the best epoch's model and tokenizer are saved there, under `model/`."""


@dataclass(frozen=True)
class TrialSettings(Checked):
    """Everything that one trial needs; the report's baseline is what `conf/config.yaml` composes to."""

    model: ModelSettings
    data: DataSettings
    freeze: FreezeSettings
    adapter: AdapterSettings
    scheduler: SchedulerSettings
    optim: OptimSettings
    train: TrainSettings
    engine: EngineSettings
    output: OutputSettings
    seed: Annotated[int, Rule("0 .. 2**32 - 1", range(2**32).__contains__)]
    """Seeds the head, an adapter, dropout and the order of examples; 0 .. 2**32 - 1."""

    def _check(self) -> None:
        if self.adapter.name != "none":
            given = f"with adapter.name={self.adapter.name}, which leaves the encoder as it was"
            freeze = self.freeze
            require(freeze.policy == "depth", "freeze.policy", f"depth {given}", freeze.policy)
            require(freeze.layers == 0, "freeze.layers", f"0 {given}", freeze.layers)
            require(not freeze.freezes_embeddings, "freeze.embeddings", f"auto {given}", spelled(freeze.embeddings))
            require(freeze.dropout, "freeze.dropout", f"true {given}", spelled(freeze.dropout))

        if self.freeze.moves:
            fewest = self.freeze.fewest_parts
            has_parts = self.train.epochs >= fewest or self.train.eval_steps is not None
            require(has_parts, "train.epochs", f"{fewest} or more with freeze.policy={self.freeze.policy}, which moves "
                    "at evaluations", self.train.epochs, "or set train.eval_steps")  # fmt: skip

    @property
    def needs_trainer(self) -> bool:
        """Whether only the reference engine trains this, whatever the model."""
        return self.adapter.name != "none" or self.freeze.policy == "auto"


@dataclass(frozen=True)
class TrackingSettings(Checked, group="tracking"):
    """Where trials are logged."""

    name: Annotated[str, one_of(("mlflow", "none"))]
    """mlflow | none."""
    uri: Annotated[Optional[str], DATABASE]
    """MLflow tracking URI; null means MLFLOW_TRACKING_URI, else mlflow.db at the project's root."""
    experiment: Annotated[str, named("a name of at most 256 bytes", r".*\S.*", 256)]
    """Name of the MLflow experiment."""
    patience_seconds: Annotated[float, at_least(0)]
    """How long, in seconds, a store that is gone is waited for: after a trial, at a sweep's end, and by its workers."""
    log_model: Annotated[str, one_of(("never", "best", "always"))] = "never"
    """never | best | always: whether a finished trial's model is logged as an MLflow model, after its training; best is
    a trial on its own, and of a sweep the answer alone, at its end."""
    register: Annotated[Optional[str], REGISTERED] = None
    """Name in MLflow's registry under which a logged model becomes the newest version, with an alias; null is none."""

    def _check(self) -> None:
        require(self.register is None or self.log_model != "never", "tracking.register",
                "null with tracking.log_model=never", self.register, "add tracking.log_model=best")  # fmt: skip
        require(self.name != "none" or self.log_model == "never", "tracking.log_model", "never with tracking=none",
                self.log_model)  # fmt: skip
        if self.uri is not None and re.search(r"//[^/@\s]*:[^/@\s]*@", self.uri):
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


SWEEP_NAME = named("letters, digits and ._+- without a path, 200 bytes at most", r"\w[\w.+-]*", 200)
COUNT_OR_SHARE = Rule("a whole number or a share below 1", lambda value: value < 1 or value % 1 == 0)


@dataclass(frozen=True)
class SweepSettings(Checked, group="sweep"):
    """How the trials of one ``--multirun`` are chosen, counted and ended."""

    name: Annotated[str, SWEEP_NAME]
    """Names study, MLflow parent run and directory; the same name continues the same sweep."""
    trials: Annotated[int, at_least(1)]
    """Trials of an Optuna sweep in all, those of earlier calls included, 1 or more; a grid has as many as cells."""
    baseline: bool
    """Whether the baseline is trained first: as a trial of the sweep where it lies in the space, else beside it."""
    objectives: Annotated[Optional[list[str]], one_of(OBJECTIVES, each=True), DISTINCT]
    """What is optimised: accuracy, f1, mcc, loss (selection split), train_seconds, train_flops, trainable_parameters;
    cost is seconds where trials run alone, FLOPs where they share a device; null is `train.metric`. Several make a
    Pareto front."""
    seeds: Annotated[Optional[list[int]], DISTINCT]
    """Seeds of every trial, whose objective is then the mean over them; null is `seed` alone."""
    pruner: Annotated[str, one_of(PRUNERS)]
    """none | median | percentile | patient | successive_halving | hyperband | threshold | wilcoxon, as in Optuna."""
    pruner_options: dict[str, Any]
    """Arguments of Optuna's pruner, such as n_startup_trials: numbers (a resource may be auto); null is its default."""
    max_failures: Annotated[Optional[float], at_least(0.0), COUNT_OR_SHARE]
    """Failed trials that a sweep bears: a count (0 or more) or a share of all its trials (below 1); null is any."""
    timeout_minutes: Annotated[Optional[float], at_least(0)]
    """Minutes after which no new trial starts; null is no limit."""
    dry_run: bool
    """Print what would be trained, and how long that would take, and train nothing."""
    max_grid: Annotated[int, at_least(1)]
    """Cells that a grid may have without a word: raise it to confirm a larger one."""
    warm_start: Annotated[Optional[str], SWEEP_NAME]
    """An earlier sweep of the same protocol whose finished trials a new study of Optuna begins with, where their points
    lie in its space; null is none."""
    on_change: Annotated[str, one_of(("refuse", "extend"))]
    """refuse | extend: what becomes of a sweep that is continued with another space. extend takes other ends of a
    range, and dimensions that come or go; lists keep their values and ranges their kind, as Optuna asks, and what lies
    outside of the space must stay. More trials are no change."""
    retry_failed: bool
    """Train failed trials of a continued sweep again (DIVERGED ones excepted: they would diverge again)."""
    retry_lost: bool
    """Train trials of a continued sweep again whose runs the store no longer holds, as after it was deleted."""
    grace_seconds: Annotated[int, at_least(2)]
    """Seconds without a sign of life from its process after which a trial is closed and tried again, 2 or more."""

    def _check(self) -> None:
        for name, value in self.pruner_options.items():
            takes = "a number, auto or null" if name.endswith("_resource") else "a number or null"
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            is_auto = value == "auto" and name.endswith("_resource")
            require(value is None or is_number or is_auto, f"sweep.pruner_options.{name}", takes, value)


@dataclass(frozen=True)
class AppSettings(TrialSettings):
    """The whole configuration of `python -m distilbench.train`."""

    tracking: TrackingSettings
    baseline: BaselineSettings
    sweep: SweepSettings
    margin: Annotated[float, MARGIN]
    """Points of accuracy that a treatment may cost and still count as good enough; above 0, up to 100."""

    def _check(self) -> None:
        super()._check()
        require(self.output.save_model or self.tracking.log_model == "never", "tracking.log_model",
                "never with output.save_model=false", self.tracking.log_model)  # fmt: skip

    @property
    def trial(self) -> TrialSettings:
        """The part that an engine sees."""
        return TrialSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrialSettings)})


FORMATS = ("html", "markdown", "latex", "csv")


@dataclass(frozen=True)
class CompareSettings(Checked):
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
    margin: Annotated[Optional[float], MARGIN]
    """Points of accuracy that a treatment may cost and still count as good enough; null is the sweep's own, or train's
    default."""
    untested: Annotated[str, one_of(("refuse", "show"))]
    """refuse | show: what becomes of finished trials whose predictions are missing."""
    layout: Annotated[str, one_of(("full", "paper"))]
    """full | paper: all columns, or those of the course report's table."""
    rows: Annotated[int, at_least(1)]
    """Settings that are tested and shown, best first, 1 or more; the correction counts the others too."""
    formats: Annotated[list[str], one_of(FORMATS, each=True)]
    """Files to write: html, markdown, latex, csv."""
    output: Annotated[Optional[str], PathIf()]
    """Folder of those files; null is outputs/reports/<what was asked for>."""
    tracking: TrackingSettings

    def _check(self) -> None:
        given = self.sweep or self.runs or self.experiments
        require(bool(given), "what to compare", "sweep=NAME, runs=[ID,...] or experiment=NAME,...", "nothing",
                "add one of them")  # fmt: skip


WITHOUT_PATH = Rule("a name without a path in it", lambda name: not re.search(r"[/\\\0]|^\.\.?$", name))


@dataclass(frozen=True)
class ConfirmSettings(Checked):
    """The whole configuration of `python -m distilbench.confirm`."""

    sweep: Annotated[Optional[str], WITHOUT_PATH]
    """Name of the sweep whose best settings are trained again."""
    top: Annotated[int, at_least(1)]
    """How many of them, 1 or more."""
    seeds: Annotated[
        Union[int, str], Rule("auto, or 2 or more", lambda n: n == "auto" or (isinstance(n, int) and n > 1))
    ]
    """Fresh seeds for each, and for the baseline, 2 or more; auto is as many as show, with a chance of 80 %, that a
    setting which loses nothing loses less than the margin."""
    margin: Annotated[Optional[float], MARGIN]
    """Points of accuracy that a treatment may cost and still count as good enough; null is the sweep's own."""
    name: Annotated[Optional[str], WITHOUT_PATH]
    """Name of the confirmation, a sweep of its own; null is `<sweep>-confirm`."""
    output: Annotated[Optional[str], PathIf()]
    """Its folder; null is outputs/sweeps/<name>."""
    dry_run: bool
    """Say what would be trained and how long it would take, and train nothing."""
    tracking: TrackingSettings

    def _check(self) -> None:
        require(bool(self.sweep), "sweep", "the name of a sweep", self.sweep, "add sweep=NAME")


@dataclass(frozen=True)
class PredictDataSettings(Checked, group="data"):
    """The texts that a model is asked about; what is null the model says itself, as it was trained."""

    test: str
    """A CSV, TSV, JSON, JSONL or Parquet file, or the name of a split of a data set of the hub."""
    hub_name: Optional[str]
    """Data set id on the hub that has the split; null is the one that the model was trained on."""
    hub_config: Optional[str]
    """Configuration of the hub data set, where it has several."""
    revision: Optional[str]
    """Hub branch, tag or commit; null takes the default branch."""
    text_column: Optional[str]
    """Column that holds the text; null is the one that the model was trained on, else text."""
    pair_column: Optional[str]
    """Column that holds the second text of a pair; null is the one that the model was trained on, if any."""


@dataclass(frozen=True)
class PredictSettings(Checked):
    """The whole configuration of `python -m distilbench.predict`; one of the first three names the model."""

    run: Optional[str]
    """Id of a trial's run."""
    dir: Annotated[Optional[str], PathIf()]
    """Directory of a model of Transformers with a classification head, such as model/ of a trial's directory."""
    sweep: Optional[str]
    """Name of a sweep, of which `best` picks the trial."""
    best: Annotated[str, one_of(("answer", "accuracy"))]
    """answer | accuracy: the sweep's answer (its baseline where no setting is shown to be good enough), or the trial
    with the best accuracy by which the sweep chooses."""
    data: PredictDataSettings
    output: Annotated[str, PathIf()]
    """File to write: CSV, TSV, JSONL or Parquet by its ending; format=glue takes a folder too."""
    format: Annotated[str, one_of(("table", "glue"))]
    """table | glue: texts, labels and probabilities, or GLUE's submission files (SST-2.tsv: index, prediction)."""
    batch_size: Annotated[int, at_least(1)]
    """Texts a batch, 1 or more; changes speed only."""
    device: Annotated[str, DEVICE]
    """auto | cpu | cuda | cuda:NUMBER | mps; auto takes CUDA, else MPS, else the CPU."""
    tracking: TrackingSettings

    def _check(self) -> None:
        given = [name for name in ("run", "dir", "sweep") if getattr(self, name)]
        require(len(given) == 1, "what predicts", "one of run=ID, dir=PATH and sweep=NAME",
                " and ".join(given) or "none", "name one model")  # fmt: skip
        require(self.dir is None or Path(self.dir).is_dir(), "dir", "an existing directory", self.dir,
                "give the folder that holds config.json and model.safetensors")  # fmt: skip
        require(self.best == "answer" or self.sweep is not None, "best", "answer without sweep=NAME", self.best)


BENCH_WINDOW = 8
"""Steps of a benchmark come in multiples of this: engines may run parts of so many steps ahead."""


@dataclass(frozen=True)
class BenchSettings(Checked, group="bench"):
    """What a benchmark measures: short runs, each in a process of its own, interleaved and repeated."""

    trials: Annotated[int, at_least(2)]
    """Trials of the fused batch, 2 or more; they differ in learning rate and weight decay."""
    steps: Annotated[int, Rule(f"a multiple of {BENCH_WINDOW}", lambda n, of=BENCH_WINDOW: n > 0 and n % of == 0)]
    """Optimisation steps that are timed in each run, after 8 that are not; a multiple of 8."""
    eval_examples: Annotated[int, at_least(1)]
    """Examples of the selection split that each run evaluates, 1 or more."""
    repeats: Annotated[int, at_least(1)]
    """Times that each row is measured, 1 or more."""
    processes: Annotated[int, Rule("0, or 2 or more", lambda count: count == 0 or count >= 2)]
    """Tuned Trainers that share the device as one more row, each in a process of its own; 0 for none, or 2 or more."""


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
    from omegaconf.errors import ConfigKeyError, InterpolationToMissingValueError, MissingMandatoryValue

    try:
        nodes = {f.name: config[f.name] for f in dataclasses.fields(kind)}
        values = OmegaConf.to_container(OmegaConf.create(nodes, parent=config), resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, InterpolationToMissingValueError, ConfigKeyError) as error:
        raise SettingsError(f"{error.full_key} must be given, got nothing; add {error.full_key}=...") from None
    return _build(kind, values)


def _build(cls: Any, values: Any) -> Any:
    """Make the dataclass ``cls`` from nested dicts; paths become absolute."""
    hints, marks, made = get_type_hints(cls), _marks(cls), dict(values)
    for name, value in values.items():
        known = name in hints  # ++optim.lrr=1 adds what no schema has
        require(known, getattr(cls, "_prefix", "") + name, "a setting that there is", value, "--help lists them")
        if value is None:
            continue
        if nested := _dataclass_in(hints[name]):
            require(isinstance(value, dict), getattr(cls, "_prefix", "") + name, "null or settings of its own", value,
                    "conf/ shows one")  # fmt: skip
            made[name] = _build(nested, value)
        elif any(isinstance(m, PathIf) and m.source in (None, values.get("source")) for m in marks.get(name, ())):
            made[name] = str(typed_in() / Path(value).expanduser())
        elif DATABASE in marks.get(name, ()):
            made[name] = with_absolute_file(value)
        elif AS_TYPED in marks.get(name, ()):
            made[name] = [spelled(one) for one in value]
    return cls(**made)


def typed_in() -> Path:
    """Return the directory in which the command was typed, wherever Hydra has gone since (hydra.job.chdir)."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()


def with_absolute_file(url: str) -> str:
    """Return a database's URL, its file absolute where it is one of SQLite (``sqlite:///my.db``)."""
    here = quote(typed_in().as_posix().rstrip("/"))
    return re.sub("^sqlite:///(?=[^/:$])", lambda _: f"sqlite:///{here}/", url)


def spelled(value: object) -> str | None:
    """Return a value as it is typed on the command line, which takes ``true`` and ``1`` for more than words."""
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def names_of(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings in ``cls``; a fallback, another whole group of sources, counts as one."""
    names: list[str] = []
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        nested = _dataclass_in(hints[f.name])
        names += names_of(nested, f"{prefix}{f.name}.") if nested and nested is not cls else [f"{prefix}{f.name}"]
    return names


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass that ``hint`` is, or is optionally; None for any other type."""
    return next((t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)), None)


@cache  # whatever registers it again, what was composed before stays of the same types
def _schema(cls: Any, inside: tuple[Any, ...] = ()) -> Any:
    """Make a mutable twin of ``cls``: nodes of frozen dataclasses are read-only, even while Hydra composes."""
    fields = []
    for f in dataclasses.fields(cls):
        hint = get_type_hints(cls)[f.name]
        nested = _dataclass_in(hint)
        if nested in (cls, *inside) or AS_TYPED in _marks(cls).get(f.name, ()):
            hint = Any
        elif nested:
            hint = _schema(nested, (cls, *inside))
        default = f.default if f.default is not dataclasses.MISSING else "???"
        fields.append((f.name, hint, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def register_schema(app: type[AppSettings] = AppSettings) -> None:
    """Register the schemas that the main configurations in ``conf/`` build on; ``app`` is that of ``config.yaml``."""
    from hydra.core.config_store import ConfigStore

    kinds = {"schema": app, "compare_schema": CompareSettings, "confirm_schema": ConfirmSettings,
             "predict_schema": PredictSettings}  # fmt: skip
    for name, kind in kinds.items():
        ConfigStore.instance().store(name=name, node=_schema(kind), replace=True)
