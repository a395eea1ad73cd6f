"""Batches without padding: tokens concatenated for linear layers, and packed into bins for attention.

Attention needs rectangles, so sentences are packed into *bins* as wide as the longest sentence, several short ones to a
bin, with a mask between them. A trial's batch depends on that trial alone; batches of several orders are stacked by
padding them to the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.device import to_device

PADDING = -1
"""The sentence number of padding tokens and empty slots, which attend only to each other."""

PAD_MULTIPLE = 16
"""Tokens of a batch and columns of a bin are padded to a multiple of this, or of more for large sizes: oneDNN, which
computes bf16 products on a CPU, compiles a kernel for every new shape and caches a thousand of them.
"""

MASKED_SCORE = -1e30
"""Added to the scores between different sentences: finite, because a padding query may have no key of its own."""


@dataclass(frozen=True)
class Packed:
    """One batch in one order of examples: concatenated tokens, and ``bins`` of ``width`` slots.

    ``ids``, ``positions`` and ``types`` (tokens,) are rows of the word, position and token type tables. A pair counts
    as one sentence, whose texts attend to each other. ``first`` (sentences,) is the index of each sentence's [CLS].
    ``labels`` (sentences,). ``sentence`` (tokens,) is the sentence of each token. ``bin`` (sentences,) and ``column``
    (sentences,) are the slot in which each sentence starts.
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
    """Pack ``examples`` (sentences,), indices into ``split``, in the given order.

    With ``share``, several sentences may share a bin; otherwise each has its own.
    """
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
    """Assign each sentence, longest first, to the first bin with room; return its bin and its first column there."""
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


class _Move(torch.autograd.Function):
    """A gather whose gradient is a gather, too: each row is read once, so no sums are needed.

    ``index`` (written,) is the source row of each written row; ``inverse`` (read,) is the target of each source row.
    If the sources are token rows of ``trials`` trials, ``empty`` marks padding rows, whose gradient is zero.
    """

    @staticmethod
    def forward(ctx, rows, index, inverse, trials, empty):  # type: ignore[no-untyped-def]
        ctx.inverse, ctx.trials, ctx.empty = inverse, trials, empty
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        back = gradient.index_select(0, ctx.inverse)
        if ctx.empty is not None:  # ctx.inverse of a padding row is an arbitrary slot of its trial
            back.view(ctx.trials, ctx.empty.shape[1], -1).masked_fill_(ctx.empty[:, :, None], 0.0)
        return back, None, None, None, None


