"""topk against torch.topk and NumPy's argpartition.

`fastsel` and `torch.topk` return values and indices, best first; `argpartition` returns indices in
no order, to which `fastsel, unsorted` is the nearest. The limit: every score is read once.
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

CONTENDERS: dict[str, Callable[[Tensor, int], Any]] = {
    "fastsel": fastsel.topk,
    "fastsel, unsorted": lambda scores, k: fastsel.topk(scores, k, sorted=False),
    "torch.topk": torch.topk,
    "argpartition": lambda scores, k: peers.argpartition_topk(scores.numpy(), k),
}


@pytest.mark.parametrize(
    ("device", "contender"),
    [(d, c) for d in harness.DEVICES for c in CONTENDERS if d == "cpu" or c != "argpartition"],
)
@pytest.mark.parametrize(
    ("n", "k"), [(8192, 1024), (65_536, 1024), (1_000_000, 10_000), (10_000_000, 10_000)]
)
def bench_topk(benchmark: harness.Benchmark, device: str, n: int, k: int, contender: str) -> None:
    """The k largest of n normally distributed float32 scores."""

    def inputs(seed: int) -> tuple[Tensor, int]:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(n, generator=generator, device=device), k

    harness.measure(
        benchmark,
        CONTENDERS[contender],
        inputs,
        op="topk",
        workload=f"{k:,} of {n:,} float32",
        contender=contender,
        device=device,
        bytes_moved=n * 4 + k * 12,
    )
