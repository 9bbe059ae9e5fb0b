"""How compiled code comes by the gradient of what a layer returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsel.grad_norms.kinds import Use
from fastsel.grad_norms.records import Target

Uses = Callable[["Tensor | None", Tensor], "Sequence[Use | None]"]

# Newer versions of torch trace a hook on a tensor inside a graph.
_TRACES_HOOKS = hasattr(torch.ops.higher_order, "register_hook")


def watch_compiled(
    out: Tensor, saved: Tensor | None, targets: Sequence[Target | None], uses: Uses
) -> Tensor:
    """`out`, whose gradient is recorded for each target."""
    if not _TRACES_HOOKS:
        tapped: Tensor = _Tap.apply(out, saved, targets, uses)  # type: ignore[no-untyped-call]
        return tapped

    def hook(grad: Tensor) -> None:
        record_all(targets, uses(saved, grad))

    out.register_hook(hook)
    return out


def record_all(targets: Sequence[Target | None], uses: Sequence[Use | None]) -> None:
    """Hands each use to its target; None among either is passed over."""
    for target, use in zip(targets, uses, strict=True):
        if target is not None and use is not None:
            target.record(use)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        saved: Tensor | None,
        targets: Sequence[Target | None],
        uses: Uses,
    ) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.targets, ctx.uses = targets, uses
        # A copy, since what is passed through as it is may not be changed in place afterwards; a
        # compiler that fuses leaves it out.
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (saved,) = ctx.saved_tensors
        record_all(ctx.targets, ctx.uses(saved, grad))
        return grad, None, None, None
