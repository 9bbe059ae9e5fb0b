"""Importance sampling: how often each sample comes, and that the weights undo it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsel.scores import Scores
from fastsel.select import ImportanceSampling, variance_reduction

NAN, INF = float("nan"), float("inf")
DRAWS = 200_000


def many_draws(scores: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices and weights of 200,000 draws, in batches of the size of `scores`."""
    generator = torch.Generator().manual_seed(seed)
    selector = ImportanceSampling(1.0, "loss", generator=generator)
    rounds = [selector.select(Scores(loss=scores)) for _ in range(DRAWS // len(scores))]
    weights = [choice.weights for choice in rounds if choice.weights is not None]
    return torch.cat([choice.indices for choice in rounds]), torch.cat(weights)


def test_draws_in_proportion_to_the_score() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0, 0.5, 0.5, 0.0])
    indices, weights = many_draws(scores)
    probability = scores.double() / scores.double().sum()
    counts = torch.bincount(indices, minlength=8).double()
    assert (counts[scores == 0] == 0).all()
    deviation = (len(indices) * probability * (1 - probability)).sqrt()
    # Five deviations of a binomial count, for 5 counts: a wrong alarm once in 350,000 seeds.
    assert ((counts - len(indices) * probability).abs() <= 5 * deviation).all()
    # Up to the probabilities' unit and one float32 rounding.
    expected = (1 / (8 * probability[indices])).float()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_the_weighted_mean_is_unbiased() -> None:
    """Also where scores and losses have little to do with each other."""
    generator = torch.Generator().manual_seed(3)
    losses = torch.randn(50, generator=generator, dtype=torch.float64).exp()
    scores = torch.rand(50, generator=generator).add_(0.05)
    scores[7], scores[11], scores[30] = NAN, INF, -1.0
    valid = torch.ones(50, dtype=torch.bool)
    valid[[7, 11, 30]] = False
    indices, weights = many_draws(scores)
    assert valid[indices].all()
    probability = scores[valid].double() / scores[valid].double().sum()
    truth = losses[valid].mean()
    single = losses[valid] / (47 * probability)  # one draw's weighted loss
    deviation = ((probability * single.square()).sum() - truth.square()).sqrt()
    estimate = (weights.double() * losses[indices]).mean()
    # The mean of n independent draws: 4.4 deviations, wrong once in 90,000 seeds. Theirs is
    # 0.27 % of the truth, so that weights 2 % off would show.
    assert abs(estimate - truth) < 4.4 * deviation / math.sqrt(len(indices))
    assert deviation / math.sqrt(len(indices)) < 0.003 * truth


def test_the_weighted_gradient_is_unbiased() -> None:
    """Scores by gradient norm, where a sample without a gradient is never drawn."""
    inputs = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-3.0, 0.5], [0.1, 0.1]])
    norms = torch.linalg.vector_norm(inputs, dim=1)
    indices, weights = many_draws(norms, seed=5)
    estimate = (weights[:, None] * inputs[indices]).double().mean(0)
    truth = inputs.double().mean(0)
    probability = norms.double() / norms.double().sum()
    second = (probability[1:, None] * (inputs[1:].double() / (4 * probability[1:, None])) ** 2).sum(
        0
    )
    deviation = ((second - truth**2) / len(indices)).sqrt()
    # As above, for two entries.
    assert ((estimate - truth).abs() < 4.4 * deviation).all()


@given(
    scores=st.lists(
        st.one_of(st.floats(0, 2.0**100, width=32), st.sampled_from([0.0, NAN, INF, -INF, -2.0])),
        min_size=1,
        max_size=20,
    ),
    rate=st.floats(0.01, 1.0),
)
def test_draws_only_what_it_may(scores: list[float], rate: float) -> None:
    values = torch.tensor(scores, dtype=torch.float32)
    selector = ImportanceSampling(rate, "loss")
    indices, weights = selector.select(Scores(loss=values))
    assert weights is not None
    assert weights.isfinite().all()
    assert (weights > 0).all()
    valid = values.isfinite() & (values >= 0)
    assert selector.excluded == int((~valid).sum())
    if not valid.any():
        assert (weights == 1).all()
    else:
        assert valid[indices].all()
        if (values[valid] > 0).any():
            assert (values[indices] > 0).all()
        else:  # all are 0: all valid ones alike
            assert (weights == 1).all()


def test_scores_that_leave_nothing_to_chance() -> None:
    one = torch.zeros(1000)
    one[637] = 1e-40
    choice = ImportanceSampling(0.1, "loss").select(Scores(loss=one))
    assert choice.indices.tolist() == [637] * 100
    assert choice.weights is not None
    # 1 / (B p) with p = 1, rounded once.
    torch.testing.assert_close(choice.weights, torch.full((100,), 1e-3), rtol=1e-7, atol=0)


