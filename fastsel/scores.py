"""Per-sample scores: what a selector looks at, and how any criterion is made to give it.

Cross-entropy takes the native one-pass operator; every other criterion is asked for its unreduced
losses, and the gradient norm comes from differentiating those with respect to the model's output,
as in Katharopoulos & Fleuret, "Not All Samples Are Created Equal" (ICML 2018), section 3.2: the
gradient at the last layer's output bounds, up to a factor common to the batch, the gradient of the
whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsel import ops
from fastsel.criterion import (
    as_rows,
    check_same_batch,
    describe,
    ignore_index,
    is_cross_entropy,
    is_native,
    mean_over_positions,
    mean_per_sample,
    per_sample_losses,
)

__all__ = ["SCORE_NAMES", "Scores", "per_sample_losses", "per_sample_scores"]

SCORE_NAMES = ("loss", "grad_norm", "entropy", "margin", "reference_loss")
"""What a selector can need."""


@dataclass(frozen=True)
class Scores:
    """The scores of one batch; those that nobody asked for may be None.

    Attributes:
        loss: Loss of each sample ``[B]``.
        grad_norm: Norm of the gradient of that loss with respect to the model's output ``[B]``.
        entropy: Entropy of the predicted distribution ``[B]`` in nats (classification only).
        margin: Difference of the two largest predicted probabilities ``[B]``, between 0 and 1
            (classification only).
        reference_loss: Loss of each sample ``[B]`` under another model, one that has not been
            trained on it; see `fastsel.select.ReferenceModel`.
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
    margin: Tensor | None = None  # [B]
    reference_loss: Tensor | None = None  # [B]
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
        score = self._first()
        if score is not None:
            return score.shape[0]
        assert self.batch_size is not None  # __post_init__ saw to it
        return self.batch_size

    @property
    def device(self) -> torch.device | None:
        """The device of the scores; `batch_device` where there is no tensor."""
        score = self._first()
        return self.batch_device if score is None else score.device

    @property
    def empty(self) -> bool:
        """Whether there is no score at all, only a batch size."""
        return self._first() is None

    def _first(self) -> Tensor | None:
        for name in SCORE_NAMES:
            score: Tensor | None = getattr(self, name)
            if score is not None:
                return score
        return None


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
      `torch.nn.functional.cross_entropy`, with class indices as target: one native pass gives loss,
      gradient norm and entropy;
    - anything else with a ``reduction``, a module's attribute or a function's keyword (also inside
      a `functools.partial`): it is called with ``reduction="none"``, and the rest of it stays as it
      is;
    - a callable that returns one loss a sample, ``[B]`` or ``[B, ...]``.

    Scores with more than one entry a sample (tokens, pixels, several outputs) are averaged over the
    sample; positions whose class target is the criterion's ``ignore_index`` are left out, and a
    sample that has no other positions scores 0, and 1 as its margin: as one that is settled. The
    gradient norm is that of the averaged loss. Neither `criterion` nor `output` is changed, and
    nothing is recorded for autograd.

    Args:
        criterion: The loss, called as ``criterion(output, target)``.
        output: What the model gave for the batch, ``[B, ...]``; torch's layout ``[B, C, d1, ...]``
            for token-level classes.
        target: The targets ``[B, ...]``; ``[B, d1, ...]`` for token-level classes.
        needs: The scores wanted, of ``loss``, ``grad_norm``, ``entropy`` and ``margin``; cheap
            others may come along. A selector's ``needs`` can be given as they are:
            ``reference_loss`` comes from elsewhere and stays None.

    Returns:
        The `Scores`, float32 or better.

    Raises:
        ValueError: The criterion gives no per-sample losses, a score is not defined for it, `needs`
            names an unknown score, or `output` and `target` are of different batch sizes.
        TypeError: A gradient norm, an entropy or a margin is wanted of an output that is not a
            tensor.

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
    check_same_batch("per_sample_scores", output, target)
    with torch.no_grad():
        if is_native(criterion, output, target):
            return _cross_entropy_scores(output, target, ignore_index(criterion), needs)
        return _generic_scores(criterion, output, target, needs)


