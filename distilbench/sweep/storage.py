"""Making a sweep's study, or taking it up again: storage, lock, and what must not have changed in between."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from distilbench.results import Owner
from distilbench.settings import SettingsError
from distilbench.sweep.pruning import storage_of
from distilbench.sweep.space import Space
from distilbench.tracking import redact

ANSWER_SECONDS = 4.0

LOCK_SECONDS = 120.0
"""Longest wait for another process that takes or settles a trial; each holds the lock for well under a second."""

_LOCK_NUMBER = 0x64697374696C6265
"""Of PostgreSQL's advisory locks: "distilbe" in ASCII, so that another program will hardly have it."""

_LONGEST_SHOWN = 6

SAMPLERS = ("hydra_plugins.hydra_optuna_sweeper.*", "optuna.samplers.*")
"""What ``hydra.sweeper.sampler`` may name: the list of hydra-optuna-sweeper itself."""

UNANSWERED = (SQLAlchemyError, StorageInternalError)
"""What a storage that no longer answers raises, from SQLAlchemy or from Optuna."""

_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Packages that bring a database's driver, by the module that SQLAlchemy looks for, where the two names differ."""

_PASSWORDS = re.compile(r"//[^:/]*:([^@]+)@|[?&]password=([^&]+)")
"""As SQLAlchemy and libpq read a URL."""


@dataclass(frozen=True)
class Storage:
    """Where studies are kept; ``shown`` is the URL as it may be written down, a password being an interpolation."""

    url: str
    shown: str

    @property
    def file(self) -> Path | None:
        """SQLite's file; None for a database behind a network."""
        found = re.fullmatch(r"sqlite(?:\+\w+)?:///(.+)", self.url)
        return Path(found[1]) if found else None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process from taking or settling trials; the system lets go of a lock whose holder dies."""
        if self.file:
            lock = FileLock(self.file.with_name(f".{self.file.name}.lock"), timeout=LOCK_SECONDS)
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(lock)
                except Timeout:
                    raise SettingsError(
                        f"hydra.sweeper.storage must be free, got {self.file}, which another process has held for "
                        f"{LOCK_SECONDS:g} s; end that one, or wait for it"
                    ) from None
                yield
            return
        with self._server_lock():
            yield

    @contextlib.contextmanager
    def _server_lock(self) -> Iterator[None]:
        """A lock of the database's own, which ends with its connection (PostgreSQL); others go without.

        One for all sweeps in a database, since the first of them makes Optuna's tables.
        """
        engine = sqlalchemy.create_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sqlalchemy.text(f"SET lock_timeout = '{LOCK_SECONDS:g}s'"))
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_LOCK_NUMBER})"))
            yield


def storage_at(url: str | None, written: str | None, directory: Path) -> Storage:
    """``hydra.sweeper.storage``, by default ``study.db`` in the sweep's directory.

    ``written`` is the setting before its interpolations are resolved. Raises :class:`SettingsError` for what is no
    storage, has a password written out, or does not answer.
    """
    if url is None:
        default = f"sqlite:///{directory / 'study.db'}"
        return Storage(default, default)
    _check_url(url, written or url)
    storage = Storage(url, written or url)
    try:
        if storage.file:
            _check_file(storage.file)
        else:
            sqlalchemy.create_engine(url, poolclass=NullPool).connect().close()
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(str(error.name), error.name)
        raise SettingsError(
            f"hydra.sweeper.storage must be a database whose driver is installed, got {redact(url)} without "
            f"{error.name}; run: pip install '{package}'"
        ) from None
    except (SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        raise SettingsError(
            f"hydra.sweeper.storage must be a storage that answers, got {redact(url)}: {said_by(error)}; "
            "start it, correct the address, or leave it out"
        ) from None
    return storage


def said_by(error: BaseException) -> str:
    """What a database said, in part of a line, without its passwords and SQLAlchemy's hints."""
    return redact(" ".join(str(error).partition("(Background on this error")[0].split()))[:200]


