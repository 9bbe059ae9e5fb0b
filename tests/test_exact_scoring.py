"""Selection by the samples' true gradient norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsel.scores import Scores
from fastsel.select import AdaSelection, CostAwareSwitch, SelectiveStep
from fastsel.select.exact_scoring import ExactScorer

B, D, C = 24, 6, 4


def make() -> tuple[nn.Module, Tensor, Tensor]:
    """A model whose output norms say little of the whole network's, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, C))
    inputs = torch.randn(B, D) * torch.logspace(-1, 1, B)[:, None]
    return model, inputs, torch.randint(0, C, (B,))


def true_norms(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:  # [B]
    """One backward a sample, in eval mode."""
    criterion = nn.CrossEntropyLoss()
    model.eval()
    rows = []
    for x, y in zip(inputs.split(1), target.split(1), strict=True):
        grads = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]).norm())
    model.train()
    return torch.stack(rows)


def test_norms_are_the_whole_networks() -> None:
    model, inputs, target = make()
    expected = true_norms(model, inputs, target)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    scores = ExactScorer(model, nn.CrossEntropyLoss())(inputs, target, {"grad_norm", "entropy"})
    assert scores.grad_norm is not None and scores.loss is not None and scores.entropy is not None
    torch.testing.assert_close(scores.grad_norm, expected, rtol=1e-5, atol=1e-7)
    assert not scores.loss.requires_grad
    assert all(module.training for module in model.modules())
    for parameter in model.parameters():
        assert parameter.grad is not None and (parameter.grad == 1).all()


def test_nothing_goes_backward_where_norms_are_not_asked_for() -> None:
    model, inputs, target = make()
    calls = []
    next(model.children()).register_full_backward_hook(lambda *_: calls.append(1))
    ExactScorer(model, nn.CrossEntropyLoss())(inputs, target, {"loss"})
    assert not calls


@pytest.mark.parametrize("selector", ["grad_norm", "adaselection"])
def test_a_step_chooses_by_them(selector: str) -> None:
    model, inputs, target = make()
    expected = true_norms(model, inputs, target)
    chooser = AdaSelection(("grad_norm",), 0.25) if selector == "adaselection" else "grad_norm"
    rate = None if selector == "adaselection" else 0.25
    step = SelectiveStep(
        model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), chooser, rate,
        switch="select", grad_norms="exact",
    )  # fmt: skip
    result = step(inputs, target)
    assert isinstance(result.scores, Scores) and result.scores.grad_norm is not None
    torch.testing.assert_close(result.scores.grad_norm, expected, rtol=1e-5, atol=1e-7)
    if selector == "grad_norm":
        assert result.indices.tolist() == sorted(expected.topk(6).indices.tolist())
    bound = SelectiveStep(
        make()[0], nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1),
        "grad_norm", 0.25, switch="select",
    )(inputs, target)  # fmt: skip
    assert bound.indices.tolist() != sorted(expected.topk(6).indices.tolist())


def test_the_switch_counts_their_cost() -> None:
    model, inputs, target = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    switch = CostAwareSwitch()
    step = SelectiveStep(
        model, nn.CrossEntropyLoss(), optimizer, "grad_norm", 0.5, switch=switch, grad_norms="exact"
    )
    for _ in range(40):
        assert step(inputs, target).loss.isfinite()
    assert switch.decisions


def test_an_autocast_scoring_forward() -> None:
    model, inputs, target = make()
    expected = true_norms(model, inputs, target)
    scorer = ExactScorer(model, nn.CrossEntropyLoss(), autocast_dtype=torch.bfloat16)
    scores = scorer(inputs, target, {"grad_norm"})
    assert scores.grad_norm is not None
    torch.testing.assert_close(scores.grad_norm, expected, rtol=0.1, atol=0.05)


def test_errors() -> None:
    model, _, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"grad_norms must be 'bound' or 'exact', got 'true'"):
        SelectiveStep(model, criterion, optimizer, "grad_norm", 0.5, grad_norms="true")
    with pytest.raises(ValueError, match="'big_loss' needs loss"):
        SelectiveStep(model, criterion, optimizer, "big_loss", 0.5, grad_norms="exact")
