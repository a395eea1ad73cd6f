"""All settings as frozen dataclasses with range checks, and the schema that Hydra composes into.

Values live in ``conf/*.yaml``; this module states what each key means and which values it may take.
:func:`settings_from` converts a composed config.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional, TypeVar, Union, get_args, get_type_hints, overload
from urllib.parse import quote

_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()
"""The root of the checkout; for an installed package, the current directory."""
os.environ["DISTILBENCH_ROOT"] = os.path.abspath(os.environ.get("DISTILBENCH_ROOT") or CHECKOUT)  # conf/ reads it
CONF = _PACKAGE.parent / "conf" if (_PACKAGE.parent / "conf").is_dir() else _PACKAGE / "conf"
"""The configuration groups: next to the package in a checkout, inside it if installed."""

METRICS = ("accuracy", "f1", "mcc", "loss")
ADAPTERS = ("none", "lora", "ia3")
FREEZE_POLICIES = ("depth", "head", "bias", "gradual", "scheduled", "auto")
DATA_SOURCES = ("hub", "files", "tweets", "synthetic")
ENGINES = ("auto", "trainer", "fused")
PRUNERS = ("none", "median", "percentile", "patient", "successive_halving", "hyperband", "threshold", "wilcoxon")
OBJECTIVES = (*METRICS, "train_seconds", "train_flops", "cost", "trainable_parameters")
"""What a sweep may optimise: accuracy, f1 and mcc are maximised, the others minimised."""
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt")  # fmt: skip
"""Schedules of ``transformers.get_scheduler`` that need no further arguments and depend only on the step."""


def root() -> Path:
    """Return the directory of outputs/, mlruns/ and mlflow.db: ``DISTILBENCH_ROOT``, by default :data:`CHECKOUT`."""
    return Path(os.environ["DISTILBENCH_ROOT"])


class SettingsError(ValueError):
    """An error that the user can fix; the message is one line: setting, allowed values, value received, remedy."""


def require(condition: bool, setting: str, allowed: str, value: object, remedy: str = "") -> None:
    """Raise :class:`SettingsError` ``<setting> must be <allowed>, got <value>; <remedy>`` unless ``condition``."""
    if not condition:
        shown = repr(value) if isinstance(value, str) else cli_string(value) or "null"
        shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
        raise SettingsError(f"{setting} must be {allowed}, got {shown}" + (f"; {remedy}" if remedy else ""))


@dataclass(frozen=True)
class Rule:
    """The allowed values of a setting, in words and as a predicate."""

    allowed: str
    is_valid: Callable[[Any], bool]


def one_of(allowed: Sequence[str]) -> Rule:
    """Allow these strings."""
    return Rule("one of " + ", ".join(allowed), allowed.__contains__)


def at_least(low: float) -> Rule:
    """Allow finite numbers >= ``low``."""
    return Rule(f"{low} or more", lambda value: math.isfinite(value) and value >= low)


ABOVE_ZERO = Rule("above 0", lambda value: 0 < value < math.inf)
DISTINCT = Rule("null or a list of different values", lambda values: 0 < len(set(values)) == len(values))


def in_interval(interval: str) -> Rule:
    """Allow the numbers of an interval in mathematical notation: ``[0, 1)`` includes 0 but not 1."""
    low, high = map(float, interval[1:-1].split(","))
    ends = {end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "[]"}
    return Rule(f"in {interval}", lambda value: low < value < high or value in ends)


def matching(allowed: str, pattern: str, most: int) -> Rule:
    """Allow strings that match ``pattern`` and have at most ``most`` bytes in UTF-8."""
    return Rule(allowed, lambda value: len(value.encode()) <= most and bool(re.fullmatch(pattern, value, re.DOTALL)))


def original_cwd() -> Path:
    """Return the directory in which the command was typed, which Hydra may have left since (hydra.job.chdir)."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()


def absolute_path(path: str) -> str:
    """Return a path relative to where the command was typed as an absolute one."""
    return str(original_cwd() / Path(path).expanduser())


def with_absolute_file(url: str) -> str:
    """Return a database's URL; a relative SQLite file (``sqlite:///my.db``) becomes absolute."""
    here = quote(original_cwd().as_posix().rstrip("/"))
    return re.sub("^sqlite:///(?=[^/:$])", lambda _: f"sqlite:///{here}/", url)


def cli_string(value: object) -> str | None:
    """Return a value as a string, spelled as on the command line (``true``, not ``True``); None stays None."""
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Converted:
    """Converts a typed value once it is composed; with ``source``, only in settings of that source."""

    convert: Callable[[Any], Any]
    source: str | None = None


