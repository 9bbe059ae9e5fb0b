"""`weighted_sample` against its reference, and its draws against the distribution they are of."""

from __future__ import annotations

import math
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


def seed_of(value: int) -> Tensor:
    """A seed argument."""
    return torch.tensor([value])


def check_without(backend: Backend, weights: Tensor, n: int, seed: int) -> None:
    """The reference's draws of each row; where its keys are equal to rounding, either order."""
    drawn = backend.weighted_sample(weights, n, seed_of(seed))
    assert drawn.indices.shape == drawn.probs.shape == (*weights.shape[:-1], n)
    assert drawn.indices.dtype == torch.int64
    assert drawn.probs.dtype == torch.float32
    wide = weights.dtype == torch.float64
    rows = weights.double().reshape(-1, weights.shape[-1]).numpy()
    indices = drawn.indices.reshape(len(rows), n).cpu().numpy()
    probs = drawn.probs.reshape(len(rows), n).double().cpu().numpy()
    for number, row in enumerate(rows):
        _, expected_probs = reference.weighted_sample(row, n, seed, number, wide=wide)
        keys = np.sort(reference.weighted_keys(row, seed, number, wide=wide))
        found = reference.weighted_keys(row, seed, number, wide=wide)[indices[number]]
        assert len(set(indices[number].tolist())) == n
        np.testing.assert_allclose(found, keys[:n], rtol=1e-6)
        np.testing.assert_allclose(probs[number], expected_probs, rtol=2e-6)


def check_with(backend: Backend, weights: Tensor, n: int, seed: int) -> None:
    """The reference's draws of each row."""
    drawn = backend.weighted_sample(weights, n, seed_of(seed), replacement=True)
    rows = weights.double().reshape(-1, weights.shape[-1]).numpy()
    for number, row in enumerate(rows):
        indices, probs = reference.weighted_sample_with_replacement(row, n, seed, number)
        assert drawn.indices.reshape(len(rows), n)[number].tolist() == indices.tolist()
        found = drawn.probs.reshape(len(rows), n)[number].double().cpu().numpy()
        np.testing.assert_allclose(found, probs, rtol=2e-7)


