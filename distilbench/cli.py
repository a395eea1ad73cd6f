"""What all commands share: signals, streams, exit statuses, one-line errors, and quoting of command lines.

Exit statuses: 0 success, 1 failure, 2 a setting is invalid, 128 + n ended by signal n (130 Ctrl-C, 143 SIGTERM).
"""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from distilbench.settings import AppSettings, SettingsError, require, setting_names
from distilbench.version import __version__

# Read when torch is loaded. By default a waiting thread keeps its core busy for 300,000 turns; if other processes want
# the core, a step of hundreds of small operations takes 10 to 30 times as long. 3,000 turns cost an idle machine 5 %.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

STATUS = {getattr(signal, name): 128 + getattr(signal, name)
          for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)}  # fmt: skip


class CommandFailed(RuntimeError):
    """The command failed, or did only part of its work; the message is one line."""


# ---- signals


def exit_immediately() -> None:
    """Let signals end the process silently from now on, while there is nothing to clean up yet.

    An exception raised by a signal during an import or a composition could be swallowed or converted by the interrupted
    code; OmegaConf, for one, turns it into an error of its own.
    """
    for number in STATUS:
        if signal.getsignal(number) is not signal.SIG_IGN or number != getattr(signal, "SIGHUP", None):  # under nohup
            signal.signal(number, _exit)


def raise_on_signal() -> None:
    """Let signals raise exceptions from now on, for clean-up; only after :func:`exit_immediately`."""
    for number in STATUS:
        if signal.getsignal(number) is _exit:
            signal.signal(number, _raise_once)


def was_signalled() -> bool:
    """Return whether a signal has raised an exception, even if the interrupted code has swallowed it."""
    return bool(_received)


def raise_if_signalled() -> None:
    """Raise the exception of the first signal again, if there was one."""
    if _received:
        raise KeyboardInterrupt


def _exit(signum: int, frame: Any) -> NoReturn:
    os._exit(STATUS[signal.Signals(signum)])


def _raise_once(signum: int, frame: Any) -> None:
    """Raise at the first signal and ignore later ones during clean-up; exit immediately at a third Ctrl-C."""
    _received.append(signum)
    if len(_received) == 1:
        raise_if_signalled()
    if len(_received) > 2 and signum == signal.SIGINT:
        _exit(signum, frame)


_received: list[int] = []


# ---- streams


def open_streams() -> None:
    """Make stdout and stderr robust: replace characters that can't be encoded, drop output that can't be written.

    A trial whose pipe or terminal is closed thus keeps training; only a signal ends it.
    """
    if os.environ.get("COLUMNS") == "0":  # as if unknown: rich would print nothing
        del os.environ["COLUMNS"]
    logging.raiseExceptions = False  # no traceback for a log line that can't be written
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the shell (>&-): the next opened file would get this descriptor
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            raw = _Droppable(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, errors="replace",
                                                line_buffering=stream.line_buffering))  # fmt: skip


