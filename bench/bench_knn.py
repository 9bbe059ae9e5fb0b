"""knn against Faiss' flat index, scikit-learn's tree, and torch's cdist with topk.

The limit of a search of all points is the products' flops, of a few queries reading the points
once.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from torch import Tensor

import fastsel

K = 32
LIMIT_BYTES = 2 * 2**30


def faiss_flat(data: Tensor) -> Callable[[Tensor], Any]:
    """Faiss' exact index of the points."""
    faiss = pytest.importorskip("faiss", reason="faiss is not installed: bench/requirements.txt")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(data.shape[1])
    index.add(data.numpy())
    return lambda queries: index.search(queries.numpy(), K)


def sklearn_tree(data: Tensor) -> Callable[[Tensor], Any]:
    """scikit-learn's k-d tree, built anew each time like fastsel's."""
    neighbors = importlib.import_module("sklearn.neighbors")

    def search(queries: Tensor) -> Any:
        tree = neighbors.NearestNeighbors(
            n_neighbors=K, algorithm="kd_tree", n_jobs=torch.get_num_threads()
        )
        return tree.fit(data.numpy()).kneighbors(queries.numpy())

    return search


def cdist_topk(data: Tensor) -> Callable[[Tensor], Any]:
    """All distances, then the smallest."""
    return lambda queries: torch.cdist(queries, data).topk(K, largest=False)


CONTENDERS: dict[str, Callable[[Tensor], Callable[[Tensor], Any]]] = {
    "fastsel": lambda data: lambda queries: fastsel.knn(queries, data, K),
    "faiss flat": faiss_flat,
    "scikit-learn kd_tree": sklearn_tree,
    "torch.cdist, topk": cdist_topk,
}


def run(
    benchmark: harness.Benchmark, data: Tensor, queries: int | None, name: str, contender: str
) -> None:
    """Measures one contender on the points as they are, or on some of them as queries."""
    device = data.device.type
    wanted = data if queries is None else data[:queries].contiguous()
    if contender == "torch.cdist, topk" and 4 * len(wanted) * len(data) > LIMIT_BYTES:
        pytest.skip(f"all distances take {4 * len(wanted) * len(data) / 1e9:.1f} GB")
    if contender == "scikit-learn kd_tree" and data.shape[1] > 8:
        pytest.skip("a tree of more than 8 dimensions looks at every point")
    search = CONTENDERS[contender](data)
    harness.measure(
        benchmark,
        search,
        lambda _: (wanted,),
        op="knn",
        workload=f"{len(wanted):,} queries, {name} {len(data):,} x {data.shape[1]}, k {K}",
        contender=contender,
        device=device,
        bytes_moved=4 * (data.numel() + wanted.numel()) + 12 * K * len(wanted),
        in_graph=contender == "fastsel",
    )


@pytest.mark.parametrize(
    ("device", "contender"),
    [
        (d, c)
        for d in harness.DEVICES
        for c in CONTENDERS
        if d == "cpu" or c in ("fastsel", "torch.cdist, topk")
    ],
)
@pytest.mark.parametrize(
    ("count", "dims", "queries"),
    [(100_000, 28, 512), (100_000, 28, 1), (100_000, 3, 512), (20_000, 784, 512)],
)
def bench_knn(
    benchmark: harness.Benchmark, device: str, count: int, dims: int, queries: int, contender: str
) -> None:
    """Normal points."""
    generator = torch.Generator(device).manual_seed(0)
    data = torch.randn(count, dims, generator=generator, device=device)
    run(benchmark, data, queries, "normal", contender)


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if c != "torch.cdist, topk"])
def bench_knn_skin(benchmark: harness.Benchmark, contender: str) -> None:
    """The whole table of the skin data set, every point's neighbours."""
    folder = os.environ.get("FASTSEL_DATA_DIR", "")
    path = Path(folder) / "skin" / "skin_nonskin.npz"
    if not folder or not path.exists():
        pytest.skip("the skin data set is not in FASTSEL_DATA_DIR")
    data = torch.from_numpy(np.load(path)["bgr"].astype(np.float32))
    run(benchmark, data, None, "skin", contender)
