"""`SelectiveStep` and its switch: selective steps where they pay, plain ones elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from step_samples import B, C, Hooked, assert_same_weights, batch, make_model, make_step
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.select import CostAwareSwitch


class Clock:
    """A clock that a model turns: every sample forward takes a second, every backward two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("fastsel.select.clock.time.perf_counter", lambda: self.now)

    def on(self, model: nn.Module) -> None:
        def passed(module: nn.Module, args: Any, output: Tensor) -> None:
            self.now += args[0].shape[0] * (3.0 if torch.is_grad_enabled() else 1.0)

        model.register_forward_hook(passed)


def easy_and_hard(hard_share: float) -> tuple[Tensor, Tensor]:
    """A batch of which a share is answered wrong, surely, and the rest right."""
    target = torch.zeros(B, dtype=torch.int64)
    logits = torch.zeros(B, C)
    logits[:, 0] = 12.0
    hard = round(hard_share * B)
    logits[:hard, 0] = -12.0
    return logits, target


class Echo(nn.Module):
    """Gives its inputs as logits; its weight moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0 * self.weight


@pytest.mark.parametrize(("hard_share", "pays"), [(0.25, True), (1.0, False)])
@pytest.mark.parametrize("selector", ["big_loss", "grad_norm", "adaselection:big_loss+grad_norm"])
def test_chooses_only_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, selector: str, hard_share: float, pays: bool
) -> None:
    # At a rate of 1/4 a selective step costs (1 + 3/4) / 3 = 0.58 of a plain one.
    model = Echo()
    Clock(monkeypatch).on(model)
    step = make_step(model, selector, 0.25)
    results = [step(*easy_and_hard(hard_share)) for _ in range(100)]
    decisions = step.switch.decisions
    assert [decision.select for decision in decisions] == [pays]
    assert decisions[0].cost == pytest.approx((1 + 3 / 4) / 3)
    assert decisions[0].share == pytest.approx(1.0 if pays else 0.25, abs=1e-3)
    assert {result.selected for result in results[decisions[0].step :]} == {pays}
    plain = [result for result in results if not result.selected]
    assert all(result.indices.tolist() == list(range(B)) for result in plain)
    assert all(len(result.indices) == 4 for result in results if result.selected)


def test_small_loss_does_not_pay_where_big_loss_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    Clock(monkeypatch).on(model)
    step = make_step(model, "small_loss", 0.25)
    for _ in range(60):
        step(*easy_and_hard(0.25))
    assert [decision.select for decision in step.switch.decisions] == [False]


@pytest.mark.parametrize("hard_share", [0.25, 1.0])
def test_a_criterion_without_gradient_norms_is_judged_by_its_losses(
    monkeypatch: pytest.MonkeyPatch, hard_share: float
) -> None:
    model = Echo()
    Clock(monkeypatch).on(model)

    def criterion(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"], target, reduction="none")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": self.model(inputs)}

    step = make_step(Wrapped(), "big_loss", 0.25, criterion)
    for _ in range(60):
        step(*easy_and_hard(hard_share))
    assert [decision.select for decision in step.switch.decisions] == [hard_share == 0.25]


def test_trials_train_on_evenly_spaced_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only timed does no harm: a choice is made, but not trained on."""
    model = Echo()
    Clock(monkeypatch).on(model)
    step = make_step(model, "small_loss", 0.25)
    results = [step(*easy_and_hard(0.25)) for _ in range(40)]
    chosen = [result.indices.tolist() for result in results if result.selected]
    assert chosen  # small_loss itself would take 4 to 7
    assert all(indices == [0, 4, 8, 12] for indices in chosen)
    assert [result.trial for result in results] == [result.selected for result in results]


def test_plain_steps_are_plain_steps() -> None:
    model, expected = make_model(), make_model()
    step = make_step(model, switch="plain")
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        inputs, target = batch(seed)
        result = step(inputs, target)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(expected(inputs), target)
        torch.autograd.backward(loss)
        optimizer.step()
        assert_same_bits(result.loss, loss.detach())
        assert not result.selected
        assert result.scores is None
    assert_same_weights(model, expected)
    assert step.switch.decisions == []


def test_measuring_runs_no_forward_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hooked(Echo())
    Clock(monkeypatch).on(model.model)
    step = make_step(model, "big_loss", 0.25)
    for _ in range(100):
        model.sizes.clear()
        result = step(*easy_and_hard(1.0))
        assert model.sizes == ([B, B // 4] if result.selected else [B])


def test_a_selector_without_scores_is_never_switched_off() -> None:
    step = make_step(make_model(), "uniform", 0.25)
    assert all(step(*batch(seed)).selected for seed in range(30))
    assert step.switch.decisions == []


def test_switch_of_ones_own() -> None:
    switch = CostAwareSwitch(margin=0.2)
    assert make_step(make_model(), switch=switch).switch is switch
