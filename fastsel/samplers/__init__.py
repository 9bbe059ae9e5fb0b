"""Samplers that choose the next batch by what the last ones taught."""

from __future__ import annotations

from fastsel.samplers.neighbor_batches import Batch, NeighborBatches
from fastsel.samplers.neighbor_sampler import NeighborBatchSampler

__all__ = ["Batch", "NeighborBatchSampler", "NeighborBatches"]
