"""A group of trials that train at once: one stack of weights, one optimizer, one loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distilbench.data import EncodedSplit
from distilbench.device import peak_memory, release_memory
from distilbench.engines.base import TrialObserver
from distilbench.engines.batches import batches_by_length
from distilbench.engines.capture import runner_for
from distilbench.engines.dropout import draws_for
from distilbench.engines.endings import SMALLER, Ended, ending_of, require_finite
from distilbench.engines.evaluation import evaluate_logits, selection_name
from distilbench.engines.members import Member
from distilbench.engines.packing import Batch, pack, stack
from distilbench.engines.prefix import Budget, TrainingPrefix, run_prefix
from distilbench.engines.stacked import Forward, StackedWeights
from distilbench.engines.static import StaticSteps
from distilbench.engines.timetable import Timetable
from distilbench.engines.updates import RowOptimizer, moments_needed
from distilbench.model import build_model
from distilbench.results import Status, StepRecord, TrialResult

log = logging.getLogger(__name__)

_FEWEST_EVALUATED = 16
"""Examples that a group evaluates at once at least, however many trials it has: products of fewer rows are slow."""
Ending = tuple[Status, str | None]
"""How a trial ended, and in one line why."""


@dataclass
class EvaluationBatch:
    """Rows of a split with what can be kept of them: ``hidden`` under the trained part, where the budget holds it."""

    indices: np.ndarray
    batch: Batch
    hidden: torch.Tensor | None = None


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
        # each trial has hidden states of its own: together, no more than one alone would evaluate at once
        self.eval_share = max(_FEWEST_EVALUATED, self.settings.train.eval_batch_size // len(members))
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
        nobody = torch.empty(0, ground.rowmap.size, dtype=ground.dtype, device=ground.device)
        self.weights = StackedWeights(ground.rowmap, ground.frozen, ground.low, nobody)
        self.optimizer = RowOptimizer(self.weights)
        self._load(self._initial_state())
        self.prefix = TrainingPrefix.of(
            self.weights, ground.splits.train, self.course, self.settings.freeze.dropout, self.budget
        )
        seconds = self._lap()
        for member in self.members:
            member.setup_seconds = seconds

    def _initial_state(self) -> list[torch.Tensor]:
        """The losses since the last record (trials,), the rows and the moments, ``(trials, size)`` each."""
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
        return [zeros(count), *state]

    def _load(self, state: Sequence[torch.Tensor]) -> None:
        """Go on from ``state``, whose leading size is that of the members as they are now."""
        self.static_steps = None  # first of all, for its recordings hold memory
        self.losses, rows, *moments = (part.to(self.ground.device) for part in state)
        self.weights.load(rows)
        self.optimizer.load(moments, [m.settings.optim for m in self.members])
        seeds = [m.seed for m in self.members]
        self.orders = seeds[:1] if len(set(seeds)) == 1 else seeds

    def _state(self) -> list[torch.Tensor]:
        return [self.losses, self.weights.rows, *self.optimizer.moments]

    def _complete(self) -> None:
        """Train to the last step and finish; where memory runs out, one half after the other."""
        if self._train():
            self._finish()
            return
        members, state, place = self.members, [part.cpu() for part in self._state()], self._place()
        for half in (slice(len(members) // 2), slice(len(members) // 2, None)):
            self.members = members[half]
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
        examples = [self.course.batch(seed, self.step) for seed in self.orders]
        whole = self.members[0].micro_batch >= self.settings.train.batch_size
        if self.static and whole:
            norms = self._static_step()
        else:
            if not whole:
                self._work_in_parts()
            self.losses += self._differentiate(examples)
            norms = self.optimizer.step(self.step + 1, [member.rates[self.step] for member in self.members])
        self.step += 1
        for member, chosen in zip(self.members, examples * (len(self.members) // len(examples)), strict=True):
            member.progress.tokens += int(self.lengths[chosen].sum())
        train = self.settings.train
        every = train.eval_steps or self.course.steps_per_epoch
        self.evaluation_due = self.step % every == 0 or self.step == self.course.steps
        if self.evaluation_due or self.step % train.logging_steps == 0:
            self._record(norms)

    def _static_step(self) -> torch.Tensor:
        """Take a step through static buffers, and return the norms; what recording takes belongs to the set-up."""
        if self.static_steps is None:
            device = self.ground.device
            timetable = Timetable(self.ground.splits.train, self.course, self.orders, device)
            rates = np.stack([member.rates for member in self.members], axis=1)
            self.static_steps = StaticSteps(
                self.weights, self.optimizer, self.prefix, timetable, rates, self.losses, self._still_layers(),
                runner_for(device),
            )  # fmt: skip
        seconds = self.static_steps.take(self.step)
        self.mark += seconds
        for member in self.members:
            member.setup_seconds += seconds
        return self.static_steps.norms

    def _work_in_parts(self) -> None:
        """Go on without what takes a whole batch at once."""
        self.static_steps = None
        self.weights.join_gradient()

    def _still_layers(self) -> int:
        """Layers without dropout, from the bottom."""
        return 0 if self.settings.freeze.dropout else self.settings.freeze.layers

    def _differentiate(self, examples: Sequence[np.ndarray]) -> torch.Tensor:
        """Fill the gradient from the batch of each order, and return the mean loss of each trial, ``(trials,)``."""
        size = len(examples[0])
        most = self.members[0].micro_batch
        parts = [slice(start, min(start + most, size)) for start in range(0, size, most)]
        return torch.stack([self._differentiate_part(examples, part) for part in parts]).sum(0)

    def _differentiate_part(self, examples: Sequence[np.ndarray], part: slice) -> torch.Tensor:
        """Add the gradient of a part of each batch to those before, and return its share of the mean loss."""
        size = len(examples[0])
        batch = stack([pack(self.ground.splits.train, chosen[part]) for chosen in examples], self.ground.device)
        stage = f"step+{part.start}" if part.start else "step"
        dropout = draws_for(self.orders, stage, self.step, self.ground.device)
        forward = Forward(self.weights, batch, dropout, self._still_layers())
        hidden, start = None, 0
        if self.prefix is not None:
            start = self.prefix.depth
            at_once = self.prefix.window * self.members[0].micro_batch
            hidden = self.prefix.hidden(self.orders, self.step, part, batch, at_once)
        each, embedded = forward.losses(hidden, start)
        losses = each.mean(1) * (each.shape[1] / size)
        self.weights.backward(losses.sum(), embedded, batch, add=part.start > 0)
        return losses.detach()

    def _record(self, norms: torch.Tensor) -> None:
        """Tell each observer of the steps since the last record."""
        seconds, steps = self._lap(), self.step - self.recorded
        memory = peak_memory(self.ground.device)
        examples = self.course.seen(self.step) - self.course.seen(self.recorded)
        endings: dict[int, Ending] = {}
        for t, (member, loss, norm) in enumerate(
            zip(self.members, (self.losses / steps).tolist(), norms.tolist(), strict=True)
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
                member.evaluated(evaluation, None if last else self.weights.rows[t])
                if self.observer.on_evaluation(member.index, evaluation):
                    raise Ended(Status.PRUNED, f"pruned after step {self.step} of {self.course.steps}")
            except Exception as error:  # the trial's boundary: its neighbours go on
                endings[t] = ending_of(error, member.settings)
        self._leave(endings)
        if self.settings.train.checkpoints and not last:
            for t, member in enumerate(self.members):
                member.save(self.weights.rows[t], [moment[t] for moment in self.optimizer.moments])
        self._lap()

    @torch.no_grad()
    def _predict(self, split: EncodedSplit) -> np.ndarray:
        """Logits of every trial, ``(trials, examples, labels)`` float32, in the order of ``split``."""
        labels = len(self.ground.splits.label_names)
        logits = np.empty((len(self.members), len(split), labels), dtype=np.float32)
        for part in self._evaluation_batches(split):
            forward = Forward(self.weights, part.batch, None)
            x, start = self._under_trained(part, forward)
            x = forward.layers(x, start, self.ground.rowmap.architecture.depth)
            logits[:, part.indices] = forward.logits(x).float().cpu().numpy()
        return logits

    def _evaluation_batches(self, split: EncodedSplit) -> list[EvaluationBatch]:
        """The batches of ``split``, longest rows first, packed once for all evaluations."""
        size, device = min(self.members[0].eval_batch, self.eval_share), self.ground.device
        if (id(split), size) not in self.evaluations:
            self.evaluations[id(split), size] = [
                EvaluationBatch(rows, stack([pack(split, rows)], device)) for rows in batches_by_length(split, size)
            ]
        return self.evaluations[id(split), size]

    def _forget_evaluations(self) -> None:
        kept = [part.hidden for parts in self.evaluations.values() for part in parts if part.hidden is not None]
        self.budget.left += sum(hidden.nbytes for hidden in kept)
        self.evaluations.clear()

    def _under_trained(self, part: EvaluationBatch, forward: Forward) -> tuple[torch.Tensor, int]:
        """Hidden states under the first layer that trains, and its number; kept where the budget allows."""
        if self.prefix is None:
            return forward.embed(forward.embedded()), 0
        if part.hidden is not None:
            return part.hidden, self.prefix.depth
        hidden = run_prefix(self.weights, part.batch, self.prefix.depth, None)
        if self.budget.take(hidden.nbytes):
            part.hidden = hidden
        return hidden, self.prefix.depth

    def _finish(self) -> None:
        """Go back to the best weights, evaluate them on the report split, and export them."""
        if not self.members:
            return
        self.static_steps = None
        self.optimizer.load([], [])  # before more is made: memory that held the moments will do
        best = [self.weights.rows[t] if m.best_row is None else m.best_row for t, m in enumerate(self.members)]
        rows = torch.stack([row.to(self.ground.device) for row in best])
        self.weights.load(rows)
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
