"""Batches without padding: tokens end to end, and the bins in which attention looks at them.

Linear layers see the tokens of a batch in one row. Attention wants rectangles, so sentences are packed into *bins* as
wide as the longest of them, several short ones to a bin, and a mask keeps them apart. What a trial's batch looks like
depends on that trial alone; batches of several orders are stacked by filling up to the largest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit

FILLER = -1
"""The sentence number of a token or a slot that is nobody's; nobody attends to it but its like."""

PAD_MULTIPLE = 16
"""Tokens of a batch and columns of a bin are filled up to a multiple of so many, or more where there are many: a CPU's
library compiles its products anew for every new shape, and keeps a thousand of them.
"""

APART = -1e30
"""Added to the scores of tokens of different sentences: finite, for a filler query may find no key of its own."""


@dataclass(frozen=True)
class Packed:
    """One batch of one order of examples: ``tokens`` long, ``sentences`` deep, in ``bins`` of ``width`` slots.

    ``ids``, ``positions`` and ``types`` (tokens,): rows of the word, the position and the token type table. A pair is
    one sentence here, whose texts attend to each other. ``first`` (sentences,): where each sentence's [CLS] is.
    ``labels`` (sentences,). ``sentence`` (tokens,): whose token it is. ``bin`` (sentences,) and ``column``
    (sentences,): where each sentence starts.
    """

    ids: np.ndarray
    positions: np.ndarray
    types: np.ndarray
    first: np.ndarray
    labels: np.ndarray
    sentence: np.ndarray
    bin: np.ndarray
    column: np.ndarray
    bins: int
    width: int


def pack(split: EncodedSplit, examples: np.ndarray, share: bool = True) -> Packed:
    """Pack ``examples`` (sentences,), numbers of rows of ``split``, in the order given; may they ``share`` bins?"""
    starts = split.offsets[examples]
    lengths = split.offsets[examples + 1] - starts
    width = round_up(int(lengths.max()), PAD_MULTIPLE)
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sentence = np.repeat(np.arange(len(examples)), lengths)
    positions = np.arange(lengths.sum()) - first[sentence]
    bin_, column = _fill_bins(lengths, width) if share else _one_per_bin(len(lengths))
    tokens = starts[sentence] + positions
    return Packed(
        ids=split.tokens[tokens].astype(np.int64),
        positions=positions,
        types=np.zeros_like(positions) if split.types is None else split.types[tokens].astype(np.int64),
        first=first,
        labels=split.labels[examples],
        sentence=sentence,
        bin=bin_,
        column=column,
        bins=int(bin_.max()) + 1,
        width=width,
    )


