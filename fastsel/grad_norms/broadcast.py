"""Parameters that are added to or multiplied with activations, and embeddings without a batch.

A position table, a class token, a layer scale: what meets the batch is a tensor without a batch
dimension, broadcast. Where that happens it is expanded by hand, and the gradient of the expanded
tensor holds what each sample adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsel.grad_norms.batch_free import EXPANDING, Source
from fastsel.grad_norms.kinds import EMBEDDING, SHIFT, Use

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

# Functions of two tensors that work element by element.
ELEMENTWISE: frozenset[Callable[..., Any]] = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "rsub", "true_divide")
    if hasattr(owner, name)
) | {
    Tensor.__radd__,
    Tensor.__rmul__,
    Tensor.__rsub__,
    Tensor.__rtruediv__,
}


def meets_batch(capture: Capture, func: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
    """The arguments, with sources among them expanded over the batch and watched."""
    if func in EXPANDING:
        source = capture.source(args[0])
        if source is None:
            return args
        shape = args[1].shape if func is Tensor.expand_as else _sizes(args[0], args[1:])
        if not _over_batch(args[0], shape):
            return args
        return (_spread(capture, args[0], source, shape), *args[1:])
    if len(args) < 2 or not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
        return args
    if args[0].dim() != args[1].dim():
        capture.refuse_positions(args[0] if args[0].dim() < args[1].dim() else args[1])
    sources = [capture.source(args[0]), capture.source(args[1])]
    if (sources[0] is None) == (sources[1] is None):
        return args  # neither, or two that meet each other and not the batch
    at = 0 if sources[1] is None else 1
    own, source, other = args[at], sources[at], args[1 - at]
    if source is None or other.dim() < own.dim() or not _over_batch(own, other.shape):
        return args
    if capture.constant(other):
        return args  # no samples are met yet
    shape = torch.broadcast_shapes(own.shape, other.shape)
    both = [args[0], args[1]]
    both[at] = _spread(capture, own, source, shape)
    return (*both, *args[2:])


def _over_batch(own: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor has no batch dimension of its own where it is broadcast to a shape."""
    return own.dim() < len(shape) or (own.dim() == len(shape) > 1 and own.shape[0] == 1)


def _sizes(own: Tensor, sizes: Sequence[Any]) -> list[int]:
    """The sizes that expand is called with, those left alone filled in."""
    flat = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    missing = len(flat) - own.dim()
    return [
        own.shape[i - missing] if size == -1 and i >= missing else size
        for i, size in enumerate(flat)
    ]


def _spread(capture: Capture, own: Tensor, source: Source, shape: Sequence[int]) -> Tensor:
    spread = own.expand(shape)
    dims = own.dim()
    # Dimensions that the parameter has, from the back, and those that its gradient is summed over.
    kept = [
        i for i in range(1, len(shape)) if i >= len(shape) - dims and own.shape[i - len(shape)] > 1
    ]
    summed = [i for i in range(1, len(shape)) if i not in kept]
    batch = shape[0]

    def uses(_: Tensor | None, g: Tensor) -> Sequence[Use | None]:
        if source.indices is not None:
            rows = source.indices.expand(*shape[:-1])
            return (Use(EMBEDDING, rows, g, (source.padding_idx,)),)
        width = 1
        for i in kept:
            width *= shape[i]
        return (Use(SHIFT, None, g.permute(0, *summed, *kept).reshape(batch, -1, width)),)

    return capture.watch(spread, None, (source.name,), uses, batch, own_node=True)
