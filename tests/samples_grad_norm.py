"""Sample inputs of the per-sample gradient norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sample import Sample
from torch import Tensor

Make = Callable[[torch.Generator], tuple[Any, ...]]


def _normal(
    *shape: int, count: int, dtype: torch.dtype = torch.float32, channels_first: bool = False
) -> Make:
    """Normal tensors ``[B, T..., D]``; `channels_first` ones lie in memory as ``[B, D, T]``."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        tensors = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]
        if channels_first:
            tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        return tuple(tensors)

    return make


def _tokens(
    *shape: int,
    columns: int,
    tokens: int = 5,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
) -> Make:
    """Tokens ``[B, T...]`` below a number, and normal gradients ``[B, T..., D]``."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        indices = torch.randint(0, tokens, shape, generator=generator).to(index_dtype)
        return indices, torch.randn(*shape, columns, generator=generator).to(dtype)

    return make


def _strided_pair(generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(4, 9, 14, generator=generator)[::2, :, 1::3] for _ in range(2))


def _mixed_pair(generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randn(3, 7, 10, generator=generator)
    return x, torch.randn(3, 10, 7, generator=generator).transpose(1, 2)


def _strided_tokens(generator: torch.Generator) -> tuple[Tensor, ...]:
    indices = torch.randint(0, 4, (3, 12), generator=generator)[:, ::2]
    return indices, torch.randn(3, 5, 6, generator=generator).transpose(1, 2)


def _expanded(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(3, 1, 1, generator=generator).expand(3, 8, 5),)


_FLOAT16, _BFLOAT16, _FLOAT64 = torch.float16, torch.bfloat16, torch.float64

_EMBEDDING_AND_AFFINE: list[Sample] = [
    Sample("embedding_grad_norm_sq", "plain", _tokens(3, 20, columns=8)),
    Sample("embedding_grad_norm_sq", "padding", _tokens(3, 20, columns=8), (2,)),
    Sample("embedding_grad_norm_sq", "no_positions", _tokens(6, columns=5)),
    Sample("embedding_grad_norm_sq", "no_samples", _tokens(0, 4, columns=5)),
    Sample("embedding_grad_norm_sq", "empty_samples", _tokens(2, 0, columns=5)),
    Sample("embedding_grad_norm_sq", "no_columns", _tokens(2, 3, columns=0)),
    Sample("embedding_grad_norm_sq", "several_chunks", _tokens(2, 200, columns=33, tokens=40)),
    Sample("embedding_grad_norm_sq", "one_token", _tokens(2, 150, columns=20, tokens=1)),
    Sample("embedding_grad_norm_sq", "dimensions", _tokens(2, 3, 4, columns=7)),
    Sample("embedding_grad_norm_sq", "strided", _strided_tokens),
    Sample(
        "embedding_grad_norm_sq", "int32", _tokens(2, 40, columns=16, index_dtype=torch.int32), (0,)
    ),
    Sample("embedding_grad_norm_sq", "float16", _tokens(2, 40, columns=16, dtype=_FLOAT16)),
    Sample("embedding_grad_norm_sq", "bfloat16", _tokens(2, 40, columns=9, dtype=_BFLOAT16)),
    Sample(
        "embedding_grad_norm_sq",
        "float64",
        _tokens(2, 40, columns=9, dtype=_FLOAT64),
        cpu_only=True,
    ),
    Sample("affine_grad_norm_sq", "plain", _normal(3, 20, 16, count=2)),
    Sample("affine_grad_norm_sq", "no_positions", _normal(3, 5, count=2)),
    Sample("affine_grad_norm_sq", "no_samples", _normal(0, 4, 5, count=2)),
    Sample("affine_grad_norm_sq", "empty_samples", _normal(2, 0, 5, count=2)),
    Sample("affine_grad_norm_sq", "no_columns", _normal(2, 3, 0, count=2)),
    Sample("affine_grad_norm_sq", "several_tiles", _normal(2, 20, 300, count=2)),
    Sample("affine_grad_norm_sq", "shared", _normal(2, 301, 150, count=2)),
    Sample(
        "affine_grad_norm_sq", "channels_first", _normal(3, 49, 12, count=2, channels_first=True)
    ),
    Sample(
        "affine_grad_norm_sq",
        "shared_channels_first",
        _normal(1, 4001, 11, count=2, channels_first=True),
    ),
    Sample("affine_grad_norm_sq", "dimensions", _normal(2, 3, 4, 7, count=2)),
    Sample("affine_grad_norm_sq", "strided", _strided_pair),
    Sample("affine_grad_norm_sq", "mixed", _mixed_pair),
    Sample("affine_grad_norm_sq", "float16", _normal(2, 30, 24, count=2, dtype=_FLOAT16)),
    Sample("affine_grad_norm_sq", "bfloat16", _normal(2, 30, 24, count=2, dtype=_BFLOAT16)),
    Sample(
        "affine_grad_norm_sq", "float64", _normal(2, 5, 6, count=2, dtype=_FLOAT64), cpu_only=True
    ),
    Sample("bias_grad_norm_sq", "plain", _normal(3, 20, 16, count=1)),
    Sample("bias_grad_norm_sq", "no_positions", _normal(3, 5, count=1)),
    Sample("bias_grad_norm_sq", "no_samples", _normal(0, 4, 5, count=1)),
    Sample("bias_grad_norm_sq", "empty_samples", _normal(2, 0, 5, count=1)),
    Sample("bias_grad_norm_sq", "shared", _normal(1, 203, 300, count=1)),
    Sample("bias_grad_norm_sq", "channels_first", _normal(3, 49, 12, count=1, channels_first=True)),
    Sample("bias_grad_norm_sq", "expanded", _expanded),
    Sample("bias_grad_norm_sq", "bfloat16", _normal(2, 30, 24, count=1, dtype=_BFLOAT16)),
    Sample(
        "bias_grad_norm_sq", "float64", _normal(2, 5, 6, count=1, dtype=_FLOAT64), cpu_only=True
    ),
]


def _pair(
    *shape: int, d: int, p: int, dtype: torch.dtype = torch.float32, time_first: bool = False
) -> Make:
    """Activations ``[B, T..., d]`` and output gradients ``[B, T..., p]``."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        pair = [torch.randn(*shape, n, generator=generator).to(dtype) for n in (d, p)]
        if time_first:
            pair = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in pair]
        return tuple(pair)

    return make