def _fill_bins(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Put each sentence, the longest first, into the first bin with room: its bin, and its first column there."""
    used: list[int] = []
    places = np.empty((2, len(lengths)), dtype=np.int64)
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        chosen = next((b for b, filled in enumerate(used) if filled + length <= width), len(used))
        if chosen == len(used):
            used.append(0)
        places[:, i] = chosen, used[chosen]
        used[chosen] += length
    return places[0], places[1]


@dataclass(frozen=True)
class Exchange:
    """Moves rows between the order of tokens and the order of slots, in both directions.

    ``index`` (written,) names the row that is read for each row written; ``inverse`` (read,) names, for each row read,
    where it went; ``read`` (read,) is false of rows that nobody read on purpose, whose gradient is zero.
    """

    index: torch.Tensor
    inverse: torch.Tensor
    read: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Move ``rows`` (read, size) into their new order (written, size)."""
        moved: torch.Tensor = _Move.apply(rows, self.index, self.inverse, self.read)
        return moved


class _Move(torch.autograd.Function):
    """A gather whose gradient is a gather too: each row is read once, so nothing has to be added up."""

    @staticmethod
    def forward(ctx, rows, index, inverse, read):  # type: ignore[no-untyped-def]
        ctx.grad_buffers = inverse, read
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        inverse, read = ctx.grad_buffers
        back = gradient.index_select(0, inverse)
        if read is not None:  # the inverse of the others is their own trial's row 0: a number, wherever that is one
            back.mul_(read.to(back.dtype)[:, None])
        return back, None, None, None


@dataclass(frozen=True)
class Placement:
    """Where tokens, a row each, stand in the bins. The leading size is 1 or the trials'.

    ``bin``, ``column`` (orders, rows): the slot of each row. ``row`` (orders, bins, columns): the row of each slot, 0
    where there is none. ``owner`` (orders, bins, columns): the sentence of each slot, or FILLER. ``empty`` (orders,
    rows) marks rows that are filler; None where there are none.
    """

    bin: torch.Tensor
    column: torch.Tensor
    row: torch.Tensor
    owner: torch.Tensor
    empty: torch.Tensor | None

    def to_slots(self, trials: int, heads: int, pieces: int) -> Exchange:
        """Move ``(trials, rows, pieces, heads)`` to ``(pieces, trials, bins, heads, columns)``, vectors of a head."""
        read = None
        if self.empty is not None:
            read = ~self.empty[:, :, None].expand(trials, self.empty.shape[1], pieces * heads).reshape(-1)
        return Exchange(self._sources(trials, heads, pieces), self._targets(trials, heads, pieces), read)

    def to_rows(self, trials: int, heads: int) -> Exchange:
        """Move ``(trials, bins, heads, columns)`` to ``(trials, rows, heads)``, vectors of a head."""
        orders, bins, columns = self.owner.shape
        read = (self.owner != FILLER).view(orders, bins, 1, columns).expand(trials, bins, heads, columns)
        return Exchange(self._targets(trials, heads, 1), self._sources(trials, heads, 1), read.reshape(-1))

    def _sources(self, trials: int, heads: int, pieces: int) -> torch.Tensor:
        """Where each slot's vectors are among those of the rows, ``(pieces * trials * bins * heads * columns,)``."""
        row = self.row[:, :, None] * (pieces * heads)
        if trials > 1:
            row = row + self._steps(trials, self.bin.shape[1] * pieces * heads).view(-1, 1, 1, 1)
        return (row + self._steps(pieces * heads, 1).view(pieces, 1, 1, heads, 1)).reshape(-1)

    def _targets(self, trials: int, heads: int, pieces: int) -> torch.Tensor:
        """Where each row's vectors are among those of the slots, ``(trials * rows * pieces * heads,)``."""
        bins, columns = self.row.shape[1:]
        slot = torch.add(self.column, self.bin, alpha=heads * columns)
        if trials > 1:
            slot = slot + self._steps(trials, bins * heads * columns).view(-1, 1)
        vectors = self._steps(pieces, trials * bins * heads * columns).view(-1, 1) + self._steps(heads, columns)
        return (slot[:, :, None, None] + vectors).reshape(-1)

    def _steps(self, count: int, size: int) -> torch.Tensor:
        """``count`` multiples of ``size`` from 0."""
        return torch.arange(0, count * size, size, device=self.bin.device)


@dataclass(frozen=True)
class Batch:
    """Batches of one or several orders, stacked; the leading size ``orders`` is 1 where all trials share one.

    ``ids``, ``positions``, ``types`` (orders, tokens), filled up with zeros; ``first``, ``labels`` (orders, sentences).
    ``packs`` are what was stacked. ``shared`` is where tokens stand in as few bins as will do, ``alone`` where they
    stand in bins of one sentence each. A batch of :attr:`fixed` size, which is one that has ``lengths`` (orders,
    sentences) and knows bins of one sentence only, is worked on without a loop over trials and without a sum whose
    order is left open.
    """

    packs: tuple[Packed, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    first: torch.Tensor
    labels: torch.Tensor
    shared: Placement
    alone: Placement
    lengths: torch.Tensor | None = None

    @property
    def fixed(self) -> bool:
        """Whether shapes say nothing about what is in the batch."""
        return self.lengths is not None

    @cached_property
    def token_mask(self) -> torch.Tensor:
        """What is added to the scores of a token for every other of its bin, ``(orders, bins, 1, width, width)``."""
        return _mask(self.shared.owner, self.shared.owner)

    @cached_property
    def first_mask(self) -> torch.Tensor:
        """What is added to the scores of [CLS] for every token of its own, ``(orders, sentences, 1, 1, width)``."""
        return _mask(self.alone.owner[:, :, :1], self.alone.owner)


def _mask(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """0 within a sentence, ``APART`` elsewhere."""
    queries, keys = queries[:, :, None, :, None], keys[:, :, None, None, :]
    shape = torch.broadcast_shapes(queries.shape, keys.shape)
    return torch.ne(queries, keys, out=torch.empty(shape, device=queries.device)).mul_(APART)


def stack_batches(packs: Sequence[Packed], device: torch.device) -> Batch:
    """Stack the batches of several orders; they hold the same number of sentences each."""

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    size = round_up(max(len(p.ids) for p in packs), PAD_MULTIPLE)
    bins = round_up(max(p.bins for p in packs), 1)
    sentences = len(packs[0].first)
    return Batch(
        packs=tuple(packs),
        ids=on_device(_filled([p.ids for p in packs], 0, size)),
        positions=on_device(_filled([p.positions for p in packs], 0, size)),
        types=on_device(_filled([p.types for p in packs], 0, size)),
        first=on_device(np.stack([p.first for p in packs])),
        labels=on_device(np.stack([p.labels for p in packs])),
        shared=_placement(packs, [(p.bin, p.column) for p in packs], bins, size, device),
        alone=_placement(packs, [_one_per_bin(sentences)] * len(packs), sentences, size, device),
    )


def _placement(
    packs: Sequence[Packed], starts: Sequence[tuple[np.ndarray, np.ndarray]], bins: int, rows: int,
    device: torch.device,
) -> Placement:  # fmt: skip
    """Lay ``rows`` into ``bins``; each sentence ``starts`` in a bin (sentences,) at a column (sentences,)."""
    columns = max(p.width for p in packs)
    row = np.zeros((len(packs), bins, columns), dtype=np.int64)
    owner = np.full((len(packs), bins, columns), FILLER, dtype=np.int64)
    bin_, column = [], []
    for i, (p, start) in enumerate(zip(packs, starts, strict=True)):
        bin_.append(start[0][p.sentence])
        column.append(start[1][p.sentence] + p.positions)
        row[i, bin_[i], column[i]] = np.arange(len(p.sentence))
        owner[i, bin_[i], column[i]] = p.sentence
    empty = _filled([np.zeros(len(p.sentence), dtype=bool) for p in packs], True, rows)
    return Placement(
        bin=torch.from_numpy(_filled(bin_, 0, rows)).to(device),
        column=torch.from_numpy(_filled(column, 0, rows)).to(device),
        row=torch.from_numpy(row).to(device),
        owner=torch.from_numpy(owner).to(device),
        empty=torch.from_numpy(empty).to(device) if empty.any() else None,
    )


def _one_per_bin(sentences: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each sentence starts in bins of one sentence."""
    return np.arange(sentences), np.zeros(sentences, dtype=np.int64)


def round_up(size: int, multiple: int) -> int:
    """Return the next multiple of ``multiple``, or of the largest power of two below ``size / 16`` if that is more."""
    multiple = max(multiple, 1 << (size // 16).bit_length() - 1) if size >= 16 else multiple
    return -(-size // multiple) * multiple


def _filled(arrays: Sequence[np.ndarray], value: object, size: int) -> np.ndarray:
    """Stack vectors, ``(arrays, size)``, filled up with ``value``."""
    stacked = np.full((len(arrays), size), value, dtype=arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked
