"""`embedding_grad_norm_sq`: the wrapper and the shape function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, name, norms_like, require, without_grad


def embedding_grad_norm_sq(
    indices: Tensor,  # [B, T...]
    grad_outputs: Tensor,  # [B, T..., D]
    padding_idx: int = -1,
) -> Tensor:  # [B]
    """The squared norm of each sample's gradient of an embedding table.

    A sample's gradient of the table has a row for each token the sample holds: the sum of the
    output gradients at all positions of that token. So gradients of equal tokens add before the
    norm is taken; the sum of the squared norms of the positions would be wrong by the cross terms.
    The norm comes straight from indices and output gradients, as in Goodfellow, "Efficient
    Per-Example Gradient Computations" (2015, arXiv:1510.01799): there is no array of the table's
    size, and each gradient is read once, those of padding not at all.

    Sums are exact to the last bits of float32 on the CPU, where they are taken in double, and to
    about 1e-6 of the sum of magnitudes on CUDA. NaN and infinities reach the norm of their own
    sample only. The result is not differentiable.

    Args:
        indices: The tokens ``[B, T...]``, any number of positions' dimensions, none too; int64 or
            int32. The table is not seen, so they are not checked against its size. Any size may be
            0.
        grad_outputs: The gradient of the loss with respect to the embedded tokens
            ``[B, T..., D]``, on the same device; float32, float16, bfloat16, and on the CPU
            float64. A layout in which a position's D values do not lie side by side is copied.
        padding_idx: Positions that hold this token contribute nothing, as in
            `torch.nn.functional.embedding`; -1 for no padding.

    Returns:
        The squared norms ``[B]``: float32 (float64 for float64 gradients).

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: Shapes or devices do not fit together.

    Example:
        >>> indices = torch.tensor([[5, 2, 5]])
        >>> grad_outputs = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]])
        >>> fastsel.embedding_grad_norm_sq(indices, grad_outputs)  # of [3, 0] and [0, 2]
        tensor([13.])
    """
    op = "embedding_grad_norm_sq"
    if not isinstance(indices, Tensor):
        raise TypeError(f"{op}: indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices must be int64 or int32, got {name(indices.dtype)}")
    check_float_tensor(op, "grad_outputs", grad_outputs)
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, (int, torch.SymInt)):
        raise TypeError(f"{op}: padding_idx must be an int, got {type(padding_idx).__name__}")
    if indices.dim() < 1:
        raise ValueError(f"{op}: indices must be [B, T...], got shape []")
    if grad_outputs.dim() != indices.dim() + 1 or grad_outputs.shape[:-1] != indices.shape:
        raise ValueError(
            f"{op}: grad_outputs must be [B, T..., D] for indices {list(indices.shape)}, "
            f"got shape {list(grad_outputs.shape)}"
        )
    if grad_outputs.device != indices.device:
        raise ValueError(
            f"{op}: grad_outputs must be on {indices.device} as indices are, "
            f"got {grad_outputs.device}"
        )
    norms: Tensor = _embedding_grad_norm_sq(indices, without_grad(grad_outputs), padding_idx)
    return norms


def register(namespace: str) -> None:
    """Gives the operator of a namespace its shape function."""
    torch.library.register_fake(f"{namespace}::embedding_grad_norm_sq", _embedding_fake)


def _embedding_fake(
    indices: Tensor,  # [B, T...]
    grad_outputs: Tensor,  # [B, T..., D]
    padding_idx: int = -1,
) -> Tensor:
    require(indices.dim() >= 1, lambda: "embedding_grad_norm_sq: indices must be [B, T...]")
    require(
        grad_outputs.dim() == indices.dim() + 1,
        lambda: "embedding_grad_norm_sq: grad_outputs must be [B, T..., D]",
    )
    for of_grad, of_indices in zip(grad_outputs.shape[:-1], indices.shape, strict=True):
        require(
            of_grad == of_indices,
            lambda: "embedding_grad_norm_sq: grad_outputs must be [B, T..., D]",
        )
    return norms_like(grad_outputs)


_embedding_grad_norm_sq = torch.ops.fastsel.embedding_grad_norm_sq.default
