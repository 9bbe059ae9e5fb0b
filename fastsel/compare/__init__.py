"""Which selection strategy pays on this data? Trains with each under equal conditions and tells.

`compare` runs the strategies and returns a `Comparison`; `write_report` draws its curves and
writes report.html. The command `fastsel compare` does both with a live display.
"""

from __future__ import annotations

from fastsel.compare.budget import Budget, parse_budget
from fastsel.compare.errors import CompareError
from fastsel.compare.report import write_report
from fastsel.compare.run import MethodWeights, Point, Run, SwitchDecision, SwitchRecord
from fastsel.compare.runner import Comparison, compare
from fastsel.compare.settings import Settings
from fastsel.compare.strategies import DEFAULT_STRATEGIES, STRATEGIES
from fastsel.compare.summary import Row

__all__ = [
    "DEFAULT_STRATEGIES",
    "STRATEGIES",
    "Budget",
    "CompareError",
    "Comparison",
    "MethodWeights",
    "Point",
    "Row",
    "Run",
    "Settings",
    "SwitchDecision",
    "SwitchRecord",
    "compare",
    "parse_budget",
    "write_report",
]
