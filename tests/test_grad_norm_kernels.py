"""The CUDA kernels of `linear_grad_norm_sq`, emulated: both forms, every tile, every order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Backend, assert_same_bits, set_simt_device, to_numpy
from grad_norm_cases import (
    DTYPES,
    FORMS,
    LINEAR,
    Linear,
    assert_norms,
    linear_reference,
    normal,
    same_in_every_order,
)
from torch import Tensor

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear(simt: Backend, case: Linear, dtype: torch.dtype, form: str) -> None:
    a, g = case.make(dtype)
    assert_norms(simt.ops.linear_grad_norm_sq(a, g, form=form), linear_reference(a, g), form)


# Where the large tile costs less than the small one on four multiprocessors.
LARGE = [
    (Linear(1, 37, 257, 200), "direct"),
    (Linear(1, 40, 256, 256), "direct"),
    (Linear(1, 380, 40, 24), "gram"),
    (Linear(2, 250, 33, 31), "gram"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "form"), LARGE, ids=str)
def test_large_tiles(simt: Backend, case: Linear, form: str, dtype: torch.dtype) -> None:
    assert case.plan(form)["tile"] == 128
    a, g = case.make(dtype)
    assert_norms(simt.ops.linear_grad_norm_sq(a, g, form=form), linear_reference(a, g), form)


# Several samples a tile, of 16 or 32 rows each; the last tile is not full.
PACKED = [
    (Linear(1, 2, 3, 5), 16),
    (Linear(5, 15, 65, 40), 16),
    (Linear(9, 16, 64, 72), 16),
    (Linear(1, 17, 33, 34), 32),
    (Linear(3, 32, 40, 48), 32),
]


@pytest.mark.parametrize("form", ["gram", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "rows"), PACKED, ids=str)
def test_few_positions(
    simt: Backend, case: Linear, rows: int, dtype: torch.dtype, form: str
) -> None:
    plan = case.plan("gram")
    assert (plan["kernel"], plan["tile"]) == ("packed", rows)
    a, g = case.make(dtype)
    assert_norms(simt.ops.linear_grad_norm_sq(a, g, form=form), linear_reference(a, g), "gram")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "p", "lanes", "splits"),
    [
        (1, 1, 8, 1),
        (100, 37, 8, 1),
        (250, 7, 32, 1),
        (5000, 3, 32, 1),
        (7, 9000, 256, 1),
        (40_001, 9_003, 256, 5),
    ],
)
def test_one_position(
    simt: Backend, d: int, p: int, lanes: int, splits: int, dtype: torch.dtype
) -> None:
    case = Linear(5, 1, d, p)
    plan = case.plan("auto")
    assert (plan["kernel"], plan["lanes"], plan["per_sample"]) == ("outer", lanes, splits)
    a, g = case.make(dtype)
    expected = np.square(to_numpy(a)).sum((1, 2)) * np.square(to_numpy(g)).sum((1, 2))
    for x, y in [(a, g), (a.squeeze(1), g.squeeze(1))]:
        assert_norms(simt.ops.linear_grad_norm_sq(x, y), expected, "direct")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(simt: Backend, dtype: torch.dtype, form: str) -> None:
    def check(a: Tensor, g: Tensor) -> None:
        assert_norms(simt.ops.linear_grad_norm_sq(a, g, form=form), linear_reference(a, g), form)

    a, g = normal((2, 35, 40), dtype), normal((2, 35, 24), dtype, 8)
    check(a[:, 1:, 1:], g[:, 1:, 3:])  # unaligned lines
    check(a[:, ::2], g[:, ::2])
    check(a[:, :, ::2], g.flip(-1))
    check(normal((35, 2, 40), dtype).transpose(0, 1), g)
    check(normal((2, 40, 35), dtype).transpose(1, 2), g)
    check(a[:1].expand(2, 35, 40), g)
    check(a[:, :1].expand(2, 35, 40), g)
    check(a.view(2, 5, 7, 40), g.view(2, 5, 7, 24))
    check(normal((2, 7, 5, 40), dtype).transpose(1, 2), g.view(2, 5, 7, 24))
    check(normal((2, 5, 7, 50), dtype)[:, :, :, 8:48], g.view(2, 5, 7, 24))
    check(a[:, :1, 1:], g[:, 3:4, 1:])  # one position
    check(a[:, 3, ::2], g[:, 3])
    check(a[:, :, :1], g[:, :, 2:3])


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 1, 0, 5), (2, 1, 0, 0)]
)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_sum(simt: Backend, shape: tuple[int, int, int, int], form: str) -> None:
    batch, positions, d, p = shape
    a, g = torch.ones(batch, positions, d), torch.ones(batch, positions, p)
    norms = simt.ops.linear_grad_norm_sq(a, g, form=form)
    assert_same_bits(norms, torch.zeros(batch))


def test_wrong_arguments(simt: Backend) -> None:
    a, g = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    with pytest.raises(RuntimeError, match="form must be auto, direct or gram, got ghost"):
        simt.ops.linear_grad_norm_sq(a, g, form="ghost")
    with pytest.raises(RuntimeError, match="must be float32, float16 or bfloat16, got float64"):
        simt.ops.linear_grad_norm_sq(a.double(), g.double())


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions", [1, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_values_stay_in_their_sample(
    simt: Backend, dtype: torch.dtype, positions: int, form: str, bad: float
) -> None:
    a, g = Linear(3, positions, 13, 70).make(dtype)
    clean = simt.ops.linear_grad_norm_sq(a, g, form=form)
    for tensor in (a, g):
        kept = tensor[1].clone()
        tensor[1, positions // 2, 5] = bad
        norms = simt.ops.linear_grad_norm_sq(a, g, form=form)
        assert_same_bits(norms[::2], clean[::2])
        # The parts of a split float32, and the Gram form's terms, meet infinities of both signs.
        assert norms[1].isnan() if bad != INF else not norms[1].isfinite()
        if bad == INF and form == "direct" and dtype != torch.float32:
            assert norms[1] == INF
        tensor[1] = kept


def test_values_near_the_end_of_float32(simt: Backend) -> None:
    a, g = torch.full((1, 2, 3), 3.4e38), torch.full((1, 2, 3), 1e-30)
    for form in ("direct", "gram"):
        # The Gram form's products overflow, the direct form's do not.
        norm = simt.ops.linear_grad_norm_sq(a, g, form=form)
        if form == "direct":
            assert_norms(norm, linear_reference(a, g), form)
        else:
            assert not norm.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cancelling_terms_do_not_make_a_norm_negative(simt: Backend, dtype: torch.dtype) -> None:
    # Positions in pairs with equal activations and nearly opposite gradients.
    a = normal((40, 8, 20), dtype).repeat_interleave(2, 1)
    g = normal((40, 8, 20), dtype, 8).repeat_interleave(2, 1)
    g[:, 1::2] *= -1
    for noise in (0.0, 1e-5):
        noisy = a + noise * normal(tuple(a.shape), dtype, 9)
        exact = linear_reference(noisy, g)
        norms = to_numpy(simt.ops.linear_grad_norm_sq(noisy, g, form="gram"))
        assert (norms >= 0).all()
        # float32 rounding of terms as large as |a|^2 |g|^2 of some 10^5.
        np.testing.assert_allclose(norms, exact, atol=1.0)
        direct = simt.ops.linear_grad_norm_sq(noisy, g, form="direct")
        np.testing.assert_allclose(to_numpy(direct), exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "form"),
    [
        (Linear(2, 67, 70, 40), "direct"),
        (Linear(2, 67, 72, 136), "gram"),
        (Linear(2, 40, 130, 200), "direct"),
        (Linear(1, 250, 48, 31), "gram"),
        (Linear(3, 1, 30_000, 500), "auto"),
        (Linear(70, 3, 6, 9), "direct"),
        (Linear(300, 2, 6, 9), "gram"),
        (Linear(9, 30, 60, 40), "gram"),
    ],
    ids=str,
)
def test_linear_in_any_order(simt: Backend, case: Linear, form: str, dtype: torch.dtype) -> None:
    set_simt_device(1)  # the grid is shorter than the list of items
    a, g = case.make(dtype)
    same_in_every_order(lambda: simt.ops.linear_grad_norm_sq(a, g, form=form))
