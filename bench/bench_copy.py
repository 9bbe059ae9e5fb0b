"""Copy bandwidth: the limit that GB/s of the other benches are read against."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("device", harness.DEVICES)
def bench_copy(benchmark: harness.Benchmark, device: str) -> None:
    """Copies 64 Mi floats: 512 MB through memory."""
    n = 1 << 26

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        return torch.full((n,), float(seed), device=device), torch.empty(n, device=device)

    harness.measure(
        benchmark,
        lambda source, destination: destination.copy_(source),
        inputs,
        op="copy",
        workload="67,108,864 float32",
        contender="torch.copy_",
        device=device,
        bytes_moved=8 * n,
    )