PATH = Converted(absolute_path)
STRINGS = Converted(lambda names: list(map(cli_string, names)))
"""For a list of strings that Hydra would parse as other types: ``true`` and ``1`` are names here."""
MARGIN = in_interval("(0, 100]")
LABEL_NAMES = Rule("2 or more distinct names", lambda names: 1 < len(set(names) - {None}) == len(names))
DEVICE = matching("auto, cpu, cuda, cuda:NUMBER or mps", r"auto|cpu|cuda(:\d+)?|mps", 20)
REGISTERED = matching("NAME or NAME@ALIAS (MLflow keeps latest and v1 for itself)",
                      r"(?=\s*[^\s@])[^/:@]+(@(?!(?i:latest|v\d+)\Z)[\w-]+)?", 256)  # fmt: skip

MODEL_FOLDER = "give the folder that holds config.json and model.safetensors"


_hints: Any = cache(get_type_hints)  # 0.2 ms a class, for every point of a sweep


@cache
def _marks(cls: Any) -> dict[str, tuple[Any, ...]]:
    """Return the ``Annotated`` metadata of a dataclass's fields, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__ for name, hint in hints.items() if hasattr(hint, "__metadata__")}


@dataclass(frozen=True)
class Checked:
    """Settings that are validated on creation: the :class:`Rule` of each field (null passes), then :meth:`_check`."""

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, group: str = "") -> None:
        cls._prefix = f"{group}." if group else ""

    def __post_init__(self) -> None:
        for name, marks in _marks(type(self)).items():  # type: ignore[arg-type]  # mypy takes no dataclass for Hashable
            value = getattr(self, name)
            for rule in marks:
                if isinstance(rule, Rule) and value is not None:
                    self._require(rule.is_valid(value), name, rule.allowed)
        self._check()

    def _check(self) -> None:
        """Raise :class:`SettingsError` for fields that contradict each other."""

    def _require(self, condition: bool, name: str, allowed: str, remedy: str = "") -> None:
        """Raise :class:`SettingsError` about the value of the field ``name``, which may be dotted."""
        require(condition, self._prefix + name, allowed, attrgetter(name)(self), remedy)


@dataclass(frozen=True)
class ModelSettings(Checked, group="model"):
    """Where the initial weights and the tokenizer come from."""

    source: Annotated[str, one_of(("hub", "package", "local", "random"))]
    """hub | package | local | random."""
    checkpoint: Annotated[str, Converted(absolute_path, "local"), Rule("a name or a path", bool)]
    """Hub id (hub), directory (local), distribution name (package), or architecture such as distilbert (random)."""
    revision: Optional[str] = None
    """Hub branch, tag or commit; null takes the default branch. The commit used is recorded."""
    layers: Optional[int] = None
    """Number of encoder layers of a random model (1 or more); null for other sources."""
    fallback: Optional[ModelSettings] = None
    """Used, with a warning, if the hub can't be reached and nothing is cached; null raises an error instead."""

    def _check(self) -> None:
        if self.source == "local":
            self._require(Path(self.checkpoint).is_dir(), "checkpoint", "an existing directory", MODEL_FOLDER)
        if self.source == "random":
            self._require((self.layers or 0) >= 1, "layers", "1 or more for a random model")
        else:
            remedy = "a model that is loaded has the layers that it has"
            self._require(self.layers is None, "layers", f"null with model.source={self.source}", remedy)


