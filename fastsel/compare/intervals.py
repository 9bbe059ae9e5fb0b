"""The few statistics a verdict needs: spreads over seeds and paired intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t by degrees of freedom (any table); beyond, the last is used,
# which errs on the side of no verdict.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation is None for a single seed."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None)
    square = math.fsum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(square / (len(values) - 1)))


def t_interval(values: Sequence[float]) -> Interval | None:
    """Mean and its 95 % interval by Student's t; None of fewer than two values."""
    summary = spread(values)
    if summary is None or summary.std is None:
        return None
    quantile = _T_975[min(len(values) - 1, len(_T_975)) - 1]
    half = quantile * summary.std / math.sqrt(len(values))
    return Interval(summary.mean, summary.mean - half, summary.mean + half)
