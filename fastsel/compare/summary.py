"""From finished runs to a table and a verdict. The rule is written out in docs/compare.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastsel.compare.intervals import Interval, Spread, spread, t_interval
from fastsel.compare.run import Point, Run
from fastsel.compare.strategies import BASELINE, REFERENCE

FASTER = "faster than uniform"
SLOWER = "slower than uniform"
UNCLEAR = "no clear difference"
NOT_REACHED = "did not reach the goal"
ONE_SEED = "one seed: no verdict"
DIVERGED = "diverged"
# A difference below this is not worth a strategy, however often it is repeated.
_MIN_EFFECT = 1.05
# Steps that should take equally long and differ by more: other work took the machine's time.
_DISTURBED = 1.5


@dataclass(frozen=True)
class Reach:
    """Where a run reached the goal, interpolated between two evaluations."""

    step: float
    samples: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """One strategy's row of the table; see `summarise`.

    Attributes:
        strategy: Its name.
        runs: Number of runs.
        diverged: How many of them diverged.
        final_loss: Final test loss over the runs that did not diverge.
        final_metric: Final accuracy or RMSE over the same runs.
        reached: Runs that reached the goal.
        steps: Steps to the goal over the runs that reached it.
        samples: Back-propagated samples to the goal, likewise.
        seconds: Training seconds to the goal, likewise.
        choosing: Share of the training seconds spent on preparing, scoring and choosing.
        preparing: The part of it spent before the first step, on reference models.
        step_seconds: Mean seconds of a step.
        against_plain: Step time relative to the plain step on the whole batch, if that was run.
        ratio: Seconds to the goal relative to uniform: geometric mean over paired seeds, with
            its 95 % interval.
        verdict: In words; empty where there is nothing to compare with.
        chose: Share of the steps that chose, under the cost-aware switch; else None.
        excluded: Samples kept out of choices because their scores were not finite, in all runs.
    """

    strategy: str
    runs: int
    diverged: int
    final_loss: Spread | None
    final_metric: Spread | None
    reached: int
    steps: Spread | None
    samples: Spread | None
    seconds: Spread | None
    choosing: Spread | None
    preparing: Spread | None
    step_seconds: Spread | None
    against_plain: float | None
    ratio: Interval | None
    verdict: str
    chose: Spread | None
    excluded: int


@dataclass(frozen=True)
class Pairing:
    """Two strategies' seconds to the goal, paired by seed.

    Attributes:
        logs: Log ratio of each seed; a run that missed the goal counts with all its seconds.
        proves_faster: Every ratio is exact or an upper bound, and each seed has one.
        proves_slower: Every ratio is exact or a lower bound, and each seed has one.
    """

    logs: tuple[float, ...]
    proves_faster: bool
    proves_slower: bool

    @property
    def interval(self) -> Interval | None:
        """The ratio with its 95 % interval; None of fewer than two seeds."""
        logs = t_interval(self.logs)
        return logs and Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))

    @property
    def faster(self) -> bool:
        """Clearly faster: the whole interval, and the mean by more than 5 %."""
        ratio = self.interval
        return bool(
            ratio and self.proves_faster and ratio.high < 1 and ratio.mean * _MIN_EFFECT <= 1
        )

    @property
    def slower(self) -> bool:
        """Clearly slower."""
        ratio = self.interval
        return bool(ratio and self.proves_slower and ratio.low > 1 and ratio.mean >= _MIN_EFFECT)


def metric_of(point: Point) -> float | None:
    """Accuracy, or RMSE for a regression."""
    return point.accuracy if point.accuracy is not None else point.rmse


def goals_by_seed(runs: Sequence[Run], goal: float | None) -> dict[int, float]:
    """The test loss to reach, seed by seed.

    A given goal holds for all seeds. Otherwise it is the final test loss of the same seed's
    uniform run: same initial weights, same batches, and a level that uniform does reach.
    """
    if goal is not None:
        return {run.seed: goal for run in runs}
    return {
        run.seed: run.final.test_loss
        for run in runs
        if run.strategy == BASELINE and run.status == "finished"
    }


def reach(run: Run, goal: float) -> Reach | None:
    """Where the test loss first comes down to the goal, or None.

    Between the last evaluation above the goal and the first at or below it, steps, samples and
    seconds are interpolated linearly in the test loss.
    """
    before: Point | None = None
    for point in run.curve:
        if point.test_loss <= goal:
            if before is None:
                return Reach(point.step, point.samples, point.seconds)
            share = (before.test_loss - goal) / (before.test_loss - point.test_loss)
            return Reach(
                before.step + share * (point.step - before.step),
                before.samples + share * (point.samples - before.samples),
                before.seconds + share * (point.seconds - before.seconds),
            )
        before = point
    return None


def pair(runs: Sequence[Run], base: Sequence[Run], goals: dict[int, float]) -> Pairing:
    """Pair two strategies' seconds to the goal by seed; see `Pairing`."""
    logs: list[float] = []
    proves_faster = proves_slower = True
    for run in runs:
        other = next((b for b in base if b.seed == run.seed), None)
        if other is None or run.seed not in goals:
            continue
        mine, theirs = reach(run, goals[run.seed]), reach(other, goals[run.seed])
        # Missing the goal only bounds the time it would have taken, from below.
        proves_faster &= mine is not None
        proves_slower &= theirs is not None
        if mine is None and theirs is None:
            continue
        seconds = mine.seconds if mine else run.final.seconds
        base_seconds = theirs.seconds if theirs else other.final.seconds
        if seconds > 0 and base_seconds > 0:
            logs.append(math.log(seconds / base_seconds))
    return Pairing(tuple(logs), proves_faster, proves_slower)


