"""The CUDA kernels of `topk`: every home of the keys, and the plan that chooses among them.

The emulated device is made small, so that rows of some ten thousand columns reach the code that a
GPU runs for millions.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fastsel_native
import pytest
import reference
import torch
from conftest import Backend, assert_same_bits, set_simt_device, set_simt_order
from torch import Tensor

INF, NAN = float("inf"), float("nan")
KIB = 1024
H200 = (132, 227 * KIB)
A100 = (108, 163 * KIB)

Values = Callable[[tuple[int, ...]], Tensor]


def generator(seed: int = 7) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...]) -> Tensor:
    """Few ties, digits spread out."""
    return torch.randn(shape, generator=generator())


def tied(shape: tuple[int, ...]) -> Tensor:
    """Some ten distinct values: the last bucket is always larger than what is needed of it."""
    return (normal(shape) * 2).round()


def equal(shape: tuple[int, ...]) -> Tensor:
    """One value: all digits collide, lists of survivors overflow, the order is by index alone."""
    return torch.full(shape, 1.5)


def close(shape: tuple[int, ...]) -> Tensor:
    """Equal leading digits: the first two passes decide nothing."""
    return 1 + normal(shape) * 1e-6


def hard(shape: tuple[int, ...]) -> Tensor:
    """NaN of both signs, infinities and zeros of both signs among ordinary values."""
    values = normal(shape)
    kind = torch.rand(shape, generator=generator(8))
    for i, special in enumerate((NAN, -NAN, INF, -INF, 0.0, -0.0)):
        values[(kind > 0.1 * i) & (kind < 0.1 * i + 0.07)] = special
    return values


def climbing(shape: tuple[int, ...]) -> Tensor:
    """Ascending: all results come from the last block."""
    return torch.arange(shape[-1], dtype=torch.float32).expand(shape).clone()


def falling(shape: tuple[int, ...]) -> Tensor:
    """Descending: all results come from the first block."""
    return -climbing(shape)


VALUES: list[Values] = [normal, tied, equal, close, hard, climbing, falling]


def check(simt: Backend, scores: Tensor, k: int, largest: bool, in_order: bool) -> None:
    """The same bits as a stable sort gives."""
    actual = simt.topk(scores, k, largest=largest, sorted=in_order)
    wide = scores.double().numpy()
    indices = torch.from_numpy(reference.topk(wide, k, largest=largest, sorted=in_order)[1])
    assert torch.equal(actual.indices, indices)
    assert_same_bits(actual.values, scores.gather(-1, indices))


class Case(NamedTuple):
    """A device and a shape that lead to one path through the kernels."""

    path: str
    shape: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    def plan(self, k: int, in_order: bool, dtype: torch.dtype) -> dict[str, int | str]:
        """What choose_topk_plan makes of it."""
        rows, columns = self.shape
        sort = in_order and k <= fastsel_native.topk_sort_limit
        plan: dict[str, int | str] = fastsel_native.topk_plan(
            rows, columns, k, sort, dtype.itemsize, self.multiprocessors, self.shared_bytes
        )
        return plan


def path_of(plan: dict[str, int | str]) -> str:
    """Which path a plan takes."""
    if plan["kernel"] != "grid":
        return str(plan["kernel"])
    blocks = "one block" if plan["blocks_per_row"] == 1 else "many blocks"
    return f"{blocks}, {'keys in shared memory' if plan['chunk_in_shared'] else 'lists'}"


# By the paths of float32; 16-bit keys need half the room, so they take their own.
CASES = [
    Case("small", (5, 1), 4, 96 * KIB),
    Case("small", (70, 333), 4, 96 * KIB),
    Case("small", (3, 4096), 4, 96 * KIB),
    Case("registers", (2, 4097), 4, 96 * KIB),
    Case("registers", (5, 9_001), 4, 96 * KIB),
    Case("registers", (1, 16_384), 4, 96 * KIB),
    Case("shared", (1, 16_385), 4, 227 * KIB),
    Case("shared", (5, 20_479), 2, 227 * KIB),
    Case("many blocks, keys in shared memory", (1, 33_333), 4, 96 * KIB),
    Case("many blocks, keys in shared memory", (3, 40_001), 13, 96 * KIB),
    Case("many blocks, lists", (1, 50_001), 2, 64 * KIB),
    Case("many blocks, lists", (2, 70_001), 6, 48 * KIB),
    Case("one block, lists", (1, 40_000), 1, 64 * KIB),
    Case("one block, lists", (5, 20_003), 3, 64 * KIB),
]


def case_id(case: Case) -> str:
    """Path and shape."""
    return f"{case.path} {case.shape[0]}x{case.shape[1]}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_case_takes_its_path(case: Case) -> None:
    k = min(100, case.shape[1])
    assert path_of(case.plan(k, True, torch.float32)) == case.path


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        *((torch.float32, values) for values in VALUES),
        *((torch.bfloat16, values) for values in (normal, equal, hard)),
        (torch.float16, hard),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_stable_sort(simt: Backend, case: Case, dtype: torch.dtype, values: Values) -> None:
    set_simt_device(case.multiprocessors, case.shared_bytes)
    scores = values(case.shape).to(dtype)
    columns = case.shape[1]
    for k, largest, in_order in [
        (1, True, True),
        (min(100, columns), False, True),
        (columns // 3, True, False),
        (min(4096, columns), True, True),
        (min(4097, columns), False, True),
        (columns, False, False),
    ]:
        check(simt, scores, k, largest, in_order)


@pytest.mark.parametrize("values", [normal, tied, equal, hard])
@pytest.mark.parametrize("case", CASES[1::2], ids=case_id)
def test_any_order_of_threads(simt: Backend, case: Case, values: Values) -> None:
    # A missing barrier shows as a result that depends on who runs first.
    set_simt_device(case.multiprocessors, case.shared_bytes)
    scores = values(case.shape)
    for order, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
        set_simt_order(order, seed)
        check(simt, scores, min(100, case.shape[1]), True, True)
        check(simt, scores, case.shape[1] // 2, False, False)


def test_keys_and_entries_take_turns_in_shared_memory(simt: Backend) -> None:
    # The keys fit only where the entries will be sorted, and the block goes on to further rows.
    case = Case("one block, keys in shared memory", (5, 20_480), 2, 96 * KIB)
    assert path_of(case.plan(4_000, True, torch.float32)) == case.path
    set_simt_device(case.multiprocessors, case.shared_bytes)
    for order, seed in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
        set_simt_order(order, seed)
        check(simt, normal(case.shape), 4_000, True, True)
        check(simt, tied(case.shape), 4_000, False, True)


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [100, 5_000, 17_000, 40_000])
def test_unaligned_rows(simt: Backend, columns: int, dtype: torch.dtype, offset: int) -> None:
    # 16-byte loads need addresses that are multiples of 16; these rows have none.
    set_simt_device(4, 96 * KIB)
    storage = normal((2, columns + 5)).to(dtype)
    check(simt, storage[:, offset : offset + columns], 50, True, True)
    check(simt, storage[1, offset : offset + columns], columns // 2, False, False)


@pytest.mark.parametrize("columns", [100, 17_000])
def test_strides(simt: Backend, columns: int) -> None:
    scores = normal((columns, 3))
    check(simt, scores.t(), 20, True, True)
    check(simt, scores[:, 1], 20, True, False)
    check(simt, scores[:, :1].t().expand(4, columns), 20, False, True)
    check(simt, scores.flip(0).t().view(1, 3, columns)[:, ::2], 20, True, True)


@pytest.mark.parametrize("device", [H200, A100, (1, 64 * KIB), (4, 96 * KIB)], ids=str)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_plans_fit_the_device(device: tuple[int, int], element_bytes: int) -> None:
    multiprocessors, shared_bytes = device
    for rows in (1, 2, 7, 66, 67, 1_000, 10**6):
        for columns in (1, 4_096, 4_097, 16_385, 65_536, 10**6, 10**7, 4 * 10**9):
            for k in (1, 64, 4_096):
                plan = fastsel_native.topk_plan(
                    rows, columns, min(k, columns), True, element_bytes, *device
                )
                static = fastsel_native.topk_static_shared_bytes
                assert plan["shared_bytes"] + static <= shared_bytes
                assert plan["shared_bytes"] >= 8 * plan["sort_size"]
                assert 1 <= plan["grid"] <= 2**31 - 1
                if plan["kernel"] != "grid":
                    assert plan["workspace_words"] == plan["entries"] == 0
                    continue
                assert plan["grid"] <= multiprocessors
                blocks = plan["blocks_per_row"]
                # Every column has a block, and no block is without columns.
                assert (blocks - 1) * plan["chunk"] < columns <= blocks * plan["chunk"] < 2**32
                if blocks > 1:
                    assert plan["grid"] == rows * blocks


def test_plans_use_the_device() -> None:
    def blocks(rows: int, columns: int) -> int:
        plan = fastsel_native.topk_plan(rows, columns, 100, True, 4, *H200)
        return int(plan["grid"])

    assert blocks(1, 10**7) > 120
    assert blocks(10, 10**6) > 120
    assert blocks(1_000, 40_000) == 132
    assert blocks(1_000, 1_000) > 132


def test_the_sanitized_shapes_reach_every_kernel() -> None:
    path = Path(__file__).resolve().parent.parent / "bench" / "sanitize.py"
    shapes = runpy.run_path(str(path), run_name="shapes")["TOPK_SHAPES"]
    plans = [fastsel_native.topk_plan(*shape, 64, True, 4, *H200) for shape in shapes]
    reached = {
        (plan["kernel"], plan["blocks_per_row"] > 1, bool(plan["chunk_in_shared"]))
        for plan in plans
    }
    assert {kernel for kernel, _, _ in reached} == {"small", "registers", "shared", "grid"}
    assert {("grid", True, True), ("grid", False, False), ("grid", True, False)} <= reached
