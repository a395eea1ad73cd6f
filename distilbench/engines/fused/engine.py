"""The fused engine: trials that share a :func:`~distilbench.identity.fusion_key` train in one forward pass.

Compared with Hugging Face Trainer, it skips what does not change the result: padding, vocabulary rows that never
occur, all but [CLS] in the last layer, and repeated passes through the frozen prefix (:mod:`.packing`, :mod:`.encoder`,
:mod:`.prefix`). Results equal Trainer's up to rounding and, with dropout, up to the random draw: masks are keyed by
seed and step (:mod:`.dropout`), so that, apart from rounding, a trial's result does not depend on its group.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import psutil
import torch

from distilbench.data.tokens import EncodedSplits
from distilbench.engines.base import TrialObserver
from distilbench.engines.batches import BatchSchedule, batches_by_length
from distilbench.engines.device import (
    describe_device,
    gc_frozen,
    release_memory,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
)
from distilbench.engines.fused.compatibility import check_fusable
from distilbench.engines.fused.loop import train_group
from distilbench.engines.fused.member import GroupContext, Member
from distilbench.engines.fused.params import FlatParamLayout, Vocabulary
from distilbench.engines.moving_freeze import planned_flops, planned_levels
from distilbench.engines.optimization import build_loss
from distilbench.engines.running import RunningTrial, outcome_of
from distilbench.identity import fusion_key
from distilbench.models.build import build_model
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import freeze, parameter_counts
from distilbench.models.resolve import check_trial, resolve_model
from distilbench.results import TrialResult
from distilbench.settings import TrialSettings

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.8
"""Share of the free memory that a group may use."""


class FusedEngine:
    """Train trials in groups, one stacked model per group; see :class:`distilbench.engines.base.Engine`.

    ``dtype`` is that of weights and optimizer: float32, or float64 for exact comparisons. ``graph_steps`` selects
    :mod:`.cuda.graph_step`, by default on CUDA only. A CPU captures no graphs, and such steps are slower there: MiniLM
    on SST-2, batch 16, takes 2.7 times the CPU time per step, with freeze=3 1.6 to 2 times.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, graph_steps: bool | None = None) -> None:
        self.dtype, self.graph_steps = dtype, graph_steps

    def train(
        self, trials: Sequence[TrialSettings], splits: EncodedSplits, observer: TrialObserver
    ) -> list[TrialResult]:
        """Train every trial on ``splits``; see :class:`distilbench.engines.base.Engine`."""
        results: dict[int, TrialResult] = {}
        groups: dict[Hashable, dict[int, TrialSettings]] = defaultdict(dict)
        for index, settings in enumerate(trials):
            groups[fusion_key(settings)][index] = settings
        with gc_frozen():
            for group in groups.values():
                results |= self._train_group(group, splits, observer)
                release_memory()
        return [results[index] for index in range(len(trials))]

    def _train_group(
        self, trials: dict[int, TrialSettings], splits: EncodedSplits, observer: TrialObserver
    ) -> dict[int, TrialResult]:
        """Train trials of one fusion key, at once those that fit into memory and resume from the same step."""
        began = time.perf_counter()
        results: dict[int, TrialResult] = {}
        try:
            context = _group_context(next(iter(trials.values())), splits, self.dtype)
        except Exception as error:  # the trials' boundary: other groups continue
            return {index: TrialResult(*outcome_of(error, settings)) for index, settings in trials.items()}
        seeds = sorted({settings.seed for settings in trials.values()})
        if _differs_by_seed(context, splits, seeds):
            for seed in seeds:
                own = {index: settings for index, settings in trials.items() if settings.seed == seed}
                results |= self._train_group(own, splits, observer)
            return results
        graph_steps = context.device.type == "cuda" if self.graph_steps is None else self.graph_steps
        waiting: dict[int, list[Member]] = defaultdict(list)
        for index, settings in trials.items():
            try:
                shared = splits, observer, context.device, {**context.about}, context.flops
                member = Member.of(RunningTrial(index, settings, *shared), context)
                waiting[member.trial.progress.step].append(member)
            except Exception as error:  # the trial's boundary: the others continue
                results[index] = TrialResult(*outcome_of(error, settings))
        for members in waiting.values():
            size = _trials_that_fit(context, members[0].trial.settings) if len(members) > 1 else 1
            for start in range(0, len(members), size):
                train_group(members[start : start + size], graph_steps, began)
                began = time.perf_counter()
            results |= {member.trial.index: member.result for member in members if member.result}
        return results