@dataclass(frozen=True)
class DataSettings(Checked, group="data"):
    """Where text and labels come from, how they are split, and how many examples are used."""

    source: Annotated[str, one_of(DATA_SOURCES)]
    """hub | files | tweets | synthetic."""
    hub_name: Optional[str] = None
    """Data set id on the hub (source=hub)."""
    hub_config: Optional[str] = None
    """Configuration of the hub data set, if it has several."""
    revision: Optional[str] = None
    """Hub branch, tag or commit; null takes the default branch. The commit used is recorded."""
    train: Annotated[Optional[str], Converted(absolute_path, "files")] = None
    """Training split: its name (hub) or a CSV, TSV, JSON, JSONL or Parquet file (files)."""
    validation: Annotated[Optional[str], Converted(absolute_path, "files")] = None
    """Validation split or file; null splits `validation_fraction` off train, stratified and seeded. `one+another`
    combines several hub splits, which are then also reported as slices."""
    text_column: Optional[str] = None
    """Column that holds the text."""
    pair_column: Optional[str] = None
    """Column that holds a second text, encoded with the first as a pair; null means single texts."""
    label_column: Optional[str] = None
    """Column that holds the label."""
    slice_column: Optional[str] = None
    """Column, such as the origin of a text, by whose values results are also reported; null means no slices."""
    label_names: Annotated[Optional[list[str]], STRINGS, LABEL_NAMES] = None
    """Names of the labels, in the order of their numbers; null takes them from the data."""
    validation_fraction: Annotated[float, in_interval("(0, 1)")] = 0.1
    """Share of train used for validation if `validation` is null, in (0, 1)."""
    selection_fraction: Annotated[float, in_interval("[0, 1)")] = 0.0
    """Share of train split off to pick epochs and winners, in [0, 1); 0 uses validation, as in the course report."""
    report_fraction: Annotated[float, in_interval("[0, 1)")] = 0.0
    """Share of train split off only to report on, in [0, 1), if validation is small; validation then picks epochs and
    winners, and `selection_fraction` must be 0."""
    split_seed: int = 0
    """Seed of every split taken from train and of the examples drawn; unlike `seed`, part of the protocol, and also of
    the treatment if `max_train_examples` is given."""
    max_train_examples: Annotated[Optional[int], at_least(1)] = None
    """Maximum number of training examples, 1 or more, drawn stratified with `split_seed`; a smaller number gives a
    subset of a larger one; null uses all."""
    max_validation_examples: Annotated[Optional[int], at_least(1)] = None
    """Maximum number of validation examples, 1 or more, drawn in the same way; null uses all."""
    fallback: Optional[DataSettings] = None
    """Used, with a warning, if the hub can't be reached and nothing is cached; null raises an error instead."""

    def _check(self) -> None:
        source, existing = self.source, "an existing CSV, TSV, JSON, JSONL or Parquet file"
        self._require(source != "hub" or bool(self.hub_name), "hub_name", "the id of a data set on the hub")
        if source == "files":
            for name in ("train", "text_column", "label_column"):
                self._require(bool(getattr(self, name)), name, "given with data=files", f"add data.{name}=...")
        for name, given in (("train", self.train), ("validation", self.validation)):
            if source == "files":
                self._require(given is None or Path(given).is_file(), name, existing, "check the path")
            else:  # it would be ignored, or sought on the hub
                self._require(
                    not Path(given or "").suffix, name, f"no file with data.source={source}", "add data=files"
                )
        columns = [name for name in (self.text_column, self.pair_column, self.label_column) if name is not None]
        require(len(set(columns)) == len(columns), "data.text_column, data.pair_column and data.label_column",
                "columns of their own", ", ".join(columns))  # fmt: skip
        for name in ("pair_column", "slice_column"):
            is_usable = source in ("hub", "files") or getattr(self, name) is None
            self._require(is_usable, name, f"null with data.source={source}")
        self._require(not (self.selection_fraction and self.report_fraction), "selection_fraction",
                      "0 with data.report_fraction, where validation picks")  # fmt: skip


@dataclass(frozen=True)
class FreezeSettings(Checked, group="freeze"):
    """Which parameters are frozen."""

    layers: Annotated[int, at_least(0)]
    """Freezes encoder layers 0..layers-1: 0 freezes none, the model's depth all of them."""
    embeddings: Annotated[Union[bool, str], Rule("auto, true or false", (True, False, "auto").__contains__)]
    """auto (frozen if `layers` > 0, or by the policies head and bias) | true | false."""
    dropout: bool
    """Whether dropout stays active in the frozen part, as in the report."""
    policy: Annotated[str, one_of(FREEZE_POLICIES)]
    """Fixed: depth (freezes `embeddings` and `layers`) | head (trains only the classifier) | bias (trains only biases
    and the classifier: BitFit). Changing at each evaluation: gradual (trains the head, then one more layer each time,
    from the top) | scheduled (freezes more, up to `layers`) | auto (freezes where gradient norms change least)."""

    def _check(self) -> None:
        given = f"with freeze.policy={self.policy}, which says what is frozen"
        if self.policy == "scheduled":
            self._require(self.layers >= 1, "layers", "1 or more with freeze.policy=scheduled")
        elif self.policy != "depth":
            self._require(self.layers == 0, "layers", f"0 {given}")
        self._require(self.policy == "depth" or self.embeddings == "auto", "embeddings", f"auto {given}")
        has_choice = self.dropout or self.policy in ("depth", "head")
        self._require(has_choice, "dropout", f"true with freeze.policy={self.policy}")

    @property
    def is_dynamic(self) -> bool:
        """Whether what is frozen changes at evaluations."""
        return self.policy in ("gradual", "scheduled", "auto")

    @property
    def min_parts(self) -> int:
        """The fewest parts between evaluations for anything to change; auto must compare two parts first."""
        return 3 if self.policy == "auto" else 2

    @property
    def freezes_embeddings(self) -> bool:
        """`embeddings` with auto resolved."""
        frozen = self.layers > 0 or self.policy in ("head", "bias")
        return frozen if self.embeddings == "auto" else bool(self.embeddings)

    def deterministic_layers(self, depth: int) -> int:
        """Return how many of `depth` encoder layers, from the bottom, have no dropout."""
        return 0 if self.dropout else depth if self.policy == "head" else self.layers


