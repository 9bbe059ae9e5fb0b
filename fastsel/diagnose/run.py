"""Both diagnostics of a data set and a model, while it trains for a while."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsel.compare.batches import BatchOrder, stream_seed
from fastsel.compare.errors import CompareError
from fastsel.compare.models import DEFAULT_LR, MODELS, make_model
from fastsel.compare.optimizers import make_optimizer
from fastsel.data import Dataset
from fastsel.diagnose import plots
from fastsel.diagnose.measures import (
    Smoothness,
    Suitability,
    gradient_norms,
    smoothness,
    suitability,
)
from fastsel.neighbors import NeighborTable


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        data: The data set's name.
        model: The model's name.
        rows: How many samples were looked at.
        steps: The training steps at which `suitability` was measured, from 0.
        suitability: What it was at each.
        smoothness: What it was at the end.
    """

    data: str
    model: str
    rows: int
    steps: tuple[int, ...]
    suitability: tuple[Suitability, ...]
    smoothness: Smoothness

    @property
    def verdict(self) -> str:
        """The finding in words: at the last steps, over which one would choose."""
        return f"{self.suitability[-1].verdict}\n{self.smoothness.verdict}"

    def write(self, folder: Path) -> list[Path]:
        """Writes ``diagnosis.json``, ``suitability.png`` and ``smoothness.png``; returns them.

        Args:
            folder: Made if it is not there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        results = folder / "diagnosis.json"
        results.write_text(json.dumps({**asdict(self), "verdict": self.verdict}, indent=1) + "\n")
        written = [results]
        for name, image in (
            ("suitability.png", plots.suitability(self.steps, self.suitability)),
            ("smoothness.png", plots.smoothness(self.smoothness)),
        ):
            path = folder / name
            path.write_bytes(image)
            written.append(path)
        return written


def diagnose(
    data: Dataset,
    *,
    model: str = "auto",
    steps: int = 200,
    points: int = 10,
    neighbors: int = 32,
    top: int = 32,
    rows: int = 20_000,
    batch_size: int = 128,
    seed: int = 0,
    on_progress: Callable[[int, Suitability], Any] | None = None,
) -> Diagnosis:
    """Trains for a while on uniform batches, measures suitability on the way, and smoothness then.

    Args:
        data: The data set, as by `fastsel.data.load`.
        model: One of those of `fastsel compare`; ``auto``: the paper's MLP, for images a small
            conv net.
        steps: Training steps in all.
        points: How often to measure suitability after the first time.
        neighbors: K of the table.
        top: As in `suitability`.
        rows: At most so many samples, drawn at random.
        batch_size: Of the training.
        seed: Of weights, batches and draws.
        on_progress: Called with the steps done and what was found then.

    Returns:
        `Diagnosis`.

    Raises:
        CompareError: There is no such model, or an option is out of range.
    """
    name = ("small_cnn" if data.is_image else "mlp") if model == "auto" else model
    if name not in MODELS:
        raise CompareError(f"model must be auto or one of {', '.join(MODELS)}, got {model}")
    for option, value in (("steps", steps), ("points", points), ("neighbors", neighbors),
                          ("top", top), ("batch-size", batch_size)):  # fmt: skip
        if value < 1:
            raise CompareError(f"{option} must be positive, got {value}")
    if min(rows, len(data.train_target)) <= neighbors:
        raise CompareError(
            f"there must be more rows than neighbors, got {min(rows, len(data.train_target))} and "
            f"{neighbors}"
        )
    generator = torch.Generator().manual_seed(stream_seed("diagnosed rows", seed))
    picked = torch.randperm(len(data.train_target), generator=generator)[:rows].sort().values
    inputs, target = data.train_inputs[picked], data.train_target[picked]
    table = NeighborTable.build(inputs.flatten(1), neighbors)
    network = make_model(name, data, stream_seed("weights", seed))
    classes = data.task == "classification"
    criterion: nn.Module = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    optimizer = make_optimizer("adam", network, DEFAULT_LR["adam"][name])
    order = BatchOrder(len(target), min(batch_size, len(target)), seed)
    at: list[int] = []
    found: list[Suitability] = []
    marks = {round(steps * i / points) for i in range(points + 1)}
    norms = torch.empty(0)
    for step in range(steps + 1):
        if step in marks:
            norms = gradient_norms(network, criterion, inputs, target)
            at.append(step)
            found.append(suitability(norms, table, top=top))
            if on_progress is not None:
                on_progress(step, found[-1])
        if step == steps:
            break
        batch = order.next_batch()
        optimizer.zero_grad(set_to_none=True)
        criterion(network(inputs[batch]), target[batch]).backward()
        optimizer.step()
    smooth = smoothness(
        network, criterion, inputs, target, norms, neighbors=neighbors, generator=generator
    )
    return Diagnosis(data.name, name, len(target), tuple(at), tuple(found), smooth)
