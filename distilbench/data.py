"""The sources of text -> one :class:`EncodedSplits`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distilbench.results import SourceUsed


@dataclass(frozen=True)
class TextSplit:
    """Sentences with their labels: ``texts`` (examples), ``labels`` (examples,) int64 in 0..labels-1."""

    texts: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class TextSplits:
    """Everything a source yields. ``selection`` is ``report`` itself where one split does both.

    ``dropped`` counts what was left out, by reason.
    """

    train: TextSplit
    selection: TextSplit
    report: TextSplit
    label_names: tuple[str, ...]
    used: SourceUsed
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedSplit:
    """Token rows without padding, end to end: row i is ``tokens[offsets[i]:offsets[i + 1]]``.

    ``tokens`` (total tokens,) int32, ``offsets`` (examples + 1,) int64, ``labels`` (examples,) int64.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int) -> np.ndarray:
        """The tokens of one example."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class EncodedSplits:
    """The three splits as token numbers; ``selection is report`` where one split does both."""

    train: EncodedSplit
    selection: EncodedSplit
    report: EncodedSplit
    label_names: tuple[str, ...]
    pad_token_id: int