@dataclass(frozen=True)
class AdapterSettings(Checked, group="adapter"):
    """The peft adapter that is trained with the classifier, while the encoder is frozen."""

    name: Annotated[str, one_of(ADAPTERS)]
    """none | lora | ia3."""
    rank: Annotated[Optional[int], at_least(1)]
    """LoRA's rank, from 1 to the model's width; null for other adapters."""
    alpha: Annotated[Optional[float], ABOVE_ZERO]
    """LoRA's alpha, above 0: the update is scaled by alpha / rank; null for other adapters."""
    dropout: Annotated[Optional[float], in_interval("[0, 1)")]
    """Dropout probability on the input of LoRA's matrices, in [0, 1); null for other adapters."""
    merge: bool
    """Whether to save, besides `adapter/` for peft, also `model/` with the adapter merged, for plain Transformers."""

    def _check(self) -> None:
        is_lora = self.name == "lora"
        for name in ("rank", "alpha", "dropout"):
            allowed = f"{'a number' if is_lora else 'null'} with adapter.name={self.name}"
            self._require((getattr(self, name) is not None) == is_lora, name, allowed)


@dataclass(frozen=True)
class SchedulerSettings(Checked, group="scheduler"):
    """The learning-rate schedule over the steps of a trial."""

    name: Annotated[str, one_of(SCHEDULERS)]
    """linear | cosine | cosine_with_restarts | polynomial | constant | constant_with_warmup | inverse_sqrt."""
    warmup_ratio: Annotated[float, in_interval("[0, 1]")]
    """Share of all steps used for warm-up, in [0, 1]; rounded up to whole steps as in transformers."""
    warmup_steps: Annotated[Optional[int], at_least(0)]
    """Number of warm-up steps, 0 or more; null or 0 means `warmup_ratio` decides."""

    def _check(self) -> None:
        self._require(not self.warmup_steps or self.warmup_ratio == 0, "warmup_ratio",
                      f"0 when scheduler.warmup_steps={self.warmup_steps} is given", "set one of the two")  # fmt: skip
        fits = self.name != "constant" or not (self.warmup_ratio or self.warmup_steps)
        allowed = "a schedule that warms up when a warm-up is given"
        self._require(fits, "name", allowed, "use scheduler=constant_with_warmup")

    def warmup(self, steps: int) -> int:
        """Return the warm-up steps of ``steps`` steps, rounded up as in ``TrainingArguments.get_warmup_steps``."""
        return self.warmup_steps or math.ceil(steps * self.warmup_ratio)


@dataclass(frozen=True)
class OptimSettings(Checked, group="optim"):
    """The optimizer and gradient clipping."""

    name: Annotated[str, one_of(("adamw", "sgd"))]
    """adamw | sgd."""
    lr: Annotated[float, ABOVE_ZERO]
    """Peak learning rate, above 0."""
    weight_decay: Annotated[float, at_least(0)]
    """Weight decay, 0 or more: decoupled for adamw, L2 for sgd; not applied to biases and LayerNorm."""
    max_grad_norm: Annotated[float, at_least(0)]
    """Maximum gradient norm for clipping, 0 or more; 0 turns clipping off."""
    beta1: Annotated[float, in_interval("[0, 1)")]
    """AdamW's decay rate of the first moment, in [0, 1)."""
    beta2: Annotated[float, in_interval("[0, 1)")]
    """AdamW's decay rate of the second moment, in [0, 1)."""
    eps: Annotated[float, at_least(0)]
    """AdamW's epsilon, 0 or more: added to the denominator."""
    momentum: Annotated[float, in_interval("[0, 1)")]
    """SGD's momentum, in [0, 1)."""
    layer_decay: Annotated[float, in_interval("(0, 1]")]
    """Layer-wise decay, in (0, 1]: each layer's learning rate is this times that of the layer above; the head has `lr`,
    the embeddings have the lowest rate."""


