"""Criteria as training loops have them, made to give one loss a sample.

`per_sample_losses` is the public part; the rest serves `fastsel.scores`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel import ops


def per_sample_losses(
    criterion: Callable[..., Any],
    output: Any,  # [B, ...]
    target: Tensor,  # [B, ...]
) -> Tensor:
    """The loss of each sample of a batch, recorded for autograd.

    Takes the criteria of `fastsel.scores.per_sample_scores` and reads them in the same way: losses
    with more than one entry a sample are averaged over the sample, positions whose class target is
    the criterion's ``ignore_index`` are left out, and a sample that has no other positions gives 0.
    The mean of the result is what an ordinary criterion with ``reduction="mean"`` gives, except
    where samples count differently many positions or class weights differ.

    Args:
        criterion: The loss, called as ``criterion(output, target)``. It is not changed.
        output: What the model gave for the batch, ``[B, ...]``.
        target: The targets ``[B, ...]``.

    Returns:
        The losses ``[B]``, float32 or better. Where cross-entropy takes the native operator, they
        can be differentiated once only.

    Raises:
        ValueError: The criterion gives no per-sample losses, or `output` and `target` are of
            different batch sizes.

    Example:
        >>> output = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> losses = per_sample_losses(torch.nn.MSELoss(), output, torch.tensor([[3.0], [3.0]]))
        >>> losses.tolist()
        [9.0, 4.0]
        >>> (losses * torch.tensor([0.5, 1.0])).sum().backward()
        >>> output.grad
        tensor([[-3.],
                [-4.]])
    """
    check_same_batch("per_sample_losses", output, target)
    ignored = ignore_index(criterion)
    if not is_native(criterion, output, target):
        return mean_per_sample("per_sample_losses", criterion, output, target, ignored)
    ignored = -100 if ignored is None else ignored
    if output.dim() == 2:
        return ops.sample_scores(output, target, ignore_index=ignored).loss
    loss = ops.sample_scores(as_rows(output), target.reshape(-1), ignore_index=ignored).loss
    return mean_over_positions(loss.view(target.shape), target, ignored)


def check_same_batch(owner: str, output: object, target: Tensor) -> None:
    """ValueError unless `output`, if it is a tensor, and `target` are of the same B."""
    if isinstance(output, Tensor) and (output.dim() == 0 or output.shape[:1] != target.shape[:1]):
        raise ValueError(
            f"{owner}: output and target must have the same first dimension, "
            f"got shapes {list(output.shape)} and {list(target.shape)}"
        )


def is_native(criterion: object, output: object, target: Tensor) -> bool:
    """Whether `fastsel.sample_scores` computes this criterion for this output."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        plain = (
            type(criterion).forward is nn.CrossEntropyLoss.forward
            and criterion.weight is None
            and criterion.label_smoothing == 0.0
        )
    else:
        plain = criterion is F.cross_entropy
    if not (plain and isinstance(output, Tensor)):
        return False
    floats = {torch.float32, torch.float16, torch.bfloat16}
    return (
        output.device.type in ("cpu", "cuda")
        and (output.dtype in floats or (output.dtype == torch.float64 and output.is_cpu))
        and target.dtype == torch.int64
        and output.dim() >= 2
        and output.shape[1] > 0
        and target.shape == output.shape[:1] + output.shape[2:]
    )


def is_cross_entropy(criterion: Callable[..., Any]) -> bool:
    """Whether the criterion is torch's cross-entropy, with whatever options."""
    base = criterion.func if isinstance(criterion, functools.partial) else criterion
    return isinstance(base, nn.CrossEntropyLoss) or base is F.cross_entropy