def uniform(*shape: int, dtype: torch.dtype = torch.float32, zeros: float = 0.2) -> Tensor:
    """Seeded weights, a share of them 0."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(*shape, generator=generator) + 0.01
    weights[torch.rand(*shape, generator=generator) < zeros] = 0
    return weights.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("items", [1, 2, 3, 5, 63, 64, 65, 1000, 4099])
def test_sizes(backend: Backend, items: int, dtype: torch.dtype) -> None:
    weights = uniform(items, dtype=dtype, zeros=0.0)
    for n in sorted({0, 1, items // 3, items - 1, items}):
        check_without(backend, weights, n, 7)
    check_with(backend, weights, 50, 7)


@pytest.mark.parametrize("shape", [(3, 50), (2, 3, 17), (1, 1, 9), (200, 3), (0, 5), (2, 0, 5)])
def test_rows(backend: Backend, shape: tuple[int, ...]) -> None:
    weights = uniform(*shape, zeros=0.0)
    for n in (0, 2):
        check_without(backend, weights, n, -3)
        check_with(backend, weights, n, -3)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345])
def test_seeds(backend: Backend, seed: int) -> None:
    check_without(backend, uniform(70, zeros=0.0), 9, seed)
    check_with(backend, uniform(70), 9, seed)


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-100, 2.0**120])
def test_scales(backend: Backend, scale: float) -> None:
    weights = uniform(300, zeros=0.0)
    plain = backend.weighted_sample(weights, 20, seed_of(5))
    scaled = backend.weighted_sample(weights * scale, 20, seed_of(5))
    assert torch.equal(plain.indices, scaled.indices)
    torch.testing.assert_close(plain.probs, scaled.probs, rtol=1e-6, atol=0)


def test_the_whole_range_of_floats(backend: Backend) -> None:
    weights = torch.tensor([1e-45, 3e38, 1e-40, 1.0, 0.0, 2e38, 1e-20, 5e-39])
    drawn = backend.weighted_sample(weights, 7, seed_of(1)).indices.tolist()
    assert sorted(drawn[:2]) == [1, 5]
    assert drawn[2:5] == [3, 6, drawn[4]]
    assert sorted(drawn[4:]) == [0, 2, 7]


positive = st.floats(2.0**-100, 2.0**100, width=32)


@given(st.lists(st.one_of(positive, st.just(0.0)), min_size=1, max_size=60), st.data())
def test_any_weights(weights: list[float], data: st.DataObject) -> None:
    backend = Backend("cpu")
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    row = torch.tensor(weights)
    most = int((row > 0).sum())
    if most > 0:
        check_with(backend, row.double(), 10, seed)
    check_without(backend, row, data.draw(st.integers(0, most)), seed)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "offset"])
def test_layouts(backend: Backend, layout: str) -> None:
    base = uniform(40, 60, zeros=0.0)
    weights = {
        "strided": base[::3, 1::2],
        "transposed": base.t(),
        "expanded": base[:1].expand(7, 60),
        "offset": base.view(-1)[3:1003],
    }[layout]
    check_without(backend, weights, 5, 11)
    check_with(backend, weights, 5, 11)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_backends_draw_alike(backend: Backend, dtype: torch.dtype, replacement: bool) -> None:
    for shape, n in (((5000,), 600), ((30_001,), 5000), ((70_000,), 100), ((9, 401), 60)):
        weights = uniform(*shape, dtype=dtype)
        n = min(n, shape[-1] // 2)
        ours = Backend("cpu").weighted_sample(weights, n, seed_of(3), replacement=replacement)
        theirs = backend.weighted_sample(weights, n, seed_of(3), replacement=replacement)
        assert torch.equal(ours.indices, theirs.indices.cpu())
        torch.testing.assert_close(ours.probs, theirs.probs.cpu(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("items", "n"), [(1_000_003, 1000), (200_000, 150_000)])
def test_same_bits_at_any_thread_count(cpu: Backend, items: int, n: int, replacement: bool) -> None:
    weights = uniform(items, zeros=0.1)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(cpu.weighted_sample(weights, n, seed_of(9), replacement=replacement))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


def test_wide_weights_draw_like_narrow_ones(cpu: Backend) -> None:
    weights = uniform(5000)
    narrow = cpu.weighted_sample(weights, 300, seed_of(2))
    wide = cpu.weighted_sample(weights.double(), 300, seed_of(2))
    assert (narrow.indices == wide.indices).float().mean() > 0.99


# ---- what the draws are of ----


def chi_square_limit(freedom: int) -> float:
    """What a chi-square exceeds once in a billion (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 6.0 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """How far counts are from what they should be."""
    expected = probs.double() * counts.sum()
    some = expected > 0
    assert (counts[~some] == 0).all()
    return float(((counts[some] - expected[some]).square() / expected[some]).sum())


def test_draws_with_replacement_have_the_weights_shares(cpu: Backend) -> None:
    weights = uniform(1000)
    drawn = cpu.weighted_sample(weights, 10_000_000, seed_of(1), replacement=True).indices
    counts = drawn.bincount(minlength=1000)
    assert chi_square(counts, weights / weights.sum()) < chi_square_limit(799)


def test_draws_without_replacement_follow_one_another(cpu: Backend) -> None:
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    rows = 2_500_000
    drawn = cpu.weighted_sample(weights.expand(rows, 5), 4, seed_of(1)).indices  # 10^7 draws
    first, second = drawn[:, 0], drawn[:, 1]
    pairs = (first * 5 + second).bincount(minlength=25)
    share = weights / weights.sum()
    expected = share[:, None] * share / (1 - share[:, None])
    expected.fill_diagonal_(0)
    assert chi_square(pairs, expected.flatten()) < chi_square_limit(11)
    # Of the last two, one follows the three before in proportion to the weights of what was left.
    third = drawn[(first == 0) & (second == 1), 2].bincount(minlength=5)
    assert chi_square(third, torch.tensor([0, 0, 0.6, 0.4, 0])) < chi_square_limit(1)


@pytest.mark.parametrize("replacement", [False, True])
def test_more_items_than_a_float_counts(cpu: Backend, replacement: bool) -> None:
    # 2^24 + 1000 items, the last thousand twice as heavy as their number: torch draws none of them.
    items = (1 << 24) + 1000
    weights = torch.ones(items)
    weights[-1000:] = 1000.0
    weights[::7] = 0
    drawn = cpu.weighted_sample(weights, 20_000, seed_of(4), replacement=replacement).indices
    assert (weights[drawn] > 0).all()
    half = drawn < items // 2
    tail = drawn >= items - 1000
    shares = torch.stack([half.sum(), (~half & ~tail).sum(), tail.sum()])
    mass = torch.stack(
        [weights[: items // 2].sum(dtype=torch.float64),
         weights[items // 2 : -1000].sum(dtype=torch.float64),
         weights[-1000:].sum(dtype=torch.float64)]
    )  # fmt: skip
    if replacement:
        assert chi_square(shares, mass / mass.sum()) < chi_square_limit(2)
    else:
        assert len(drawn.unique()) == 20_000
        assert chi_square(shares[:2], mass[:2] / mass[:2].sum()) < chi_square_limit(1)


@pytest.mark.parametrize("replacement", [False, True])
def test_estimates_are_unbiased(cpu: Backend, replacement: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(60, generator=generator).exp()
    weights = values * (0.3 + torch.rand(60, generator=generator))
    rows, n = 400_000, 8
    drawn = cpu.weighted_sample(weights.expand(rows, 60), n, seed_of(6), replacement=replacement)
    terms = (values[drawn.indices] / drawn.probs).double()
    estimates = terms.mean(1) if replacement else terms.sum(1)
    error = float(estimates.mean() - values.double().sum())
    assert abs(error) < 5 * float(estimates.std()) / math.sqrt(rows)


def test_every_seed_draws_anew(cpu: Backend) -> None:
    weights = torch.ones(1000)
    draws = {tuple(cpu.weighted_sample(weights, 5, seed_of(s)).indices.tolist()) for s in range(50)}
    assert len(draws) == 50
    torch.manual_seed(1)
    first = ops.weighted_sample(weights, 5)
    second = ops.weighted_sample(weights, 5)
    assert not torch.equal(first.indices, second.indices)
    torch.manual_seed(1)
    assert torch.equal(first.indices, ops.weighted_sample(weights, 5).indices)
    generator = torch.Generator().manual_seed(4)
    again = torch.Generator().manual_seed(4)
    drawn = [ops.weighted_sample(weights, 5, generator=g).indices for g in (generator, again)]
    assert torch.equal(*drawn)


# ---- wrong weights ----

WRONG = {"negative": -1.0, "nan": NAN, "infinite": INF, "minus_infinite": -INF}


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_wrong_weights(backend: Backend, name: str, replacement: bool, dtype: torch.dtype) -> None:
    for items, at in ((5, 3), (700, 699), (9000, 4500)):
        weights = torch.ones(2, items, dtype=dtype)
        weights[1, at] = WRONG[name]
        sample: Any = lambda w=weights: backend.weighted_sample(  # noqa: E731
            w, 2, seed_of(0), replacement=replacement
        )
        if backend.name == "cpu":
            with pytest.raises(
                ValueError, match=f"finite and not negative, got .* at {at} in row 1"
            ):
                sample()
        else:
            drawn = sample()
            assert drawn.probs.isnan().tolist() == [[False] * 2, [True] * 2]
            assert (drawn.indices[1] < -items).all()
            assert (drawn.indices[0] >= 0).all()


@pytest.mark.parametrize("replacement", [False, True])
def test_too_few_positive_weights(backend: Backend, replacement: bool) -> None:
    for weights, n in (([0.0, 0.0, -0.0], 1), ([0.0, 2.0, 0.0, 1.0], 3)):
        if replacement and n == 3:
            continue
        row = torch.tensor(weights)
        if backend.name == "cpu":
            match = (
                "no weight is positive in row 0" if replacement else "number of positive weights"
            )
            with pytest.raises(ValueError, match=match):
                backend.weighted_sample(row, n, seed_of(0), replacement=replacement)
        else:
            drawn = backend.weighted_sample(row, n, seed_of(0), replacement=replacement)
            assert drawn.probs[-1].isnan()
            assert int(drawn.indices[-1]) < -len(weights)
    assert backend.weighted_sample(torch.zeros(3), 0, seed_of(0)).indices.shape == (0,)


def test_arguments() -> None:
    weights, seed = torch.ones(4), seed_of(0)
    sample: Any = ops.weighted_sample
    for arguments, error, match in (
        (([1.0], 1, seed), TypeError, "weights must be a tensor, got list"),
        ((weights.int(), 1, seed), TypeError, "weights must be float32, .*, got int32"),
        ((weights, 1.0, seed), TypeError, "n must be an int, got float"),
        ((torch.tensor(1.0), 1, seed), ValueError, "at least one dimension, got shape"),
        ((weights, 5, seed), ValueError, "n must not be negative and at most 4, got 5"),
        ((weights, -1, seed), ValueError, "n must not be negative and at most 4, got -1"),
        ((torch.ones(0), 1, seed), ValueError, "at most 0, got 1"),
        ((weights, 1, 3), TypeError, "seed must be a tensor, got int"),
        ((weights, 1, torch.tensor([1, 2])), TypeError, r"one int64, got \[2\] of int64"),
        ((weights, 1, torch.tensor([1.0])), TypeError, r"one int64, got \[1\] of float32"),
    ):
        with pytest.raises(error, match=f"weighted_sample: .*{match}"):
            sample(*arguments)
    with pytest.raises(ValueError, match="seed and generator were both given"):
        sample(weights, 1, seed, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="seed must be one int64"):
        torch.ops.fastsel.weighted_sample(weights, 1, torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="n must be at most 4"):
        torch.ops.fastsel.weighted_sample(weights, 5, seed)
