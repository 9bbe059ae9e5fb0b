"""One training run: its result, and the loop that produces it."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsel.compare.models import make_model
from fastsel.compare.settings import REFERENCE, Settings
from fastsel.data import Dataset
from fastsel.select import SelectiveStep, make_selector

PHASES = ("load", "score", "choose", "train")
_EVALUATION_BATCH = 1024
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Point:
    """One evaluation on the test rows.

    Attributes:
        step: Optimizer steps done.
        samples: Samples back-propagated.
        seconds: Training seconds so far: loading, scoring, choosing, training; no evaluation.
        test_loss: Mean cross-entropy, or mean squared error of the standardised target.
        accuracy: Share of correct predictions (classification), else None.
        rmse: Root mean squared error in the target's own units (regression), else None.
        r2: Coefficient of determination (regression), else None.
    """

    step: int
    samples: int
    seconds: float
    test_loss: float
    accuracy: float | None = None
    rmse: float | None = None
    r2: float | None = None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        strategy: Its strategy.
        seed: Its seed.
        status: "finished", or "diverged" when a loss stopped being finite.
        curve: The evaluations, the first before any step.
        seconds: Training seconds by phase: load, score, choose, train.
        median_step_seconds: Median step; far below the mean step when other work on the machine
            disturbed the clock.
    """

    strategy: str
    seed: int
    status: str
    curve: tuple[Point, ...]
    seconds: dict[str, float]
    median_step_seconds: float

    @property
    def final(self) -> Point:
        """The last evaluation."""
        return self.curve[-1]

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step."""
        return sum(self.seconds.values()) / max(1, self.final.step)

    @property
    def choosing_share(self) -> float:
        """Share of the step time that goes into scoring and choosing."""
        total = sum(self.seconds.values())
        return (self.seconds["score"] + self.seconds["choose"]) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain values; a loss that is not finite becomes None."""
        result = asdict(self)
        for point in result["curve"]:
            for key, value in point.items():
                if isinstance(value, float) and not math.isfinite(value):
                    point[key] = None
        return result

    @staticmethod
    def from_json(values: dict[str, Any]) -> Run:
        """Undo `to_json`."""
        points = [
            Point(**{**p, "test_loss": math.nan if p["test_loss"] is None else p["test_loss"]})
            for p in values["curve"]
        ]
        return Run(**{**values, "curve": tuple(points)})


def stream_seed(purpose: str, seed: int) -> int:
    """A seed for one purpose of a run, so that its random streams do not share numbers."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:7], "big")


class BatchOrder:
    """The batches of a run: every epoch a new permutation, a short last batch left out.

    It depends on the seed alone, so all strategies see the same batches in the same order.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        """Args: rows of the train part, rows of a batch, seed of the run."""
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(stream_seed("batches", seed))
        self.order = torch.randperm(rows, generator=self.generator)  # [N]
        self.position = 0

    def next_batch(self) -> Tensor:
        """Row numbers of the next batch, `[B]` int64."""
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.order), generator=self.generator)
            self.position = 0
        self.position += self.batch_size
        return self.order[self.position - self.batch_size : self.position]

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume."""
        return {
            "order": self.order, "position": self.position, "generator": self.generator.get_state()
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.order, self.position = state["order"], state["position"]
        self.generator.set_state(state["generator"])


@dataclass
class Clock:
    """Seconds by phase; on a GPU each phase ends with a synchronisation, so its work counts."""

    device: str
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    @property
    def total(self) -> float:
        """All phases."""
        return sum(self.seconds.values())


class Training:
    """The state of one run while it trains."""

    def __init__(self, data: Dataset, settings: Settings, strategy: str, seed: int) -> None:
        """Build model, optimizer and selector; everything random comes from `seed`.

        Args:
            data: The data set, on `settings.device`.
            settings: The comparison's settings.
            strategy: "full" or the name of a selector.
            seed: Seed of weights, batch order and random choices.
        """
        self.data, self.settings = data, settings
        self.strategy, self.seed = strategy, seed
        self.model = make_model(settings.model, data, stream_seed("weights", seed))
        self.model.to(settings.device)
        self.criterion: nn.Module = (
            nn.CrossEntropyLoss() if data.task == "classification" else nn.MSELoss()
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self.selective: SelectiveStep | None = None
        if strategy != REFERENCE:
            generator = torch.Generator(settings.device).manual_seed(stream_seed("choices", seed))
            selector = make_selector(strategy, rate=settings.rate, generator=generator)
            self.selective = SelectiveStep(self.model, self.criterion, self.optimizer, selector)
        self.batches = BatchOrder(len(data.train_target), settings.batch_size, seed)
        self.clock = Clock(settings.device)
        self.steps = self.samples = 0
        self.curve: list[Point] = []
        self.step_seconds: list[float] = []
        self.diverged = False
        test_order = torch.Generator().manual_seed(stream_seed("test rows", 0))
        test_rows = torch.randperm(len(data.test_target), generator=test_order)
        self.test_rows = test_rows[: settings.test_rows].sort().values.to(settings.device)

    def step(self) -> None:
        """One step: the next batch, scored and chosen from unless the strategy is "full"."""
        phase, before = self.clock.phase, self.clock.total
        with phase("load"):
            rows = self.batches.next_batch().to(self.settings.device)
            inputs = self.data.train_inputs.index_select(0, rows)  # [B, ...]
            target = self.data.train_target.index_select(0, rows)  # [B]
        if self.selective is None:
            with phase("train"):
                self.optimizer.zero_grad(set_to_none=True)
                loss = self.criterion(self.model(inputs), target)
                loss.backward()
                self.optimizer.step()
            self.samples += len(rows)
        else:
            with phase("score"):
                scores = self.selective.score(inputs, target)
            with phase("choose"):
                indices = self.selective.choose(scores, len(rows))
            with phase("train"):
                loss = self.selective.train(inputs, target, indices)
            self.samples += len(indices)
        self.steps += 1
        self.step_seconds.append(self.clock.total - before)
        if not math.isfinite(loss.item()):
            self.diverged = True

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

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "selector": self.selective.selector.state_dict() if self.selective else None,
            "batches": self.batches.state_dict(),
            "seconds": self.clock.seconds,
            "step_seconds": self.step_seconds,
            "steps": self.steps,
            "samples": self.samples,
            "curve": [asdict(point) for point in self.curve],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.selective:
            self.selective.selector.load_state_dict(state["selector"])
        self.batches.load_state_dict(state["batches"])
        self.clock.seconds = dict(state["seconds"])
        self.step_seconds = list(state["step_seconds"])
        self.steps, self.samples = state["steps"], state["samples"]
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
        strategy: "full" or the name of a selector.
        seed: The run's seed.
        state: A state to resume from, as `Training.state_dict` gave it between two steps.
        on_step: Called after every step and evaluation, off the clock.

    Returns:
        The run.
    """
    warm_up = Training(data, settings, strategy, seed)
    for _ in range(_WARM_UP_STEPS):
        warm_up.step()
    del warm_up
    training = Training(data, settings, strategy, seed)
    if state is None:
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
    status = "diverged" if training.diverged else "finished"
    return Run(
        strategy, seed, status, tuple(training.curve), dict(training.clock.seconds),
        statistics.median(training.step_seconds),
    )  # fmt: skip
