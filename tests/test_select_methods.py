"""Every method alone, against its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, backend_names, make_backend, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fastsel.scores import Scores
from fastsel.select import SELECTORS, Coreset1, Selector, make_selector
from fastsel.select.methods import METHODS
from fastsel.select.selector import checked_statistic

NAN, INF = float("nan"), float("inf")
Array = NDArray[np.float64]


def coreset1(loss: Array) -> Array:
    rank = np.empty(len(loss))
    rank[np.argsort(loss, kind="stable")] = np.arange(len(loss))
    return np.asarray(abs(rank - (len(loss) - 1) / 2))


def adaboost(loss: Array) -> Array:
    largest = abs(loss).max(initial=0.0)
    x = loss / (1.0001 * largest) if largest else 0 * loss
    return np.asarray(0.5 * np.log((1 + x) / (1 - x)))


# The statistic of the finite losses l, with a second score g.
FORMULAS: dict[str, Callable[[Array, Array], Array]] = {
    "uniform": lambda l, g: 0 * l,  # noqa: E741
    "big_loss": lambda l, g: l,  # noqa: E741
    "small_loss": lambda l, g: -l,  # noqa: E741
    "grad_norm": lambda l, g: g,  # noqa: E741
    "adaboost": lambda l, g: adaboost(l),  # noqa: E741
    "coreset1": lambda l, g: coreset1(l),  # noqa: E741
    "coreset2": lambda l, g: -abs(l - l.mean()),  # noqa: E741
    "rho_loss": lambda l, g: l - g,  # noqa: E741
    "entropy": lambda l, g: g,  # noqa: E741
    "margin": lambda l, g: -g,  # noqa: E741
}


def scores_of(loss: Tensor, other: Tensor) -> Scores:
    """A batch of losses in which every other score is `other`."""
    return Scores(loss=loss, grad_norm=other, entropy=other, margin=other, reference_loss=other)


def chosen_by(statistic: Array, k: int) -> list[int]:
    """The k largest of a statistic with NaN for what comes last; ties by index."""
    order = np.argsort(np.where(np.isnan(statistic), INF, -statistic), kind="stable")
    return sorted(order[:k].tolist())


def random_losses(
    size: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(size, generator=generator, dtype=torch.float64).exp()
    return loss.to(dtype), torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 300])
def test_statistic(name: str, dtype: torch.dtype, size: int) -> None:
    loss, other = random_losses(size, size, dtype)
    broken = torch.arange(size) % 5 == 3
    loss[broken] = torch.tensor([NAN, INF, -INF], dtype=dtype).repeat(size)[: int(broken.sum())]
    statistic = checked_statistic(make_selector(name, rate=0.5), scores_of(loss, other))
    kept = ~broken.numpy()
    if not kept.any():
        assert statistic.shape == (size,)
        return
    expected = FORMULAS[name](to_numpy(loss)[kept], to_numpy(other)[kept])
    # One rounding to the statistic's own precision, from float64; there the reference's 1 - x of
    # the largest loss is itself known to no more than 1e4 roundings.
    eps = max(1.5 * torch.finfo(statistic.dtype).eps, 3e-12)
    np.testing.assert_allclose(to_numpy(statistic)[kept], expected, rtol=eps, atol=1e-15)
    if METHODS[name].needs & {"loss"}:
        assert not statistic[broken].isfinite().any()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"uniform"}))
@given(
    loss=st.lists(
        st.one_of(
            st.floats(-1, 8, width=32),
            st.integers(0, 4).map(float),
            st.sampled_from([NAN, INF, -INF]),
        ),
        max_size=30,
    ),
    rate=st.floats(0.01, 1.0),
)
def test_choice(name: str, loss: list[float], rate: float) -> None:
    losses = torch.tensor(loss, dtype=torch.float32)
    # What a method does not look at may be anything.
    other = losses if METHODS[name].needs.isdisjoint({"loss"}) else torch.zeros_like(losses)
    selector = make_selector(name, rate=rate)
    indices = selector(scores_of(losses, other))
    values = to_numpy(losses)
    statistic = np.full(len(values), NAN)
    kept = np.isfinite(values)
    if kept.any():
        statistic[kept] = FORMULAS[name](values[kept], to_numpy(other)[kept])
    k = selector.count(len(values))
    if name == "adaboost":  # a logarithm in float64 merges what the losses still tell apart
        statistic[kept] = values[kept]
    if name == "coreset2":
        # The reference's own mean is rounded, so near ties may fall either way; what is chosen must
        # be as good.
        best = np.sort(statistic[chosen_by(statistic, k)])
        ours = np.sort(statistic[indices.numpy()])
        np.testing.assert_allclose(ours, best, rtol=0, atol=1e-6)
        return
    assert indices.tolist() == chosen_by(statistic, k)


def test_coreset1_takes_both_ends() -> None:
    loss = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    assert Coreset1(1 / 3)(Scores(loss=loss)).tolist() == [0, 5]
    assert Coreset1(2 / 3)(Scores(loss=loss)).tolist() == [0, 1, 2, 5]
    # Equal losses rank by index, -0.0 as 0.0, and what is broken has no rank.
    assert Coreset1(0.5)(Scores(loss=torch.zeros(6))).tolist() == [0, 1, 5]
    signed = torch.tensor([0.0, -0.0, 0.0, -0.0, NAN, INF])
    assert Coreset1(1 / 3)(Scores(loss=signed)).tolist() == [0, 3]


def test_coreset1_is_near_the_mean() -> None:
    """What it is for: both ends together have the batch's mean, where losses are symmetric."""
    loss = torch.linspace(1, 3, 101)[torch.randperm(101)]
    chosen = Coreset1(0.2)(Scores(loss=loss))
    # Of 20 samples, as many from either end; float32 sums of them.
    torch.testing.assert_close(loss[chosen].mean(), loss.mean(), rtol=1e-6, atol=0)


