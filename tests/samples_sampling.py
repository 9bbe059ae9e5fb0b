"""Sample inputs of the random operators and of `knn`; see `samples`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sample import Sample
from torch import Tensor

Make = Callable[[torch.Generator], tuple[Any, ...]]


def _weights(*shape: int, n: int, dtype: torch.dtype = torch.float32, step: int = 1) -> Make:
    """Positive weights, how many to draw, and a seed."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        wide = (*shape[:-1], shape[-1] * step)
        weights = torch.rand(wide, generator=generator) + 0.1
        return weights.to(dtype)[..., ::step], n, torch.randint(1000, (1,), generator=generator)

    return make


def _some_zero(generator: torch.Generator) -> tuple[Any, ...]:
    weights, n, seed = _weights(50, n=5)(generator)
    return torch.where(torch.arange(50) % 3 == 0, weights, 0.0), n, seed


def _table(
    rows: int, width: int, anchors: int, n: int, ids: torch.dtype = torch.int64, step: int = 1
) -> Make:
    """A table, anchors with weights, how many to draw, and a seed."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        table = torch.randint(rows, (rows, width * step), generator=generator).to(ids)
        picked = torch.randint(rows, (anchors * step,), generator=generator)
        weights = torch.rand(anchors, generator=generator) + 0.1
        seed = torch.randint(1000, (1,), generator=generator)
        return table[:, ::step], picked[::step], weights, n, seed

    return make


def _wanted(rows: int, width: int, anchors: int, n: int, **options: Any) -> Make:
    """A table, anchors with weights, and ids."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        table, picked, weights, _, _ = _table(rows, width, anchors, n, **options)(generator)
        return table, picked, weights, torch.randint(rows, (n,), generator=generator)

    return make


def _points(
    queries: int, count: int, dims: int, k: int, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Generator], tuple[Tensor, Tensor, int]]:
    """Queries, points, and how many neighbours."""

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        wanted = torch.randn(queries, dims, generator=generator).to(dtype)
        return wanted, torch.randn(count, dims, generator=generator).to(dtype), k

    return make


def _strided_points(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    wanted, data, k = _points(6, 40, 20, 4)(generator)
    return wanted[:, ::3], data[::2, ::3], k


WITH = {"replacement": True}

SAMPLING: list[Sample] = [
    Sample("weighted_sample", "plain", _weights(70, n=9)),
    Sample("weighted_sample", "rows", _weights(3, 2, 33, n=5)),
    Sample("weighted_sample", "everything", _weights(40, n=40)),
    Sample("weighted_sample", "nothing", _weights(40, n=0)),
    Sample("weighted_sample", "no_rows", _weights(0, 7, n=2)),
    Sample("weighted_sample", "some_zero", _some_zero),
    Sample("weighted_sample", "long", _weights(20_000, n=300)),
    Sample("weighted_sample", "strided", _weights(4, 30, n=3, step=2)),
    Sample("weighted_sample", "float16", _weights(70, n=9, dtype=torch.float16)),
    Sample("weighted_sample", "bfloat16", _weights(70, n=9, dtype=torch.bfloat16)),
    Sample("weighted_sample", "float64", _weights(70, n=9, dtype=torch.float64), cpu_only=True),
    Sample("weighted_sample", "replacement", _weights(70, n=90), kwargs=WITH),
    Sample("weighted_sample", "replacement_rows", _weights(3, 1500, n=5), kwargs=WITH),
    Sample("weighted_sample", "replacement_some_zero", _some_zero, kwargs=WITH),
    Sample(
        "weighted_sample", "replacement_half", _weights(70, n=9, dtype=torch.float16), kwargs=WITH
    ),
    Sample(
        "weighted_sample",
        "replacement_double",
        _weights(70, n=9, dtype=torch.float64),
        kwargs=WITH,
        cpu_only=True,
    ),
    Sample("neighbor_sample", "plain", _table(30, 8, 10, 12)),
    Sample("neighbor_sample", "narrow", _table(30, 8, 10, 12, ids=torch.int32)),
    Sample("neighbor_sample", "wide", _table(100, 40, 50, 3)),
    Sample("neighbor_sample", "one", _table(1, 1, 1, 1)),
    Sample("neighbor_sample", "nothing", _table(30, 8, 10, 0)),
    Sample("neighbor_sample", "strided", _table(30, 8, 10, 4, step=2)),
    Sample("neighbor_probs", "plain", _wanted(30, 8, 10, 12)),
    Sample("neighbor_probs", "narrow", _wanted(30, 8, 10, 12, ids=torch.int32)),
    Sample("neighbor_probs", "nothing", _wanted(30, 8, 10, 0)),
    Sample("neighbor_probs", "strided", _wanted(30, 8, 10, 5, step=2)),
    Sample("knn", "plain", _points(5, 70, 12, 8)),
    Sample("knn", "many", _points(70, 200, 17, 30)),
    Sample("knn", "few_dimensions", _points(300, 4200, 2, 3), cpu_only=True),
    Sample("knn", "everything", _points(3, 20, 4, 20)),
    Sample("knn", "nothing", _points(3, 20, 4, 0)),
    Sample("knn", "no_queries", _points(0, 20, 4, 2)),
    Sample("knn", "no_dimensions", _points(3, 20, 0, 2)),
    Sample("knn", "strided", _strided_points),
    Sample("knn", "float16", _points(5, 70, 12, 8, dtype=torch.float16)),
    Sample("knn", "bfloat16", _points(5, 70, 12, 8, dtype=torch.bfloat16)),
    Sample("knn", "float64", _points(5, 70, 12, 8, dtype=torch.float64), cpu_only=True),
]
