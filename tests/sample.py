"""A named input of an operator, as the tables of samples hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """A named input of an operator.

    Attributes:
        op: The operator's name.
        name: What is special about the input.
        tensors: Makes the tensor arguments on the CPU from a seeded generator, with whatever else
            stands between them.
        args: Further positional arguments.
        kwargs: Keyword arguments; tensors among them are copied, as an operator may change them.
        cpu_only: The input is of a dtype that GPU kernels do not take.
    """

    op: str
    name: str
    tensors: Callable[[torch.Generator], tuple[Any, ...]]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    cpu_only: bool = False

    def make(
        self, seed: int = 0, device: torch.device | str = "cpu", *, requires_grad: bool = False
    ) -> Arguments:
        """The arguments, the same values on every device; strides survive the move."""
        generator = torch.Generator().manual_seed(seed)
        tensors = [_move(tensor, torch.device(device)) for tensor in self.tensors(generator)]
        if requires_grad:
            tensors = [
                tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
                for tensor in tensors
            ]
        kwargs = {
            name: _move(value.clone() if isinstance(value, Tensor) else value, torch.device(device))
            for name, value in self.kwargs.items()
        }
        return (*tensors, *self.args), kwargs

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _move(tensor: Any, device: torch.device) -> Any:
    if not isinstance(tensor, Tensor) or tensor.device == device:
        return tensor
    moved = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    # Expanded dimensions share memory, which copy_ refuses to write to; one slice of each holds all
    # there is.
    distinct = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    moved[tuple(distinct)].copy_(tensor[tuple(distinct)])
    return moved