@dataclass(frozen=True)
class TrainSettings(Checked, group="train"):
    """Length of training, batches, evaluations and checkpoints."""

    epochs: Annotated[int, at_least(1)]
    """Passes over the training examples, 1 or more."""
    batch_size: Annotated[int, at_least(1)]
    """Examples per step, 1 or more; the last batch of an epoch may be smaller."""
    micro_batch_size: Annotated[Optional[int], at_least(1)]
    """Gradient accumulation: examples per forward and backward pass, a divisor of `batch_size`; null uses the whole
    batch. Reduced automatically if memory runs out; affects only memory and speed."""
    eval_batch_size: Annotated[int, at_least(1)]
    """Examples per evaluation batch, 1 or more; affects only speed."""
    max_length: Annotated[int, at_least(3)]
    """Maximum input length in tokens, including [CLS] and [SEP], 3 or more; longer inputs are truncated."""
    precision: Annotated[str, one_of(("auto", "fp32", "bf16", "fp16"))]
    """auto | fp32 | bf16 | fp16; auto means bf16 on CUDA devices that support it, otherwise fp32."""
    metric: Annotated[str, one_of(METRICS)]
    """accuracy | f1 | mcc | loss: the metric that picks the best epoch; part of the protocol."""
    eval_steps: Annotated[Optional[int], at_least(1)]
    """Steps between evaluations, 1 or more; null evaluates after each epoch."""
    patience: Annotated[Optional[int], at_least(1)]
    """Early stopping after this many evaluations in a row without a better `metric`, 1 or more; null never stops."""
    label_smoothing: Annotated[float, in_interval("[0, 1)")]
    """Share of each training target that is spread over all labels, in [0, 1); evaluations are not affected."""
    class_weights: Annotated[str, one_of(("none", "balanced"))]
    """none | balanced: weight of each example's training loss; balanced is examples / (labels x examples of its
    label)."""
    logging_steps: Annotated[int, at_least(1)]
    """Steps between logged values of loss, learning rate and gradient norm, 1 or more."""
    checkpoints: bool
    """Whether to save a checkpoint at each evaluation, for resuming; deleted when the trial finishes."""
    resume: bool
    """Whether to continue an interrupted trial of the same settings from its last checkpoint in `output.dir`."""

    def _check(self) -> None:
        divides = self.batch_size % self.examples_per_pass == 0
        self._require(divides, "micro_batch_size", f"a divisor of train.batch_size={self.batch_size}")

    @property
    def examples_per_pass(self) -> int:
        """`micro_batch_size` with null resolved."""
        return self.micro_batch_size or self.batch_size

    def smaller_micro_batch(self, size: int) -> Optional[int]:
        """Return the largest divisor of `batch_size` that is at most half of `size`; None if `size` is 1."""
        return next((part for part in range(size // 2, 0, -1) if self.batch_size % part == 0), None)


@dataclass(frozen=True)
class EngineSettings(Checked, group="engine"):
    """What trains the trial; affects speed, never results beyond rounding."""

    name: Annotated[str, one_of(ENGINES)]
    """trainer (Hugging Face Trainer) | fused (trains several trials at once; DistilBERT's and BERT's architecture) |
    auto (fused on a CPU or CUDA device if it supports the model and the precision, otherwise trainer)."""
    device: Annotated[str, DEVICE]
    """auto | cpu | cuda | cuda:NUMBER (counted within CUDA_VISIBLE_DEVICES) | mps; auto takes CUDA, else MPS, else the
    CPU. Always exactly one device."""


@dataclass(frozen=True)
class OutputSettings:
    """Where a trial writes, and what it keeps."""

    dir: Annotated[str, PATH]
    """The trial's directory; by default Hydra's output directory."""
    save_model: bool
    """Whether to save the best epoch's model and tokenizer in `model/` of that directory."""


@dataclass(frozen=True)
class TrialSettings(Checked):
    """The settings of one trial; the values in `conf/` are those of the course report's baseline."""

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
    """Seed of the initial head and adapter, of dropout and of the order of examples; 0 .. 2**32 - 1."""

    def _check(self) -> None:
        if self.adapter.name != "none":
            given = f"with adapter.name={self.adapter.name}, which leaves the encoder as it was"
            self._require(self.freeze.policy == "depth", "freeze.policy", f"depth {given}")
            self._require(self.freeze.layers == 0, "freeze.layers", f"0 {given}")
            self._require(not self.freeze.freezes_embeddings, "freeze.embeddings", f"auto {given}")
            self._require(self.freeze.dropout, "freeze.dropout", f"true {given}")
        if self.freeze.is_dynamic:
            fewest = self.freeze.min_parts
            allowed = f"{fewest} or more with freeze.policy={self.freeze.policy}, which moves at evaluations"
            has_parts = self.train.epochs >= fewest or self.train.eval_steps is not None
            self._require(has_parts, "train.epochs", allowed, "or set train.eval_steps")


@dataclass(frozen=True)
class TrackingSettings(Checked, group="tracking"):
    """Where trials are logged."""

    name: Annotated[str, one_of(("mlflow", "none"))]
    """mlflow | none."""
    uri: Annotated[Optional[str], Converted(with_absolute_file)]
    """MLflow tracking URI; null means MLFLOW_TRACKING_URI if set, otherwise mlflow.db in the project's root."""
    experiment: Annotated[Optional[str], matching("a name of at most 256 bytes", r".*\S.*", 256)]
    """Name of the MLflow experiment, at most 256 bytes; null means that of MLFLOW_EXPERIMENT_NAME or
    MLFLOW_EXPERIMENT_ID, otherwise distilbench."""
    patience_seconds: Annotated[float, at_least(0)]
    """Seconds (0 or more) to wait for an unreachable store: at the end of a trial or sweep, when a worker starts."""
    log_model: Annotated[str, one_of(("never", "best", "always"))] = "never"
    """never | best | always: which finished trials are logged as MLflow models, after training; best logs every trial
    outside of sweeps, but of a sweep only its answer, at its end."""
    register: Annotated[Optional[str], REGISTERED] = None
    """NAME or NAME@ALIAS: registers each logged model as a new version of this name in MLflow; null registers none."""

    def _check(self) -> None:
        is_logged = self.log_model != "never"
        self._require(self.register is None or is_logged, "register", "null with tracking.log_model=never",
                      "add tracking.log_model=best")  # fmt: skip
        self._require(self.name != "none" or not is_logged, "log_model", "never with tracking=none")
        if self.uri is not None and re.search(r"//[^/@\s]*:[^/@\s]*@", self.uri):
            raise SettingsError(
                "tracking.uri must not hold a password, since Hydra writes settings to disk; put the URI into "
                "MLFLOW_TRACKING_URI, or user and password into MLFLOW_TRACKING_USERNAME and _PASSWORD"
            )


@dataclass(frozen=True)
class BaselineSettings:
    """The trial that others are compared with."""

    overrides: list[str]
    """Hydra overrides that turn a trial's settings into its baseline's; group=choice replaces the whole group."""
    ensure: bool
    """Whether to train the baseline first if there is no finished one of the same protocol."""


SWEEP_NAME = matching("letters, digits and ._+- without a path, 200 bytes at most", r"\w[\w.+-]*", 200)
OF_OBJECTIVES = Rule("a list of " + ", ".join(OBJECTIVES), set(OBJECTIVES).issuperset)
COUNT_OR_SHARE = Rule("a whole number or a share below 1", lambda value: value < 1 or value % 1 == 0)


@dataclass(frozen=True)
class SweepSettings(Checked, group="sweep"):
    """How the trials of one ``--multirun`` are chosen, counted, pruned and retried."""

    name: Annotated[str, SWEEP_NAME]
    """Name of the study, the MLflow parent run and the directory; the same name continues the same sweep."""
    trials: Annotated[int, at_least(1)]
    """Total number of trials of an Optuna sweep, including earlier calls, 1 or more; a grid trains all of its cells."""
    baseline: bool
    """Whether to train the baseline first: as a trial of the sweep if it lies in the search space, else beside it."""
    objectives: Annotated[Optional[list[str]], OF_OBJECTIVES, DISTINCT]
    """What to optimise: accuracy, f1, mcc, loss (on the selection split), train_seconds, train_flops, cost (seconds if
    trials run alone, FLOPs if they share a device), trainable_parameters; null means `train.metric`. Several objectives
    give a Pareto front."""
    seeds: Annotated[Optional[list[int]], DISTINCT]
    """Trains every trial with each of these seeds; its objective is the mean over them. null uses only `seed`."""
    pruner: Annotated[str, one_of(PRUNERS)]
    """none | median | percentile | patient | successive_halving | hyperband | threshold | wilcoxon, as in Optuna."""
    pruner_options: dict[str, Any]
    """Arguments of Optuna's pruner, such as n_startup_trials: numbers (a resource may be auto); null means default."""
    max_failures: Annotated[Optional[float], at_least(0.0), COUNT_OR_SHARE]
    """How many failed trials a sweep tolerates: a count (0 or more) or a share of its trials (below 1); null: any."""
    timeout_minutes: Annotated[Optional[float], at_least(0)]
    """Minutes after which no new trial starts, 0 or more; null means no limit."""
    dry_run: bool
    """Whether to print only what would be trained and how long it would take."""
    max_grid: Annotated[int, at_least(1)]
    """Maximum number of grid cells, 1 or more; raise it to confirm a larger grid."""
    warm_start: Annotated[Optional[str], SWEEP_NAME]
    """Name of an earlier sweep of the same protocol and objectives; a new Optuna study starts with those of its
    finished trials that lie in the search space. null means none."""
    on_change: Annotated[str, one_of(("refuse", "extend"))]
    """refuse | extend: what happens if a sweep is continued with another search space. extend allows other bounds of a
    range, and added or removed dimensions. Optuna requires that lists keep their values and ranges their kind. Fixed
    settings must stay the same; more trials are always allowed."""
    retry_failed: bool
    """Whether to train failed trials of a continued sweep again, except DIVERGED ones, which would diverge again."""
    retry_lost: bool
    """Whether to train trials of a continued sweep again if their runs are gone, e.g. because mlflow.db was deleted."""
    grace_seconds: Annotated[int, at_least(2)]
    """Seconds without a heartbeat from its process after which a trial is closed and tried again, 2 or more."""

    def _check(self) -> None:
        for name, value in self.pruner_options.items():
            takes = "a number, auto or null" if name.endswith("_resource") else "a number or null"
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            is_auto = value == "auto" and name.endswith("_resource")
            require(value is None or is_number or is_auto, f"sweep.pruner_options.{name}", takes, value)


@dataclass(frozen=True)
class AppSettings(TrialSettings):
    """The configuration of `python -m distilbench.train`."""

    tracking: TrackingSettings
    baseline: BaselineSettings
    sweep: SweepSettings
    margin: Annotated[float, MARGIN]
    """Loss of accuracy, in percentage points, at which a treatment is still good enough; above 0, up to 100."""

    def _check(self) -> None:
        super()._check()
        is_possible = self.output.save_model or self.tracking.log_model == "never"
        self._require(is_possible, "tracking.log_model", "never with output.save_model=false")

    @property
    def trial(self) -> TrialSettings:
        """The part that an engine needs."""
        return TrialSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrialSettings)})