class _Droppable(io.FileIO):
    """A file that is redirected to /dev/null once a write fails: a closed pipe or terminal, a full disk."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return memoryview(data).nbytes


# ---- errors and exit statuses


def run_command(entrypoint: Callable[[], object], to_hydra: Callable[[str], str] = str) -> None:
    """Run a Hydra entrypoint as a command: with our streams, signals, exit statuses and one-line errors.

    ``to_hydra`` converts each typed argument into Hydra's grammar.
    """
    exit_immediately()
    open_streams()
    gc.set_threshold(100_000)  # importing torch, transformers and MLflow makes a million objects: collecting took 1.6 s
    try:
        with errors_in_one_line(), _hydra_raises():
            if not os.path.exists(os.curdir):
                raise SettingsError("the current directory must exist, got one that was deleted; cd into another")
            _check_arguments(sys.argv[1:])
            sys.argv[1:] = map(to_hydra, sys.argv[1:])
            if sys.argv[1:] == ["--version"]:  # Hydra would print its own version
                print(f"distilbench {__version__}")
            else:
                entrypoint()
    except KeyboardInterrupt:
        exec("")  # resets CPython's flag of an interrupt inside exec (dataclasses), which would end us by SIGINT
        sys.exit(STATUS[_received[0] if _received else signal.SIGINT])  # Ray raises its own exception


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise :class:`SettingsError` for what no command takes."""
    from hydra._internal.utils import get_args_parser

    for text in (*arguments, os.getcwd(), os.environ.get("DISTILBENCH_ROOT", "")):
        if re.search("[\ud800-\udfff]", text):  # surrogates of bytes that are not UTF-8: can't be stored
            raise SettingsError(f"command line and directory must be UTF-8, got {text!a}; rename what it names")
    flags, unknown = get_args_parser().parse_known_args([one for one in arguments if one != "--version"])
    if again := flags.experimental_rerun:
        is_trial = Path(again, ".hydra", "hydra.yaml").is_file() and not Path(again, "job.json").exists()
        require(is_trial, "--experimental-rerun", "the directory of a trial of no sweep", again,
                "a sweep's own command, typed again, trains what it lacks")  # fmt: skip
    if flag := next((one for one in unknown if one.startswith("-")), None):
        raise SettingsError(f"{flag} must be a flag of Hydra's; a setting is key=value, without dashes")


def run_in_process(entrypoint: Callable[[], object], arguments: Sequence[str]) -> None:
    """Run a Hydra entrypoint within a running process; raise the error that would end a command, in one line."""
    from hydra.core.global_hydra import GlobalHydra

    before = sys.argv
    sys.argv = [sys.modules[entrypoint.__module__].__file__ or "", *arguments]
    GlobalHydra.instance().clear()
    try:
        with _hydra_raises():
            entrypoint()
    except SystemExit as end:
        reason = end.__context__
        raise (reason if isinstance(reason, Exception) else CommandFailed(f"exit status {end.code}")) from None
    except Exception as error:  # while sys.argv is still what was asked for
        mistake = as_settings_error(error)
        if mistake is None:
            raise
        raise mistake from None
    finally:
        sys.argv = before


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with one line: status 1 for :class:`CommandFailed`, 2 for an error that the user can fix."""
    try:
        yield
    except CommandFailed as error:
        print_to_stderr(error)
        sys.exit(1)
    except Exception as error:
        mistake = as_settings_error(error)
        if mistake is None:
            raise
        print_to_stderr(mistake)
        sys.exit(2)


def print_to_stderr(line: object) -> None:
    """Print one line for people to stderr."""
    print("distilbench:", " ".join(str(line).splitlines()), file=sys.stderr, flush=True)


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Make Hydra raise errors, which it would otherwise print in several lines and always with status 1."""
    is_asked = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
    finally:
        if not is_asked:
            del os.environ["HYDRA_FULL_ERROR"]


_WANTS_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
"""Whether the user asks for tracebacks, with Hydra's own variable."""

_WRITING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
            errno.EEXIST, errno.ENAMETOOLONG}  # fmt: skip


