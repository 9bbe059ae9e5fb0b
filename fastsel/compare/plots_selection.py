"""Figures of what happens inside: the weights of AdaSelection's methods, and the switch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsel.compare.dress import DRESS, method_style
from fastsel.compare.run import MethodWeights, Run
from fastsel.compare.runner import Comparison

_SHARE, _COST = "#009e73", "#d55e00"
_SHADE = "#0072b2"


def weighing(comparison: Comparison) -> tuple[str, ...]:
    """The strategies that weigh methods and have a run to show."""
    names = {run.strategy for run in comparison.runs if run.method_weights}
    return tuple(name for name in comparison.settings.strategies if name in names)


def draw_method_weights(axes: Any, comparison: Comparison, theme: str, strategy: str) -> None:
    """Draw the weight of each method against steps, as figure 8 of AdaSelection's paper does."""
    found = [run.method_weights for run in comparison.runs if run.strategy == strategy]
    records = [weights for weights in found if weights is not None]
    x, y = _common_weights(records)  # [T], [seeds, T, M]
    for i, method in enumerate(records[0].methods):
        color, width, dashes = method_style(method, i, theme)
        mean = y[:, :, i].mean(0)
        axes.plot(x, mean, color=color, label=method, linewidth=width, linestyle=dashes)
        if len(records) > 1:
            low, high = y[:, :, i].min(0), y[:, :, i].max(0)
            axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
    axes.set_ylim(0, min(1.02, 1.15 * float(y.max())))
    axes.set_xlim(left=0)
    axes.set_ylabel("method weight")
    axes.set_xlabel("optimizer steps")


def draw_switch(axes: Any, comparison: Comparison, theme: str, panel: str) -> None:
    """Draw share and cost as the switch saw them, and shade where it chose."""
    runs = [run for run in comparison.runs if run.switch]
    records = [run.switch for run in runs if run.switch]
    x = _common_steps([record.steps for record in records])
    for name, color in (("share", _SHARE), ("cost", _COST)):
        y = np.array([_at(x, one.steps, getattr(one, name)) for one in records], dtype=float)
        known = np.isfinite(y).any(0)
        if not known.any():
            continue
        at = x[known]
        values = np.ma.masked_invalid(y[:, known])
        label = {"share": "share of the gradient norm", "cost": "cost of a selective step"}[name]
        axes.plot(at, values.mean(0), color=color, label=label, linewidth=1.9)
        if len(runs) > 1:
            axes.fill_between(at, values.min(0), values.max(0), color=color, alpha=0.13,
                              linewidth=0)  # fmt: skip
    _shade(axes, runs, x)
    axes.axhline(1, color=DRESS[theme]["ink"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, x[-1] if len(x) else 1)
    axes.set_ylabel("of a plain step")
    axes.set_xlabel("optimizer steps")


def _shade(axes: Any, runs: Sequence[Run], x: Any) -> None:
    """Behind the lines, the part of the seeds in which the switch was choosing."""
    choosing = [[run.switch.selecting(int(step)) for step in x] for run in runs if run.switch]
    part = np.array(choosing, dtype=float).mean(0)
    edges = np.flatnonzero(np.diff(part, prepend=np.nan, append=np.nan))
    label = "choosing" if len(runs) == 1 else "choosing (darker in more seeds)"
    for start, end in itertools.pairwise(edges.tolist()):
        if part[start] > 0:
            axes.axvspan(x[start], x[min(end, len(x) - 1)], color=_SHADE, linewidth=0, zorder=0,
                         alpha=0.22 * part[start], label=label)  # fmt: skip
            label = "_again"


def _common_weights(records: Sequence[MethodWeights]) -> tuple[Any, Any]:
    x = _common_steps([record.steps for record in records])
    return x, np.array([_at(x, record.steps, record.weights) for record in records])


def _common_steps(steps: Sequence[Sequence[int]]) -> Any:
    """The steps that every seed was recorded at `[T]`."""
    return np.array(sorted(set(steps[0]).intersection(*steps[1:])))


def _at(x: Any, steps: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The values recorded at the steps `x`, a part of `steps`."""
    by_step = dict(zip(steps, values, strict=True))
    return [by_step[int(step)] for step in x]