@dataclass(frozen=True, eq=False)
class Placement:
    """The mapping between token rows and slots of bins. The leading size is 1 or the number of trials.

    ``slot`` (orders, rows) is the slot of each row, in ``bins * columns``. ``row`` (orders, bins, columns) is the row
    of each slot, 0 for an empty slot. ``owner`` (orders, bins, columns) is the sentence of each slot, or PADDING.
    ``empty`` (orders, rows) marks padding rows; None if there are none.
    """

    slot: torch.Tensor
    row: torch.Tensor
    owner: torch.Tensor
    empty: torch.Tensor | None
    _moves: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def to_slots(self, rows: torch.Tensor, pieces: int, heads: int) -> torch.Tensor:
        """Move ``(trials, rows, pieces * heads * size)`` to ``(pieces, trials, bins, heads, columns, size)``."""
        trials, _, width = rows.shape
        sources, targets = self._between(trials, pieces, heads)
        vectors = rows.view(-1, width // (pieces * heads))
        moved: torch.Tensor = _Move.apply(vectors, sources, targets, trials, self.empty)
        _, bins, columns = self.row.shape
        return moved.view(pieces, trials, bins, heads, columns, -1)

    def to_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Move ``(trials, bins, heads, columns, size)`` to ``(trials, rows, heads * size)``.

        An empty slot gets the gradient of an arbitrary row of its trial, which has no effect: nothing attends to it.
        """
        trials, _, heads, _, size = slots.shape
        sources, targets = self._between(trials, 1, heads)
        moved: torch.Tensor = _Move.apply(slots.reshape(-1, size), targets, sources, trials, None)
        return moved.view(trials, self.slot.shape[1], heads * size)

    def _between(self, trials: int, pieces: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row vector that each slot vector reads, and the slot of each row vector, ``(vectors,)`` each."""
        key = trials, pieces, heads
        if key not in self._moves:
            _, bins, columns = self.row.shape
            shape = pieces, trials, bins, heads, columns
            of_slots = torch.arange(math.prod(shape), device=self.slot.device).view(shape).permute(1, 2, 4, 0, 3)
            of_slots = of_slots.reshape(trials, bins * columns, pieces * heads)
            count = self.slot.shape[1]
            of_rows = torch.arange(trials * count * pieces * heads, device=self.slot.device).view(trials, count, -1)
            sources = of_rows.take_along_dim(self.row.flatten(1)[:, :, None], dim=1)
            sources = sources.view(trials, bins, columns, pieces, heads).permute(3, 0, 1, 4, 2)
            targets = of_slots.take_along_dim(self.slot[:, :, None], dim=1)
            self._moves[key] = sources.reshape(-1), targets.reshape(-1)
        return self._moves[key]


@dataclass(frozen=True, eq=False)
class Batch:
    """Stacked batches of one or several orders; the leading size ``orders`` is 1 if all trials share one order.

    ``ids``, ``positions``, ``types`` (orders, tokens) are padded with zeros; ``first``, ``labels`` are (orders,
    sentences). ``packs`` are the stacked batches, and ``width`` is the number of slots in a bin. ``place`` computes
    ``packed``, which places tokens in as few bins as possible, and ``unpacked``, with bins of one sentence each; the
    attention kernels need neither. A batch whose shapes don't depend on its content (a bucket) has ``lengths`` (orders,
    sentences) and only bins of one sentence; it is processed without loops over trials, and sums have a fixed order.
    """

    packs: tuple[Packed, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    first: torch.Tensor
    labels: torch.Tensor
    width: int
    place: Callable[[], tuple[Placement, Placement]]
    lengths: torch.Tensor | None = None

    @cached_property
    def _placements(self) -> tuple[Placement, Placement]:
        return self.place()

    @property
    def packed(self) -> Placement:
        """The placement of tokens in as few bins as possible."""
        return self._placements[0]

    @property
    def unpacked(self) -> Placement:
        """The placement of tokens in bins of one sentence each."""
        return self._placements[1]

    @cached_property
    def token_mask(self) -> torch.Tensor:
        """The mask added to the attention scores within a bin, ``(orders, bins, 1, width, width)``."""
        owner = self.packed.owner[:, :, None]
        return _mask(owner[..., None], owner[..., None, :])

    @cached_property
    def first_mask(self) -> torch.Tensor:
        """The mask added to the attention scores of [CLS] in its sentence's bin, ``(orders, sentences, 1, width)``."""
        owner = self.unpacked.owner[:, :, None]
        return _mask(owner[..., :1], owner)


def _mask(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return 0 within a sentence, ``MASKED_SCORE`` elsewhere."""
    shape = torch.broadcast_shapes(queries.shape, keys.shape)
    return torch.ne(queries, keys, out=torch.empty(shape, device=queries.device)).mul_(MASKED_SCORE)


def stack_batches(packs: Sequence[Packed], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Batch:
    """Stack the batches of several orders, which have the same number of sentences.

    ``dtype`` is that of matrix products: on a CPU, only bf16 needs padding to ``PAD_MULTIPLE``.
    """

    def stacked(arrays: Sequence[np.ndarray], size: int) -> torch.Tensor:
        filled_up = np.zeros((len(arrays), size), dtype=np.int64)
        for row, array in zip(filled_up, arrays, strict=True):
            row[: len(array)] = array
        return to_device(filled_up, device)

    tokens = max(len(p.ids) for p in packs)
    if device.type != "cpu" or dtype == torch.bfloat16:
        tokens = round_up(tokens, PAD_MULTIPLE)
    bins = round_up(max(p.bins for p in packs), 1)
    sentences = len(packs[0].first)

    def place() -> tuple[Placement, Placement]:
        packed = _placement(packs, [(p.bin, p.column) for p in packs], bins, tokens, device)
        return packed, _placement(packs, [_one_per_bin(sentences)] * len(packs), sentences, tokens, device)

    return Batch(
        packs=tuple(packs),
        ids=stacked([p.ids for p in packs], tokens),
        positions=stacked([p.positions for p in packs], tokens),
        types=stacked([p.types for p in packs], tokens),
        first=stacked([p.first for p in packs], sentences),
        labels=stacked([p.labels for p in packs], sentences),
        width=max(p.width for p in packs),
        place=place,
    )


def _placement(
    packs: Sequence[Packed], starts: Sequence[tuple[np.ndarray, np.ndarray]], bins: int, rows: int,
    device: torch.device,
) -> Placement:  # fmt: skip
    """Place ``rows`` in ``bins``; ``starts`` holds each sentence's bin (sentences,) and first column (sentences,)."""
    columns = max(p.width for p in packs)
    slot = np.zeros((len(packs), rows), dtype=np.int64)
    row = np.zeros((len(packs), bins * columns), dtype=np.int64)
    owner = np.full_like(row, PADDING)
    empty = np.ones((len(packs), rows), dtype=bool)
    for i, (p, (bin_, column)) in enumerate(zip(packs, starts, strict=True)):
        count = len(p.sentence)
        own = bin_[p.sentence] * columns + column[p.sentence] + p.positions
        slot[i, :count], row[i, own], owner[i, own], empty[i, :count] = own, np.arange(count), p.sentence, False
    shape = len(packs), bins, columns
    return Placement(
        slot=to_device(slot, device),
        row=to_device(row.reshape(shape), device),
        owner=to_device(owner.reshape(shape), device),
        empty=to_device(empty, device) if empty.any() else None,
    )


def _one_per_bin(sentences: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each sentence's bin and first column with one sentence per bin."""
    return np.arange(sentences), np.zeros(sentences, dtype=np.int64)


def round_up(size: int, multiple: int) -> int:
    """Round ``size`` up to a multiple of ``multiple``, or of the largest power of two up to ``size / 16`` if larger."""
    multiple = max(multiple, 1 << (size // 16).bit_length() - 1) if size >= 16 else multiple
    return -(-size // multiple) * multiple
