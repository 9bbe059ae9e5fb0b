"""`SelectiveStep`: what it trains on, what it leaves alone, and what it says to bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.scores import Scores
from fastsel.select import SelectiveStep, StepResult, Uniform

B, D, C = 12, 6, 4


class Classifier(nn.Module):
    """A small network with the layers that behave differently in training."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.hidden = nn.Linear(D, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, C)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.norm(self.hidden(inputs)).relu()))
        return logits


def classifier(*, dropout: float = 0.0) -> Classifier:
    return Classifier(dropout)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator), torch.randint(0, C, (B,), generator=generator)


def make_step(
    model: nn.Module, criterion: Any = None, selector: Any = "big_loss", rate: Any = 0.25, **kw: Any
) -> SelectiveStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kw.setdefault("switch", "select")
    return SelectiveStep(model, criterion or nn.CrossEntropyLoss(), optimizer, selector, rate, **kw)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    for (name, first), second in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


def plain_step(
    model: nn.Module, criterion: Callable[..., Tensor], inputs: Tensor, target: Tensor
) -> Tensor:
    """The textbook training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.zero_grad(set_to_none=True)
    loss = criterion(model(inputs), target)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("selector", ["uniform", "big_loss", "small_loss", "grad_norm"])
def test_a_rate_of_one_is_the_plain_step(selector: str) -> None:
    model = classifier()
    expected = copy.deepcopy(model)
    inputs, target = batch()
    result = make_step(model, selector=selector, rate=1.0)(inputs, target)
    loss = plain_step(expected, nn.CrossEntropyLoss(), inputs, target)
    assert_same_bits(result.loss, loss)
    assert_same_state(model, expected)
    assert result.indices.tolist() == list(range(B))


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["native", "generic"])
def test_trains_on_exactly_the_chosen(smoothing: float) -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    model = classifier()
    inputs, target = batch()
    with torch.no_grad():
        losses = F.cross_entropy(
            copy.deepcopy(model).eval()(inputs),
            target,
            reduction="none",
            label_smoothing=smoothing,
        )
    hardest = losses.topk(3).indices.sort().values
    expected = copy.deepcopy(model)
    result = make_step(model, criterion)(inputs, target)
    assert isinstance(result, StepResult)
    assert torch.equal(result.indices, hardest)
    assert result.scores is not None
    # float32 cross-entropy of moderate logits, computed in two ways.
    torch.testing.assert_close(result.scores.loss, losses, rtol=3e-6, atol=1e-7)
    loss = plain_step(expected, criterion, inputs[hardest], target[hardest])
    assert_same_bits(result.loss, loss)
    assert result.loss.dim() == 0
    assert not result.loss.requires_grad
    assert_same_state(model, expected)


def test_uniform_runs_no_scoring_forward() -> None:
    model = classifier()
    sizes: list[int] = []
    model.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[0]))
    step = make_step(model, selector="uniform")
    result = step(*batch())
    assert sizes == [3]
    assert result.scores is None
    assert step.score(*batch()) is None
    make_step(model, selector="big_loss")(*batch())
    assert sizes == [3, B, 3]


def test_scoring_leaves_everything_alone() -> None:
    model = classifier(dropout=0.5)
    model.norm.eval()  # a layer frozen for good, inside a model in training
    step = make_step(model)
    step(*batch())
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, grads = copy.deepcopy(model), [parameter.grad for parameter in model.parameters()]
    optimizer_state = copy.deepcopy(step.optimizer.state_dict())
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    first, second = step.score(*batch(1)), step.score(*batch(1))
    assert first is not None
    assert second is not None
    assert first.loss is not None
    assert second.loss is not None
    assert_same_bits(first.loss, second.loss)  # no dropout noise
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == flags
    assert flags[0]
    assert not flags[2]
    assert_same_state(model, before)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad
    after = step.optimizer.state_dict()
    for key, buffers in optimizer_state["state"].items():
        assert torch.equal(buffers["momentum_buffer"], after["state"][key]["momentum_buffer"])


def test_batch_norm_counts_each_step_once() -> None:
    model = classifier()
    make_step(model)(*batch())
    assert model.norm.num_batches_tracked == 1
    make_step(model, scoring_mode="train")(*batch())
    assert model.norm.num_batches_tracked == 3


def test_train_mode_scores_with_each_module_as_it_is() -> None:
    model = classifier(dropout=0.9)
    seen: list[list[bool]] = []
    model.register_forward_hook(
        lambda *_: seen.append([module.training for module in model.modules()])
    )
    model.norm.eval()
    flags = [module.training for module in model.modules()]
    make_step(model, scoring_mode="train")(*batch())
    make_step(model, scoring_mode="eval")(*batch())
    assert seen == [flags, flags, [False] * len(flags), flags]


def test_old_gradients_do_not_leak_in() -> None:
    model, other = classifier(), classifier()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    make_step(model)(*batch())
    make_step(other)(*batch())
    assert_same_state(model, other)


def regression_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(D, 2)


@pytest.mark.parametrize("selector", ["big_loss", "small_loss", "grad_norm"])
@pytest.mark.parametrize(
    "criterion",
    [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), F.mse_loss],
    ids=["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "mse_loss"],
)
def test_regression(criterion: Any, selector: str) -> None:
    model = regression_model()
    inputs = batch()[0]
    target = torch.zeros(B, 2)
    target[5] = 100.0
    result = make_step(model, criterion, selector, 0.1)(inputs, target)
    if selector == "big_loss" or (selector == "grad_norm" and isinstance(criterion, nn.MSELoss)):
        assert result.indices.tolist() == [5]
    if selector == "small_loss":
        assert 5 not in result.indices.tolist()
    losses = [
        make_step(model, nn.MSELoss(), "big_loss", 1.0)(inputs, inputs[:, :2]).loss
        for _ in range(200)
    ]
    assert losses[-1] < 0.01 * losses[0]


class TokenModel(nn.Module):
    """Predicts each token's class; gives torch's layout [B, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, tokens: Tensor, shift: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.embedding(tokens))
        return (logits if shift is None else logits + shift[:, None, None]).transpose(1, 2)


