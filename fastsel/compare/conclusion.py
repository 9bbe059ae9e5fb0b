"""The sentences at the end: which strategy pays here, if any does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastsel.compare.intervals import Interval
from fastsel.compare.run import Run
from fastsel.compare.strategies import BASELINE, REFERENCE, SWITCHED, title
from fastsel.compare.summary import FASTER, ONE_SEED, Pairing, Row, goals_by_seed, pair


class _Ahead(NamedTuple):
    """A strategy that is clearly faster to the goal than uniform, and how it stands to plain."""

    strategy: str
    ratio: Interval
    to_plain: Pairing


def conclude(runs: Sequence[Run], rows: Sequence[Row], goal: float | None) -> str:
    """Say in plain words which strategy pays here, or that none does.

    A strategy that beats uniform is also held against the plain step on the whole batch, paired
    the same way: beating uniform is no use to somebody who would not have sub-sampled at all. So a
    strategy pays only if it is clearly faster than both.

    "auto" may take plain steps itself. It can pay like the others, but beating uniform alone says
    little about it, since plain training may do that, too; so it is named for that only where
    nothing else can be. What it came to is said in a sentence of its own.
    """
    goals = goals_by_seed(runs, goal)
    if not any(row.strategy == BASELINE for row in rows) or not goals:
        return "No verdict: uniform, the baseline, has no finished run to compare with."
    judged = [row for row in rows if row.strategy not in (BASELINE, REFERENCE)]
    if not judged:
        return "No verdict: no choosing strategy was run beside uniform."
    if all(row.verdict == ONE_SEED for row in judged):
        return "One seed: no verdict. It takes two seeds or more (--seeds) to see the spread."
    by_strategy = {row.strategy: [r for r in runs if r.strategy == row.strategy] for row in rows}
    full = by_strategy.get(REFERENCE, [])
    ahead = [
        _Ahead(row.strategy, row.ratio, pair(by_strategy[row.strategy], full, goals))
        for row in judged
        if row.verdict == FASTER and row.ratio
    ]
    paying = [one for one in ahead if one.to_plain.faster]
    others = [one for one in ahead if one.strategy != SWITCHED]
    alone = all(row.strategy == SWITCHED for row in judged)
    if not others and (alone or any(one.to_plain.interval is None for one in ahead)):
        others = ahead
    if paying:
        best = min(paying, key=lambda one: one.ratio.mean)
        texts = [_pays(best)]
    elif others:
        best = min(others, key=lambda one: (one.to_plain.slower, one.ratio.mean))
        texts = [_beats(best)]
    else:
        best = None
        texts = [_none(ahead, pair(full, by_strategy[BASELINE], goals))]
    if auto := by_strategy.get(SWITCHED):
        named = best is not None and best.strategy == SWITCHED
        texts.append(_switched(auto, None if named else pair(auto, full, goals)))
    return " ".join(texts)


def _pays(best: _Ahead) -> str:
    to_plain = best.to_plain.interval
    assert to_plain is not None  # or it would not be clearly faster
    return (
        f"{title(best.strategy)} pays here: it takes {_times(best.ratio)} uniform's time to the "
        f"goal, and {_times(to_plain)} that of plain training on whole batches."
    )


def _beats(best: _Ahead) -> str:
    text = (
        f"{title(best.strategy)} beats uniform here: it takes {_times(best.ratio)} uniform's time "
        "to the goal."
    )
    if best.to_plain.interval is None:
        return (
            f"{text} Whether choosing pays stays open: that takes two seeds or more of full, "
            "plain training on whole batches."
        )
    if best.to_plain.slower:
        return f"{text} But plain training on whole batches is faster still: choosing does not pay."
    return (
        f"{text} But it is not clearly faster than plain training on whole batches: choosing does "
        "not clearly pay."
    )


def _none(ahead: Sequence[_Ahead], plain: Pairing) -> str:
    which = "none that always chooses" if ahead else "none"
    text = f"No choosing strategy pays here: {which} is clearly faster to the goal than uniform."
    if plain.faster and plain.interval:
        return (
            f"{text} Plain training on whole batches is: it takes {_times(plain.interval)} "
            "uniform's time."
        )
    return text


def _switched(auto: Sequence[Run], to_plain: Pairing | None) -> str:
    """What the switch did, and what it came to if `to_plain` is known exactly."""
    shares = [run.switch.chose for run in auto if run.switch]
    text = f"auto chose in {percent(sum(shares) / max(1, len(shares)))} of its steps"
    exact = to_plain is not None and to_plain.proves_faster and to_plain.proves_slower
    if to_plain is None or to_plain.interval is None or not exact:
        return f"{text}."
    return f"{text} and took {_times(to_plain.interval)} plain training's time."


def percent(share: float) -> str:
    """A share in percent; small ones keep a digit behind the point."""
    return f"{100 * share:.{1 if 0 < share < 0.01 else 0}f} %"


def times(value: float) -> str:
    """A ratio of times; what is beyond any use is not spelled out."""
    return f"{value:.2f}" if value < 100 else ">100"


def _times(ratio: Interval) -> str:
    return f"{times(ratio.mean)} times ({times(ratio.low)} to {times(ratio.high)})"
