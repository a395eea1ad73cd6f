"""All that is known here of MLflow's own tables: what its public interface can't say, or takes forty times as long for.

Its search builds every parameter, tag and metric of a run. Of 10,000 runs with 110 entries each, in SQLite on two
cores, it takes 37 CPU seconds; asking for the few columns that a report needs takes 0.8. Nor can it say where the files
of an experiment are from now on. ``tests/tracking/test_mlflow_tables.py`` fails where a new MLflow has other tables.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distilbench.tracking.search import MARK, METRICS, TAGS, RawRun, RunFilter
from distilbench.tracking.uri import StoreAddress, sqlite_url

IDS_PER_QUERY = 500
"""Run ids in one query; SQLite bounds the parameters of a statement (32,766)."""


def store_of_database(uri: str, artifacts: Path) -> Any:
    """Open a database as MLflow's server does, tables made if missing; new experiments keep files in ``artifacts``."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    return SqlAlchemyStore(uri, artifacts.as_uri())


def make_database(file: Path, artifacts: Path) -> None:
    """Make all of MLflow's tables beside ``file`` and put them there at once: half of them could never be opened."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    store_of_database(sqlite_url(partial), artifacts).engine.dispose()
    os.replace(partial, file)


def search_database(address: StoreAddress, experiment_id: str, wanted: RunFilter) -> Iterator[RawRun]:
    """Read runs of a database: several queries, none of which reads more than a report needs."""
    import sqlalchemy
    from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlTag

    engine = sqlalchemy.create_engine(address.uri)
    try:
        with engine.connect() as connection:
            runs = connection.execute(_runs_query(experiment_id, wanted)).all()
            ids = [run.run_uuid for run in runs]
            tags = _by_run(connection, SqlTag, SqlTag.value, TAGS, ids)
            metrics = _by_run(connection, SqlLatestMetric, SqlLatestMetric.value, METRICS, ids)
    finally:
        engine.dispose()
    for run in runs:
        found = tags[run.run_uuid], metrics[run.run_uuid]
        yield RawRun(run.run_uuid, run.name or "", run.start_time or 0, *found, run.artifact_uri)


def _runs_query(experiment_id: str, wanted: RunFilter) -> Any:
    from mlflow.store.tracking.dbmodels.models import SqlParam, SqlRun, SqlTag
    from sqlalchemy import select

    query: Any = select(SqlRun.run_uuid, SqlRun.name, SqlRun.start_time, SqlRun.artifact_uri)
    query = query.where(SqlRun.experiment_id == int(experiment_id), SqlRun.lifecycle_stage == "active")
    if wanted.run_ids:
        query = query.where(SqlRun.run_uuid.in_(wanted.run_ids))
    for table, pairs in ((SqlTag, wanted.tags), (SqlParam, wanted.params)):
        for key, value in pairs.items():
            query = query.where(
                SqlRun.run_uuid.in_(select(table.run_uuid).where(table.key == key, table.value == value))
            )
    marked: Any = SqlRun.run_uuid.in_(select(SqlTag.run_uuid).where(SqlTag.key == MARK))
    kinds = {None: query, True: query.where(marked), False: query.where(~marked)}
    return kinds[wanted.are_trials].order_by(SqlRun.start_time, SqlRun.run_uuid)


def _by_run(
    connection: Any, table: Any, column: Any, keys: Sequence[str], ids: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Key -> value of the asked keys for each run; MLflow flags a metric that is not a number."""
    from sqlalchemy import select

    found: dict[str, dict[str, Any]] = {run_id: {} for run_id in ids}
    flags = [table.is_nan] if hasattr(table, "is_nan") else []
    for some in _batches(ids):
        query = select(table.run_uuid, table.key, column, *flags).where(table.run_uuid.in_(some), table.key.in_(keys))
        for run_id, key, value, *is_nan in connection.execute(query):
            found[run_id][key] = math.nan if is_nan and is_nan[0] else value
    return found


def _batches(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[first : first + IDS_PER_QUERY] for first in range(0, len(ids), IDS_PER_QUERY))


def relocate_experiments(address: StoreAddress, artifacts: Path) -> list[tuple[str, Path, Path, list[str]]]:
    """Name ``artifacts`` as the place of all files that are beside another store.

    Returns each changed experiment's name, its folder before and now, and the ids of its runs that were there.
    """
    import sqlalchemy
    from mlflow.store.tracking.dbmodels.models import SqlExperiment as Table
    from sqlalchemy import select, update

    engine, found = sqlalchemy.create_engine(address.uri), []
    try:
        with engine.begin() as connection:
            experiments: Any = select(Table.experiment_id, Table.name, Table.artifact_location)
            for number, name, location in connection.execute(experiments).all():
                old, new = address.foreign_folder(location or "", str(number)), artifacts / str(number)
                if old:
                    place: Any = update(Table).where(Table.experiment_id == number)
                    connection.execute(place.values(artifact_location=new.as_uri()))
                    found.append((name, old, new, _relocate_runs(connection, number, new)))
    finally:
        engine.dispose()
    return found


def _relocate_runs(connection: Any, number: int, folder: Path) -> list[str]:
    """Name ``folder`` as the place of an experiment's runs; return the ids of those that were elsewhere."""
    from mlflow.store.tracking.dbmodels.models import SqlRun as Table
    from sqlalchemy import select, update

    runs: Any = select(Table.run_uuid, Table.artifact_uri).where(Table.experiment_id == number)
    moved = []
    for run_id, location in connection.execute(runs).all():
        place = f"{folder.as_uri()}/{run_id}/artifacts"
        if location != place and location.endswith(f"/{number}/{run_id}/artifacts"):
            connection.execute(update(Table).where(Table.run_uuid == run_id).values(artifact_uri=place))
            moved.append(run_id)
    return moved
