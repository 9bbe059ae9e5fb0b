"""`affine_grad_norm_sq` and `bias_grad_norm_sq` against their definition, on every backend."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import (
    Backend,
    assert_norms_close,
    assert_same_bits,
    set_simt_device,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsel import ops

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
THREADS = [1, 2, 3]


def check(backend: Backend, normalized: Tensor, grad_outputs: Tensor) -> None:
    """Both operators against NumPy in float64."""
    x, g = to_numpy(normalized), to_numpy(grad_outputs)
    with np.errstate(all="ignore"):
        weight = reference.affine_grad_norm_sq(x, g), reference.affine_grad_norm_sq(abs(x), abs(g))
        bias = reference.bias_grad_norm_sq(g), reference.bias_grad_norm_sq(abs(g))
    assert_norms_close(backend.grad_norm_sq("affine", normalized, grad_outputs), *weight, backend)
    assert_norms_close(backend.grad_norm_sq("bias", grad_outputs), *bias, backend)


def pair(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Seeded normal inputs ``[B, T..., D]``."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, generator=generator).to(dtype),
        torch.randn(*shape, generator=generator).to(dtype),
    )


def channels_first(x: Tensor) -> Tensor:
    """The same ``[B, T..., D]``, in memory ``[B, D, T...]``."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


