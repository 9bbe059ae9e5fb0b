"""What the runner tells whoever watches: the display subscribes, the runner knows no display."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastsel.compare.run import Run
from fastsel.compare.settings import Settings
from fastsel.data import Dataset


@dataclass(frozen=True)
class Started:
    """The comparison begins: its data, complete settings and number of runs."""

    data: Dataset
    settings: Settings
    runs: int


@dataclass(frozen=True)
class RunReused:
    """A finished run with the same identity was found and is not done again."""

    run: Run


@dataclass(frozen=True)
class RunStarted:
    """A run begins.

    Attributes:
        strategy: Its strategy.
        seed: Its seed.
        why: Why no earlier result in the folder serves, for example "batch_size 64 -> 128; the
            earlier run is kept"; empty if there is none.
        resumed: Whether it goes on from a checkpoint.
    """

    strategy: str
    seed: int
    why: str = ""
    resumed: bool = False


@dataclass(frozen=True)
class RunProgress:
    """A run goes on: share of its budget, step, last test loss."""

    strategy: str
    seed: int
    fraction: float
    step: int
    test_loss: float


@dataclass(frozen=True)
class RunFinished:
    """A run is finished (or diverged) and on disk."""

    run: Run


Event = Started | RunReused | RunStarted | RunProgress | RunFinished
Listener = Callable[[Event], None]