def _check_url(url: str, written: str) -> None:
    if _PASSWORDS.search(re.sub(r"\$\{[^{}]*\}", "", written)):
        raise SettingsError(
            "hydra.sweeper.storage must not hold a password, since Hydra writes settings to disk; put it into "
            "PGPASSWORD or ~/.pgpass, or the URL into a variable of the environment: "
            "'hydra.sweeper.storage=${oc.env:NAME}'"
        )
    if not re.match(r"(sqlite|postgresql|mysql)(\+\w+)?://", url):
        raise SettingsError(
            f"hydra.sweeper.storage must be the URL of a database, got {redact(url)!r}; for example "
            "sqlite:///sweeps.db or postgresql://user@host/name"
        )


def _check_file(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file, timeout=ANSWER_SECONDS)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def open_study(storage: Storage, name: str, directions: Sequence[str], sampler: Any, pruner: Any) -> optuna.Study:
    """Make the study or load it; raises :class:`SettingsError` where the file is locked or is no study."""
    if storage.file:
        storage.file.parent.mkdir(parents=True, exist_ok=True)
    try:
        if storage.file:
            _check_file(storage.file)
        return optuna.create_study(
            study_name=name, storage=storage_of(storage.url), sampler=sampler, pruner=pruner, load_if_exists=True,
            directions=[StudyDirection[direction.upper()] for direction in directions],
        )  # fmt: skip
    except (SQLAlchemyError, sqlite3.Error, RuntimeError, StorageInternalError) as error:
        raise SettingsError(
            f"hydra.sweeper.storage must be a database of Optuna's that can be written, got {redact(storage.url)}: "
            f"{said_by(error)}; end what holds it, or name another"
        ) from None


def sampler_of(config: DictConfig | None, trials: int) -> Any:
    """Optuna's sampler as ``hydra.sweeper.sampler`` names it; None, Optuna's default, for a grid.

    A seed moves on with the ``trials`` that there are, or a continued sweep would draw its first points again.
    """
    from hydra.utils import instantiate

    if config is None or config._target_ == "optuna.samplers.GridSampler":
        return None
    seed = config.get("seed")
    moved = {} if seed is None else {"seed": seed + trials}
    try:
        return instantiate(config, _execution_whitelist_=SAMPLERS, **moved)
    except Exception as error:  # whatever a sampler says of its own arguments
        root: BaseException = error.__cause__ or error
        said = " ".join(str(root).split())[:200]
        raise SettingsError(f"hydra.sweeper.sampler must be a sampler of Optuna's with its arguments: {said}") from None


def check_unchanged(kept: Mapping[str, Any], now: Mapping[str, Any], name: str, extend: bool) -> None:
    """Raise :class:`SettingsError` where a sweep is continued as another: its difference, and what to do.

    With ``extend`` the space may change, what it is laid over may not.
    """
    had, has = ({key: _in_order(value) for key, value in identity["space"].items()} for identity in (kept, now))
    moved = had.keys() ^ has.keys()
    """Dimensions of one of the two, whose value, or whose group's values, the other has fixed."""

    def stays(identity: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in identity["fixed"].items() if not any(f"{k}.".startswith(f"{m}.") for m in moved)}

    fixed = _differences(stays(kept), stays(now))
    fixed += [line for key in ("objectives", "directions") for line in _differences({key: kept[key]}, {key: now[key]})]
    space = _differences(had | {m: kept["fixed"].get(m) for m in moved - had.keys()},
                         has | {m: now["fixed"].get(m) for m in moved - has.keys()})  # fmt: skip
    if fixed or (space and not extend):
        shown = [*fixed, *space]
        more = f" and {len(shown) - _LONGEST_SHOWN} more" if len(shown) > _LONGEST_SHOWN else ""
        remedy = "" if fixed else " or add sweep.on_change=extend"
        raise SettingsError(
            f"sweep.name must be another one for another sweep, got {name!r}, which had "
            f"{'; '.join(shown[:_LONGEST_SHOWN])}{more}; take another name{remedy}"
        )


