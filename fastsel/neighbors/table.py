"""`NeighborTable`: the neighbours of every sample of a data set."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsel.neighbors import storage
from fastsel.neighbors.search import choose, make_search, prepare

INT32_MOST = 2**31 - 1


class NeighborTable:
    """The K nearest neighbours of every sample, nearest first, the sample itself left out.

    Make one with `build`, or `load`. It is what `NeighborBatchSampler` and
    `fastsel.neighbor_sample` draw from.

    Args:
        ids: ``[N, K]``, int32 or int64.
        distances: Squared L2 distances of `ids` ``[N, K]``, float32; for the cosine, those of the
            rows at length 1, which is twice one minus the cosine.
        metric: ``euclidean`` or ``cosine``.
        method: How it was found.
        fingerprint: That of the features; see `fingerprint`.

    Attributes:
        ids: As given.
        distances: As given.
        metric: As given.
        method: As given: ``exact``, or an index factory string of Faiss.
        fingerprint: As given.
    """

    def __init__(
        self,
        ids: Tensor,  # [N, K]
        distances: Tensor,  # [N, K]
        *,
        metric: str,
        method: str,
        fingerprint: str,
    ) -> None:
        self.ids = ids
        self.distances = distances
        self.metric = metric
        self.method = method
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.ids)

    @property
    def k(self) -> int:
        """K, the neighbours of each sample."""
        return self.ids.shape[1]

    def __repr__(self) -> str:
        return f"NeighborTable({len(self)} x {self.k}, {self.metric}, {self.method})"

    # ---- making one ----

    @classmethod
    def build(
        cls,
        features: Tensor,  # [N, D]
        k: int = 32,
        *,
        metric: str = "euclidean",
        method: str = "auto",
        gpu: bool = False,
        block: int = 65_536,
        progress: bool = False,
    ) -> NeighborTable:
        """Finds the neighbours of every row of the features among the others.

        Args:
            features: ``[N, D]``, any floating dtype, finite; on the CPU or a GPU.
            k: Neighbours of each row, from 1 to N - 1.
            metric: ``euclidean``, or ``cosine``.
            method: ``exact``: `fastsel.knn`. An index factory string of Faiss such as
                ``IVF1024,Flat`` or ``HNSW32``: approximate, for what is too large to be exact.
                ``auto``: exact, by Faiss' ``Flat`` where it is installed and faster, in many
                dimensions.
            gpu: Put Faiss' index on all GPUs. The exact search runs where the features are.
            block: Rows searched at a time: what the bar moves by, and Ctrl-C waits for.
            progress: Show a bar on standard error.

        Returns:
            The table, its ids in int32 where N allows it.

        Raises:
            TypeError: `features` is not a floating tensor.
            ValueError: Shapes or options are wrong, a feature is not finite, or Faiss does not know
                the index or found fewer than k neighbours of a row.
            MissingPackageError: Faiss is needed and not installed.

        Example:
            >>> table = fastsel.NeighborTable.build(torch.tensor([[0.0], [1.0], [5.0]]), k=1)
            >>> table.ids[:, 0]
            tensor([1, 0, 1], dtype=torch.int32)
        """
        data = prepare(features, metric)
        count = len(data)
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"NeighborTable: k must be an int, got {type(k).__name__}")
        if not 1 <= k < count:
            raise ValueError(
                f"NeighborTable: k must be between 1 and {count - 1} (one less than the rows), "
                f"got {k}"
            )
        if block < 1:
            raise ValueError(f"NeighborTable: block must be positive, got {block}")
        chosen = choose(method, data)
        search = make_search(chosen, data, gpu)
        ids = torch.empty(count, k, dtype=_id_dtype(count), device=data.device)
        distances = torch.empty(count, k, device=data.device)
        bar = _Bar("neighbours", count, progress)
        for first in range(0, count, block):
            rows = torch.arange(first, min(first + block, count), device=data.device)
            found, near = search(data[first : first + block], k + 1)
            found, near = _without_self(found, near, rows)
            if bool((near < 0).any()):
                raise ValueError(
                    f"NeighborTable: {chosen!r} found fewer than {k} neighbours of row "
                    f"{first + int((near < 0).any(1).nonzero()[0])}: let it look further, as by a "
                    "smaller number of lists"
                )
            ids[first : first + block], distances[first : first + block] = near, found
            bar.to(first + len(rows))
        return cls(ids, distances, metric=metric, method=chosen, fingerprint=fingerprint(features))

    def add(
        self,
        features: Tensor,  # [N, D]
        more: Tensor,  # [M, D]
    ) -> NeighborTable:
        """The table of the features with more rows after them, exactly as if built anew.

        Only distances to the new rows are computed.

        Args:
            features: Those of this table ``[N, D]``.
            more: The new rows ``[M, D]``, which become samples N to N + M - 1.

        Returns:
            A new table of N + M rows; this one is left as it is.

        Raises:
            ValueError: `features` are not this table's, the table is not exact, or `more` does not
                fit.
        """
        self.check(features)
        if self.method != "exact":
            raise ValueError(
                f"NeighborTable: only an exact table can be extended, this one is {self.method!r}: "
                "build it anew"
            )
        old, new = prepare(features, self.metric), prepare(more, self.metric)
        if old.shape[1] != new.shape[1]:
            raise ValueError(
                f"NeighborTable: more must have {old.shape[1]} features, got {new.shape[1]}"
            )
        whole = torch.cat([old, new])
        count, k = len(whole), self.k
        # An old row's neighbours are among those it had and the new rows.
        search = make_search("exact", new, gpu=False)
        found, near = search(old, min(k, len(new)))
        distances = torch.cat([self.distances.to(found.device), found], 1)
        ids = torch.cat([self.ids.to(near.device).long(), near + len(old)], 1)
        order = distances.argsort(dim=1, stable=True)[:, :k]
        rows = torch.arange(len(old), count, device=whole.device)
        searched = make_search("exact", whole, gpu=False)(new, k + 1)
        last_distances, last = _without_self(*searched, rows)
        return NeighborTable(
            torch.cat([ids.gather(1, order), last]).to(_id_dtype(count)),
            torch.cat([distances.gather(1, order), last_distances]),
            metric=self.metric,
            method="exact",
            fingerprint=fingerprint(torch.cat([features.detach(), more.detach()])),
        )

    # ---- keeping it ----

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the table to a file, whole or not at all.

        Args:
            path: The file; one that is there is replaced.

        Returns:
            The path.
        """
        return storage.save(
            Path(path),
            {"ids": self.ids, "distances": self.distances},
            {"metric": self.metric, "method": self.method, "fingerprint": self.fingerprint},
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, features: Tensor | None = None, mmap: bool = False
    ) -> NeighborTable:
        """Reads a table that `save` wrote.

        Args:
            path: The file.
            features: If given, those that the table must be of.
            mmap: Leave the arrays in the file, which the system reads as they are used. The whole
                file is read once all the same, to see that it is sound.

        Returns:
            The table, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a table, or is damaged or cut short, or the table is of
                other features.
        """
        arrays, header = storage.load(Path(path), mmap=mmap)
        table = cls(
            arrays["ids"],
            arrays["distances"],
            metric=header["metric"],
            method=header["method"],
            fingerprint=header["fingerprint"],
        )
        if features is not None:
            table.check(features)
        return table

    def check(self, features: Tensor) -> None:
        """Raises ValueError unless the table is of these features ``[N, D]``."""
        if len(features) != len(self):
            raise ValueError(
                f"NeighborTable: the table is of {len(self)} samples, the features are of "
                f"{len(features)}"
            )
        if fingerprint(features) != self.fingerprint:
            raise ValueError(
                "NeighborTable: the table is of other features than these (their fingerprints "
                "differ): build it anew"
            )

    def to(self, device: torch.device | str) -> NeighborTable:
        """The table on a device."""
        return NeighborTable(
            self.ids.to(device),
            self.distances.to(device),
            metric=self.metric,
            method=self.method,
            fingerprint=self.fingerprint,
        )


