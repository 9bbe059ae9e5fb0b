"""Importance sampling: drawing by a score, and weights that keep the mean loss unbiased."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsel.scores import SCORE_NAMES, Scores
from fastsel.select.selector import Choice, RandomSelector

# Probabilities are multiples of a unit, so that their running sums are integers: exact, and the
# same in whatever order a device adds them. The largest score has 2^40 units; sums stay below 2^63.
_UNITS = 1 << 40
_LARGEST_BATCH = 1 << 22


class ImportanceSampling(RandomSelector):
    """Draws samples with replacement, with probability proportional to a score.

    Katharopoulos & Fleuret, "Not All Samples Are Created Equal" (ICML 2018), algorithm 1 with the
    weights of equation 2: a sample of probability p is weighed by ``1 / (B p)``, so that
    ``mean(weights * losses)`` over the drawn samples has the mean loss of the batch as its
    expectation, and so has its gradient. With the gradient norm as the score the variance is as
    small as such a draw can make it (section 3.2); see `variance_reduction`.

    A score that is NaN, infinite or negative has probability 0 and is counted in ``excluded``; B
    counts the others. Where all of those are 0 they are equally likely. A batch without any is
    drawn from uniformly, with weights of 1. Samples that score 0 among others that do not are never
    drawn: the estimate is unbiased as long as their losses (or gradients) are 0 as well.

    Args:
        rate: How many to draw, as a share of the batch, in (0, 1].
        by: The score: ``grad_norm``, ``loss``, ``entropy`` or another of
            `fastsel.scores.SCORE_NAMES`.
        generator: Where the randomness comes from. Without one, torch's global generator for the
            scores' device is used, and `state_dict` holds no random state.

    Raises:
        TypeError: `rate` is not a number, or `generator` is not a `torch.Generator`.
        ValueError: `rate` is not in (0, 1], or `by` is not a score.

    Example:
        >>> selector = ImportanceSampling(0.5, by="loss")
        >>> choice = selector.select(Scores(loss=torch.tensor([0.0, 0.0, 5.0, 0.0])))
        >>> choice.indices, choice.weights
        (tensor([2, 2]), tensor([0.2500, 0.2500]))
    """

    name = "importance"
    needs = frozenset({"grad_norm"})
    gives_weights = True

    def __init__(
        self, rate: float, by: str = "grad_norm", *, generator: torch.Generator | None = None
    ) -> None:
        """Makes a selector that draws by the score `by`."""
        super().__init__(rate, generator=generator)
        if by not in SCORE_NAMES:
            raise ValueError(
                f"ImportanceSampling: by must be one of {', '.join(SCORE_NAMES)}, got {by!r}"
            )
        self.by = by
        self.needs = frozenset({by})

    def statistic(self, scores: Scores) -> Tensor:
        """The score that the probability is proportional to."""
        score: Tensor = getattr(scores, self.by)
        return score

    def choose(self, scores: Scores, k: int) -> Tensor:
        """The indices of `choose_weighted` alone."""
        return self.choose_weighted(scores, k).indices

    def choose_weighted(self, scores: Scores, k: int) -> Choice:
        """Draws k samples, repeated ones included, in ascending order.

        Raises:
            ValueError: The batch has more than 4,194,304 samples, or the generator is on another
                device than the scores.
        """
        score = self.statistic(scores).detach()
        size = score.shape[0]
        if size > _LARGEST_BATCH:
            raise ValueError(
                f"importance: the batch must have at most {_LARGEST_BATCH} samples, got {size}"
            )
        device = self._drawing_device(scores)
        dtype = torch.promote_types(score.dtype, torch.float32)
        if size == 0:
            return Choice(score.new_empty(0, dtype=torch.int64), score.new_empty(0, dtype=dtype))
        shares = _shares(score)
        self._counter(score.device).add_(shares.excluded)
        # Rounding up keeps every positive score possible. The weights use the rounded
        # probabilities, so the estimate stays unbiased.
        units = torch.ceil(shares.share * _UNITS).to(torch.int64)  # [B]
        ends = units.cumsum(0)  # [B]
        total = ends[-1]
        # torch.rand with a generator, even None, cannot be traced for a size that varies.
        random = torch.empty(k, device=device, dtype=torch.float64)
        random.uniform_(generator=self.generator)  # in [0, 1)
        ticket = (random * total).to(torch.int64).minimum(total - 1).sort().values  # [k]
        # Sample i holds the tickets from ends[i - 1] to ends[i] - 1.
        indices = torch.searchsorted(ends, ticket, right=True)
        weights = total.double() / (shares.counted * units[indices])
        return Choice(indices, weights.to(dtype))

    def state_dict(self) -> dict[str, object]:
        """The selector's state, the score's name and the generator's state."""
        return {**super().state_dict(), "by": self.by}

    def _check_state(self, state: dict[str, object]) -> None:
        super()._check_state(state)
        if state["by"] != self.by:
            raise ValueError(
                f"load_state_dict: the selector 'importance' must draw by {state['by']!r} as the "
                f"state does, got one that draws by {self.by!r}"
            )

    def __repr__(self) -> str:
        """The call that makes such a selector."""
        return f"ImportanceSampling(rate={self.rate}, by={self.by!r})"


