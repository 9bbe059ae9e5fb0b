"""`topk` against a stable sort, on every backend: the same indices, not merely equal values."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import Backend, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsel import ops

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ORDERS = [(largest, in_order) for largest in (True, False) for in_order in (True, False)]


def check(backend: Backend, scores: Tensor, k: int) -> None:
    """Compares all four orders with the stable sort, bit by bit."""
    wide = scores.double().numpy()
    for largest, in_order in ORDERS:
        actual = backend.topk(scores, k, largest=largest, sorted=in_order)
        indices = torch.from_numpy(reference.topk(wide, k, largest=largest, sorted=in_order)[1])
        assert actual.indices.dtype == torch.int64
        assert actual.indices.device.type == backend.device.type
        assert torch.equal(actual.indices.cpu(), indices), (largest, in_order)
        assert_same_bits(actual.values, scores.gather(-1, indices))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Seeded normal scores."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 127, 1000, 1025, 4097, 20_011])
def test_sizes(backend: Backend, n: int, dtype: torch.dtype) -> None:
    for k in sorted({0, 1, n // 3, n - 1, n}):
        check(backend, normal(n, dtype=dtype), k)


@pytest.mark.parametrize(
    ("n", "k"), [(65_536, 1024), (262_144, 5000), (1_000_000, 10), (1_000_000, 300_000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows(backend: Backend, n: int, k: int, dtype: torch.dtype) -> None:
    backend.need(n)
    check(backend, normal(n, dtype=dtype), k)


@pytest.mark.parametrize(
    "shape", [(3, 50), (2, 3, 17), (1, 1, 1, 9), (200, 3), (0, 5), (2, 0, 5), (0, 0), (3, 0), (0,)]
)
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    for k in sorted({0, shape[-1] // 2, shape[-1]}):
        check(backend, normal(*shape), k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(backend: Backend, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest subnormal
    values = [
        0.0,
        -0.0,
        INF,
        -INF,
        NAN,
        -NAN,
        tiny,
        -tiny,
        3 * tiny,
        info.tiny,
        info.max,
        info.min,
        1.0,
        -1.0,
    ]
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert scores[6] > 0  # nothing was flushed on the way in
    several = torch.cat([scores, scores.flip(0), scores])
    for k in range(several.numel() + 1):
        check(backend, several, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_pattern_of_nan(backend: Backend, dtype: torch.dtype) -> None:
    # Quiet, signalling, negative, any payload: all NaN are equal, so ties go to the lower index
    # among them.
    bits, integer, exponent = {
        torch.float32: (32, torch.int32, 0x7F80_0000),
        torch.float64: (64, torch.int64, 0x7FF0_0000_0000_0000),
        torch.float16: (16, torch.int16, 0x7C00),
        torch.bfloat16: (16, torch.int16, 0x7F80),
    }[dtype]
    payloads = [exponent | payload for payload in (1, 2, 5, (exponent >> 1) & ~exponent | 7)]
    patterns = [p - (1 << (bits - 1)) for p in payloads] + payloads
    scores = torch.cat(
        [
            torch.tensor(patterns, dtype=integer).view(dtype),
            torch.tensor([INF, 0.0, -INF], dtype=dtype),
        ]
    )
    assert scores.isnan().sum() == len(patterns)
    for k in (1, 3, len(patterns), len(patterns) + 1, scores.numel()):
        check(backend, scores, k)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("n", [5, 1000, 30_000])
def test_all_equal(backend: Backend, value: float, n: int) -> None:
    for k in (1, n // 2, n):
        check(backend, torch.full((n,), value), k)


def test_zeros_of_both_signs_tie(backend: Backend) -> None:
    scores = torch.tensor([0.0, -0.0]).repeat(500)
    assert backend.topk(scores, 7).indices.tolist() == list(range(7))
    assert backend.topk(scores, 7, largest=False).indices.tolist() == list(range(7))


@pytest.mark.parametrize("leading", [1.0, 256.0, -3e38, 1e-40])
def test_equal_leading_bits(backend: Backend, leading: float) -> None:
    # Keys that differ in their last byte only, so that every digit before it decides nothing.
    bits = torch.tensor([leading]).view(torch.int32) & ~0xFF
    low = torch.randint(
        0, 256, (3001,), generator=torch.Generator().manual_seed(1), dtype=torch.int32
    )
    scores = (bits + low).view(torch.float32)
    for k in (1, 100, 2999):
        check(backend, scores, k)


@pytest.mark.parametrize("bit", range(0, 32, 3))
def test_one_bit_apart(backend: Backend, bit: int) -> None:
    # Two values that one bit tells apart, at every place a digit may begin or end.
    base = 0x3FFF_FFFF
    flip = -(1 << 31) if bit == 31 else 1 << bit
    pick = torch.rand(700, generator=torch.Generator().manual_seed(bit)) < 0.5
    scores = torch.where(pick, base, base ^ flip).to(torch.int32).view(torch.float32)
    for k in (1, 350, 699):
        check(backend, scores, k)


def orders(n: int) -> dict[str, Tensor]:
    """Orders that mislead an algorithm which looks at a sample of the row first."""
    ramp = torch.arange(n, dtype=torch.float32)
    outliers = torch.zeros(n)
    outliers[1::97] = torch.arange(outliers[1::97].numel(), dtype=torch.float32) + 1
    return {
        "ascending": ramp,
        "descending": ramp.flip(0),
        "periodic": ramp % 8,
        "period_of_a_vector": ramp % 16 + (ramp // 16) * 1e-3,
        "sawtooth": ramp % 1000 + ramp / n,
        "organ_pipe": torch.minimum(ramp, n - ramp),
        "best_at_the_end": torch.cat([torch.zeros(n - n // 50), torch.arange(n // 50) + 1.0]),
        "best_at_the_start": torch.cat([torch.arange(n // 50) + 1.0, torch.zeros(n - n // 50)]),
        "off_the_stride": outliers,
        "two_values": (ramp % 3 == 0).float(),
        "geometric": torch.exp2(-(ramp % 250)),
        "nan_runs": torch.where((ramp // 300) % 2 == 0, torch.tensor(NAN), ramp),
    }


@pytest.mark.parametrize("name", list(orders(100)))
@pytest.mark.parametrize(("n", "ks"), [(5000, (1, 50, 1024, 4999)), (200_003, (10, 1024, 100_000))])
def test_adversarial_orders(backend: Backend, name: str, n: int, ks: tuple[int, ...]) -> None:
    backend.need(n)
    scores = orders(n)[name]
    for k in ks:
        check(backend, scores, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "layout", ["strided", "transposed", "expanded_row", "expanded_value", "offset", "middle"]
)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    base = normal(40, 60, dtype=dtype)
    scores = {
        "strided": base[::3, 1::2],
        "transposed": base.t(),
        "expanded_row": base[:1].expand(7, 60),
        "expanded_value": base[:, :1].expand(40, 9),
        "offset": base.view(-1)[3:1003],
        "middle": base.view(4, 10, 60).transpose(0, 1)[:, :, 5:50],
    }[layout]
    for k in (1, 5, scores.shape[-1]):
        check(backend, scores, k)


def test_same_bits_again(backend: Backend) -> None:
    scores = (normal(30_000) * 8).round()
    first = backend.topk(scores, 3000)
    for _ in range(3):
        for again, result in zip(backend.topk(scores, 3000), first, strict=True):
            assert_same_bits(again, result)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("shape", "k"), [((1_000_000,), 5000), ((64, 5000), 100), ((3, 200_000), 150_000)]
)
def test_same_bits_at_any_thread_count(cpu: Backend, shape: tuple[int, ...], k: int) -> None:
    scores = (normal(*shape) * 100).round()  # many ties
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(cpu.topk(scores, k))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)
    check(cpu, scores, k)


# Few distinct values make ties, the whole range of floats makes everything else.
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 1e-45, 2.0])
rows = st.one_of(st.lists(few, max_size=80), st.lists(st.floats(width=32), max_size=80))


@given(rows, st.data())
def test_equals_a_stable_sort(row: list[float], data: st.DataObject) -> None:
    backend = Backend("cpu")
    k = data.draw(st.integers(0, len(row)))
    scores = torch.tensor(row, dtype=torch.float32)
    check(backend, scores, k)
    for largest, in_order in ORDERS:
        values, indices = backend.topk(scores, k, largest=largest, sorted=in_order)
        assert_same_bits(values, scores[indices])
        assert len(set(indices.tolist())) == k
        if not in_order:
            assert indices.tolist() == sorted(indices.tolist())


@given(rows)
def test_chosen_and_left_out_partition_the_row(row: list[float]) -> None:
    # What the k best leave out are the N - k worst, up to ties.
    backend = Backend("cpu")
    scores = torch.tensor(row, dtype=torch.float32)
    for k in {0, len(row) // 2, len(row)}:
        best = backend.topk(scores, k).values.numpy()
        worst = backend.topk(scores, len(row) - k, largest=False).values.numpy()
        together = np.concatenate([best, worst[::-1]]) + 0.0
        expected = np.sort(scores.numpy() + 0.0)[::-1]  # NumPy sorts NaN last, as the largest
        np.testing.assert_array_equal(together, expected)


def test_values_are_differentiable() -> None:
    scores = normal(3, 20).requires_grad_()
    values, indices = ops.topk(scores, 4)
    weight = torch.arange(12.0).view(3, 4)
    (grad,) = torch.autograd.grad((values * weight).sum(), scores)
    assert torch.equal(grad, torch.zeros(3, 20).scatter(1, indices, weight))
    assert not indices.requires_grad
    with torch.no_grad():
        assert not ops.topk(scores, 4).values.requires_grad


SCORES = torch.zeros(2, 8)
WRONG: list[tuple[tuple[Any, Any], type[Exception], str]] = [
    (([1.0], 1), TypeError, "topk: scores must be a tensor, got list"),
    (
        (SCORES.int(), 1),
        TypeError,
        "topk: scores must be float32, float16, bfloat16 or float64, got int32",
    ),
    ((SCORES, True), TypeError, "topk: k must be an int, got bool"),
    ((SCORES, "3"), TypeError, "topk: k must be an int, got str"),
    ((SCORES, 2.0), TypeError, "topk: k must be an int, got float"),
    ((SCORES, None), TypeError, "topk: k must be an int, got NoneType"),
    (
        (SCORES[0, 0], 0),
        ValueError,
        "topk: scores must have at least one dimension, got shape []",
    ),
    (
        (SCORES, 9),
        ValueError,
        "topk: k must be between 0 and 8 (the size of the last dimension), got 9",
    ),
    (
        (SCORES, -1),
        ValueError,
        "topk: k must be between 0 and 8 (the size of the last dimension), got -1",
    ),
    (
        (SCORES[:, :0], 1),
        ValueError,
        "topk: k must be between 0 and 0 (the size of the last dimension), got 1",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments(arguments: tuple[Any, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        ops.topk(*arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((SCORES, 9), "topk: k must be between 0 and 8 (the size of the last dimension), got 9"),
        ((SCORES, -1), "topk: k must be between 0 and 8 (the size of the last dimension), got -1"),
        ((SCORES.int(), 1), "topk: scores must be float32, float16"),
        ((SCORES[0, 0], 0), "topk: scores must have at least one dimension, got []"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operator_refuses_them_too(backend: Backend, arguments: tuple[Any, Any], text: str) -> None:
    scores, k = arguments
    with pytest.raises(RuntimeError, match=re.escape(text)):
        backend.ops.topk(scores.to(backend.device), k)
