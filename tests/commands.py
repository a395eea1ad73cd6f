"""Run the project's commands in separate processes, most of them forked from one that has imported the libraries.

Importing torch, transformers and MLflow takes longer than a tiny trial. A fork server does it once; each command then
runs in a child of it as under ``python -m``, with its own directory, environment, streams, signals and exit status.
Tests of the start itself (imports, early signals, variables that libraries read at import) use a fresh interpreter.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import runpy
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from io import StringIO
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NoReturn, Protocol

ROOT = Path(__file__).resolve().parents[1]
FORKS = sys.platform == "linux"
"""On other systems, forking a process with these libraries is not safe: each command starts a new interpreter."""
HEAVY = {"torch", "transformers", "mlflow", "sklearn", "datasets", "scipy", "pandas", "matplotlib", "pyarrow"}
"""Packages that must not be imported before a configuration has been checked; nor may Optuna, without a sweep."""

if FORKS:
    _SERVER = multiprocessing.get_context("forkserver")
    _SERVER.set_forkserver_preload(["tests.preloaded"])


class Process(Protocol):
    """What tests use of a process: the part of :class:`subprocess.Popen` that both kinds implement."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


def start(program: str | Path, arguments: Sequence[str], folder: Path, environment: Mapping[str, str],
          output: int | None = None, fresh: bool = False) -> Process:  # fmt: skip
    """Start a module (``python -m``) or a file in ``folder``; ``output`` is a file descriptor for both its streams."""
    if FORKS and not fresh:
        return ForkedProcess(str(program), arguments, folder, environment, output)
    command = [sys.executable, *(["-m"] if isinstance(program, str) else []), str(program), *arguments]
    stream = subprocess.PIPE if output is None else output
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=stream, stderr=stream)


