"""`neighbor_sample` against its reference, and what its probabilities are for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference_sampling as reference
import torch
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsel import ops


def seed_of(value: int) -> Tensor:
    """A seed argument."""
    return torch.tensor([value])


def make(
    rows: int, width: int, anchors: int, seed: int = 0, zeros: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """A table of random neighbours, and weighted anchors, some of them twice or of weight 0."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(rows, (rows, width), generator=generator)
    picked = torch.randint(rows, (anchors,), generator=generator)
    weights = torch.rand(anchors, generator=generator) + 0.01
    weights[torch.rand(anchors, generator=generator) < zeros] = 0
    weights[0] = 0.5
    return table, picked, weights


def check(backend: Backend, table: Tensor, anchors: Tensor, weights: Tensor, n: int) -> None:
    """The draws and probabilities of the reference."""
    drawn = backend.neighbor_sample(table, anchors, weights, n, seed_of(5))
    assert drawn.indices.dtype == torch.int64
    assert drawn.probs.dtype == torch.float32
    indices, probs = reference.neighbor_sample(
        table.numpy().astype(np.int64), anchors.numpy(), weights.double().numpy(), n, 5
    )
    assert drawn.indices.tolist() == indices.tolist()
    np.testing.assert_allclose(drawn.probs.double().cpu().numpy(), probs, rtol=2e-7)
    again = backend.neighbor_probs(table, anchors, weights, drawn.indices)
    assert torch.equal(again, drawn.probs)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize(
    ("rows", "width", "anchors"), [(1, 1, 1), (5, 3, 2), (40, 32, 33), (300, 7, 100), (50, 65, 4)]
)
def test_sizes(
    backend: Backend, rows: int, width: int, anchors: int, dtype: torch.dtype, ids: torch.dtype
) -> None:
    table, picked, weights = make(rows, width, anchors)
    check(backend, table.to(ids), picked, weights.to(dtype), 20)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31))
def test_any_table(rows: int, width: int, anchors: int, seed: int) -> None:
    check(Backend("cpu"), *make(rows, width, anchors, seed), 10)


def test_layouts(backend: Backend) -> None:
    table, picked, weights = make(60, 20, 30)
    check(backend, table[:, ::3], picked[::2], weights[::2], 9)
    check(backend, table.t()[:20, :20] % 20, picked % 20, weights, 9)
    check(backend, table, picked, weights, 0)
    check(backend, table[:, :1].expand(60, 5), picked, weights, 9)


def test_no_neighbours(backend: Backend) -> None:
    table, picked, weights = make(6, 3, 4)
    for empty in ((table[:, :0], picked, weights), (table, picked[:0], weights[:0])):
        assert backend.neighbor_sample(*empty, 0, seed_of(0)).indices.shape == (0,)


def test_a_mixture_with_uniform_draws_is_unbiased(cpu: Backend) -> None:
    # Half of a batch from neighbours, half from all: each sample is weighted by the probability
    # that either gives it.
    table, picked, weights = make(40, 5, 10)
    values = torch.randn(40).exp()
    n = 400_000
    near = cpu.neighbor_sample(table, picked, weights, n, seed_of(1))
    far = torch.randint(40, (n,), generator=torch.Generator().manual_seed(2))
    everywhere = cpu.neighbor_probs(table, picked, weights, torch.arange(40)).double()
    torch.testing.assert_close(near.probs.double(), everywhere[near.indices], rtol=1e-6, atol=0)
    mixture = 0.5 * everywhere + 0.5 / 40
    estimates = torch.cat([values[i] / mixture[i] for i in (near.indices, far)])
    error = float(estimates.mean() - values.double().sum())
    assert abs(error) < 5 * float(estimates.std()) / math.sqrt(2 * n)


def test_draws_have_their_probabilities(cpu: Backend) -> None:
    table, picked, weights = make(40, 5, 10)
    n = 1_000_000
    drawn = cpu.neighbor_sample(table, picked, weights, n, seed_of(3))
    counts = drawn.indices.bincount(minlength=40).double()
    probs = torch.zeros(40, dtype=torch.float64)
    probs[drawn.indices] = drawn.probs.double()
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0, dtype=torch.float64))
    some = probs > 0
    chi = float(((counts - n * probs)[some].square() / (n * probs)[some]).sum())
    freedom = int(some.sum()) - 1
    assert chi < freedom * (1 - 2 / (9 * freedom) + 6 * math.sqrt(2 / (9 * freedom))) ** 3


