"""What the wrappers of several operators check, and how errors name things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsel import _library

_library.load()

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOAT_NAMES = "float32, float16, bfloat16 or float64"
require: Callable[[Any, Callable[[], str]], None] = torch._check


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {argument} must be {FLOAT_NAMES}, got {name(value.dtype)}")
    if value.dtype == torch.float64 and value.device.type == "cuda":
        raise TypeError(
            f"{op}: {argument} may be float64 on the CPU only, got float64 on {value.device}"
        )


def norms_like(grad_outputs: Tensor) -> Tensor:  # [B, ...] -> [B]
    """What the per-sample gradient norms of these gradients look like."""
    dtype = torch.float64 if grad_outputs.dtype == torch.float64 else torch.float32
    return grad_outputs.new_empty((grad_outputs.shape[0],), dtype=dtype)


def without_grad(value: Tensor) -> Tensor:
    """The tensor for an operator without a derivative; detached only where that matters."""
    return value.detach() if value.requires_grad else value