@pytest.mark.parametrize("selector", ["big_loss", "small_loss", "grad_norm", "uniform"])
def test_tokens(selector: str) -> None:
    model = TokenModel()
    tokens = torch.randint(0, 10, (B, 7))
    target = (tokens + 1) % 10
    target[:, 5:] = -100
    target[4] = -100
    step = make_step(model, nn.CrossEntropyLoss(), selector, 0.5)
    result = step(tokens, target)
    assert result.indices.shape == (6,)
    if selector in ("big_loss", "grad_norm"):
        assert 4 not in result.indices.tolist()
    for _ in range(120):
        last = step(tokens, target)
    assert last.loss < 0.5 * result.loss


def test_several_inputs() -> None:
    tokens, shift = torch.randint(0, 10, (B, 7)), torch.linspace(0, 1, B)
    results = []
    forms: list[Any] = [(tokens, shift), [tokens, shift], {"tokens": tokens, "shift": shift}]
    for inputs in forms:
        model = TokenModel()
        results.append((make_step(model)(inputs, (tokens + 1) % 10), model))
    for result, model in results[1:]:
        assert_same_bits(result.loss, results[0][0].loss)
        assert torch.equal(result.indices, results[0][0].indices)
        assert_same_state(model, results[0][1])


def test_a_criterion_of_per_sample_losses_trains_on_their_mean() -> None:
    inputs, target = batch()
    model, other = classifier(), classifier()
    result = make_step(
        model, lambda output, target: F.cross_entropy(output, target, reduction="none")
    )(inputs, target)
    expected = make_step(other)(inputs, target)
    assert torch.equal(result.indices, expected.indices)
    # Torch may add the three losses of a mean in another order.
    torch.testing.assert_close(result.loss, expected.loss, rtol=3e-7, atol=0)


@pytest.mark.parametrize("selector", ["big_loss", "grad_norm", "uniform"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["native", "generic"])
def test_autocast(selector: str, smoothing: float) -> None:
    model = classifier()
    seen: set[torch.dtype] = set()
    model.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    step = make_step(model, criterion, selector, 0.5, autocast_dtype=torch.bfloat16)
    before = copy.deepcopy(model)
    result = step(*batch())
    assert seen == {torch.bfloat16}
    assert result.loss.dtype == torch.float32
    if result.scores is not None:
        assert result.scores.loss is not None
        assert result.scores.loss.dtype == torch.float32
    assert not torch.equal(before.hidden.weight, model.hidden.weight)
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_of_the_caller() -> None:
    # Weights cast while scoring have no gradient; reused from autocast's cache they would train
    # nothing.
    model, other = classifier(), classifier()
    inputs, target = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = make_step(model)(inputs, target)
    expected = make_step(other, autocast_dtype=torch.bfloat16)(inputs, target)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_same_bits(result.loss, expected.loss)
    assert_same_state(model, other)
    fresh = classifier()
    assert not torch.equal(fresh.hidden.weight, model.hidden.weight)


def test_gradient_scaler() -> None:
    inputs, target = batch()
    model, other = classifier(), classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    result = make_step(model, scaler=scaler)(inputs, target)
    expected = make_step(other)(inputs, target)
    assert_same_bits(result.loss, expected.loss)
    # Scaling by a power of two and back is exact.
    assert_same_state(model, other)
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    weights = copy.deepcopy(model.hidden.weight)
    make_step(model, scaler=scaler)(inputs, target)
    assert torch.equal(model.hidden.weight, weights)
    assert scaler.get_scale() == 512.0


def test_phases_compose() -> None:
    inputs, target = batch()
    model, other = classifier(), classifier()
    step = make_step(model)
    scores = step.score(inputs, target)
    indices = step.choose(scores, B)
    loss = step.train(inputs, target, indices)
    result = make_step(other)(inputs, target)
    assert torch.equal(indices, result.indices)
    assert_same_bits(loss, result.loss)
    assert step.choose(Scores(batch_size=0, loss=torch.empty(0)), 0).shape == (0,)


def test_state_resumes() -> None:
    def run(step: SelectiveStep, seeds: range) -> list[list[int]]:
        return [step(*batch(seed)).indices.tolist() for seed in seeds]

    step = make_step(
        classifier(), selector=Uniform(0.5, generator=torch.Generator().manual_seed(0)), rate=None
    )
    run(step, range(3))
    state = step.state_dict()
    resumed = make_step(classifier(), selector=Uniform(0.5, generator=torch.Generator()), rate=None)
    resumed.load_state_dict(state)
    assert run(resumed, range(3, 6)) == run(step, range(3, 6))
    with pytest.raises(ValueError, match="state must have accumulated, memory"):
        step.load_state_dict({})


def test_nan_losses_are_passed_over() -> None:
    model = classifier()
    inputs, target = batch()
    inputs[2] = float("nan")
    result = make_step(model, selector="big_loss", rate=0.5)(inputs, target)
    assert 2 not in result.indices.tolist()
    assert result.loss.isfinite()
    assert result.scores is not None
    assert result.scores.loss is not None
    assert result.scores.loss[2].isnan()  # and can be seen
    assert all(parameter.isfinite().all() for parameter in model.parameters())