def as_rows(
    logits: Tensor,  # [B, C, ...]
) -> Tensor:
    """One row of logits a position: ``[B*T, C]``.

    Models that make [B, T, C] and transpose for the criterion get their own memory back here,
    without a copy.
    """
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def mean_per_sample(
    owner: str,
    criterion: Callable[..., Any],
    output: Any,  # [B, ...]
    target: Tensor,  # [B, ...]
    ignored: int | None,
) -> Tensor:
    """The unreduced losses of any criterion, averaged over each sample: ``[B]``.

    Raises:
        ValueError: The criterion gives no per-sample losses; the message begins with `owner`.
    """
    batch_size = target.shape[0]
    unreduced = _unreduced(criterion)
    loss = unreduced(output, target)  # [B, ...]
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{owner}: criterion {describe(criterion)} must return a tensor, "
            f"got {type(loss).__name__}"
        )
    if loss.dim() == 0 or loss.shape[0] != batch_size:
        raise ValueError(
            f"{owner}: criterion {describe(criterion)} gives no per-sample losses: "
            f"expected shape [{batch_size}, ...], got {list(loss.shape)}; use a criterion with a "
            "`reduction`, or a callable that returns one loss per sample"
        )
    if (
        unreduced is not criterion
        and isinstance(output, Tensor)
        and loss.numel() > max(output.numel(), target.numel())
    ):
        raise ValueError(
            f"{owner}: criterion {describe(criterion)} broadcast output "
            f"{list(output.shape)} against target {list(target.shape)}, which mixes the samples; "
            "give both the same shape"
        )
    return mean_over_positions(loss, target, ignored)


def mean_over_positions(
    values: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    ignored: int | None,
    *,
    empty: float = 0.0,
) -> Tensor:
    """The mean of each sample's values ``[B]``, positions with an ignored target left out.

    Args:
        values: One value a position. Those of shape ``[B]`` are taken as they are.
        target: The targets.
        ignored: The criterion's ``ignore_index``; None if it has none.
        empty: What a sample without a counted position gets.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.dim() == 1:
        return values
    values = values.flatten(1)
    if ignored is None or target.is_floating_point() or target.numel() != values.numel():
        return values.mean(1)
    kept = target.flatten(1) != ignored  # [B, T]
    counted = kept.sum(1)  # [B]
    mean = values.masked_fill(~kept, 0.0).sum(1) / counted.clamp(min=1)
    return mean if empty == 0.0 else mean.masked_fill(counted == 0, empty)


def ignore_index(criterion: object) -> int | None:
    """The class target that the criterion leaves out, None if it has none."""
    found: object = getattr(criterion, "ignore_index", None)
    if found is None and not isinstance(criterion, nn.Module) and callable(criterion):
        parameter = _parameters(criterion).get("ignore_index")
        found = None if parameter is None else parameter.default
    return found if isinstance(found, int) else None


def check_averages(owner: str, criterion: object, *, weighed: bool) -> None:
    """ValueError if the criterion is known to add up its batch, whose size a choice changes.

    Args:
        owner: The error begins with it.
        criterion: The loss that is trained on.
        weighed: Whether weights make the loss another mean than the criterion's in some steps.
    """
    reduction = getattr(criterion, "reduction", None)
    if isinstance(criterion, functools.partial):
        reduction = criterion.keywords.get("reduction")
    if reduction == "sum" or (weighed and reduction == "batchmean"):
        raise ValueError(
            f"{owner}: criterion must have reduction 'mean' or 'none', got {reduction!r} of "
            f"{describe(criterion)}: with the number of samples its gradient's scale would change"
        )


def describe(criterion: object) -> str:
    """What an error calls the criterion."""
    base = criterion.func if isinstance(criterion, functools.partial) else criterion
    return str(getattr(base, "__name__", type(base).__name__))


def _unreduced(criterion: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(getattr(criterion, "reduction", None), str):
        # A shallow copy shares weights and buffers; the caller's own criterion never changes, not
        # even for a moment.
        unreduced = copy.copy(criterion)
        unreduced.reduction = "none"  # type: ignore[attr-defined]
        return unreduced
    if not isinstance(criterion, nn.Module) and "reduction" in _parameters(criterion):
        return functools.partial(criterion, reduction="none")
    return criterion


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature has no keywords to offer
        return {}