def fingerprint(features: Tensor) -> str:
    """A digest of the shape, dtype and bytes of features, by which a table knows them again."""
    rows = features.detach().cpu().contiguous()
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{list(rows.shape)} {rows.dtype}".encode())
    if rows.numel() > 0:
        data: Any = rows.view(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def _id_dtype(count: int) -> torch.dtype:
    return torch.int32 if count <= INT32_MOST else torch.int64


def _without_self(
    distances: Tensor,  # [Q, k + 1]
    ids: Tensor,  # [Q, k + 1]
    rows: Tensor,  # [Q]
) -> tuple[Tensor, Tensor]:
    """The neighbours without the row itself; without the last where equal rows crowd it out."""
    own = ids == rows[:, None]
    own[:, -1] |= ~own.any(1)
    keep = ~own
    shape = (len(ids), ids.shape[1] - 1)
    return distances[keep].view(shape), ids[keep].view(shape)


class _Bar:
    """A line on standard error that says how much is done."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self._what, self._total, self._shown = what, total, shown

    def to(self, done: int) -> None:
        if not self._shown:
            return
        width = 30 * done // self._total
        end = "\n" if done == self._total else ""
        bar = "#" * width + "." * (30 - width)
        print(f"\r{self._what} [{bar}] {done:,}/{self._total:,}", end=end, file=sys.stderr)
