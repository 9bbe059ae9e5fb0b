"""Tables of nearest neighbours: built, saved, extended, and kept up to date beside training."""

from __future__ import annotations

from fastsel.neighbors.refresh import TableRefresher
from fastsel.neighbors.table import NeighborTable

__all__ = ["NeighborTable", "TableRefresher"]
