"""What fastsel's operators compute, by torch and NumPy: the peers of the benches."""

from __future__ import annotations

from typing import Any

import numpy as np
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
