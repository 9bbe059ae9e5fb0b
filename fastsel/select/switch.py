"""When choosing samples pays, and when the plain step is the better one."""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The first steps of a kind start threads, fill caches and compile: not what a step costs.
_UNTIMED = 1
_TRIAL_STEPS = 5
_WINDOW = 9
_SHARES = 3
_PROBE_STEPS = (4, 256)
# Early on, shares change fast and a late decision costs most: whatever `overhead` says, a probe
# then comes whenever the steps have become a quarter more. That adds a dozen probes in all.
_EARLY_PROBES = 4
# Readings of a step's seconds before each probe, a quarter of the steps between two at most; all
# others run without a clock.
_READINGS = 3

Agreement = Callable[[list[float]], list[float]]


class Plan(NamedTuple):
    """What one step is to do.

    Attributes:
        select: Train on the chosen samples; otherwise on the whole batch.
        measure: Find out which share of the batch's gradient norm the choice carries; in a plain
            step, from the scores of its own forward.
        trial: Choose only to see what that takes, and train on every so many-th sample: whether
            the choice is a good one is not known yet, or is in doubt.
        watch: Time it.
    """

    select: bool
    measure: bool
    trial: bool = False
    watch: bool = True


class Decision(NamedTuple):
    """One decision of a `CostAwareSwitch`.

    Attributes:
        step: The step from which it holds.
        select: Whether samples are chosen from then on.
        share: The share of the batch's gradient norm that the chosen samples carried.
        cost: Seconds of a selective step over seconds of a plain one.
    """

    step: int
    select: bool
    share: float
    cost: float


