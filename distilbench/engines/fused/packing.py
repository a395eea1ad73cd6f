"""Batches without padding: tokens end to end, and the bins in which attention looks at them.

Linear layers see the tokens of a batch in one row. Attention wants rectangles, so sentences are packed into *bins* as
wide as the longest of them, several short ones to a bin, and a mask keeps them apart. What a trial's batch looks like
depends on that trial alone; batches of several orders are stacked by filling up to the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit

FILLER = -1
"""The sentence number of a token or a slot that is nobody's; nobody attends to it but its like."""

PAD_MULTIPLE = 16
"""Tokens of a batch and columns of a bin are filled up to a multiple of so many, or more where there are many: oneDNN,
which takes a CPU's products in bf16, compiles them anew for every new shape, and keeps a thousand of them.
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
    """Pack ``examples`` (sentences,), numbers of rows of ``split``, in the order given.

    They ``share`` bins, or have one each.
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


class _Move(torch.autograd.Function):
    """A gather whose gradient is a gather too: each row is read once, so nothing has to be added up.

    ``index`` (written,) names the row that is read for each row written; ``inverse`` (read,) names, for each row read,
    where it went. Where what is read are the rows of ``trials``, ``empty`` marks filler, whose gradient is zero.
    """

    @staticmethod
    def forward(ctx, rows, index, inverse, trials, empty):  # type: ignore[no-untyped-def]
        ctx.inverse, ctx.trials, ctx.empty = inverse, trials, empty
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        back = gradient.index_select(0, ctx.inverse)
        if ctx.empty is not None:  # the inverse of these is some slot of their own trial
            back.view(ctx.trials, ctx.empty.shape[1], -1).masked_fill_(ctx.empty[:, :, None], 0.0)
        return back, None, None, None, None


@dataclass(frozen=True, eq=False)
class Placement:
    """Where tokens, a row each, stand in the bins. The leading size is 1 or the trials'.

    ``slot`` (orders, rows): that of each row, of the ``bins * columns`` there are. ``row`` (orders, bins, columns): the
    row of each slot, 0 where there is none. ``owner`` (orders, bins, columns): the sentence of each slot, or FILLER.
    ``empty`` (orders, rows) marks rows that are filler; None where there are none.
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

        The gradient of an empty slot is some row's of its trial: no number comes from there, for nobody attends to it.
        """
        trials, _, heads, _, size = slots.shape
        sources, targets = self._between(trials, 1, heads)
        moved: torch.Tensor = _Move.apply(slots.reshape(-1, size), targets, sources, trials, None)
        return moved.view(trials, self.slot.shape[1], heads * size)

    def _between(self, trials: int, pieces: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of the rows' vectors each slot reads, and in which slot each of them is, ``(vectors,)`` each."""
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
    """Batches of one or several orders, stacked; the leading size ``orders`` is 1 where all trials share one.

    ``ids``, ``positions``, ``types`` (orders, tokens), filled up with zeros; ``first``, ``labels`` (orders, sentences).
    ``packs`` are what was stacked. ``shared`` is where tokens stand in as few bins as will do, ``alone`` where they
    stand in bins of one sentence each. A batch of fixed size, whose shapes say nothing about what is in it, has
    ``lengths`` (orders, sentences) and knows bins of one sentence only; it is worked on without a loop over trials and
    without a sum whose order is left open.
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

    @cached_property
    def token_mask(self) -> torch.Tensor:
        """What is added to the scores of a token for every other of its bin, ``(orders, bins, 1, width, width)``."""
        owner = self.shared.owner[:, :, None]
        return _mask(owner[..., None], owner[..., None, :])

    @cached_property
    def first_mask(self) -> torch.Tensor:
        """What is added to the scores of [CLS] for every token of its own, ``(orders, sentences, 1, width)``."""
        owner = self.alone.owner[:, :, None]
        return _mask(owner[..., :1], owner)


def _mask(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """0 within a sentence, ``APART`` elsewhere."""
    shape = torch.broadcast_shapes(queries.shape, keys.shape)
    return torch.ne(queries, keys, out=torch.empty(shape, device=queries.device)).mul_(APART)


def stack_batches(packs: Sequence[Packed], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Batch:
    """Stack the batches of several orders; they hold the same number of sentences each.

    Products are in ``dtype``: a CPU's library takes any number of rows as they are, but in bf16.
    """

    def stacked(arrays: Sequence[np.ndarray], size: int) -> torch.Tensor:
        filled_up = np.zeros((len(arrays), size), dtype=np.int64)
        for row, array in zip(filled_up, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(filled_up).to(device)

    tokens = max(len(p.ids) for p in packs)
    if device.type != "cpu" or dtype == torch.bfloat16:
        tokens = round_up(tokens, PAD_MULTIPLE)
    bins = round_up(max(p.bins for p in packs), 1)
    sentences = len(packs[0].first)
    return Batch(
        packs=tuple(packs),
        ids=stacked([p.ids for p in packs], tokens),
        positions=stacked([p.positions for p in packs], tokens),
        types=stacked([p.types for p in packs], tokens),
        first=stacked([p.first for p in packs], sentences),
        labels=stacked([p.labels for p in packs], sentences),
        shared=_placement(packs, [(p.bin, p.column) for p in packs], bins, tokens, device),
        alone=_placement(packs, [_one_per_bin(sentences)] * len(packs), sentences, tokens, device),
    )


def _placement(
    packs: Sequence[Packed], starts: Sequence[tuple[np.ndarray, np.ndarray]], bins: int, rows: int,
    device: torch.device,
) -> Placement:  # fmt: skip
    """Lay ``rows`` into ``bins``; each sentence ``starts`` in a bin (sentences,) at a column (sentences,)."""
    columns = max(p.width for p in packs)
    slot = np.zeros((len(packs), rows), dtype=np.int64)
    row = np.zeros((len(packs), bins * columns), dtype=np.int64)
    owner = np.full_like(row, FILLER)
    empty = np.ones((len(packs), rows), dtype=bool)
    for i, (p, (bin_, column)) in enumerate(zip(packs, starts, strict=True)):
        count = len(p.sentence)
        own = bin_[p.sentence] * columns + column[p.sentence] + p.positions
        slot[i, :count], row[i, own], owner[i, own], empty[i, :count] = own, np.arange(count), p.sentence, False
    shape = len(packs), bins, columns
    return Placement(
        slot=torch.from_numpy(slot).to(device),
        row=torch.from_numpy(row.reshape(shape)).to(device),
        owner=torch.from_numpy(owner.reshape(shape)).to(device),
        empty=torch.from_numpy(empty).to(device) if empty.any() else None,
    )


def _one_per_bin(sentences: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each sentence starts in bins of one sentence."""
    return np.arange(sentences), np.zeros(sentences, dtype=np.int64)


def round_up(size: int, multiple: int) -> int:
    """Return the next multiple of ``multiple``, or of the largest power of two below ``size / 16`` if that is more."""
    multiple = max(multiple, 1 << (size // 16).bit_length() - 1) if size >= 16 else multiple
    return -(-size // multiple) * multiple
