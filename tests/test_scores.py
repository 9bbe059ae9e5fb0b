"""`sample_scores` against its reference, on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import Backend, assert_same_bits, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from samples import logits_and_target
from torch import Tensor

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [
    (0, 10),
    (1, 1),
    (5, 1),
    (1, 2),
    (7, 10),
    (33, 33),
    (17, 1000),
    (5, 4097),
    (2, 50_257),
    (1, 262_144),
]


def tolerance(dtype: torch.dtype, classes: int) -> float:
    """Relative error allowed in a sum of exponentials.

    Whatever the input's dtype, float32 does the sums: a few roundings (6e-8) in each exponential,
    and adding C of them in some order, whose rounding errors grow like sqrt(C). In float64 the
    reference rounds as the kernel does: log-odds of up to 128 by 1.4e-14.
    """
    if dtype == torch.float64:
        return 2.8e-14 + 1.1e-16 * math.sqrt(classes)
    return 6e-8 * (16 + math.sqrt(classes))


def check(backend: Backend, logits: Tensor, target: Tensor, **kwargs: Any) -> None:
    """Compares all four scores with the reference."""
    actual = backend.sample_scores(logits, target, **kwargs)
    classes = logits.shape[1]
    expected = reference.sample_scores(to_numpy(logits), target.cpu().numpy(), **kwargs)
    out_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for score in actual:
        assert score.dtype == out_dtype
        assert score.shape == target.shape
        assert score.device.type == backend.device.type
    rtol = tolerance(logits.dtype, classes)
    # Below the smallest normal float32 a GPU may flush to zero.
    tiny = 0.0 if out_dtype == torch.float64 else 1.2e-38
    with np.errstate(over="ignore"):  # a loss beyond float32 is inf, there and here
        loss, grad_norm, entropy, lse = (
            to_numpy(torch.from_numpy(score).to(out_dtype)) for score in expected
        )
    np.testing.assert_allclose(to_numpy(actual.loss), loss, rtol=rtol, atol=tiny)
    np.testing.assert_allclose(to_numpy(actual.grad_norm), grad_norm, rtol=rtol, atol=tiny)
    # The entropy among the classes other than the target is a difference of numbers up to log C; it
    # weighs 1 - p_y.
    entropy_atol = rtol * math.log(classes + 1) * np.nan_to_num(np.minimum(grad_norm, 1.0)) + tiny
    error = np.abs(to_numpy(actual.entropy) - entropy)
    same_nan = np.isnan(to_numpy(actual.entropy)) == np.isnan(entropy)
    assert same_nan.all()
    assert (np.nan_to_num(error) <= rtol * np.nan_to_num(entropy) + entropy_atol).all()
    # logsumexp adds the largest logit to log of the sum, and may come out near zero.
    np.testing.assert_allclose(to_numpy(actual.lse), lse, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("batch_size", "classes"), SHAPES)
def test_shapes(backend: Backend, batch_size: int, classes: int, dtype: torch.dtype) -> None:
    backend.need(batch_size * classes)
    generator = torch.Generator().manual_seed(classes)
    check(backend, *logits_and_target(generator, batch_size, classes, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [2, 10, 129, 1000])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_margins(backend: Backend, classes: int, right: bool, dtype: torch.dtype) -> None:
    # One logit stands out by 0 to 100: the relative precision must not depend on by how much.
    margins = torch.arange(0.0, 101.0, 4.0)
    generator = torch.Generator().manual_seed(1)
    logits = 0.5 * torch.randn(len(margins), classes, generator=generator)
    standing_out = torch.randint(0, classes, (len(margins),), generator=generator)
    logits[torch.arange(len(margins)), standing_out] += margins
    target = standing_out if right else (standing_out + 1) % classes
    check(backend, logits.to(dtype), target)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 1 << 40])
def test_ignore_index(backend: Backend, ignore_index: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, target = logits_and_target(generator, 40, 12, ignored=0.5, ignore_index=ignore_index)
    check(backend, logits, target, ignore_index=ignore_index)
    scores = backend.sample_scores(logits, target, ignore_index=ignore_index)
    ignored = target == ignore_index
    assert ignored.any()
    for score in scores:
        assert (score.cpu()[ignored] == 0).all()


def test_ignored_rows_may_hold_anything(backend: Backend) -> None:
    logits = torch.full((3, 5), NAN)
    logits[1] = 1.0
    scores = backend.sample_scores(logits, torch.tensor([-100, 2, -100]))
    for score in scores:
        assert score[0] == 0
        assert score[2] == 0
        assert score[1].isfinite()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 3e38),
        (torch.float16, 6e4),
        (torch.bfloat16, 3e38),
        (torch.float64, 1e300),
    ],
    ids=str,
)
def test_huge_logits(backend: Backend, dtype: torch.dtype, size: float) -> None:
    rows = [
        [size, -size, 0.0],
        [size, size, 0.0],
        [-size, -size, -size],
        [0.0, size, size],
        [1.0, -size, 2.0],
    ]
    logits = torch.tensor(rows, dtype=dtype)
    for y in range(3):
        check(backend, logits, torch.full((len(rows),), y))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_offset_keeps_precision(backend: Backend, offset: float) -> None:
    # A common offset of 1e4 leaves float32 logits 11 bits after the point; the reference sees the
    # same numbers.
    generator = torch.Generator().manual_seed(3)
    logits, target = logits_and_target(generator, 16, 100)
    check(backend, logits + offset, target)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_classes(backend: Backend, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, target = logits_and_target(generator, 20, 40, dtype=dtype)
    masked = torch.rand(20, 40, generator=generator) < 0.5
    masked[torch.arange(20), target] = False
    masked[0] = torch.arange(40) != target[0]  # nothing but the target is left
    check(backend, logits.masked_fill(masked, -INF), target)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_target(backend: Backend, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-INF, 1.0, 2.0], [-INF, -INF, 0.5]], dtype=dtype)
    target = torch.tensor([0, 1])
    check(backend, logits, target)
    scores = backend.sample_scores(logits, target)
    assert scores.loss.tolist() == [INF, INF]
    assert scores.grad_norm[1].item() == pytest.approx(math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 40, 3000])
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_not_a_number(backend: Backend, dtype: torch.dtype, classes: int, poison: float) -> None:
    # Each row is poisoned in another place, of which one is the target's; clean rows between them
    # stay clean.
    logits = torch.zeros(9, classes, dtype=dtype)
    places = torch.linspace(0, classes - 1, 5).long()
    logits[torch.arange(0, 9, 2), places] = poison
    target = torch.full((9,), int(places[1]))
    for score in backend.sample_scores(logits, target):
        assert score[::2].isnan().all()
        assert score[1::2].isfinite().all()


@pytest.mark.parametrize("classes", [1, 7, 3000])
def test_everything_masked_is_not_a_number(backend: Backend, classes: int) -> None:
    for score in backend.sample_scores(
        torch.full((2, classes), -INF), torch.zeros(2, dtype=torch.int64)
    ):
        assert score.isnan().all()


@pytest.mark.parametrize(
    "layout", ["transposed", "strided", "expanded_rows", "expanded_classes", "offset", "flipped"]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    base = torch.randn(60, 60, generator=torch.Generator().manual_seed(5)).to(dtype)
    logits = {
        "transposed": lambda: base.t(),
        "strided": lambda: base[::3, 1::2],
        "expanded_rows": lambda: base[:1].expand(20, 60),
        "expanded_classes": lambda: base[:, :1].expand(60, 20),
        "offset": lambda: base.view(-1)[3 : 3 + 59 * 60].view(59, 60),
        "flipped": lambda: base.unfold(0, 20, 1)[:, 0],
    }[layout]()
    target = torch.arange(2 * logits.shape[0]).remainder(logits.shape[1])[::2]
    assert not target.is_contiguous()
    check(backend, logits, target)
    check(backend, logits, target[:1].expand(logits.shape[0]))


def test_same_bits_again(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(6)
    logits, target = logits_and_target(generator, 9, 5000)
    first = backend.sample_scores(logits, target)
    for _ in range(3):
        for again, score in zip(backend.sample_scores(logits, target), first, strict=True):
            assert_same_bits(again, score)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("batch_size", "classes"), [(1, 262_144), (300, 1000), (3, 50_257)])
def test_same_bits_at_any_thread_count(cpu: Backend, batch_size: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(7)
    logits, target = logits_and_target(generator, batch_size, classes)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(cpu.sample_scores(logits, target))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


rows = st.integers(1, 70).flatmap(
    lambda classes: st.lists(
        st.lists(st.floats(-60, 60, width=32), min_size=classes, max_size=classes),
        min_size=1,
        max_size=6,
    )
)


@given(rows, st.integers(0, 1 << 30))
def test_properties(rows: list[list[float]], pick: int) -> None:
    backend = Backend("cpu")
    logits = torch.tensor(rows)
    classes = logits.shape[1]
    target = torch.tensor([(pick + 7 * b) % classes for b in range(len(rows))])
    check(backend, logits, target)
    scores = backend.sample_scores(logits, target)
    assert (scores.loss >= 0).all()
    assert (scores.grad_norm >= 0).all()
    # ||p - onehot|| is largest where another class has all the mass; 2e-7: one rounding either way.
    assert (scores.grad_norm <= math.sqrt(2) * (1 + 2e-7)).all()
    assert (scores.entropy >= 0).all()
    assert (scores.entropy <= math.log(classes) * (1 + 1e-6) + 1e-6).all()


@given(rows, st.integers(0, 1 << 30), st.integers(-64, 64))
def test_shift_invariance(rows: list[list[float]], pick: int, shift: int) -> None:
    # Quarters up to 60 and whole shifts are exact in float32, so the shifted rows are the same
    # rows.
    backend = Backend("cpu")
    logits = (torch.tensor(rows) * 4).round() / 4
    target = torch.full((len(rows),), pick % logits.shape[1])
    plain = backend.sample_scores(logits, target)
    shifted = backend.sample_scores(logits + shift, target)
    rtol = tolerance(torch.float32, logits.shape[1])
    for name in ("loss", "grad_norm", "entropy"):
        torch.testing.assert_close(
            getattr(shifted, name), getattr(plain, name), rtol=rtol, atol=rtol * 1e-3
        )
    # logsumexp itself moves by the shift and rounds at its new size, at most 124.
    torch.testing.assert_close(shifted.lse, plain.lse + shift, rtol=0, atol=124 * 2e-7)


@given(rows, st.randoms(use_true_random=False))
def test_permutation_equivariance(rows: list[list[float]], random: Any) -> None:
    backend = Backend("cpu")
    logits = torch.tensor(rows)
    classes = logits.shape[1]
    target = torch.tensor([random.randrange(classes) for _ in rows])
    classes_order = torch.tensor(random.sample(range(classes), classes))
    rows_order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    plain = backend.sample_scores(logits, target)
    permuted = backend.sample_scores(
        logits[rows_order][:, classes_order], classes_order.argsort()[target[rows_order]]
    )
    rtol = tolerance(torch.float32, classes)
    for one, other in zip(plain, permuted, strict=True):
        # Another order of adding: the tolerance of the sums, twice; the entropy's and logsumexp's
        # are absolute.
        torch.testing.assert_close(
            other, one[rows_order], rtol=2 * rtol, atol=2 * rtol * math.log(classes + 1)
        )
