"""Selectors: what they choose, how many, and that their state resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsel.scores import Scores
from fastsel.select import SELECTORS, BigLoss, GradNorm, Selector, SmallLoss, Uniform, make_selector

NAN, INF = float("nan"), float("inf")


def scores_of(values: list[float]) -> Scores:
    """Scores in which every score is the same numbers."""
    tensor = torch.tensor(values, dtype=torch.float32)
    return Scores(loss=tensor, grad_norm=tensor, entropy=tensor)


@pytest.mark.parametrize("name", SELECTORS)
@given(
    values=st.lists(
        st.one_of(st.floats(0, 10, width=32), st.sampled_from([NAN, INF, 1.0])), max_size=40
    ),
    rate=st.floats(0.01, 1.0),
)
def test_indices(name: str, values: list[float], rate: float) -> None:
    selector = make_selector(name, rate=rate)
    indices = selector(scores_of(values))
    assert indices.dtype == torch.int64
    assert indices.shape == (selector.count(len(values)),)
    chosen = indices.tolist()
    assert chosen == sorted(set(chosen))
    assert all(0 <= index < len(values) for index in chosen)


@pytest.mark.parametrize(
    ("rate", "batch_size", "count"),
    [
        (0.5, 0, 0),
        (0.01, 1, 1),
        (0.01, 10, 1),
        (0.25, 10, 2),
        (0.3, 10, 3),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.999, 4, 4),
    ],
)
def test_count(rate: float, batch_size: int, count: int) -> None:
    assert BigLoss(rate).count(batch_size) == count
    assert Uniform(rate)(Scores(batch_size=batch_size)).numel() == count


def test_big_loss_takes_the_largest() -> None:
    assert BigLoss(0.4)(scores_of([3.0, 1.0, 2.0, 5.0, 4.0])).tolist() == [3, 4]


def test_small_loss_takes_the_smallest() -> None:
    assert SmallLoss(0.4)(scores_of([3.0, 1.0, 2.0, 5.0, 4.0])).tolist() == [1, 2]


def test_each_selector_looks_at_its_own_score() -> None:
    up, down = torch.arange(4.0), -torch.arange(4.0)
    scores = Scores(loss=up, grad_norm=down)
    assert BigLoss(0.5)(scores).tolist() == [2, 3]
    assert SmallLoss(0.5)(scores).tolist() == [0, 1]
    assert GradNorm(0.5)(scores).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["big_loss", "small_loss", "grad_norm"])
def test_ties_go_to_the_first(name: str) -> None:
    assert make_selector(name, rate=0.5)(scores_of([1.0] * 6)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["big_loss", "small_loss", "grad_norm"])
def test_nan_comes_last(name: str) -> None:
    values = [NAN, 1.0, NAN, INF, 0.0, NAN]
    assert make_selector(name, rate=0.5)(scores_of(values)).tolist() == [1, 3, 4]
    with_one_nan = make_selector(name, rate=0.65)(scores_of(values)).tolist()
    assert with_one_nan == [0, 1, 3, 4]
    assert make_selector(name, rate=1.0)(scores_of(values)).tolist() == list(range(6))


def test_uniform_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    selector = Uniform(0.4, generator=generator)
    counts = torch.zeros(10)
    for _ in range(4000):
        counts[selector(Scores(batch_size=10))] += 1
    # Each index is drawn 1600 times on average with a deviation of sqrt(4000 * 0.4 * 0.6) = 31;
    # five of them.
    assert (counts - 1600).abs().max() < 155


def test_uniform_pairs_are_uniform() -> None:
    selector = Uniform(0.5, generator=torch.Generator().manual_seed(1))
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        pair = tuple(selector(Scores(batch_size=4)).tolist())
        seen[pair] = seen.get(pair, 0) + 1
    assert len(seen) == 6
    # 500 a pair with a deviation of sqrt(3000 / 6 * 5 / 6) = 20; five of them.
    assert max(abs(count - 500) for count in seen.values()) < 102


def test_uniform_resumes_exactly() -> None:
    selector = Uniform(0.5, generator=torch.Generator().manual_seed(3))
    batch = Scores(batch_size=100)
    selector(batch)
    state = selector.state_dict()
    expected = [selector(batch).tolist() for _ in range(3)]
    assert expected[0] != expected[1]
    resumed = Uniform(0.9, generator=torch.Generator().manual_seed(99))
    resumed.load_state_dict(state)
    assert resumed.rate == 0.5
    assert [resumed(batch).tolist() for _ in range(3)] == expected


def test_uniform_without_a_generator_follows_the_global_seed() -> None:
    torch.manual_seed(5)
    first = Uniform(0.5)(Scores(batch_size=50)).tolist()
    torch.manual_seed(5)
    assert Uniform(0.5)(Scores(batch_size=50)).tolist() == first


@pytest.mark.parametrize("name", SELECTORS)
def test_states_are_of_one_kind(name: str) -> None:
    state = make_selector(name, rate=0.25).state_dict()
    same = make_selector(name, rate=0.5)
    same.load_state_dict(state)
    assert same.rate == 0.25
    for other in set(SELECTORS) - {name}:
        with pytest.raises(
            ValueError, match=f"state must be of the selector '{other}', got that of '{name}'"
        ):
            make_selector(other, rate=0.5).load_state_dict(state)


def test_states_that_cannot_be_resumed() -> None:
    with_generator = Uniform(0.5, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"was saved with none, but this selector has one"):
        with_generator.load_state_dict(Uniform(0.5).state_dict())
    with pytest.raises(ValueError, match=r"was saved with one, but this selector has none"):
        Uniform(0.5).load_state_dict(with_generator.state_dict())
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got 2.0"):
        BigLoss(0.5).load_state_dict({"name": "big_loss", "rate": 2.0})
    with pytest.raises(ValueError, match="got that of None"):
        BigLoss(0.5).load_state_dict({})


def test_needs() -> None:
    assert {name: set(kind.needs) for name, kind in SELECTORS.items()} == {
        "uniform": set(),
        "big_loss": {"loss"},
        "small_loss": {"loss"},
        "grad_norm": {"grad_norm"},
    }
    with pytest.raises(ValueError, match=r"^grad_norm: scores must have grad_norm, got None$"):
        GradNorm(0.5)(Scores(loss=torch.ones(3)))


@pytest.mark.parametrize("rate", [0, 0.0, -0.1, 1.0001, NAN, INF])
def test_rate_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^BigLoss: rate must be in \(0, 1\], got "):
        BigLoss(rate)


@pytest.mark.parametrize("rate", ["0.5", None, True, torch.tensor(0.5)])
def test_rate_must_be_a_number(rate: Any) -> None:
    with pytest.raises(
        TypeError, match=f"^Uniform: rate must be a number, got {type(rate).__name__}$"
    ):
        Uniform(rate)


def test_make_selector() -> None:
    generator = torch.Generator()
    uniform = make_selector("uniform", rate=0.5, generator=generator)
    assert isinstance(uniform, Uniform)
    assert uniform.generator is generator
    assert repr(make_selector("big_loss", rate=0.25)) == "BigLoss(rate=0.25)"
    with pytest.raises(
        ValueError, match="must be one of uniform, big_loss, small_loss, grad_norm, got 'best'"
    ):
        make_selector("best", rate=0.5)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        make_selector("uniform", rate=0.5, generator=3)  # type: ignore[arg-type]


def test_a_selector_of_ones_own() -> None:
    class Confused(Selector):
        name = "confused"
        needs = frozenset({"entropy"})

        def choose(self, scores: Scores, k: int) -> torch.Tensor:
            assert scores.entropy is not None
            return scores.entropy.topk(k).indices.sort().values

    assert Confused(0.5)(Scores(entropy=torch.tensor([0.1, 0.9, 0.5, 0.2]))).tolist() == [1, 2]
    with pytest.raises(NotImplementedError, match="must define choose"):
        Selector(0.5)(Scores(batch_size=4))


def test_uniform_draws_where_the_batch_is() -> None:
    """A step on a GPU must not wait for indices made on the host."""
    indices = Uniform(0.5)(Scores(batch_size=4, batch_device=torch.device("meta")))
    assert indices.device.type == "meta"
    assert indices.shape == (2,)
