"""How strategies and methods look in figures, in a light and a dark dress."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

from fastsel.compare.strategies import BASELINE, MIXTURE, REFERENCE, SWITCHED, title
from fastsel.data.optional import require

DRESS = {
    "light": {"background": "#ffffff", "ink": "#1f2328", "faint": "#d8dee4"},
    "dark": {"background": "#161b22", "ink": "#e6edf3", "faint": "#30363d"},
}
_NEUTRAL = {"light": "#555555", "dark": "#c8c8c8"}

# Okabe & Ito's colours, told apart by colour-blind readers too, and two more that read on both
# backgrounds.
_BLUE, _VERMILION, _GREEN, _PINK, _SKY, _ORANGE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
)  # fmt: skip
_BROWN, _PURPLE = "#a97142", "#8b6cf0"
Dashes = tuple[float, ...]
_SOLID: Dashes = ()
_DASHED: Dashes = (5.0, 2.0)
_FINE: Dashes = (2.2, 1.4)
_DASH_DOT: Dashes = (6.0, 1.6, 1.2, 1.6)
# A colour a family, a dash a member: what often chooses the same rows then neither hides nor looks
# like the other.
_STYLES: dict[str, tuple[str, Dashes]] = {
    BASELINE: (_BLUE, _SOLID),
    "big_loss": (_VERMILION, _SOLID),
    "adaboost": (_VERMILION, _FINE),
    "small_loss": (_GREEN, _SOLID),
    "grad_norm": (_PINK, _DASHED),
    "importance": (_PINK, _FINE),
    "coreset1": (_SKY, _SOLID),
    "coreset2": (_SKY, _DASHED),
    "rho_loss": (_ORANGE, _SOLID),
    "entropy": (_BROWN, _SOLID),
    "margin": (_BROWN, _DASHED),
    MIXTURE: (_PURPLE, _SOLID),
}
_MIXTURE_DASHES = (_DASHED, _FINE, _DASH_DOT)
_MIXTURE_COLORS = (_PURPLE, "#c44fd0", "#5f8dff")


class Style(NamedTuple):
    """A line: its colour, its width, and how it is broken (as matplotlib takes it)."""

    color: str
    width: float
    dashes: str | tuple[float, Dashes]


def style_of(strategy: str, strategies: tuple[str, ...], theme: str) -> Style:
    """The line of a strategy.

    Args:
        strategy: Its name.
        strategies: All that are drawn: mixtures look different by their place among them.
        theme: "light" or "dark".
    """
    width = 1.9
    if strategy == REFERENCE:
        color, dashes = _NEUTRAL[theme], _DASHED
    elif strategy == SWITCHED:  # what a user gets without asking for anything
        color, dashes, width = DRESS[theme]["ink"], _SOLID, 2.3
    elif strategy in _STYLES:
        color, dashes = _STYLES[strategy]
    else:
        mixtures = [name for name in strategies if name.startswith(f"{MIXTURE}:")]
        place = mixtures.index(strategy)
        color = _MIXTURE_COLORS[place // len(_MIXTURE_DASHES) % len(_MIXTURE_COLORS)]
        dashes = _MIXTURE_DASHES[place % len(_MIXTURE_DASHES)]
    return Style(color, width, (0, dashes) if dashes else "solid")


def method_style(method: str, place: int, theme: str) -> Style:
    """The line of a method within a mixture: that of the strategy of the same name.

    Args:
        method: Its name.
        place: Its place in the mixture, for methods that are no strategy.
        theme: "light" or "dark".
    """
    known = method if method in _STYLES else f"{MIXTURE}:{place}"
    return style_of(known, (known,), theme)


def label_of(strategy: str, width: int) -> str:
    """The name for a figure, in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(title(strategy), width))


def logarithmic(axes: Any) -> None:
    """A logarithmic vertical axis with plain numbers."""
    ticker = require("matplotlib.ticker", "drawing curves")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
