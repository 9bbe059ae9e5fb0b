"""One training run: its state, and the loop that drives it to the end of its budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fastsel.compare.batches import BatchOrder, stream_seed
from fastsel.compare.models import make_model
from fastsel.compare.optimizers import make_optimizer
from fastsel.compare.references import cross_fitted_losses
from fastsel.compare.run import MethodWeights, Point, Run, SwitchDecision, SwitchRecord
from fastsel.compare.settings import Settings
from fastsel.compare.strategies import REFERENCE, SWITCHED, selector_for
from fastsel.compare.timing import Clock
from fastsel.data import Dataset
from fastsel.select import AdaSelection, ReferenceLosses, SelectiveStep, Selector

_EVALUATION_BATCH = 1024
# Enough for the switch to have tried both kinds of step.
_WARM_UP_STEPS = {SWITCHED: 14}
# About as many records of method weights and of the switch as a figure can show.
_RECORDS = 200
# Where the number of steps is not known beforehand.
_RECORD_EVERY = 10


class Training:
    """The state of one run while it trains."""

    def __init__(self, data: Dataset, settings: Settings, strategy: str, seed: int) -> None:
        """Build model, optimizer and selector; everything random comes from `seed`.

        Args:
            data: The data set, on `settings.device`.
            settings: The comparison's settings.
            strategy: "full", "auto" or a selector's name.
            seed: Seed of weights, batch order and random choices.
        """
        self.data, self.settings = data, settings
        self.strategy, self.seed = strategy, seed
        self.model = make_model(settings.model, data, stream_seed("weights", seed))
        self.model.to(settings.device)
        self.criterion: nn.Module = (
            nn.CrossEntropyLoss() if data.task == "classification" else nn.MSELoss()
        )
        self.optimizer = make_optimizer(settings.optimizer, self.model, settings.lr)
        self.clock = Clock(settings.device)
        self.record_every = _record_every(settings)
        self.reference: Tensor | None = None  # [N]
        self.selective: SelectiveStep | None = None
        if strategy != REFERENCE:
            self.selective = self._make_step()
        self.batches = BatchOrder(len(data.train_target), settings.batch_size, seed)
        self.steps = self.samples = self.chose = 0
        self.curve: list[Point] = []
        self.step_seconds: list[float] = []
        self.readings: list[tuple[int, float | None, float | None]] = []
        self.weights: list[tuple[int, list[float]]] = []
        self._record()
        self.diverged = False
        test_order = torch.Generator().manual_seed(stream_seed("test rows", 0))
        test_rows = torch.randperm(len(data.test_target), generator=test_order)
        self.test_rows = test_rows[: settings.test_rows].sort().values.to(settings.device)

    def _make_step(self) -> SelectiveStep:
        settings, device = self.settings, self.settings.device
        generator = torch.Generator(device).manual_seed(stream_seed("choices", self.seed))
        selector = selector_for(self.strategy, settings.rate, generator)
        if "reference_loss" in selector.needs:
            # Until `prepare` has better ones; with these it is the loss itself that counts.
            self.reference = torch.zeros(len(self.data.train_target), device=device)
        step = SelectiveStep(
            self.model,
            self.criterion,
            self.optimizer,
            selector,
            # Every other strategy is to be seen as it is, also where it does not pay.
            switch="auto" if self.strategy == SWITCHED else "select",
            reference=None if self.reference is None else ReferenceLosses(self.reference),
        )
        self.clock.time_selection(step.selection)
        return step

    def prepare(self) -> None:
        """Train the reference models of a selector that needs reference losses. On the clock."""
        if self.reference is None:
            return
        with self.clock.phase("prepare"):
            losses, samples = cross_fitted_losses(
                self.data, self.settings, self.criterion, self.seed, self.clock
            )
            self._set_reference(losses)
        self.samples += samples

    def _set_reference(self, losses: Tensor) -> None:  # [N]
        assert self.selective is not None
        self.reference = losses
        self.selective.selection.reference = ReferenceLosses(losses)

    def step(self) -> None:
        """One step: the next batch, scored and chosen from unless the strategy is "full"."""
        phase, before = self.clock.phase, self.clock.total
        with phase("load"):
            rows = self.batches.next_batch().to(self.settings.device)
            inputs = self.data.train_inputs.index_select(0, rows)  # [B, ...]
            target = self.data.train_target.index_select(0, rows)  # [B]
        with phase("train"):
            if self.selective is None:
                self.optimizer.zero_grad(set_to_none=True)
                loss = self.criterion(self.model(inputs), target)
                loss.backward()
                self.optimizer.step()
                samples = len(rows)
            else:
                result = self.selective(inputs, target, rows)
                loss, samples = result.loss, len(result.indices)
                self.chose += result.selected and not result.trial
        self.samples += samples
        self.steps += 1
        self.step_seconds.append(self.clock.total - before)
        self._record()
        if not math.isfinite(loss.item()):
            self.diverged = True

    def _record(self) -> None:
        """Write down method weights and what the switch knows. Not on the clock."""
        if self.selective is None or self.steps % self.record_every:
            return
        if isinstance(self.selective.selector, AdaSelection):
            # Counted in optimizer steps: under the switch the selector itself counts choices.
            self.weights.append((self.steps, list(self.selective.selector.weights.values())))
        if self.strategy == SWITCHED:
            switch = self.selective.switch
            self.readings.append((self.steps, switch.share, switch.cost))

    @torch.no_grad()
    def evaluate(self) -> Point:
        """Evaluate on the test rows; appends to the curve. Not on the clock."""
        self.model.eval()
        outputs, targets = [], []
        for rows in torch.split(self.test_rows, _EVALUATION_BATCH):
            outputs.append(self.model(self.data.test_inputs.index_select(0, rows)))
            targets.append(self.data.test_target.index_select(0, rows))
        self.model.train()
        output, target = torch.cat(outputs), torch.cat(targets)
        # float64, so that the mean over many rows keeps its digits.
        truth = target if self.data.task == "classification" else target.double()
        loss = float(self.criterion(output.double(), truth))
        at = (self.steps, self.samples, self.clock.total, loss)
        if self.data.task == "classification":
            point = Point(*at, accuracy=float((output.argmax(1) == target).double().mean()))
        else:
            spread = float(target.double().var(correction=0))
            rmse = math.sqrt(loss) * self.data.target_std
            point = Point(*at, rmse=rmse, r2=1 - loss / spread if spread else None)
        if not math.isfinite(loss):
            self.diverged = True
        self.curve.append(point)
        return point

    @property
    def progress(self) -> float:
        """Share of the budget used, 1 or more at the end."""
        return self._used() / self.settings.budget.amount

    def _used(self) -> float:
        return self.settings.budget.used(
            steps=self.steps, samples=self.samples, seconds=self.clock.total
        )

    def evaluation_due(self, mark: int) -> bool:
        """Whether the budget share `mark / evaluations` is reached (exact for whole budgets)."""
        return self._used() * self.settings.evaluations >= mark * self.settings.budget.amount

    def result(self) -> Run:
        """The run as it stands."""
        selector = None if self.selective is None else self.selective.selector
        return Run(
            self.strategy,
            self.seed,
            "diverged" if self.diverged else "finished",
            tuple(self.curve),
            dict(self.clock.seconds),
            statistics.median(self.step_seconds or [0.0]),
            self.clock.cpu_seconds,
            0 if selector is None else selector.excluded,
            self._method_weights(selector),
            self._switch_record(),
        )

    def _method_weights(self, selector: Selector | None) -> MethodWeights | None:
        if not isinstance(selector, AdaSelection):
            return None
        steps, weights = zip(*_thinned(self.weights), strict=True)
        # They are float32: six digits are all they have.
        rows = tuple(tuple(round(weight, 6) for weight in row) for row in weights)
        return MethodWeights(tuple(selector.weights), steps, rows)

    def _switch_record(self) -> SwitchRecord | None:
        if self.selective is None or self.strategy != SWITCHED:
            return None
        decisions = tuple(SwitchDecision(*d) for d in self.selective.switch.decisions)
        steps, share, cost = zip(*_thinned(self.readings), strict=True)
        return SwitchRecord(self.chose / max(1, self.steps), decisions, steps, share, cost)

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "selective": self.selective.state_dict() if self.selective else None,
            "reference": self.reference,
            "batches": self.batches.state_dict(),
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
            "step_seconds": self.step_seconds,
            "steps": self.steps,
            "samples": self.samples,
            "chose": self.chose,
            "readings": self.readings,
            "weights": self.weights,
            "curve": [asdict(point) for point in self.curve],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.selective:
            self.selective.load_state_dict(state["selective"])
        if self.reference is not None:
            self._set_reference(state["reference"].to(self.settings.device))
        self.batches.load_state_dict(state["batches"])
        self.clock.seconds = dict(state["seconds"])
        self.clock.cpu_seconds = state["cpu_seconds"]
        self.step_seconds = list(state["step_seconds"])
        self.steps, self.samples, self.chose = state["steps"], state["samples"], state["chose"]
        self.readings = [tuple(reading) for reading in state["readings"]]
        self.weights = [tuple(record) for record in state["weights"]]
        self.curve = [Point(**point) for point in state["curve"]]


def train_run(
    data: Dataset,
    settings: Settings,
    strategy: str,
    seed: int,
    *,
    state: dict[str, Any] | None = None,
    on_step: Callable[[Training], None] = lambda training: None,
) -> Run:
    """Train one run to the end of its budget.

    A few steps on a throwaway copy come first, so that no run pays for starting threads or
    loading kernels. A loss that is not finite ends the run as "diverged".

    Args:
        data: The data set, on `settings.device`.
        settings: The comparison's settings.
        strategy: "full", "auto" or a selector's name.
        seed: The run's seed.
        state: A state to resume from, as `Training.state_dict` gave it between two steps.
        on_step: Called after every step and evaluation, off the clock.

    Returns:
        The run.
    """
    warm_up = Training(data, settings, strategy, seed)
    for _ in range(_WARM_UP_STEPS.get(strategy, 3)):
        warm_up.step()
    del warm_up
    training = Training(data, settings, strategy, seed)
    if state is None:
        training.prepare()
        training.evaluate()
    else:
        training.load_state_dict(state)
    mark = 1
    while training.evaluation_due(mark):  # marks passed before the resume
        mark += 1
    while training.progress < 1 and not training.diverged:
        training.step()
        if training.diverged or training.evaluation_due(mark):
            training.evaluate()
            while training.evaluation_due(mark):
                mark += 1
        on_step(training)
    return training.result()


def _record_every(settings: Settings) -> int:
    """Steps between two records, so that a run has about `_RECORDS`."""
    budget = settings.budget
    if budget.unit == "seconds":
        return _RECORD_EVERY
    chosen = max(1, round(settings.rate * settings.batch_size))
    steps = budget.amount if budget.unit == "steps" else budget.amount / chosen
    return max(1, round(steps / _RECORDS))


def _thinned(records: list[Any]) -> list[Any]:
    """At most `2 * _RECORDS` of them, by halving: runs of other lengths then share most steps."""
    while len(records) > 2 * _RECORDS:
        records = records[::2]
    return records
