"""The figures of a diagnosis, after figures 3 and 7 of the near-neighbour paper, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from fastsel.data.optional import require
from fastsel.diagnose.measures import Smoothness, Suitability

_BLUE, _VERMILION, _FAINT = "#0072b2", "#d55e00", "#d8dee4"


def suitability(steps: Sequence[int], found: Sequence[Suitability]) -> bytes:
    """Mean gradient norms of all samples and of the neighbours of the largest, over steps."""
    figure, axes = _axes("training steps", "mean gradient norm")
    axes.plot(steps, [one.mean_norm for one in found], color=_BLUE, label="all samples")
    low, middle, high = (
        [one.mean_norm * getattr(one, name) for one in found]
        for name in ("ratio_low", "ratio", "ratio_high")
    )
    axes.plot(steps, middle, color=_VERMILION, label="neighbours of the largest")
    axes.fill_between(steps, low, high, color=_VERMILION, alpha=0.2, linewidth=0)
    if min(min(low), min(one.mean_norm for one in found)) > 0:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return _png(figure)


def smoothness(found: Smoothness) -> bytes:
    """Gradient norms of synthetic points over their distance, and those of true neighbours."""
    figure, axes = _axes("distance from the sample with the largest gradient", "gradient norm")
    low = [norm - spread for norm, spread in zip(found.norms, found.spreads, strict=True)]
    high = [norm + spread for norm, spread in zip(found.norms, found.spreads, strict=True)]
    axes.plot(found.distances, found.norms, color=_BLUE, label="synthetic points")
    axes.fill_between(found.distances, low, high, color=_BLUE, alpha=0.2, linewidth=0)
    axes.scatter(
        found.neighbor_distances, found.neighbor_norms, s=14, color=_VERMILION, label="neighbours"
    )
    axes.axhline(found.origin_norm, color="#555555", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False)
    return _png(figure)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "drawing a diagnosis").Figure(
        figsize=(6.4, 3.8), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No creation time or version in the file: equal results give equal bytes.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
