"""Selectors: small objects that turn the scores of a batch into the samples to train on."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsel import ops
from fastsel.scores import Scores


class Selector:
    """Chooses a share of every batch; a subclass says by what.

    ``selector(scores)`` gives the chosen samples' indices ``[k]``, int64, in ascending order, so
    that rows are gathered in memory order and a `rate` of 1 leaves the batch as it is. The
    selectors here put a sample whose score is NaN last: it is chosen only when fewer than k others
    are left. One broken sample then cannot destroy the weights, while a model that has diverged
    still shows NaN.

    A subclass sets ``name`` and ``needs`` and writes ``choose``:

        class Confused(Selector):
            name = "confused"
            needs = frozenset({"entropy"})

            def choose(self, scores, k):
                return fastsel.topk(scores.entropy, k, sorted=False).indices

    Args:
        rate: The share of the batch to choose, in (0, 1].

    Attributes:
        name: What the selector is called in `SELECTORS`, in results and in saved states.
        needs: The scores it looks at, of ``loss``, ``grad_norm``, ``entropy``; empty if none.
        rate: As given.

    Raises:
        TypeError: `rate` is not a number.
        ValueError: `rate` is not in (0, 1].
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, rate: float) -> None:
        """Makes a selector that keeps the share `rate`."""
        self.rate = _checked_rate(f"{type(self).__name__}", rate)

    def count(self, batch_size: int) -> int:
        """How many of `batch_size` samples are chosen: ``max(1, round(rate * B))``, and 0 of 0."""
        return max(1, round(self.rate * batch_size)) if batch_size else 0

    def __call__(self, scores: Scores) -> Tensor:
        """Chooses.

        Args:
            scores: The batch's `Scores`, with at least those in ``needs``.

        Returns:
            Indices ``[count(scores.size)]``, int64, ascending, on the device of the scores.

        Raises:
            ValueError: A needed score is missing.
        """
        missing = sorted(name for name in self.needs if getattr(scores, name) is None)
        if missing:
            raise ValueError(f"{self.name}: scores must have {', '.join(missing)}, got None")
        return self.choose(scores, self.count(scores.size))

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Chooses k samples: what a subclass writes. `scores` has every score in ``needs``."""
        raise NotImplementedError(
            f"{type(self).__name__}: a selector must define choose(scores, k)"
        )

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly as this selector would."""
        return {"name": self.name, "rate": self.rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: It is the state of another kind of selector, or not a selector's state.
        """
        if state.get("name") != self.name or "rate" not in state:
            raise ValueError(
                f"load_state_dict: state must be of the selector {self.name!r}, "
                f"got that of {state.get('name')!r}"
            )
        self.rate = _checked_rate(type(self).__name__, state["rate"])

    def __repr__(self) -> str:
        """The call that makes such a selector."""
        return f"{type(self).__name__}(rate={self.rate})"


class Uniform(Selector):
    """Chooses at random, every subset of the right size equally likely; needs no scores.

    The baseline every other selector has to beat, and free: no scoring forward is run for it.

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

    def __init__(self, rate: float, *, generator: torch.Generator | None = None) -> None:
        """Makes a uniform selector."""
        super().__init__(rate)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"Uniform: generator must be a torch.Generator, got {type(generator).__name__}"
            )
        self.generator = generator

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Draws k of the samples without replacement."""
        device = scores.device
        if self.generator is not None:
            has_scores = scores.loss is not None or scores.grad_norm is not None
            if has_scores and device is not None and device.type != self.generator.device.type:
                raise ValueError(
                    f"uniform: generator must be on {device.type} as the scores are, "
                    f"got one on {self.generator.device.type}"
                )
            device = device if has_scores else self.generator.device
        order = torch.randperm(scores.size, generator=self.generator, device=device)
        return order[:k].sort().values

    def state_dict(self) -> dict[str, Any]:
        """The rate and the generator's state."""
        generator = None if self.generator is None else self.generator.get_state()
        return {**super().state_dict(), "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the rate and the generator's state.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: It is the state of another kind of selector, or one of both has a generator
                and the other has none.
        """
        saved = state.get("generator")
        if state.get("name") == self.name and (saved is None) != (self.generator is None):
            has = {True: "none", False: "one"}
            raise ValueError(
                "load_state_dict: the generator of the selector 'uniform' must be in both or "
                f"neither: the state was saved with {has[saved is None]}, but this selector has "
                f"{has[self.generator is None]}"
            )
        super().load_state_dict(state)
        if self.generator is not None and saved is not None:
            self.generator.set_state(saved)


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

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Chooses the k largest losses."""
        assert scores.loss is not None  # `needs` saw to it
        return _largest(scores.loss, k)


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

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Chooses the k smallest losses."""
        assert scores.loss is not None  # `needs` saw to it
        # NaN counts as the largest value, so it is already last.
        return ops.topk(scores.loss.detach(), k, largest=False, sorted=False).indices


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

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Chooses the k largest gradient norms."""
        assert scores.grad_norm is not None  # `needs` saw to it
        return _largest(scores.grad_norm, k)


SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector for selector in (Uniform, BigLoss, SmallLoss, GradNorm)
}
"""The selectors by name."""


def make_selector(name: str, *, rate: float, generator: torch.Generator | None = None) -> Selector:
    """Makes a selector by its name.

    Args:
        name: One of `SELECTORS`.
        rate: The share of the batch to choose, in (0, 1].
        generator: For selectors that draw at random; the others are deterministic and have no use
            for it.

    Returns:
        The selector.

    Raises:
        ValueError: There is no selector of that name, or `rate` is not in (0, 1].
        TypeError: `rate` is not a number.

    Example:
        >>> make_selector("big_loss", rate=0.25)
        BigLoss(rate=0.25)
    """
    kind = SELECTORS.get(name)
    if kind is None:
        raise ValueError(f"make_selector: name must be one of {', '.join(SELECTORS)}, got {name!r}")
    if issubclass(kind, Uniform):
        return kind(rate, generator=generator)
    return kind(rate)


def _largest(scores: Tensor, k: int) -> Tensor:  # [B]
    last = torch.nan_to_num(scores.detach(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return ops.topk(last, k, sorted=False).indices


def _checked_rate(owner: str, rate: object) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{owner}: rate must be a number, got {type(rate).__name__}")
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{owner}: rate must be in (0, 1], got {rate}")
    return float(rate)
