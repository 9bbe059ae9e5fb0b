"""The AdaSelection selector: what it hands the operator, its state, its records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from select_samples import batch, squared_loss
from torch import Tensor

from fastsel import ops
from fastsel.scores import Scores
from fastsel.select import (
    AdaSelection,
    BigLoss,
    Coreset1,
    FunctionSelector,
    ImportanceSampling,
    make_selector,
)

NAN, INF = float("nan"), float("inf")
FUSED = ("uniform", "big_loss", "small_loss", "grad_norm", "adaboost", "coreset1", "coreset2",
         "rho_loss")  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fresh_state(methods: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.full((methods,), 1 / methods)
    return weights, torch.zeros(methods), torch.zeros(1, dtype=torch.int64)


# ---- what the operator gets ----


@pytest.mark.parametrize("power", [0.5, None])
@pytest.mark.parametrize("standardize", [True, False])
def test_the_operators_own_methods(power: float | None, standardize: bool) -> None:
    selector = AdaSelection(FUSED, 0.3, 0.7, power, standardize=standardize)
    weights, losses, step = fresh_state(8)
    for i in range(6):
        scores = batch(i)
        assert scores.loss is not None
        expected = ops.adaselection_(
            scores.loss, scores.grad_norm, scores.reference_loss, list(range(8)), weights, losses,
            step, 19, 0.7, INF if power is None else power, standardize,
        )  # fmt: skip
        assert torch.equal(selector(scores), expected.indices)
        assert list(selector.weights) == list(FUSED)
        assert list(selector.weights.values()) == weights.tolist()
    assert selector.steps == 6
    assert len(set(weights.tolist())) > 1
    assert selector.excluded == 12


def test_methods_beside_the_operators() -> None:
    """Names without a code, functions, and selectors, in the order they are given."""
    methods: list[Any] = ["entropy", "big_loss", squared_loss, "margin", Coreset1(0.9),
               ImportanceSampling(0.5, "grad_norm")]  # fmt: skip
    selector = AdaSelection(methods, rate=0.25)
    assert selector.names == (
        "entropy", "big_loss", "squared_loss", "margin", "coreset1", "importance"
    )  # fmt: skip
    assert selector.needs == {"loss", "entropy", "margin", "grad_norm"}
    weights, losses, step = fresh_state(6)
    for i in range(5):
        scores = batch(i)
        assert scores.loss is not None
        assert scores.margin is not None
        rows = [scores.entropy, scores.loss.square(), -scores.margin, scores.grad_norm]
        expected = ops.adaselection_(
            scores.loss, None, None, [8, 1, 9, 10, 5, 11], weights, losses, step, 16, 0.5, 0.5,
            statistics=torch.stack([row for row in rows if row is not None]),
        )  # fmt: skip
        assert torch.equal(selector(scores), expected.indices)
    assert list(selector.weights.values()) == weights.tolist()
    # The broken gradient norms count, since a method looks at them.
    assert selector.excluded == 10


@pytest.mark.parametrize("name", [name for name in FUSED if name != "uniform"])
def test_one_method_chooses_what_it_chooses_alone(name: str) -> None:
    mixture = AdaSelection([name], rate=0.3, curriculum_power=None)
    for i in range(4):
        # A method alone does not look at the others' broken scores.
        scores = batch(i, broken=False)
        assert torch.equal(mixture(scores), make_selector(name, rate=0.3)(scores))
    assert mixture.weights == {name: 1.0}


def test_a_method_beside_counts_like_the_operators_own() -> None:
    def loss(scores: Scores) -> Tensor:
        assert scores.loss is not None
        return scores.loss

    def reducible(scores: Scores) -> Tensor:
        assert scores.reference_loss is not None
        return loss(scores) - scores.reference_loss

    own = AdaSelection(("big_loss", "small_loss", "rho_loss"), rate=0.3)
    beside = AdaSelection(
        (
            loss,
            FunctionSelector(lambda s: -loss(s), 0.3, name="small"),
            FunctionSelector(reducible, 0.3, ("loss", "reference_loss")),
        ),
        rate=0.3,
    )
    for i in range(5):
        assert torch.equal(beside(batch(i)), own(batch(i)))
    # The same statistics, of which one was rounded to float32 on the way.
    assert list(beside.weights.values()) == pytest.approx(list(own.weights.values()), rel=1e-5)


def test_a_subclass_with_a_statistic_of_its_own_is_not_fused() -> None:
    class Capped(BigLoss):
        def statistic(self, scores: Scores) -> Tensor:
            return super().statistic(scores).clamp(max=1.0)

    capped = AdaSelection([Capped(1.0)], rate=0.5, curriculum_power=None)
    loss = torch.tensor([0.5, 1.0, 5.0, 2.0])
    assert capped(Scores(loss=loss)).tolist() == [1, 2]
    assert AdaSelection([BigLoss(1.0)], 0.5, 0.5, None)(Scores(loss=loss)).tolist() == [2, 3]


def test_whether_a_mixture_is_deterministic() -> None:
    """Ranks that choose together share one choice unless all would make the same."""
    assert AdaSelection(("uniform", "big_loss", "entropy"), rate=0.5).deterministic
    assert AdaSelection((ImportanceSampling(0.5), "big_loss"), rate=0.5).deterministic
    assert not AdaSelection((squared_loss, "big_loss"), rate=0.5).deterministic


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    selector = AdaSelection(("big_loss", "grad_norm", "margin"), rate=0.5)
    wide = AdaSelection(("big_loss", "grad_norm", "margin"), rate=0.5)
    for i in range(3):
        scores = batch(i, dtype=dtype)
        assert scores.loss is not None
        mixed = Scores(loss=scores.loss, grad_norm=batch(i).grad_norm, margin=scores.margin)
        assert selector(scores).shape == wide(mixed).shape == (32,)
    assert sum(selector.weights.values()) == pytest.approx(1.0, rel=1e-6)


def test_batches_that_move_nothing() -> None:
    selector = AdaSelection(rate=0.5, record_every=1)
    empty = torch.zeros(0)
    assert selector(Scores(loss=empty, grad_norm=empty)).tolist() == []
    broken = torch.full((4,), NAN)
    assert selector(Scores(loss=broken, grad_norm=broken)).tolist() == [0, 1]
    assert set(selector.weights.values()) == {0.25}
    assert selector.steps == 0
    assert selector.excluded == 4
    assert selector.history()[0].tolist() == []


def test_scores_that_want_a_gradient_and_inference_mode() -> None:
    first, second = AdaSelection(rate=0.5), AdaSelection(rate=0.5)
    for i in range(3):
        scores = batch(i)
        assert scores.loss is not None
        recorded = Scores(loss=(scores.loss.requires_grad_() * 1), grad_norm=scores.grad_norm)
        expected = first(recorded)
        with torch.inference_mode(i != 1):
            assert torch.equal(second(batch(i)), expected)
    assert first.weights == second.weights


# ---- tracing, devices ----


@pytest.mark.parametrize("record_every", [0, 2])
def test_choosing_traces(record_every: int) -> None:
    methods = ("uniform", "big_loss", "grad_norm", "margin", squared_loss)
    selector = AdaSelection(methods, rate=0.25, record_every=record_every)
    eager = AdaSelection(methods, rate=0.25, record_every=record_every)

    def choose(loss: Tensor, norm: Tensor, margin: Tensor) -> Tensor:
        return selector.select(Scores(loss=loss, grad_norm=norm, margin=margin)).indices

    compiled: Any = torch.compile(choose, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, size in enumerate((16, 24, 33, 40)):
        scores = batch(i, size)
        actual = compiled(scores.loss, scores.grad_norm, scores.margin)
        assert torch.equal(actual, eager(scores))
    assert selector.weights == eager.weights
    assert selector.steps == 4
    assert selector.excluded == eager.excluded == 8
    if record_every:
        assert selector.history()[0].tolist() == [2, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_without_waiting() -> None:
    methods = (*FUSED, "entropy", squared_loss)
    selector = AdaSelection(methods, rate=0.25, record_every=1, device="cuda")
    on_cpu = AdaSelection(methods, rate=0.25, record_every=1)
    mode: Any = torch.cuda.get_sync_debug_mode()
    for i in range(4):
        scores = batch(i, 512)
        moved = Scores(**{
            name: getattr(scores, name).cuda()
            for name in ("loss", "grad_norm", "entropy", "reference_loss")
        })  # fmt: skip
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            indices = selector(moved)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert indices.tolist() == on_cpu(scores).tolist()
    # The sums behind them are taken in another order.
    assert list(selector.weights.values()) == pytest.approx(list(on_cpu.weights.values()), rel=1e-5)
    # A state goes to where the selector is, and a selector to where its scores are.
    on_cpu.load_state_dict(selector.state_dict())
    assert on_cpu.weights == selector.weights
    assert selector(batch(9, 512)).tolist() == on_cpu(batch(9, 512)).tolist()
    assert selector._step.device.type == "cpu"


def test_state_moves_to_the_scores() -> None:
    selector = AdaSelection(("big_loss",), rate=0.5, record_every=1, device="meta")
    assert selector._method_weights.is_meta
    assert selector._excluded is not None
    assert selector._excluded.is_meta