def _images(input: tuple[int, ...], output: tuple[int, ...], last: bool = False) -> Make:
    """An input and output gradients, both ``[B, C, spatial...]``."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        pair = [torch.randn(*shape, generator=generator) for shape in (input, output)]
        return tuple(x.to(memory_format=torch.channels_last) if last else x for x in pair)

    return make


_PAIRS: dict[str, Make] = {
    "one_position": _pair(5, d=7, p=9),
    "positions": _pair(3, 20, d=7, p=9),
    "tiles": _pair(2, 70, d=66, p=130),
    "many_dimensions": _pair(2, 3, 4, d=5, p=6),
    "bfloat16": _pair(2, 9, d=20, p=12, dtype=torch.bfloat16),
    "time_first": _pair(3, 20, d=7, p=9, time_first=True),
    "empty": _pair(0, 4, d=3, p=2),
    "no_positions": _pair(2, 0, d=3, p=2),
}
_CONVS: dict[str, tuple[Make, tuple[Any, ...]]] = {
    "1d": (_images((2, 3, 9), (2, 4, 9)), ([3], [1], [1], [1], 1)),
    "2d": (_images((2, 4, 6, 7), (2, 6, 3, 7)), ([3, 3], [2, 1], [1, 1], [1, 1], 2)),
    "channels_last": (
        _images((2, 3, 8, 8), (2, 5, 6, 6), last=True),
        ([3, 3], [1, 1], [0, 0], [1, 1], 1),
    ),
    "depthwise": (_images((2, 6, 7, 7), (2, 6, 5, 5)), ([2, 2], [1, 1], [0, 0], [2, 2], 6)),
    "3d": (
        _images((2, 2, 4, 5, 6), (2, 3, 4, 4, 3)),
        ([1, 2, 2], [1, 1, 2], [0, 0, 0], [1, 1, 1], 1),
    ),
    "empty": (_images((0, 2, 5), (0, 3, 3)), ([3], [1], [0], [1], 1)),
}
GRAD_NORMS: list[Sample] = [
    *_EMBEDDING_AND_AFFINE,
    *(
        Sample("linear_grad_norm_sq", f"{form}_{name}", make, kwargs={"form": form})
        for form in ("auto", "direct", "gram")
        for name, make in _PAIRS.items()
    ),
    *(
        Sample("conv_grad_norm_sq", f"{form}_{name}", make, args, {"form": form})
        for form in ("auto", "direct", "gram")
        for name, (make, args) in _CONVS.items()
    ),
    # The norms as a by-product exist on the CPU alone.
    *(Sample("linear_weight_grad", name, make, cpu_only=True) for name, make in _PAIRS.items()),
    *(
        Sample("conv_weight_grad", name, make, args, cpu_only=True)
        for name, (make, args) in _CONVS.items()
    ),
]