@dataclass(frozen=True)
class CompareSettings(Checked):
    """The configuration of `python -m distilbench.compare`; the first four keys select trials that match all given."""

    sweep: Optional[str]
    """Name of a sweep; null means any."""
    runs: list[str]
    """Ids of runs; an empty list means any."""
    experiments: list[str]
    """Names of files in conf/experiment/ (typed experiment=a,b): selects the runs that have these settings."""
    protocol: Optional[str]
    """Id of a protocol, needed if the selected trials have several; null means any."""
    baseline: Optional[str]
    """Id of the baseline's run (of any seed); null finds the baseline; none compares without one."""
    margin: Annotated[Optional[float], MARGIN]
    """Loss of accuracy, in percentage points, at which a treatment is still good enough; null is the sweep's own
    margin, or train's default."""
    untested: Annotated[str, one_of(("refuse", "show"))]
    """refuse | show: what happens to finished trials whose predictions are missing."""
    layout: Annotated[str, one_of(("full", "paper"))]
    """full | paper: all columns, or those of the course report's table."""
    rows: Annotated[int, at_least(1)]
    """How many settings to test and show, best first, 1 or more; the correction for multiple tests counts all."""
    output: Annotated[Optional[str], PATH]
    """Folder for the files; null is outputs/reports/NAME, named after the sweep, the experiments or the runs."""
    tracking: TrackingSettings

    def _check(self) -> None:
        given = self.sweep or self.runs or self.experiments
        require(bool(given), "what to compare", "sweep=NAME, runs=[ID,...] or experiment=NAME,...", "nothing",
                "add one of them")  # fmt: skip


