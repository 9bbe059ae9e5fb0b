"""The order of the batches, and the random streams of a run."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def stream_seed(purpose: str, seed: int) -> int:
    """A seed for one purpose of a run, so that its random streams do not share numbers."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:7], "big")


class BatchOrder:
    """The batches of a run: every epoch a new permutation, a short last batch left out.

    It depends on the seed alone, so all strategies see the same batches in the same order.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        """Args: rows of the train part, rows of a batch, seed of the run."""
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(stream_seed("batches", seed))
        self.order = torch.randperm(rows, generator=self.generator)  # [N]
        self.position = 0

    def next_batch(self) -> Tensor:
        """Row numbers of the next batch, `[B]` int64."""
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.order), generator=self.generator)
            self.position = 0
        self.position += self.batch_size
        return self.order[self.position - self.batch_size : self.position]

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume."""
        return {
            "order": self.order, "position": self.position, "generator": self.generator.get_state()
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.order, self.position = state["order"], state["position"]
        self.generator.set_state(state["generator"])