def test_adaboost_weighs_the_largest_most() -> None:
    statistic = SELECTORS["adaboost"](0.5).statistic(Scores(loss=torch.tensor([0.0, 1.0, 2.0])))
    # At the largest loss 1 - x = 1 - 1 / 1.0001, which float32 would know to three digits only.
    expected = torch.tensor([0.0, 0.5 * math.log(3.0002 / 1.0002), 0.5 * math.log(2.0001 / 0.0001)])
    torch.testing.assert_close(statistic, expected, rtol=1e-6, atol=0)
    zeros = SELECTORS["adaboost"](0.5).statistic(Scores(loss=torch.tensor([0.0, NAN, 0.0])))
    assert zeros.tolist()[::2] == [0.0, 0.0]
    assert zeros[1].isnan()


def test_losses_of_different_dtypes() -> None:
    loss = torch.tensor([1.0, 1.0], dtype=torch.float16)
    reference = torch.tensor([0.0, 1e-4], dtype=torch.float32)
    selector = make_selector("rho_loss", rate=0.5)
    # In half precision both differences would be 1.
    assert selector(Scores(loss=loss, reference_loss=reference)).tolist() == [0]
    assert selector.statistic(Scores(loss=loss, reference_loss=reference)).dtype == torch.float32


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"uniform"}))
def test_choosing_traces(name: str) -> None:
    selector, eager = make_selector(name, rate=0.25), make_selector(name, rate=0.25)

    def choose(loss: Tensor, other: Tensor) -> Tensor:
        return selector.select(scores_of(loss, other)).indices

    compiled = torch.compile(choose, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (16, 24, 33):
        loss, other = random_losses(size, size)
        loss[3] = other[5] = NAN
        assert torch.equal(compiled(loss, other), eager(scores_of(loss, other)))
    assert selector.excluded == eager.excluded > 0


@pytest.mark.skipif("cuda" not in backend_names(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_on_cuda_without_waiting(name: str) -> None:
    cuda: Backend = make_backend("cuda")
    loss, other = (score.to(cuda.device) for score in random_losses(1000, 1))
    loss[::7] = NAN
    selector: Selector = make_selector(name, rate=0.25)
    selector(scores_of(loss, other))
    torch.cuda.synchronize()
    mode: Any = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices = selector(scores_of(loss, other))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    if name != "uniform":
        on_cpu = make_selector(name, rate=0.25)(scores_of(loss.cpu(), other.cpu()))
        assert indices.tolist() == on_cpu.tolist()