class CostAwareSwitch:
    """Decides, step by step, whether choosing samples pays for what it costs.

    A selective step scores B samples, chooses k and trains on those; a plain step trains on all B.
    Katharopoulos & Fleuret, "Not All Samples Are Created Equal" (ICML 2018), section 3.3, choose
    where the gradient's variance falls by more than the step's cost allows: ``tau > (B + 3k) /
    (3k)``, if a backward costs two forwards. Measured, this reads

        share > cost

    where *share* is the part of the batch's summed gradient norm that the chosen samples carry, and
    *cost* the seconds of a selective step over those of a plain one. Both sides of the inequality
    are multiplied by k/B: for samples drawn in proportion to their gradient norm g, share * B / k
    is on average B * sum(g^2) / sum(g)^2, the factor by which the variance falls (the square of the
    published tau), and (B + 3k) / (3B) is what cost would be if only flops counted. Unlike tau,
    share also judges a choice that was not drawn in proportion: random samples carry k/B, which
    never pays for a scoring forward, and easy ones carry less.

    It starts with a few steps of either kind to learn what they cost. Afterwards, while plain steps
    run, now and then the output of one is scored, without a forward of its own, as seldom as
    `overhead` asks, and more often early on; `trial_every` steps after the last time, five of the
    other kind are timed again. Readings are medians of the last few, and `margin` on either side of
    equality keeps it from flickering.

    Args:
        force: None lets it decide; ``"select"`` and ``"plain"`` fix what it does, and nothing is
            measured.
        margin: How far share and cost have to be apart, relative to cost, before it changes.
        overhead: The part of a plain step's time that watching may take.
        trial_every: Steps between two timings of the other kind of step; as many times that where
            several steps are timed as one.

    Attributes:
        selecting: What it does now.
        decisions: Its decisions so far, the first when everything had been measured.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> CostAwareSwitch(force="plain").plan()
        Plan(select=False, measure=False, trial=False, watch=False)
    """

    def __init__(
        self,
        force: str | None = None,
        *,
        margin: float = 0.05,
        overhead: float = 0.005,
        trial_every: int = 1000,
    ) -> None:
        """Makes a switch that has measured nothing yet."""
        if force not in (None, "select", "plain"):
            raise ValueError(
                f"CostAwareSwitch: force must be 'select', 'plain' or None, got {force!r}"
            )
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"CostAwareSwitch: margin must be in [0, 1), got {margin}")
        if not 0.0 < overhead <= 1.0:
            raise ValueError(f"CostAwareSwitch: overhead must be in (0, 1], got {overhead}")
        if trial_every < 10 * _TRIAL_STEPS:
            raise ValueError(
                f"CostAwareSwitch: trial_every must be at least {10 * _TRIAL_STEPS}, "
                f"got {trial_every}"
            )
        self.force = force
        self.margin = margin
        self.overhead = overhead
        self.trial_every = trial_every
        self.selecting = False
        self.decisions: list[Decision] = []
        self._step = 0
        self._seconds: dict[str, deque[float]] = {
            kind: deque(maxlen=_WINDOW) for kind in ("plain", "select", "probe")
        }
        self._untimed = {"plain": _UNTIMED, "select": _UNTIMED, "probe": _UNTIMED}
        self._shares: deque[float] = deque(maxlen=_SHARES)
        self._probe_every = _PROBE_STEPS[0]
        self._next_probe = 0
        self._next_watch = 0
        self._next_trial = 0
        self._trial_left = 0
        self._cycle: tuple[str, list[float]] = ("", [])
        self._longest_cycle = 1

    @property
    def cost(self) -> float | None:
        """Seconds of a selective step over those of a plain one; None while unknown."""
        plain, select = (_median(self._seconds[kind], _TRIAL_STEPS) for kind in ("plain", "select"))
        return select / max(plain, 1e-9) if math.isfinite(select + plain) else None

    @property
    def share(self) -> float | None:
        """The share of the gradient norm that the chosen samples carry; None while unknown."""
        return statistics.median(self._shares) if len(self._shares) == _SHARES else None

    def plan(self, unheard: int = 0) -> Plan:
        """What the step that comes next is to do.

        Args:
            unheard: Steps of the kind it does not run now that have been planned, and of which it
                will hear later, as from a device.
        """
        if self.force is not None:
            return Plan(self.force == "select", measure=False, watch=False)
        if len(self._seconds["plain"]) < _TRIAL_STEPS:
            return Plan(select=False, measure=False)
        missing = self._trial_left
        if len(self._seconds["select"]) < _TRIAL_STEPS:
            missing = _TRIAL_STEPS - len(self._seconds["select"])
        if missing > 0:
            if unheard < missing * self._longest_cycle + self._untimed["select"]:
                return Plan(not self.selecting, measure=False, trial=not self.selecting)
            return Plan(self.selecting, measure=False, watch=False)
        return Plan(
            self.selecting,
            measure=self._step >= self._next_probe,
            watch=self._step >= min(self._next_watch, self._next_trial),
        )

    def skip(self) -> None:
        """Counts a step that was not watched."""
        self._cycle[1].clear()  # a gap: only steps in a row make a cycle
        self._step += 1

    def observe(
        self,
        plan: Plan,
        *,
        seconds: float | None,
        share: float = math.nan,
        probe_seconds: float = 0.0,
        cycle: int = 1,
        agree: Agreement | None = None,
    ) -> None:
        """Takes over what a watched step has shown, and decides after one that measured.

        Args:
            plan: What the step did, from `plan`.
            seconds: What it took, without the measuring; None if that could not be told apart.
            share: The share it found, if it measured; NaN says nothing.
            probe_seconds: What the measuring took.
            cycle: After how many steps of this kind their costs repeat, as where every fourth takes
                the optimizer's step: so many in a row are timed as one, by their mean.
            agree: Gives the mean of every value over the ranks, where there are several: all of
                them then decide the same. Called after every step that measured.
        """
        if self.force is not None:
            return
        self._longest_cycle = max(self._longest_cycle, cycle)
        timed = self._time("select" if plan.select else "plain", seconds, cycle)
        if plan.measure:
            self._add("probe", probe_seconds)
            if math.isfinite(share):
                self._shares.append(share)
            self._decide(agree, cycle)
            self._next_probe = self._step + self._probe_every
            self._next_watch = self._next_probe - _READINGS * cycle
        self._step += 1
        if self._trial_left > 0:
            # Steps planned before the trial began may still be heard of: they are not of it.
            self._trial_left -= timed and plan.select != self.selecting
            self._next_trial = self._step + self.trial_every * self._longest_cycle
        elif self._step >= self._next_trial and self.cost is not None:
            if self._next_trial > 0:
                self._trial_left = _TRIAL_STEPS
            self._next_trial = self._step + self.trial_every * self._longest_cycle

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on as this switch would, as plain numbers."""
        return {
            "selecting": self.selecting,
            "decisions": [tuple(decision) for decision in self.decisions],
            "step": self._step,
            "seconds": {kind: list(values) for kind, values in self._seconds.items()},
            "untimed": dict(self._untimed),
            "shares": list(self._shares),
            "schedule": [
                self._probe_every,
                self._next_probe,
                self._next_watch,
                self._next_trial,
                self._trial_left,
            ],
            "cycle": (self._cycle[0], list(self._cycle[1]), self._longest_cycle),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: It is not a switch's state; nothing has changed.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"CostAwareSwitch: state must have {', '.join(missing)}")
        taken = copy.copy(self)
        try:
            taken._take(state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"CostAwareSwitch: state must be a switch's, got {error}") from error
        vars(self).update(vars(taken))

    def _take(self, state: dict[str, Any]) -> None:
        self.selecting = state["selecting"]
        self.decisions = [Decision(*decision) for decision in state["decisions"]]
        self._step = state["step"]
        self._seconds = {
            kind: deque(state["seconds"][kind], maxlen=_WINDOW) for kind in self._seconds
        }
        self._untimed = dict(state["untimed"])
        self._shares = deque(state["shares"], maxlen=_SHARES)
        (
            self._probe_every,
            self._next_probe,
            self._next_watch,
            self._next_trial,
            self._trial_left,
        ) = state["schedule"]
        kind, seconds, self._longest_cycle = state["cycle"]
        self._cycle = (kind, list(seconds))

    def __repr__(self) -> str:
        """What it does now, and why."""
        share, cost = self.share, self.cost
        known = "measuring" if share is None or cost is None else f"share={share:.3f}, {cost=:.3f}"
        return f"CostAwareSwitch(selecting={self.selecting}, force={self.force!r}, {known})"

    def _time(self, kind: str, seconds: float | None, cycle: int) -> bool:
        """Takes in the seconds of a step; whether that made a reading."""
        if seconds is None or kind != self._cycle[0]:
            self._cycle = (kind, [])  # a gap: only steps in a row make a cycle
        if seconds is None:
            return False
        if self._untimed[kind] == 0:
            self._cycle[1].append(seconds)
            if len(self._cycle[1]) < cycle:
                return False
            seconds = statistics.fmean(self._cycle[1])
            self._cycle = (kind, [])
        self._add(kind, seconds)
        return True

    def _add(self, kind: str, seconds: float) -> None:
        if self._untimed[kind] > 0:
            self._untimed[kind] -= 1
        else:
            self._seconds[kind].append(seconds)

    def _decide(self, agree: Agreement | None, cycle: int) -> None:
        known = [_median(self._seconds[kind], _TRIAL_STEPS) for kind in ("plain", "select")]
        known += [_median(self._seconds["probe"], 1), _median(self._shares, _SHARES)]
        plain, select, probe, share = known if agree is None else agree(known)
        plain = max(plain, 1e-9)
        if math.isfinite(probe / plain):
            fewest, most = _PROBE_STEPS
            steady = round(min(max(probe / (self.overhead * plain), fewest), most))
            steady = max(steady, 4 * _READINGS * cycle)
            # A step that measured may not be timed: whole cycles have to fit between two of them.
            early = max(fewest, self._step // _EARLY_PROBES, 2 * cycle)
            self._probe_every = min(steady, early)
        cost = select / plain
        if not math.isfinite(share + cost):
            return
        margin = 0.0 if not self.decisions else -self.margin if self.selecting else self.margin
        selecting = share > cost * (1 + margin)
        if selecting != self.selecting or not self.decisions:
            self.selecting = selecting
            self.decisions.append(Decision(self._step + 1, selecting, share, cost))


def _median(values: deque[float], fewest: int) -> float:
    return statistics.median(values) if len(values) >= fewest else math.nan


def gradient_share(
    scores: Tensor,  # [B]
    indices: Tensor,  # [k]
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The share of a batch's summed gradient norm that the chosen samples carry.

    Args:
        scores: Gradient norm of each sample ``[B]``, or what stands for it. Values that are not
            finite count as 0.
        indices: The chosen samples ``[k]``, int64; one that was drawn twice counts twice.
        add_up: Gives the sum of a tensor over several ranks, each with a part of the batch.

    Returns:
        A tensor without dimensions; NaN where all scores are 0.

    Example:
        >>> gradient_share(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0]))
        tensor(0.7500)
    """
    size = torch.nan_to_num(scores.detach().abs(), nan=0.0, posinf=0.0, neginf=0.0)
    sums = torch.stack([size.index_select(0, indices).sum(), size.sum()])
    sums = sums if add_up is None else add_up(sums)
    return sums[0] / sums[1]


def as_switch(owner: str, switch: CostAwareSwitch | str) -> CostAwareSwitch:
    """The switch that was given or named; ValueError, beginning with `owner`, if it is none."""
    if isinstance(switch, CostAwareSwitch):
        return switch
    if switch not in ("auto", "select", "plain"):
        raise ValueError(
            f"{owner}: switch must be 'auto', 'select', 'plain' or a CostAwareSwitch, "
            f"got {switch!r}"
        )
    return CostAwareSwitch(None if switch == "auto" else switch)
