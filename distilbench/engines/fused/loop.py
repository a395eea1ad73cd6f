"""A group of trials that train at once, in one loop: a step is one forward pass and one update for all of a stack."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.base import TrialObserver
from distilbench.engines.batches import batches_by_length
from distilbench.engines.device import peak_memory, release_memory
from distilbench.engines.evaluation import evaluate_logits, selection_name
from distilbench.engines.fused.cuda.buckets import Timetable
from distilbench.engines.fused.cuda.graph_step import StaticSteps, runner_for
from distilbench.engines.fused.dropout import draws_for
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.member import Member
from distilbench.engines.fused.optimizer import RowOptimizer, moments_needed
from distilbench.engines.fused.packing import Batch, pack, stack_batches
from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.fused.prefix import Budget, TrainingPrefix
from distilbench.engines.outcome import SMALLER, Ended, ending_of, require_finite
from distilbench.models.build import build_model
from distilbench.results import Status, StepRecord, TrialResult

log = logging.getLogger(__name__)

_FEWEST_EVALUATED = 16
"""Examples that a group evaluates at once at least, however many trials it has: products of fewer rows are slow."""

_STACKED = 4
"""Trials that a CPU takes through a step together; the others of a group follow, over the same hidden states.

Eight at once would save 2 % of the time (MiniLM on SST-2, batch 16) and take the activations of eight.
"""

Ending = tuple[Status, str | None]
"""How a trial ended, and in one line why."""


@dataclass
class EvaluationBatch:
    """Rows of a split with what can be kept of them: ``hidden`` under the trained part, where the budget holds it."""

    indices: np.ndarray
    batch: Batch
    hidden: torch.Tensor | None = None


@dataclass
class Stack:
    """Members that take a step together: which of the group, their weights and their optimizer.

    ``orders`` are the seeds of their orders of examples, or the one that all have.
    """

    places: slice
    weights: StackedWeights
    optimizer: RowOptimizer
    orders: list[int]


class Group:
    """Trains ``members``, which share a fusion key and stand at the same step.

    A member that is pruned, diverges or fails leaves the stack; its result goes to ``results`` under its index. Out of
    memory halves the group, without repeating a step.
    """

    def __init__(
        self, members: list[Member], observer: TrialObserver, results: dict[int, TrialResult], prefix_bytes: int,
        static: bool = False,
    ) -> None:  # fmt: skip
        """``static`` steps go through buffers that stay where they are (:mod:`.static`), recorded where that helps."""
        self.members, self.observer, self.results = members, observer, results
        self.ground, self.settings = members[0].ground, members[0].settings
        self.course = self.ground.course
        self.lengths = np.diff(self.ground.splits.train.offsets)
        self.step = self.recorded = members[0].progress.step
        self.evaluation_due = False
        self.taken = 0
        in_turn = not static and self.ground.device.type == "cpu"
        self.stacked = _STACKED if in_turn else len(members)
        # each trial has hidden states of its own: together, no more than one alone would evaluate at once
        together = min(self.stacked, len(members))
        self.eval_share = max(_FEWEST_EVALUATED, self.settings.train.eval_batch_size // together)
        self.static = static
        self.static_steps: StaticSteps | None = None
        self.budget = Budget(prefix_bytes)
        self.evaluations: dict[tuple[int, int], list[EvaluationBatch]] = {}

    def run(self, began: float) -> None:
        """Train every member to its end; ``began`` is when their set-up did."""
        self.mark = began
        try:
            self._set_up()
            self._complete()
        except BaseException as error:
            for member in self.members:
                member.tidy()
            if not isinstance(error, Exception):
                raise
            self._leave(dict.fromkeys(range(len(self.members)), ending_of(error, self.settings)))

    def _set_up(self) -> None:
        ground = self.ground
        self._load(self._initial_state())
        nobody = torch.empty(0, ground.rowmap.size, dtype=ground.dtype, device=ground.device)
        frozen = StackedWeights(ground.rowmap, ground.frozen, ground.low, nobody)
        self.prefix = TrainingPrefix.of(
            frozen, ground.splits.train, self.course, self.settings.freeze.dropout, self.budget
        )
        seconds = self._lap()
        for member in self.members:
            member.setup_seconds = seconds

    def _initial_state(self) -> list[torch.Tensor]:
        """The losses since the last record, the last norms (trials,), the rows and the moments (trials, size)."""
        ground = self.ground
        initial: dict[int, torch.Tensor] = {}
        for seed in {m.seed for m in self.members if m.checkpoint is None}:
            model = build_model(ground.resolved, ground.splits.label_names, seed)
            initial[seed] = ground.rowmap.row(dict(model.named_parameters()), ground.dtype)
        count, moments = len(self.members), moments_needed([m.settings.optim for m in self.members])

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=ground.dtype, device=ground.device)

        state = [zeros(count, ground.rowmap.size) for _ in range(1 + moments)]
        for t, member in enumerate(self.members):
            for part, values in zip(state, member.start(initial.get(member.seed)), strict=False):
                part[t] = values
        return [zeros(count), zeros(count), *state]

    def _load(self, state: Sequence[torch.Tensor]) -> None:
        """Go on from ``state``, whose leading size is that of the members as they are now."""
        self.static_steps = None  # first of all, for its recordings hold memory
        self.losses, self.norms, self.rows, *self.moments = (part.to(self.ground.device) for part in state)
        self.stacks: list[Stack] = []
        for start in range(0, len(self.members), self.stacked):
            self.stacks.append(self._stack(slice(start, start + self.stacked)))

    def _stack(self, places: slice) -> Stack:
        """Make the stack of the members at ``places``; the first lends the others its room for gradients."""
        ground, members = self.ground, self.members[places]
        lender = self.stacks[0].weights if self.stacks else None
        weights = StackedWeights(ground.rowmap, ground.frozen, ground.low, self.rows[places], lender)
        moments = [moment[places] for moment in self.moments]
        seeds = [m.seed for m in members]
        orders = seeds[:1] if len(set(seeds)) == 1 else seeds
        return Stack(places, weights, RowOptimizer(weights, moments, [m.settings.optim for m in members]), orders)

    def _state(self) -> list[torch.Tensor]:
        return [self.losses, self.norms, self.rows, *self.moments]

    def _complete(self) -> None:
        """Train to the last step and finish; where memory runs out, one half after the other.

        Where that happens between two stacks, those who have taken the step go on first.
        """
        if self._train():
            self._finish()
            return
        members, state, place = self.members, [part.cpu() for part in self._state()], self._place()
        cut = self.taken or len(members) // 2
        for half, taken in ((slice(cut), self.taken), (slice(cut, None), 0)):
            self.members, self.taken = members[half], taken
            self.step, self.recorded, self.evaluation_due = place
            self._load([part[half] for part in state])
            self._complete()

    def _place(self) -> tuple[int, int, bool]:
        return self.step, self.recorded, self.evaluation_due

    def _train(self) -> bool:
        """Train to the last step; False where memory ran out and there is a group to halve.

        A single trial that ran out of memory takes the same step again with half as many rows at once.
        """
        while self.members and (self.step < self.course.steps or self.evaluation_due):
            try:
                if self.evaluation_due:
                    self._evaluate()
                else:
                    self._advance()
                continue
            except Exception as error:  # the trials' boundary: other groups go on
                ending = ending_of(error, self.settings)
            if ending[0] is Status.OUT_OF_MEMORY:
                release_memory()  # not before: the error's own frames hold the step's tensors
                if len(self.members) > 1:
                    return False
                if self._take_less_at_once(self.members[0]):
                    continue
            self._leave(dict.fromkeys(range(len(self.members)), ending))
        return True

    def _take_less_at_once(self, member: Member) -> bool:
        """Halve the batch of what has just run out of memory; False where it is a single example."""
        if self.evaluation_due:
            self._forget_evaluations()
            member.eval_batch, before = max(1, member.eval_batch // 2), member.eval_batch
            return before > 1
        smaller = member.settings.train.smaller_micro_batch(member.micro_batch)
        if smaller is None:
            return False
        member.micro_batch = smaller
        log.warning(SMALLER, smaller)
        return True

    def _advance(self) -> None:
        """Take one step, and record it where a record is due; every evaluation comes after a record."""
        if self.static and self._whole():
            self._static_step()
        else:
            for stack in self.stacks:
                if stack.places.start >= self.taken:
                    self._step(stack)
                    self.taken = stack.places.stop
        for member in self.members:
            member.progress.tokens += int(self.lengths[self.course.batch(member.seed, self.step)].sum())
        self.step, self.taken = self.step + 1, 0
        train = self.settings.train
        every = train.eval_steps or self.course.steps_per_epoch
        self.evaluation_due = self.step % every == 0 or self.step == self.course.steps
        if self.evaluation_due or self.step % train.logging_steps == 0:
            self._record()

    def _whole(self) -> bool:
        """Whether a batch is taken at once."""
        return self.members[0].micro_batch >= self.settings.train.batch_size

    def _step(self, stack: Stack) -> None:
        """Have a stack take the step."""
        if not self._whole():
            self.static_steps = None
            stack.weights.join_gradient()
        losses = self._differentiate(stack)
        rates = [member.rates[self.step] for member in self.members[stack.places]]
        self.norms[stack.places] = stack.optimizer.step(self.step + 1, rates)
        self.losses[stack.places] += losses

    def _static_step(self) -> None:
        """Take a step through static buffers; what recording takes belongs to the set-up."""
        if self.static_steps is None:
            device, [stack] = self.ground.device, self.stacks
            timetable = Timetable(self.ground.splits.train, self.course, stack.orders, device)
            rates = np.stack([member.rates for member in self.members], axis=1)
            self.static_steps = StaticSteps(
                stack.weights, stack.optimizer, self.prefix, timetable, rates, self.losses, self.norms,
                self._still_layers(), runner_for(device),
            )  # fmt: skip
        seconds = self.static_steps.take(self.step)
        self.mark += seconds
        for member in self.members:
            member.setup_seconds += seconds

    def _still_layers(self) -> int:
        """Layers without dropout, from the bottom."""
        return 0 if self.settings.freeze.dropout else self.settings.freeze.layers

    def _differentiate(self, stack: Stack) -> torch.Tensor:
        """Fill the gradient of a stack, and return the mean loss of each of its trials, ``(trials,)``."""
        examples = [self.course.batch(seed, self.step) for seed in stack.orders]
        size = len(examples[0])
        most = self.members[0].micro_batch
        parts = [slice(start, min(start + most, size)) for start in range(0, size, most)]
        return torch.stack([self._differentiate_part(stack, examples, part) for part in parts]).sum(0)

    def _differentiate_part(self, stack: Stack, examples: Sequence[np.ndarray], part: slice) -> torch.Tensor:
        """Add the gradient of a part of each order's batch to those before, and return its share of the mean loss."""
        size = len(examples[0])
        batch = stack_batches([pack(self.ground.splits.train, chosen[part]) for chosen in examples], self.ground.device)
        stage = f"step+{part.start}" if part.start else "step"
        dropout = draws_for(stack.orders, stage, self.step, self.ground.device)
        forward = Forward(stack.weights, batch, dropout, self._still_layers())
        hidden, start = None, 0
        if self.prefix is not None:
            start = self.prefix.depth
            at_once = self.prefix.window * self.members[0].micro_batch
            hidden = self.prefix.hidden(stack.orders, self.step, part, batch, at_once)
        each, embedded = forward.losses(hidden, start)
        losses = each.mean(1) * (each.shape[1] / size)
        stack.weights.backward(losses.sum(), embedded, batch, add=part.start > 0)
        return losses.detach()

    def _record(self) -> None:
        """Tell each observer of the steps since the last record."""
        seconds, steps = self._lap(), self.step - self.recorded
        memory = peak_memory(self.ground.device)
        examples = self.course.seen(self.step) - self.course.seen(self.recorded)
        endings: dict[int, Ending] = {}
        for t, (member, loss, norm) in enumerate(
            zip(self.members, (self.losses / steps).tolist(), self.norms.tolist(), strict=True)
        ):
            member.stepped(self.step, seconds, memory)
            record = StepRecord(
                step=self.step,
                steps=self.course.steps,
                epoch=self.step / self.course.steps_per_epoch,
                loss=loss,
                learning_rate=float(member.rates[self.step - 1]),
                gradient_norm=norm,
                examples_per_second=examples / seconds,
            )
            try:
                require_finite(loss, "training", self.step, self.course.steps, member.settings)
                self.observer.on_step(member.index, record)
            except Exception as error:  # the trial's boundary: its neighbours go on
                endings[t] = ending_of(error, member.settings)
        self.losses.zero_()
        self.recorded = self.step
        self._leave(endings)
        self._lap()

    def _evaluate(self) -> None:
        """Evaluate on the selection split, keep best weights, ask the observer who goes on, and save the rest."""
        splits = self.ground.splits
        logits = self._predict(splits.selection)
        self.evaluation_due = False
        seconds, last = self._lap(), self.step == self.course.steps
        endings: dict[int, Ending] = {}
        for t, member in enumerate(self.members):
            member.progress.train_seconds += seconds
            epoch = self.step / self.course.steps_per_epoch
            name = selection_name(splits)
            try:
                evaluation = evaluate_logits(name, logits[t], splits.selection.labels, self.step, epoch)
                require_finite(evaluation.loss, "validation", self.step, self.course.steps, member.settings)
                member.evaluated(evaluation, None if last else self.rows[t])
                if self.observer.on_evaluation(member.index, evaluation):
                    raise Ended(Status.PRUNED, f"pruned after step {self.step} of {self.course.steps}")
            except Exception as error:  # the trial's boundary: its neighbours go on
                endings[t] = ending_of(error, member.settings)
        self._leave(endings)
        if self.settings.train.checkpoints and not last:
            for t, member in enumerate(self.members):
                member.save(self.rows[t], [moment[t] for moment in self.moments])
        self._lap()

    @torch.no_grad()
    def _predict(self, split: EncodedSplit) -> np.ndarray:
        """Logits of every trial, ``(trials, examples, labels)`` float32, in the order of ``split``."""
        labels, depth = len(self.ground.splits.label_names), self.ground.rowmap.architecture.depth
        logits = np.empty((len(self.members), len(split), labels), dtype=np.float32)
        for part in self._evaluation_batches(split):
            hidden = self._under_trained(part)
            for stack in self.stacks:
                forward = Forward(stack.weights, part.batch, None)
                x, start = (forward.embed(forward.embedded()), 0) if hidden is None else hidden
                own = forward.logits(forward.layers(x, start, depth))
                logits[stack.places, part.indices] = own.float().cpu().numpy()
        return logits

    def _evaluation_batches(self, split: EncodedSplit) -> list[EvaluationBatch]:
        """The batches of ``split``, longest rows first, packed once for all evaluations."""
        size, device = min(self.members[0].eval_batch, self.eval_share), self.ground.device
        if (id(split), size) not in self.evaluations:
            self.evaluations[id(split), size] = [
                EvaluationBatch(rows, stack_batches([pack(split, rows)], device))
                for rows in batches_by_length(split, size)
            ]
        return self.evaluations[id(split), size]

    def _forget_evaluations(self) -> None:
        kept = [part.hidden for parts in self.evaluations.values() for part in parts if part.hidden is not None]
        self.budget.left += sum(hidden.nbytes for hidden in kept)
        self.evaluations.clear()

    def _under_trained(self, part: EvaluationBatch) -> tuple[torch.Tensor, int] | None:
        """Hidden states under the first layer that trains, and its number; kept where the budget allows."""
        if self.prefix is None:
            return None
        hidden = part.hidden
        if hidden is None:
            hidden = self.prefix.of_batch(part.batch)
            if self.budget.take(hidden.nbytes):
                part.hidden = hidden
        return hidden, self.prefix.depth

    def _finish(self) -> None:
        """Go back to the best weights, evaluate them on the report split, and export them."""
        if not self.members:
            return
        best = [self.rows[t] if m.best_row is None else m.best_row for t, m in enumerate(self.members)]
        self.static_steps, self.stacks, self.moments = None, [], []  # before more is made: their memory will do
        rows = torch.stack([row.to(self.ground.device) for row in best])
        self._load([self.losses, self.norms, rows])
        splits = self.ground.splits
        if any(m.best.logits is None for m in self.members):
            for member, logits in zip(self.members, self._predict(splits.selection), strict=True):
                member.restore_logits(logits)
        if splits.selection is not splits.report:
            for member, logits in zip(self.members, self._predict(splits.report), strict=True):
                at = member.best
                member.report = evaluate_logits("validation", logits, splits.report.labels, at.step, at.epoch)
        endings: dict[int, Ending] = {}
        for t, member in enumerate(self.members):
            try:
                if member.settings.output.save_model:
                    member.export(rows[t])
                endings[t] = Status.FINISHED, None
            except Exception as error:  # the trial's boundary: its neighbours go on
                endings[t] = ending_of(error, member.settings)
        self._leave(endings)

    def _leave(self, endings: Mapping[int, Ending]) -> None:
        """Give the results of members at these places, and go on with the others."""
        if not endings:
            return
        for t, ending in endings.items():
            self.results[self.members[t].index] = self.members[t].result(*ending)
        staying = [t for t in range(len(self.members)) if t not in endings]
        self.members = [self.members[t] for t in staying]
        if self.members:
            self._load([part[staying] for part in self._state()])

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before
