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


# ---- seeds ----


def make_seed(like: Tensor, generator: torch.Generator | None = None) -> Tensor:  # [1]
    """A seed drawn from a generator, by an operation of the device."""
    return torch.randint(
        -(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device, generator=generator
    )


def check_seed(op: str, seed: object, like: Tensor, generator: torch.Generator | None) -> None:
    """Raises unless a seed is one int64 on the device of `like`, and there is no generator too."""
    if generator is not None:
        raise ValueError(f"{op}: seed and generator were both given: pass one of them")
    if not isinstance(seed, Tensor):
        raise TypeError(f"{op}: seed must be a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(
            f"{op}: seed must be one int64, got {list(seed.shape)} of {name(seed.dtype)}"
        )
    if seed.device != like.device:
        raise ValueError(f"{op}: seed must be on {like.device}, got {seed.device}")
