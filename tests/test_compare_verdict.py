"""The verdict rule of `fastsel compare`, on runs made by hand."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from fastsel.compare.conclusion import conclude, times
from fastsel.compare.intervals import Spread, spread, t_interval
from fastsel.compare.run import Point, Run, SwitchRecord
from fastsel.compare.summary import Row, disturbed, goals_by_seed, pair, reach, summarise
from fastsel.compare.table import short, with_spread


def run(
    strategy: str, seed: int, curve: list[tuple[float, float]], status: str = "finished"
) -> Run:
    """A run from (seconds, test loss) pairs; a step a second, ten samples a step."""
    points = tuple(
        Point(int(seconds), int(seconds) * 10, seconds, loss, accuracy=0.5)
        for seconds, loss in curve
    )
    total = curve[-1][0]
    seconds = {
        "load": 0.0, "prepare": 0.0, "score": total * 0.25, "choose": 0.0, "train": total * 0.75
    }  # fmt: skip
    switch = SwitchRecord(0.5, (), (), (), ()) if strategy == "auto" else None
    return Run(strategy, seed, status, points, seconds, 1.0, switch=switch)


def reaching(strategy: str, times: list[float | None], end: float = 0.4) -> list[Run]:
    """One run per seed that comes down to 0.5 at the given second and ends at 100 s."""
    runs = []
    for seed, time in enumerate(times):
        if time is None:
            curve = [(0.0, 2.0), (100.0, 1.0)]
        else:
            curve = [(0.0, 2.0), (time - 1e-6, 1.0), (time, 0.5), (100.0, end)]
        runs.append(run(strategy, seed, curve))
    return runs


def row(runs: list[Run], strategy: str, goal: float | None = 0.5) -> Row:
    names = list(dict.fromkeys(r.strategy for r in runs))
    return next(r for r in summarise(runs, names, goal) if r.strategy == strategy)


BASE = reaching("uniform", [50.0, 50.0, 50.0])


def test_reach_interpolates_between_evaluations() -> None:
    curve = [(0.0, 2.0), (10.0, 1.0), (20.0, 0.5), (30.0, 0.6)]
    found = reach(run("x", 0, curve), 0.75)
    assert found is not None
    assert (found.step, found.samples, found.seconds) == (15.0, 150.0, 15.0)
    assert reach(run("x", 0, curve), 0.4) is None
    start = reach(run("x", 0, curve), 3.0)
    assert start is not None and start.seconds == 0.0
    broken = run("x", 0, [(0.0, 2.0), (10.0, math.nan)], "diverged")
    assert reach(broken, 0.75) is None


def test_the_goal_is_uniforms_own_end_seed_by_seed() -> None:
    runs = [run("uniform", s, [(0.0, 2.0), (9.0, 0.1 * (s + 1))]) for s in range(2)]
    assert goals_by_seed(runs, None) == {0: 0.1, 1: 0.2}
    assert goals_by_seed(runs, 0.7) == {0: 0.7, 1: 0.7}
    assert row(runs, "uniform", None).reached == 2


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ([30.0, 31.0, 29.0], "faster than uniform"),
        ([80.0, 82.0, 78.0], "slower than uniform"),
        ([30.0, 70.0, 50.0], "no clear difference"),
        ([49.0, 49.1, 48.9], "no clear difference"),  # clear, but below 5 %
        ([51.0, 51.1, 50.9], "no clear difference"),
        ([None, None, None], "did not reach the goal"),
        ([20.0, 20.0, None], "no clear difference"),  # missed once: not proven
        ([90.0, 90.0, None], "slower than uniform"),  # at least 100 s once
        ([30.0], "one seed: no verdict"),
        ([None], "one seed: no verdict"),
    ],
)
def test_verdict(times: list[float | None], verdict: str) -> None:
    runs = BASE[: len(times)] + reaching("big_loss", times)
    assert row(runs, "big_loss").verdict == verdict


def test_fast_but_worse_in_the_end_is_not_called_faster() -> None:
    runs = BASE + reaching("big_loss", [30.0, 31.0, 29.0], end=0.8)
    assert row(runs, "big_loss").verdict == "no clear difference"


def test_a_missing_uniform_run_bounds_the_other_way() -> None:
    base = reaching("uniform", [50.0, None, 50.0])
    # Uniform needed more than 100 s there, so 30 s is faster for certain ...
    assert row(base + reaching("big_loss", [30.0, 31.0, 29.0]), "big_loss").verdict != (
        "slower than uniform"
    )
    pairing = pair(reaching("big_loss", [60.0, 60.0, 60.0]), base, dict.fromkeys(range(3), 0.5))
    # ... and 60 s is not slower for certain.
    assert pairing.proves_faster and not pairing.proves_slower


def test_diverged_runs_get_no_other_verdict() -> None:
    broken = run("big_loss", 2, [(0.0, 2.0), (5.0, math.inf)], "diverged")
    runs = BASE + reaching("big_loss", [10.0, 10.0]) + [broken]
    found = row(runs, "big_loss")
    assert found.verdict == "diverged (1 of 3)" and found.diverged == 1 and found.reached == 2


def test_ratio_is_paired_by_seed() -> None:
    base = reaching("uniform", [20.0, 40.0, 80.0])
    found = row(base + reaching("big_loss", [10.0, 20.0, 40.0]), "big_loss").ratio
    # Seeds differ fourfold, but within each the ratio is one half: no spread at all.
    assert found is not None
    assert math.isclose(found.mean, 0.5, rel_tol=1e-6)
    assert math.isclose(found.high, 0.5, rel_tol=1e-6)


def test_rows_hold_costs() -> None:
    runs = reaching("full", [60.0, 60.0]) + reaching("uniform", [50.0, 50.0])
    found = row(runs, "uniform")
    assert found.choosing == Spread(0.25, 0.0) and found.against_plain == 1.0
    assert found.steps is not None and found.steps.mean == pytest.approx(50.0, abs=1.0)


@pytest.mark.parametrize(
    ("full", "big_loss", "expected"),
    [
        (
            [60.0, 60.0, 60.0], [30.0, 31.0, 29.0],
            r"big_loss pays here: it takes 0\.60 times \(0\.55 to 0\.65\) uniform's time to the "
            r"goal, and 0\.50 times \(.*\) that of plain training on whole batches\.",
        ),
        (
            [20.0, 20.0, 20.0], [30.0, 31.0, 29.0],
            r"big_loss beats uniform here: it takes 0\.60 times .* uniform's time to the goal\. "
            r"But plain training on whole batches is faster still: choosing does not pay\.",
        ),
        (
            [20.0, 60.0, 30.0], [30.0, 31.0, 29.0],
            r"big_loss beats uniform here: it takes 0\.60 times .* uniform's time to the goal\. "
            r"But it is not clearly faster than plain training on whole batches: choosing does not "
            r"clearly pay\.",
        ),
        (
            [], [30.0, 31.0, 29.0],
            r"big_loss beats uniform here: .*\. Whether choosing pays stays open: that takes two "
            r"seeds or more of full, plain training on whole batches\.",
        ),
        (
            [60.0, 60.0, 60.0], [55.0, 48.0, 50.0],
            r"No choosing strategy pays here: none is clearly faster to the goal than uniform\.",
        ),
        (
            [20.0, 20.0, 20.0], [55.0, 48.0, 50.0],
            r"No choosing strategy pays here: .*\. Plain training on whole batches is: .*time\.",
        ),
        ([60.0], [30.0], r"One seed: no verdict\. .*"),
    ],
)  # fmt: skip
def test_conclusion(full: list[float], big_loss: list[float], expected: str) -> None:
    runs = reaching("full", list(full)) + BASE[: len(big_loss)]
    runs += reaching("big_loss", list(big_loss))
    rows = summarise(runs, ["full", "uniform", "big_loss"], 0.5)
    assert re.fullmatch(expected, conclude(runs, rows, 0.5))


def test_the_conclusion_names_a_strategy_that_also_beats_plain_training() -> None:
    runs = BASE + reaching("full", [20.0, 20.0, 20.0])
    # The smaller mean, steady enough to beat uniform's 50 s but not the plain 20 s.
    runs += reaching("big_loss", [8.8, 12.5, 17.75])
    runs += reaching("grad_norm", [15.0, 15.1, 14.9])
    rows = summarise(runs, ["full", "uniform", "big_loss", "grad_norm"], 0.5)
    assert [r.verdict for r in rows if r.strategy != "uniform"] == ["faster than uniform"] * 3
    assert conclude(runs, rows, 0.5).startswith("grad_norm pays here: it takes 0.30 times")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # It pays, and is named for it; its time against plain training is not said twice.
        (
            {"full": 60.0, "big_loss": 60.0, "auto": 20.0},
            r"auto pays here: .* and 0\.33 times .* plain training on whole batches\. "
            r"auto chose in 50 % of its steps\.",
        ),
        # It beats uniform because plain training does: that names nobody.
        (
            {"full": 20.0, "big_loss": 60.0, "auto": 21.0},
            r"No choosing strategy pays here: none that always chooses is clearly faster to the "
            r"goal than uniform\. Plain training on whole batches is: .*\. "
            r"auto chose in 50 % of its steps and took 1\.05 times \(1\.05 to 1\.05\) plain "
            r"training's time\.",
        ),
        # Another one beats uniform, too, less clearly than auto: it is the one that is named.
        (
            {"full": 20.0, "big_loss": 30.0, "auto": 21.0},
            r"big_loss beats uniform here: .* choosing does not pay\. auto chose in 50 % of its "
            r"steps and took 1\.05 times .*",
        ),
        # Nothing to hold it against.
        (
            {"big_loss": 60.0, "auto": 20.0},
            r"auto beats uniform here: .* stays open: .*\. auto chose in 50 % of its steps\.",
        ),
        (
            {"full": 20.0, "auto": 21.0},
            r"auto beats uniform here: .* faster still: choosing does not pay\. auto chose .*",
        ),
    ],
)  # fmt: skip
def test_what_the_switch_came_to(times: dict[str, float], expected: str) -> None:
    runs = BASE + [r for name, time in times.items() for r in reaching(name, [time] * 3)]
    rows = summarise(runs, ["uniform", *times], 0.5)
    found = next(r for r in rows if r.strategy == "auto")
    assert found.chose == Spread(0.5, 0.0)
    assert re.fullmatch(expected, conclude(runs, rows, 0.5))


def test_a_time_that_is_only_bounded_is_not_told_for_the_switch() -> None:
    runs = BASE + reaching("full", [20.0] * 3) + reaching("auto", [20.0, 20.0, None])
    rows = summarise(runs, ["full", "uniform", "auto"], 0.5)
    assert conclude(runs, rows, 0.5).endswith("auto chose in 50 % of its steps.")


def test_conclusion_without_a_baseline() -> None:
    runs = reaching("big_loss", [30.0, 31.0])
    rows = summarise(runs, ["big_loss"], None)
    assert rows[0].verdict == "" and "No verdict: uniform" in conclude(runs, rows, None)
    assert "No verdict" in conclude([], [], None)


def test_intervals() -> None:
    assert spread([]) is None and spread([2.0]) == Spread(2.0, None)
    assert spread([1.0, 3.0]) == Spread(2.0, math.sqrt(2.0))
    assert t_interval([1.0]) is None
    found = t_interval([1.0, 2.0, 3.0])
    # Student: 2 ± 4.303 · 1 / √3, the quantile rounded to three places in the table.
    assert found is not None and found.mean == 2.0
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-3)
    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-3)


def test_quantiles_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in range(2, 32):
        values = [0.0] * (n - 1) + [1.0]
        found, summary = t_interval(values), spread(values)
        assert found and summary and summary.std
        quantile = (found.high - found.mean) / (summary.std / math.sqrt(n))
        # The table has three places.
        assert quantile == pytest.approx(stats.t.ppf(0.975, n - 1), abs=6e-4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Spread(0.0635, 0.0076), "0.064 ± 0.008"),
        (Spread(0.0635, 0.0026), "0.0635 ± 0.0026"),
        (Spread(4.789, 0.411), "4.8 ± 0.4"),
        (Spread(1234.5, 130.0), "1,234 ± 130"),
        (Spread(0.5, 0.0), "0.500 ± 0"),
        (Spread(0.01234, None), "0.0123"),
        (Spread(123.456, None), "123"),
        (None, "–"),
    ],
)
def test_numbers_show_what_is_known(value: Spread | None, text: str) -> None:
    assert with_spread(value) == text


def test_a_disturbed_clock_is_noticed() -> None:
    def timed(mean: float, median: float, seed: int = 0) -> Run:
        seconds = {"load": 0.0, "prepare": 0.0, "train": mean * 10}
        return Run("full", seed, "finished", (Point(10, 10, mean * 10, 1.0),), seconds, median)

    assert not disturbed([timed(1.1, 1.0), timed(1.2, 1.1, 1)])
    assert disturbed([timed(1.6, 1.0)])
    assert disturbed([timed(1.0, 1.0), timed(1.6, 1.6, 1)])
    assert not disturbed([])
    # The switch takes steps of two kinds, and a run may end before its first step.
    mixed = dataclasses.replace(timed(1.6, 1.0), switch=SwitchRecord(0.5, (), (), (), ()))
    assert not disturbed([mixed, timed(0.0, 0.0)])


def test_what_is_prepared_costs_but_is_no_step() -> None:
    seconds = {"load": 0.0, "prepare": 30.0, "score": 20.0, "choose": 0.0, "train": 50.0}
    one = Run("rho_loss", 0, "finished", (Point(10, 10, 100.0, 1.0),), seconds, 7.0)
    assert one.step_seconds == 7.0 and one.choosing_share == 0.5 and one.preparing_share == 0.3
    found = row([one], "rho_loss")
    assert found.preparing == Spread(0.3, None) and not disturbed([one])


def test_ratios_beyond_use_are_not_spelled_out() -> None:
    assert [times(r) for r in (0.876, 99.99, 2e7)] == ["0.88", "99.99", ">100"]


def test_counts_are_short() -> None:
    assert [short(n) for n in (950, 9_999, 19_500, 1_234_567)] == ["950", "9,999", "19.5k", "1.23M"]
