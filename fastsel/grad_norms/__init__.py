"""Per-sample gradient norms from one ordinary backward: `GradNorms`, `register_norm_rule`."""

from __future__ import annotations

from fastsel.grad_norms.noise import NoiseScale
from fastsel.grad_norms.norms import GradNorms
from fastsel.grad_norms.rules import register_norm_rule

__all__ = ["GradNorms", "NoiseScale", "register_norm_rule"]