SHAPES = [
    (1, 1),
    (3, 5),
    (5, 1000),
    (2, 1, 7),
    (4, 20, 16),
    (3, 4, 5),
    (2, 3, 4, 6),
    (2, 2, 1, 3, 1, 5),
    (2, 49, 33),
    (1, 700, 3),
    (1, 301, 257),
    (2, 9, 1500),
    (70, 3, 40),
    (1, 20_000, 1),
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (0, 0),
    (3, 0),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, g = pair(*shape, dtype=dtype)
    check(backend, x, g)
    check(backend, channels_first(x), channels_first(g))


@pytest.mark.parametrize("positions", [1, 2, 7, 8, 9, 15, 31, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("columns", [1, 4, 8, 12, 17, 33])
def test_sizes(backend: Backend, positions: int, columns: int) -> None:
    # Around the lengths of vectors, of warps and of what a thread adds before it goes to double.
    for dtype in (torch.float32, torch.bfloat16):
        x, g = pair(2, positions, columns, dtype=dtype)
        check(backend, x, g)
        check(backend, channels_first(x), channels_first(g))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every_other_column": lambda x: x[..., ::2],
    "every_other_position": lambda x: x[:, ::2],
    "every_other_sample": lambda x: x[::2],
    "backwards": lambda x: x.permute(2, 1, 0),
    "offset": lambda x: x[1:, 1:, 1:],
    "one_column": lambda x: x[..., 2:3],
    "one_position": lambda x: x[:, 3:4],
    "one_position_of_channels": lambda x: channels_first(x)[:, 3:4],
    "rows_in_the_batch": lambda x: x[:, 0].t(),
    "channels_first_offset": lambda x: channels_first(x)[:, 1:, 1:],
    "positions_of_two": lambda x: x.view(6, 4, 4, 24),
    "positions_in_another_order": lambda x: x.view(6, 2, 8, 24).transpose(1, 2),
    "channels_last": lambda x: x.view(6, 4, 4, 24).contiguous(),
    "expanded_positions": lambda x: x[:, :1].expand(6, 40, 24),
    "expanded_samples": lambda x: x[:1].expand(5, 16, 24),
    "expanded_columns": lambda x: x[..., :1].expand(6, 16, 9),
    "expanded": lambda x: x[:1, :1, :1].expand(3, 40, 24),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    x, g = (LAYOUTS[layout](tensor) for tensor in pair(6, 16, 24, dtype=dtype))
    check(backend, x, g)
    # One as it is, one packed, either way round.
    check(backend, x, g.contiguous())
    check(backend, x.contiguous(), g)
    if x.dim() == 3:
        check(backend, channels_first(x), g)


@pytest.mark.parametrize("first", [True, False], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_special_values_stay_in_their_sample(backend: Backend, value: float, first: bool) -> None:
    x, g = pair(5, 37, 20)
    if first:
        x, g = channels_first(x), channels_first(g)
    clean = backend.grad_norm_sq("affine", x, g), backend.grad_norm_sq("bias", g)
    g[2, 11, 7] = value
    for before, after in zip(
        clean, (backend.grad_norm_sq("affine", x, g), backend.grad_norm_sq("bias", g)), strict=True
    ):
        assert_same_bits(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
        assert after[2].isnan() if value != value else after[2].isinf()
    check(backend, x, g)
    g[2, 3, 7] = -value  # infinities of both signs in one column
    check(backend, x, g)


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e10, 1e18, 1e25])
def test_huge_and_tiny_values(backend: Backend, scale: float) -> None:
    # What does not fit into float32 is infinite; nothing else is.
    x, g = pair(3, 12, 10)
    check(backend, x, g * scale)
    check(backend, channels_first(x), channels_first(g * scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["channels_first", "channels_last"])
def test_hundred_thousand_positions(backend: Backend, dtype: torch.dtype, first: bool) -> None:
    # Plain float32 sums of so many terms of one sign are off by 1e-4.
    x, g = (tensor.abs().to(dtype) for tensor in pair(1, 100_000, 2))
    if first:
        x, g = channels_first(x), channels_first(g)
    wide = torch.from_numpy(reference.affine_grad_norm_sq(to_numpy(x), to_numpy(g)))
    actual = backend.grad_norm_sq("affine", x, g).cpu().double()
    torch.testing.assert_close(actual, wide, rtol=1e-6, atol=0)
    wide = torch.from_numpy(reference.bias_grad_norm_sq(to_numpy(g)))
    actual = backend.grad_norm_sq("bias", g).cpu().double()
    torch.testing.assert_close(actual, wide, rtol=1e-6, atol=0)


def test_terms_that_cancel(cpu: Backend) -> None:
    # Sums are a millionth of their terms; float32 sums would have no digit left.
    x, g = pair(2, 1000, 8)
    g[:, 500:] = -g[:, :500] * (1 + 1e-6)
    x[:, 500:] = x[:, :500]
    for a, b in ((x, g), (channels_first(x), channels_first(g))):
        truth = reference.affine_grad_norm_sq(to_numpy(a), to_numpy(b))
        np.testing.assert_allclose(to_numpy(cpu.grad_norm_sq("affine", a, b)), truth, rtol=1e-6)


@pytest.mark.parametrize("device", [(1, 64 * 1024), (13, 96 * 1024), (132, 227 * 1024)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 3000, 40), (2, 7, 9000), (3, 513, 96), (40, 50, 30)], ids=str
)
def test_other_devices(simt: Backend, device: tuple[int, int], shape: tuple[int, ...]) -> None:
    # The size of the GPU decides how blocks share columns and positions.
    set_simt_device(*device)
    for dtype in (torch.float32, torch.bfloat16):
        x, g = pair(*shape, dtype=dtype)
        check(simt, x, g)
        check(simt, channels_first(x), channels_first(g))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("first", [True, False], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(1, 3000, 700), (2, 40_000, 3), (33, 64, 129), (300, 2000)], ids=str
)
def test_same_bits_at_any_thread_count(cpu: Backend, shape: tuple[int, ...], first: bool) -> None:
    x, g = pair(*shape)
    if first and len(shape) > 2:
        x, g = channels_first(x), channels_first(g)
    results = []
    for count in THREADS:
        torch.set_num_threads(count)
        results.append((cpu.grad_norm_sq("affine", x, g), cpu.grad_norm_sq("bias", g)))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)
    check(cpu, x, g)


# ---- properties ----

sizes = st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 40))
floats = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@given(sizes, floats, st.booleans(), st.integers(0, 1000))
def test_equals_the_definition(
    size: tuple[int, int, int], dtype: torch.dtype, first: bool, seed: int
) -> None:
    x, g = pair(*size, dtype=dtype, seed=seed)
    if first:
        x, g = channels_first(x), channels_first(g)
    check(Backend("cpu"), x, g)


@given(sizes, st.integers(-20, 20), st.integers(0, 1000))
def test_scaling_is_exact_by_powers_of_two(
    size: tuple[int, int, int], power: int, seed: int
) -> None:
    x, g = pair(*size, seed=seed)
    scaled = ops.affine_grad_norm_sq(x, g * 2.0**power)
    assert_same_bits(scaled, ops.affine_grad_norm_sq(x, g) * 4.0**power)


