"""`SelectiveStep` beyond the plain use: weights, accumulation, resuming, compiling, bad input."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from step_samples import B, N, assert_same_weights, batch, data, make_model, make_step
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.scores import Scores
from fastsel.select import (
    AdaSelection,
    BigLoss,
    ImportanceSampling,
    LossMemory,
    SelectiveStep,
    Selector,
)

# ---- importance weights ----


def test_weights_multiply_the_losses() -> None:
    class Fixed(Selector):
        name = "fixed"
        needs = frozenset({"loss"})

        def select(self, scores: Scores) -> Any:
            chosen = super().select(scores)
            return chosen._replace(weights=torch.tensor([1.0, 2.0, 0.5, 0.0]))

        def statistic(self, scores: Scores) -> Tensor:
            assert scores.loss is not None
            return scores.loss

    model = make_model()
    expected = copy.deepcopy(model)
    inputs, target = batch()
    result = make_step(model, Fixed(0.25), None, switch="select")(inputs, target)
    losses = F.cross_entropy(
        expected(inputs[result.indices]), target[result.indices], reduction="none"
    )
    loss = (losses * torch.tensor([1.0, 2.0, 0.5, 0.0])).mean()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    torch.autograd.backward(loss)
    optimizer.step()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-6, atol=0)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_weighted_gradients_are_unbiased() -> None:
    """The mean gradient of importance-sampled steps is the gradient of the whole batch."""
    model = make_model()
    inputs, target = batch()
    inputs = inputs * torch.logspace(-1, 1, B).unsqueeze(1)  # some matter much more than others
    torch.autograd.backward(F.cross_entropy(model(inputs), target))
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    generator = torch.Generator().manual_seed(0)
    selector = ImportanceSampling(0.25, by="grad_norm", generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = SelectiveStep(model, nn.CrossEntropyLoss(), optimizer, selector, switch="select")
    draws = []
    for _ in range(1500):
        step(inputs, target)
        draws.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    grads = torch.stack(draws)
    error = (grads.mean(0) - expected).norm()
    # Root of the summed variances over the number of draws; 4 of it bounds a seeded draw well.
    spread = (grads.var(0).sum() / len(grads)).sqrt()
    assert error < 4 * spread
    assert spread < 0.1 * expected.norm()


# ---- accumulation ----


@pytest.mark.parametrize("selector", ["big_loss", "uniform"])
def test_accumulated_gradients_are_the_mean(selector: str) -> None:
    model, expected = make_model(), make_model()
    step = make_step(model, selector, 0.25, accumulation_steps=3, switch="select")
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for round_ in range(2):
        optimizer.zero_grad()
        for i in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            inputs, target = batch(3 * round_ + i)
            indices = step(inputs, target).indices
            loss = F.cross_entropy(expected(inputs[indices]), target[indices]) / 3
            torch.autograd.backward(loss)
            moved = any(
                not torch.equal(one, other)
                for one, other in zip(before, model.parameters(), strict=True)
            )
            assert moved == (i == 2)
        optimizer.step()
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_flush_takes_the_last_step() -> None:
    model = make_model()
    step = make_step(model, accumulation_steps=4, switch="select")
    assert not step.flush()
    before = [p.detach().clone() for p in model.parameters()]
    step(*batch())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert step.flush()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not step.flush()


# ---- resuming ----


def ada() -> AdaSelection:
    return AdaSelection(("uniform", "big_loss", "grad_norm", "coreset1"), rate=0.25)


def sampled() -> ImportanceSampling:
    return ImportanceSampling(0.25, generator=torch.Generator().manual_seed(5))


MAKERS: dict[str, Callable[[], dict[str, Any]]] = {
    "adaselection": lambda: {"selector": ada(), "rate": None},
    "importance": lambda: {"selector": sampled(), "rate": None},
    "memory": lambda: {"selector": BigLoss(0.25), "rate": None, "memory": LossMemory(N, max_age=5)},
    "every": lambda: {"selector": ada(), "rate": None, "scoring_every": 2},
    "accumulated": lambda: {"selector": ada(), "rate": None, "accumulation_steps": 2},
}


@pytest.mark.parametrize("name", MAKERS)
def test_resumes_bit_for_bit(name: str) -> None:
    inputs, target = data()

    def run(step: SelectiveStep, begin: int, end: int) -> list[Tensor]:
        chosen = []
        for i in range(begin, end):
            ids = (torch.arange(B) * 3 + 5 * i) % N
            torch.manual_seed(i)
            chosen.append(ids[step(inputs[ids], target[ids], ids).indices])
        return chosen

    whole = make_step(make_model(), switch="select", **MAKERS[name]())
    expected = run(whole, 0, 12)
    first = make_step(make_model(), switch="select", **MAKERS[name]())
    chosen = run(first, 0, 6)
    saved = io.BytesIO()
    torch.save(
        {
            "step": first.state_dict(),
            "model": first.model.state_dict(),
            "optimizer": first.optimizer.state_dict(),
        },
        saved,
    )
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    second = make_step(make_model(seed=8), switch="select", **MAKERS[name]())
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["step"])
    chosen += run(second, 6, 12)
    assert all(torch.equal(one, other) for one, other in zip(chosen, expected, strict=True))
    assert_same_weights(second.model, whole.model)


def test_a_state_of_another_selector_changes_nothing() -> None:
    step = make_step(make_model(), ada(), None, switch="select")
    step(*batch())
    before = copy.deepcopy(step.state_dict())
    other = make_step(
        make_model(), AdaSelection(("big_loss", "small_loss"), rate=0.25), None, switch="select"
    )
    other(*batch())
    with pytest.raises(ValueError, match="big_loss"):
        step.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="memory"):
        step.load_state_dict({**before, "memory": LossMemory(N).state_dict()})
    with pytest.raises(ValueError, match="must have accumulated, memory, selector, steps, switch"):
        step.load_state_dict({})
    after = step.state_dict()
    assert after["steps"] == before["steps"]
    assert_same_bits(
        torch.tensor(list(after["selector"]["method_weights"])),
        torch.tensor(list(before["selector"]["method_weights"])),
    )


# ---- compiled ----


@pytest.mark.parametrize("selector", ["big_loss", "adaselection"])
def test_the_compiled_step_trains_alike(selector: str) -> None:
    model, expected = make_model(), make_model()
    plain = make_step(expected, selector, 0.25, switch="select")
    compiled = make_step(model, selector, 0.25, switch="select")
    compiled.compile(fullgraph=True)
    for seed in range(3):
        one, other = compiled(*batch(seed)), plain(*batch(seed))
        assert torch.equal(one.indices, other.indices)
        torch.testing.assert_close(one.loss, other.loss)
    for first, second in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_torch_compile_around_the_whole_step() -> None:
    model, expected = make_model(), make_model()
    plain = make_step(expected, "adaselection", 0.25, switch="select")
    step = make_step(model, "adaselection", 0.25, switch="select")
    compiled = torch.compile(step)
    for seed in range(3):
        one, other = compiled(*batch(seed)), plain(*batch(seed))
        assert torch.equal(one.indices, other.indices)
    for first, second in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(first, second)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switch": "on"}, "switch must be 'auto', 'select', 'plain' or a CostAwareSwitch"),
        ({"scoring_every": 0}, "scoring_every must be an int of at least 1, got 0"),
        ({"accumulation_steps": 0}, "accumulation_steps must be an int of at least 1, got 0"),
        ({"scoring_dtype": torch.float64}, "scoring_dtype must be torch.float16, torch.bfloat16"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_step(make_model(), **options)


@pytest.mark.parametrize("ids", [torch.arange(3), torch.rand(B), torch.zeros(B, 1).long()])
def test_bad_ids(ids: Tensor) -> None:
    step = make_step(make_model(), switch="select")
    before = copy.deepcopy(step.model)
    with pytest.raises((TypeError, ValueError), match=r"^SelectiveStep: ids must be"):
        step(*batch(), ids)
    assert_same_weights(step.model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_samples_are_left_out_and_counted(value: float) -> None:
    inputs, target = batch()
    inputs[3] = value
    inputs[9] = value
    for selector in ("big_loss", "small_loss", "grad_norm", "adaselection"):
        model = make_model()
        step = make_step(model, selector, 0.5, switch="select")
        result = step(inputs, target)
        assert not {3, 9} & set(result.indices.tolist())
        assert step.selector.excluded == 2
        assert all(torch.isfinite(p).all() for p in model.parameters())