def _in_order(distribution: str) -> str:
    """Choices make the same dimension in any order."""
    content = json.loads(distribution)
    if "choices" in content["attributes"]:
        content["attributes"]["choices"].sort(key=str)
    return json.dumps(content)


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**kept, **now} if kept.get(key) != now.get(key)]
    return [f"{key} {_shown(kept.get(key))} (now {_shown(now.get(key))})" for key in keys]


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith('{"name"'):
        content = json.loads(value)
        attributes = content["attributes"]
        choices = attributes.get("choices")
        return str(choices) if choices is not None else f"{attributes['low']}..{attributes['high']}"
    return "unset" if value is None else str(value)


def extend_study(study: optuna.Study, space: Space, storage: Storage, is_dead: Callable[[Owner], bool]) -> Space:
    """Make the study take ``space``; returns it with its choices in the study's own order, further ones after them.

    Optuna keeps a choice by its place in the list and refuses a longer list, so the list is replaced in its records.
    Raises :class:`SettingsError` where a dimension's kind changed, choices are gone, or another process is at work.
    """
    dimensions = dict(space.dimensions)
    trials = study.get_trials(deepcopy=False)
    longer: dict[str, CategoricalDistribution] = {}
    for key, distribution in dimensions.items():
        known = next((trial.distributions[key] for trial in trials if key in trial.distributions), None)
        if isinstance(known, CategoricalDistribution) and isinstance(distribution, CategoricalDistribution):
            dimensions[key] = joined = _joined(key, known, distribution)
            if joined != known:
                longer[key] = joined
        elif known is not None:
            _check_kind(key, known, distribution)
    if longer:
        _check_alone(trials, is_dead)
        _replace_choices(study, longer, storage)
    return replace(space, dimensions=dimensions)


def _joined(key: str, known: CategoricalDistribution, now: CategoricalDistribution) -> CategoricalDistribution:
    gone = [choice for choice in known.choices if choice not in now.choices]
    if gone:
        raise SettingsError(
            f"{key} must keep the choices that it had in this sweep, got {list(now.choices)} without "
            f"{', '.join(map(str, gone))}; add them, or take another sweep.name"
        )
    return CategoricalDistribution([*known.choices, *(c for c in now.choices if c not in known.choices)])


def _check_kind(key: str, known: BaseDistribution, now: BaseDistribution) -> None:
    """Optuna fixes whether a parameter is whole, continuous or a choice, and whether it is logarithmic."""
    try:
        check_distribution_compatibility(known, now)
    except ValueError:
        kinds = [_kind(distribution) for distribution in (known, now)]
        raise SettingsError(
            f"{key} must stay {kinds[0]} in this sweep, got {kinds[1]}; only its ends may change; "
            "take another sweep.name"
        ) from None


def _kind(distribution: BaseDistribution) -> str:
    scale = "logarithmic" if getattr(distribution, "log", False) else "linear"
    words = {IntDistribution: f"a {scale} range of whole numbers", FloatDistribution: f"a {scale} interval"}
    return words.get(type(distribution), "a list of choices")


def _check_alone(trials: Sequence[optuna.trial.FrozenTrial], is_dead: Callable[[Owner], bool]) -> None:
    running = (trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING)
    owners = [Owner(**trial.user_attrs["owner"]) for trial in running if "owner" in trial.user_attrs]
    alive = next((owner for owner in owners if not is_dead(owner)), None)
    if alive:
        raise SettingsError(
            f"sweep.on_change=extend must find nobody else at work to add choices, got process {alive.pid} on "
            f"{alive.host}; wait for it, or end it"
        )


def _replace_choices(study: optuna.Study, longer: Mapping[str, BaseDistribution], storage: Storage) -> None:
    """Write longer lists of choices into Optuna's table of parameters, all at once; places in the lists stay."""
    statement = sqlalchemy.text(
        "UPDATE trial_params SET distribution_json = :json WHERE param_name = :key "
        "AND trial_id IN (SELECT trial_id FROM trials WHERE study_id = :study)"
    )
    with sqlalchemy.create_engine(storage.url, poolclass=NullPool).begin() as connection:
        for key, distribution in longer.items():
            values = {"json": distribution_to_json(distribution), "key": key, "study": study._study_id}
            connection.execute(statement, values)