@given(sizes, st.integers(0, 1000))
def test_bias_is_the_weight_of_ones(size: tuple[int, int, int], seed: int) -> None:
    _, g = pair(*size, seed=seed)
    assert_same_bits(ops.bias_grad_norm_sq(g), ops.affine_grad_norm_sq(torch.ones_like(g), g))


@given(sizes, st.integers(0, 1000))
def test_order_of_positions_is_nothing(size: tuple[int, int, int], seed: int) -> None:
    x, g = pair(*size, seed=seed)
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        ops.affine_grad_norm_sq(x[:, order], g[:, order]),
        ops.affine_grad_norm_sq(x, g),
        rtol=2e-7,  # one rounding to float32 each
        atol=0,
    )


# ---- arguments ----


def test_results_carry_no_gradient() -> None:
    x, g = (tensor.requires_grad_() for tensor in pair(2, 3, 4))
    assert not ops.affine_grad_norm_sq(x, g).requires_grad
    assert not ops.bias_grad_norm_sq(g).requires_grad


X = torch.zeros(2, 3, 4)
WRONG_AFFINE: list[tuple[tuple[Any, Any], type[Exception], str]] = [
    (([1.0], X), TypeError, "normalized must be a tensor, got list"),
    ((X, None), TypeError, "grad_outputs must be a tensor, got NoneType"),
    (
        (X.int(), X),
        TypeError,
        "normalized must be float32, float16, bfloat16 or float64, got int32",
    ),
    (
        (X, X.half()),
        TypeError,
        "grad_outputs must have the dtype of normalized, float32, got float16",
    ),
    ((X[0, 0], X[0, 0]), ValueError, "normalized must be [B, T..., D], got shape [4]"),
    (
        (X, X[:, :2]),
        ValueError,
        "grad_outputs must have the shape of normalized, [2, 3, 4], got [2, 2, 4]",
    ),
    (
        (X, X[:1]),
        ValueError,
        "grad_outputs must have the shape of normalized, [2, 3, 4], got [1, 3, 4]",
    ),
    (
        (X, X.to("meta")),
        ValueError,
        "grad_outputs must be on cpu as normalized is, got meta",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "text"), WRONG_AFFINE, ids=[text for *_, text in WRONG_AFFINE]
)
def test_wrong_arguments(arguments: tuple[Any, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape('affine_grad_norm_sq: ' + text)}$"):
        ops.affine_grad_norm_sq(*arguments)


def test_wrong_arguments_of_bias() -> None:
    with pytest.raises(TypeError, match=r"^bias_grad_norm_sq: grad_outputs must be a tensor, got"):
        ops.bias_grad_norm_sq(3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^bias_grad_norm_sq: grad_outputs must be .*, got bool$"):
        ops.bias_grad_norm_sq(X.bool())
    text = r"^bias_grad_norm_sq: grad_outputs must be \[B, T\.\.\., p\], got shape \[4\]$"
    with pytest.raises(ValueError, match=text):
        ops.bias_grad_norm_sq(X[0, 0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((X[0, 0], X[0, 0]), "normalized must have the batch first and at least two dimensions"),
        ((X, X[:, :2]), "grad_outputs must agree with normalized [2, 3, 4] in all but the last"),
        (
            (X, X[..., :2]),
            "grad_outputs must have the shape of normalized, [2, 3, 4], got [2, 3, 2",
        ),
        ((X, X.half()), "grad_outputs must have the dtype of normalized, float32, got float16"),
        ((X.int(), X.int()), "must be float32, float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operator_refuses_them_too(backend: Backend, arguments: tuple[Any, Any], text: str) -> None:
    x, g = (tensor.to(backend.device) for tensor in arguments)
    with pytest.raises(RuntimeError, match="affine_grad_norm_sq: .*" + re.escape(text)):
        backend.ops.affine_grad_norm_sq(x, g)


def test_bias_operator_refuses_them_too(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="bias_grad_norm_sq: grad_outputs must have the batch"):
        backend.ops.bias_grad_norm_sq(X[0, 0].to(backend.device))
    with pytest.raises(RuntimeError, match="bias_grad_norm_sq: grad_outputs must be float32"):
        backend.ops.bias_grad_norm_sq(X.int().to(backend.device))
