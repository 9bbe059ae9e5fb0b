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
    sizes: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> NoiseScale:
    """The estimate of McCandlish et al. 2018, appendix A.1, for batches of 1 and of N samples.

    What it needs of the large batch is the variance of its mean, that of one sample over N. Of a
    mean of means of batches that differ in size it is the sum of the samples' squared weights.

    Args:
        norms: The norm of each sample's gradient, of this process.
        grads: The gradients of the parameters, summed or averaged over processes alike, or each
            process' shard of them.
        grad_scale: What the gradients are too large by.
        sizes: Samples of the batches of which the gradient is the mean of means.
        group: The processes that share the batch.

    Raises:
        RuntimeError: There are fewer than two samples.
    """
    sharded = [grad for grad in grads if hasattr(grad, "to_local")]
    whole = [grad for grad in grads if not hasattr(grad, "to_local")]
    local = [grad.to_local() for grad in sharded]
    weights_sq = sum(1 / size for size in sizes) / len(sizes) ** 2
    sums = torch.stack(
        [
            norms.double().square().sum(),
            norms.new_tensor(len(norms), dtype=torch.float64),
            _square_sum(local, norms),
            norms.new_tensor(weights_sq, dtype=torch.float64),
            norms.new_tensor(1, dtype=torch.float64),
        ]
    )
    if group is not None or (sharded and dist.is_initialized()):
        dist.all_reduce(sums, group=group)
    mean_sq = (sums[2] + _square_sum(whole, norms)) / grad_scale**2
    count = int(sums[1])
    if count < 2:
        raise RuntimeError(f"GradNorms: noise_scale needs at least two samples, got {count}")
    sample_sq = sums[0] / count
    variance = sums[3] / sums[4].square()  # of the mean over processes, in that of a sample
    trace = (sample_sq - mean_sq) / (1 - variance)
    grad_norm_sq = (mean_sq - variance * sample_sq) / (1 - variance)
    return NoiseScale(trace / grad_norm_sq, trace, grad_norm_sq)


def _square_sum(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=like.device)
    for tensor in tensors:
        tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
        total = total + torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
    return total
