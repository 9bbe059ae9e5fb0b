"""The selectors that rank samples by one statistic, and the one that draws blindly.

Sections in brackets are those of Zhang et al., "AdaSelection: Accelerating Deep Learning Training
through Data Subsampling", which lists most of them and combines them; the statistics are the ones
`fastsel.adaselection_` computes for the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fastsel import ops
from fastsel.scores import SCORE_NAMES, Scores
from fastsel.select.selector import RandomSelector, Selector


class Uniform(RandomSelector):
    """Chooses at random, every subset of the right size equally likely; needs no scores.

    The baseline every other selector has to beat, and free: no scoring forward is run for it. As a
    method of `AdaSelection` its statistic is 0 for all.

    Args:
        rate: The share of the batch to choose, in (0, 1].
        generator: Where the randomness comes from; the indices come on its device. Without one,
            torch's global generator for the scores' device is used, and `state_dict` holds no
            random state.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> Uniform(0.5, generator=generator)(Scores(batch_size=4)).shape
        torch.Size([2])
    """

    name = "uniform"
    code = 0

    def statistic(self, scores: Scores) -> Tensor:
        """0 for every sample."""
        return torch.zeros(scores.size, device=scores.device)

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Draws k of the samples without replacement."""
        device = self._drawing_device(scores)
        order = torch.randperm(scores.size, generator=self.generator, device=device)
        return order[:k].sort().values


class BigLoss(Selector):
    """Chooses the samples with the largest loss.

    Loshchilov & Hutter, "Online Batch Selection for Faster Training of Neural Networks" (2015), and
    Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers" (2019), in the
    deterministic form.

    Example:
        >>> BigLoss(0.5)(Scores(loss=torch.tensor([0.1, 2.0, 0.3, 1.0])))
        tensor([1, 3])
    """

    name = "big_loss"
    needs = frozenset({"loss"})
    code = 1

    def statistic(self, scores: Scores) -> Tensor:
        """The loss."""
        return _need(scores.loss)


class SmallLoss(Selector):
    """Chooses the samples with the smallest loss: what the model takes for clean and easy.

    Han et al., "Co-teaching" (NeurIPS 2018), section 2, for a single network. A sample whose every
    position is ignored has loss 0 and is therefore chosen first.

    Example:
        >>> SmallLoss(0.5)(Scores(loss=torch.tensor([0.1, 2.0, 0.3, 1.0])))
        tensor([0, 2])
    """

    name = "small_loss"
    needs = frozenset({"loss"})
    code = 2

    def statistic(self, scores: Scores) -> Tensor:
        """The negative loss."""
        return -_need(scores.loss)


class GradNorm(Selector):
    """Chooses the samples whose loss has the largest gradient at the model's output.

    The upper bound of Katharopoulos & Fleuret, "Not All Samples Are Created Equal" (ICML 2018),
    section 3.2, taken greedily; Paul et al., "Deep Learning on a Data Diet" (NeurIPS 2021), know it
    as the EL2N score.

    Example:
        >>> GradNorm(0.5)(Scores(grad_norm=torch.tensor([0.1, 1.2, 0.3, 1.0])))
        tensor([1, 3])
    """

    name = "grad_norm"
    needs = frozenset({"grad_norm"})
    code = 3

    def statistic(self, scores: Scores) -> Tensor:
        """The gradient norm."""
        return _need(scores.grad_norm)


class AdaBoost(Selector):
    """Chooses the samples that AdaBoost would weigh most.

    The statistic is ``1/2 ln((1 + x) / (1 - x))`` with ``x = loss / (1.0001 max |loss|)``, the
    maximum over the batch's finite losses (section 3.1, equation 1). It grows with the loss, so
    alone it chooses what `BigLoss` chooses; in a mixture it weighs the largest losses more.

    Example:
        >>> AdaBoost(0.5)(Scores(loss=torch.tensor([0.1, 2.0, 0.3, 1.0])))
        tensor([1, 3])
    """

    name = "adaboost"
    needs = frozenset({"loss"})
    code = 4

    def statistic(self, scores: Scores) -> Tensor:
        """AdaBoost's weight; 0 for all where all losses are 0."""
        loss = _need(scores.loss)
        if loss.numel() == 0:
            return loss
        wide = loss.double()
        largest = torch.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0).abs().amax()
        # Written so that 1 - x does not cancel for the largest losses.
        margin = 1e-4 * largest
        ratio = ((largest + wide) + margin) / ((largest - wide) + margin)
        # An infinite loss comes out as NaN either way.
        statistic = torch.where(largest == 0, 0.0 * wide, 0.5 * torch.log(ratio))
        return statistic.to(_rounded(loss))

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Chooses the k largest losses: the same samples, without the rounding of a logarithm."""
        return self._largest(_need(scores.loss).detach(), k)


class Coreset1(Selector):
    """Chooses the samples at both ends of the losses, half largest and half smallest.

    The first approximation of a core set in section 3.1: the mean of both ends is near the batch's.
    The statistic is the distance of a loss's rank from the middle, ``|rank - (n - 1) / 2|``, ranks
    ascending from 0 among the n finite losses, ties by index.

    Example:
        >>> Coreset1(0.5)(Scores(loss=torch.tensor([0.1, 2.0, 0.3, 1.0])))
        tensor([0, 1])
    """

    name = "coreset1"
    needs = frozenset({"loss"})
    code = 5

    def statistic(self, scores: Scores) -> Tensor:
        """The distance of the loss's rank from the middle."""
        loss = _need(scores.loss).detach()
        inf = float("inf")
        last = torch.nan_to_num(loss, nan=inf, posinf=inf, neginf=inf)
        broken = last.isposinf()
        size = loss.shape[0]
        order = ops.topk(last, size, largest=False).indices  # [B]
        ascending = torch.arange(size, dtype=torch.float32, device=loss.device)
        rank = torch.empty_like(ascending).scatter_(0, order, ascending)
        finite = size - torch.count_nonzero(broken)
        return (rank - 0.5 * (finite - 1)).abs().masked_fill(broken, inf)


