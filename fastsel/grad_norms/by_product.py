"""Layers whose backward computes the weight's gradient and the norms in one product, on the CPU.

The product of each sample must be formed for its norm and, summed, is the weight's gradient: so it
is formed once. Taken where it costs less than torch's own product and the norms beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsel.grad_norms.checks import batch_first
from fastsel.grad_norms.kinds import CONV, LINEAR, SHIFT, Use
from fastsel.grad_norms.mixing import Mixing
from fastsel.grad_norms.records import Target, refuse_second_derivative
from fastsel.ops._conv_grad_norm import output_size

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

Geometry = tuple[list[int], list[int], list[int], list[int], int]


def _cheaper(positions: int, columns: int, channels: int) -> bool:
    """Whether one product with norms takes less time than torch's product and Gram beside it.

    Adding each sample's product to the sum takes as long as some 24 positions of it; the Gram form
    takes T (d + p) / (2 d p) of the product, more for the diagonal. Estimates from a few
    shapes on one machine, which decide speed and never the result.
    """
    if positions < 2 or columns * channels == 0:
        return False
    gram = (positions + 64) * (columns + channels) / (2 * columns * channels)
    return gram > 24 / positions + 0.05


def _eligible(capture: Capture, input: Tensor, weight: Tensor) -> bool:
    return (
        not capture.exact_grad
        and capture.alone
        and input.device.type == "cpu"
        and input.dtype == torch.float32
        and weight.dtype == torch.float32
        and weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and input.numel() > 0
    )


def wanted_linear(
    capture: Capture,
    name: str | None,
    input: Tensor,
    weight: Tensor,
    rows: tuple[int, int] | None,
) -> bool:
    """Whether `linear` should replace `F.linear`."""
    if name is None or not _eligible(capture, input, weight):
        return False
    batch_size = input.shape[0] if rows is None else rows[1]
    positions = input.numel() // (batch_size * input.shape[-1])
    return _cheaper(positions, weight.shape[1], weight.shape[0])


def wanted_conv(
    capture: Capture, name: str | None, input: Tensor, weight: Tensor, geometry: Geometry
) -> bool:
    """Whether `conv` should replace torch's convolution."""
    if name is None or not _eligible(capture, input, weight):
        return False
    positions = 1
    for size in output_size(input.shape[2:], *geometry[:4]):
        positions *= size
    return _cheaper(positions, weight[0].numel(), weight.shape[0] // geometry[4])


def linear(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str | None, str | None],
    rows: tuple[int, int] | None,
) -> Tensor:
    """`F.linear` with such a backward."""
    batch_size = input.shape[0] if rows is None else rows[1]
    targets = capture.target(names[0], batch_size), capture.target(names[1], batch_size)
    layer = capture.layer(names[0] or "")
    out = _Linear.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, targets[0], targets[1], layer, capture.mixing, rows
    )
    out = out.unflatten(0, input.shape[:-1])
    capture.mixing.saw_layer(layer, out, input, rows)
    return out  # type: ignore[no-any-return]


def conv(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str | None, str | None],
    geometry: Geometry,
) -> Tensor:
    """A convolution with such a backward."""
    batch_size = input.shape[0]
    targets = capture.target(names[0], batch_size), capture.target(names[1], batch_size)
    layer = capture.layer(names[0] or "")
    out = _Conv.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, targets[0], targets[1], layer, capture.mixing, geometry
    )
    capture.mixing.saw_layer(layer, out, input)
    return out  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # [B, T..., d]
        weight: Tensor,  # [p, d]
        bias: Tensor | None,  # [p]
        weight_target: Target | None,
        bias_target: Target | None,
        layer: str,
        mixing: Mixing,
        rows: tuple[int, int] | None,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.targets = weight_target, bias_target
        ctx.layer, ctx.mixing, ctx.rows = layer, mixing, rows
        # Of two dimensions, since autograd forbids changing a function's output in place where it
        # is a view, as F.linear's is with more.
        return F.linear(input.flatten(0, -2), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        if not ctx.mixing.running:
            _check_backward(ctx.layer)
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = torch.mm(grad, weight).unflatten(0, input.shape[:-1])
        if ctx.mixing.running:
            return grad_input, *[None] * 7
        a = batch_first(input, ctx.rows)
        g = batch_first(grad.unflatten(0, input.shape[:-1]), ctx.rows)
        product = torch.ops.fastsel.linear_weight_grad(a, g)
        _record(ctx.targets, product, Use(LINEAR, a, g), Use(SHIFT, None, g))
        grad_bias = product[1] if ctx.needs_input_grad[2] else None
        return grad_input, product[0], grad_bias, *[None] * 5


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # [B, C_in, spatial...]
        weight: Tensor,  # [C_out, C_in / groups, kernel...]
        bias: Tensor | None,  # [C_out]
        weight_target: Target | None,
        bias_target: Target | None,
        layer: str,
        mixing: Mixing,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.targets = weight_target, bias_target
        ctx.layer, ctx.mixing, ctx.geometry = layer, mixing, geometry
        _, stride, padding, dilation, groups = geometry
        return _convolution(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        kernel, stride, padding, dilation, groups = ctx.geometry
        if not ctx.mixing.running:
            _check_backward(ctx.layer)
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = torch.ops.aten.convolution_backward(
                grad, input, weight, None, stride, padding, dilation, False, [0] * len(kernel),
                groups, [True, False, False],
            )[0]  # fmt: skip
        if ctx.mixing.running:
            return grad_input, *[None] * 7
        product = torch.ops.fastsel.conv_weight_grad(
            input, grad, kernel, stride, padding, dilation, groups
        )
        options = (0, *kernel, *stride, *padding, *dilation, groups)
        _record(
            ctx.targets,
            product,
            Use(CONV, input, grad, options),
            Use(SHIFT, None, grad.flatten(2).transpose(1, 2)),
        )
        grad_bias = product[1] if ctx.needs_input_grad[2] else None
        return grad_input, product[0], grad_bias, *[None] * 5


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    zeros = [0] * len(stride)
    return torch.convolution(
        input, weight, bias, stride, padding, dilation, False, zeros, groups
    )  # fmt: skip


def _check_backward(layer: str) -> None:
    if not torch.compiler.is_compiling():
        refuse_second_derivative(layer)


def _record(
    targets: tuple[Target | None, Target | None],
    product: Any,  # linear_weight_grad's or conv_weight_grad's result
    weight_use: Use,
    bias_use: Use,
) -> None:
    for target, squared, use in zip(targets, product[2:], (weight_use, bias_use), strict=True):
        if target is None:
            continue
        if target.alone:
            target.record_norm(squared)
        else:
            target.record(use)
