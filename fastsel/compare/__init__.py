"""Which selection strategy pays on this data? Trains with each under equal conditions and tells.

`compare` runs the strategies and returns a `Comparison`; `write_report` draws its curves and
writes report.html. The command `fastsel compare` does both with a live display.
"""

from __future__ import annotations

from fastsel.compare.budget import Budget, parse_budget
from fastsel.compare.errors import CompareError
from fastsel.compare.report import write_report
from fastsel.compare.run import Point, Run
from fastsel.compare.runner import Comparison, compare
from fastsel.compare.settings import STRATEGIES, Settings
from fastsel.compare.summary import Row

__all__ = [
    "STRATEGIES",
    "Budget",
    "CompareError",
    "Comparison",
    "Point",
    "Row",
    "Run",
    "Settings",
    "compare",
    "parse_budget",
    "write_report",
]
