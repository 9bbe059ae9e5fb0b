"""Slow, obvious versions of the random operators, for the tests to compare with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

# What the operators keep apart by the upper bits of the generator's stream.
KEYS, LOW_BITS, DRAWS, NEIGHBORS = (kind << 48 for kind in (1, 2, 3, 4))
MASK = 0xFFFFFFFF


def philox(seed: int, index: int, stream: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011, section 4.3) in Python's integers."""
    x, y, z, w = index & MASK, index >> 32 & MASK, stream & MASK, stream >> 32 & MASK
    key0, key1 = seed & MASK, seed >> 32 & MASK
    for _ in range(10):
        first, second = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (
            second >> 32 ^ y ^ key0, second & MASK, first >> 32 ^ w ^ key1, first & MASK,
        )  # fmt: skip
        key0, key1 = key0 + 0x9E3779B9 & MASK, key1 + 0xBB67AE85 & MASK
    return x, y, z, w


def exponentials(items: int, seed: int, row: int = 0, *, wide: bool = False) -> Float64:
    """The exponential of each item ``[N]``: of 64 random bits if `wide` or the first 10 are 0."""
    found = np.empty(items)
    for i in range(items):
        word = philox(seed, i // 4, KEYS | row)[i % 4]
        u = (word + 0.5) / 2**32
        if wide or word < 2**22:
            u = (word * 2**32 + philox(seed, i // 4, LOW_BITS | row)[i % 4] + 0.5) / 2**64
        found[i] = -np.log1p(-u)
    return found


def weighted_keys(weights: Float64, seed: int, row: int = 0, *, wide: bool = False) -> Float64:
    """The keys of a row ``[N]``: infinite where the weight is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        keys: Float64 = exponentials(len(weights), seed, row, wide=wide) / weights
    return keys


def weighted_sample(
    weights: Float64, n: int, seed: int, row: int = 0, *, wide: bool = False
) -> tuple[Int64, Float64]:
    """n items of a row without replacement, and the probability of each given the threshold."""
    keys = weighted_keys(weights, seed, row, wide=wide)
    order = np.argsort(keys, kind="stable")
    threshold = keys[order[n]] if n < len(keys) else np.inf
    with np.errstate(over="ignore", invalid="ignore"):
        probs = np.where(np.isinf(threshold), 1.0, -np.expm1(-weights[order[:n]] * threshold))
    return order[:n], probs


def uniforms(n: int, seed: int, stream: int) -> Float64:
    """Numbers in [0, 1) of 53 bits, one a draw."""
    words = [philox(seed, i, stream) for i in range(n)]
    return np.array([((x << 32 | y) >> 11) / 2**53 for x, y, _, _ in words])


def weighted_sample_with_replacement(
    weights: Float64, n: int, seed: int, row: int = 0
) -> tuple[Int64, Float64]:
    """n draws from a row, and the probability of each."""
    total = weights.sum()
    edges = np.cumsum(weights)
    picks = np.searchsorted(edges, uniforms(n, seed, DRAWS | row) * total, side="right")
    return picks, weights[picks] / total


def neighbor_sample(
    table: Int64, anchors: Int64, anchor_weights: Float64, n: int, seed: int
) -> tuple[Int64, Float64]:
    """n draws of an anchor and one of its neighbours, and how probable the neighbour was in all."""
    edges = np.cumsum(anchor_weights)
    indices = np.empty(n, dtype=np.int64)
    probs = np.empty(n)
    width = table.shape[1]
    for i in range(n):
        x, y, z, w = philox(seed, i, NEIGHBORS)
        target = ((x << 32 | y) >> 11) / 2**53 * edges[-1]
        anchor = anchors[np.searchsorted(edges, target, side="right")]
        indices[i] = table[anchor, (z << 32 | w) * width >> 64]
        listed = [
            (table[a] == indices[i]).sum() * v for a, v in zip(anchors, anchor_weights, strict=True)
        ]
        probs[i] = sum(listed) / (edges[-1] * width)
    return indices, probs


def knn(queries: Float64, data: Float64, k: int) -> tuple[Float64, Int64]:
    """The k nearest points of each query by their float32 distance, equal ones by index."""
    distances = np.empty((len(queries), k))
    indices = np.empty((len(queries), k), dtype=np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        for q, query in enumerate(queries):
            whole = np.square(query - data).sum(1).astype(np.float32)
            order = np.argsort(whole, kind="stable")[:k]  # NaN comes last
            distances[q], indices[q] = whole[order], order
    return distances, indices
