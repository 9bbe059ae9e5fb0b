"""Batches as training loops have them: a tensor, or a tuple, list or dict of tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]


def check_batch(owner: str, inputs: Inputs, target: Tensor) -> int:
    """The batch size B, if inputs and target are the tensors of one batch.

    Args:
        owner: Who asks; the errors begin with it.
        inputs: The model's inputs, ``[B, ...]`` each.
        target: The targets ``[B, ...]``.

    Raises:
        TypeError: `inputs` or `target` is not of tensors.
        ValueError: The first dimensions differ, or the batch is empty.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"{owner}: target must be a tensor, got {type(target).__name__}")
    if target.dim() == 0:
        raise ValueError(f"{owner}: target must be [B, ...], got a tensor without dimensions")
    batch_size = target.shape[0]
    for name, value in _named_tensors(owner, inputs):
        if value.dim() == 0 or value.shape[0] != batch_size:
            raise ValueError(
                f"{owner}: {name} must have the first dimension {batch_size} of target, "
                f"got shape {list(value.shape)}"
            )
    if batch_size == 0:
        raise ValueError(f"{owner}: the batch must not be empty")
    return batch_size


def check_ids(owner: str, ids: Tensor | None, batch_size: int) -> None:
    """TypeError or ValueError unless `ids` is None or the positions ``[B]`` of a batch, int64."""
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{owner}: ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{owner}: ids must be an int64 tensor, got {ids.dtype}")
    if ids.dim() != 1 or ids.shape[0] != batch_size:
        raise ValueError(
            f"{owner}: ids must be [B] with B = {batch_size}, got shape {list(ids.shape)}"
        )


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output: ``model(inputs)``, ``model(*inputs)`` or ``model(**inputs)``."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs)


def take(inputs: Inputs, indices: Tensor) -> Inputs:
    """The rows at `indices` ``[k]`` of every tensor, in the same structure."""

    def rows(value: Tensor) -> Tensor:
        return value.index_select(0, indices.to(value.device))

    if isinstance(inputs, Tensor):
        return rows(inputs)
    if isinstance(inputs, dict):
        return {key: rows(value) for key, value in inputs.items()}
    return tuple(rows(value) for value in inputs)


def blanked(batch: Any, usable: Tensor) -> Any:
    """Every floating-point tensor of a batch, zero unless `usable` says otherwise; others as given.

    Args:
        batch: Tensors, and dicts, lists and tuples of them and of anything else.
        usable: A bool tensor without dimensions.
    """
    if isinstance(batch, Tensor):
        if not batch.is_floating_point():
            return batch
        return torch.where(usable.to(batch.device), batch, torch.zeros_like(batch))
    if isinstance(batch, Mapping):
        return rebuilt(batch, {key: blanked(part, usable) for key, part in batch.items()})
    if isinstance(batch, (list, tuple)):
        return rebuilt(batch, [blanked(part, usable) for part in batch])
    return batch


def rebuilt(batch: Any, parts: Any) -> Any:
    """A dict, list, tuple or named tuple of the type of `batch`, from other parts."""
    kind: Any = type(batch)
    if isinstance(batch, dict):  # also one that is made of more than its items
        changed = copy.copy(batch)
        changed.update(parts)
        return changed
    return kind(*parts) if hasattr(batch, "_fields") else kind(parts)


def _named_tensors(owner: str, inputs: Inputs) -> list[tuple[str, Tensor]]:
    if isinstance(inputs, Tensor):
        return [("inputs", inputs)]
    if isinstance(inputs, dict):
        named = [(f"inputs[{key!r}]", value) for key, value in inputs.items()]
    elif isinstance(inputs, (tuple, list)):
        named = [(f"inputs[{i}]", value) for i, value in enumerate(inputs)]
    else:
        raise TypeError(
            f"{owner}: inputs must be a tensor, or a tuple, list or dict of tensors, "
            f"got {type(inputs).__name__}"
        )
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}")
    return named
