"""The gradient noise scale, from per-sample norms and the norm of the batch's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class NoiseScale(NamedTuple):
    """What `GradNorms.noise_scale` returns, a tensor of one element each.

    Attributes:
        scale: ``trace / grad_norm_sq``, in samples: about the batch size beyond which more samples
            a step save few steps.
        trace: The trace of the covariance of a sample's gradient, estimated without bias.
        grad_norm_sq: The squared norm of the true gradient, estimated without bias.
    """

    scale: Tensor
    trace: Tensor
    grad_norm_sq: Tensor


def noise_scale(
    norms: Tensor,  # [N]
    grads: Sequence[Tensor],
    grad_scale: float,
    group: dist.ProcessGroup | None = None,
) -> NoiseScale:
    """The estimate of McCandlish et al. 2018, appendix A.1, for batches of 1 and of N samples.

    Args:
        norms: The norm of each sample's gradient, of this process.
        grads: The gradients of the parameters, summed or averaged over processes alike, or each
            process' shard of them.
        grad_scale: What the gradients are too large by.
        group: The processes that share the batch.

    Raises:
        RuntimeError: There are fewer than two samples.
    """
    sharded = [grad for grad in grads if hasattr(grad, "to_local")]
    whole = [grad for grad in grads if not hasattr(grad, "to_local")]
    local = [grad.to_local() for grad in sharded]
    sums = torch.stack(
        [
            norms.double().square().sum(),
            torch.tensor(float(len(norms)), dtype=torch.float64, device=norms.device),
            _square_sum(local, norms),
        ]
    )
    if group is not None or (sharded and dist.is_initialized()):
        dist.all_reduce(sums, group=group)
    mean_sq = (sums[2] + _square_sum(whole, norms)) / grad_scale**2
    count = int(sums[1])
    if count < 2:
        raise RuntimeError(f"GradNorms: noise_scale needs at least two samples, got {count}")
    sample_sq = sums[0] / count
    grad_norm_sq = (count * mean_sq - sample_sq) / (count - 1)
    trace = (sample_sq - mean_sq) * count / (count - 1)
    return NoiseScale(trace / grad_norm_sq, trace, grad_norm_sq)


def _square_sum(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=like.device)
    for tensor in tensors:
        tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
        total = total + torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
    return total
