"""Per-sample losses for training, and the margin, which both know more than one criterion."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import to_numpy
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.scores import per_sample_losses, per_sample_scores

NAN, INF = float("nan"), float("inf")
NATIVE = nn.CrossEntropyLoss(ignore_index=3)
SMOOTHED = nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1)


def batch(*shape: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C, ...]`` that want a gradient, and targets, some of them ignored."""
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 2 * torch.randn(shape[0], classes, *shape[1:], generator=generator)
    target = torch.randint(0, classes, shape, generator=generator)
    return logits.requires_grad_(), target


# ---- per_sample_losses ----


def mse_by_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


CRITERIA: dict[str, tuple[Any, tuple[int, ...]]] = {
    "native": (NATIVE, (6,)),
    "native tokens": (NATIVE, (6, 7)),
    "native pixels": (NATIVE, (3, 2, 4)),
    "function": (F.cross_entropy, (6,)),
    "smoothed": (SMOOTHED, (6,)),
    "smoothed tokens": (SMOOTHED, (6, 7)),
    "weights": (nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0)), (6,)),
    "partial": (functools.partial(F.cross_entropy, label_smoothing=0.2), (6, 7)),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_losses_are_the_scores_and_have_their_gradient(name: str) -> None:
    criterion, shape = CRITERIA[name]
    logits, target = batch(*shape)
    losses = per_sample_losses(criterion, logits, target)
    assert losses.shape == shape[:1]
    assert losses.requires_grad
    scores = per_sample_scores(criterion, logits, target, needs=("loss", "grad_norm"))
    # The same sums over positions, perhaps in another order.
    torch.testing.assert_close(losses.detach(), scores.loss, rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    norms = torch.linalg.vector_norm(grad.flatten(1), dim=1)
    # A softmax minus a one-hot vector, in float32 on either side.
    torch.testing.assert_close(norms, scores.grad_norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", [NATIVE, SMOOTHED], ids=["native", "generic"])
@pytest.mark.parametrize("shape", [(8,), (4, 6)], ids=str)
def test_weighted_means_train_as_a_loop_would(criterion: Any, shape: tuple[int, ...]) -> None:
    logits, target = batch(*shape)
    target.view(shape[0], -1)[0] = 3  # nothing to learn from
    weights = torch.rand(shape[0]) + 0.5
    (grad,) = torch.autograd.grad(
        (weights * per_sample_losses(criterion, logits, target)).mean(), logits
    )
    by_hand = []
    for i in range(1, shape[0]):
        alone, its_target = logits[i : i + 1].double(), target[i : i + 1]
        by_hand.append(weights[i].double() * criterion(alone, its_target))
    kept = torch.stack(by_hand)
    (expected,) = torch.autograd.grad(kept[kept.isfinite()].sum() / shape[0], logits)
    assert (grad[0] == 0).all()
    torch.testing.assert_close(grad[1:], expected[1:], rtol=1e-5, atol=1e-7)


def test_losses_of_other_criteria() -> None:
    output = torch.randn(4, 3, requires_grad=True)
    target = torch.randn(4, 3)
    losses = per_sample_losses(nn.MSELoss(), output, target)
    # Three float32 terms in a row.
    torch.testing.assert_close(losses, mse_by_sample(output, target), rtol=1e-6, atol=0)
    assert torch.equal(per_sample_losses(mse_by_sample, output, target), losses)
    assert per_sample_losses(NATIVE, *batch(0)).shape == (0,)
    half, classes = batch(4)
    assert per_sample_losses(NATIVE, half.half(), classes).dtype == torch.float32


def test_losses_name_themselves_in_errors() -> None:
    with pytest.raises(ValueError, match=r"^per_sample_losses: output and target must have the"):
        per_sample_losses(NATIVE, torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"^per_sample_losses: criterion <lambda> gives no per-sam"
    ):
        per_sample_losses(lambda o, t: o.mean(), torch.zeros(3, 5), torch.zeros(3))


# ---- margin ----


def margin_reference(logits: Tensor, target: Tensor, ignored: int) -> NDArray[np.float64]:
    """The difference of the two largest probabilities, position by position, in float64."""
    z = to_numpy(logits)
    p = np.exp(z - z.max(1, keepdims=True))
    p = np.sort(p / p.sum(1, keepdims=True), axis=1)
    margin = p[:, -1] - (p[:, -2] if p.shape[1] > 1 else 0.0)
    margin, kept = margin.reshape(len(z), -1), target.numpy().reshape(len(z), -1) != ignored
    return np.array([m[k].mean() if k.any() else 1.0 for m, k in zip(margin, kept, strict=True)])


@pytest.mark.parametrize("criterion", [NATIVE, SMOOTHED], ids=["native", "generic"])
@pytest.mark.parametrize("shape", [(40,), (8, 9), (4, 2, 6)], ids=str)
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_margin(criterion: Any, shape: tuple[int, ...], classes: int) -> None:
    logits, target = batch(*shape, classes=classes)
    target.view(shape[0], -1)[0] = 3
    target.view(shape[0], -1)[1] = 0
    margin = per_sample_scores(criterion, logits, target, needs=("margin",)).margin
    assert margin is not None
    assert not margin.requires_grad
    expected = margin_reference(logits, target, 3)
    # A logsumexp below 10 and a few roundings, all relative.
    np.testing.assert_allclose(to_numpy(margin), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("criterion", [NATIVE, SMOOTHED], ids=["native", "generic"])
def test_margin_of_hard_rows(criterion: Any) -> None:
    rows = [
        ([0.0, 500.0, 0.0, 0.0], 1.0),  # certain
        ([2.0, -1.0, 2.0, 1.0], 0.0),  # a tie
        ([math.log(3 / 6), math.log(2 / 6), math.log(0.5 / 6), math.log(0.5 / 6)], 1 / 6),
        ([1e-4, 0.0, -INF, -INF], math.tanh(0.5e-4)),  # two classes alone
    ]
    logits = torch.tensor([row for row, _ in rows])
    target = torch.zeros(len(rows), dtype=torch.int64)
    margin = per_sample_scores(criterion, logits, target, needs=("margin",)).margin
    assert margin is not None
    # A few float32 roundings, all relative: the small one keeps its digits.
    torch.testing.assert_close(
        margin, torch.tensor([expected for _, expected in rows]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("criterion", [NATIVE, SMOOTHED], ids=["native", "generic"])
@pytest.mark.parametrize("row", [[NAN, 1.0], [INF, 0.0], [-INF, -INF], [INF, INF]], ids=str)
def test_margin_of_broken_rows(criterion: Any, row: list[float]) -> None:
    logits, target = torch.tensor([row, [0.0, 1.0]]), torch.tensor([0, 0])
    margin = per_sample_scores(criterion, logits, target, needs=("margin",)).margin
    assert margin is not None
    assert margin.isnan().tolist() == [True, False]


def test_margin_stays_a_probability() -> None:
    # Where the logits are large, so is the logsumexp's rounding.
    logits = torch.tensor([[60000.0, -60000.0], [59968.0, 60000.0]], dtype=torch.float16)
    margin = per_sample_scores(NATIVE, logits, torch.tensor([0, 0]), needs=("margin",)).margin
    assert margin is not None
    assert margin.tolist() == [1.0, 1.0]
    one = per_sample_scores(
        NATIVE, torch.randn(4, 1), torch.zeros(4, dtype=torch.int64), needs=("margin",)
    ).margin
    assert one is not None
    assert one.tolist() == [1.0] * 4
    empty = per_sample_scores(NATIVE, *batch(0, 4), needs=("margin",)).margin
    assert empty is not None
    assert empty.shape == (0,)


def test_margin_is_made_only_where_wanted() -> None:
    logits, target = batch(4)
    assert per_sample_scores(NATIVE, logits, target).margin is None
    scores = per_sample_scores(NATIVE, logits, target, needs=("loss", "reference_loss"))
    assert scores.reference_loss is None
