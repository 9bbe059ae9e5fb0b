"""`linear_grad_norm_sq` and `linear_weight_grad` against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from conftest import Backend, assert_same_bits, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsel
from fastsel import ops

INF, NAN = float("inf"), float("nan")
# float32 products and sums over at most some thousand terms; sixteen-bit inputs are exact in
# float32.
RTOL = 1e-5
FORMS = ("auto", "direct", "gram")


def layer(
    shape: tuple[int, ...],  # B, T...
    d: int,
    p: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Normal activations ``[B, T..., d]`` and output gradients ``[B, T..., p]``."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*shape, d, generator=generator)
    g = torch.randn(*shape, p, generator=generator)
    return a.to(dtype), g.to(dtype)


def truth(a: Tensor, g: Tensor) -> Tensor:
    """The reference as a tensor."""
    return torch.from_numpy(reference.linear_grad_norm_sq(to_numpy(a), to_numpy(g)))


def check(actual: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Close, relative to each value."""
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=rtol, atol=0, equal_nan=True)


# Sizes around the panels of 64, the vectors of 16 and the tiles of 6, and the blocks of columns.
SIZES = [
    ((3,), 5, 7),
    ((1, 1), 1, 1),
    ((4, 2), 6, 16),
    ((2, 17), 13, 15),
    ((2, 63), 64, 65),
    ((3, 130), 33, 70),
    ((2, 5, 3), 12, 17),
    ((2, 2, 3, 2), 20, 9),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "d", "p"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_reference(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], d: int, p: int, form: str
) -> None:
    a, g = layer(shape, d, p, dtype)
    norms = backend.grad_norm_sq("linear", a, g, form=form)
    assert norms.dtype == torch.float32
    check(norms, truth(a, g))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("t", "d", "p"), [(300, 900, 270), (700, 40, 130), (1, 5000, 3000)])
def test_large(cpu: Backend, t: int, d: int, p: int, form: str) -> None:
    # Several chunks of positions, blocks of columns and of channels.
    a, g = layer((2, t), d, p)
    check(cpu.grad_norm_sq("linear", a, g, form=form), truth(a, g))


def test_float64(cpu: Backend) -> None:
    a, g = layer((3, 20), 11, 13, torch.float64)
    norms = cpu.grad_norm_sq("linear", a, g)
    assert norms.dtype == torch.float64
    check(norms, truth(a, g), 1e-13)