WRONG: dict[str, tuple[str, int, float, type[Exception], str]] = {
    "anchor": ("anchors", 1, 9, IndexError, "anchors must be between 0 and 5, got 9 at 1"),
    "negative anchor": ("anchors", 0, -1, IndexError, "anchors must be .*, got -1 at 0"),
    "id": ("table", 0, 6, IndexError, "ids between 0 and 5, got 6 at"),
    "negative id": ("table", 0, -1, IndexError, "ids between 0 and 5, got -1 at"),
    "weight": ("weights", 2, -1.0, ValueError, "not negative, got -1 at 2"),
    "nan": ("weights", 2, math.nan, ValueError, "finite and not negative, got -?nan at 2"),
    "infinite": ("weights", 3, math.inf, ValueError, "finite and not negative, got inf at 3"),
    "nothing": ("weights", -1, 0.0, ValueError, "no weight of anchor_weights is positive"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values(backend: Backend, name: str) -> None:
    which, at, value, error, match = WRONG[name]
    table, picked, weights = torch.zeros(6, 3, dtype=torch.int64), torch.arange(4), torch.ones(4)
    target = {"anchors": picked, "table": table, "weights": weights}[which]
    if which == "table" or at < 0:
        target.fill_(value)
    else:
        target[at] = value
    if backend.name == "cpu":
        with pytest.raises(error, match=match):
            backend.neighbor_sample(table, picked, weights, 2, seed_of(0))
    else:
        drawn = backend.neighbor_sample(table, picked, weights, 2, seed_of(0))
        assert drawn.probs.isnan().all()
        assert (drawn.indices < -6).all()
        if which != "table":
            assert backend.neighbor_probs(table, picked, weights, torch.arange(6)).isnan().all()


def test_arguments() -> None:
    table, picked, weights = make(6, 3, 4)
    sample: Any = ops.neighbor_sample
    for arguments, error, match in (
        (([1], picked, weights, 1), TypeError, "table must be a tensor, got list"),
        ((table.float(), picked, weights, 1), TypeError, "table must be int64 or int32, got float"),
        ((table, picked.int(), weights, 1), TypeError, "anchors must be int64, got int32"),
        ((table, picked, picked, 1), TypeError, "anchor_weights must be float32"),
        ((table[0], picked, weights, 1), ValueError, r"table must be \[N, K\], got \[3\]"),
        ((table, table, weights, 1), ValueError, r"anchors must be \[A\], got \[6, 3\]"),
        ((table, picked, weights[:2], 1), ValueError, r"must be \[4\] like anchors, got \[2\]"),
        ((table, picked, weights, -1), ValueError, "n must not be negative, got -1"),
        ((table[:, :0], picked, weights, 1), ValueError, "0 where there are no neighbours, got 1"),
        ((table, picked, weights, 1.5), TypeError, "n must be an int, got float"),
        ((table, picked, weights, 1, 7), TypeError, "seed must be a tensor, got int"),
    ):
        with pytest.raises(error, match=f"neighbor_sample: .*{match}"):
            sample(*arguments)
    probs: Any = ops.neighbor_probs
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((table, picked, weights, [1]), TypeError, "ids must be a tensor, got list"),
        ((table, picked, weights, picked.int()), TypeError, "ids must be int64, got int32"),
        ((table, picked, weights, table), ValueError, r"ids must be \[n\], got \[6, 3\]"),
        ((table, picked[:0], weights[:0], picked), ValueError, "ids must be empty where there are"),
        ((table, picked, weights, picked + 9), IndexError, "ids must be between 0 and 5, got"),
    ]
    for values, raised, text in wrong:
        with pytest.raises(raised, match=f"neighbor_probs: .*{text}"):
            probs(*values)
    raw = torch.ops.fastsel.neighbor_sample
    with pytest.raises(RuntimeError, match=r"anchor_weights must be \[4\] like anchors"):
        raw(table, picked, weights[:2], 1, seed_of(0))
    with pytest.raises(RuntimeError, match="there are no neighbours to draw 1 from"):
        raw(table, picked[:0], weights[:0], 1, seed_of(0))
