"""The CUDA kernels of `adaselection_`: their parts, the plan, and every path at its edges.

The emulated device is made small or large, so that batches of some thousand samples reach both the
kernel of one block and that of a grid.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import fastsel_native
import numpy as np
import pytest
import torch
from conftest import SIMT_ORDERS, Backend, assert_same_bits, set_simt_device, set_simt_order
from decisions import BIG, CORESET1, EVERY, GRAD, OF_LOSSES, UNIFORM, Decisions, batch
from test_adaselection import SCORES, check_step
from torch import Tensor

native = fastsel_native.adaselection

INF, NAN = float("inf"), float("nan")
KIB = 1024
H200 = (132, 227 * KIB)
A100 = (108, 163 * KIB)
# Not even the losses of 8192 samples fit: a grid from 1025 samples on.
LITTLE_SHARED = 36 * KIB


# ---- the parts ----


@pytest.mark.parametrize("by_lanes", [True, False], ids=["lanes", "memory"])
@pytest.mark.parametrize(("width", "sums"), [(1, 0), (1, 1), (2, 2), (4, 2), (8, 4), (32, 7)])
def test_totals(width: int, sums: int, by_lanes: bool) -> None:
    for count in [32] if by_lanes else [1, 7, 32, 33, 132]:
        # Integers, so that the order of additions does not show.
        values = np.random.default_rng(width + count).integers(-1000, 1000, (count, width))
        expected = np.where(np.arange(width) < sums, values.sum(0), values.max(0))
        actual = native.totals(values.astype(float).ravel().tolist(), width, sums, by_lanes)
        assert actual == np.tile(expected, 32 // width).tolist()


def losses_to_rank() -> dict[str, Tensor]:
    normal = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    hard = normal.clone()
    for i, special in enumerate((NAN, -NAN, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38)):
        hard[i::17] = special
    return {
        "normal": normal,
        "ties": (2 * normal).round(),
        "equal": torch.full((2048,), 0.3),
        "ascending": torch.arange(2048.0),
        "descending": -torch.arange(2048.0),
        "hard": hard,
    }


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", losses_to_rank())
def test_ranks(simt: Backend, name: str, narrow: bool) -> None:
    for order in SIMT_ORDERS:
        set_simt_order(order)
        for size in (1, 2, 31, 32, 33, 255, 256, 257, 1000, 2047, 2048):
            losses = losses_to_rank()[name][:size]
            losses = losses.bfloat16().float() if narrow else losses
            ascending = np.argsort(losses.numpy(), kind="stable")  # NaN last
            expected = np.empty(size, dtype=np.int64)
            expected[ascending] = np.arange(size)
            assert native.ranks(losses.tolist(), narrow) == expected.tolist()


# ---- the plan ----


@pytest.mark.parametrize("with_adaboost", [False, True])
@pytest.mark.parametrize("with_ranks", [False, True])
@pytest.mark.parametrize("device", [H200, A100, (1, 64 * KIB), (4, 96 * KIB)], ids=str)
def test_plans(device: tuple[int, int], with_ranks: bool, with_adaboost: bool) -> None:
    multiprocessors, shared_bytes = device
    for size in (1, 1024, 1025, 2048, 2049, 8192, 8193, 65_536, 10**6, 10**7, 4 * 10**9):
        plan = native.plan(size, with_ranks, with_adaboost, *device)
        if device in (H200, A100):
            assert plan["kernel"] == (
                "small" if size <= 1024 else "block" if size <= 8192 else "grid"
            )
        assert plan["shared_bytes"] + native.static_shared_bytes(size <= 1024) <= shared_bytes
        if plan["kernel"] != "grid":
            assert size <= 8192
            assert plan["grid"] == 1
            assert plan["shared_bytes"] >= size * (4 + 4 * with_ranks + 8 * with_adaboost)
            continue
        assert 1 <= plan["grid"] <= multiprocessors
        # Every sample has a block, and no block is without samples.
        chunk, padded = plan["chunk"], plan["padded"]
        assert (plan["grid"] - 1) * chunk < size <= plan["grid"] * chunk
        assert size <= padded < size + 2048 < 2**32
        assert chunk % 2048 == padded % 2048 == 0
        rows = with_adaboost * padded + with_ranks * padded // 2
        assert plan["workspace_words"] == plan["grid"] * native.parts + rows


def test_plans_use_the_device() -> None:
    assert native.plan(65_536, True, True, *H200)["grid"] == 32
    assert native.plan(10**6, True, True, *H200)["grid"] > 120


def test_the_sanitized_sizes_reach_every_kernel() -> None:
    path = Path(__file__).resolve().parent.parent / "bench" / "sanitize.py"
    sizes = runpy.run_path(str(path), run_name="sizes")["ADASELECTION_SIZES"]
    kernels = {native.plan(size, True, True, *H200)["kernel"] for size in sizes}
    assert kernels == {"small", "block", "grid"}


# ---- every path ----


class Case(NamedTuple):
    """A device and a batch that lead to one kernel."""

    kernel: str
    size: int
    multiprocessors: int
    shared_bytes: int


CASES = [
    *(Case("small", size, 4, 96 * KIB) for size in (1, 2, 31, 33, 255, 256, 257, 1023, 1024)),
    *(Case("block", size, 4, 227 * KIB) for size in (1025, 2047, 2049, 4097, 8191, 8192)),
    *(Case("grid", size, 4, 227 * KIB) for size in (8193, 10_240)),
    *(Case("grid", size, 1, LITTLE_SHARED) for size in (1025, 2049)),
    *(Case("grid", size, 3, LITTLE_SHARED) for size in (2049, 6145, 6700)),
    *(Case("grid", size, 200, LITTLE_SHARED) for size in (4096, 4097, 8192)),
]


def case_id(case: Case) -> str:
    """Kernel, batch size and multiprocessors."""
    return f"{case.kernel} {case.size} on {case.multiprocessors}"


by_case = pytest.mark.parametrize("case", CASES, ids=case_id)


@by_case
def test_case_takes_its_kernel(case: Case) -> None:
    plan = native.plan(case.size, True, True, case.multiprocessors, case.shared_bytes)
    assert plan["kernel"] == case.kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@by_case
def test_equals_the_definitions(simt: Backend, case: Case, dtype: torch.dtype) -> None:
    set_simt_device(case.multiprocessors, case.shared_bytes)
    decisions = Decisions(simt, [*EVERY, 9])
    for step, k in enumerate((case.size // 3, 0, case.size)):
        check_step(decisions, batch(case.size, step, dtype=dtype, rows=2), k)


@by_case
def test_any_order_of_threads(simt: Backend, case: Case) -> None:
    # A missing barrier shows as a result that depends on who runs first.
    set_simt_device(case.multiprocessors, case.shared_bytes)
    inputs = batch(case.size, rows=1)
    inputs["losses"] = (8 * inputs["losses"]).round()  # ties, where an order would leak
    inputs["grad_norms"][:: max(1, case.size // 7)] = NAN
    expected: list[Tensor] | None = None
    for order, seed in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
        set_simt_order(order, seed)
        decisions = Decisions(simt, [*EVERY, 8])
        choices = [decisions(k=k, **inputs) for k in (case.size // 5, case.size)]
        results = [*decisions.state, *(tensor for choice in choices for tensor in choice)]
        expected = expected or results
        for one, other in zip(results, expected, strict=True):
            assert_same_bits(one, other)


@by_case
def test_excluded_samples_anywhere(simt: Backend, case: Case) -> None:
    set_simt_device(case.multiprocessors, case.shared_bytes)
    size = case.size
    decisions = Decisions(simt, EVERY)
    for step, kept in enumerate([[size - 1], [0], list(range(size // 2, size)), []]):
        inputs: dict[str, Any] = batch(size, step)
        excluded = torch.ones(size, dtype=torch.bool)
        excluded[kept] = False
        inputs["reference_losses"][excluded] = INF
        for k in {0, len(kept), min(size, len(kept) + 1), size}:
            check_step(decisions.clone(), inputs, k)
        decisions(k=0, **inputs)
    assert int(decisions.step) == 3


@by_case
def test_equal_scores_go_to_the_lower_index(simt: Backend, case: Case) -> None:
    set_simt_device(case.multiprocessors, case.shared_bytes)
    size, k = case.size, (case.size + 1) // 2
    losses = torch.ones(size)
    decisions = Decisions(simt, [UNIFORM, BIG], curriculum_power=INF)
    assert torch.equal(decisions(losses, k).indices, torch.arange(k))
    losses[-1] = 2  # the only better one is the last
    best = [*range(k - 1), size - 1]
    assert decisions(losses, k).indices.tolist() == best


@pytest.mark.parametrize("name", losses_to_rank())
@by_case
def test_coreset1_by_itself(simt: Backend, case: Case, name: str) -> None:
    # Its statistic is the rank: the ends of the order score best, whatever the losses are.
    set_simt_device(case.multiprocessors, case.shared_bytes)
    losses = losses_to_rank()[name].repeat(5)[: case.size]
    decisions = Decisions(simt, [CORESET1], curriculum_power=INF)
    check_step(decisions, {"losses": losses}, case.size // 4)


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("size", [700, 5000, 9000])
def test_unaligned_and_strided(simt: Backend, size: int, offset: int) -> None:
    set_simt_device(4, 227 * KIB)
    whole = batch(offset * (size + 1), rows=3)
    sliced = {name: value[..., offset : offset + size] for name, value in whole.items()}
    stepped = {name: value[..., 1 : 1 + offset * size : offset] for name, value in whole.items()}
    for inputs in (sliced, stepped):
        # A row of a table wider than the batch, every other one.
        inputs["statistics"] = inputs["statistics"][::2]
        check_step(Decisions(simt, [*EVERY, 9]), inputs, 100)


def test_one_block_and_a_grid_agree(simt: Backend) -> None:
    inputs = batch(7000, rows=1)
    results = []
    for multiprocessors, shared_bytes in ((4, 227 * KIB), (4, LITTLE_SHARED), (1, LITTLE_SHARED)):
        set_simt_device(multiprocessors, shared_bytes)
        decisions = Decisions(simt, [*EVERY, 8])
        choices = [decisions(k=500, **inputs) for _ in range(2)]
        results.append((choices[1].scores, decisions.weights, decisions.losses))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            # Sums of doubles in another order: a bit of the float32 at most.
            torch.testing.assert_close(one, two, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("size", "multiprocessors"), [(600, 4), (3000, 4), (9000, 4), (9000, 1)])
def test_spread_relative_to_the_pivot(simt: Backend, size: int, multiprocessors: int) -> None:
    # Far from zero and close together: without a pivot the sums of squares would cancel, and an
    # outlier as the pivot must not do harm either.
    set_simt_device(multiprocessors, 227 * KIB)
    close = 1e4 + torch.rand(size, generator=torch.Generator().manual_seed(5))
    outlier = batch(size)["losses"]
    outlier[0] = 1e5
    one_ulp_off = torch.ones(size)
    one_ulp_off[size // 3] = 1 - 2**-24
    for losses in (close, -close, outlier, -outlier, one_ulp_off, -one_ulp_off):
        inputs = {"losses": losses, "grad_norms": losses}
        check_step(Decisions(simt, [*OF_LOSSES, GRAD]), inputs, size // 10, rtol=8 * SCORES)
