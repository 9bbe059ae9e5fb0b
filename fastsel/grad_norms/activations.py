"""What a layer got in the forward and the gradient of what it returned, both left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Keeper:
    """Keeps an activation for the backward as autograd would.

    So a checkpoint computes it again instead, `torch.autograd.graph.save_on_cpu` moves it, and a
    change in place is noticed.

    Args:
        value: The activation.
        layer: Whose it is, for errors.
    """

    def __init__(self, value: Tensor, layer: str) -> None:
        self._layer = layer
        anchor = torch.zeros(0, requires_grad=True)
        self._kept: Any = _Keep.apply(anchor, value.detach())  # type: ignore[no-untyped-call]

    def release(self) -> Tensor:
        """The activation, which is kept no longer.

        Raises:
            RuntimeError: It was changed in place.
        """
        kept, self._kept = self._kept, None
        try:
            return kept.grad_fn.saved_tensors[0]  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"GradNorms: the input of layer {self._layer!r} was changed in place after it ran: "
                "its norms need it as it was"
            ) from error


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def on_gradient(out: Tensor, function: Callable[[Tensor], None]) -> None:
    """Calls `function` in the backward with the gradient of `out` as the layer gets it.

    That is after every hook on the tensor, which may change it.
    """
    node, number = out.grad_fn, out.output_nr
    assert node is not None

    def hook(grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[number]
        if grad is not None:
            function(grad)

    node.register_prehook(hook)


def history(out: Tensor) -> Tensor:
    """The tensor whose hooks see the gradient of `out`, whatever is done to it in place later.

    A view that is changed in place leaves its own history behind, its base does not. The base may
    have another shape, never another number of elements.
    """
    base = out._base if out._is_view() else None
    if base is None or base.numel() != out.numel() or base.is_leaf:
        return out
    # Elements in another order would give the gradient in another order.
    return base if base.is_contiguous() and out.is_contiguous() else out