def _verdict(
    strategy: str, runs: Sequence[Run], base: Sequence[Run], goals: dict[int, float]
) -> tuple[Interval | None, str]:
    pairing = pair(runs, base, goals)
    if strategy == BASELINE or not goals or not base:
        return None, "the baseline" if strategy == BASELINE else ""
    diverged = sum(run.status == "diverged" for run in runs)
    if diverged:
        return pairing.interval, f"{DIVERGED} ({diverged} of {len(runs)})"
    paired = [run for run in runs if run.seed in goals]
    if len(paired) < 2:
        return None, ONE_SEED
    if not any(reach(run, goals[run.seed]) for run in paired):
        return None, NOT_REACHED
    if pairing.slower:
        return pairing.interval, SLOWER
    if pairing.faster:
        # Fast to the goal, but ending clearly above uniform, is no gain.
        ends = {run.seed: run.final.test_loss for run in base}
        worse = t_interval([r.final.test_loss - ends[r.seed] for r in paired if r.seed in ends])
        if worse is None or worse.low <= 0:
            return pairing.interval, FASTER
    return pairing.interval, UNCLEAR


def summarise(runs: Sequence[Run], strategies: Sequence[str], goal: float | None) -> list[Row]:
    """Make the table: a row per strategy that has finished runs.

    Verdict of a strategy against uniform, from its seconds to the goal paired by seed (ratio of
    each seed, Student-t 95 % interval of the mean log ratio):

    - "diverged" if a run did; "one seed: no verdict" below two seeds.
    - "did not reach the goal" if no run did.
    - "slower than uniform" if the whole interval is above 1 and the mean is 1.05 or more.
    - "faster than uniform" if the whole interval is below 1, the mean is 1/1.05 or less, every run
      reached the goal, and the final test loss is not clearly above uniform's (same kind of
      interval).
    - "no clear difference" otherwise.

    A run that missed the goal counts with all its seconds, which bounds its ratio from one side
    only; a verdict is given only where all bounds point its way.

    Args:
        runs: Finished and diverged runs, any order.
        strategies: Order of the rows.
        goal: Test loss to reach; by default each seed's final test loss of uniform.
    """
    by_strategy = {name: [run for run in runs if run.strategy == name] for name in strategies}
    goals = goals_by_seed(runs, goal)
    rows = []
    for name, mine in by_strategy.items():
        if not mine:
            continue
        sound = [run for run in mine if run.status == "finished"]
        reached = [r for run in mine if run.seed in goals and (r := reach(run, goals[run.seed]))]
        metrics = [m for run in sound if (m := metric_of(run.final)) is not None]
        plain = {run.seed: run.step_seconds for run in by_strategy.get(REFERENCE, [])}
        relative = [run.step_seconds / plain[run.seed] for run in mine if run.seed in plain]
        ratio, verdict = _verdict(name, mine, by_strategy.get(BASELINE, []), goals)
        against_plain = spread(relative)
        rows.append(
            Row(
                name,
                len(mine),
                len(mine) - len(sound),
                spread([run.final.test_loss for run in sound]),
                spread(metrics),
                len(reached),
                spread([r.step for r in reached]),
                spread([r.samples for r in reached]),
                spread([r.seconds for r in reached]),
                spread([run.choosing_share for run in mine]),
                spread([run.preparing_share for run in mine]),
                spread([run.step_seconds for run in mine]),
                against_plain.mean if against_plain else None,
                ratio,
                verdict,
                spread([run.switch.chose for run in mine if run.switch]),
                sum(run.excluded for run in mine),
            )
        )
    return rows


def disturbed(runs: Sequence[Run]) -> bool:
    """Whether other work on the machine clearly took time from some runs.

    Two signs: within a run, a mean step far above the median; and between the seeds of one
    strategy, which do the same work, median steps far apart. Runs under the cost-aware switch take
    steps of two kinds and say nothing.
    """
    timed = [run for run in runs if run.switch is None and run.median_step_seconds > 0]
    if any(run.step_seconds > _DISTURBED * run.median_step_seconds for run in timed):
        return True
    medians: dict[str, list[float]] = {}
    for run in timed:
        medians.setdefault(run.strategy, []).append(run.median_step_seconds)
    return any(max(times) > _DISTURBED * min(times) for times in medians.values())
