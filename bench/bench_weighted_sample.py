"""weighted_sample against torch.multinomial and NumPy's choice.

The limit: every weight is read once. NumPy's choice without replacement draws one item after
another and is left out where that takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import peers
import pytest
import torch
from torch import Tensor

import fastsel

Contender = Callable[[Tensor, int, bool, Tensor], Any]

CONTENDERS: dict[str, Contender] = {
    "fastsel": lambda w, n, again, seed: fastsel.weighted_sample(w, n, seed, replacement=again),
    "torch.multinomial": lambda w, n, again, _: torch.multinomial(w, n, replacement=again),
    "numpy choice": lambda w, n, again, _: peers.numpy_choice(w.numpy(), n, replacement=again),
}


@pytest.mark.parametrize(
    ("device", "contender"),
    [(d, c) for d in harness.DEVICES for c in CONTENDERS if d == "cpu" or c != "numpy choice"],
)
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(
    ("items", "n"), [(512, 64), (50_000, 512), (1_000_000, 1024), (10_000_000, 1024)]
)
def bench_weighted_sample(
    benchmark: harness.Benchmark,
    device: str,
    items: int,
    n: int,
    replacement: bool,
    contender: str,
) -> None:
    """Some of many float32 weights."""

    def inputs(seed: int) -> tuple[Tensor, int, bool, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        weights = torch.rand(items, generator=generator, device=device)
        return weights, n, replacement, torch.tensor([seed], device=device)

    harness.measure(
        benchmark,
        CONTENDERS[contender],
        inputs,
        op="weighted_sample",
        workload=f"{n:,} of {items:,}, {'with' if replacement else 'without'} replacement",
        contender=contender,
        device=device,
        bytes_moved=items * 4 + n * 12,
        in_graph=contender == "fastsel",
    )