@dataclass(frozen=True)
class ConfirmSettings(Checked):
    """The configuration of `python -m distilbench.confirm`."""

    sweep: Annotated[Optional[str], SWEEP_NAME]
    """Name of the sweep whose best settings are trained again; required."""
    top: Annotated[int, at_least(1)]
    """How many of its best settings to train, 1 or more."""
    seeds: Annotated[
        Union[int, str], Rule("auto, or 2 or more", lambda n: n == "auto" or (isinstance(n, int) and n > 1))
    ]
    """Number of fresh seeds for each setting and the baseline, 2 or more; auto takes as many as give a power of 80 %
    to show that a setting that loses nothing is within the margin."""
    margin: Annotated[Optional[float], MARGIN]
    """Loss of accuracy, in percentage points, at which a treatment is still good enough; null is the sweep's own."""
    name: Annotated[Optional[str], SWEEP_NAME]
    """Name of the confirmation, which is a sweep of its own; null is `<sweep>-confirm`."""
    output: Annotated[Optional[str], PATH]
    """Folder of the confirmation; null is outputs/sweeps/<name>."""
    dry_run: bool
    """Whether to print only what would be trained and how long it would take."""
    tracking: TrackingSettings

    def _check(self) -> None:
        self._require(bool(self.sweep), "sweep", "the name of a sweep", "add sweep=NAME")


@dataclass(frozen=True)
class PredictDataSettings(Checked, group="data"):
    """The texts to predict; null means what the model was trained on."""

    test: str
    """A CSV, TSV, JSON, JSONL or Parquet file, or the name of a split of a hub data set."""
    hub_name: Optional[str]
    """Id of the hub data set that has the split; null is the one that the model was trained on."""
    hub_config: Optional[str]
    """Configuration of the hub data set, if it has several."""
    revision: Optional[str]
    """Hub branch, tag or commit; null takes the default branch."""
    text_column: Optional[str]
    """Column that holds the text; null is the one that the model was trained on, otherwise text."""
    pair_column: Optional[str]
    """Column that holds the second text of a pair; null is the one that the model was trained on, if any."""


@dataclass(frozen=True)
class PredictSettings(Checked):
    """The configuration of `python -m distilbench.predict`; exactly one of the first three keys names the model."""

    run: Optional[str]
    """Id of a trial's run."""
    dir: Annotated[Optional[str], PATH]
    """Directory of a Transformers model with a classification head, or of a trial that saved its model in model/."""
    sweep: Optional[str]
    """Name of a sweep, from which `best` picks the trial."""
    best: Annotated[str, one_of(("answer", "accuracy"))]
    """answer | accuracy: the sweep's answer (its baseline if no setting is shown to be good enough), or the trial with
    the best `train.metric` on the selection split."""
    data: PredictDataSettings
    output: Annotated[str, PATH]
    """File to write: CSV, TSV, JSONL or Parquet by its extension; with format=glue, a folder works too."""
    format: Annotated[str, one_of(("table", "glue"))]
    """table | glue: texts, labels and probabilities, or GLUE's submission format (SST-2.tsv: index, prediction)."""
    batch_size: Annotated[int, at_least(1)]
    """Texts per batch, 1 or more; affects only speed."""
    device: Annotated[str, DEVICE]
    """auto | cpu | cuda | cuda:NUMBER | mps; auto takes CUDA, else MPS, else the CPU."""
    tracking: TrackingSettings

    def _check(self) -> None:
        given = [name for name in ("run", "dir", "sweep") if getattr(self, name)]
        require(len(given) == 1, "what predicts", "one of run=ID, dir=PATH and sweep=NAME",
                " and ".join(given) or "none", "name one model")  # fmt: skip
        self._require(self.dir is None or Path(self.dir).is_dir(), "dir", "an existing directory", MODEL_FOLDER)
        self._require(self.best == "answer" or self.sweep is not None, "best", "answer without sweep=NAME")


