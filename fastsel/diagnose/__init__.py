"""Whether near-neighbour batches will pay: the two diagnostics of the paper, before a long run."""

from __future__ import annotations

from fastsel.diagnose.measures import (
    Smoothness,
    Suitability,
    gradient_norms,
    smoothness,
    suitability,
)
from fastsel.diagnose.run import Diagnosis, diagnose

__all__ = [
    "Diagnosis",
    "Smoothness",
    "Suitability",
    "diagnose",
    "gradient_norms",
    "smoothness",
    "suitability",
]