class ForkedProcess:
    """A command in a child of the fork server, with the interface of :class:`subprocess.Popen`."""

    def __init__(self, program: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str],
                 output: int | None) -> None:  # fmt: skip
        self.args = [program, *arguments]
        self._files = [] if output else [tempfile.TemporaryFile("r+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        streams = [_Descriptor(number) for number in ([file.fileno() for file in self._files] or [output, output])]
        self._process = _SERVER.Process(target=_run, args=(self.args, str(folder), dict(environment), streams))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        texts = []
        for file in self._files:
            file.seek(0)  # the child shares this file position
            texts.append(file.read())
        return (texts[0], texts[1]) if texts else ("", "")

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Descriptor:
    """A file descriptor to pass to a child of the fork server, where it unpickles to the child's own number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._number),)


def _received(sent: Any) -> int:
    return sent.detach()


def _run(command: Sequence[str], folder: str, environment: Mapping[str, str], streams: Sequence[int]) -> NoReturn:
    """Run like ``python -m program`` or ``python program``, up to the exit status."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "").partition(":")
    for written, by_line in ((sys.stdout, sys.stdout.isatty()), (sys.stderr, True)):
        written.reconfigure(encoding=encoding or None, errors=errors or None, line_buffering=by_line)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(command)
    status = _status_of(command[0])
    threading._shutdown()  # type: ignore[attr-defined]  # like the interpreter, wait for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def _status_of(program: str) -> int:
    """Run a program and return the exit status that the interpreter would."""
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def split_imports(errors: str) -> tuple[list[str], set[str]]:
    """Split the output of a process with ``PYTHONPROFILEIMPORTTIME=1`` into its own lines and imported packages."""
    own, imports = [], set()
    for line in errors.splitlines():
        if line.startswith("import time:"):
            imports.add(line.rpartition("|")[2].strip().partition(".")[0])
        else:
            own.append(line)
    return own, imports


def lay_tables(database: Path) -> None:
    """Write MLflow's empty tables if there is no database, from a cache: MLflow takes longer than a tiny trial."""
    if not database.exists():
        database.parent.mkdir(exist_ok=True)
        database.write_bytes(_tables())


@cache
def _tables() -> bytes:
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    load_migrations_once()
    with tempfile.TemporaryDirectory() as folder:
        engine = sqlalchemy.create_engine(f"sqlite:///{folder}/mlflow.db")
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        _initialize_tables(engine)
        engine.dispose()
        return Path(folder, "mlflow.db").read_bytes()


@cache
def load_migrations_once() -> None:
    """Import the migrations of Optuna and MLflow now, once for this process and all that are forked from it.

    Both run the files of theirs whenever they open a database, to learn which is the latest, longer than they take to
    open it.
    """
    import optuna
    from alembic.util import pyfiles
    from mlflow.store.db.utils import _get_latest_schema_revision

    load = pyfiles.load_module_py
    load_once = cache(load)

    def load_migration(module_id: str, path: str) -> Any:
        return (load_once if Path(path).parent.name == "versions" else load)(module_id, path)

    pyfiles.load_module_py = load_migration
    optuna.storages.RDBStorage("sqlite://")
    _get_latest_schema_revision()


def wait_for_no_disk() -> None:
    """Have SQLite leave writing to the disk to the system: a process may be killed in a test, the machine is not."""
    import sqlalchemy

    def connected(connection: Any, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)


def share_statements() -> None:
    """Have all SQLite databases share the SQL that SQLAlchemy compiles, here and in processes forked from here.

    It compiles each statement once for each database that it opens, longer than an empty one takes to answer.
    """
    from sqlalchemy import Engine, event
    from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite as Dialect
    from sqlalchemy.util import LRUCache

    Dialect.__hash__ = lambda self: 0  # type: ignore[method-assign]
    Dialect.__eq__ = lambda self, other: type(other) is Dialect  # type: ignore[method-assign]
    compiled: Any = LRUCache(2000)

    def share(connection: Any) -> None:
        connection.engine._compiled_cache = compiled

    event.listen(Engine, "engine_connect", share)


def read_yaml_once() -> None:
    """Have equal YAML texts parsed once, here and in processes forked from here: a composition reads some forty."""
    from omegaconf import OmegaConf

    load = OmegaConf.load
    content = cache(lambda text: OmegaConf.to_container(load(StringIO(text))))

    def load_once(file: Any) -> Any:
        text = file.read()
        try:
            return OmegaConf.create(content(text))
        except Exception:  # which names the file
            file.seek(0)
            return load(file)

    OmegaConf.load = lambda file: load_once(file) if hasattr(file, "read") else load(file)  # type: ignore[method-assign]


def merge_configs_once() -> None:
    """Have equal lists of config files merged once, here and in processes forked from here: half of a composition."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    merged: dict[tuple[object, ...], Any] = {}

    def merge_once(loader: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Any:
        key = tuple(_entry_key(default, repo) for default in defaults)
        if key not in merged:
            merged[key] = merge(loader, defaults, repo)
        return merged[key].copy()

    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once  # type: ignore[method-assign]


def _entry_key(default: Any, repo: Any) -> tuple[object, ...]:
    """Return what distinguishes an entry of a defaults list: the place in the config, the file, and its last change."""
    folder = repo.load_config(default.config_path).path
    file = Path(folder.removeprefix("file://"), f"{default.config_path}.yaml")
    changed = file.stat().st_mtime_ns if file.exists() else None
    return (default.config_path, default.package, default.primary, folder, changed)


class Workspace:
    """A folder with its own store: runs commands there, and reads what they left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}/mlflow.db"
        self._started: list[Process] = []

    def with_store(self) -> Workspace:
        """Create MLflow's tables beforehand, for tests that are not about creating them."""
        lay_tables(self.path / "mlflow.db")
        return self

    def start(self, *arguments: str, program: str | Path = "distilbench.train", output: int | None = None,
              fresh: bool = False, **environment: str) -> Process:  # fmt: skip
        """Start a command with this folder's store; ``fresh`` starts an interpreter that has imported nothing."""
        known = {
            "MLFLOW_TRACKING_URI": self.uri,
            "DISTILBENCH_ROOT": str(self.path),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "PYTHONPATH": str(ROOT),
        }
        self._started.append(start(program, arguments, self.path, os.environ | known | environment, output, fresh))
        return self._started[-1]

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with the options of :meth:`start`."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)

    def end(self) -> None:
        """Kill commands that still run."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate(timeout=60)

    def runs(self) -> list[Any]:
        """Return the store's runs, oldest first, without creating a store if there is none."""
        from mlflow import MlflowClient

        if not (self.path / "mlflow.db").exists():
            return []
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("distilbench")
        return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])

    def artifacts(self, run_id: str) -> dict[str, Path]:
        """Return a run's artifacts: name -> path."""
        (folder,) = (self.path / "mlruns").glob(f"*/{run_id}/artifacts")
        return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
