"""What happens to convolutions and their transposes while a `Capture` is on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from fastsel.grad_norms import by_product
from fastsel.grad_norms.checks import check_input
from fastsel.grad_norms.kinds import CONV, SHIFT, Use
from fastsel.ops._conv_grad_norm import output_size

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

Call = Callable[..., Any]


def conv(
    capture: Capture,
    func: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    """`F.conv1d`, `conv2d`, `conv3d`: input ``[B, C, spatial...]``."""
    names = capture.name(weight), capture.name(bias)
    if names == (None, None) or capture.without_samples(input, names):
        return func(input, weight, bias, stride, padding, dilation, groups)
    dims = weight.dim() - 2
    check_input(capture, names[0] or names[1] or "", input, dims + 2)
    kernel, dilations = list(weight.shape[2:]), listed(dilation, dims)
    if isinstance(padding, str):
        input, pads = (
            pad_same(input, kernel, dilations) if padding == "same" else (input, [0] * dims)
        )
    else:
        pads = listed(padding, dims)
    strides = listed(stride, dims)
    geometry = (kernel, strides, pads, dilations, groups)
    if by_product.wanted_conv(capture, names[0], input, weight, geometry):
        return by_product.conv(capture, input, weight, bias, names, geometry)
    out = func(input, weight, bias, strides, pads, dilations, groups)
    options = (0, *kernel, *strides, *pads, *dilations, groups)

    def uses(x: Tensor | None, g: Tensor) -> Sequence[Use | None]:
        weight_use = None if x is None else Use(CONV, x, g, options)
        return weight_use, Use(SHIFT, None, g.flatten(2).transpose(1, 2))

    saved = None if names[0] is None else input
    return capture.watch(out, saved, names, uses, input.shape[0])


def conv_transpose(
    capture: Capture,
    func: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Any:
    """`F.conv_transpose1d` and so on: input ``[B, C, spatial...]``."""
    out = func(input, weight, bias, stride, padding, output_padding, groups, dilation)
    names = capture.name(weight), capture.name(bias)
    if names == (None, None) or capture.without_samples(input, names):
        return out
    dims = weight.dim() - 2
    check_input(capture, names[0] or names[1] or "", input, dims + 2)
    kernel, strides = list(weight.shape[2:]), listed(stride, dims)
    pads, dilations = listed(padding, dims), listed(dilation, dims)
    options = (1, *kernel, *strides, *pads, *dilations, groups)
    # Output padding of a stride or more leaves room for windows of which the input has nothing.
    windows = output_size(out.shape[2:], kernel, strides, pads, dilations)
    extra = [p for n, m in zip(windows, input.shape[2:], strict=True) for p in (n - m, 0)][::-1]

    def uses(x: Tensor | None, g: Tensor) -> Sequence[Use | None]:
        x = F.pad(x, extra) if x is not None and any(extra) else x
        weight_use = None if x is None else Use(CONV, x, g, options)
        return weight_use, Use(SHIFT, None, g.flatten(2).transpose(1, 2))

    saved = None if names[0] is None else input
    return capture.watch(out, saved, names, uses, input.shape[0])


def listed(value: int | Sequence[int], dims: int) -> list[int]:
    """One integer for each spatial dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def pad_same(
    input: Tensor, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The padding of ``padding="same"``; what is odd is added to the input at the end."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(n % 2 for n in total):
        input = F.pad(input, [p for n in reversed(total) for p in (0, n % 2)])
    return input, [n // 2 for n in total]


HANDLERS: dict[Call, Call] = {
    F.conv1d: conv,
    F.conv2d: conv,
    F.conv3d: conv,
    F.conv_transpose1d: conv_transpose,
    F.conv_transpose2d: conv_transpose,
    F.conv_transpose3d: conv_transpose,
}
