"""Who searches: fastsel's own exact search, or an index of Faiss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsel import ops
from fastsel.data.optional import require

METRICS = ("euclidean", "cosine")

# From so many dimensions on the time is that of the products, at which Faiss is faster: at 784 by
# the bench; where it begins is an estimate.
FAISS_DIMS = 256

# Of one query's points to all, as [Q, k] distances and ids; -1 where an index found none.
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def prepare(features: object, metric: str) -> Tensor:  # [N, D] -> [N, D]
    """Features in the form that is searched: finite float32, of length 1 for the cosine.

    Raises:
        TypeError: `features` is not a floating tensor.
        ValueError: It is not ``[N, D]``, a row is not finite, or a row is zero, which has no
            cosine.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"NeighborTable: features must be a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(
            "NeighborTable: features must be floating, got "
            f"{str(features.dtype).removeprefix('torch.')}: convert and scale them first"
        )
    if features.dim() != 2:
        raise ValueError(f"NeighborTable: features must be [N, D], got {list(features.shape)}")
    if metric not in METRICS:
        raise ValueError(f"NeighborTable: metric must be one of {METRICS}, got {metric!r}")
    rows = features.detach().float()
    wrong = ~rows.isfinite().all(1)
    if bool(wrong.any()):
        raise ValueError(
            f"NeighborTable: features must be finite, got {int(wrong.sum())} rows with NaN or "
            f"infinities, the first is row {int(wrong.nonzero()[0])}"
        )
    if metric == "euclidean":
        return rows.contiguous()
    lengths = rows.double().norm(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(
            f"NeighborTable: row {int((lengths == 0).nonzero()[0])} of features is zero, which has "
            "no cosine: leave it out, or take metric='euclidean'"
        )
    unit: Tensor = (rows.double() / lengths[:, None]).float()
    return unit


def choose(method: str, data: Tensor) -> str:
    """The method that ``auto`` stands for."""
    if method != "auto":
        return method
    many = data.shape[1] >= FAISS_DIMS and data.device.type == "cpu"
    return "Flat" if many and importlib.util.find_spec("faiss") is not None else "exact"


def make_search(method: str, data: Tensor, gpu: bool) -> Search:
    """The search among these points.

    Raises:
        ValueError: Faiss does not know the factory string, or cannot train its index on so few.
        MissingPackageError: Faiss is not installed.
    """
    if method == "exact":

        def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
            found = ops.knn(queries, data, k)
            return found.distances, found.indices

        return search
    faiss = require("faiss", f"the index {method!r}", extra="faiss-gpu" if gpu else "faiss")
    index = _faiss_index(faiss, method, data, gpu)

    def search_index(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, ids = index.search(queries.cpu().numpy(), k)
        return (
            torch.from_numpy(distances).to(data.device),
            torch.from_numpy(ids).to(data.device),
        )

    return search_index


def _faiss_index(faiss: Any, factory: str, data: Tensor, gpu: bool) -> Any:
    points = data.cpu().numpy()
    try:
        index = faiss.index_factory(points.shape[1], factory)
    except RuntimeError as error:
        raise ValueError(
            f"NeighborTable: method must be 'auto', 'exact' or an index factory string of Faiss, "
            f"which does not know {factory!r}: {_reason(error)}"
        ) from error
    if gpu:
        if not hasattr(faiss, "StandardGpuResources"):
            raise ValueError(
                "NeighborTable: gpu=True needs a Faiss for GPUs: pip install 'fastsel[faiss-gpu]'"
            )
        index = faiss.index_cpu_to_all_gpus(index)
    try:
        index.train(points)
        index.add(points)
    except RuntimeError as error:
        raise ValueError(
            f"NeighborTable: Faiss could not build {factory!r} of {len(points)} points: "
            f"{_reason(error)}"
        ) from error
    return index


def _reason(error: Exception) -> str:
    """The last line of Faiss' text, which begins with a place in its source."""
    return str(error).strip().splitlines()[-1].split("Error: ")[-1]
