"""The figures of a comparison as PNG files, each in a light and a dark dress."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsel.compare.dress import DRESS, label_of, logarithmic, style_of
from fastsel.compare.plots_selection import draw_method_weights, draw_switch, weighing
from fastsel.compare.run import Point, Run
from fastsel.compare.runner import Comparison
from fastsel.compare.strategies import BASELINE
from fastsel.compare.summary import metric_of
from fastsel.compare.table import NONE
from fastsel.data.optional import require

# A test loss that spans more than this is drawn on a logarithmic axis.
_LOG_SPAN = 12.0
# Accuracies that come this far (in %) are drawn on an axis that stretches towards 100 %.
_STRETCH_FROM = 95.0
PHASE_COLORS = {
    "prepare": "#cc79a7", "score": "#d55e00", "choose": "#e69f00", "train": "#0072b2",
    "load": "#999999",
}  # fmt: skip
_WIDTH, _HEIGHT, _PANEL_HEIGHT, _TEXT_LINE = 7.2, 3.9, 2.6, 0.19  # inches
# Characters a line: in the legend by its number of columns, before an axis, above a panel.
_LEGEND_CHARACTERS = {5: 11, 4: 17, 3: 26}
_AXIS_CHARACTERS, _PANEL_CHARACTERS = 28, 46
_BAR_GAP = 0.55  # between two bars, of a line's height


@dataclass(frozen=True)
class Figure:
    """A figure to draw.

    Attributes:
        stem: Its file name without ending.
        title: Its title.
        draw: Draws into axes: of a comparison, in a theme, the panel of that name.
        panels: Names of its panels, each the heading of one; a single one needs none.
        height: Of a single panel, in inches.
    """

    stem: str
    title: str
    draw: Callable[[Any, Comparison, str, str], None]
    panels: tuple[str, ...] = ("",)
    height: float = _HEIGHT


def figures(comparison: Comparison) -> list[Figure]:
    """The figures of a comparison."""
    metric = "accuracy" if comparison.data.task == "classification" else "RMSE"
    stem = metric.lower()
    result = [
        Figure("loss-steps", "Test loss against steps", _curves("steps", "loss")),
        Figure("loss-seconds", "Test loss against training seconds", _curves("seconds", "loss")),
        Figure(f"{stem}-steps", f"Test {metric} against steps", _curves("steps", metric)),
        Figure(f"{stem}-seconds", f"Test {metric} against training seconds",
               _curves("seconds", metric)),
        Figure("step-time", "Where the time of a step goes", _step_time,
               height=max(_HEIGHT, 1.2 + _TEXT_LINE * _axis_lines(comparison))),
    ]  # fmt: skip
    if panels := weighing(comparison):
        result.append(Figure("method-weights", "Method weights", draw_method_weights, panels))
    if any(run.switch for run in comparison.runs):
        result.append(Figure("switch", "Where the switch chose", draw_switch))
    return result


def render(figure: Figure, comparison: Comparison, theme: str) -> bytes:
    """Draw a figure as PNG bytes.

    Args:
        figure: One of `figures`.
        comparison: The comparison.
        theme: "light" or "dark".
    """
    matplotlib_figure = require("matplotlib.figure", "drawing curves")
    dress = DRESS[theme]
    canvas = matplotlib_figure.Figure(layout="constrained", facecolor=dress["background"])
    canvas.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    columns = 1 if len(figure.panels) == 1 else 2
    rows = math.ceil(len(figure.panels) / columns)
    handles: dict[str, Any] = {}
    for i, panel in enumerate(figure.panels):
        axes = canvas.add_subplot(rows, columns, i + 1, facecolor=dress["background"])
        _dress(axes, dress)
        if columns > 1:
            heading = label_of(panel, _PANEL_CHARACTERS)
            axes.set_title(heading, color=dress["ink"], fontsize=9, loc="left")
        figure.draw(axes, comparison, theme, panel)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(dress["ink"])
            label.set_fontsize(9.5)
        handles.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    canvas.suptitle(
        figure.title, color=dress["ink"], fontsize=11, x=0.015, ha="left", weight="bold"
    )
    lines = _legend(canvas, handles, dress) if handles else 0
    height = figure.height if rows == 1 else _PANEL_HEIGHT * rows
    canvas.set_size_inches(_WIDTH, height + _TEXT_LINE * (lines + 0.5))
    buffer = io.BytesIO()
    # No creation time or version in the file: equal results give equal bytes.
    canvas.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _legend(canvas: Any, handles: dict[str, Any], dress: dict[str, str]) -> int:
    """A legend below the axes, where it hides no curve; gives the number of its lines."""
    longest = max(map(len, handles))
    columns = next((n for n, most in _LEGEND_CHARACTERS.items() if longest <= most), 3)
    names = [label_of(name, _LEGEND_CHARACTERS[columns]) for name in handles]
    canvas.legend(list(handles.values()), names, loc="outside lower center", ncols=columns,
                  fontsize=9, frameon=False, labelcolor=dress["ink"], handlelength=2.6)  # fmt: skip
    deep = math.ceil(len(names) / columns)
    # matplotlib fills column by column.
    starts = range(0, len(names), deep)
    return max(sum(name.count("\n") + 1 for name in names[i : i + deep]) for i in starts)


def _dress(axes: Any, dress: dict[str, str]) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(dress["faint"])
    axes.tick_params(colors=dress["ink"], which="both", labelsize=9, length=0)
    axes.grid(color=dress["faint"], linewidth=0.7)
    axes.set_axisbelow(True)


def _common(runs: Sequence[Run], value: Callable[[Point], float | None]) -> Any:
    """Values `[seeds, evaluations]`, cut to the evaluations every run has."""
    length = min(len(run.curve) for run in runs)
    values = [[value(point) for point in run.curve[:length]] for run in runs]
    return np.array(values, dtype=float)  # None becomes NaN


def _curves(axis: str, quantity: str) -> Callable[[Any, Comparison, str, str], None]:
    def x_of(point: Point) -> float:
        return point.step if axis == "steps" else point.seconds

    def y_of(point: Point) -> float | None:
        if quantity == "loss":
            return point.test_loss
        value = metric_of(point)
        return value * 100 if value is not None and quantity == "accuracy" else value

    def draw(axes: Any, comparison: Comparison, theme: str, panel: str) -> None:
        lowest, highest = np.inf, 0.0
        strategies = comparison.settings.strategies
        for strategy in strategies:
            runs = [run for run in comparison.runs if run.strategy == strategy]
            if not runs:
                continue
            x, y = _common(runs, x_of).mean(0), _common(runs, y_of)
            color, width, dashes = style_of(strategy, strategies, theme)
            front = 3 if strategy == BASELINE else 2
            axes.plot(x, y.mean(0), color=color, label=strategy, linewidth=width, zorder=front,
                      linestyle=dashes)  # fmt: skip
            if len(runs) > 1:
                alpha = 0.13 if len(strategies) <= _MANY else 0.07
                axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=alpha, linewidth=0)
            finite = y[np.isfinite(y) & (y > 0)]
            if finite.size:
                lowest, highest = min(lowest, finite.min()), max(highest, finite.max())
        if quantity == "loss":
            if highest > _LOG_SPAN * lowest:
                logarithmic(axes)
            goal = comparison.goal_mean
            if goal is not None:
                ink = DRESS[theme]["ink"]
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


# Bands of more strategies than this lie over each other.
_MANY = 8


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


def _step_time(axes: Any, comparison: Comparison, theme: str, panel: str) -> None:
    names = [row.strategy for row in comparison.rows]
    lines = [label.count("\n") + 1 for label in _axis_labels(comparison)]
    places = -np.cumsum([n + _BAR_GAP for n in lines]) + np.array(lines) / 2
    left = np.zeros(len(names))
    for phase, color in PHASE_COLORS.items():
        means = []
        for name in names:
            runs = [run for run in comparison.runs if run.strategy == name]
            means.append(np.mean([run.seconds[phase] / max(1, run.final.step) for run in runs]))
        widths = np.array(means) * 1e3
        if phase != "prepare" or widths.any():
            axes.barh(places, widths, left=left, color=color, label=phase, height=1.0)
        left += widths
    axes.set_yticks(places, _axis_labels(comparison))
    axes.set_ylim(places[-1] - 1.1, places[0] + 1.1)
    for place, total in zip(places, left, strict=True):
        axes.annotate(f" {total:.2f}" if total else NONE, (total, place), va="center", fontsize=9,
                      color=DRESS[theme]["ink"])  # fmt: skip
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds per step")
    axes.set_xlim(0, 1.12 * max(left, default=1.0))


def _axis_labels(comparison: Comparison) -> list[str]:
    return [label_of(row.strategy, _AXIS_CHARACTERS) for row in comparison.rows]


def _axis_lines(comparison: Comparison) -> float:
    """Height of the bars, in lines of text."""
    return sum(label.count("\n") + 1 + _BAR_GAP for label in _axis_labels(comparison))
