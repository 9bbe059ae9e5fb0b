"""The curves of a comparison as PNG files, each in a light and a dark dress."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsel.compare.run import Point, Run
from fastsel.compare.runner import Comparison
from fastsel.compare.settings import BASELINE
from fastsel.compare.summary import metric_of
from fastsel.compare.table import NONE
from fastsel.data.optional import require

# Okabe & Ito's colours, told apart by colour-blind readers too; the reference is neutral.
_COLORS = {
    "uniform": "#0072b2",
    "big_loss": "#d55e00",
    "small_loss": "#009e73",
    "grad_norm": "#cc79a7",
}
_NEUTRAL = {"light": "#555555", "dark": "#c8c8c8"}
# grad_norm is broken finely: with two classes, or squared error, it ranks exactly as big_loss does
# and would hide it.
_LINES = {"full": (0, (5, 2)), "grad_norm": (0, (3, 1.5))}
_DRESS = {
    "light": {"background": "#ffffff", "ink": "#1f2328", "faint": "#d8dee4"},
    "dark": {"background": "#161b22", "ink": "#e6edf3", "faint": "#30363d"},
}
# A test loss that spans more than this is drawn on a logarithmic axis.
_LOG_SPAN = 12.0
# Accuracies that come this far (in %) are drawn on an axis that stretches towards 100 %.
_STRETCH_FROM = 95.0
PHASE_COLORS = {"score": "#d55e00", "choose": "#e69f00", "train": "#0072b2", "load": "#999999"}


@dataclass(frozen=True)
class Figure:
    """A figure to draw: its file name without ending, its title, and how."""

    stem: str
    title: str
    draw: Callable[[Any, Comparison, str], None]


def figures(comparison: Comparison) -> list[Figure]:
    """The figures of a comparison."""
    metric = "accuracy" if comparison.data.task == "classification" else "RMSE"
    stem = metric.lower()
    return [
        Figure("loss-steps", "Test loss against steps", _curves("steps", "loss")),
        Figure("loss-seconds", "Test loss against training seconds", _curves("seconds", "loss")),
        Figure(f"{stem}-steps", f"Test {metric} against steps", _curves("steps", metric)),
        Figure(f"{stem}-seconds", f"Test {metric} against training seconds",
               _curves("seconds", metric)),
        Figure("step-time", "Where the time of a step goes", _step_time),
    ]  # fmt: skip


def render(figure: Figure, comparison: Comparison, theme: str) -> bytes:
    """Draw a figure as PNG bytes.

    Args:
        figure: One of `figures`.
        comparison: The comparison.
        theme: "light" or "dark".
    """
    matplotlib_figure = require("matplotlib.figure", "drawing curves")
    dress = _DRESS[theme]
    canvas = matplotlib_figure.Figure(
        figsize=(7.2, 4.2), layout="constrained", facecolor=dress["background"]
    )
    canvas.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = canvas.add_subplot(facecolor=dress["background"])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(dress["faint"])
    axes.tick_params(colors=dress["ink"], which="both", labelsize=9, length=0)
    axes.grid(color=dress["faint"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(figure.title, color=dress["ink"], fontsize=11, loc="left", weight="bold")
    figure.draw(axes, comparison, theme)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(dress["ink"])
        label.set_fontsize(9.5)
    # Below the axes, where it hides no curve.
    canvas.legend(
        loc="outside lower center", ncols=5, fontsize=9, frameon=False, labelcolor=dress["ink"]
    )
    buffer = io.BytesIO()
    # No creation time or version in the file: equal results give equal bytes.
    canvas.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _color(strategy: str, theme: str) -> str:
    return _COLORS.get(strategy, _NEUTRAL[theme])


def _common(runs: Sequence[Run], value: Callable[[Point], float | None]) -> Any:
    """Values `[seeds, evaluations]`, cut to the evaluations every run has."""
    length = min(len(run.curve) for run in runs)
    values = [[value(point) for point in run.curve[:length]] for run in runs]
    return np.array(values, dtype=float)  # None becomes NaN


def _curves(axis: str, quantity: str) -> Callable[[Any, Comparison, str], None]:
    def x_of(point: Point) -> float:
        return point.step if axis == "steps" else point.seconds

    def y_of(point: Point) -> float | None:
        if quantity == "loss":
            return point.test_loss
        value = metric_of(point)
        return value * 100 if value is not None and quantity == "accuracy" else value

    def draw(axes: Any, comparison: Comparison, theme: str) -> None:
        lowest, highest = np.inf, 0.0
        for strategy in comparison.settings.strategies:
            runs = [run for run in comparison.runs if run.strategy == strategy]
            if not runs:
                continue
            x, y = _common(runs, x_of).mean(0), _common(runs, y_of)
            color = _color(strategy, theme)
            front = 3 if strategy == BASELINE else 2
            axes.plot(x, y.mean(0), color=color, label=strategy, linewidth=1.9, zorder=front,
                      linestyle=_LINES.get(strategy, "solid"))  # fmt: skip
            if len(runs) > 1:
                axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.13, linewidth=0)
            finite = y[np.isfinite(y) & (y > 0)]
            if finite.size:
                lowest, highest = min(lowest, finite.min()), max(highest, finite.max())
        if quantity == "loss":
            if highest > _LOG_SPAN * lowest:
                _logarithmic(axes)
            goal = comparison.goal_mean
            if goal is not None:
                ink = _DRESS[theme]["ink"]
                axes.axhline(goal, color=ink, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
                axes.annotate("goal", (1, goal), xycoords=("axes fraction", "data"), fontsize=8,
                              color=ink, ha="right", va="bottom", xytext=(0, 2),
                              textcoords="offset points")  # fmt: skip
        elif quantity == "accuracy":
            _accuracy_axis(axes, highest, comparison.settings.test_rows)
        labels = {"loss": "test loss", "accuracy": "test accuracy, %", "RMSE": "test RMSE"}
        axes.set_ylabel(labels[quantity])
        axes.set_xlabel("optimizer steps" if axis == "steps" else "training seconds")
        axes.set_xlim(left=0)

    return draw


def _logarithmic(axes: Any) -> None:
    ticker = require("matplotlib.ticker", "drawing curves")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _accuracy_axis(axes: Any, highest: float, test_rows: int) -> None:
    """Stretch the top where curves end there: equal steps for equal ratios of the error."""
    if highest < _STRETCH_FROM:
        axes.set_ylim(top=min(100.5, axes.get_ylim()[1]))
        return
    least = 100 / (2 * test_rows)  # half an error, for runs without one

    def stretch(accuracy: Any) -> Any:
        return -np.log10(np.maximum(100 - accuracy, least))

    def undo(value: Any) -> Any:
        return 100 - 10**-value

    axes.set_yscale("function", functions=(stretch, undo))
    ticks = [0, 50, 80, 90, 95, 98, 99, 99.5, 99.9]
    axes.set_yticks([tick for tick in ticks if tick <= highest + (100 - highest) / 2])
    axes.set_yticklabels([f"{tick:g}" for tick in axes.get_yticks()])
    axes.set_ylim(max(0.0, axes.get_ylim()[0]), 100 - max(least, (100 - highest) / 1.6))


def _step_time(axes: Any, comparison: Comparison, theme: str) -> None:
    names = [row.strategy for row in comparison.rows][::-1]
    left = np.zeros(len(names))
    for phase, color in PHASE_COLORS.items():
        means = []
        for name in names:
            runs = [run for run in comparison.runs if run.strategy == name]
            means.append(np.mean([run.seconds[phase] / max(1, run.final.step) for run in runs]))
        widths = np.array(means) * 1e3
        axes.barh(names, widths, left=left, color=color, label=phase, height=0.62)
        left += widths
    for i, total in enumerate(left):
        axes.annotate(f" {total:.2f}" if total else NONE, (total, i), va="center", fontsize=9,
                      color=_DRESS[theme]["ink"])  # fmt: skip
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds per step")
    axes.set_xlim(0, 1.12 * max(left, default=1.0))
