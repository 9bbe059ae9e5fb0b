"""Near-neighbour dynamic batches: part of the next batch from neighbours of large gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsel import ops
from fastsel.neighbors import NeighborTable

MODES = ("neighbors", "random")
_INT64 = 1 << 64


class Batch(NamedTuple):
    """What `NeighborBatches.next` returns.

    Attributes:
        indices: The samples ``[B]``, int64; one may be there twice.
        weights: What each sample's loss is multiplied by so that the mean over the batch is an
            unbiased estimate of the mean over the data set ``[B]``, float32.
    """

    indices: Tensor  # [B]
    weights: Tensor  # [B]


class NeighborBatches:
    """Draws batches of which a share are neighbours of the last batch's largest gradients.

    Algorithm 1 of the near-neighbour paper (Walia and Singhal), as its experiments run it: the next
    batch is made of uniform samples and of near neighbours of the current batch's samples, drawn by
    their gradient norms. Everything stays on the table's device and nothing is waited for, so the
    whole step can stay on a GPU: draw, gather, train, `update`.

    The uniform part goes through the data set once an epoch, in a random order. ``weights`` correct
    for the rest: a sample that the uniform part gives with probability 1/N and the neighbours with
    p counts 1 / (N q), q = (b 1/N + m p) / (b + m) for b uniform and m neighbour draws (the balance
    heuristic of Veach and Guibas 1995). They are at most one over the uniform part's share. The
    paper's own figures leave them out; so may you.

    Args:
        table: The neighbours: a `NeighborTable` or its ids ``[N, K]``.
        batch_size: B, samples of a batch on this rank.
        share: Of the batch, what comes from neighbours: K percent of the paper's NN-K. 1 is
            Algorithm 1 to the letter, which never sees what is nobody's neighbour.
        mode: ``neighbors``; or ``random``, the paper's RANDOM-K: uniform draws in their place.
        anchors: How many of the samples in `update` neighbours are drawn of, those with the largest
            norms; None for all.
        append: Leave the uniform part B samples and add the share to them, as in the paper's
            figures 1 and 2.
        drop_last: Leave out an epoch's last batch if its uniform part is short.
        seed: Of all draws; the same on every rank.
        rank: This process' number among `world_size`: ranks share the epoch's order, and each draws
            neighbours of its own samples.
        world_size: How many processes there are.

    Raises:
        TypeError: `table` is neither.
        ValueError: An option is out of range.

    Example:
        >>> table = fastsel.NeighborTable.build(torch.randn(100, 2), k=4)
        >>> batches = fastsel.NeighborBatches(table, 8)
        >>> first = batches.next()
        >>> batches.update(first.indices, torch.rand(8))
        >>> batches.next().indices.shape
        torch.Size([8])
    """

    def __init__(
        self,
        table: NeighborTable | Tensor,
        batch_size: int,
        *,
        share: float = 0.5,
        mode: str = "neighbors",
        anchors: int | None = None,
        append: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        ids = table.ids if isinstance(table, NeighborTable) else table
        if not isinstance(ids, Tensor):
            raise TypeError(
                "NeighborBatches: table must be a NeighborTable or its ids, got "
                f"{type(table).__name__}"
            )
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"NeighborBatches: table must be [N, K], got {list(ids.shape)}")
        if batch_size < 1:
            raise ValueError(f"NeighborBatches: batch_size must be positive, got {batch_size}")
        if not 0 <= share <= 1:
            raise ValueError(f"NeighborBatches: share must be between 0 and 1, got {share}")
        if mode not in MODES:
            raise ValueError(f"NeighborBatches: mode must be one of {MODES}, got {mode!r}")
        if anchors is not None and anchors < 1:
            raise ValueError(f"NeighborBatches: anchors must be positive, got {anchors}")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"NeighborBatches: rank must be between 0 and {world_size - 1}, got {rank}"
            )
        self.table = ids
        self.batch_size = batch_size
        self.share = share
        self.mode = mode
        self.seed = seed
        self._drawn = round(share * batch_size)
        self._uniform = batch_size if append else batch_size - self._drawn
        self._most_anchors = anchors
        self._drop_last = drop_last
        self._rank, self._world_size = rank, world_size
        self.epoch = 0
        self._position = 0  # batches of this epoch
        self._draws = 0  # batches of all epochs
        self._order: Tensor | None = None
        self._anchors: Tensor | None = None
        self._anchor_weights: Tensor | None = None
        self._seed = self._seed_of(0)

    def __len__(self) -> int:
        """Batches in an epoch."""
        rows = math.ceil(len(self.table) / self._world_size)
        each = self._uniform or self._drawn
        return rows // each if self._drop_last else math.ceil(rows / each)

    @property
    def position(self) -> int:
        """Batches of this epoch that were drawn."""
        return self._position

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch: a new order of the uniform part. `next` goes on to the next by itself.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch
        self._position = 0
        self._order = None

    def next(self) -> Batch:
        """The next batch; after an epoch's last one the first of the next epoch."""
        if self._position >= len(self):
            self.set_epoch(self.epoch + 1)
        uniform = self._next_uniform()
        self._position += 1
        seed = self._seed.clone()
        self._seed += 1
        self._draws += 1
        count, device = len(self.table), self.table.device
        if self._drawn == 0:
            return Batch(uniform, torch.ones(len(uniform), device=device))
        if self.mode == "random" or self._anchors is None or self._anchor_weights is None:
            even = torch.ones(count, device=device)
            drawn = ops.weighted_sample(even, self._drawn, seed, replacement=True).indices
            indices = torch.cat([uniform, drawn])
            return Batch(indices, torch.ones(len(indices), device=device))
        near = ops.neighbor_sample(
            self.table, self._anchors, self._anchor_weights, self._drawn, seed
        )
        elsewhere = ops.neighbor_probs(self.table, self._anchors, self._anchor_weights, uniform)
        indices = torch.cat([uniform, near.indices])
        probs = torch.cat([elsewhere, near.probs])
        size = len(indices)
        mixture = (len(uniform) / count + self._drawn * probs) / size
        return Batch(indices, 1 / (count * mixture))

    def update(
        self,
        indices: Tensor,  # [b]
        grad_norms: Tensor,  # [b]
    ) -> None:
        """Tells what a batch's gradients were: the next batches draw neighbours of its samples.

        Args:
            indices: The samples ``[b]``.
            grad_norms: The norm of each one's gradient ``[b]``, as by `fastsel.GradNorms`. If all
                are zero they count evenly; of no samples nothing is learnt.

        Raises:
            ValueError: The shapes differ; or on the CPU, a norm is negative or not finite.
            IndexError: On the CPU, an index is not one of the table's.
        """
        if indices.dim() != 1 or indices.shape != grad_norms.shape:
            raise ValueError(
                "NeighborBatches: indices and grad_norms must be of one shape [b], got "
                f"{list(indices.shape)} and {list(grad_norms.shape)}"
            )
        device = self.table.device
        indices = indices.detach().to(device, torch.int64)
        norms = grad_norms.detach().to(device, torch.float32)
        if device.type == "cpu":
            if not bool(((norms >= 0) & norms.isfinite()).all()):
                raise ValueError(
                    "NeighborBatches: grad_norms must be finite and not negative, got "
                    f"{norms[~((norms >= 0) & norms.isfinite())][0].item()}"
                )
            if len(indices) > 0 and not 0 <= int(indices.min()) <= int(indices.max()) < len(
                self.table
            ):
                raise IndexError(
                    f"NeighborBatches: indices must be between 0 and {len(self.table) - 1}, got "
                    f"{int(indices.min())} to {int(indices.max())}"
                )
        if len(indices) == 0:
            return
        norms = torch.where((norms > 0).any(), norms, 1.0)
        if self._most_anchors is not None and self._most_anchors < len(norms):
            best = ops.topk(norms, self._most_anchors, sorted=False)
            indices, norms = indices[best.indices], best.values
        self._anchors, self._anchor_weights = indices.clone(), norms.clone()

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """Where it is: with `load_state_dict` into one made alike, the same batches follow."""
        kept = self._anchors, self._anchor_weights
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "draws": self._draws,
            "anchors": None if kept[0] is None else kept[0].cpu(),
            "anchor_weights": None if kept[1] is None else kept[1].cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a state was taken."""
        self.seed = state["seed"]
        self.set_epoch(state["epoch"])
        self._position = state["position"]
        self._draws = state["draws"]
        self._seed = self._seed_of(self._draws)
        device = self.table.device
        anchors, weights = state["anchors"], state["anchor_weights"]
        self._anchors = None if anchors is None else anchors.to(device)
        self._anchor_weights = None if weights is None else weights.to(device)

    # ---- the parts ----

    def _next_uniform(self) -> Tensor:
        """The uniform part of the batch at `position`."""
        if self._order is None:
            device = self.table.device
            generator = torch.Generator(device).manual_seed(
                (self.seed * 1_000_003 + self.epoch) % 2**63
            )
            order = torch.randperm(len(self.table), generator=generator, device=device)
            # Short shards begin again, so that all ranks have as many batches.
            rows = math.ceil(len(order) / self._world_size)
            order = torch.cat([order, order[: rows * self._world_size - len(order)]])
            self._order = order[self._rank :: self._world_size]
        first = self._position * self._uniform
        return self._order[first : first + self._uniform]

    def _seed_of(self, draws: int) -> Tensor:
        """The seed of the batch after so many: ranks' and runs' lie far apart."""
        start = (self.seed * 0x9E3779B97F4A7C15 + self._rank * 0xD1B54A32D192ED03) % _INT64
        value = (start + draws) % _INT64
        signed = value - _INT64 if value >= _INT64 // 2 else value
        return torch.tensor([signed], device=self.table.device)
