"""Choosing the samples of a batch that are worth training on."""

from __future__ import annotations

from fastsel.select.selectors import (
    SELECTORS,
    BigLoss,
    GradNorm,
    Selector,
    SmallLoss,
    Uniform,
    make_selector,
)
from fastsel.select.step import SelectiveStep, StepResult

__all__ = [
    "SELECTORS",
    "BigLoss",
    "GradNorm",
    "SelectiveStep",
    "Selector",
    "SmallLoss",
    "StepResult",
    "Uniform",
    "make_selector",
]
