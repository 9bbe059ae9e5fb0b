"""Choosing over the batches of several ranks as if they were one."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastsel.scores import Scores
from fastsel.select.selector import Choice, Selector


class Share(NamedTuple):
    """What a choice over all ranks leaves one of them.

    Attributes:
        choice: This rank's chosen samples and their weights; never empty.
        scale: What this rank's mean loss is multiplied by, so that the mean over the ranks, which
            is what distributed training takes of the gradients, is the mean over all chosen
            samples.
        usable: Given where `scale` is 0: whether the chosen sample may enter a backward, a bool
            tensor without dimensions. One that is not has to be blanked: zero times its gradient is
            NaN.
    """

    choice: Choice
    scale: float
    usable: Tensor | None = None


def world_size(group: dist.ProcessGroup | None) -> int:
    """The number of ranks; 1 where torch.distributed is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def mean_over_ranks(values: list[float], group: dist.ProcessGroup | None) -> list[float]:
    """The mean of every value over the ranks."""
    together = torch.tensor(values, dtype=torch.float64, device=_device(group))
    dist.all_reduce(together, group=group)
    mean: list[float] = (together / dist.get_world_size(group)).tolist()
    return mean


def choose_globally(selector: Selector, scores: Scores, group: dist.ProcessGroup | None) -> Share:
    """Chooses from the samples of all ranks together.

    Every rank gives the scores of its batch and gets those of the others, a few bytes a sample, so
    that all statistics are of the whole batch and stateful selectors stay the same on every rank.
    The chosen may be spread unevenly: a rank trains on as many as are its own. One without any
    gets its first sample whose scores are finite with scale 0, since distributed training needs
    every rank's backward; if there is none, a sample that is not usable.

    Args:
        selector: The selector, in the same state on every rank.
        scores: The scores of this rank's batch.
        group: The ranks; None for all.

    Returns:
        This rank's `Share`.
    """
    everything, sizes = _gather(scores, group)
    rank = dist.get_rank(group)
    begin = sum(sizes[:rank])
    choice = selector.select(everything)
    if not selector.deterministic:
        # Ranks draw from streams of their own: the first one's draw holds for all, and so does what
        # it has made of the selector.
        for part in (*choice, *selector.state_tensors()):
            if part is not None:
                dist.broadcast(part, group_src=0, group=group)
    mine = (choice.indices >= begin) & (choice.indices < begin + sizes[rank])  # [k]
    indices = choice.indices[mine] - begin
    weights = None if choice.weights is None else choice.weights[mine]
    share = len(indices) * len(sizes) / max(1, len(choice.indices))
    if len(indices) > 0:
        return Share(Choice(indices, weights), share)
    first, usable = _first_finite(scores)
    weights = None if choice.weights is None else choice.weights.new_ones(1)
    return Share(Choice(first.to(choice.indices.device), weights), share, usable)


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of a tensor over the ranks."""
    together = values.to(_device(group), copy=True)
    dist.all_reduce(together, group=group)
    return together


def average_gradients(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Puts the mean over the ranks in place of every gradient; a rank without one counts as 0.

    A parameter that has no gradient on any rank keeps having none: optimizers pass over it.
    """
    ranks = world_size(group)
    if ranks == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    present = torch.tensor(
        [parameter.grad is not None for parameter in parameters],
        dtype=torch.int32,
        device=_device(group),
    )
    dist.all_reduce(present, group=group)
    for parameter, holders in zip(parameters, present.tolist(), strict=True):
        if holders:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad, group=group)
            parameter.grad = grad.div_(ranks)


def gather_rows(group: dist.ProcessGroup | None, *parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors ``[B]`` of every rank, one after another in the order of the ranks."""
    counts = _counts(len(parts[0]), group)
    return tuple(_gather_rows(part.to(_device(group)), counts, group) for part in parts)


def _first_finite(scores: Scores) -> tuple[Tensor, Tensor | None]:
    values = [getattr(scores, field.name) for field in dataclasses.fields(scores)]
    finite = [value.isfinite() for value in values if isinstance(value, Tensor)]
    if not finite:
        return torch.zeros(1, dtype=torch.int64), None
    usable = torch.stack(finite).all(0)  # [B]
    return usable.to(torch.uint8).argmax().reshape(1), usable.any()


def _gather(scores: Scores, group: dist.ProcessGroup | None) -> tuple[Scores, list[int]]:
    counts = _counts(scores.size, group)
    gathered: dict[str, Any] = {}
    for field in dataclasses.fields(scores):
        value = getattr(scores, field.name)
        if isinstance(value, Tensor):
            gathered[field.name] = _gather_rows(value, counts, group)
    return Scores(**gathered, batch_size=sum(counts), batch_device=scores.batch_device), counts


def _counts(rows: int, group: dist.ProcessGroup | None) -> list[int]:
    device = _device(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size(group))]
    dist.all_gather(sizes, torch.tensor([rows], device=device), group=group)
    return [int(size) for size in sizes]


def _gather_rows(
    rows: Tensor,  # [B]
    counts: list[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    # Collectives want equal shapes: shorter batches are padded, and the padding cut off again.
    most = max(counts)
    padded = rows.new_zeros(most)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _device(group: dist.ProcessGroup | None) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
