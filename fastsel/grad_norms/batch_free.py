"""Tensors of a forward that have no batch dimension, whatever their first dimension's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EXPANDING: frozenset[Callable[..., Any]] = frozenset({Tensor.expand, Tensor.expand_as})
# Functions that may give a constant its batch dimension.
_OVER_BATCH = EXPANDING | {
    Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile, Tensor.tile,
    torch.repeat_interleave, Tensor.repeat_interleave,
}  # fmt: skip
_IN_PLACE = {Tensor.__setitem__} | {
    getattr(Tensor, name)
    for name in dir(Tensor)
    if name.endswith("_") and not name.endswith("__") and not name.startswith("_")
}
# Functions that take a shape or a dtype of a tensor, and nothing else.
_ALIKE = {getattr(torch, name) for name in dir(torch) if name.endswith("_like")} | {
    getattr(Tensor, name) for name in dir(Tensor) if name.startswith("new_")
}


class Source(NamedTuple):
    """A tensor without a batch dimension whose gradient a parameter gets.

    Attributes:
        name: The parameter.
        indices: The rows of an embedding ``[1, T...]`` or ``[T...]``; None for the parameter
            itself.
        padding_idx: As in `kinds.Use` of an embedding.
    """

    name: str
    indices: Tensor | None = None
    padding_idx: int = -1


class BatchFree:
    """What a forward met that has no batch dimension.

    Attributes:
        fixed: The model's buffers and frozen parameters.
        sources: What trained parameters stand in, to be watched where it meets the batch.
        singles: ``[B, D]`` of one index a sample, which ``[T, D]`` of positions looks like, and the
            parameter.
    """

    def __init__(self) -> None:
        self.fixed: dict[Tensor, None] = {}
        self.sources: dict[Tensor, Source] = {}
        self.singles: dict[Tensor, str] = {}
        self._constants: dict[Tensor, None] = {}

    def forget(self) -> None:
        """Forgets what is of one forward."""
        self.sources = {}
        self.singles = {}
        self._constants = {}

    def constant(self, value: Any) -> bool:
        """Whether a tensor is fixed, or made of nothing but what is."""
        if not isinstance(value, Tensor):
            return False
        return value in self.fixed or (value in self._constants and not value.requires_grad)

    def note_constant(self, func: Callable[..., Any], args: Sequence[Any], out: Any) -> None:
        """Notes what a function returned, if it was made of constants only."""
        tensors = [value for value in flat(args) if isinstance(value, Tensor)]
        fixed = len(tensors) > 0 and all([self.constant(value) for value in tensors])
        if func in _IN_PLACE:
            if tensors and not fixed and tensors[0] in self._constants:
                del self._constants[tensors[0]]  # written into
            return
        if not fixed or func in _OVER_BATCH or func in _ALIKE:
            return
        outs = out if isinstance(out, (list, tuple)) else (out,)
        for one in outs:
            if isinstance(one, Tensor) and not one.requires_grad:
                self._constants[one] = None


def flat(args: Sequence[Any]) -> list[Any]:
    """Arguments, with what is in lists and tuples among them."""
    found: list[Any] = []
    for value in args:
        if isinstance(value, (list, tuple)):
            found.extend(value)
        else:
            found.append(value)
    return found
