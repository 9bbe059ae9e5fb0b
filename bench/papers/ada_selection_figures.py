"""Figures of the AdaSelection experiment, after the paper's figures 2, 4, 7 and 8."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable
from typing import Any

from ada_selection_report import METHODS, MIXTURES, Table

from fastsel.compare.dress import DRESS, logarithmic, method_style, style_of
from fastsel.data.optional import require

_THEME = "light"
_STRATEGIES = tuple(METHODS)
_WEIGHTS_RATE = 0.3  # of the rates, the one nearest to this is shown


def draw(table: Table) -> dict[str, bytes]:
    """All figures as PNG bytes, by name."""
    return {
        "rates": _figure(table, "What each method ends with", _against_rates),
        "time": _figure(table, "Wall time of a run, relative to no sampling", _time),
        "mixtures": _figure(table, "What AdaSelection is a mixture of (figure 7)", _mixtures),
        "weights": _figure(table, "Method weights of [BL, SL, U, GN] (figure 8)", _weights),
    }


def _figure(table: Table, title: str, panel: Callable[[Any, Table, str], None]) -> bytes:
    """A panel a task, one legend."""
    dress = DRESS[_THEME]
    columns = min(3, len(table.tasks))
    rows = math.ceil(len(table.tasks) / columns)
    canvas = require("matplotlib.figure", "drawing figures").Figure(
        figsize=(3.4 * columns + 0.4, 2.7 * rows + 1.1), layout="constrained"
    )
    canvas.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold", color=dress["ink"])
    handles: dict[str, Any] = {}
    for i, task in enumerate(table.tasks):
        axes = canvas.add_subplot(rows, columns, i + 1)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(color=dress["faint"], linewidth=0.7)
        axes.tick_params(labelsize=8, length=0)
        axes.set_title(task, fontsize=9.5, loc="left")
        panel(axes, table, task)
        axes.xaxis.label.set_size(8.5)
        axes.yaxis.label.set_size(8.5)
        handles.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center",
                  ncols=min(4, 2 * columns), fontsize=8.5, frameon=False,
                  handlelength=2.8)  # fmt: skip
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _line(axes: Any, table: Table, strategy: str, x: Any, y: Any, spread: Any = None) -> None:
    color, width, dashes = style_of(strategy, _STRATEGIES, _THEME)
    axes.plot(x, y, color=color, linewidth=width, linestyle=dashes, label=METHODS[strategy])
    if spread is not None:
        low, high = zip(*spread, strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)


def _metric(axes: Any, table: Table, task: str, methods: tuple[str, ...], *, band: bool) -> None:
    percent = table.higher_is_better(task)
    scale = 100 if percent else 1
    for method in methods:
        values = [
            [scale * v for v in table.row(task, method, rate)["metric"] if v is not None]
            or [math.nan]
            for rate in table.rates
        ]
        y = [statistics.fmean(v) for v in values]
        _line(axes, table, method, table.rates, y,
              [(min(v), max(v)) for v in values] if band else None)  # fmt: skip
    if not percent:
        logarithmic(axes)
    axes.set_ylabel("accuracy, %" if percent else "squared error")
    axes.set_xlabel("rate")


def _against_rates(axes: Any, table: Table, task: str) -> None:
    _metric(axes, table, task, _STRATEGIES, band=False)


def _mixtures(axes: Any, table: Table, task: str) -> None:
    _metric(axes, table, task, ("full", "uniform", *MIXTURES), band=True)


def _time(axes: Any, table: Table, task: str) -> None:
    for method in _STRATEGIES:
        y = []
        for rate in table.rates:
            mine, plain = (
                [s for s in table.row(task, m, rate)["seconds"] if s is not None] or [math.nan]
                for m in (method, "full")
            )
            y.append(statistics.fmean(mine) / statistics.fmean(plain))
        _line(axes, table, method, table.rates, y)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("of no sampling")
    axes.set_xlabel("rate")


def _weights(axes: Any, table: Table, task: str) -> None:
    rate = min(table.rates, key=lambda r: abs(r - _WEIGHTS_RATE))
    mixture = MIXTURES[-1]
    (found,) = (
        w
        for w in table.results["weights"]
        if (w["task"], w["strategy"], w["rate"]) == (task, mixture, rate)
    )
    for i, method in enumerate(mixture.partition(":")[2].split("+")):
        color, width, dashes = method_style(method, i, _THEME)
        axes.plot(found["steps"], [row[i] for row in found["weights"]], color=color,
                  linewidth=width, linestyle=dashes, label=METHODS[method])  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"weight, rate {rate:g}")
    axes.set_xlabel("steps")
