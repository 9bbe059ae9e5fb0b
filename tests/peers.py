"""What fastsel's operators compute, by torch and NumPy: the peers of the benches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def eager_sample_scores(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastsel.sample_scores` as one would write it with torch's own operators, in float32.

    Subject to the cancellation that fastsel avoids: right on ordinary rows, wrong on well-learnt
    ones.
    """
    x = logits.float()
    lse = x.logsumexp(-1)
    log_p = x - lse[:, None]
    p = log_p.exp()
    loss = -log_p.gather(-1, target[:, None])[:, 0]
    p_target = p.gather(-1, target[:, None])[:, 0]
    grad_norm = (p.square().sum(-1) - 2 * p_target + 1).clamp(min=0).sqrt()
    entropy = -(p * log_p).sum(-1)
    return loss, grad_norm, entropy, lse


def argpartition_topk(scores: NDArray[Any], k: int) -> NDArray[np.int64]:  # [N] -> [k]
    """The indices of the k largest by NumPy, in no order and with ties broken anyhow."""
    return np.argpartition(scores, len(scores) - k)[len(scores) - k :]


class EagerAdaSelection:
    """The decisions of `fastsel.adaselection_` as one would write them with torch's own operators.

    Statistics of all methods are one tensor ``[M, B]``, so that each operator runs once for all of
    them; the state is updated in place. What fastsel does besides is left out: samples that are not
    finite, ties, indices in order.
    """

    def __init__(self, methods: Sequence[str], beta: float = 0.5, curriculum_power: float = 0.5):
        self.methods = tuple(methods)
        self.beta = beta
        self.curriculum_power = curriculum_power

    def __call__(
        self,
        losses: Tensor,  # [B]
        grad_norms: Tensor,  # [B]
        reference_losses: Tensor,  # [B]
        method_weights: Tensor,  # [M]
        method_losses: Tensor,  # [M]
        step: Tensor,  # one element
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """The chosen ``[k]``, in no order, and the scores ``[B]``."""
        statistics = torch.stack(
            [self._statistic(name, losses, grad_norms, reference_losses) for name in self.methods]
        )  # [M, B]
        std = statistics.std(1, correction=0, keepdim=True)
        flat = std <= 2.0**-22 * statistics.abs().amax(1, keepdim=True)
        importance = statistics.div(std.masked_fill(flat, torch.inf)).softmax(1)  # [M, B]
        current = importance @ losses  # [M]
        change = (current - method_losses).abs() / method_losses.abs().clamp(min=1e-38)
        exponent = self.beta * change.masked_fill(step == 0, 0.0)
        method_weights.copy_((method_weights.log() + exponent).softmax(0))
        method_losses.copy_(current)
        step.add_(1)
        scale = losses.abs().mean() * step**self.curriculum_power
        scores = torch.exp(-losses / scale) * (method_weights @ importance)
        return scores.topk(k, sorted=False).indices, scores

    def _statistic(
        self, name: str, losses: Tensor, grad_norms: Tensor, reference_losses: Tensor
    ) -> Tensor:
        if name == "uniform":
            return torch.zeros_like(losses)
        if name == "big_loss":
            return losses
        if name == "small_loss":
            return -losses
        if name == "grad_norm":
            return grad_norms
        if name == "adaboost":
            scaled = losses / (1.0001 * losses.abs().amax())
            return scaled.atanh()
        if name == "coreset1":
            places = torch.arange(len(losses), dtype=losses.dtype, device=losses.device)
            distance = (places - (len(losses) - 1) / 2).abs()
            return torch.empty_like(losses).scatter_(0, losses.argsort(), distance)
        if name == "coreset2":
            return -(losses - losses.mean()).abs()
        if name == "rho_loss":
            return losses - reference_losses
        raise ValueError(f"EagerAdaSelection: no method {name!r}")


def numpy_choice(weights: NDArray[Any], n: int, *, replacement: bool) -> NDArray[np.int64]:
    """`fastsel.weighted_sample` by NumPy's generator."""
    wide = weights.astype(np.float64)
    return np.random.default_rng(0).choice(len(wide), n, replace=replacement, p=wide / wide.sum())


def eager_neighbor_sample(
    table: Tensor,  # [N, K]
    anchors: Tensor,  # [A]
    anchor_weights: Tensor,  # [A]
    n: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """`fastsel.neighbor_sample` by torch's own operators, with draws of torch's generator."""
    rows = table[anchors]  # [A, K]
    picked = torch.multinomial(anchor_weights, n, replacement=True)
    places = torch.randint(table.shape[1], (n,), device=table.device)
    indices = rows[picked, places]
    order = rows.flatten().argsort()
    ids = rows.flatten()[order].contiguous()
    shares = anchor_weights.double()[:, None].expand(rows.shape).flatten()[order].cumsum(0)
    sums = torch.cat([shares.new_zeros(1), shares])
    last, first = torch.searchsorted(ids, indices, right=True), torch.searchsorted(ids, indices)
    each = anchor_weights.double().sum() * table.shape[1]
    return indices, ((sums[last] - sums[first]) / each).float()
