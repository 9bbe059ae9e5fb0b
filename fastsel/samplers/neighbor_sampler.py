"""`NeighborBatchSampler`: near-neighbour dynamic batches for a DataLoader."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastsel.neighbors import NeighborTable
from fastsel.samplers.neighbor_batches import Batch, NeighborBatches


class NeighborBatchSampler(Sampler[list[int]]):
    """`NeighborBatches` as the ``batch_sampler`` of a `torch.utils.data.DataLoader`.

    The loop takes what belongs to the batch it got with `taken`, and tells the gradients with
    `update`::

        sampler = fastsel.NeighborBatchSampler(features, 256)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=2)
        for x, y in loader:
            batch = sampler.taken()                       # its indices and weights
            with norms:
                loss = (batch.weights * criterion(model(x), y)).mean()
                loss.backward()
            sampler.update(batch.indices, norms.norms / batch.weights)
            optimizer.step()

    With batch norm in train mode a sample's gradient norm has part of the others' in it, which the
    division by its weight makes large: take the norms of `fastsel.sample_scores` there, or of a
    pass in eval mode.

    A loader with workers asks for batches ahead of the loop, ``prefetch_factor`` for each worker,
    so that a batch is made of neighbours of the newest gradients there were when it was asked for:
    so many batches ago. `lag` says how many are ahead. Without workers it is the last batch.

    Args:
        features: ``[N, D]`` to build the table from; or a `NeighborTable`, or ids ``[N, K]``.
        batch_size: As in `NeighborBatches`.
        neighbors: K of the table, where it is built here.
        metric: As in `NeighborTable.build`, where it is built here.
        options: Further options of `NeighborBatches`. `rank` and `world_size` are by default those
            of `torch.distributed` where it is in use.

    Raises:
        TypeError: As `NeighborTable.build` and `NeighborBatches` raise it.
        ValueError: The same.

    Example:
        >>> sampler = fastsel.NeighborBatchSampler(torch.randn(100, 2), 10, neighbors=4)
        >>> len(sampler), len(next(iter(sampler)))
        (20, 10)
    """

    def __init__(
        self,
        features: Tensor | NeighborTable,
        batch_size: int,
        *,
        neighbors: int = 32,
        metric: str = "euclidean",
        **options: Any,
    ) -> None:
        table = features
        if isinstance(features, Tensor) and features.is_floating_point():
            table = NeighborTable.build(features, neighbors, metric=metric)
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            options = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), **options}
        self.batches = NeighborBatches(table, batch_size, **options)
        self._ahead: deque[Batch] = deque()
        self._resumed: deque[Batch] = deque()
        self._drawn = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the epoch, or the next one where it is over."""
        is_resumed = bool(self._resumed)
        while self._resumed:
            batch = self._resumed.popleft()
            self._ahead.append(batch)
            yield batch.indices.tolist()
        if self._drawn and not is_resumed and self.batches.position >= len(self):
            self.batches.set_epoch(self.batches.epoch + 1)
        while self.batches.position < len(self):
            batch = self.batches.next()
            self._drawn = True
            self._ahead.append(batch)
            yield batch.indices.tolist()

    @property
    def lag(self) -> int:
        """Batches that were asked for and not taken yet."""
        return len(self._ahead)

    def taken(self) -> Batch:
        """Indices and weights of the batch that the loop got, in the order it gets them.

        Raises:
            RuntimeError: More were taken than given out.
        """
        if not self._ahead:
            raise RuntimeError(
                "NeighborBatchSampler: taken() was called more often than batches were given out"
            )
        return self._ahead.popleft()

    def update(self, indices: Tensor, grad_norms: Tensor) -> None:
        """As `NeighborBatches.update`."""
        self.batches.update(indices, grad_norms)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; what was asked for ahead is forgotten."""
        self.batches.set_epoch(epoch)
        self._ahead.clear()
        self._resumed.clear()
        self._drawn = False

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is, not the loader: batches ahead of it are given out again."""
        ahead = [tuple(batch) for batch in (*self._ahead, *self._resumed)]
        return {"batches": self.batches.state_dict(), "ahead": ahead, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a state was taken; make the loader's iterator anew afterwards."""
        self.batches.load_state_dict(state["batches"])
        self._ahead.clear()
        self._resumed = deque(Batch(*batch) for batch in state["ahead"])
        self._drawn = state["drawn"]
