"""`affine_grad_norm_sq` and `bias_grad_norm_sq`: the wrappers and the shape functions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, name, norms_like, require, without_grad


def affine_grad_norm_sq(
    normalized: Tensor,  # [B, T..., D]
    grad_outputs: Tensor,  # [B, T..., D]
) -> Tensor:  # [B]
    """The squared norm of each sample's gradient of a normalisation's weight.

    A normalisation ends in ``output = normalized * weight + bias``, so sample b's gradient of the
    weight is the sum over its positions of ``normalized * grad_outputs``; this gives the squared L2
    norm of that sum, with one read of each input. Gray et al., "Normalization Layer Per-Example
    Gradients are Sufficient to Predict Gradient Noise Scale in Transformers" (2024,
    arXiv:2411.00999), measure these very norms; taking norms straight from activations and output
    gradients goes back to Goodfellow, "Efficient Per-Example Gradient Computations" (2015,
    arXiv:1510.01799).

    D is the weight's shape, flattened. LayerNorm and RMSNorm over the last dimension have it last
    already. GroupNorm, InstanceNorm and BatchNorm (in evaluation) work on ``[B, C, S...]``: pass
    ``x.flatten(2).transpose(1, 2)``, a view ``[B, S, C]``. Either of the last two dimensions may be
    the one that lies side by side in memory, and nothing is copied then; other layouts are copied.

    Sums are exact to the last bits of float32 on the CPU, where they are taken in double, and to
    about 1e-6 of the sum of magnitudes on CUDA. NaN and infinities reach the norm of their own
    sample only. The result is not differentiable.

    Args:
        normalized: What the weight is multiplied with ``[B, T..., D]``, any number of positions'
            dimensions, none too; float32, float16, bfloat16, and on the CPU float64. Any size may
            be 0.
        grad_outputs: The gradient of the loss with respect to the output, of the same shape, dtype
            and device.

    Returns:
        The squared norms ``[B]``: float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: Shapes or devices do not fit together.

    Example:
        >>> normalized = torch.tensor([[[1.0, -1.0], [1.0, 2.0]]])
        >>> grad_outputs = torch.tensor([[[2.0, 1.0], [1.0, 0.0]]])
        >>> fastsel.affine_grad_norm_sq(normalized, grad_outputs)  # of [3, -1]
        tensor([10.])
    """
    op = "affine_grad_norm_sq"
    check_float_tensor(op, "normalized", normalized)
    check_float_tensor(op, "grad_outputs", grad_outputs)
    if normalized.dim() < 2:
        raise ValueError(
            f"{op}: normalized must be [B, T..., D], got shape {list(normalized.shape)}"
        )
    if grad_outputs.shape != normalized.shape:
        raise ValueError(
            f"{op}: grad_outputs must have the shape of normalized, {list(normalized.shape)}, "
            f"got {list(grad_outputs.shape)}"
        )
    if grad_outputs.dtype != normalized.dtype:
        raise TypeError(
            f"{op}: grad_outputs must have the dtype of normalized, {name(normalized.dtype)}, "
            f"got {name(grad_outputs.dtype)}"
        )
    if grad_outputs.device != normalized.device:
        raise ValueError(
            f"{op}: grad_outputs must be on {normalized.device} as normalized is, "
            f"got {grad_outputs.device}"
        )
    norms: Tensor = _affine_grad_norm_sq(without_grad(normalized), without_grad(grad_outputs))
    return norms


def bias_grad_norm_sq(
    grad_outputs: Tensor,  # [B, T..., p]
) -> Tensor:  # [B]
    """The squared norm of each sample's gradient of a bias.

    A bias is added at every position, so sample b's gradient of it is the sum over the positions of
    ``grad_outputs``, and this gives the squared L2 norm of that sum (Goodfellow, "Efficient
    Per-Example Gradient Computations", 2015, arXiv:1510.01799), in one read. With no positions'
    dimension, ``[B, p]``, it is the squared norm of each row.

    For a convolution's bias, or that of a normalisation over channels, pass the view
    ``grad.flatten(2).transpose(1, 2)``: either of the last two dimensions may be the one that lies
    side by side in memory, and nothing is copied then; other layouts are copied.

    Sums are exact to the last bits of float32 on the CPU, where they are taken in double, and to
    about 1e-6 of the sum of magnitudes on CUDA. NaN and infinities reach the norm of their own
    sample only. The result is not differentiable.

    Args:
        grad_outputs: The gradient of the loss with respect to the output ``[B, T..., p]``, any
            number of positions' dimensions, none too; float32, float16, bfloat16, and on the CPU
            float64. Any size may be 0.

    Returns:
        The squared norms ``[B]``: float32 (float64 for float64 inputs).

    Raises:
        TypeError: `grad_outputs` is not a tensor of the dtypes above.
        ValueError: `grad_outputs` has fewer than two dimensions.

    Example:
        >>> fastsel.bias_grad_norm_sq(torch.tensor([[[1.0, 0.0], [2.0, 4.0]]]))  # of [3, 4]
        tensor([25.])
    """
    op = "bias_grad_norm_sq"
    check_float_tensor(op, "grad_outputs", grad_outputs)
    if grad_outputs.dim() < 2:
        raise ValueError(
            f"{op}: grad_outputs must be [B, T..., p], got shape {list(grad_outputs.shape)}"
        )
    norms: Tensor = _bias_grad_norm_sq(without_grad(grad_outputs))
    return norms


def register(namespace: str) -> None:
    """Gives the operators of a namespace their shape functions."""
    torch.library.register_fake(f"{namespace}::affine_grad_norm_sq", _affine_fake)
    torch.library.register_fake(f"{namespace}::bias_grad_norm_sq", _bias_fake)


def _affine_fake(
    normalized: Tensor,  # [B, T..., D]
    grad_outputs: Tensor,  # [B, T..., D]
) -> Tensor:
    require(normalized.dim() >= 2, lambda: "affine_grad_norm_sq: normalized must be [B, T..., D]")
    require(
        grad_outputs.dim() == normalized.dim(),
        lambda: "affine_grad_norm_sq: grad_outputs must have the shape of normalized",
    )
    for of_grad, of_normalized in zip(grad_outputs.shape, normalized.shape, strict=True):
        require(
            of_grad == of_normalized,
            lambda: "affine_grad_norm_sq: grad_outputs must have the shape of normalized",
        )
    return norms_like(grad_outputs)


def _bias_fake(grad_outputs: Tensor) -> Tensor:  # [B, T..., p]
    require(grad_outputs.dim() >= 2, lambda: "bias_grad_norm_sq: grad_outputs must be [B, T..., p]")
    return norms_like(grad_outputs)


_affine_grad_norm_sq = torch.ops.fastsel.affine_grad_norm_sq.default
_bias_grad_norm_sq = torch.ops.fastsel.bias_grad_norm_sq.default
