"""Per-sample scores: what a selector looks at, and how any criterion is made to give it.

Cross-entropy takes the native one-pass operator; every other criterion is asked for its unreduced
losses, and the gradient norm comes from differentiating those with respect to the model's output,
as in Katharopoulos & Fleuret, "Not All Samples Are Created Equal" (ICML 2018), section 3.2: the
gradient at the last layer's output bounds, up to a factor common to the batch, the gradient of the
whole network.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel import ops

SCORE_NAMES = ("loss", "grad_norm", "entropy")


@dataclass(frozen=True)
class Scores:
    """The scores of one batch; those that nobody asked for may be None.

    Attributes:
        loss: Loss of each sample ``[B]``.
        grad_norm: Norm of the gradient of that loss with respect to the model's output ``[B]``.
        entropy: Entropy of the predicted distribution ``[B]`` in nats (classification only).
        batch_size: B, needed where no tensor says it.
        batch_device: Where the batch is, where no tensor says it: a selector that needs no scores
            then makes its indices there.

    Raises:
        TypeError: A score is not a floating-point tensor.
        ValueError: A score is not one-dimensional, the scores differ in length or from
            `batch_size`, or nothing tells the batch size.

    Example:
        >>> Scores(loss=torch.tensor([0.1, 2.0])).size
        2
    """

    loss: Tensor | None = None  # [B]
    grad_norm: Tensor | None = None  # [B]
    entropy: Tensor | None = None  # [B]
    batch_size: int | None = None
    batch_device: torch.device | None = None

    def __post_init__(self) -> None:
        """Checks that the scores are of one batch."""
        size = self.batch_size
        for name in SCORE_NAMES:
            score = getattr(self, name)
            if score is None:
                continue
            if not isinstance(score, Tensor):
                raise TypeError(f"Scores: {name} must be a tensor, got {type(score).__name__}")
            if not score.is_floating_point():
                raise TypeError(
                    f"Scores: {name} must be of a floating-point dtype, got {score.dtype}"
                )
            if score.dim() != 1:
                raise ValueError(f"Scores: {name} must be [B], got shape {list(score.shape)}")
            if size is not None and score.shape[0] != size:
                raise ValueError(
                    f"Scores: {name} must have {size} entries as the rest of the batch, "
                    f"got {score.shape[0]}"
                )
            size = score.shape[0]
        if size is None or size < 0:
            raise ValueError(
                f"Scores: needs one of {', '.join(SCORE_NAMES)}, or a batch_size of at least 0, "
                f"got {size}"
            )

    @property
    def size(self) -> int:
        """The number of samples B."""
        for score in (self.loss, self.grad_norm, self.entropy):
            if score is not None:
                return score.shape[0]
        assert self.batch_size is not None  # __post_init__ saw to it
        return self.batch_size

    @property
    def device(self) -> torch.device | None:
        """The device of the scores; `batch_device` where there is no tensor."""
        for score in (self.loss, self.grad_norm, self.entropy):
            if score is not None:
                return score.device
        return self.batch_device


def per_sample_scores(
    criterion: Callable[..., Any],
    output: Any,  # [B, ...]
    target: Tensor,  # [B, ...]
    *,
    needs: Collection[str] = ("loss",),
) -> Scores:
    """Scores every sample of a batch with the criterion it is trained with.

    `criterion` may be

    - `torch.nn.CrossEntropyLoss` without class weights or label smoothing, or
      `torch.nn.functional.cross_entropy`, with class indices as target: one native pass gives all
      three scores;
    - anything else with a ``reduction``, a module's attribute or a function's keyword (also inside
      a `functools.partial`): it is called with ``reduction="none"``, and the rest of it stays as it
      is;
    - a callable that returns one loss a sample, ``[B]`` or ``[B, ...]``.

    Losses with more than one entry a sample (tokens, pixels, several outputs) are averaged over the
    sample; positions whose class target is the criterion's ``ignore_index`` are left out, and a
    sample that has no other positions scores 0. The gradient norm is that of this average. Neither
    `criterion` nor `output` is changed, and nothing is recorded for autograd.

    Args:
        criterion: The loss, called as ``criterion(output, target)``.
        output: What the model gave for the batch, ``[B, ...]``; torch's layout ``[B, C, d1, ...]``
            for token-level classes.
        target: The targets ``[B, ...]``; ``[B, d1, ...]`` for token-level classes.
        needs: The scores wanted, of ``loss``, ``grad_norm`` and ``entropy``; cheap others may come
            along.

    Returns:
        The `Scores`, float32 or better.

    Raises:
        ValueError: The criterion gives no per-sample losses, a score is not defined for it, `needs`
            names an unknown score, or `output` and `target` are of different batch sizes.
        TypeError: A gradient norm or an entropy is wanted of an output that is not a tensor.

    Example:
        >>> output, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]])
        >>> per_sample_scores(torch.nn.MSELoss(), output, target, needs=("grad_norm",)).grad_norm
        tensor([6., 0.])
    """
    unknown = sorted(set(needs) - set(SCORE_NAMES))
    if unknown:
        raise ValueError(
            f"per_sample_scores: needs must be of {', '.join(SCORE_NAMES)}, got {unknown}"
        )
    if isinstance(output, Tensor) and (output.dim() == 0 or output.shape[:1] != target.shape[:1]):
        raise ValueError(
            "per_sample_scores: output and target must have the same first dimension, "
            f"got shapes {list(output.shape)} and {list(target.shape)}"
        )
    with torch.no_grad():
        if _is_native(criterion, output, target):
            return _cross_entropy_scores(output, target, _ignore_index(criterion))
        return _generic_scores(criterion, output, target, needs)


def _is_native(criterion: object, output: object, target: Tensor) -> bool:
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


def _cross_entropy_scores(
    logits: Tensor,  # [B, C, ...]
    target: Tensor,  # [B, ...]
    ignore_index: int | None,
) -> Scores:
    ignore = -100 if ignore_index is None else ignore_index
    if logits.dim() == 2:
        scores = ops.sample_scores(logits, target, ignore_index=ignore)
        return Scores(loss=scores.loss, grad_norm=scores.grad_norm, entropy=scores.entropy)
    batch_size, classes = logits.shape[:2]
    # Models that make [B, T, C] and transpose for the criterion get their own memory back here,
    # without a copy.
    rows = logits.movedim(1, -1).reshape(-1, classes)  # [B*T, C]
    by_row = ops.sample_scores(rows, target.reshape(-1), ignore_index=ignore)
    positions = target.numel() // max(batch_size, 1)
    loss, grad_norm, entropy = (score.view(batch_size, positions) for score in by_row[:3])  # [B, T]
    counted = (target.reshape(batch_size, positions) != ignore).sum(1).clamp(min=1)  # [B]
    # The gradient of a mean over n positions is 1/n of each position's gradient, side by side.
    return Scores(
        loss=loss.sum(1) / counted,
        grad_norm=torch.linalg.vector_norm(grad_norm, dim=1) / counted,
        entropy=entropy.sum(1) / counted,
    )


def _generic_scores(
    criterion: Callable[..., Any],
    output: Any,  # [B, ...]
    target: Tensor,  # [B, ...]
    needs: Collection[str],
) -> Scores:
    ignore_index = _ignore_index(criterion)
    grad_norm = entropy = None
    if "grad_norm" in needs:
        leaf = _as_tensor(output, "grad_norm").detach()
        # In sixteen bits the gradients of well-learnt samples would all round to 0.
        leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            loss = _mean_per_sample(criterion, leaf, target, ignore_index)
            if not loss.requires_grad:
                raise ValueError(
                    f"per_sample_scores: criterion {_describe(criterion)} gives a loss that cannot "
                    "be differentiated with respect to the model's output, which the gradient norm "
                    "needs"
                )
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        wide = grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(1)
        grad_norm = torch.linalg.vector_norm(wide, dim=1)
        loss = loss.detach()
    else:
        loss = _mean_per_sample(criterion, output, target, ignore_index)
    if "entropy" in needs:
        entropy = _entropy(criterion, _as_tensor(output, "entropy"), target, ignore_index)
    return Scores(loss=loss, grad_norm=grad_norm, entropy=entropy)


def _mean_per_sample(
    criterion: Callable[..., Any],
    output: Any,  # [B, ...]
    target: Tensor,  # [B, ...]
    ignore_index: int | None,
) -> Tensor:
    batch_size = target.shape[0]
    unreduced = _unreduced(criterion)
    loss = unreduced(output, target)  # [B, ...]
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"per_sample_scores: criterion {_describe(criterion)} must return a tensor, "
            f"got {type(loss).__name__}"
        )
    if loss.dim() == 0 or loss.shape[0] != batch_size:
        raise ValueError(
            f"per_sample_scores: criterion {_describe(criterion)} gives no per-sample losses: "
            f"expected shape [{batch_size}, ...], got {list(loss.shape)}; use a criterion with a "
            "`reduction`, or a callable that returns one loss per sample"
        )
    if (
        unreduced is not criterion
        and isinstance(output, Tensor)
        and loss.numel() > max(output.numel(), target.numel())
    ):
        raise ValueError(
            f"per_sample_scores: criterion {_describe(criterion)} broadcast output "
            f"{list(output.shape)} against target {list(target.shape)}, which mixes the samples; "
            "give both the same shape"
        )
    return _mean_over_positions(loss, target, ignore_index)


def _mean_over_positions(
    loss: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    ignore_index: int | None,
) -> Tensor:
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
    if loss.dim() == 1:
        return loss
    loss = loss.flatten(1)
    if ignore_index is None or target.is_floating_point() or target.numel() != loss.numel():
        return loss.mean(1)
    kept = target.flatten(1) != ignore_index  # [B, T]
    return loss.masked_fill(~kept, 0.0).sum(1) / kept.sum(1).clamp(min=1)


def _entropy(
    criterion: Callable[..., Any],
    logits: Tensor,  # [B, C, ...]
    target: Tensor,  # [B, ...]
    ignore_index: int | None,
) -> Tensor:
    base = criterion.func if isinstance(criterion, functools.partial) else criterion
    if not (isinstance(base, nn.CrossEntropyLoss) or base is F.cross_entropy) or logits.dim() < 2:
        raise ValueError(
            f"per_sample_scores: entropy is defined for cross-entropy over classes, got criterion "
            f"{_describe(criterion)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probability = torch.softmax(logits, dim=1, dtype=dtype)
    entropy: Tensor = torch.special.entr(probability).sum(1)  # [B, ...]
    if not target.is_floating_point() and ignore_index is not None and entropy.dim() == 1:
        return entropy.masked_fill(target == ignore_index, 0.0)
    return _mean_over_positions(entropy, target, ignore_index)


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


def _ignore_index(criterion: object) -> int | None:
    found: object = getattr(criterion, "ignore_index", None)
    if found is None and not isinstance(criterion, nn.Module) and callable(criterion):
        parameter = _parameters(criterion).get("ignore_index")
        found = None if parameter is None else parameter.default
    return found if isinstance(found, int) else None


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature has no keywords to offer
        return {}


def _as_tensor(output: object, score: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"per_sample_scores: {score} needs the model's output to be a tensor, "
            f"got {type(output).__name__}"
        )
    return output


def _describe(criterion: object) -> str:
    base = criterion.func if isinstance(criterion, functools.partial) else criterion
    return str(getattr(base, "__name__", type(base).__name__))
