"""Finds out whether a loss mixes samples, so that none has a gradient of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def refuse_mixed_loss(loss: Tensor, output: Any, batch_size: int) -> bool:
    """Raises where the loss is no sum of functions of one sample's outputs each.

    Of such a sum the derivative by one sample's outputs does not depend on another's, so the
    Hessian by the model's outputs has no entry between samples. One product of it with a vector
    that is zero at every other sample shows whether that is so; it costs two backwards of the loss
    function alone.

    Args:
        loss: A scalar with its history, which is kept.
        output: What the model returned: tensors ``[B, ...]``, also nested in lists and mappings.
        batch_size: B.

    Returns:
        Whether to look no more: a batch of one sample tells nothing.

    Raises:
        ValueError: The loss mixes samples.
    """
    outputs = [
        out
        for out in _tensors(output)
        if out.requires_grad and out.dim() > 0 and out.shape[0] == batch_size
    ]
    if batch_size < 2 or not outputs:
        return False
    try:
        first = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
        grads = [None if grad is None or not grad.requires_grad else grad for grad in first]
        if all(grad is None for grad in grads):
            return True  # a loss that is linear in the outputs
        places = torch.arange(batch_size, device=outputs[0].device)
        # Two samples differ in some bit of their numbers, so some probe has one and not the other.
        crossed = [
            (places >> bit & 1 == 0, _product(outputs, grads, places >> bit & 1 == 1))
            for bit in range((batch_size - 1).bit_length())
        ]
    except RuntimeError:  # torch's error of a function without a second derivative: no other will
        return True
    for others, products in crossed:
        for product in products:
            # What is not finite says nothing: a loss may overflow.
            if product is not None and bool((product[others].nan_to_num(0, 0, 0) != 0).any()):
                _refuse()
    return True


def _refuse() -> None:
    raise ValueError(
        "GradNorms: the loss mixes samples: its derivative by one sample's output depends on "
        "another's, so that no sample has a gradient of its own; GradNorms(..., "
        "mixed_loss='allow') gives the norms of what passes through each sample"
    )


def _product(
    outputs: list[Tensor], grads: Sequence[Tensor | None], chosen: Tensor
) -> tuple[Tensor | None, ...]:
    """The Hessian times a vector that is zero outside the chosen samples."""
    probe = [(grad[chosen] * _weights(grad[chosen])).sum() for grad in grads if grad is not None]
    total = torch.stack(probe).sum()
    return torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _weights(like: Tensor) -> Tensor:
    """Numbers without a pattern that a loss might share; no random state is touched."""
    places = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return (places * 1.618 + 0.5).sin().to(like.dtype).reshape(like.shape)
