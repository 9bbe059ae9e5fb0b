"""What one training run gives: its curve, its seconds, and what was decided on the way."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

PHASES = ("load", "prepare", "score", "choose", "train")
_CHOOSING = ("prepare", "score", "choose")


@dataclass(frozen=True)
class Point:
    """One evaluation on the test rows.

    Attributes:
        step: Optimizer steps done.
        samples: Samples back-propagated, those of reference models included.
        seconds: Training seconds so far: loading, preparing, scoring, choosing, training; no
            evaluation.
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
class MethodWeights:
    """How an AdaSelection weighed its methods.

    Attributes:
        methods: Their names, M of them.
        steps: Steps after which the weights were recorded, T of them.
        weights: T rows of M weights; each row sums to 1.
    """

    methods: tuple[str, ...]
    steps: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @staticmethod
    def from_json(values: dict[str, Any]) -> MethodWeights:
        """Undo `asdict`."""
        rows = tuple(tuple(row) for row in values["weights"])
        return MethodWeights(tuple(values["methods"]), tuple(values["steps"]), rows)


@dataclass(frozen=True)
class SwitchDecision:
    """A decision of the cost-aware switch; see `fastsel.select.switch.Decision`."""

    step: int
    select: bool
    share: float
    cost: float


@dataclass(frozen=True)
class SwitchRecord:
    """What the cost-aware switch saw and did.

    Attributes:
        chose: Share of the steps that chose; the others trained on the whole batch.
        decisions: Its decisions.
        steps: Steps after which it was read, T of them.
        share: T readings of the share of the batch's gradient norm that the choice carried; None
            while unknown.
        cost: T readings of a selective step's seconds over a plain one's; None while unknown.
    """

    chose: float
    decisions: tuple[SwitchDecision, ...]
    steps: tuple[int, ...]
    share: tuple[float | None, ...]
    cost: tuple[float | None, ...]

    def selecting(self, step: int) -> bool:
        """Whether it chose at `step`, by its decisions; before the first it only measures."""
        return any([d.select for d in self.decisions if d.step <= step][-1:])

    @staticmethod
    def from_json(values: dict[str, Any]) -> SwitchRecord:
        """Undo `asdict`."""
        lists = {name: tuple(values[name]) for name in ("steps", "share", "cost")}
        decisions = tuple(SwitchDecision(**decision) for decision in values["decisions"])
        return SwitchRecord(values["chose"], decisions, **lists)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        strategy: Its strategy.
        seed: Its seed.
        status: "finished", or "diverged" when a loss stopped being finite.
        curve: The evaluations, the first before any step.
        seconds: Training seconds by phase: load, prepare (reference models), score, choose, train.
        median_step_seconds: Median step; far below the mean step when other work on the machine
            disturbed the clock.
        cpu_seconds: Processor seconds of this process in the same time; with one thread and no
            GPU, as many as the seconds unless other work disturbed the clock.
        excluded: Samples whose scores were not finite, kept out of choices.
        method_weights: The weights over time of an AdaSelection, else None.
        switch: What the cost-aware switch did, where there is one, else None.
    """

    strategy: str
    seed: int
    status: str
    curve: tuple[Point, ...]
    seconds: dict[str, float]
    median_step_seconds: float
    cpu_seconds: float = 0.0
    excluded: int = 0
    method_weights: MethodWeights | None = None
    switch: SwitchRecord | None = None

    @property
    def final(self) -> Point:
        """The last evaluation."""
        return self.curve[-1]

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step, without what was prepared before the first."""
        total = sum(s for phase, s in self.seconds.items() if phase != "prepare")
        return total / max(1, self.final.step)

    @property
    def choosing_share(self) -> float:
        """Share of the training seconds that goes into preparing, scoring and choosing."""
        total = sum(self.seconds.values())
        return sum(self.seconds[phase] for phase in _CHOOSING) / total if total else 0.0

    @property
    def preparing_share(self) -> float:
        """The part of `choosing_share` that came before the first step."""
        total = sum(self.seconds.values())
        return self.seconds["prepare"] / total if total else 0.0

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
        weights, switch = values["method_weights"], values["switch"]
        return Run(
            **{
                **values,
                "curve": tuple(points),
                "method_weights": weights and MethodWeights.from_json(weights),
                "switch": switch and SwitchRecord.from_json(switch),
            }
        )
