"""`BatchSelection`: what steps cost and measure, and what is refused before anything changed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.scores import Scores
from fastsel.select import (
    SELECTORS,
    BatchSelection,
    CostAwareSwitch,
    LossMemory,
    ReferenceLosses,
    SelectiveStep,
    Selector,
    make_selector,
)
from fastsel.select.clock import Stopwatch
from fastsel.select.switch import Plan

B, D, C = 16, 5, 3


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator), torch.randint(0, C, (B,), generator=generator)


def make_step(
    model: nn.Module | None = None, selector: Any = "big_loss", rate: Any = 0.25, **options: Any
) -> SelectiveStep:
    torch.manual_seed(0)
    model = nn.Linear(D, C) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return SelectiveStep(model, nn.CrossEntropyLoss(), optimizer, selector, rate, **options)


class Echo(nn.Module):
    """Gives its inputs as logits: a forward takes a second a sample, with a backward three."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.now = 0.0
        monkeypatch.setattr("fastsel.select.clock.time.perf_counter", lambda: self.now)

    def forward(self, inputs: Tensor) -> Tensor:
        self.now += inputs.shape[0] * (3.0 if torch.is_grad_enabled() else 1.0)
        return inputs + 0 * self.weight


def a_quarter_hard() -> tuple[Tensor, Tensor]:
    logits = torch.zeros(B, C)
    logits[:, 0] = 12.0
    logits[: B // 4, 0] = -12.0
    return logits, torch.zeros(B, dtype=torch.int64)


class Planned(CostAwareSwitch):
    """Plans what it is told, and writes down what it hears."""

    def __init__(self, *plans: Plan) -> None:
        super().__init__()
        self.plans = list(plans)
        self.heard: list[dict[str, Any]] = []

    def plan(self, unheard: int = 0) -> Plan:
        return self.plans[len(self.heard) % len(self.plans)]

    def observe(self, plan: Plan, **report: Any) -> None:
        self.heard.append({"plan": plan, **report})


# ---- what is measured ----


def test_seldom_scoring_is_judged_by_all_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(Echo(monkeypatch), scoring_every=4)
    for _ in range(200):
        step(*a_quarter_hard())
    decision = step.switch.decisions[0]
    # Of four steps one scores 16 samples; all train on 4, three of them on random ones.
    assert decision.cost == pytest.approx((16 + 4 * 12) / (4 * 48))
    assert decision.share == pytest.approx((1 + 3 * 0.25) / 4, abs=1e-3)


def test_a_step_that_does_not_score_measures_nothing() -> None:
    switch = Planned(Plan(select=True, measure=True))
    step = make_step(scoring_every=2, switch=switch)
    for _ in range(6):
        step(*batch())
    assert [report["plan"].measure for report in switch.heard] == 3 * [True, False]
    assert [report["share"] > 0 for report in switch.heard] == 3 * [True, False]


def test_the_step_of_the_optimizer_counts_in_every_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo(monkeypatch)
    step = make_step(model, accumulation_steps=2)
    update = step.optimizer.step

    def slow_update() -> None:
        model.now += 100.0
        update()

    monkeypatch.setattr(step.optimizer, "step", slow_update)
    for _ in range(200):
        step(*a_quarter_hard())
    assert step.switch.cost == pytest.approx((2 * 28 + 100) / (2 * 48 + 100))


class Backwards(nn.Module):
    """Scores the easy samples as hard ones."""

    def forward(self, inputs: Tensor) -> Tensor:
        return -inputs


@pytest.mark.parametrize("scoring_model", [Backwards, nn.Identity])
def test_another_models_choice_is_weighed_by_the_trained_one(
    monkeypatch: pytest.MonkeyPatch, scoring_model: type[nn.Module]
) -> None:
    step = make_step(Echo(monkeypatch), scoring_model=scoring_model())
    results = [step(*a_quarter_hard()) for _ in range(200)]
    good = scoring_model is nn.Identity
    assert [decision.select for decision in step.switch.decisions] == [good]
    assert step.switch.decisions[0].share == pytest.approx(float(good), abs=1e-3)
    # It goes on looking while it selects: at plain steps.
    assert {result.selected for result in results[100:]} == ({True, False} if good else {False})


@pytest.mark.parametrize("fresh", [True, False])
def test_a_recalled_choice_is_weighed_by_what_is_true_now(
    monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    inputs, target = a_quarter_hard()
    memory = LossMemory(B, decay=0.0)
    hard = torch.arange(B) < B // 4
    memory.update(torch.arange(B), torch.where(hard if fresh else ~hard, 5.0, 0.1), 0)
    switch = Planned(Plan(select=True, measure=True))
    step = make_step(Echo(monkeypatch), memory=memory, switch=switch)
    plan = step.selection.plan()
    assert not plan.select  # a recalled loss says nothing of itself
    share = step.selection.measure_output(inputs, inputs, target, torch.arange(B))
    assert share is not None
    assert share.item() == pytest.approx(float(fresh), abs=1e-3)
    assert memory.losses[0] > 8.0  # and is brought up to date


def test_of_steps_that_score_and_recall_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, target = a_quarter_hard()
    memory = LossMemory(B, decay=0.9)
    memory.update(torch.arange(B), torch.where(torch.arange(B) < B // 4, 0.1, 5.0), 0)
    step = make_step(Echo(monkeypatch), memory=memory, scoring_every=4)
    share = step.selection.measure_output(inputs, inputs, target, torch.arange(B))
    assert share is not None
    assert share.item() == pytest.approx((1 + 3 * 0) / 4, abs=1e-3)


def test_a_step_that_scores_more_than_usual_is_not_timed() -> None:
    """A selector of losses is asked for gradient norms, too, where its choice is measured."""
    switch = Planned(Plan(select=True, measure=True), Plan(select=True, measure=False))
    criterion = nn.MSELoss()  # whose norms take a backward
    step = make_step(nn.Linear(D, 1), switch=switch)
    step.criterion = step.selection.criterion = step.selection.scorer.criterion = criterion
    for _ in range(4):
        step(torch.randn(B, D), torch.randn(B, 1))
    assert [report["seconds"] is None for report in switch.heard] == [True, False, True, False]


def test_plain_steps_fill_the_memory() -> None:
    memory = LossMemory(B, decay=0.0)
    step = make_step(memory=memory, switch=Planned(Plan(select=False, measure=False)))
    before = copy.deepcopy(step.model)
    inputs, target = batch()
    step(inputs, target, torch.arange(B))
    with torch.no_grad():
        losses = F.cross_entropy(before(inputs), target, reduction="none")
    torch.testing.assert_close(memory.losses, losses, rtol=3e-6, atol=1e-7)


def test_an_error_of_the_model_does_not_stop_the_norms_from_being_known() -> None:
    step = make_step(switch=Planned(Plan(select=True, measure=True)))
    with pytest.raises(ValueError, match="odd batch"):

        def refuse(*_: Any) -> None:
            raise ValueError("odd batch")

        handle = step.model.register_forward_pre_hook(refuse)
        step(*batch())
    handle.remove()
    step.selection.scorer.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    result = step(*batch())
    assert result.scores is not None
    assert result.scores.grad_norm is not None


def test_the_seconds_of_a_device_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Knows its time only when it has been waited for, as a device's does."""

        done = False

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            Event.done = False

        def query(self) -> bool:
            return Event.done

        def synchronize(self) -> None:
            Event.done = True

        def elapsed_time(self, other: Event) -> float:
            assert Event.done, "device not ready"
            return 500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    watch = Stopwatch(torch.device("cuda"))
    watch.mark("step")
    assert not watch.ready
    assert watch.seconds() == {"step": 0.5}
    assert watch.ready


# ---- what is chosen ----


def test_plain_is_plain_for_selectors_without_scores_too() -> None:
    assert not make_step(selector="uniform", switch="plain")(*batch()).selected


def test_random_choices_between_follow_the_rate() -> None:
    step = make_step(scoring_every=2, switch="select")
    step.selector.rate = 0.5
    assert [len(step(*batch()).indices) for _ in range(2)] == [B // 2, B // 2]


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_say_whether_they_give_weights(name: str) -> None:
    values = torch.rand(5, B, generator=torch.Generator().manual_seed(0))
    names = ("loss", "grad_norm", "entropy", "margin", "reference_loss")
    selector: Selector = make_selector(name, rate=0.5)
    choice = selector.select(Scores(**dict(zip(names, values, strict=True))))
    assert selector.gives_weights == (choice.weights is not None)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, ValueError, "ids must be given where there is a loss memory"),
        (torch.arange(1, B + 1), IndexError, r"ids must be in \[0, 16\), got 16"),
        (torch.arange(B, dtype=torch.int32), TypeError, "ids must be an int64 tensor"),
    ],
)
@pytest.mark.parametrize("select", [True, False])
def test_bad_ids_train_nothing(
    ids: Tensor | None, error: type[Exception], message: str, select: bool
) -> None:
    switch = Planned(Plan(select=select, measure=True))
    step = make_step(memory=LossMemory(B), scoring_every=1, switch=switch)
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(error, match=f"^SelectiveStep: {message}"):
        step(*batch(), ids)
    assert all(torch.equal(before[name], part) for name, part in step.model.state_dict().items())
    assert step.selection.steps == 0


@pytest.mark.parametrize(
    ("criterion", "selector"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "big_loss"),
        (functools.partial(F.cross_entropy, reduction="sum"), "big_loss"),
        (nn.KLDivLoss(reduction="batchmean"), "importance"),
    ],
)
def test_a_criterion_that_adds_up_is_refused(criterion: Any, selector: str) -> None:
    model = nn.Linear(D, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SelectiveStep: criterion must have reduction 'mean' or"):
        SelectiveStep(model, criterion, optimizer, selector, 0.25)
    SelectiveStep(model, nn.KLDivLoss(reduction="batchmean"), optimizer, "big_loss", 0.25)


def test_choosing_alone_is_refused_where_losses_have_to_be_weighed() -> None:
    step = make_step(across_ranks=True)
    with pytest.raises(ValueError, match="choose must be without across_ranks"):
        step.choose(Scores(loss=torch.rand(B)), B)


@pytest.mark.parametrize("select", [True, False])
def test_a_criterion_that_fills_no_memory_trains_nothing(select: bool) -> None:
    step = make_step(
        memory=LossMemory(B), switch=Planned(Plan(select=select, measure=False)), scoring_every=2
    )
    step.selection.steps = 1  # a step that recalls, so that only the training forward runs
    step.criterion = step.selection.criterion = lambda output, target: output.sum()
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(ValueError, match="gives no per-sample losses"):
        step(*batch(), torch.arange(B))
    assert all(torch.equal(before[name], part) for name, part in step.model.state_dict().items())
    assert step.selection.steps == 1


def test_a_table_of_references_needs_ids_in_plain_steps_too() -> None:
    step = make_step(
        selector="rho_loss",
        reference=ReferenceLosses(torch.zeros(B)),
        switch=Planned(Plan(select=False, measure=True)),
    )
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(ValueError, match="ids must be given where there is a table of reference"):
        step(*batch())
    assert all(torch.equal(before[name], part) for name, part in step.model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"selector": 3},
        {"rate": None},
        {"switch": "off"},
        {"scoring_every": 0},
        {"scoring_mode": "test"},
        {"scoring_dtype": torch.int8},
        {"scoring_model": 0},
        {"criterion": None},
    ],
)
def test_errors_name_their_owner(options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "model": nn.Identity(),
        "criterion": nn.MSELoss(),
        "selector": "big_loss",
        "rate": 0.5,
        **options,
    }
    with pytest.raises((TypeError, ValueError), match=r"^BatchSelection: "):
        BatchSelection(**arguments)
    with pytest.raises((TypeError, ValueError), match=r"^Somebody: "):
        BatchSelection(**arguments, owner="Somebody")
