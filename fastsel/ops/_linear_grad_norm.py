"""`linear_grad_norm_sq` and `linear_weight_grad`: the wrappers and the shape functions."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, name, norms_like, require, without_grad

Form = Literal["auto", "direct", "gram"]


class WeightGrad(NamedTuple):
    """What `linear_weight_grad` and `conv_weight_grad` return, all float32.

    Attributes:
        weight_grad: The weight's gradient, summed over the batch, in the weight's shape.
        bias_grad: The bias' gradient, summed over the batch ``[p]``.
        weight_norm_sq: The squared L2 norm of each sample's share of `weight_grad` ``[B]``.
        bias_norm_sq: The same of `bias_grad` ``[B]``.
    """

    weight_grad: Tensor
    bias_grad: Tensor
    weight_norm_sq: Tensor  # [B]
    bias_norm_sq: Tensor  # [B]


def linear_grad_norm_sq(
    activations: Tensor,  # [B, T..., d]
    grad_outputs: Tensor,  # [B, T..., p]
    *,
    form: Form = "auto",
) -> Tensor:
    """Squared norm of each sample's weight gradient of a linear layer, without the gradients.

    Sample b of a layer ``y = x W^T`` adds ``G_b^T A_b`` to the gradient of W, A_b being its input
    ``[T, d]`` and G_b the gradient of its output ``[T, p]``. With one position the squared norm is
    ``|A_b|^2 |G_b|^2`` (Goodfellow 2015, arXiv:1510.01799); with several it is either ``|G_b^T
    A_b|^2`` (``direct``, 2 T d p flops) or ``<A_b A_b^T, G_b G_b^T>`` (``gram``, T^2 (d + p)
    flops), of which each call takes the cheaper. Neither ``[B, p, d]`` nor ``[B, T, T]`` is ever
    stored. Sums are held in float32 or better; where the terms of the Gram form cancel, the direct
    form is taken.

    Args:
        activations: What went into the layer, ``[B, T..., d]`` with any number of dimensions
            between the first and the last; float32, float16, bfloat16, and on the CPU float64.
        grad_outputs: The gradient of what came out, ``[B, T..., p]``, of the same dtype.
        form: ``direct`` or ``gram`` insist on one of the two; for measurements.

    Returns:
        ``[B]``, float32 (float64 for float64). A sample with NaN or infinity has a norm that is NaN
        or infinite, and touches no other.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: The shapes do not agree, or `form` is unknown.

    Example:
        >>> a, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> fastsel.linear_grad_norm_sq(a, g)  # the gradient is [[3, 6]]
        tensor([45.])
    """
    check_pair("linear_grad_norm_sq", "activations", activations, grad_outputs)
    check_form("linear_grad_norm_sq", form)
    norms: Tensor = _norm_sq(without_grad(activations), without_grad(grad_outputs), form=form)
    return norms


def linear_weight_grad(
    activations: Tensor,  # [B, T..., d]
    grad_outputs: Tensor,  # [B, T..., p]
) -> WeightGrad:
    """A linear layer's weight gradient, with each sample's norm as a by-product. CPU only.

    The product of each sample is squared and summed while it is in registers, and then added to the
    gradient: the norms cost no product of their own. It takes about as long as torch's product
    where a sample has a hundred positions or more; with few, `linear_grad_norm_sq` beside torch's
    product is cheaper.

    Args:
        activations: What went into the layer, ``[B, T..., d]``, float32, float16 or bfloat16.
        grad_outputs: The gradient of what came out, ``[B, T..., p]``, of the same dtype.

    Returns:
        `WeightGrad` of ``[p, d]``, ``[p]``, ``[B]`` and ``[B]``, all float32.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: The shapes do not agree.

    Example:
        >>> a, g = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
        >>> fastsel.ops.linear_weight_grad(a, g).weight_norm_sq  # 20 entries of 3 each
        tensor([180., 180.])
    """
    check_pair("linear_weight_grad", "activations", activations, grad_outputs)
    check_single("linear_weight_grad", "activations", activations)
    return WeightGrad(*_weight_grad(without_grad(activations), without_grad(grad_outputs)))


def check_pair(op: str, argument: str, first: Tensor, grad_outputs: Tensor) -> None:
    """Two tensors ``[B, T..., *]`` that agree in all but the last dimension."""
    check_float_tensor(op, argument, first)
    check_float_tensor(op, "grad_outputs", grad_outputs)
    if first.dtype != grad_outputs.dtype:
        raise TypeError(
            f"{op}: grad_outputs must have the dtype of {argument}, {name(first.dtype)}, "
            f"got {name(grad_outputs.dtype)}"
        )
    if first.dim() < 2:
        raise ValueError(
            f"{op}: {argument} must have the batch first and at least two dimensions, "
            f"got shape {list(first.shape)}"
        )
    if first.shape[:-1] != grad_outputs.shape[:-1]:
        raise ValueError(
            f"{op}: grad_outputs must agree with {argument} {list(first.shape)} in all but the "
            f"last dimension, got {list(grad_outputs.shape)}"
        )


def check_single(op: str, argument: str, value: Tensor) -> None:
    """The by-product forms are for training, not for checking."""
    if value.dtype == torch.float64:
        raise TypeError(f"{op}: {argument} must be float32, float16 or bfloat16, got float64")


def check_form(op: str, form: str) -> None:
    """One of the forms of a squared norm."""
    if form not in ("auto", "direct", "gram"):
        raise ValueError(f"{op}: form must be 'auto', 'direct' or 'gram', got {form!r}")


def register(namespace: str) -> None:
    """Gives the operators of a namespace their shape functions."""
    torch.library.register_fake(f"{namespace}::linear_grad_norm_sq", _norm_sq_fake)
    torch.library.register_fake(f"{namespace}::linear_weight_grad", _weight_grad_fake)


def _check_fake(op: str, activations: Tensor, grad_outputs: Tensor) -> None:
    require(activations.dim() >= 2, lambda: f"{op}: activations must be [B, T..., d]")
    require(
        activations.dim() == grad_outputs.dim(), lambda: f"{op}: grad_outputs must be [B, T..., p]"
    )


def _norm_sq_fake(
    activations: Tensor,  # [B, T..., d]
    grad_outputs: Tensor,  # [B, T..., p]
    *,
    form: str = "auto",
) -> Tensor:
    _check_fake("linear_grad_norm_sq", activations, grad_outputs)
    return norms_like(activations)


def _weight_grad_fake(
    activations: Tensor,  # [B, T..., d]
    grad_outputs: Tensor,  # [B, T..., p]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_fake("linear_weight_grad", activations, grad_outputs)
    p, d = grad_outputs.shape[-1], activations.shape[-1]
    return (
        activations.new_empty(p, d, dtype=torch.float32),
        activations.new_empty(p, dtype=torch.float32),
        norms_like(activations),
        norms_like(activations),
    )


_norm_sq = torch.ops.fastsel.linear_grad_norm_sq.default
_weight_grad = torch.ops.fastsel.linear_weight_grad.default
