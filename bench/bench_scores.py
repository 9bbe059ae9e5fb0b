"""sample_scores against the same scores from torch, eager and compiled.

The limit: every logit is read once and four floats a row are written.
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

CONTENDERS: dict[str, Callable[[], Callable[[Tensor, Tensor], Any]]] = {
    "fastsel": lambda: fastsel.sample_scores,
    "torch.compile": lambda: torch.compile(peers.eager_sample_scores),
    "torch eager": lambda: peers.eager_sample_scores,
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("device", "batch", "classes"),
    [(device, *shape) for device in harness.DEVICES for shape in ((4096, 1000), (2048, 32000))]
    + [("cuda", 8192, 128256) for device in harness.DEVICES if device == "cuda"],
)
def bench_sample_scores(
    benchmark: harness.Benchmark,
    device: str,
    batch: int,
    classes: int,
    dtype: torch.dtype,
    contender: str,
) -> None:
    """Loss, gradient norm, entropy and logsumexp of a batch of logits."""
    torch.compiler.reset()

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(batch, classes, generator=generator, device=device, dtype=dtype)
        return logits, torch.randint(0, classes, (batch,), generator=generator, device=device)

    harness.measure(
        benchmark,
        CONTENDERS[contender](),
        inputs,
        op="scores",
        workload=f"{batch} x {classes} {str(dtype).removeprefix('torch.')}",
        contender=contender,
        device=device,
        bytes_moved=batch * classes * dtype.itemsize + batch * (8 + 16),
    )


def fastsel_criterion(logits: Tensor, target: Tensor) -> Tensor:
    """The mean loss by `fastsel.sample_scores`, the scores beside it unused."""
    return fastsel.sample_scores(logits, target).loss.mean()


CRITERIA: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "fastsel": lambda: fastsel_criterion,
    "cross_entropy compiled": lambda: torch.compile(torch.nn.functional.cross_entropy),
    "cross_entropy": lambda: torch.nn.functional.cross_entropy,
}


@pytest.mark.parametrize("contender", CRITERIA)
@pytest.mark.parametrize("device", harness.DEVICES)
def bench_sample_scores_backward(benchmark: harness.Benchmark, device: str, contender: str) -> None:
    """Forward and backward as a criterion: fastsel's gives the scores besides."""
    torch.compiler.reset()
    batch, classes = 4096, 1000
    criterion = CRITERIA[contender]()

    def forward_and_backward(logits: Tensor, target: Tensor) -> Tensor:
        return torch.autograd.grad(criterion(logits, target), logits)[0]

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(batch, classes, generator=generator, device=device)
        target = torch.randint(0, classes, (batch,), generator=generator, device=device)
        return logits.requires_grad_(), target

    harness.measure(
        benchmark,
        forward_and_backward,
        inputs,
        op="scores",
        workload=f"{batch} x {classes} float32, backward too",
        contender=contender,
        device=device,
        bytes_moved=3 * batch * classes * 4,
    )
