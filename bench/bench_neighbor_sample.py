"""neighbor_sample against the same draws and probabilities by torch's own operators.

The limit: the anchors' rows of the table are read once.
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

CONTENDERS: dict[str, Callable[..., Any]] = {
    "fastsel": fastsel.neighbor_sample,
    "torch eager": peers.eager_neighbor_sample,
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("device", harness.DEVICES)
@pytest.mark.parametrize(("anchors", "n"), [(32, 128), (512, 256), (4096, 2048)])
def bench_neighbor_sample(
    benchmark: harness.Benchmark, device: str, anchors: int, n: int, contender: str
) -> None:
    """So many neighbours of so many anchors among 245,057 points, 32 neighbours each."""
    rows, width = 245_057, 32

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        table = torch.randint(rows, (rows, width), generator=generator, device=device)
        picked: Tensor = torch.randint(rows, (anchors,), generator=generator, device=device)
        weights = torch.rand(anchors, generator=generator, device=device)
        return table, picked, weights, n, torch.tensor([seed], device=device)

    harness.measure(
        benchmark,
        CONTENDERS[contender],
        inputs,
        op="neighbor_sample",
        workload=f"{n:,} neighbours of {anchors:,} anchors, {width} each",
        contender=contender,
        device=device,
        bytes_moved=anchors * (width * 8 + 12) + n * 12,
        in_graph=contender == "fastsel",
    )
