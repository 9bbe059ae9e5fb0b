"""Selectors: what they choose, how many, and that their state resumes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsel.scores import Scores
from fastsel.select import (
    SELECTORS,
    AdaSelection,
    BigLoss,
    Choice,
    FunctionSelector,
    GradNorm,
    ImportanceSampling,
    Selector,
    SmallLoss,
    Uniform,
    make_selector,
)

NAN, INF = float("nan"), float("inf")
ONE_STATISTIC = ["big_loss", "small_loss", "grad_norm", "entropy", "margin"]


def scores_of(values: list[float]) -> Scores:
    """Scores in which every score is the same numbers, but for a reference loss of 0."""
    tensor = torch.tensor(values, dtype=torch.float32)
    return Scores(
        loss=tensor,
        grad_norm=tensor,
        entropy=tensor,
        margin=tensor,
        reference_loss=torch.zeros_like(tensor),
    )


@pytest.mark.parametrize("name", SELECTORS)
@given(
    values=st.lists(
        st.one_of(st.floats(0, 10, width=32), st.sampled_from([NAN, INF, -INF, 1.0])), max_size=40
    ),
    rate=st.floats(0.01, 1.0),
)
def test_indices(name: str, values: list[float], rate: float) -> None:
    selector = make_selector(name, rate=rate)
    choice = selector.select(scores_of(values))
    assert choice.indices.dtype == torch.int64
    assert choice.indices.shape == (selector.count(len(values)),)
    chosen = choice.indices.tolist()
    assert chosen == sorted(chosen)
    assert all(0 <= index < len(values) for index in chosen)
    if name == "importance":
        assert choice.weights is not None
        assert choice.weights.shape == choice.indices.shape
    else:
        assert len(set(chosen)) == len(chosen)
        assert choice.weights is None
    broken = sum(not math.isfinite(value) for value in values)
    assert selector.excluded == (0 if name == "uniform" else broken)
    if name not in ("uniform", "importance"):
        finite = sum(math.isfinite(values[index]) for index in chosen)
        assert finite == min(len(chosen), len(values) - broken)


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


@pytest.mark.parametrize("name", ONE_STATISTIC)
def test_ties_go_to_the_first(name: str) -> None:
    assert make_selector(name, rate=0.5)(scores_of([1.0] * 6)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", [*ONE_STATISTIC, "adaboost", "rho_loss"])
def test_what_is_not_finite_comes_last(name: str) -> None:
    values = [NAN, 1.0, -INF, INF, 0.0, NAN]
    selector = make_selector(name, rate=1 / 3)
    assert selector(scores_of(values)).tolist() == [1, 4]
    assert selector.excluded == 4
    # Once they have to be chosen, by index.
    assert make_selector(name, rate=0.5)(scores_of(values)).tolist() == [0, 1, 4]
    assert make_selector(name, rate=2 / 3)(scores_of(values)).tolist() == [0, 1, 2, 4]
    assert make_selector(name, rate=1.0)(scores_of(values)).tolist() == list(range(6))
    selector(scores_of(values))
    assert selector.excluded == 8


def test_gradients_are_left_alone() -> None:
    loss = torch.rand(8, requires_grad=True)
    selector = BigLoss(0.5)
    indices = selector(Scores(loss=loss * 2))
    assert indices.tolist() == loss.detach().topk(4).indices.sort().values.tolist()
    assert selector._excluded is not None
    assert not selector._excluded.requires_grad


def test_state_made_in_inference_mode_lives_on() -> None:
    selector = BigLoss(0.5)
    with torch.inference_mode():
        selector(scores_of([1.0, NAN]))
    selector(scores_of([1.0, NAN]))
    with torch.inference_mode():
        selector(scores_of([1.0, NAN]))
    assert selector.excluded == 3


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


def test_uniform_without_a_generator_follows_the_global_seed() -> None:
    torch.manual_seed(5)
    first = Uniform(0.5)(Scores(batch_size=50)).tolist()
    torch.manual_seed(5)
    assert Uniform(0.5)(Scores(batch_size=50)).tolist() == first


def test_needs() -> None:
    assert {name: set(kind.needs) for name, kind in SELECTORS.items()} == {
        "uniform": set(),
        "big_loss": {"loss"},
        "small_loss": {"loss"},
        "grad_norm": {"grad_norm"},
        "adaboost": {"loss"},
        "coreset1": {"loss"},
        "coreset2": {"loss"},
        "rho_loss": {"loss", "reference_loss"},
        "entropy": {"entropy"},
        "margin": {"margin"},
        "importance": {"grad_norm"},
        "adaselection": {"loss", "grad_norm"},
    }
    assert {kind.code: name for name, kind in SELECTORS.items() if kind.code is not None} == {
        0: "uniform",
        1: "big_loss",
        2: "small_loss",
        3: "grad_norm",
        4: "adaboost",
        5: "coreset1",
        6: "coreset2",
        7: "rho_loss",
    }
    assert {name for name, kind in SELECTORS.items() if not kind.deterministic} == {
        "uniform",
        "importance",
    }
    with pytest.raises(ValueError, match=r"^grad_norm: scores must have grad_norm, got None$"):
        GradNorm(0.5)(Scores(loss=torch.ones(3)))
    with pytest.raises(ValueError, match="scores must have loss, reference_loss, got None"):
        make_selector("rho_loss", rate=0.5)(Scores(batch_size=3))


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
    importance = make_selector("importance:loss", rate=0.5, generator=generator)
    assert isinstance(importance, ImportanceSampling)
    assert (importance.by, importance.generator) == ("loss", generator)
    assert repr(make_selector("importance", rate=0.5)) == (
        "ImportanceSampling(rate=0.5, by='grad_norm')"
    )
    mixture = make_selector("adaselection:big_loss+margin+uniform", rate=0.5)
    assert isinstance(mixture, AdaSelection)
    assert mixture.names == ("big_loss", "margin", "uniform")
    assert mixture.needs == {"loss", "margin"}
    with pytest.raises(ValueError, match=r"must be one of uniform, big_loss, .*, got 'best'"):
        make_selector("best", rate=0.5)
    with pytest.raises(ValueError, match="big_loss takes nothing after its name"):
        make_selector("big_loss:loss", rate=0.5)
    with pytest.raises(ValueError, match=r"by must be one of loss, grad_norm, .*, got 'size'"):
        make_selector("importance:size", rate=0.5)
    with pytest.raises(ValueError, match=r"methods must be of uniform, .*, got ''"):
        make_selector("adaselection:", rate=0.5)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        make_selector("uniform", rate=0.5, generator=3)  # type: ignore[arg-type]


class Doubtful(Selector):
    """A selector as a user writes one."""

    name = "doubtful"
    needs = frozenset({"entropy"})

    def statistic(self, scores: Scores) -> torch.Tensor:
        assert scores.entropy is not None
        return scores.entropy


def test_a_selector_of_ones_own() -> None:
    selector = Doubtful(0.5)
    entropy = torch.tensor([0.1, INF, 0.5, 0.2])
    choice = selector.select(Scores(entropy=entropy))
    assert isinstance(choice, Choice)
    assert choice.weights is None
    assert choice.indices.tolist() == selector(Scores(entropy=entropy)).tolist() == [2, 3]
    assert selector.excluded == 2

    class First(Selector):
        name = "first"

        def choose(self, scores: Scores, k: int) -> torch.Tensor:
            return torch.arange(k)

    assert First(0.5)(Scores(batch_size=4)).tolist() == [0, 1]
    with pytest.raises(NotImplementedError, match=r"must define statistic\(scores\) or choose"):
        Selector(0.5)(Scores(batch_size=4))


def test_a_function_as_selector() -> None:
    def surprise(scores: Scores) -> torch.Tensor:
        assert scores.loss is not None
        assert scores.entropy is not None
        return scores.loss - scores.entropy

    selector = FunctionSelector(surprise, 0.5, needs=("loss", "entropy"))
    assert selector.name == "surprise"
    loss, entropy = torch.tensor([3.0, 2.0, NAN, 1.0]), torch.tensor([3.0, 0.0, 0.0, 0.0])
    assert selector(Scores(loss=loss, entropy=entropy)).tolist() == [1, 3]
    assert selector.excluded == 1
    with pytest.raises(ValueError, match="surprise: scores must have entropy, got None"):
        selector(Scores(loss=loss))
    other = FunctionSelector(surprise, 0.5, name="other")
    with pytest.raises(ValueError, match="must be of the selector 'other', got that of 'surprise'"):
        other.load_state_dict(selector.state_dict())
    with pytest.raises(TypeError, match="function must be callable, got int"):
        FunctionSelector(3, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs must be of loss, .*, got \['size'\]"):
        FunctionSelector(surprise, 0.5, needs="size")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.ones(3), ValueError, r"\[B\] with B = 2, got shape \[3\]"),
        (torch.ones(2, 1), ValueError, r"got shape \[2, 1\]"),
        (torch.tensor(1.0), ValueError, r"got shape \[\]"),
        (torch.ones(2, dtype=torch.int64), TypeError, "got torch.int64"),
        (3.0, TypeError, "a floating-point tensor, got float"),
    ],
)
def test_statistics_that_are_none(value: Any, error: type[Exception], text: str) -> None:
    selector = FunctionSelector(lambda scores: value, 0.5, name="mine")
    with pytest.raises(error, match="^mine: the statistic must be .*" + text):
        selector(Scores(loss=torch.ones(2)))
    assert selector.excluded == 0


def test_uniform_draws_where_the_batch_is() -> None:
    """A step on a GPU must not wait for indices made on the host."""
    indices = Uniform(0.5)(Scores(batch_size=4, batch_device=torch.device("meta")))
    assert indices.device.type == "meta"
    assert indices.shape == (2,)
