"""`CostAwareSwitch`: decisions on simulated costs, with nothing measured by a clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsel.select.switch import CostAwareSwitch, Plan, gradient_share

Share = Callable[[int], float]


def simulate(
    switch: CostAwareSwitch,
    steps: int,
    *,
    share: float | Share,
    cost: float | Share,
    probe: float = 0.001,
    noise: Iterator[float] | None = None,
    cycle: int = 1,
) -> list[Plan]:
    """Runs a switch through steps of which the plain ones take one second."""
    plans = []
    noise = noise or itertools.repeat(1.0)
    for step in range(steps):
        plan = switch.plan()
        plans.append(plan)
        if not plan.watch:
            switch.skip()
            continue
        now_share = share(step) if callable(share) else share
        now_cost = cost(step) if callable(cost) else cost
        switch.observe(
            plan,
            seconds=(now_cost if plan.select else 1.0) * next(noise),
            share=now_share if plan.measure else math.nan,
            probe_seconds=probe if plan.measure else 0.0,
            cycle=cycle,
        )
    return plans


def chosen(plans: list[Plan]) -> int:
    return sum(plan.select for plan in plans)


@pytest.mark.parametrize("force", ["select", "plain"])
def test_forced_either_way(force: str) -> None:
    switch = CostAwareSwitch(force)
    plans = simulate(switch, 50, share=0.9 if force == "plain" else 0.1, cost=0.5)
    assert set(plans) == {Plan(force == "select", measure=False, watch=False)}
    assert switch.decisions == []


@pytest.mark.parametrize(("share", "cost", "pays"), [(0.8, 0.6, True), (0.4, 0.6, False)])
def test_chooses_where_the_share_exceeds_the_cost(share: float, cost: float, pays: bool) -> None:
    switch = CostAwareSwitch()
    plans = simulate(switch, 400, share=share, cost=cost)
    assert [decision.select for decision in switch.decisions] == [pays]
    decision = switch.decisions[0]
    assert decision.share == share
    assert decision.cost == pytest.approx(cost)
    assert {plan.select for plan in plans[decision.step :]} == {pays}
    assert decision.step < 40
    assert switch.selecting == pays


def test_watching_a_losing_choice_costs_next_to_nothing() -> None:
    switch = CostAwareSwitch()
    steps = 5000
    # A selective step that is a fifth dearer than a plain one, and a probe that takes a tenth.
    plans = simulate(switch, steps, share=0.5, cost=1.2, probe=0.1)
    lost = 0.2 * chosen(plans) + 0.1 * sum(plan.measure for plan in plans)
    assert lost <= 0.01 * steps
    # Selective steps also teach less than plain ones.
    assert chosen(plans) <= 0.01 * steps


def test_most_steps_run_without_a_clock() -> None:
    plans = simulate(CostAwareSwitch(), 5000, share=0.5, cost=1.2, probe=0.1)
    assert sum(plan.watch for plan in plans) < 0.25 * len(plans)
    assert all(plan.watch for plan in plans if plan.measure or plan.trial)


def test_a_share_that_rises_early_is_noticed_early() -> None:
    """Probes are dear here, one in 200 steps in the long run."""
    switch = CostAwareSwitch()
    plans = simulate(switch, 400, share=lambda step: min(0.5 + step / 200, 0.9), cost=0.6, probe=1)
    first = next(step for step, plan in enumerate(plans) if plan.select and not plan.trial)
    assert 20 <= first < 45
    late = simulate(CostAwareSwitch(), 4000, share=0.1, cost=0.6, probe=1.0)[2000:]
    assert sum(plan.measure for plan in late) == 10


def test_follows_a_share_that_rises_and_falls() -> None:
    switch = CostAwareSwitch()
    plans = simulate(switch, 6000, share=lambda step: 0.9 if 2000 <= step < 4000 else 0.4, cost=0.7)
    assert [decision.select for decision in switch.decisions] == [False, True, False]
    on, off = switch.decisions[1].step, switch.decisions[2].step
    assert 2000 < on < 2100
    assert 4000 < off < 4100
    assert chosen(plans[on:off]) > 0.98 * (off - on)


def test_follows_a_cost_that_changes() -> None:
    switch = CostAwareSwitch(trial_every=200)
    simulate(switch, 3000, share=0.6, cost=lambda step: 0.9 if step < 1000 else 0.4)
    assert [decision.select for decision in switch.decisions] == [False, True]
    assert switch.decisions[1].step < 1000 + 3 * 200


def test_hysteresis_keeps_it_from_flickering() -> None:
    def wobble(step: int) -> float:
        return 0.70 + 0.02 * math.sin(step)

    steady = CostAwareSwitch(margin=0.1)
    simulate(steady, 3000, share=wobble, cost=0.70)
    assert len(steady.decisions) == 1
    nervous = CostAwareSwitch(margin=0.0)
    simulate(nervous, 3000, share=wobble, cost=0.70)
    assert len(nervous.decisions) > 5


def test_outliers_do_not_decide() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (30.0 if torch.rand((), generator=generator) < 0.05 else 1.0 for _ in itertools.count())
    switch = CostAwareSwitch()
    simulate(switch, 2000, share=0.5, cost=0.8, noise=noise)
    assert [decision.select for decision in switch.decisions] == [False]


def test_shares_that_say_nothing_decide_nothing() -> None:
    switch = CostAwareSwitch()
    simulate(switch, 300, share=math.nan, cost=0.5)
    assert switch.decisions == []
    assert not switch.selecting
    assert switch.share is None


def test_untimed_steps_leave_the_cost_alone() -> None:
    switch = CostAwareSwitch()
    simulate(switch, 100, share=0.9, cost=0.5)
    cost = switch.cost
    for _ in range(50):
        switch.observe(Plan(select=True, measure=True), seconds=None, share=0.9)
    assert switch.cost == cost


def test_a_cycle_of_steps_is_timed_as_one() -> None:
    """Every fourth step is dear, and an odd number of readings would show cheap ones only."""
    switch = CostAwareSwitch(trial_every=100)
    for step in range(400):
        plan = switch.plan()
        seconds = (0.2 if plan.select else 1.0) + (4.0 if step % 4 == 3 else 0.0)
        switch.observe(plan, seconds=seconds, share=0.5 if plan.measure else math.nan, cycle=4)
    assert switch.cost == pytest.approx((4 * 0.2 + 4.0) / (4 * 1.0 + 4.0))
    assert [decision.select for decision in switch.decisions] == [False]


def test_a_cycle_has_no_gap() -> None:
    """Of two halves of different cycles no reading is made."""
    switch = CostAwareSwitch()
    plain = Plan(select=False, measure=False)
    for _ in range(40):
        switch.observe(plain, seconds=1.0, cycle=2)  # the first is not timed
        switch.skip()
    assert switch.plan() == plain  # still learning what a plain step costs
    for _ in range(10):
        switch.observe(plain, seconds=1.0, cycle=2)
    assert switch.plan().trial


@pytest.mark.parametrize("cycle", [1, 4, 32])
def test_trials_and_clocks_take_the_same_part_of_long_cycles(cycle: int) -> None:
    switch = CostAwareSwitch()
    plans = simulate(switch, 20_000, share=0.5, cost=1.2, probe=0.1, cycle=cycle)
    assert chosen(plans) <= 0.01 * len(plans) + 6 * cycle
    assert sum(plan.watch for plan in plans) < 0.3 * len(plans)


def test_trials_come_when_they_are_due() -> None:
    """Also where probes are rarer."""
    plans = simulate(CostAwareSwitch(trial_every=100), 6000, share=0.1, cost=0.6, probe=1.0)
    begins = [i for i in range(1, 6000) if plans[i].trial and not plans[i - 1].trial]
    distances = [after - before for before, after in itertools.pairwise(begins)]
    assert max(distances) <= 100 + 10


def test_steps_heard_of_late_do_not_shorten_a_trial() -> None:
    """A device hears of its steps in one go, long after they were planned."""
    switch, late, plans = CostAwareSwitch(trial_every=60), [], []
    for _ in range(400):
        late.append(switch.plan())
        if len(late) == 20:
            for plan in late:
                switch.observe(plan, seconds=0.9 if plan.select else 1.0, share=0.5)
            plans += late
            late = []
    assert [decision.select for decision in switch.decisions] == [False]
    assert any(plan.select for plan in plans[200:])


def test_ranks_decide_alike() -> None:
    """Two ranks see different seconds and shares; together they decide one thing."""
    ranks = [CostAwareSwitch(), CostAwareSwitch()]
    shares, costs = (0.9, 0.3), (0.5, 0.9)  # one of them alone would choose
    for _ in range(400):
        plans = [switch.plan() for switch in ranks]
        assert plans[0] == plans[1]
        reports: list[list[float]] = []
        # The first round finds out what each would report, the second gives all of them the mean.
        for switch, plan, share, cost in zip(ranks, plans, shares, costs, strict=True):
            probe = CostAwareSwitch()
            probe.load_state_dict(switch.state_dict())

            def collect(values: list[float], into: list[list[float]] = reports) -> list[float]:
                into.append(values)
                return values

            seconds = cost if plan.select else 1.0
            probe.observe(plan, seconds=seconds, share=share, probe_seconds=0.01, agree=collect)
        mean = [sum(column) / 2 for column in zip(*reports, strict=True)]

        def agreed(values: list[float], mean: list[float] = mean) -> list[float]:
            return mean

        for switch, plan, share, cost in zip(ranks, plans, shares, costs, strict=True):
            seconds = cost if plan.select else 1.0
            switch.observe(plan, seconds=seconds, share=share, probe_seconds=0.01, agree=agreed)
    assert ranks[0].decisions == ranks[1].decisions
    assert [decision.select for decision in ranks[0].decisions] == [False]
    assert ranks[0].decisions[0].share == pytest.approx(0.6)
    assert ranks[0].decisions[0].cost == pytest.approx(0.7)


@given(
    st.lists(st.floats(0.01, 1.0), min_size=30, max_size=60),
    st.floats(0.3, 1.5),
    st.integers(1, 299),
    st.integers(1, 4),
)
def test_goes_on_from_a_state_as_if_nothing_had_happened(
    shares: list[float], cost: float, cut: int, cycle: int
) -> None:
    """Later trials and half-timed cycles included."""

    def run(switch: CostAwareSwitch, begin: int, end: int) -> list[Plan]:
        return simulate(
            switch,
            end - begin,
            share=lambda i: shares[(begin + i) % len(shares)],
            cost=lambda i: cost * (1 + (begin + i) % 3),
            cycle=cycle,
        )

    whole, first, second = (CostAwareSwitch(trial_every=50) for _ in range(3))
    expected = run(whole, 0, 300)
    plans = run(first, 0, cut)
    second.load_state_dict(first.state_dict())
    plans += run(second, cut, 300)
    assert plans == expected
    assert second.decisions == whole.decisions
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"force": "on"}, "force must be 'select', 'plain' or None, got 'on'"),
        ({"margin": 1.0}, r"margin must be in \[0, 1\), got 1.0"),
        ({"margin": math.nan}, r"margin must be in \[0, 1\), got nan"),
        ({"overhead": 0.0}, r"overhead must be in \(0, 1\], got 0.0"),
        ({"trial_every": 5}, "trial_every must be at least 50, got 5"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostAwareSwitch(**arguments)  # type: ignore[arg-type]


def test_a_foreign_state_changes_nothing() -> None:
    switch = CostAwareSwitch()
    simulate(switch, 100, share=0.9, cost=0.5)
    before = switch.state_dict()
    with pytest.raises(ValueError, match="state must have cycle, decisions, schedule"):
        switch.load_state_dict({"step": 3})
    assert switch.state_dict() == before


@pytest.mark.parametrize(
    "part", [{"schedule": [1, 2]}, {"decisions": [(1, True)]}, {"seconds": {}}, {"cycle": None}]
)
def test_a_malformed_state_changes_nothing(part: dict[str, object]) -> None:
    switch = CostAwareSwitch()
    simulate(switch, 100, share=0.9, cost=0.5)
    before = switch.state_dict()
    with pytest.raises(ValueError, match="CostAwareSwitch: state must be a switch's, got"):
        switch.load_state_dict({**CostAwareSwitch().state_dict(), **part})
    assert switch.state_dict() == before


def test_a_state_leaves_what_was_forced() -> None:
    switch = CostAwareSwitch("select")
    switch.load_state_dict(CostAwareSwitch().state_dict())
    assert switch.plan() == Plan(select=True, measure=False, watch=False)


def test_gradient_share() -> None:
    scores = torch.tensor([3.0, 1.0, math.nan, math.inf, 4.0])
    assert gradient_share(scores, torch.tensor([0])).item() == 0.375
    assert gradient_share(scores, torch.tensor([2, 3])).item() == 0.0
    assert gradient_share(scores, torch.arange(5)).item() == 1.0
    assert gradient_share(scores, torch.tensor([4, 4])).item() == 1.0
    assert gradient_share(torch.zeros(3), torch.tensor([1])).isnan()


def test_the_share_of_drawn_samples_is_the_fall_in_variance() -> None:
    """For draws in proportion to g, the mean of share * B / k is B sum(g^2) / sum(g)^2."""
    generator = torch.Generator().manual_seed(3)
    norms = torch.rand(50, generator=generator) ** 4
    k, draws = 10, 4000
    total = 0.0
    for _ in range(draws):
        indices = torch.multinomial(norms, k, replacement=True, generator=generator)
        total += gradient_share(norms, indices).item()
    fall = (len(norms) * norms.square().sum() / norms.sum() ** 2).item()
    # 40,000 draws of a share whose standard deviation is below its mean: half a percent.
    assert total / draws * len(norms) / k == pytest.approx(fall, rel=0.02)
