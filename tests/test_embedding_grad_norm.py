"""`embedding_grad_norm_sq` against its definition and against autograd, on every backend."""

from __future__ import annotations

import re
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
from torch.func import grad, vmap
from torch.nn import functional as F

from fastsel import ops

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
THREADS = [1, 2, 3]


def check(backend: Backend, indices: Tensor, grad_outputs: Tensor, padding_idx: int = -1) -> None:
    """Compares with NumPy in float64."""
    tokens, g = indices.numpy(), to_numpy(grad_outputs)
    with np.errstate(all="ignore"):
        expected = reference.embedding_grad_norm_sq(tokens, g, padding_idx)
        of_magnitudes = reference.embedding_grad_norm_sq(tokens, abs(g), padding_idx)
    actual = backend.grad_norm_sq("embedding", indices, grad_outputs, padding_idx)
    assert_norms_close(actual, expected, of_magnitudes, backend)


def batch(
    *shape: int,
    columns: int = 8,
    tokens: int = 10,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Seeded tokens ``[B, T...]`` and normal gradients ``[B, T..., D]``."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, tokens, shape, generator=generator)
    return indices, torch.randn(*shape, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4,), (3, 1), (3, 20), (2, 3, 5), (1, 500), (40, 30), (0, 3), (3, 0), (0,), (2, 0, 4), (0, 0)],
    ids=str,
)
def test_shapes(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for columns in (0, 1, 16, 37):
        check(backend, *batch(*shape, columns=columns, dtype=dtype))


@pytest.mark.parametrize("columns", [1, 3, 4, 8, 31, 32, 33, 128, 129, 255, 256, 260, 1025, 1500])
@pytest.mark.parametrize("positions", [1, 2, 31, 32, 33, 64, 65, 130])
def test_sizes(backend: Backend, positions: int, columns: int) -> None:
    # Around the lengths of vectors, warps, tiles and chunks.
    for dtype in (torch.float32, torch.bfloat16):
        check(backend, *batch(2, positions, columns=columns, tokens=20, dtype=dtype), 3)


def token_orders(positions: int) -> dict[str, Tensor]:
    """Sequences that make tokens meet in every way, ``[T]`` each."""
    ramp = torch.arange(positions)
    generator = torch.Generator().manual_seed(1)
    zipf = (1 / torch.rand(positions, generator=generator)).long()
    return {
        "all_equal": torch.full((positions,), 7),
        "all_distinct": ramp.flip(0),
        "all_padding": torch.zeros(positions, dtype=torch.int64),
        "all_but_one_padding": (ramp == positions // 2).long() * 3,
        "padding_at_the_end": torch.where(ramp < positions // 3, ramp % 11 + 1, 0),
        "pairs_side_by_side": ramp // 2,
        "pairs_far_apart": ramp % ((positions + 1) // 2),
        "two_tokens": ramp % 2 + 1,
        "runs_of_32": ramp // 32,
        "runs_of_33": ramp // 33,
        "runs_across_chunks": (ramp + 16) // 64,
        "natural": zipf,
    }


@pytest.mark.parametrize("name", list(token_orders(10)))
@pytest.mark.parametrize("positions", [5, 97, 700])
def test_token_orders(backend: Backend, name: str, positions: int) -> None:
    tokens = token_orders(positions)[name]
    indices = torch.stack([tokens, tokens.roll(1), tokens.flip(0)])
    g = torch.randn(3, positions, 12, generator=torch.Generator().manual_seed(2))
    for padding_idx in (-1, 0):
        check(backend, indices, g, padding_idx)
        check(backend, indices.int(), g.bfloat16(), padding_idx)


@pytest.mark.parametrize("device", [(1, 64 * 1024), (13, 96 * 1024), (132, 227 * 1024)], ids=str)
@pytest.mark.parametrize("name", list(token_orders(10)))
def test_token_orders_on_other_devices(simt: Backend, name: str, device: tuple[int, int]) -> None:
    # The size of the GPU decides how many chunks share a sample.
    set_simt_device(*device)
    tokens = token_orders(1000)[name]
    g = torch.randn(1, 1000, 36, generator=torch.Generator().manual_seed(2))
    check(simt, tokens[None], g, 0)
    check(simt, tokens[None], g[..., :35], 0)


@pytest.mark.parametrize("positions", [4095, 4096, 4097, 9000])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_long_samples(backend: Backend, positions: int, index_dtype: torch.dtype) -> None:
    # Where the GPU's own sort ends.
    indices, g = batch(2, positions, columns=4, tokens=3000)
    indices[:, ::5] = 17  # one token as frequent as "the"
    check(backend, indices.to(index_dtype), g, 0)


def test_hundred_thousand_positions(backend: Backend) -> None:
    # Gradients of one sign, so that a plain float32 sum would be off by 1e-4.
    indices, g = batch(1, 100_000, columns=2, tokens=50)
    for tokens in (indices, torch.zeros_like(indices)):
        truth = torch.from_numpy(
            reference.embedding_grad_norm_sq(tokens.numpy(), to_numpy(g.abs()))
        )
        actual = backend.grad_norm_sq("embedding", tokens, g.abs()).cpu().double()
        torch.testing.assert_close(actual, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "tokens",
    [
        [0, 1 << 40, 0, 1 << 40, (1 << 40) + 1],
        [-5, 3, -5, -1, -1],
        [(1 << 63) - 1, -(1 << 63), (1 << 63) - 1, 0, 0],
        [1 << 32, 0, 1 << 33, 1, (1 << 32) + 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("copies", [1, 20])
def test_huge_token_numbers(backend: Backend, tokens: list[int], copies: int) -> None:
    # No table is seen, so any number is a token; all of its bits count.
    indices = torch.tensor([tokens * copies])
    g = torch.randn(1, 5 * copies, 6, generator=torch.Generator().manual_seed(4))
    for padding_idx in (-1, tokens[0]):
        check(backend, indices, g, padding_idx)


def test_padding_beyond_the_index_dtype(backend: Backend) -> None:
    # 2^32 is no int32, so no position holds it; it must not be taken for 0.
    indices, g = batch(2, 9)
    check(backend, indices.int() % 2, g, 1 << 32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "layout", ["strided", "transposed", "expanded", "expanded_row", "offset", "dimensions"]
)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    indices, g = batch(6, 24, columns=16, dtype=dtype)
    indices, g = {
        "strided": (indices[::2, ::3], g[::2, ::3, 1::2]),
        "transposed": (indices[:, :16].t(), g[:, :16].permute(1, 0, 2)),
        "expanded": (indices[:1].expand(4, 24), g[:1, :1].expand(4, 24, 16)),
        "expanded_row": (indices, g[..., :1].expand(6, 24, 9)),
        "offset": (indices[1:, 1:], g[1:, 1:, 1:]),
        "dimensions": (indices.view(6, 4, 6).transpose(1, 2), g.view(6, 4, 6, 16).transpose(1, 2)),
    }[layout]
    check(backend, indices, g, 3)
    if g.dim() == 3:  # as a convolution over the embedded tokens gives it
        check(backend, indices, g.transpose(1, 2).contiguous().transpose(1, 2), 3)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_special_values_stay_in_their_sample(backend: Backend, value: float) -> None:
    indices, g = batch(5, 70, columns=20)
    clean = backend.grad_norm_sq("embedding", indices, g)
    g[2, 11, 7] = value
    after = backend.grad_norm_sq("embedding", indices, g)
    assert_same_bits(after[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert after[2].isnan() if value != value else after[2].isinf()
    check(backend, indices, g)
    indices[2, 11] = indices[2, 40]
    g[2, 40, 7] = -value  # infinities of both signs in one row
    check(backend, indices, g)


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_padding_is_not_read(backend: Backend, value: float) -> None:
    indices, g = batch(3, 50)
    g[indices == 4] = value
    assert backend.grad_norm_sq("embedding", indices, g, 4).isfinite().all()
    check(backend, indices, g, 4)


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e10, 1e18, 1e25])
def test_huge_and_tiny_values(backend: Backend, scale: float) -> None:
    # What does not fit into float32 is infinite; nothing else is.
    indices, g = batch(3, 30)
    check(backend, indices, g * scale)


def test_terms_that_cancel(cpu: Backend) -> None:
    # Sums are a millionth of their terms; float32 sums would have no digit left.
    indices, g = batch(2, 400, columns=6)
    indices[:, 200:] = indices[:, :200]
    g[:, 200:] = -g[:, :200] * (1 + 1e-6)
    truth = reference.embedding_grad_norm_sq(indices.numpy(), to_numpy(g))
    np.testing.assert_allclose(
        to_numpy(cpu.grad_norm_sq("embedding", indices, g)), truth, rtol=1e-6
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("shape", "columns"), [((1, 3000), 700), ((2, 40_000), 3), ((33, 64), 129), ((300,), 2000)]
)
def test_same_bits_at_any_thread_count(cpu: Backend, shape: tuple[int, ...], columns: int) -> None:
    indices, g = batch(*shape, columns=columns, tokens=500)
    results = []
    for count in THREADS:
        torch.set_num_threads(count)
        results.append(cpu.grad_norm_sq("embedding", indices, g, 3))
    for result in results[1:]:
        assert_same_bits(result, results[0])
    check(cpu, indices, g, 3)


# ---- against autograd ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(5,), (4, 12), (3, 4, 5)], ids=str)
def test_layers(
    backend: Backend, shape: tuple[int, ...], padding_idx: int | None, dtype: torch.dtype
) -> None:
    indices, _ = batch(*shape)
    table = torch.randn(10, 6, generator=torch.Generator().manual_seed(3)).to(dtype)

    def loss(table: Tensor, sample: Tensor) -> Tensor:
        return F.embedding(sample, table, padding_idx).sin().sum()

    expected = vmap(grad(loss), in_dims=(None, 0))(table, indices).flatten(1).square().sum(1)
    output = F.embedding(indices, table, padding_idx).requires_grad_()
    (grad_outputs,) = torch.autograd.grad(output.sin().sum(), output)
    actual = backend.grad_norm_sq(
        "embedding", indices, grad_outputs, -1 if padding_idx is None else padding_idx
    )
    # Float32: autograd's own gradients are off by some 1e-7.
    rtol = 1e-10 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual.cpu(), expected, rtol=rtol, atol=0)


# ---- properties ----

sizes = st.tuples(st.integers(0, 4), st.integers(0, 80))
floats = st.sampled_from(FLOATS)


@given(sizes, st.integers(0, 40), st.integers(1, 100), floats, st.integers(-1, 3), st.booleans())
def test_equals_the_definition(
    size: tuple[int, int],
    columns: int,
    tokens: int,
    dtype: torch.dtype,
    padding_idx: int,
    narrow: bool,
) -> None:
    indices, g = batch(*size, columns=columns, tokens=tokens, dtype=dtype)
    check(Backend("cpu"), indices.int() if narrow else indices, g, padding_idx)


@given(sizes, st.integers(0, 1000))
def test_names_of_tokens_are_nothing(size: tuple[int, int], seed: int) -> None:
    # Only which positions hold the same token matters: the bits stay when tokens are renamed.
    indices, g = batch(*size, seed=seed)
    names = torch.randperm(10, generator=torch.Generator().manual_seed(seed)) * 1_000_003
    assert_same_bits(
        ops.embedding_grad_norm_sq(names[indices], g), ops.embedding_grad_norm_sq(indices, g)
    )


@given(sizes, st.integers(0, 1000))
def test_padding_equals_leaving_out(size: tuple[int, int], seed: int) -> None:
    indices, g = batch(*size, tokens=4, seed=seed)
    norms = ops.embedding_grad_norm_sq(indices, g, 1)
    for tokens, grads, norm in zip(indices, g, norms, strict=True):
        kept = tokens != 1
        alone = ops.embedding_grad_norm_sq(tokens[None, kept], grads[None, kept])
        assert_same_bits(alone[0], norm)


@given(sizes, st.integers(0, 1000))
def test_one_token_is_a_bias_and_distinct_ones_are_apart(size: tuple[int, int], seed: int) -> None:
    _, g = batch(*size, seed=seed)
    same = torch.zeros(size, dtype=torch.int64)
    apart = torch.arange(size[1]).expand(size)
    for tokens, grads in ((same, g), (apart, g.flatten(1))):
        torch.testing.assert_close(
            ops.embedding_grad_norm_sq(tokens, g),
            ops.bias_grad_norm_sq(grads),
            rtol=2e-7,  # one rounding to float32 each
            atol=0,
        )


# ---- arguments ----


def test_results_carry_no_gradient() -> None:
    indices, g = batch(2, 3)
    assert not ops.embedding_grad_norm_sq(indices, g.requires_grad_()).requires_grad


I, G = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)  # noqa: E741
WRONG: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (([1], G), TypeError, "indices must be a tensor, got list"),
    ((I.float(), G), TypeError, "indices must be int64 or int32, got float32"),
    ((I.short(), G), TypeError, "indices must be int64 or int32, got int16"),
    ((I, None), TypeError, "grad_outputs must be a tensor, got NoneType"),
    (
        (I, G.int()),
        TypeError,
        "grad_outputs must be float32, float16, bfloat16 or float64, got int32",
    ),
    ((I, G, 1.0), TypeError, "padding_idx must be an int, got float"),
    ((I, G, None), TypeError, "padding_idx must be an int, got NoneType"),
    ((I, G, True), TypeError, "padding_idx must be an int, got bool"),
    ((I[0, 0], G), ValueError, "indices must be [B, T...], got shape []"),
    (
        (I, G[0]),
        ValueError,
        "grad_outputs must be [B, T..., D] for indices [2, 3], got shape [3, 4]",
    ),
    (
        (I, G[:, :2]),
        ValueError,
        "grad_outputs must be [B, T..., D] for indices [2, 3], got shape [2, 2, 4]",
    ),
    (
        (I, G.to("meta")),
        ValueError,
        "grad_outputs must be on cpu as indices are, got meta",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape('embedding_grad_norm_sq: ' + text)}$"):
        ops.embedding_grad_norm_sq(*arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((I[0, 0], G), "indices must be [B, T...], got []"),
        ((I.short(), G), "indices must be int64 or int32, got int16"),
        ((I, G[:, :2]), "grad_outputs must be [B, T..., D] for indices [2, 3], got [2, 2, 4]"),
        ((I, G.int()), "grad_outputs must be float32, float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operator_refuses_them_too(
    backend: Backend, arguments: tuple[Tensor, Tensor], text: str
) -> None:
    indices, g = (tensor.to(backend.device) for tensor in arguments)
    with pytest.raises(RuntimeError, match=re.escape("embedding_grad_norm_sq: " + text)):
        backend.ops.embedding_grad_norm_sq(indices, g)