def as_settings_error(error: Exception) -> SettingsError | None:
    """Convert an error of Hydra, OmegaConf, YAML or the file system that the user can fix; None for any other error."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(error, SettingsError):
        return error
    if _WANTS_TRACEBACKS:
        return None
    chain = [error, *(e for e in (error.__cause__, error.__context__) if e is not None)]
    for link in chain:
        making = isinstance(link, OSError) and "mkdir" in [f.name for f in traceback.extract_tb(link.__traceback__)]
        if isinstance(link, OSError) and link.filename is not None and (link.errno in _WRITING or making):
            return SettingsError(
                f"{link.filename} must be a path that can be used, got {link.strerror}; what is written goes where "
                "hydra.run.dir (hydra.sweep.dir in a sweep) and tracking.uri say"
            )
    if is_disk_full(error):
        return SettingsError(f"the disk must have room for what is written, got {error}; make room, then try again")
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__", "") if frames else ""
    is_said = isinstance(error, (ValueError, AttributeError))  # the latter of a setting of a deleted group
    said_by_hydra = is_said and raised_in.startswith(("hydra.", "omegaconf.", "logging.config"))
    if said_by_hydra or isinstance(error, (HydraException, OmegaConfBaseException, YAMLError)):
        return SettingsError(_reword(error, chain))
    return None


_FULL_DISK = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk is full", "iostream error")
"""What the system (safetensors repeats it), SQLite and ``torch.save`` say of a full disk or an exceeded quota."""


def is_disk_full(error: BaseException | str | None) -> bool:
    """Return whether a message, an exception, or one in its chain, reports a full disk or an exceeded quota."""
    if isinstance(error, BaseException):
        return is_disk_full(str(error)) or is_disk_full(error.__cause__ or error.__context__)
    return any(words in (error or "") for words in _FULL_DISK)


def _reword(error: Exception, chain: Sequence[BaseException]) -> str:
    """Reword an error of Hydra or OmegaConf as setting, allowed values, value received; keep unknown messages."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    text = "\n".join(dict.fromkeys(str(link) for link in chain))
    key = next((link.full_key for link in chain if isinstance(link, OmegaConfBaseException) and link.full_key), "")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group} must be one of {', '.join(error.options)}, got {choice!r}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} must be key=value in Hydra's grammar; quote what is special in it: 'key=\"a=b, c\"'"
    if found := re.search(r"Could not override '(.+?)'", text):
        return _unknown_setting(found[1], chain)
    for pattern, words in _REWORDINGS.items():
        if found := re.search(pattern, text, re.DOTALL):
            typed = (re.fullmatch(r"([\w/@]+)=(null|true|false|[\d.].*)", one, re.IGNORECASE) for one in sys.argv[1:])
            group, value = next((one.groups() for one in typed if one), ("a group", "null"))
            deleted = next((one[1:] for one in sys.argv[1:] if one.startswith("~")), "a group")
            return words.format(*found.groups(), key=key, group=group, value=value, deleted=deleted)
    lines = dict.fromkeys(line.strip() for line in text.splitlines())
    noise = ("full_key:", "object_type=", "reference_type=", "Config search path", "provider=", "See https")
    return ": ".join(line for line in lines if line and not line.startswith(noise))


_REWORDINGS = {
    r"Value '(.*?)' of type '.*' could not be converted to Integer": "{key} must be a whole number, got {0!r}",
    r"Value '(.*?)' of type '.*' could not be converted to Float": "{key} must be a number, got {0!r}",
    r"Value '(.*?)' is not a valid bool": "{key} must be true or false, got {0!r}",
    r"Incompatible value 'None'|is not Optional": "{key} must be given, got null",
    r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'": (
        "{0} must be one value, or several with --multirun; a list is written [a,b], a text with commas quoted"
    ),
    r"Config group override must be a string or a list": (
        "{group} must name a choice of the group, got {value}; --help lists them"
    ),
    r"Interpolation key '(.+?)' not found": (
        "${{{0}}} must refer to a setting with one value, got none; check its name, or list values where it is read"
    ),
    r"Environment variable '(.+?)' not found": "the variable {0} must be set, got none; run: export {0}=...",
    r"override (\S+?)=(.*?)\n.*is not a ListConfig": "{0} must be a list, [{1}], got {1!r}",
    r"Could not load '(\w+)/(.+?)'": "{0} must name choices of the group, got {1!r}; --help lists them",
    r"(?:Multiple values for |force-add of config groups is not supported: '\+\+)([\w/@]+)": (
        "{0} must be typed without a plus, as {0}=..."
    ),
    "'str' object has no attribute 'get'": "{deleted} must be given beside settings of it, got ~{deleted}; drop that",
    r"In '(.+?)': ConfigKeyError.*?Key '(.+?)' not in": "{1} must be a setting that there is, got it in {0}.yaml",
    r"^Key '(\S+)' (?:not in|is not in struct)": "{0} must be given, got nothing; add {0}=...",
    r"Error merging override (\S+?)=(.*?)\n.*(?:Cannot convert '(?:list|dict)'|of type 'list' is incompatible)": (
        "{0} must be one value, got {1!r}"
    ),
    r"Error merging override (\S+?)=(.*?)\n.*(?:is not a subclass of|Cannot assign)": (
        "{0} must be set key by key, {0}.key=..., got {1!r}; a choice of a group below another is typed with a slash"
    ),
    r"Target '(\S+)' is not in the Hydra execution whitelist": (
        "_target_ must be what the command itself uses, got {0!r}; code is not run because a setting names it"
    ),
    r"override ~(\S+)\s.*does not support deletion": "{0} must be given, got nothing; change its value instead",
}
"""Patterns of Hydra's and OmegaConf's most common messages, and our wording.

``key`` is OmegaConf's ``full_key``, ``group`` and ``value`` an argument that sets a group to no choice, ``deleted`` the
group of an argument with ``~``."""