def test_scores_far_apart() -> None:
    """The smallest scores stay possible, at the price of the weight that belongs to them."""
    scores = torch.tensor([1.0, 1e-30])
    selector = ImportanceSampling(1.0, "loss")
    choice = selector.select(Scores(loss=scores))
    assert choice.indices.tolist() == [0, 0]
    many = torch.full((4096,), 1e-30)
    many[0] = 1.0
    indices, weights = many_draws(many)
    assert (indices == 0).double().mean() > 0.999
    assert weights.min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    choice = ImportanceSampling(0.5).select(Scores(grad_norm=torch.rand(8).to(dtype)))
    assert choice.weights is not None
    assert choice.weights.dtype == torch.promote_types(dtype, torch.float32)
    empty = ImportanceSampling(0.5).select(Scores(grad_norm=torch.rand(0).to(dtype)))
    assert empty.weights is not None
    assert empty.weights.dtype == torch.promote_types(dtype, torch.float32)
    assert empty.indices.numel() == empty.weights.numel() == 0


def test_the_generator_decides() -> None:
    scores = Scores(grad_norm=torch.rand(64))
    first, again, other = (
        ImportanceSampling(0.5, generator=torch.Generator().manual_seed(seed)).select(scores)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)
    torch.manual_seed(4)
    one = ImportanceSampling(0.5)(scores)
    torch.manual_seed(4)
    assert torch.equal(ImportanceSampling(0.5)(scores), one)
    elsewhere = Scores(grad_norm=torch.empty(4, device="meta"))
    with pytest.raises(ValueError, match="generator must be on meta as the scores are"):
        ImportanceSampling(0.5, generator=torch.Generator())(elsewhere)


def test_traces() -> None:
    selector, eager = ImportanceSampling(0.5), ImportanceSampling(0.5)

    def choose(norms: Tensor) -> tuple[Tensor, Tensor | None]:
        choice = selector.select(Scores(grad_norm=norms))
        return choice.indices, choice.weights

    compiled: Any = torch.compile(choose, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (8, 20, 33):
        norms = torch.rand(size)
        norms[2] = NAN
        torch.manual_seed(size)
        indices, weights = compiled(norms)
        torch.manual_seed(size)
        expected = eager.select(Scores(grad_norm=norms))
        assert torch.equal(indices, expected.indices)
        assert expected.weights is not None
        # Divisions that a compiler may turn into products of reciprocals.
        torch.testing.assert_close(weights, expected.weights, rtol=3e-7, atol=0)
    assert selector.excluded == 3


# ---- tau ----


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_variance_reduction_is_the_formula(size: int) -> None:
    scores = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    g = scores / scores.sum()
    inverse = 1 - (g - 1 / size).square().sum() / g.square().sum()
    # Equation 26 cancels where tau is large; in float64 that leaves ten digits here.
    torch.testing.assert_close(variance_reduction(scores), inverse.rsqrt(), rtol=1e-10, atol=0)


def test_variance_reduction_is_the_ratio_of_spreads() -> None:
    """What it stands for: the second moments of both estimates of a gradient."""
    gradients = torch.randn(30, 4, dtype=torch.float64).exp()
    norms = torch.linalg.vector_norm(gradients, dim=1)
    p = norms / norms.sum()
    uniform = gradients.square().sum(1).mean()
    drawn = (p * (gradients / (30 * p[:, None])).square().sum(1)).sum()
    torch.testing.assert_close(
        variance_reduction(norms).square(), uniform / drawn, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("scores", "tau"),
    [
        ([], 1.0),
        ([0.0, 0.0], 1.0),
        ([NAN, INF], 1.0),
        ([2.0, 2.0, 2.0], 1.0),
        ([0.0, 0.0, 0.0, 5.0], 2.0),
        ([0.0, 5.0, NAN, -1.0, INF], math.sqrt(2)),
        ([1e-38, 1e-38], 1.0),
        ([3e38, 3e38, 3e38], 1.0),
    ],
)
def test_variance_reduction_of_odd_batches(scores: list[float], tau: float) -> None:
    result = variance_reduction(torch.tensor(scores, dtype=torch.float32))
    assert result.dtype == torch.float32
    # One float32 rounding.
    assert result.item() == pytest.approx(tau, rel=1e-7)


def test_variance_reduction_errors() -> None:
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        variance_reduction(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point tensor, got list"):
        variance_reduction([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scores must be \[B\], got shape \[2, 2\]"):
        variance_reduction(torch.ones(2, 2))
    assert variance_reduction(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.float32
