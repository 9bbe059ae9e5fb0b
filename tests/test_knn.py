"""`knn` against every distance there is, computed and sorted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference_sampling as reference
import torch
from conftest import Backend, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsel import ops

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INF, NAN = float("inf"), float("nan")


def check(backend: Backend, queries: Tensor, data: Tensor, k: int) -> None:
    """The very distances and indices of the reference."""
    found = backend.knn(queries, data, k)
    assert found.distances.shape == found.indices.shape == (len(queries), k)
    assert (found.distances.dtype, found.indices.dtype) == (torch.float32, torch.int64)
    distances, indices = reference.knn(queries.double().numpy(), data.double().numpy(), k)
    assert found.indices.tolist() == indices.tolist()
    np.testing.assert_array_equal(found.distances.cpu().numpy(), distances.astype(np.float32))


def points(count: int, dims: int, *, seed: int = 0, levels: int = 0) -> Tensor:
    """Seeded points; on a grid of so many levels a side, if any, so that distances tie."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (count, dims), generator=generator).float()
    # Multiples of 2^-12, whose squares and sums a double holds exactly: a reference that adds in
    # another order gets the same bits.
    return (torch.randn(count, dims, generator=generator) * 4096).round() / 4096


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dims", [1, 3, 8, 9, 33, 130])
@pytest.mark.parametrize(("queries", "count"), [(1, 1), (3, 40), (70, 200), (9, 1000)])
def test_sizes(backend: Backend, queries: int, count: int, dims: int, dtype: torch.dtype) -> None:
    data, wanted = points(count, dims).to(dtype), points(queries, dims, seed=1).to(dtype)
    for k in sorted({0, 1, count // 3, min(count, 500)}):
        check(backend, wanted, data, k)


@pytest.mark.parametrize("dims", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("levels", [0, 2, 6, 300])
def test_many_points(cpu: Backend, dims: int, levels: int) -> None:
    data = points(6000, dims, levels=levels)
    wanted = torch.cat([data[::23], points(60, dims, seed=2, levels=levels)])
    check(cpu, wanted, data, 32)


@pytest.mark.parametrize("dims", [3, 12])
def test_a_set_in_itself(cpu: Backend, dims: int) -> None:
    data = points(5000, dims, levels=9)
    found = cpu.knn(data, data, 20)
    distances, indices = reference.knn(data[:200].double().numpy(), data.double().numpy(), 20)
    assert found.indices[:200].tolist() == indices.tolist()
    np.testing.assert_array_equal(found.distances[:200].numpy(), distances)
    assert (found.distances[:, 0] == 0).all()


@pytest.mark.parametrize("dims", [3, 12])
@pytest.mark.parametrize("count", [300, 5000])
def test_equal_points(backend: Backend, count: int, dims: int) -> None:
    backend.need(count * 300)
    data = torch.full((count, dims), 0.3)
    found = backend.knn(data[:300], data, 40)
    assert (found.indices.cpu() == torch.arange(40)).all()
    assert (found.distances == 0).all()


@pytest.mark.parametrize("dims", [2, 17])
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_points_far_from_zero(backend: Backend, dims: int, offset: float) -> None:
    # Where norms are huge beside distances, a product form loses all of them.
    data = points(5000 if backend.name == "cpu" else 300, dims) + offset
    check(backend, data[:270:9], data, 10)


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-22, 1e-19, 1e15, 1e19, 3e37])
@pytest.mark.parametrize("dims", [3, 12])
def test_tiny_and_huge_points(backend: Backend, dims: int, scale: float) -> None:
    if scale < 1:  # squares that only a subnormal holds, or nothing
        tiny = points(5000 if backend.name == "cpu" else 150, dims) * scale
        check(backend, tiny[:290:5], tiny, 12)
        check(backend, tiny[:2], tiny, 12)
    data = points(5000 if backend.name == "cpu" else 200, dims, levels=7) * scale
    check(backend, data[:280:7], data, 12)


@pytest.mark.parametrize("dims", [3, 12])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_points_that_are_not_finite(backend: Backend, value: float, dims: int) -> None:
    count = 5000 if backend.name == "cpu" else 90
    data, wanted = points(count, dims), points(300, dims, seed=1)[:60]
    data[7, 1], data[count - 3, 0], data[11] = value, value, NAN
    wanted[3, 0] = value
    check(backend, wanted, data, 30)
    check(backend, wanted[:5], data[:20], 20)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "offset"])
def test_layouts(backend: Backend, layout: str) -> None:
    base = points(60, 40)
    data = {
        "strided": base[::2, 1::3],
        "transposed": base.t(),
        "expanded": base[:1].expand(50, 40),
        "offset": base.view(-1)[3:1503].view(100, 15),
    }[layout]
    check(backend, data[::4], data, 9)


@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 9), st.data())
def test_any_points(count: int, queries: int, dims: int, data: st.DataObject) -> None:
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e20, -1e20, INF, NAN, 1e-40])
    numbers = st.lists(values, min_size=(count + queries) * dims, max_size=(count + queries) * dims)
    whole = torch.tensor(data.draw(numbers)).view(-1, dims)
    check(Backend("cpu"), whole[count:], whole[:count], data.draw(st.integers(0, count)))


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_nothing(backend: Backend, shape: tuple[int, int, int]) -> None:
    queries, count, dims = shape
    check(backend, torch.zeros(queries, dims), torch.zeros(count, dims), min(count, 2))


def test_many_neighbours(backend: Backend) -> None:
    data = points(1300, 6)
    check(backend, data[:5], data, 1024)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("queries", "dims"), [(2, 20), (700, 20), (700, 4)])
def test_same_bits_at_any_thread_count(cpu: Backend, queries: int, dims: int) -> None:
    data = points(9000, dims, levels=5)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(cpu.knn(data[:queries], data, 33))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


def test_arguments() -> None:
    data = torch.zeros(4, 3)
    search: Any = ops.knn
    for arguments, error, match in (
        (([1], data, 1), TypeError, "queries must be a tensor, got list"),
        ((data.int(), data, 1), TypeError, "queries must be float32.*, got int32"),
        ((data, data.double(), 1), TypeError, "data must be float32, got float64"),
        ((data, data, 1.0), TypeError, "k must be an int, got float"),
        ((data, data, 5), ValueError, "k must be between 0 and 4, got 5"),
        ((data, data, -1), ValueError, "k must be between 0 and 4, got -1"),
        ((data[:, :2], data, 1), ValueError, r"\[Q, D\] and \[N, D\], got \[4, 2\] and \[4, 3\]"),
        ((data[0], data, 1), ValueError, r"got \[3\] and \[4, 3\]"),
    ):
        with pytest.raises(error, match=f"knn: .*{match}"):
            search(*arguments)
    with pytest.raises(RuntimeError, match="k must be between 0 and 4"):
        torch.ops.fastsel.knn(data, data, 5)


def test_most_neighbours_of_a_kernel(simt: Backend) -> None:
    data = torch.zeros(1100, 2)
    with pytest.raises(RuntimeError, match="k must be at most 1024 on a GPU, got 1025"):
        simt.knn(data[:1], data, 1025)