BENCH_WINDOW = 8
"""A benchmark's steps are a multiple of this, because engines may compute this many steps ahead."""


@dataclass(frozen=True)
class BenchSettings(Checked, group="bench"):
    """What a benchmark measures: short runs, each in its own process, interleaved and repeated."""

    trials: Annotated[int, at_least(2)]
    """Number of trials in the fused batch, 2 or more; they differ in learning rate."""
    steps: Annotated[int, Rule(f"a multiple of {BENCH_WINDOW}", lambda n, of=BENCH_WINDOW: n > 0 and n % of == 0)]
    """Timed optimisation steps per run, after 8 untimed ones; a multiple of 8."""
    eval_examples: Annotated[int, at_least(1)]
    """Examples of the selection split that each run evaluates, 1 or more."""
    repeats: Annotated[int, at_least(1)]
    """How often each row is measured, 1 or more."""
    processes: Annotated[int, Rule("0, or 2 or more", lambda count: count == 0 or count >= 2)]
    """Adds a row of this many tuned Trainers that share the device, each in its own process: 0 (no row), or 2+."""


@dataclass(frozen=True)
class BenchmarkSettings(AppSettings):
    """The configuration of `python -m distilbench.benchmark`."""

    bench: BenchSettings


Kind = TypeVar("Kind")


@overload
def settings_from(config: Any) -> AppSettings: ...
@overload
def settings_from(config: Any, kind: type[Kind]) -> Kind: ...
def settings_from(config: Any, kind: Any = AppSettings) -> Any:
    """Convert a composed config to the settings class ``kind``.

    Raises :class:`SettingsError` for a value that is missing, unknown or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue

    try:
        nodes = {f.name: config[f.name] for f in dataclasses.fields(kind)}
        values = OmegaConf.to_container(OmegaConf.create(nodes, parent=config), resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, ConfigKeyError) as error:
        raise SettingsError(f"{error.full_key} must be given, got nothing; add {error.full_key}=...") from None
    return _build(kind, values)


def _build(cls: Any, values: Any) -> Any:
    """Build the dataclass ``cls`` from nested dicts, with absolute paths."""
    hints, marks, made = _hints(cls), _marks(cls), dict(values)
    for name, value in values.items():
        known = name in hints  # ++optim.lrr=1 bypasses the schema
        require(known, getattr(cls, "_prefix", "") + name, "a setting that there is", value, "--help lists them")
        if value is None:
            continue
        if nested := _dataclass_in(hints[name]):
            require(isinstance(value, dict), getattr(cls, "_prefix", "") + name, "null or settings of its own", value,
                    "conf/ shows one")  # fmt: skip
            made[name] = _build(nested, value)
        for mark in marks.get(name, ()):
            if isinstance(mark, Converted) and mark.source in (None, values.get("source")):
                made[name] = mark.convert(value)
    return cls(**made)


def setting_names(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings in ``cls``; a fallback counts as one setting."""
    names: list[str] = []
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        nested = _dataclass_in(hints[f.name])
        names += setting_names(nested, f"{prefix}{f.name}.") if nested and nested is not cls else [f"{prefix}{f.name}"]
    return names


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass in ``hint`` (``Data`` or ``Optional[Data]``); None for any other type."""
    return next((t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)), None)


@cache  # so that configs composed before and after another registration have the same types
def _schema(cls: Any, inside: tuple[Any, ...] = ()) -> Any:
    """Make a mutable copy of ``cls``: nodes of frozen dataclasses are read-only, even while Hydra composes."""
    fields = []
    for f in dataclasses.fields(cls):
        hint = get_type_hints(cls)[f.name]
        nested = _dataclass_in(hint)
        if nested in (cls, *inside):
            hint = Any
        elif STRINGS in _marks(cls).get(f.name, ()):
            hint = Optional[list[Any]]
        elif nested:
            hint = _schema(nested, (cls, *inside))
        default = f.default if f.default is not dataclasses.MISSING else "???"  # joblib's workers unpickle another one
        fields.append((f.name, hint, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def register_schema(app: type[AppSettings] = AppSettings) -> None:
    """Register the schemas of the main configurations in ``conf/``; ``app`` is the one of ``config.yaml``."""
    from hydra.core.config_store import ConfigStore

    kinds = {"schema": app, "compare_schema": CompareSettings, "confirm_schema": ConfirmSettings,
             "predict_schema": PredictSettings}  # fmt: skip
    for name, kind in kinds.items():
        ConfigStore.instance().store(name=name, node=_schema(kind), replace=True)
