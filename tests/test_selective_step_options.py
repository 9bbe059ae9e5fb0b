"""`SelectiveStep` beyond the plain use: the switch, memory, cheaper scoring, weights, resuming."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.scores import Scores
from fastsel.select import (
    AdaSelection,
    BigLoss,
    CostAwareSwitch,
    ImportanceSampling,
    LossMemory,
    ReferenceLosses,
    SelectiveStep,
    Selector,
    Uniform,
)

B, D, C, N = 16, 5, 3, 64


def make_model(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, width), nn.Tanh(), nn.Linear(width, C))


def data(seed: int = 0, size: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, D, generator=generator)
    return inputs, torch.randint(0, C, (size,), generator=generator)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return data(seed, B)


def make_step(
    model: nn.Module,
    selector: Any = "big_loss",
    rate: Any = 0.25,
    criterion: Any = None,
    **options: Any,
) -> SelectiveStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SelectiveStep(
        model, criterion or nn.CrossEntropyLoss(), optimizer, selector, rate, **options
    )


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert_same_bits(first.detach(), second.detach())


class Hooked(nn.Module):
    """Counts the samples that pass through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(inputs.shape[0])
        out: Tensor = self.model(inputs)
        return out


class Clock:
    """A clock that a model turns: every sample forward takes a second, every backward two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("fastsel.select.clock.time.perf_counter", lambda: self.now)

    def on(self, model: nn.Module) -> None:
        def passed(module: nn.Module, args: Any, output: Tensor) -> None:
            self.now += args[0].shape[0] * (3.0 if torch.is_grad_enabled() else 1.0)

        model.register_forward_hook(passed)


# ---- the switch ----


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


def test_trials_train_on_the_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only timed does no harm: a choice is made, but not trained on."""
    model = Echo()
    Clock(monkeypatch).on(model)
    step = make_step(model, "small_loss", 0.25)
    chosen = [
        result.indices.tolist()
        for result in (step(*easy_and_hard(0.25)) for _ in range(40))
        if result.selected
    ]
    assert chosen  # small_loss itself would take 4 to 7
    assert all(indices == [0, 1, 2, 3] for indices in chosen)


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


# ---- a memory in place of the scoring forward ----


def test_a_memory_runs_no_scoring_forward_and_learns_the_losses() -> None:
    model = Hooked(make_model())
    memory = LossMemory(N, decay=0.0)
    step = make_step(model, "big_loss", 0.25, memory=memory, switch="select")
    inputs, target = data()
    for epoch in range(4):
        for begin in range(0, N, B):
            ids = torch.arange(begin, begin + B)
            model.sizes.clear()
            before = copy.deepcopy(model.model)
            result = step(inputs[ids], target[ids], ids)
            assert model.sizes == [B // 4]
            trained = ids[result.indices]
            # The memory holds the loss each sample had when it was trained on.
            with torch.no_grad():
                losses = F.cross_entropy(before(inputs[trained]), target[trained], reduction="none")
            held, due = memory.read(trained, step.selection.steps)
            assert not due.any()
            torch.testing.assert_close(held, losses, rtol=3e-6, atol=1e-7)
        _, due = memory.read(torch.arange(N), step.selection.steps)
        assert int(due.sum()) == N - (epoch + 1) * N // 4


def test_a_memory_chooses_by_what_it_holds() -> None:
    memory = LossMemory(N)
    ids = torch.arange(B)
    memory.update(ids, torch.linspace(0, 1, B), 0)
    step = make_step(make_model(), "big_loss", 0.25, memory=memory, switch="select")
    result = step(*batch(), ids)
    assert result.indices.tolist() == [12, 13, 14, 15]
    assert_same_bits(result.scores.loss, torch.linspace(0, 1, B))  # type: ignore[union-attr,arg-type]


def test_what_is_too_old_is_visited_again() -> None:
    memory = LossMemory(N, max_age=3)
    ids = torch.arange(B)
    memory.update(ids, torch.linspace(0, 1, B), 0)
    step = make_step(make_model(), "big_loss", 0.25, memory=memory, switch="select")
    step.selection.steps = 3
    assert step(*batch(), ids).indices.tolist() == [12, 13, 14, 15]
    # One step later the others are too old; those just seen are not.
    step.selection.steps = 4
    memory.update(torch.tensor([0, 1]), torch.zeros(2), 4)
    indices = step(*batch(), ids).indices
    assert set(indices.tolist()).isdisjoint({0, 1, 12, 13, 14, 15})


def test_a_memory_needs_ids() -> None:
    step = make_step(make_model(), memory=LossMemory(N), switch="select")
    with pytest.raises(ValueError, match="ids must be given where there is a loss memory"):
        step(*batch())


def test_a_memory_holds_losses_only() -> None:
    with pytest.raises(ValueError, match="'grad_norm' needs grad_norm"):
        make_step(make_model(), "grad_norm", memory=LossMemory(N))


# ---- cheaper scoring ----


def test_scores_with_another_model() -> None:
    model, small = make_model(), make_model(seed=9, width=2)
    step = make_step(model, scoring_model=small, switch="select")
    inputs, target = batch()
    with torch.no_grad():
        losses = F.cross_entropy(small(inputs), target, reduction="none")
    result = step(inputs, target)
    assert torch.equal(result.indices, losses.topk(4).indices.sort().values)


def test_scores_in_lower_precision_and_trains_in_full() -> None:
    seen: list[torch.dtype] = []
    model = make_model()
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    make_step(model, scoring_dtype=torch.bfloat16, switch="select")(*batch())
    assert seen == [torch.bfloat16, torch.float32]


def test_scores_every_third_step_and_draws_between() -> None:
    model = Hooked(make_model())
    step = make_step(model, scoring_every=3, switch="select")
    torch.manual_seed(3)
    results = [step(*batch(seed)) for seed in range(9)]
    assert [result.scores is not None for result in results] == 3 * [True, False, False]
    assert model.sizes == 3 * [B, 4, 4, 4]
    torch.manual_seed(3)
    draws = [Uniform(0.25)(Scores(batch_size=B)) for _ in range(6)]
    drawn = [result.indices for result in results if result.scores is None]
    assert all(torch.equal(one, other) for one, other in zip(draws, drawn, strict=True))


def test_scores_every_third_step_and_recalls_between() -> None:
    model = Hooked(make_model())
    step = make_step(model, memory=LossMemory(N), scoring_every=3, switch="select")
    for i in range(6):
        model.sizes.clear()
        assert step(*batch(i), torch.arange(B)).scores is not None
        assert model.sizes == ([B, 4] if i % 3 == 0 else [4])


def test_reference_losses_come_from_a_table() -> None:
    reference = torch.rand(N, generator=torch.Generator().manual_seed(1))
    inputs, target = data()
    ids = torch.arange(7, 7 + B)
    model = make_model()
    step = make_step(model, "rho_loss", 0.25, reference=ReferenceLosses(reference), switch="select")
    with torch.no_grad():
        losses = F.cross_entropy(model(inputs[ids]), target[ids], reduction="none")
    expected = (losses - reference[ids]).topk(4).indices.sort().values
    assert torch.equal(step(inputs[ids], target[ids], ids).indices, expected)


def test_rho_loss_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="'rho_loss' needs a reference"):
        make_step(make_model(), "rho_loss")


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


def test_switch_of_ones_own() -> None:
    switch = CostAwareSwitch(margin=0.2)
    assert make_step(make_model(), switch=switch).switch is switch
