"""How long each run trains: parsed from text such as "2000steps", "5epochs" or "30s"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from fastsel.compare.errors import CompareError

Unit = Literal["steps", "epochs", "samples", "seconds"]

_UNITS: dict[str, tuple[Unit, float]] = {
    "s": ("seconds", 1), "sec": ("seconds", 1), "second": ("seconds", 1), "seconds": ("seconds", 1),
    "m": ("seconds", 60), "min": ("seconds", 60), "h": ("seconds", 3600),
    "step": ("steps", 1), "steps": ("steps", 1),
    "epoch": ("epochs", 1), "epochs": ("epochs", 1),
    "sample": ("samples", 1), "samples": ("samples", 1),
}  # fmt: skip

# The default: long enough for the curves to part, short enough that all runs of a table take
# minutes on two cores.
_DEFAULT_EPOCHS = 20
_DEFAULT_STEPS = (200, 600)
# Far more than anybody trains, and still counted exactly in a float.
_MAX_AMOUNT = 1e12


@dataclass(frozen=True)
class Budget:
    """The same budget for every strategy: an amount of one unit.

    Attributes:
        amount: How much; whole except for seconds.
        unit: "steps" (optimizer steps), "samples" (back-propagated samples) or "seconds" (of
            training: loading, scoring, choosing, training; never evaluating). "epochs" becomes
            steps before a run starts.

    Raises:
        CompareError: The amount is not above 0 and at most 1e12, or a fraction of a step or sample.
    """

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        whole = self.unit in ("steps", "samples")
        if not 0 < self.amount <= _MAX_AMOUNT or (whole and self.amount != int(self.amount)):
            raise CompareError(
                f"budget must be a {'whole ' if whole else ''}number of {self.unit} above 0 and at "
                f"most {_MAX_AMOUNT:g}, got {self.amount:g}"
            )

    def __str__(self) -> str:
        """As it may be written on the command line."""
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} s" if self.unit == "seconds" else f"{amount} {self.unit}"

    def in_steps(self, steps_per_epoch: int) -> Budget:
        """The same budget with epochs turned into steps."""
        if self.unit != "epochs":
            return self
        return Budget(math.ceil(self.amount * steps_per_epoch), "steps")

    def used(self, *, steps: int, samples: int, seconds: float) -> float:
        """How much of the budget, in its unit, is used up."""
        return {"steps": steps, "samples": samples, "seconds": seconds}[self.unit]


def parse_budget(text: str) -> Budget:
    """Parse a budget.

    Args:
        text: An amount and a unit: s, min, h, steps, epochs or samples.

    Returns:
        The budget.

    Raises:
        CompareError: Not of that form, zero, above 1e12, or a fraction of a step or sample.

    Example:
        >>> parse_budget("2min")
        Budget(amount=120.0, unit='seconds')
    """
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise CompareError(
            f"budget must be like 30s, 5min, 2000steps, 5epochs or 100000samples, got {text!r}"
        )
    unit, factor = _UNITS[match[2]]
    return Budget(float(match[1]) * factor, unit)


def default_budget(steps_per_epoch: int) -> Budget:
    """Twenty epochs, but at least 200 and at most 600 steps: a function of the data alone."""
    low, high = _DEFAULT_STEPS
    return Budget(min(max(_DEFAULT_EPOCHS * steps_per_epoch, low), high), "steps")
