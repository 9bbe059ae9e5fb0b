"""`knn`: the wrapper and the shape function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, name, require, without_grad


class Neighbors(NamedTuple):
    """What `knn` returns.

    Attributes:
        distances: Squared L2 distances ``[Q, k]``, ascending, float32.
        indices: The points they belong to ``[Q, k]``, int64.
    """

    distances: Tensor  # [Q, k]
    indices: Tensor  # [Q, k]


def knn(
    queries: Tensor,  # [Q, D]
    data: Tensor,  # [N, D]
    k: int,
) -> Neighbors:
    """Finds the k nearest points of each query, exactly.

    The distance is the sum of the squared differences, computed in double and rounded to float32;
    the order is by distance, then by index, so the answer is one and the same on every device and
    at any thread count. A point that equals the query is among its neighbours. Distances to what is
    not finite are infinite or NaN and come last, NaN after infinity. All distances are never stored
    together. In up to 8 dimensions the CPU searches a tree of boxes.

    Args:
        queries: ``[Q, D]``; float32, float16, bfloat16, and on the CPU float64. Not differentiated.
        data: The points ``[N, D]``, of the dtype and on the device of `queries`.
        k: How many to find, from 0 to N; at most 1024 on a GPU.

    Returns:
        `Neighbors` of distances ``[Q, k]`` in float32 and indices ``[Q, k]`` in int64.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: Shapes or devices do not fit, or k is out of range.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [5.0]])
        >>> fastsel.knn(torch.tensor([[2.0]]), points, 2)
        Neighbors(distances=tensor([[1., 4.]]), indices=tensor([[1, 0]]))
    """
    check_float_tensor("knn", "queries", queries)
    check_float_tensor("knn", "data", data)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"knn: k must be an int, got {type(k).__name__}")
    if data.dtype != queries.dtype:
        raise TypeError(f"knn: data must be {name(queries.dtype)}, got {name(data.dtype)}")
    if queries.dim() != 2 or data.dim() != 2 or queries.shape[1] != data.shape[1]:
        raise ValueError(
            f"knn: queries and data must be [Q, D] and [N, D], got {list(queries.shape)} and "
            f"{list(data.shape)}"
        )
    if data.device != queries.device:
        raise ValueError(f"knn: data must be on {queries.device}, got {data.device}")
    most = min(len(data), 1024) if queries.device.type == "cuda" else len(data)
    if not 0 <= k <= most:
        raise ValueError(f"knn: k must be between 0 and {most}, got {k}")
    return Neighbors(*_knn(without_grad(queries), without_grad(data), k))


def register(namespace: str) -> None:
    """Gives the operator of a namespace its shape function."""
    torch.library.register_fake(f"{namespace}::knn", _fake)


def _fake(
    queries: Tensor,  # [Q, D]
    data: Tensor,  # [N, D]
    k: int,
) -> tuple[Tensor, Tensor]:
    require(queries.dim() == 2 and data.dim() == 2, lambda: "knn: queries and data must be [*, D]")
    require(queries.shape[1] == data.shape[1], lambda: "knn: queries and data must be [*, D]")
    require(k >= 0, lambda: "knn: k must not be negative")
    require(k <= data.shape[0], lambda: "knn: k must not exceed the points")
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(
        shape, dtype=torch.int64
    )


_knn = torch.ops.fastsel.knn.default