def _cross_entropy_scores(
    logits: Tensor,  # [B, C, ...]
    target: Tensor,  # [B, ...]
    ignored: int | None,
    needs: Collection[str],
) -> Scores:
    ignored = -100 if ignored is None else ignored
    margin = None
    if logits.dim() == 2:
        scores = ops.sample_scores(logits, target, ignore_index=ignored)
        if "margin" in needs:
            best = ops.topk(logits, min(2, logits.shape[1])).values  # [B, 2]
            margin = _margin(best, scores.lse).masked_fill(target == ignored, 1.0)
        return Scores(
            loss=scores.loss,
            grad_norm=scores.grad_norm,
            entropy=scores.entropy,
            margin=margin,
        )
    batch_size, classes = logits.shape[:2]
    rows = as_rows(logits)  # [B*T, C]
    by_row = ops.sample_scores(rows, target.reshape(-1), ignore_index=ignored)
    positions = target.numel() // max(batch_size, 1)
    loss, grad_norm, entropy = (score.view(batch_size, positions) for score in by_row[:3])  # [B, T]
    counted = (target.reshape(batch_size, positions) != ignored).sum(1).clamp(min=1)  # [B]
    if "margin" in needs:
        best = ops.topk(rows, min(2, classes)).values  # [B*T, 2]
        by_position = _margin(best, by_row.lse).view(target.shape)
        margin = mean_over_positions(by_position, target, ignored, empty=1.0)
    # The gradient of a mean over n positions is 1/n of each position's gradient, side by side.
    return Scores(
        loss=loss.sum(1) / counted,
        grad_norm=torch.linalg.vector_norm(grad_norm, dim=1) / counted,
        entropy=entropy.sum(1) / counted,
        margin=margin,
    )


def _generic_scores(
    criterion: Callable[..., Any],
    output: Any,  # [B, ...]
    target: Tensor,  # [B, ...]
    needs: Collection[str],
) -> Scores:
    ignored = ignore_index(criterion)
    grad_norm = entropy = margin = None
    if "grad_norm" in needs:
        leaf = _as_tensor(output, "grad_norm").detach()
        # In sixteen bits the gradients of well-learnt samples would all round to 0.
        leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            loss = mean_per_sample("per_sample_scores", criterion, leaf, target, ignored)
            if not loss.requires_grad:
                raise ValueError(
                    f"per_sample_scores: criterion {describe(criterion)} gives a loss that cannot "
                    "be differentiated with respect to the model's output, which the gradient norm "
                    "needs"
                )
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        wide = grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(1)
        grad_norm = torch.linalg.vector_norm(wide, dim=1)
        loss = loss.detach()
    else:
        loss = mean_per_sample("per_sample_scores", criterion, output, target, ignored)
    if "entropy" in needs:
        logits = _as_logits(criterion, output, "entropy")  # [B, C, ...]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        probability = torch.softmax(logits, dim=1, dtype=dtype)
        by_position = torch.special.entr(probability).sum(1)  # [B, ...]
        entropy = _mean_of_predictions(by_position, target, ignored, empty=0.0)
    if "margin" in needs:
        logits = _as_logits(criterion, output, "margin")  # [B, C, ...]
        best = torch.topk(logits, min(2, logits.shape[1]), dim=1).values.movedim(1, -1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        by_position = _margin(best, torch.logsumexp(logits.to(dtype), dim=1))  # [B, ...]
        margin = _mean_of_predictions(by_position, target, ignored, empty=1.0)
    return Scores(loss=loss, grad_norm=grad_norm, entropy=entropy, margin=margin)


def _margin(
    best: Tensor,  # [..., 2], [..., 1] where there is one class
    lse: Tensor,  # [...]
) -> Tensor:
    best = best.to(lse.dtype)
    # A logsumexp of large logits is rounded coarsely, but no probability may exceed 1.
    largest = torch.exp((best[..., 0] - lse).clamp(max=0.0))
    if best.shape[-1] == 1:
        return largest
    # p1 - p2 = p1 * (1 - exp(z2 - z1)), in which nothing cancels.
    return -largest * torch.expm1(best[..., 1] - best[..., 0])


def _mean_of_predictions(
    by_position: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    ignored: int | None,
    *,
    empty: float,
) -> Tensor:
    # Unlike a loss, what is made of the output alone knows nothing of ignored targets yet.
    if by_position.dim() == 1 and ignored is not None and not target.is_floating_point():
        return by_position.masked_fill(target == ignored, empty)
    return mean_over_positions(by_position, target, ignored, empty=empty)


def _as_logits(criterion: Callable[..., Any], output: object, score: str) -> Tensor:
    logits = _as_tensor(output, score)
    if not is_cross_entropy(criterion) or logits.dim() < 2:
        raise ValueError(
            f"per_sample_scores: {score} is defined for cross-entropy over classes, got criterion "
            f"{describe(criterion)}"
        )
    return logits


def _as_tensor(output: object, score: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"per_sample_scores: {score} needs the model's output to be a tensor, "
            f"got {type(output).__name__}"
        )
    return output