class Coreset2(Selector):
    """Chooses the samples whose loss is closest to the batch's mean.

    The second approximation of a core set in section 3.1. The mean is over the finite losses.

    Example:
        >>> Coreset2(0.5)(Scores(loss=torch.tensor([0.1, 2.0, 0.3, 1.0])))
        tensor([2, 3])
    """

    name = "coreset2"
    needs = frozenset({"loss"})
    code = 6

    def statistic(self, scores: Scores) -> Tensor:
        """The negative distance of the loss from the mean."""
        loss = _need(scores.loss).detach()
        wide = torch.nan_to_num(loss.double(), nan=0.0, posinf=0.0, neginf=0.0)
        mean = wide.sum() / torch.count_nonzero(loss.isfinite())
        return -(loss.double() - mean).abs().to(_rounded(loss))


class RhoLoss(Selector):
    """Chooses the samples that are learnable, worth learning and not yet learnt.

    Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not
    Yet Learnt" (ICML 2022), equation 3: the reducible loss, the loss minus that of a model trained
    on holdout data. Noisy samples have both large. `ReferenceModel` and `ReferenceLosses` give the
    second.

    Example:
        >>> loss, reference = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 0.5, 0.5])
        >>> RhoLoss(0.4)(Scores(loss=loss, reference_loss=reference))
        tensor([1])
    """

    name = "rho_loss"
    needs = frozenset({"loss", "reference_loss"})
    code = 7

    def statistic(self, scores: Scores) -> Tensor:
        """The reducible loss."""
        loss, reference = _need(scores.loss), _need(scores.reference_loss)
        dtype = torch.promote_types(_rounded(loss), reference.dtype)
        return loss.to(dtype) - reference.to(dtype)


class Entropy(Selector):
    """Chooses the samples whose predicted distribution has the largest entropy.

    Uncertainty sampling: Settles, "Active Learning Literature Survey" (2009), section 3.1. It looks
    at no target, so mislabelled samples do not stand out.

    Example:
        >>> Entropy(0.5)(Scores(entropy=torch.tensor([0.1, 2.0, 0.3, 1.0])))
        tensor([1, 3])
    """

    name = "entropy"
    needs = frozenset({"entropy"})

    def statistic(self, scores: Scores) -> Tensor:
        """The entropy."""
        return _need(scores.entropy)


class Margin(Selector):
    """Chooses the samples between whose two likeliest classes the model can least decide.

    Margin sampling: Scheffer, Decomain & Wrobel, "Active Hidden Markov Models for Information
    Extraction" (2001); Settles, "Active Learning Literature Survey" (2009), section 3.1.

    Example:
        >>> Margin(0.5)(Scores(margin=torch.tensor([0.1, 0.9, 0.3, 1.0])))
        tensor([0, 2])
    """

    name = "margin"
    needs = frozenset({"margin"})

    def statistic(self, scores: Scores) -> Tensor:
        """The negative margin."""
        return -_need(scores.margin)


class FunctionSelector(Selector):
    """Chooses the samples for which a function of the scores is largest.

    Args:
        function: Gives one number a sample, ``[B]`` of a floating-point dtype, of the batch's
            `Scores`.
        rate: The share of the batch to choose, in (0, 1].
        needs: The scores the function looks at.
        name: What the selector is called; the function's name by default. States are told apart by
            it.

    Raises:
        TypeError: `function` is not callable.
        ValueError: `needs` names an unknown score.

    Example:
        >>> doubtful = FunctionSelector(lambda scores: scores.entropy / scores.loss, 0.5,
        ...                             needs=("loss", "entropy"))
        >>> doubtful(Scores(loss=torch.tensor([1.0, 4.0]), entropy=torch.tensor([0.5, 0.5])))
        tensor([0])
    """

    deterministic = False  # nobody knows what the function does

    def __init__(
        self,
        function: Callable[[Scores], Tensor],
        rate: float,
        needs: Collection[str] = ("loss",),
        *,
        name: str | None = None,
    ) -> None:
        """Makes a selector of a function."""
        super().__init__(rate)
        if not callable(function):
            raise TypeError(
                f"FunctionSelector: function must be callable, got {type(function).__name__}"
            )
        needs = (needs,) if isinstance(needs, str) else needs
        unknown = sorted(set(needs) - set(SCORE_NAMES))
        if unknown:
            raise ValueError(
                f"FunctionSelector: needs must be of {', '.join(SCORE_NAMES)}, got {unknown}"
            )
        self.function = function
        self.needs = frozenset(needs)
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def statistic(self, scores: Scores) -> Tensor:
        """What the function gives."""
        return self.function(scores)

    def __repr__(self) -> str:
        """The function's name and the rate."""
        return f"FunctionSelector({self.name}, rate={self.rate})"


METHODS: dict[str, type[Selector]] = {
    method.name: method
    for method in (
        Uniform,
        BigLoss,
        SmallLoss,
        GradNorm,
        AdaBoost,
        Coreset1,
        Coreset2,
        RhoLoss,
        Entropy,
        Margin,
    )
}
"""The selectors of this module by name: what `AdaSelection` can mix by name."""


def _need(score: Tensor | None) -> Tensor:
    assert score is not None  # `needs` saw to it
    return score


def _rounded(loss: Tensor) -> torch.dtype:
    """The dtype of a statistic that was computed in double precision."""
    return torch.float64 if loss.dtype == torch.float64 else torch.float32
