"""What `SelectiveStep` says to bad input, and that saying it changes nothing."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from test_selective_step import B, C, assert_same_state, batch, classifier, make_step
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.select import BigLoss, SelectiveStep

INPUTS, TARGET = batch()


@pytest.mark.parametrize(
    ("inputs", "target", "error", "text"),
    [
        (
            INPUTS,
            TARGET[:5],
            ValueError,
            "inputs must have the first dimension 5 of target, got shape [12, 6]",
        ),
        (
            (INPUTS, INPUTS[:3]),
            TARGET,
            ValueError,
            "inputs[1] must have the first dimension 12 of target, got shape [3, 6]",
        ),
        (
            {"x": INPUTS[:3]},
            TARGET,
            ValueError,
            "inputs['x'] must have the first dimension 12 of target, got shape [3, 6]",
        ),
        ((INPUTS, 3), TARGET, TypeError, "inputs[1] must be a tensor, got int"),
        (
            "text",
            TARGET,
            TypeError,
            "inputs must be a tensor, or a tuple, list or dict of tensors, got str",
        ),
        (INPUTS, [0] * B, TypeError, "target must be a tensor, got list"),
        (INPUTS, TARGET[0], ValueError, "target must be [B, ...], got a tensor without dimensions"),
        (INPUTS[:0], TARGET[:0], ValueError, "the batch must not be empty"),
    ],
)
@pytest.mark.parametrize("selector", ["big_loss", "uniform"])
def test_bad_batches_change_nothing(
    inputs: Any, target: Any, error: type[Exception], text: str, selector: str
) -> None:
    model = classifier()
    before = copy.deepcopy(model)
    step = make_step(model, selector=selector)
    with pytest.raises(error, match=f"^{re.escape('SelectiveStep: ' + text)}$"):
        step(inputs, target)
    assert_same_state(model, before)
    assert not step.optimizer.state_dict()["state"]


def test_a_criterion_that_cannot_be_scored_changes_nothing() -> None:
    def mean_loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    model = classifier()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="criterion mean_loss gives no per-sample losses"):
        make_step(model, mean_loss)(*batch())
    assert_same_state(model, before)
    assert all(module.training for module in model.modules())
    make_step(model, mean_loss, "uniform")(*batch())  # nothing to score, nothing to refuse


def test_out_of_range_targets_change_nothing() -> None:
    model = classifier()
    before = copy.deepcopy(model)
    inputs, target = batch()
    target[3] = C
    with pytest.raises(IndexError, match=re.escape(f"target must be in [0, {C})")):
        make_step(model)(inputs, target)
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"model": print},
            TypeError,
            "model must be a torch.nn.Module, got builtin_function_or_method",
        ),
        ({"criterion": "mse"}, TypeError, "criterion must be callable, got str"),
        (
            {"selector": "best"},
            ValueError,
            "make_selector: name must be one of uniform, big_loss, small_loss, grad_norm, ",
        ),
        (
            {"selector": len},
            TypeError,
            "selector must be a Selector or a name, got builtin_function_or_method",
        ),
        (
            {"selector": BigLoss(0.5)},
            ValueError,
            "rate must not be given beside a selector, which has its own, got 0.5",
        ),
        ({"rate": None}, ValueError, "rate must be given with the selector's name 'big_loss'"),
        ({"rate": 1.5}, ValueError, "rate must be in (0, 1], got 1.5"),
        (
            {"scoring_mode": "test"},
            ValueError,
            "scoring_mode must be 'eval' or 'train', got 'test'",
        ),
        (
            {"autocast_dtype": torch.float32},
            ValueError,
            "must be torch.float16, torch.bfloat16 or None, got torch.float32",
        ),
    ],
)
def test_bad_steps(change: dict[str, Any], error: type[Exception], text: str) -> None:
    model = classifier()
    arguments: dict[str, Any] = {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "selector": "big_loss",
        "rate": 0.5,
        **change,
    }
    with pytest.raises(error, match=re.escape(text)):
        SelectiveStep(**arguments)


def test_an_exception_while_scoring_leaves_everything_alone() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier(dropout=0.1)

        def forward(self, inputs: Tensor) -> Tensor:
            self.inner(inputs)
            raise ArithmeticError("no")

    model = Fails()
    model.inner.norm.eval()
    model.inner.hidden.weight.grad = torch.ones_like(model.inner.hidden.weight)
    before = copy.deepcopy(model)
    flags = [module.training for module in model.modules()]
    step = make_step(model)
    with pytest.raises(ArithmeticError, match=r"^no$"):
        step(*batch())
    assert [module.training for module in model.modules()] == flags
    assert_same_state(model, before)
    assert model.inner.hidden.weight.grad is not None
    assert torch.equal(model.inner.hidden.weight.grad, torch.ones_like(model.inner.hidden.weight))
    assert not step.optimizer.state_dict()["state"]
