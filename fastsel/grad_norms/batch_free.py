"""Tensors of a forward that have no batch dimension, whatever their first dimension's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

EXPANDING: frozenset[Callable[..., Any]] = frozenset({Tensor.expand, Tensor.expand_as})
# Functions that may give a constant its batch dimension.
_OVER_BATCH = EXPANDING | {
    Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile, Tensor.tile,
    torch.repeat_interleave, Tensor.repeat_interleave,
}  # fmt: skip


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
        self._constants: MutableMapping[Tensor, None] = {}

    def forget(self) -> None:
        """Forgets what is of one forward."""
        self.sources = {}
        self.singles = {}
        self._constants = {} if torch.compiler.is_compiling() else WeakTensorKeyDictionary()

    def constant(self, value: Any) -> bool:
        """Whether a tensor is fixed, or made of nothing but what is."""
        return isinstance(value, Tensor) and (value in self.fixed or value in self._constants)

    def note_constant(self, func: Callable[..., Any], args: Sequence[Any], out: Any) -> None:
        """Notes what a function returned, if it was made of constants only."""
        outs = out if isinstance(out, (list, tuple)) else (out,)
        if any(not isinstance(one, Tensor) or one.requires_grad for one in outs):
            return
        tensors = [value for value in flat(args) if isinstance(value, Tensor)]
        if tensors and func not in _OVER_BATCH and all(map(self.constant, tensors)):
            for one in outs:
                self._constants[one] = None


def flat(args: Sequence[Any]) -> Iterator[Any]:
    """Arguments, with what is in lists and tuples among them."""
    for value in args:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value
