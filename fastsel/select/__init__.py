"""Choosing the samples of a batch that are worth training on."""

from __future__ import annotations

from fastsel.select.adaselection import AdaSelection
from fastsel.select.graph import CapturedStep
from fastsel.select.history import plot_weights
from fastsel.select.importance import ImportanceSampling, variance_reduction
from fastsel.select.memory import LossMemory
from fastsel.select.methods import (
    AdaBoost,
    BigLoss,
    Coreset1,
    Coreset2,
    Entropy,
    FunctionSelector,
    GradNorm,
    Margin,
    RhoLoss,
    SmallLoss,
    Uniform,
)
from fastsel.select.references import ReferenceLosses, ReferenceModel
from fastsel.select.registry import SELECTORS, make_selector
from fastsel.select.selection import BatchSelection
from fastsel.select.selector import Choice, RandomSelector, Selector
from fastsel.select.step import SelectiveStep, StepResult
from fastsel.select.switch import CostAwareSwitch, Decision

__all__ = [
    "SELECTORS",
    "AdaBoost",
    "AdaSelection",
    "BatchSelection",
    "BigLoss",
    "CapturedStep",
    "Choice",
    "Coreset1",
    "Coreset2",
    "CostAwareSwitch",
    "Decision",
    "Entropy",
    "FunctionSelector",
    "GradNorm",
    "ImportanceSampling",
    "LossMemory",
    "Margin",
    "RandomSelector",
    "ReferenceLosses",
    "ReferenceModel",
    "RhoLoss",
    "SelectiveStep",
    "Selector",
    "SmallLoss",
    "StepResult",
    "Uniform",
    "make_selector",
    "plot_weights",
    "variance_reduction",
]
