"""`Reports`: a switch that hears of its steps late, in order, and of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastsel.select import reports
from fastsel.select.reports import Reports
from fastsel.select.switch import CostAwareSwitch, Plan


class Device:
    """Steps on a device that the host is ahead of: its figures are known `lag` steps later."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.now = 0

    def watch(self, seconds: float, probe: float = 0.0) -> Any:
        device, due = self, self.now + self.lag

        class Watch:
            on_cuda = True

            @property
            def ready(self) -> bool:
                return device.now >= due

            def seconds(self) -> dict[str, float]:
                return {"step": seconds, "measure": probe}

        return Watch()


class Known:
    """A share that is there at once."""

    ready = True

    def __init__(self, value: torch.Tensor) -> None:
        self._value = float(value)

    def value(self) -> float:
        return self._value


class Listener(CostAwareSwitch):
    """Writes down what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def observe(self, plan: Plan, **report: Any) -> None:
        self.heard.append((plan, report["seconds"]))

    def skip(self) -> None:
        self.heard.append("skipped")


def drive(switch: CostAwareSwitch, lag: int, steps: int, *, cycle: int = 1) -> list[Plan]:
    """Steps as `BatchSelection` takes them: plain ones of a second, selective ones of 0.7."""
    device, told, plans = Device(lag), Reports(switch), []
    for _ in range(steps):
        plan = switch.plan(told.unheard)
        if told.measuring:
            plan = plan._replace(measure=False, watch=plan.trial)
        seconds = 0.7 if plan.select else 1.0
        watch = device.watch(seconds, 0.1 if plan.measure else 0.0) if plan.watch else None
        share = torch.tensor(0.5) if plan.measure else None
        told.add(plan, watch, share=share, cycle=cycle)
        device.now += 1
        plans.append(plan)
    return plans


@pytest.fixture(autouse=True)
def _known_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "Reading", Known)


def test_steps_are_told_of_in_their_order() -> None:
    switch, device = Listener(), Device(2)
    told = Reports(switch)
    watched, unwatched = Plan(True, measure=False), Plan(False, measure=False, watch=False)
    told.add(watched, device.watch(3.0))
    told.add(unwatched, None)
    assert switch.heard == []
    device.now = 2
    told.add(unwatched, None)
    assert switch.heard == [(watched, 3.0), "skipped", "skipped"]
    told.add(unwatched, None)
    assert switch.heard[3:] == ["skipped"]


def test_untimed_steps_have_no_seconds() -> None:
    switch, device = Listener(), Device(0)
    plan = Plan(True, measure=False)
    Reports(switch).add(plan, device.watch(3.0), timed=False)
    assert switch.heard == [(plan, None)]


def test_what_is_forgotten_is_not_told() -> None:
    switch, device = Listener(), Device(1)
    told = Reports(switch)
    told.add(Plan(False, measure=True), device.watch(3.0), share=torch.tensor(0.5))
    assert told.measuring
    assert told.unheard == 0
    told.add(Plan(True, measure=False), device.watch(3.0))
    assert told.unheard == 1
    told.clear()
    assert not told.measuring
    device.now = 9
    told.add(Plan(False, measure=False, watch=False), None)
    assert switch.heard == ["skipped"]


@pytest.mark.parametrize("lag", [0, 3, 60])
@pytest.mark.parametrize("cycle", [1, 4])
def test_a_late_device_is_tried_and_watched_no_more_than_another(lag: int, cycle: int) -> None:
    switch = CostAwareSwitch(trial_every=2000)
    plans = drive(switch, lag, 6000, cycle=cycle)
    assert [decision.select for decision in switch.decisions] == [False]
    assert switch.decisions[0].cost == pytest.approx(0.7)
    # The first trials, and two more where a cycle is one step. A gap in a cycle costs one more.
    trials = sum(plan.trial for plan in plans)
    assert trials <= (1 + 5 * cycle) + (2 * 5 if cycle == 1 else 0) + (cycle if lag else 0)
    # A quarter; a lag shorter than the distance of the probes adds to each.
    assert sum(plan.watch for plan in plans) < 0.4 * len(plans)
    assert math.isclose(switch.state_dict()["step"], 6000, abs_tol=lag + 1)
