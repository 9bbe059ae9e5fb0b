"""`neighbor_sample` and `neighbor_probs`: the wrappers and the shape functions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsel.ops._checks import (
    check_float_tensor,
    check_seed,
    make_seed,
    name,
    require,
    without_grad,
)
from fastsel.ops._weighted_sample import Draws


def neighbor_sample(
    table: Tensor,  # [N, K]
    anchors: Tensor,  # [A]
    anchor_weights: Tensor,  # [A]
    n: int,
    seed: Tensor | None = None,  # [1]
    *,
    generator: torch.Generator | None = None,
) -> Draws:
    r"""Draws n neighbours: each time an anchor by its weight, then one of its K evenly.

    What Algorithm 1 of the near-neighbour paper (Walia and Singhal) draws the next batch with: the
    anchors are the samples of a batch, the weights their gradient norms. ``probs`` is the
    probability of the drawn id whichever anchor it came from, the weight of the anchors that list
    it, :math:`\sum_a w_a \, |\{j : table_{a j} = id\}| / (K \sum_a w_a)`, so that a mixture with
    uniform draws can be reweighted without bias. The same seed gives the same draws on any device.

    Args:
        table: The neighbours of every sample ``[N, K]``, int64 or int32, ids between 0 and N - 1.
        anchors: The samples whose neighbours are drawn ``[A]``, int64; one may be there twice.
        anchor_weights: Not negative, finite ``[A]``; float32, float16, bfloat16, and on the CPU
            float64. Not differentiated.
        n: How many to draw, with replacement.
        seed: One int64 on the device of `table`; None draws one from `generator`.
        generator: Of the device of `table`; None is torch's default one. Not with `seed`.

    Returns:
        `Draws` of indices ``[n]`` in int64 and probs ``[n]`` in float32.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: Shapes do not fit, n is negative, or on the CPU: a weight is negative or not
            finite, or none is positive.
        IndexError: On the CPU: an anchor, or a neighbour of one, is not between 0 and N - 1. On a
            GPU, where looking would mean waiting for it, wrong values give indices that no tensor
            has, at which torch's indexing stops, and NaN.

    Example:
        >>> table = torch.tensor([[1, 2], [0, 2], [1, 0]])
        >>> seed = torch.tensor([0])
        >>> fastsel.neighbor_sample(table, torch.tensor([0]), torch.ones(1), 2, seed).probs
        tensor([0.5000, 0.5000])
    """
    op = "neighbor_sample"
    _check(op, table, anchors, anchor_weights)
    if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
        raise TypeError(f"{op}: n must be an int, got {type(n).__name__}")
    if n < 0 or (n > 0 and (len(anchors) == 0 or table.shape[1] == 0)):
        most = "not be negative" if n < 0 else "be 0 where there are no neighbours"
        raise ValueError(f"{op}: n must {most}, got {n}")
    if seed is None:
        seed = make_seed(table, generator)
    else:
        check_seed(op, seed, table, generator)
    return Draws(*_neighbor_sample(table, anchors, without_grad(anchor_weights), n, seed))


def neighbor_probs(
    table: Tensor,  # [N, K]
    anchors: Tensor,  # [A]
    anchor_weights: Tensor,  # [A]
    ids: Tensor,  # [n]
) -> Tensor:  # [n]
    """How probable each id is to be drawn by `neighbor_sample`: 0 where no anchor lists it.

    What it takes to weigh samples that came another way, as the uniform part of a mixed batch.

    Args:
        table: As of `neighbor_sample` ``[N, K]``.
        anchors: As of `neighbor_sample` ``[A]``.
        anchor_weights: As of `neighbor_sample` ``[A]``.
        ids: Between 0 and N - 1 ``[n]``, int64.

    Returns:
        ``[n]`` in float32.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: As `neighbor_sample` raises it.
        IndexError: On the CPU, an id, an anchor or a neighbour of one is not between 0 and N - 1;
            on a GPU the probabilities are NaN.

    Example:
        >>> table = torch.tensor([[1, 2], [0, 2], [1, 0]])
        >>> fastsel.neighbor_probs(table, torch.tensor([0]), torch.ones(1), torch.arange(3))
        tensor([0.0000, 0.5000, 0.5000])
    """
    op = "neighbor_probs"
    _check(op, table, anchors, anchor_weights)
    _check_integers(op, "ids", ids, (torch.int64,))
    if ids.dim() != 1:
        raise ValueError(f"{op}: ids must be [n], got {list(ids.shape)}")
    if ids.device != table.device:
        raise ValueError(f"{op}: ids must be on {table.device}, got {ids.device}")
    if len(ids) > 0 and (len(anchors) == 0 or table.shape[1] == 0):
        raise ValueError(f"{op}: ids must be empty where there are no neighbours, got {len(ids)}")
    result: Tensor = _neighbor_probs(table, anchors, without_grad(anchor_weights), ids)
    return result


def _check_integers(op: str, argument: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(map(name, dtypes))
        raise TypeError(f"{op}: {argument} must be {expected}, got {name(value.dtype)}")


def _check(op: str, table: Tensor, anchors: Tensor, anchor_weights: Tensor) -> None:
    """Raises where the arguments that both operators have do not fit."""
    _check_integers(op, "table", table, (torch.int64, torch.int32))
    _check_integers(op, "anchors", anchors, (torch.int64,))
    check_float_tensor(op, "anchor_weights", anchor_weights)
    if table.dim() != 2:
        raise ValueError(f"{op}: table must be [N, K], got {list(table.shape)}")
    if anchors.dim() != 1:
        raise ValueError(f"{op}: anchors must be [A], got {list(anchors.shape)}")
    if anchor_weights.shape != anchors.shape:
        raise ValueError(
            f"{op}: anchor_weights must be {list(anchors.shape)} like anchors, got "
            f"{list(anchor_weights.shape)}"
        )
    for argument, value in (("anchors", anchors), ("anchor_weights", anchor_weights)):
        if value.device != table.device:
            raise ValueError(f"{op}: {argument} must be on {table.device}, got {value.device}")


def register(namespace: str) -> None:
    """Gives the operators of a namespace their shape functions."""
    torch.library.register_fake(f"{namespace}::neighbor_sample", _fake)
    torch.library.register_fake(f"{namespace}::neighbor_probs", _fake_probs)


def _fake(
    table: Tensor,  # [N, K]
    anchors: Tensor,  # [A]
    anchor_weights: Tensor,  # [A]
    n: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    require(table.dim() == 2, lambda: "neighbor_sample: table must be [N, K]")
    require(
        anchors.shape == anchor_weights.shape and anchors.dim() == 1,
        lambda: "neighbor_sample: anchors and anchor_weights must be [A]",
    )
    require(n >= 0, lambda: "neighbor_sample: n must not be negative")
    require(seed.numel() == 1, lambda: "neighbor_sample: seed must be one int64")
    return table.new_empty((n,), dtype=torch.int64), table.new_empty((n,), dtype=torch.float32)


def _fake_probs(
    table: Tensor,  # [N, K]
    anchors: Tensor,  # [A]
    anchor_weights: Tensor,  # [A]
    ids: Tensor,  # [n]
) -> Tensor:
    require(table.dim() == 2, lambda: "neighbor_probs: table must be [N, K]")
    require(ids.dim() == 1, lambda: "neighbor_probs: ids must be [n]")
    return ids.new_empty(ids.shape, dtype=torch.float32)


_neighbor_sample = torch.ops.fastsel.neighbor_sample.default
_neighbor_probs = torch.ops.fastsel.neighbor_probs.default