@given(
    batch=st.integers(0, 5),
    positions=st.integers(0, 40),
    d=st.integers(0, 70),
    p=st.integers(0, 70),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_any_size(batch: int, positions: int, d: int, p: int, form: str, seed: int) -> None:
    a, g = layer((batch, positions), d, p, seed=seed)
    norms = fastsel.linear_grad_norm_sq(a, g, form=form)  # type: ignore[arg-type]
    assert norms.shape == (batch,)
    check(norms, truth(a, g))


@pytest.mark.parametrize("form", FORMS)
def test_empty(backend: Backend, form: str) -> None:
    for shape, d, p in [
        ((0, 3), 4, 5),
        ((2, 0), 4, 5),
        ((2, 3), 0, 5),
        ((2, 3), 4, 0),
        ((0,), 4, 5),
    ]:
        a, g = layer(shape, d, p)
        norms = backend.grad_norm_sq("linear", a, g, form=form)
        assert norms.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_not_finite_touches_its_sample_only(backend: Backend, bad: float, form: str) -> None:
    a, g = layer((4, 9), 10, 12)
    expected = truth(a, g)
    a[2, 3, 4] = bad
    norms = backend.grad_norm_sq("linear", a, g, form=form).double().cpu()
    kept = torch.tensor([0, 1, 3])
    check(norms[kept], expected[kept])
    assert not norms[2].isfinite()


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(backend: Backend, form: str) -> None:
    a, g = layer((6, 8), 10, 12)
    expected = truth(a[::2, 1:6], g[::2, 1:6])
    check(backend.grad_norm_sq("linear", a[::2, 1:6], g[::2, 1:6], form=form), expected)
    time_first = a.transpose(0, 1).contiguous().transpose(0, 1)
    check(backend.grad_norm_sq("linear", time_first, g, form=form), truth(a, g))
    turned = a.transpose(1, 2).contiguous().transpose(1, 2)
    check(backend.grad_norm_sq("linear", turned, g, form=form), truth(a, g))
    spread = g[:, :1].expand(6, 8, 12)
    check(backend.grad_norm_sq("linear", a, spread, form=form), truth(a, spread))


def test_huge_and_tiny_values(backend: Backend) -> None:
    a, g = layer((3, 7), 9, 11)
    check(backend.grad_norm_sq("linear", a * 1e8, g * 1e8), truth(a, g) * 1e32)
    check(backend.grad_norm_sq("linear", a * 1e-8, g * 1e-8), truth(a, g) * 1e-32)


def cancelling(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions in pairs that all but undo each other: Gram sums large terms of both signs."""
    a, g = layer((4, 32), 48, 48)
    a = torch.cat([a, a + 1e-2 * torch.randn_like(a)], 1)
    return a.to(dtype), torch.cat([g, -g], 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_cancelling_terms(cpu: Backend, form: str, dtype: torch.dtype) -> None:
    a, g = cancelling(dtype)
    # The direct product cancels too, in float32: 1e-2 of the terms are left of each entry.
    check(cpu.grad_norm_sq("linear", a, g, form=form), truth(a, g), 1e-4)


def test_never_negative(backend: Backend) -> None:
    a, g = layer((5, 20), 8, 8)
    pair = torch.cat([a, a], 1), torch.cat([g, -g], 1)
    assert (backend.grad_norm_sq("linear", *pair, form="gram") >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_at_any_thread_count(cpu: Backend, threads: None, form: str) -> None:
    a, g = layer((9, 70), 130, 150)
    torch.set_num_threads(1)
    expected = (cpu.grad_norm_sq("linear", a, g, form=form), *ops.linear_weight_grad(a, g))
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        results = (cpu.grad_norm_sq("linear", a, g, form=form), *ops.linear_weight_grad(a, g))
        for result, first in zip(results, expected, strict=True):
            assert_same_bits(result, first)


@pytest.mark.parametrize(
    ("shape", "d", "p"), [*SIZES, ((3, 300), 700, 200), ((70, 2), 8, 9)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad(dtype: torch.dtype, shape: tuple[int, ...], d: int, p: int) -> None:
    a, g = layer(shape, d, p, dtype)
    result = ops.linear_weight_grad(a, g)
    rows_a = to_numpy(a).reshape(-1, d)
    rows_g = to_numpy(g).reshape(-1, p)
    for actual, expected in (
        (result.weight_grad, rows_g.T @ rows_a),
        (result.bias_grad, rows_g.sum(0)),
    ):
        error = np.linalg.norm(to_numpy(actual) - expected)
        assert error <= 1e-6 * np.linalg.norm(np.abs(rows_g).T @ np.abs(rows_a)), error
    check(result.weight_norm_sq, truth(a, g))
    expected = torch.from_numpy(reference.bias_grad_norm_sq(to_numpy(g)))
    torch.testing.assert_close(result.bias_norm_sq.double(), expected, rtol=1e-4, atol=1e-6)


def test_weight_grad_of_nothing() -> None:
    result = ops.linear_weight_grad(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5))
    assert result.weight_grad.tolist() == torch.zeros(5, 4).tolist()
    assert result.bias_grad.tolist() == [0.0] * 5
    assert result.weight_norm_sq.shape == (0,)
    result = ops.linear_weight_grad(torch.zeros(2, 0, 4), torch.zeros(2, 0, 5))
    assert result.weight_grad.abs().sum() == 0
    assert result.weight_norm_sq.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("function", [fastsel.linear_grad_norm_sq, ops.linear_weight_grad])
def test_errors(function: object) -> None:
    assert callable(function)
    name = getattr(function, "__name__", "")
    a, g = layer((2, 3), 4, 5)
    with pytest.raises(TypeError, match=f"{name}: activations must be float32.*got int64"):
        function(a.long(), g)
    with pytest.raises(TypeError, match=f"{name}: grad_outputs must be a tensor, got list"):
        function(a, [1.0])
    with pytest.raises(TypeError, match=r"dtype of activations, float32, got float16"):
        function(a, g.half())
    with pytest.raises(ValueError, match=r"at least two dimensions, got shape \[4\]"):
        function(a[0, 0], g[0, 0])
    with pytest.raises(ValueError, match=r"agree with activations \[2, 3, 4\].*got \[2, 2, 5\]"):
        function(a, g[:, :2])


def test_form_is_checked() -> None:
    a, g = layer((2, 3), 4, 5)
    with pytest.raises(ValueError, match="form must be 'auto', 'direct' or 'gram', got 'ghost'"):
        fastsel.linear_grad_norm_sq(a, g, form="ghost")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be float32, float16 or bfloat16, got float64"):
        ops.linear_weight_grad(a.double(), g.double())


def test_the_operator_checks_too(backend: Backend) -> None:
    a, g = (tensor.to(backend.device) for tensor in layer((2, 3), 4, 5))
    for wrong, message in (
        ((a, g[:1]), "linear_grad_norm_sq: grad_outputs must agree with activations"),
        ((a, g.half()), "must have the dtype of activations, float32, got float16"),
        ((a[0, 0], g[0, 0]), "must have the batch first"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend.ops.linear_grad_norm_sq(*wrong)
    with pytest.raises(RuntimeError, match="form must be auto, direct or gram, got ghost"):
        backend.ops.linear_grad_norm_sq(a, g, form="ghost")
