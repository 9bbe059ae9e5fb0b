"""`conv_grad_norm_sq` and `conv_weight_grad`: the wrappers and the shape functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, name, norms_like, require, without_grad
from fastsel.ops._linear_grad_norm import Form, WeightGrad, check_form, check_single


def conv_grad_norm_sq(
    input: Tensor,  # [B, C_in, spatial...]
    grad_outputs: Tensor,  # [B, C_out, spatial...]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    form: Form = "auto",
) -> Tensor:
    """Squared norm of each sample's weight gradient of a convolution, without the gradients.

    A convolution is a linear layer whose positions are the output's pixels and whose input is the
    unfolded image (Rochette et al. 2019, arXiv:1912.06015), so `linear_grad_norm_sq` says what is
    computed; the image is not unfolded. With groups the layers stand side by side and their squares
    add up. A transposed convolution has the same weight gradient with the roles exchanged: pass the
    gradient of its output as `input`, and its input as `grad_outputs`.

    Args:
        input: What went into the convolution, of one to three spatial dimensions; float32, float16,
            bfloat16, and on the CPU float64.
        grad_outputs: The gradient of what came out, of the same dtype.
        kernel_size: The kernel's extent along each spatial dimension, and so for the next three.
        stride: At least 1.
        padding: Zeros added on both sides, at least 0.
        dilation: At least 1.
        groups: Divides the channels of both.
        form: ``direct`` or ``gram`` insist on one of the two; for measurements.

    Returns:
        ``[B]``, float32 (float64 for float64). A sample with NaN or infinity has a norm that is NaN
        or infinite, and touches no other.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: Shapes and geometry do not agree, or `form` is unknown.

    Example:
        >>> x, g = torch.ones(1, 1, 4), torch.ones(1, 1, 2)
        >>> fastsel.conv_grad_norm_sq(x, g, [3], [1], [0], [1], 1)  # the gradient is [2, 2, 2]
        tensor([12.])
    """
    op = "conv_grad_norm_sq"
    lists = _check(op, input, grad_outputs, kernel_size, stride, padding, dilation, groups)
    check_form(op, form)
    tensors = without_grad(input), without_grad(grad_outputs)
    norms: Tensor = _norm_sq(*tensors, *lists, groups, form=form)
    return norms


def conv_weight_grad(
    input: Tensor,  # [B, C_in, spatial...]
    grad_outputs: Tensor,  # [B, C_out, spatial...]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> WeightGrad:
    """A convolution's weight gradient, with each sample's norm as a by-product. CPU only.

    See `linear_weight_grad`, and `conv_grad_norm_sq` for the arguments.

    Returns:
        `WeightGrad` of ``[C_out, C_in / groups, kernel_size...]``, ``[C_out]``, ``[B]`` and
        ``[B]``, all float32.

    Raises:
        TypeError: An argument is not of the type or dtype it should be.
        ValueError: Shapes and geometry do not agree.

    Example:
        >>> x, g = torch.ones(2, 1, 4), torch.ones(2, 1, 2)
        >>> fastsel.ops.conv_weight_grad(x, g, [3], [1], [0], [1], 1).weight_grad
        tensor([[[4., 4., 4.]]])
    """
    op = "conv_weight_grad"
    lists = _check(op, input, grad_outputs, kernel_size, stride, padding, dilation, groups)
    check_single(op, "input", input)
    tensors = without_grad(input), without_grad(grad_outputs)
    return WeightGrad(*_weight_grad(*tensors, *lists, groups))


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """How many positions a convolution has along each spatial dimension."""
    return [
        max(0, (n + 2 * p - d * (k - 1) - 1) // s + 1)
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def register(namespace: str) -> None:
    """Gives the operators of a namespace their shape functions."""
    torch.library.register_fake(f"{namespace}::conv_grad_norm_sq", _norm_sq_fake)
    torch.library.register_fake(f"{namespace}::conv_weight_grad", _weight_grad_fake)


def _check(
    op: str,
    input: Tensor,
    grad_outputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[list[int], list[int], list[int], list[int]]:
    check_float_tensor(op, "input", input)
    check_float_tensor(op, "grad_outputs", grad_outputs)
    if input.dtype != grad_outputs.dtype:
        raise TypeError(
            f"{op}: grad_outputs must have the dtype of input, {name(input.dtype)}, "
            f"got {name(grad_outputs.dtype)}"
        )
    dims = input.dim() - 2
    if not 1 <= dims <= 3:
        raise ValueError(
            f"{op}: input must be [B, C, L], [B, C, H, W] or [B, C, D, H, W], "
            f"got shape {list(input.shape)}"
        )
    if grad_outputs.dim() != input.dim() or grad_outputs.shape[0] != input.shape[0]:
        raise ValueError(
            f"{op}: grad_outputs must have the batch size and the number of dimensions of input "
            f"{list(input.shape)}, got {list(grad_outputs.shape)}"
        )
    for argument, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != dims or any(value < least for value in values):
            raise ValueError(
                f"{op}: {argument} must be {dims} integers of at least {least}, got {list(values)}"
            )
    if groups < 1 or input.shape[1] % groups != 0 or grad_outputs.shape[1] % groups != 0:
        raise ValueError(
            f"{op}: groups must divide the {input.shape[1]} channels of input and the "
            f"{grad_outputs.shape[1]} of grad_outputs, got {groups}"
        )
    expected = output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    if list(grad_outputs.shape[2:]) != expected:
        raise ValueError(
            f"{op}: grad_outputs must be {expected} along its spatial dimensions for input "
            f"{list(input.shape)}, got {list(grad_outputs.shape)}"
        )
    return list(kernel_size), list(stride), list(padding), list(dilation)


def _norm_sq_fake(
    input: Tensor,
    grad_outputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    form: str = "auto",
) -> Tensor:
    require(input.dim() == grad_outputs.dim(), lambda: "conv_grad_norm_sq: dimensions must agree")
    return norms_like(input)


def _weight_grad_fake(
    input: Tensor,
    grad_outputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require(input.dim() == grad_outputs.dim(), lambda: "conv_weight_grad: dimensions must agree")
    shape = (grad_outputs.shape[1], input.shape[1] // groups, *kernel_size)
    return (
        input.new_empty(shape, dtype=torch.float32),
        input.new_empty(grad_outputs.shape[1], dtype=torch.float32),
        norms_like(input),
        norms_like(input),
    )


_norm_sq = torch.ops.fastsel.conv_grad_norm_sq.default
_weight_grad = torch.ops.fastsel.conv_weight_grad.default
