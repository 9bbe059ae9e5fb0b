"""A small data set and quick settings, shared by the tests of `fastsel compare`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsel.compare import Comparison, compare
from fastsel.compare.run import Run
from fastsel.compare.settings import Settings, complete
from fastsel.compare.strategies import DEFAULT_STRATEGIES
from fastsel.data import Dataset
from fastsel.data.dataset import split_dataset


def table(task: str = "classification", rows: int = 400) -> Dataset:
    """A small, learnable table: two noisy classes, or a noisy plane."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 4)).astype(np.float32)
    score = inputs @ np.array([2.0, -1.0, 0.5, 0.0]) + rng.normal(size=rows) * 0.3
    if task == "regression":
        return split_dataset("plane", inputs, 50 + 10 * score, task="regression")
    classes = ("low", "high")
    return split_dataset(
        "halves", inputs, (score > 0).astype(np.int64), task="classification", classes=classes
    )


def settings(data: Dataset, **changes: object) -> Settings:
    base: dict[str, object] = {
        "strategies": DEFAULT_STRATEGIES, "seeds": 1, "model": "linear", "budget": "24steps",
        "rate": 0.25, "batch_size": 32, "optimizer": "adam", "lr": None, "device": "cpu",
        "threads": None, "evaluations": 6, "test_rows": 50,
    }  # fmt: skip
    return complete(data, **(base | changes))  # type: ignore[arg-type]


def small(out: Path, data: Dataset | None = None, **changes: object) -> Comparison:
    base: dict[str, object] = {
        "model": "linear", "budget": "24steps", "batch_size": 32, "evaluations": 6, "seeds": 2,
        "strategies": ("full", "uniform", "big_loss"),
    }  # fmt: skip
    return compare(data or table(), out=out, **(base | changes))  # type: ignore[arg-type]


def losses(run: Run) -> list[float]:
    return [point.test_loss for point in run.curve]
