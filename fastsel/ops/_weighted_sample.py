"""`weighted_sample`: the wrapper and the shape function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, check_seed, make_seed, require, without_grad


class Draws(NamedTuple):
    """What `weighted_sample` and `neighbor_sample` return.

    Attributes:
        indices: The items drawn ``[..., n]``, int64.
        probs: What one over it makes estimates unbiased ``[..., n]``, float32; see the operators.
    """

    indices: Tensor  # [..., n]
    probs: Tensor  # [..., n]


def weighted_sample(
    weights: Tensor,  # [..., N]
    n: int,
    seed: Tensor | None = None,  # [1]
    *,
    replacement: bool = False,
    generator: torch.Generator | None = None,
) -> Draws:
    r"""Draws n items of each row in proportion to their weights.

    Any number of items: `torch.multinomial` stops at 2**24 and favours some of them near it. The
    same seed gives the same draws on every device and at any thread count.

    Without replacement the items come in the order in which they would be drawn one after another,
    each in proportion to its weight among those left (Efraimidis and Spirakis 2006), so the first m
    are a sample of m. ``probs`` is the probability of being drawn given the threshold that the keys
    had to stay below, :math:`1 - \exp(-w_i \kappa)`: the sum over the drawn items of
    ``f / probs`` has the sum of ``f`` over all items as its expectation (Kool et al. 2019,
    arXiv:1903.06059, section 4.2). With replacement it is the probability of one draw,
    :math:`w_i / \sum_j w_j`, and the mean over the draws of ``f / probs`` has that expectation.

    Args:
        weights: Not negative, finite, any scale ``[..., N]``; float32, float16, bfloat16, and on
            the CPU float64. An item of weight 0 is never drawn. Not differentiated.
        n: How many to draw from each row. Without replacement at most N, and at most the number of
            positive weights.
        seed: One int64 on the device of `weights`; None draws one from `generator`.
        replacement: Whether an item may be drawn again.
        generator: Of the device of `weights`; None is torch's default one. Not with `seed`.

    Returns:
        `Draws` of indices ``[..., n]`` in int64 and probs ``[..., n]`` in float32.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: `weights` has no dimension, n is out of range, a weight is negative or not
            finite, or too few are positive. What depends on the weights' values is an error on the
            CPU only: waiting for a GPU is left to the caller. There, the rows concerned get
            indices that no tensor has, at which torch's indexing stops, and NaN.

    Example:
        >>> seed = torch.tensor([4])
        >>> fastsel.weighted_sample(torch.tensor([0.0, 1.0, 9.0]), 1, seed).indices
        tensor([2])
    """
    check_float_tensor("weighted_sample", "weights", weights)
    if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
        raise TypeError(f"weighted_sample: n must be an int, got {type(n).__name__}")
    if weights.dim() == 0:
        raise ValueError("weighted_sample: weights must have at least one dimension, got shape []")
    items = weights.shape[-1]
    if n < 0 or (not replacement and n > items) or (n > 0 and items == 0):
        most = "" if replacement and items > 0 else f" and at most {items}"
        raise ValueError(f"weighted_sample: n must not be negative{most}, got {n}")
    if seed is None:
        seed = make_seed(weights, generator)
    else:
        check_seed("weighted_sample", seed, weights, generator)
    return Draws(*_weighted_sample(without_grad(weights), n, seed, replacement=replacement))


def register(namespace: str) -> None:
    """Gives the operator of a namespace its shape function."""
    torch.library.register_fake(f"{namespace}::weighted_sample", _fake)


def _fake(
    weights: Tensor,  # [..., N]
    n: int,
    seed: Tensor,
    *,
    replacement: bool = False,
) -> tuple[Tensor, Tensor]:
    require(weights.dim() >= 1, lambda: "weighted_sample: weights must have at least one dimension")
    require(n >= 0, lambda: "weighted_sample: n must not be negative")
    require(seed.numel() == 1, lambda: "weighted_sample: seed must be one int64")
    if not replacement:
        require(n <= weights.shape[-1], lambda: "weighted_sample: n must not exceed the items")
    shape = (*weights.shape[:-1], n)
    return (
        weights.new_empty(shape, dtype=torch.int64),
        weights.new_empty(shape, dtype=torch.float32),
    )


_weighted_sample = torch.ops.fastsel.weighted_sample.default