def variance_reduction(
    scores: Tensor,  # [B]
) -> Tensor:
    """The factor tau by which importance sampling narrows the gradient's spread.

    Katharopoulos & Fleuret, "Not All Samples Are Created Equal" (ICML 2018), section 3.3, equations
    23 to 26: drawing in proportion to the gradient norm divides the second moment of the gradient's
    estimate by the square of tau. With the norms g divided by their sum,

        tau = 1 / sqrt(1 - sum((g - 1/B)^2) / sum(g^2)) = sqrt(B sum(g^2)),

    1 where all scores are equal and sqrt(B) where all but one are 0. They draw by importance where
    ``tau > (B + 3k) / (3k)`` for k drawn of B. Nothing here waits for the device.

    Args:
        scores: Gradient norms ``[B]``, or what stands for them. Values that are NaN, infinite or
            negative are left out, and B counts the others.

    Returns:
        tau, without dimensions, float32 (float64 for float64 scores); 1 where all scores are 0 or
        none is left.

    Raises:
        TypeError: `scores` is not a floating-point tensor.
        ValueError: `scores` is not one-dimensional.

    Example:
        >>> variance_reduction(torch.tensor([3.0, 0.0, 0.0, 0.0]))
        tensor(2.)
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"variance_reduction: scores must be a floating-point tensor, got {got}")
    if scores.dim() != 1:
        raise ValueError(f"variance_reduction: scores must be [B], got shape {list(scores.shape)}")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if scores.shape[0] == 0:
        return scores.new_ones((), dtype=dtype)
    share, counted, _ = _shares(scores.detach())
    return (torch.sqrt(counted * share.square().sum()) / share.sum()).to(dtype)


class _Shares(NamedTuple):
    share: Tensor  # [B], float64: the score over the largest; 0 for what is left out
    counted: Tensor  # how many are not left out; all, if none is valid
    excluded: Tensor  # how many are


def _shares(
    scores: Tensor,  # [B], B at least 1
) -> _Shares:
    size = torch.nan_to_num(scores.double(), nan=-1.0, posinf=-1.0, neginf=-1.0)
    valid = size >= 0
    left = torch.count_nonzero(valid)
    size = size.clamp(min=0.0)
    largest = size.amax()
    # All equally likely where all are 0; so is everything where nothing is valid.
    share = torch.where(largest > 0, size / largest, (valid | (left == 0)).double())
    batch_size = scores.shape[0]
    return _Shares(share, torch.where(left == 0, batch_size, left), batch_size - left)
