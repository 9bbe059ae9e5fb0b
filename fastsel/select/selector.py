"""What a selector is: a small object that turns the scores of a batch into samples to train on."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsel import ops
from fastsel.scores import Scores


class Choice(NamedTuple):
    """What a selector chose.

    Attributes:
        indices: The chosen samples ``[k]``, int64, ascending; repeated only by a selector that
            draws with replacement.
        weights: What each chosen sample's loss is multiplied by before the mean is taken ``[k]``;
            None where all count alike.
    """

    indices: Tensor  # [k]
    weights: Tensor | None = None  # [k]


class Selector:
    """Chooses a share of every batch; a subclass says by what.

    ``selector(scores)`` gives the chosen samples' indices ``[k]``, int64, in ascending order, so
    that rows are gathered in memory order and a `rate` of 1 leaves the batch as it is;
    ``selector.select(scores)`` gives the weights of the chosen, too.

    A sample whose statistic is NaN or infinite comes last: it is chosen only when fewer than k
    others are left, and counted in ``excluded``. One broken sample then cannot destroy the weights,
    while a model that has diverged still shows NaN. Nothing here waits for the device.

    A subclass sets ``name`` and ``needs`` and writes ``statistic``:

        class Confused(Selector):
            name = "confused"
            needs = frozenset({"entropy"})

            def statistic(self, scores):
                return scores.entropy

    or, where the choice is not that of the k largest, ``choose``; or ``choose_weighted``, where the
    chosen have weights, and sets ``gives_weights``.

    Args:
        rate: The share of the batch to choose, in (0, 1].

    Attributes:
        name: What the selector is called in `SELECTORS`, in results and in saved states.
        needs: The scores it looks at, of `fastsel.scores.SCORE_NAMES`; empty if none.
        code: The method's number in `fastsel.adaselection_`, None if it has none there.
        deterministic: Whether equal scores and state always give the same choice.
        gives_weights: Whether `select` gives weights.
        rate: As given.

    Raises:
        TypeError: `rate` is not a number.
        ValueError: `rate` is not in (0, 1].
    """

    name: str = ""
    needs: frozenset[str] = frozenset()
    code: int | None = None
    deterministic: bool = True
    gives_weights: bool = False

    def __init__(self, rate: float) -> None:
        """Makes a selector that keeps the share `rate`."""
        self.rate = checked_rate(type(self).__name__, rate)
        self._excluded: Tensor | None = None

    @property
    def excluded(self) -> int:
        """How many samples were put last so far; reading it waits for the device."""
        return 0 if self._excluded is None else int(self._excluded)

    def count(self, batch_size: int) -> int:
        """How many of `batch_size` samples are chosen: ``max(1, round(rate * B))``, and 0 of 0."""
        return max(1, round(self.rate * batch_size)) if batch_size else 0

    def __call__(self, scores: Scores) -> Tensor:
        """The indices of `select` alone."""
        return self.select(scores).indices

    def select(self, scores: Scores) -> Choice:
        """Chooses.

        Args:
            scores: The batch's `Scores`, with at least those in ``needs``.

        Returns:
            The `Choice` of ``count(scores.size)`` samples, on the device of the scores.

        Raises:
            ValueError: A needed score is missing.
        """
        for name in self.needs:
            if getattr(scores, name) is None:
                missing = sorted(name for name in self.needs if getattr(scores, name) is None)
                raise ValueError(f"{self.name}: scores must have {', '.join(missing)}, got None")
        return self.choose_weighted(scores, self.count(scores.size))

    def statistic(self, scores: Scores) -> Tensor:
        """What the choice goes by ``[B]``: the larger, the sooner a sample is chosen."""
        raise NotImplementedError(
            f"{type(self).__name__}: a selector must define statistic(scores) or choose(scores, k)"
        )

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Chooses the k samples with the largest statistic, ties by index: indices ascending.

        Args:
            scores: The scores, with every one in ``needs``.
            k: How many.

        Raises:
            TypeError: The statistic is not a floating-point tensor.
            ValueError: The statistic is not ``[B]``.
        """
        return self._largest(checked_statistic(self, scores), k)

    def choose_weighted(self, scores: Scores, k: int) -> Choice:
        """Chooses k samples and weighs them; by default those of `choose`, without weights."""
        return Choice(self.choose(scores, k))

    def state_tensors(self) -> tuple[Tensor, ...]:
        """What choices move, the very tensors; ranks that choose together hold the same."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly as this selector would; waits for the device."""
        return {"name": self.name, "rate": self.rate, "excluded": self.excluded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state; on an error nothing has changed.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: It is the state of another kind of selector, or not a selector's state.
        """
        self._check_state(state)
        self._take_state(state)

    def __repr__(self) -> str:
        """The call that makes such a selector."""
        return f"{type(self).__name__}(rate={self.rate})"

    def _check_state(self, state: dict[str, Any]) -> None:
        """ValueError unless `_take_state` can take the state."""
        if state.get("name") != self.name:
            raise ValueError(
                f"load_state_dict: state must be of the selector {self.name!r}, "
                f"got that of {state.get('name')!r}"
            )
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(
                f"load_state_dict: the state of the selector {self.name!r} must have "
                f"{', '.join(missing)}"
            )
        checked_rate(type(self).__name__, state["rate"])

    def _take_state(self, state: dict[str, Any]) -> None:
        self.rate = float(state["rate"])
        if self._excluded is None:
            self._excluded = torch.tensor(int(state["excluded"]))
        else:
            self._excluded.fill_(int(state["excluded"]))

    def _largest(
        self,
        statistic: Tensor,  # [B]
        k: int,
    ) -> Tensor:
        """The k largest, indices ascending; those that are not finite come last and are counted."""
        key = torch.nan_to_num(statistic, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        self._counter(key.device).add_(torch.count_nonzero(key.isneginf()))
        return ops.topk(key, k, sorted=False).indices

    def _counter(self, device: torch.device) -> Tensor:
        """The count of excluded samples, int64 without dimensions, on `device`."""
        counter = self._excluded
        if counter is None or counter.device != device:
            with outside_inference_mode():
                counter = (
                    torch.zeros((), dtype=torch.int64, device=device)
                    if counter is None
                    else counter.to(device)
                )
            self._excluded = counter
        return counter


class RandomSelector(Selector):
    """A selector that draws at random.

    Args:
        rate: The share of the batch to choose, in (0, 1].
        generator: Where the randomness comes from. Without one, torch's global generator for the
            scores' device is used, and `state_dict` holds no random state; `torch.compile` can
            trace that one only.

    Raises:
        TypeError: `generator` is not a `torch.Generator`.
    """

    deterministic = False

    def __init__(self, rate: float, *, generator: torch.Generator | None = None) -> None:
        """Makes a selector that draws from `generator`."""
        super().__init__(rate)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{type(self).__name__}: generator must be a torch.Generator, "
                f"got {type(generator).__name__}"
            )
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        """The selector's state and the generator's."""
        generator = None if self.generator is None else self.generator.get_state()
        return {**super().state_dict(), "generator": generator}

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        saved = state["generator"]
        if (saved is None) != (self.generator is None):
            has = {True: "none", False: "one"}
            raise ValueError(
                f"load_state_dict: the generator of the selector {self.name!r} must be in both or "
                f"neither: the state was saved with {has[saved is None]}, but this selector has "
                f"{has[self.generator is None]}"
            )

    def _take_state(self, state: dict[str, Any]) -> None:
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        super()._take_state(state)

    def _drawing_device(self, scores: Scores) -> torch.device | None:
        """Where to draw: where the scores are, or the generator where there are none."""
        device = scores.device
        if self.generator is None:
            return device
        if scores.empty:
            return self.generator.device
        if device is not None and device.type != self.generator.device.type:
            raise ValueError(
                f"{self.name}: generator must be on {device.type} as the scores are, "
                f"got one on {self.generator.device.type}"
            )
        return device


def checked_statistic(selector: Selector, scores: Scores) -> Tensor:
    """The selector's statistic ``[B]``, detached.

    Raises:
        TypeError: It is not a floating-point tensor.
        ValueError: It is not ``[B]``.
    """
    statistic = selector.statistic(scores)
    if not isinstance(statistic, Tensor) or not statistic.is_floating_point():
        got = statistic.dtype if isinstance(statistic, Tensor) else type(statistic).__name__
        raise TypeError(
            f"{selector.name}: the statistic must be a floating-point tensor, got {got}"
        )
    if statistic.dim() != 1 or statistic.shape[0] != scores.size:
        raise ValueError(
            f"{selector.name}: the statistic must be [B] with B = {scores.size}, "
            f"got shape {list(statistic.shape)}"
        )
    return statistic.detach()


def checked_rate(owner: str, rate: object) -> float:
    """The rate as a float; TypeError or ValueError, beginning with `owner`, if it is none."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{owner}: rate must be a number, got {type(rate).__name__}")
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{owner}: rate must be in (0, 1], got {rate}")
    return float(rate)


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Where state is made: a tensor born in inference mode could not be changed outside of it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)
