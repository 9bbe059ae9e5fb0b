"""Batches of scores shared by the tests of AdaSelection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsel.scores import Scores

NAN, INF = float("nan"), float("inf")


def batch(
    i: int, size: int = 64, dtype: torch.dtype = torch.float32, broken: bool = True
) -> Scores:
    """The i-th batch of a run, with two broken samples."""
    generator = torch.Generator().manual_seed(i)
    loss, norm, entropy, margin, reference = (
        torch.rand(5, size, generator=generator, dtype=torch.float64) * 3
    ).to(dtype)
    if broken:
        loss[i % size], norm[(3 * i + 1) % size] = NAN, INF
    return Scores(
        loss=loss, grad_norm=norm, entropy=entropy, margin=margin, reference_loss=reference
    )


def squared_loss(scores: Scores) -> Tensor:
    assert scores.loss is not None
    return scores.loss.square()