_NAMES_OF_TRAINER = {
    "learning_rate": "optim.lr", "per_device_train_batch_size": "train.batch_size", "fp16": "train.precision",
    "bf16": "train.precision", "gradient_accumulation_steps": "train.micro_batch_size",
    "early_stopping_patience": "train.patience", "model_name_or_path": "model.checkpoint",
}  # fmt: skip
"""Settings that have another name in Hugging Face's arguments, where spelling does not tell which is meant."""


def _unknown_setting(name: str, chain: Sequence[BaseException]) -> str:
    """Return the message for an unknown setting, with the most similar name in the command's configuration."""
    from difflib import get_close_matches

    from omegaconf import OmegaConf

    if name.startswith(("hydra.", "hydra/")):
        remedy = "--cfg hydra lists them, some depend on hydra/sweeper and hydra/launcher; a new one takes a plus"
        return f"{name} must be a key that there is; {remedy}"
    nodes = (getattr(link, "parent_node", None) for link in chain)
    schemas = [OmegaConf.get_type(node._get_root()) for node in nodes if node is not None]
    names = setting_names(next(filter(is_dataclass, schemas), AppSettings))
    last = name.rpartition(".")[2]
    same = [known for known in names if known.rpartition(".")[2] == last or known == _NAMES_OF_TRAINER.get(last)]
    near = same if len(same) == 1 else get_close_matches(name, names, n=1)
    return f"{name} must be a setting that there is; " + (f"did you mean {near[0]}?" if near else "--help lists them")


# ---- words


def pluralize(number: float, noun: str) -> str:
    """Return a count or an amount with its noun: ``1 epoch``, ``2,000 epochs``, ``0.5 points``."""
    return f"{number:{',' if isinstance(number, int) else 'g'}} {noun}" + ("" if number == 1 else "s")


# ---- command lines


def format_command(name: str, overrides: Iterable[str]) -> str:
    """Return a command line for one of our commands, quoted for the shell, in the form that started this process."""
    installed = Path(sys.argv[0]).stem == "distilbench"
    return shlex.join([*(["distilbench", name] if installed else ["python", "-m", f"distilbench.{name}"]), *overrides])


def format_override(key: str, value: Any) -> str:
    """Return ``key=value``, quoted for Hydra's grammar so that a string stays a string; interpolations are kept.

    Unquoted, ``=``, commas, brackets and non-ASCII letters are errors, and ``1e-3`` and ``null`` are not strings.
    """
    return f"{key}={quote_value(value)}"


def quote_value(value: Any) -> str:
    """Return a value, quoted if necessary, in Hydra's override grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(quote_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{quote_value(one)}' for key, one in value.items())}}}"
    if not isinstance(value, str):
        return str(value)
    is_plain = re.fullmatch(r"[A-Za-z_/.][\w/.:+-]*", value, re.ASCII) and not _OTHER_TYPE.fullmatch(value)
    return value if is_plain else QuotedString(value, Quote.single).with_quotes()


_OTHER_TYPE = re.compile(r"null|true|false|nan|inf|[.\d][\w.+-]*", re.IGNORECASE)