def _group_context(settings: TrialSettings, splits: EncodedSplits, dtype: torch.dtype) -> GroupContext:
    """Build what the trials share."""
    device = resolve_device(settings.engine.device)
    precision = resolve_precision(settings.train.precision, device)
    reset_peak_memory(device)
    resolved = resolve_model(settings.model)
    check_trial(resolved, settings)
    check_fusable(settings, resolved, precision)
    model = build_model(resolved, splits.label_names, settings.seed)
    schedule = BatchSchedule.of(settings.train, len(splits.train))
    freeze(model, settings.freeze)
    frozen_levels = planned_levels(settings.freeze, schedule, top=resolved.depth + 1)
    flops = planned_flops(model, frozen_levels) if settings.freeze.is_dynamic else {0: TrainFlops.of(model)}
    trained, total = parameter_counts(model)
    compact, vocabulary = _compact(splits, model.config.pad_token_id)
    layout = FlatParamLayout(model, vocabulary, settings.freeze.deterministic_layers(resolved.depth))
    compute_dtype = torch.bfloat16 if precision == "bf16" else dtype
    return GroupContext(
        splits=compact,
        resolved=resolved,
        layout=layout,
        frozen=layout.frozen_weights(dict(model.named_parameters()), device, dtype, compute_dtype, frozen_levels[0]),
        schedule=schedule,
        frozen_levels=frozen_levels,
        flops=flops,
        loss=build_loss(settings.train, splits.train.labels, len(splits.label_names), device, dtype),
        device=device,
        about={
            "device": describe_device(device),
            "precision": precision,
            "trainable_parameters": trained,
            "total_parameters": total,
        },
        dtype=dtype,
        compute_dtype=compute_dtype,
        initial={settings.seed: layout.flat_params(dict(model.named_parameters()), dtype)},
    )


def _differs_by_seed(context: GroupContext, splits: EncodedSplits, seeds: Sequence[int]) -> bool:
    """Return whether frozen weights differ between seeds: a pooler that the checkpoint lacks is drawn by seed."""
    if len(seeds) == 1 or "dense.weight" not in context.frozen:
        return False
    models = [build_model(context.resolved, splits.label_names, seed) for seed in seeds[:2]]
    one, other = (context.layout.read("dense.weight", dict(model.named_parameters())) for model in models)
    return not torch.equal(one, other)


def _compact(splits: EncodedSplits, padding_idx: int | None) -> tuple[EncodedSplits, Vocabulary]:
    """Renumber tokens over the words of all splits; weight decay also changes words that only evaluations contain."""
    parts = {id(s): s for s in (splits.train, splits.selection, splits.report)}
    words = np.unique(np.concatenate([s.tokens for s in parts.values()])).astype(np.int64)
    positions = max(int(np.diff(s.offsets).max()) for s in parts.values())
    compact = {key: replace(s, tokens=np.searchsorted(words, s.tokens)) for key, s in parts.items()}
    padding = np.flatnonzero(words == padding_idx)
    types = 1 if splits.train.types is None else 2
    vocabulary = Vocabulary(words, positions, int(padding[0]) if len(padding) else None, types)
    train, selection, report = (compact[id(s)] for s in (splits.train, splits.selection, splits.report))
    return replace(splits, train=train, selection=selection, report=report), vocabulary


def _trials_that_fit(context: GroupContext, settings: TrialSettings) -> int:
    """Return how many trials fit into the free memory, at least one."""
    on_gpu = context.device.type == "cuda"
    free = torch.cuda.mem_get_info(context.device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, int(free * MEMORY_SHARE / bytes_per_trial(context, settings)))


def bytes_per_trial(context: GroupContext, settings: TrialSettings) -> int:
    """Estimate the memory in bytes that one more trial takes.

    Parameters count five times (weights, gradient, two moments, best weights) and, if products use bf16, twice more in
    bf16: a copy and its gradient, whose space in the float32 gradient a CPU then never touches. Activations saved by
    the forward pass of a batch of the longest examples count twice, since the backward pass allocates as much again:
    in a trained layer 17 values per token and unit of width, and 2.5 per head and pair of tokens (Korthikanti et al.,
    2022, arXiv 2205.05198, section 4.1).
    """
    layout, train = context.layout, context.splits.train
    lengths = np.diff(train.offsets)[next(batches_by_length(train, settings.train.examples_per_pass))]
    model = layout.architecture
    layers = model.depth - (layout.prefix_depth(layout.frozen) or 0)
    values = layers * lengths.sum() * model.heads * (17 * model.head_size + 2.5 * lengths.max())
    compute = context.compute_dtype.itemsize
    copies = 5 * context.dtype.itemsize + (2 * compute if context.compute_dtype != context.dtype else 0)
    return int(layout.size * copies + 2 * values * compute)
