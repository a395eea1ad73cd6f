"""Train a group of trials in one loop: each step is one forward pass and one update for all trials of a stack."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines import checkpoints
from distilbench.engines.batches import batches_by_length
from distilbench.engines.device import release_memory
from distilbench.engines.fused import kernels
from distilbench.engines.fused.cuda.buckets import BucketedBatches
from distilbench.engines.fused.cuda.graph_step import GraphSteps
from distilbench.engines.fused.cuda.optimizer import CapturableOptimizer
from distilbench.engines.fused.dropout import dropout_masks_for
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.member import Member, Stack
from distilbench.engines.fused.optimizer import StackedOptimizer, num_moments
from distilbench.engines.fused.packing import Batch, pack, stack_batches
from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.fused.prefix import Prefix
from distilbench.engines.fused.threads import MAX_STACKS, map_in_threads
from distilbench.engines.running import SMALLER_BATCH_MESSAGE, Stopwatch, outcome_of
from distilbench.models.build import build_model
from distilbench.results import Status

log = logging.getLogger(__name__)

_FEWEST_EVALUATED = 16
"""Minimum evaluation batch size, however many trials a group has: products of fewer rows are slow."""

_TRIALS_PER_STACK = 4
"""Trials per stack on a CPU: eight would save 2 % of the time (MiniLM on SST-2, batch 16) but take more memory."""

_TRIALS_PER_STACK_OF_TWO = 2
"""The same if two or three stacks run in parallel: two stacks of four would save 4 % of the time in bf16, 1 % in
float32, for 90 and 270 MiB. With more threads, smaller stacks would wait for each other because of Python's lock.
"""

Outcome = tuple[Status, str | None]
"""How a trial ended, and the reason in one line."""


def train_group(members: Sequence[Member], use_graphs: bool, began: float) -> None:
    """Train ``members``, whose set-up ``began`` at that time, until each has its result."""
    try:
        waiting = [TrialGroup(members, use_graphs, Stopwatch(began))]
        while waiting:
            waiting += reversed(waiting.pop().train())
    except BaseException as error:
        left = [member for member in members if member.result is None]
        if not isinstance(error, Exception):
            for member in left:
                checkpoints.remove_stale(member.trial.folder, Status.INTERRUPTED)
            raise
        for member in left:
            member.end(*outcome_of(error, member.trial.settings))


class TrialGroup:
    """Train ``members``, which share a fusion key and are at the same step.

    A member that is pruned, diverges or fails leaves the group. When out of memory, the group is halved without
    repeating a step.
    """

    def __init__(self, members: Sequence[Member], use_graphs: bool, stopwatch: Stopwatch) -> None:
        """``use_graphs`` selects steps with static buffers, captured as CUDA graphs (:mod:`.cuda.graph_step`)."""
        self.members, self.observer, self.stopwatch = members, members[0].trial.observer, stopwatch
        self.context, self.settings = members[0].context, members[0].trial.settings
        self.schedule = self.context.schedule
        self.step = self.recorded = members[0].trial.progress.step
        self.evaluation_due = False
        self.taken: set[int] = set()
        """Indices of the members that have already taken the next step."""
        self.use_graphs = use_graphs
        on_cpu = self.context.device.type == "cpu" and not use_graphs
        self.at_once = min(MAX_STACKS, torch.get_num_threads()) if on_cpu else 1
        """Stacks that take a step in parallel."""
        # each trial has its own hidden states: in total, no more than a single trial's evaluation batch
        stacks, count = self._num_stacks(), len(members)
        parallel = min(stacks, self.at_once)
        at_least = _FEWEST_EVALUATED // min(2, parallel)
        self.eval_share = max(at_least, self.settings.train.eval_batch_size // (-(-count // stacks) * parallel))
        self.trained_from = -1  # not started
        self.eval_batches: dict[tuple[int, int], list[tuple[np.ndarray, Batch]]] = {}
        architecture = self.context.layout.architecture
        kernels.compile_all(self.context.device, self.context.compute_dtype, architecture.heads, architecture.head_size)
        self.graph_steps: GraphSteps | None = None
        self.stacks: list[Stack] = []
        self.losses = self.norms = self.flat_params = torch.empty(0)  # not started: not all trials may fit the device
        self.moments: list[torch.Tensor] = []

    def _initial_state(self) -> list[torch.Tensor]:
        """Return summed losses and last gradient norms, (trials,), parameters and moments, (trials, size)."""
        context = self.context
        initial = dict(context.initial)
        context.initial.clear()  # they are needed once, and as large as a trial
        for seed in {m.trial.settings.seed for m in self.members if m.checkpoint is None} - {*initial}:
            model = build_model(context.resolved, context.splits.label_names, seed)
            initial[seed] = context.layout.flat_params(dict(model.named_parameters()), context.dtype)
        count, moments = len(self.members), num_moments([m.trial.settings.optim for m in self.members])
        losses, norms = torch.zeros(2, count, dtype=context.dtype, device=context.device)
        state = [losses.new_zeros(count, context.layout.size) for _ in range(1 + moments)]
        for t, member in enumerate(self.members):
            for part, values in zip(state, member.start(initial.get(member.trial.settings.seed)), strict=False):
                part[t] = values
        return [losses, norms, *state]

    def _load(self, state: Sequence[torch.Tensor]) -> None:
        """Continue from ``state``, (members, ...) each; stacks that don't run in parallel share gradient buffers."""
        self.graph_steps, self.stacks = None, []  # first, because captured graphs hold memory
        self.losses, self.norms, self.flat_params, *self.moments = (part.to(self.context.device) for part in state)
        if self.trained_from != self.context.trained_from(self.step):
            self.trained_from = self.context.trained_from(self.step)
            # one prefix for all trials, unless they have trained the weights that are frozen from now on
            frozen = self._weights(self.flat_params.new_empty(0, self.context.layout.size))
            self.prefix = self._prefix_of([frozen]) if "word" in self.context.frozen else None
        ends = [int(chosen[-1]) + 1 for chosen in np.array_split(range(len(self.members)), self._num_stacks())]
        for own in map(slice, [0, *ends], ends):
            thread = len(self.stacks) % self.at_once
            lender = self.stacks[thread].weights if thread < len(self.stacks) else None
            weights = self._weights(self.flat_params[own], lender)
            settings = [m.trial.settings.optim for m in self.members[own]]
            moments = [moment[own] for moment in self.moments]
            optimizer = StackedOptimizer(weights, moments, settings, self.context.first_steps)
            seeds = [m.trial.settings.seed for m in self.members[own]]
            orders = seeds[:1] if len(set(seeds)) == 1 else seeds
            prefix = self.prefix or self._prefix_of([weights.view_trial(t) for t in range(len(seeds))])
            self.stacks.append(Stack(own, thread, weights, optimizer, orders, prefix))

    def _num_stacks(self) -> int:
        """Return the number of stacks: one, or on a CPU a multiple of ``at_once``, if there are as many members."""
        count = len(self.members)
        if self.use_graphs or self.context.device.type != "cpu":
            return 1
        size = _TRIALS_PER_STACK if self.at_once in (1, MAX_STACKS) else _TRIALS_PER_STACK_OF_TWO
        return min(count, -(-count // (size * self.at_once)) * self.at_once)

    def _prefix_of(self, weights: Sequence[StackedWeights]) -> Prefix | None:
        """Return the prefix of ``weights``, one per trial or one shared by all; None if the embeddings are trained."""
        if weights[0].prefix_depth is None:
            return None
        return Prefix(weights, self.context.splits.train, self.schedule, self.settings.freeze.dropout)

    def _weights(self, flat_params: torch.Tensor, grad_owner: StackedWeights | None = None) -> StackedWeights:
        layout, frozen, dtype = self.context.layout, self.context.frozen, self.context.compute_dtype
        return StackedWeights(layout, frozen, dtype, flat_params, grad_owner, self.trained_from)

    def _tensors(self) -> list[torch.Tensor]:
        """Return all per-member state, ``(members, ...)`` each."""
        return [self.losses, self.norms, self.flat_params, *self.moments]

    def _split(self, *parts: Sequence[int]) -> list[TrialGroup]:
        """Return one group for the members at each of these index lists, with their state on the host."""
        groups = []
        for places in parts:
            group = copy(self)
            group.members, group.stacks, group.graph_steps = [self.members[t] for t in places], [], None
            group.taken = set()
            if len(self.losses):
                host = (tensor.cpu()[list(places)] for tensor in self._tensors())
                group.losses, group.norms, group.flat_params, *group.moments = host
            groups.append(group)
        return groups

    def _set_up(self) -> None:
        """Move the state to the device; the time counts as set-up, not as training."""
        self._load(self._tensors() if len(self.losses) else self._initial_state())
        seconds = self.stopwatch.lap().seconds
        for member in self.members:
            member.trial.setup_seconds += seconds

    def train(self) -> list[TrialGroup]:
        """Train to the end, or return parts of the group to train instead, after out of memory or early stopping.

        A single trial that runs out of memory repeats the step or evaluation with half the examples at a time.
        """
        while self.members:
            try:
                if not self.evaluation_due and self._is_at_end():
                    return self._finish()
                if not self.stacks:
                    self._set_up()
                if self.evaluation_due:
                    self._evaluate()
                else:
                    self._advance()
                if not self.evaluation_due and self.observer.wants_checkpoint():
                    self._write_checkpoints()
                continue
            except Exception as error:  # the trials' boundary: other groups continue
                outcome = outcome_of(error, self.settings)
            if outcome[0] is Status.OUT_OF_MEMORY:
                release_memory()  # only here: the exception's frames refer to the step's tensors
                if len(self.members) > 1:
                    return self._halves()
                if self._halve_micro_batch(self.members[0]):
                    continue
            self._remove(dict.fromkeys(range(len(self.members)), outcome))
        return []

    def _halves(self) -> list[TrialGroup]:
        """Halve the group, or split it into the members that have already taken the step and the rest."""
        everyone = range(len(self.members))
        first = sorted(self.taken) or everyone[: len(everyone) // 2]
        groups = self._split(first, [t for t in everyone if t not in first])
        groups[0].taken = set(range(len(self.taken)))
        return groups

    def _is_at_end(self) -> bool:
        """Return whether a member has taken its last step."""
        return any(member.trial.is_over for member in self.members)

    def _halve_micro_batch(self, member: Member) -> bool:
        """Halve the batch that ran out of memory, in training or evaluation; return False if it is a single example."""
        if self.evaluation_due or self._is_at_end():
            self.eval_batches.clear()
            if self.prefix is not None:
                self.prefix.clear_cache()
            member.eval_batch, before = max(1, member.eval_batch // 2), member.eval_batch
            return before > 1
        smaller = member.trial.settings.train.smaller_micro_batch(member.micro_batch)
        if smaller is None:
            return False
        member.micro_batch = smaller
        log.warning(SMALLER_BATCH_MESSAGE, smaller)
        return True

    def _advance(self) -> None:
        """Take one step, and record it if a record is due."""
        if self.use_graphs and self._takes_whole_batch():
            self._graph_step()
        else:
            self.graph_steps = None  # after out of memory: captured graphs hold memory
            self._step([stack for stack in self.stacks if stack.trial_slice.start not in self.taken])
        self.step, self.taken = self.step + 1, set()
        self.evaluation_due = self.schedule.evaluates_after(self.step)
        if self.schedule.records_after(self.step):
            self._record()

    def _step(self, stacks: Sequence[Stack]) -> None:
        """Take a step of ``stacks``, ``at_once`` of them in parallel."""
        for stack in stacks:
            if stack.prefix is not None:  # here with all threads, and once if stacks share it
                stack.prefix.prepare(stack.orders, self.step, self.members[0].micro_batch)

        def take(stack: Stack) -> None:
            loss = self._forward_backward(stack)
            lrs = [member.lrs[self.step] for member in self.members[stack.trial_slice]]
            self.norms[stack.trial_slice] = stack.optimizer.step(self.step + 1, lrs)
            self.losses[stack.trial_slice] += loss
            self.taken.update(range(len(self.members))[stack.trial_slice])

        self._in_threads(take, stacks)

    def _in_threads(self, act: Callable[[Stack], object], stacks: Sequence[Stack]) -> None:
        """Call ``act`` with each of ``stacks``; a thread's calls come one after another and reuse its freed memory."""
        of_threads = ([stack for stack in stacks if stack.thread == thread] for thread in range(self.at_once))
        map_in_threads(lambda own: [act(stack) for stack in own], [own for own in of_threads if own])

    def _takes_whole_batch(self) -> bool:
        """Return whether a batch is one micro-batch."""
        return self.members[0].micro_batch >= self.settings.train.batch_size

    def _graph_step(self) -> None:
        """Take a step with static buffers; the time spent on capturing graphs counts as set-up."""
        if self.graph_steps is None:
            device, [stack] = self.context.device, self.stacks
            bucketed_batches = BucketedBatches(self.context.splits.train, self.schedule, stack.orders, device)
            lrs = np.stack([member.lrs for member in self.members], axis=1)
            optimizer = CapturableOptimizer(stack.optimizer, lrs)
            self.graph_steps = GraphSteps(
                optimizer, stack.prefix, bucketed_batches, self.context.loss, self.losses, self.norms
            )
        seconds = self.graph_steps.take_steps(self.step, self.context.trained_until(self.step))
        self.stopwatch.exclude(seconds)
        for member in self.members:
            member.trial.setup_seconds += seconds

    def _forward_backward(self, stack: Stack) -> torch.Tensor:
        """Compute the gradient of a stack, and return the mean loss of each of its trials, ``(trials,)``."""
        examples = [self.schedule.batch(seed, self.step) for seed in stack.orders]
        size = len(examples[0])
        most = self.members[0].micro_batch
        parts = [slice(start, min(start + most, size)) for start in range(0, size, most)]
        return torch.stack([self._forward_backward_part(stack, examples, part) for part in parts]).sum(0)

    def _forward_backward_part(self, stack: Stack, examples: Sequence[np.ndarray], part: slice) -> torch.Tensor:
        """Add the gradient of a part of each order's batch to earlier parts'; return its share of the mean loss."""
        size = len(examples[0])
        packs = [pack(self.context.splits.train, chosen[part]) for chosen in examples]
        batch = stack_batches(packs, self.context.device, self.context.compute_dtype)
        stage = f"step+{part.start}" if part.start else "step"
        dropout = dropout_masks_for(stack.orders, stage, self.step, self.context.device)
        stack.weights.part = None if self._takes_whole_batch() else part.start
        forward, hidden = Forward(stack.weights, batch, dropout), None
        if stack.prefix is not None:
            micro_batch, zeros = self.members[0].micro_batch, stack.prefix.zeros_for(batch)
            hidden = stack.prefix.hidden(stack.orders, self.step, part, micro_batch, out=zeros)
        each = forward.losses(self.context.loss, hidden)
        losses = each.mean(1) * (each.shape[1] / size)
        forward.backward(losses.sum())
        return losses.detach()

    def _record(self) -> None:
        """Record the steps since the last record for each member."""
        steps = self.step - self.recorded
        losses, norms = (self.losses / steps).tolist(), self.norms.tolist()  # synchronizes before the lap is read
        lap = self.stopwatch.lap()
        self.losses.zero_()
        self.recorded = self.step

        def tell(t: int, member: Member) -> None:
            member.trial.record(self.step, lap, losses[t], float(member.lrs[self.step - 1]), norms[t])

        self._for_each_member(tell)
        self.stopwatch.lap()

    def _evaluate(self) -> None:
        """Evaluate on the selection split, keep best weights, let the observer prune members, and save the others."""
        splits = self.context.splits
        logits = self._predict(splits.selection)
        self.evaluation_due = False
        lap, last = self.stopwatch.lap(), self.step == self.schedule.steps

        def judge(t: int, member: Member) -> None:
            if member.trial.evaluate(logits[t], lap):
                member.best_params = None if last else self.flat_params[t].to("cpu", copy=True)

        self._for_each_member(judge)
        self._save()
        if self.members and self.step in self.context.frozen_levels:
            self._load(self._tensors())
        self.stopwatch.lap()

    def _save(self) -> None:
        """Write checkpoints of the members that have steps left."""
        for t, member in enumerate(self.members):
            if member.trial.settings.train.checkpoints and not member.trial.is_over:
                member.save(self.flat_params[t], [moment[t] for moment in self.moments])

    def _write_checkpoints(self) -> None:
        """Write checkpoints between two evaluations because the process is about to end."""
        if self.step != self.recorded:
            self._record()
        self._save()
        self.observer.on_checkpoint()

    def _predict(self, split: EncodedSplit) -> np.ndarray:
        """Return the logits of every trial, ``(trials, examples, labels)`` float32, in the order of ``split``."""
        logits = np.empty((len(self.members), len(split), len(self.context.splits.label_names)), dtype=np.float32)
        size = min(self.members[0].eval_batch, self.eval_share)
        if (id(split), size) not in self.eval_batches:
            self.eval_batches[id(split), size] = [
                (examples, stack_batches([pack(split, examples)], self.context.device, self.context.compute_dtype))
                for examples in batches_by_length(split, size)
            ]
        for examples, batch in self.eval_batches[id(split), size]:
            self._predict_batch(split, examples, batch, logits)
        return logits

    def _predict_batch(self, split: EncodedSplit, examples: np.ndarray, batch: Batch, logits: np.ndarray) -> None:
        """Fill in ``logits`` (trials, examples, labels) of ``batch``, the ``examples`` of ``split``."""
        hidden = None if self.prefix is None else self.prefix.hidden_without_dropout(split, examples, batch)

        @torch.no_grad()  # holds for the thread that calls
        def predict(stack: Stack) -> None:
            own = Forward(stack.weights, batch, None).logits(hidden)
            logits[stack.trial_slice, examples] = own.float().cpu().numpy()

        self._in_threads(predict, self.stacks)

    def _finish(self) -> list[TrialGroup]:
        """Restore the best weights, evaluate them on the report split, and export them.

        If others have steps left, return two groups instead: the members at their end, and the others.
        """
        ends = [t for t, member in enumerate(self.members) if member.trial.is_over]
        go_on = [t for t in range(len(self.members)) if t not in ends]
        if go_on:
            return self._split(ends, go_on)
        if not len(self.losses):  # resumed with nothing left to train
            self._set_up()
        best = [self.flat_params[t] if m.best_params is None else m.best_params for t, m in enumerate(self.members)]
        self.graph_steps, self.stacks, self.moments = None, [], []  # free their memory before allocating more
        flat_params = torch.stack([row.to(self.context.device) for row in best])
        self._load([self.losses, self.norms, flat_params])
        splits = self.context.splits
        is_resumed = any(m.trial.best.logits is None for m in self.members)
        selection = self._predict(splits.selection) if is_resumed else None
        report = self._predict(splits.report) if splits.selection is not splits.report else None
        for t, member in enumerate(self.members):
            member.trial.store_best(None if selection is None else selection[t], None if report is None else report[t])

        def finish(t: int, member: Member) -> Outcome:
            if member.trial.settings.output.save_model:
                member.export(flat_params[t])
            return Status.FINISHED, None

        self._for_each_member(finish)
        return []

    def _for_each_member(self, act: Callable[[int, Member], Outcome | None]) -> None:
        """Call ``act`` with each index and member; if it returns an outcome or raises, the member leaves the group."""
        outcomes: dict[int, Outcome] = {}
        for t, member in enumerate(self.members):
            try:
                outcome = act(t, member)
            except Exception as error:  # the trial's boundary: the others continue
                outcome = outcome_of(error, member.trial.settings)
            if outcome is not None:
                outcomes[t] = outcome
        self._remove(outcomes)

    def _remove(self, outcomes: Mapping[int, Outcome]) -> None:
        """Store the results of the members at these indices, and continue with the others."""
        for t, outcome in outcomes.items():
            self.members[t].end(*outcome)
        staying = [t for t in range(len(self.members)) if t not in outcomes]
        self.members = [self.members[t] for t in staying]
        if outcomes and staying:
            self._load([part[staying] for part in self._tensors()])
