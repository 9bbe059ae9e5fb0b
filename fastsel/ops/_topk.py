"""`topk`: the wrapper and the shape function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, require


class TopK(NamedTuple):
    """What `topk` returns.

    Attributes:
        values: The chosen scores ``[..., k]``, in the dtype of the scores.
        indices: Their positions in the last dimension ``[..., k]``, int64.
    """

    values: Tensor  # [..., k]
    indices: Tensor  # [..., k]


def topk(
    scores: Tensor,  # [..., N]
    k: int,
    *,
    largest: bool = True,
    sorted: bool = True,
) -> TopK:
    """Chooses the k best scores of the last dimension, always the same ones.

    The order is total, so the answer is the one a stable sort gives, on every device and at any
    thread count: ties go to the lower index, -0.0 equals +0.0, and NaN is the largest value, as in
    `torch.topk`. ``values`` is differentiable with respect to `scores`.

    Args:
        scores: Any shape ``[..., N]`` of at least one dimension, N may be 0; float32, float16,
            bfloat16, and on the CPU float64. Any strides.
        k: How many to choose, from 0 to N.
        largest: Choose the largest scores; otherwise the smallest (NaN still counts as the
            largest).
        sorted: Order the chosen best first, ties by index. Otherwise they come in ascending order
            of their index, which is cheaper and reads memory in order when rows are gathered with
            it.

    Returns:
        `TopK` of values ``[..., k]`` in the dtype of `scores` and indices ``[..., k]`` in int64.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: `scores` has no dimension, or k is not between 0 and N.

    Example:
        >>> values, indices = fastsel.topk(torch.tensor([0.5, 2.0, -1.0, 2.0]), 2)
        >>> indices
        tensor([1, 3])
    """
    check_float_tensor("topk", "scores", scores)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"topk: k must be an int, got {type(k).__name__}")
    if scores.dim() == 0:
        raise ValueError("topk: scores must have at least one dimension, got shape []")
    if not 0 <= k <= scores.shape[-1]:
        raise ValueError(
            f"topk: k must be between 0 and {scores.shape[-1]} "
            f"(the size of the last dimension), got {k}"
        )
    if scores.requires_grad and torch.is_grad_enabled():
        # An autograd registration would cost every call three times the operator's own overhead,
        # and choosing is almost always done without gradients; gathering is differentiable and paid
        # for only here.
        indices = _topk(scores.detach(), k, largest=largest, sorted=sorted)[1]
        return TopK(scores.gather(-1, indices), indices)
    return TopK(*_topk(scores, k, largest=largest, sorted=sorted))


def register(namespace: str) -> None:
    """Gives the operator of a namespace its shape function."""
    torch.library.register_fake(f"{namespace}::topk", _topk_fake)


def _topk_fake(
    scores: Tensor,  # [..., N]
    k: int,
    *,
    largest: bool = True,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    require(scores.dim() >= 1, lambda: "topk: scores must have at least one dimension")
    require(k >= 0, lambda: "topk: k must not be negative")
    require(k <= scores.shape[-1], lambda: "topk: k must not exceed the last dimension")
    shape = (*scores.shape[:-1], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


_topk = torch.ops.fastsel.topk.default
