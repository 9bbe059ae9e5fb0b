"""AdaSelection: several selectors mixed, with weights that follow how fast their losses move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsel import ops
from fastsel.scores import Scores
from fastsel.select.history import WeightHistory
from fastsel.select.methods import METHODS, FunctionSelector
from fastsel.select.selector import (
    RandomSelector,
    Selector,
    checked_statistic,
    outside_inference_mode,
)

DEFAULT_METHODS = ("uniform", "big_loss", "small_loss", "grad_norm")
_MOST_METHODS = 16
_FIRST_STATISTIC = 8
_BY_CODE = {method.code: method for method in METHODS.values() if method.code is not None}
_GRAD_NORM, _RHO_LOSS = METHODS["grad_norm"].code, METHODS["rho_loss"].code
_NUMBERS = ("beta", "curriculum_power", "standardize")

Method = str | Selector | Callable[[Scores], Tensor]


class AdaSelection(Selector):
    """Chooses by a mixture of methods whose weights adapt at every step.

    Zhang et al., "AdaSelection: Accelerating Deep Learning Training through Data Subsampling",
    section 3.2. Every method gives each sample an importance, the softmax of its statistic
    (equation 2); the methods' weights move with the relative change of their mean losses (equation
    3); a curriculum reward favours small losses at first (equation 4); the samples with the largest
    product of reward and weighted importance are chosen (equations 5 and 6). One native operator,
    `fastsel.adaselection_`, does all of it, and gives the exact formulas.

    A sample of which a loss or another needed score is not finite takes no part, is chosen only
    when fewer than k others are left, and is counted in ``excluded``. A batch of such samples alone
    moves no weight.

    The state lives on the device of the scores and is never read back by a step, so choosing runs
    under ``torch.compile(fullgraph=True)`` and in a CUDA graph. It is made at the first choice;
    name the `device` to make it at once.

    Args:
        methods: Names in `SELECTORS`, selectors (their own rate does not matter) or functions of
            the batch's `Scores` that give ``[B]``, at most 16, each once. A function sees what
            other methods need, at least the loss; for more give a `FunctionSelector`. Methods with
            a ``code`` are computed by the operator itself, the statistics of the others beside it.
        rate: The share of the batch to choose, in (0, 1]; it has to be given.
        beta: How strongly the weights follow the losses (equation 3).
        curriculum_power: The reward is ``exp(-loss / (mean loss * t ** curriculum_power))`` at step
            t, counted from 1; None leaves it out.
        standardize: Divide each statistic by its standard deviation over the batch before the
            softmax.
        record_every: Steps between two records of the weights, for `history` and `plot_weights`;
            0 for none. The last 4096 records are kept.
        device: Where to make the state at once.

    Attributes:
        methods: The methods, as selectors.
        names: Their names.

    Raises:
        TypeError: A method is not one of those above, or a number is of the wrong type.
        ValueError: There is no method, more than 16, one twice, or one without a statistic; or a
            number is out of its range.

    Example:
        >>> selector = AdaSelection(("big_loss", "small_loss"), rate=0.5, curriculum_power=None)
        >>> selector(Scores(loss=torch.tensor([0.1, 2.0, 0.3, 1.0])))
        tensor([0, 1])
        >>> selector.weights
        {'big_loss': 0.5, 'small_loss': 0.5}
    """

    name = "adaselection"
    needs = frozenset({"loss", "grad_norm"})

    def __init__(
        self,
        methods: Sequence[Method] = DEFAULT_METHODS,
        rate: float | None = None,
        beta: float = 0.5,
        curriculum_power: float | None = 0.5,
        *,
        standardize: bool = True,
        record_every: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a mixture in which all methods weigh the same."""
        super().__init__(rate)  # type: ignore[arg-type]  # which refuses None
        self.methods = _as_methods(methods)
        self.names = tuple(method.name for method in self.methods)
        self.needs = frozenset({"loss"}).union(*(method.needs for method in self.methods))
        self._beside = [method for method in self.methods if not _is_fused(method)]
        # A random method beside the others gives the statistic it draws by, which is not random.
        self.deterministic = all(
            method.deterministic or isinstance(method, RandomSelector) for method in self._beside
        )
        self._codes = [
            method.code
            if method.code is not None and method not in self._beside
            else _FIRST_STATISTIC + self._beside.index(method)
            for method in self.methods
        ]
        # Looked up here, because under torch.compile the codes may be symbols, which no list holds.
        self._wants_grad_norm = _GRAD_NORM in self._codes
        self._wants_reference_loss = _RHO_LOSS in self._codes
        _check_numbers(beta, curriculum_power)
        self.beta = float(beta)
        self.curriculum_power = None if curriculum_power is None else float(curriculum_power)
        self.standardize = bool(standardize)
        self._history: WeightHistory | None = None
        self.record_every = record_every
        self._method_weights = torch.full((len(self.methods),), 1.0 / len(self.methods))
        self._method_losses = torch.zeros(len(self.methods))
        self._step = torch.zeros(1, dtype=torch.int64)
        if device is not None:
            self._move(torch.device(device))

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each method, summing to 1; reading it waits for the device."""
        return dict(zip(self.names, self._method_weights.tolist(), strict=True))

    @property
    def steps(self) -> int:
        """How many choices have moved the weights; reading it waits for the device."""
        return int(self._step)

    @property
    def record_every(self) -> int:
        """Steps between two records of the weights; 0 for none. Setting it forgets the records."""
        return 0 if self._history is None else self._history.every

    @record_every.setter
    def record_every(self, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(
                f"AdaSelection: record_every must be an int of at least 0, got {every!r}"
            )
        self._history = WeightHistory(every, len(self.methods)) if every else None

    def history(self) -> tuple[Tensor, Tensor]:
        """The recorded weights: steps ``[T]`` and weights ``[T, M]``, on the CPU.

        Raises:
            ValueError: The selector does not record.
        """
        if self._history is None:
            raise ValueError(
                "AdaSelection: history needs a selector with record_every of at least 1, got 0"
            )
        return self._history.read()

    def choose(self, scores: Scores, k: int) -> Tensor:
        """Chooses k samples and moves the weights of the methods: indices ascending."""
        loss, grad_norm, reference_loss, statistics = self._inputs(scores)
        excluded = self._counter(loss.device)
        if self._step.device != loss.device:
            self._move(loss.device)
        choice = ops.adaselection_(
            loss,
            grad_norm,
            reference_loss,
            self._codes,
            self._method_weights,
            self._method_losses,
            self._step,
            k,
            self.beta,
            math.inf if self.curriculum_power is None else self.curriculum_power,
            self.standardize,
            statistics=statistics,
            excluded=excluded,
        )
        if self._history is not None:
            if self._history.steps.device != loss.device:
                with outside_inference_mode():
                    self._history.to(loss.device)
            self._history.record(self._step, self._method_weights)
        return choice.indices

    def state_tensors(self) -> tuple[Tensor, ...]:
        """The methods' weights and losses ``[M]`` and the step ``[1]``."""
        return self._method_weights, self._method_losses, self._step

    def state_dict(self) -> dict[str, Any]:
        """Everything that further choices depend on, and the records; waits for the device."""
        return {
            **super().state_dict(),
            "methods": list(self.names),
            **{name: getattr(self, name) for name in _NUMBERS},
            "method_weights": self._method_weights.clone(),
            "method_losses": self._method_losses.clone(),
            "step": self._step.clone(),
            "beside": [method.state_dict() for method in self._beside],
            "history": None if self._history is None else self._history.state_dict(),
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        if tuple(state["methods"]) != self.names:
            raise ValueError(
                "load_state_dict: state must be of an AdaSelection over "
                f"{', '.join(self.names)}, got one over {', '.join(state['methods'])}"
            )
        _check_numbers(state["beta"], state["curriculum_power"])
        for name, own in (
            ("method_weights", self._method_weights),
            ("method_losses", self._method_losses),
            ("step", self._step),
        ):
            saved = state[name]
            if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (
                own.shape,
                own.dtype,
            ):
                raise ValueError(
                    f"load_state_dict: {name} must be a tensor {list(own.shape)} of {own.dtype}"
                )
        if len(state["beside"]) != len(self._beside):
            raise ValueError(
                f"load_state_dict: state must be of {len(self._beside)} methods beside the "
                f"operator's own, got {len(state['beside'])}"
            )
        for method, saved in zip(self._beside, state["beside"], strict=True):
            method._check_state(saved)
        if state["history"] is not None:
            WeightHistory(1, len(self.methods), 1).check_state(state["history"])

    def _take_state(self, state: dict[str, Any]) -> None:
        # In place: a captured CUDA graph goes on reading these very tensors.
        self._method_weights.copy_(state["method_weights"])
        self._method_losses.copy_(state["method_losses"])
        self._step.copy_(state["step"])
        for name in _NUMBERS:
            setattr(self, name, state[name])
        for method, saved in zip(self._beside, state["beside"], strict=True):
            method._take_state(saved)
        if state["history"] is not None:
            if self._history is None:
                self._history = WeightHistory(state["history"]["every"], len(self.methods))
                self._history.to(self._step.device)
            self._history.load_state_dict(state["history"])
        elif self._history is not None:
            self.record_every = self._history.every
        super()._take_state(state)

    def __repr__(self) -> str:
        """The call that makes such a selector."""
        return (
            f"AdaSelection({self.names}, rate={self.rate}, beta={self.beta}, "
            f"curriculum_power={self.curriculum_power})"
        )

    def _inputs(self, scores: Scores) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Losses, gradient norms, reference losses ``[B]`` and statistics ``[S, B]``, of one dtype.

        What no method needs is None.
        """
        assert scores.loss is not None  # `needs` saw to it
        loss = scores.loss.detach()
        grad_norm = scores.grad_norm if self._wants_grad_norm else None
        reference_loss = scores.reference_loss if self._wants_reference_loss else None
        rows = [checked_statistic(method, scores) for method in self._beside]
        dtype = loss.dtype
        for other in (grad_norm, reference_loss, *rows):
            if other is not None:
                dtype = torch.promote_types(dtype, other.dtype)
        return (
            loss.to(dtype),
            None if grad_norm is None else grad_norm.detach().to(dtype),
            None if reference_loss is None else reference_loss.detach().to(dtype),
            torch.stack([row.to(dtype) for row in rows]) if rows else None,
        )

    def _move(self, device: torch.device) -> None:
        with outside_inference_mode():
            self._counter(device)
            self._method_weights = self._method_weights.to(device)
            self._method_losses = self._method_losses.to(device)
            self._step = self._step.to(device)
            if self._history is not None:
                self._history.to(device)


def _as_methods(methods: Sequence[Method]) -> tuple[Selector, ...]:
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise TypeError(f"AdaSelection: methods must be a sequence, got {type(methods).__name__}")
    if not 1 <= len(methods) <= _MOST_METHODS:
        raise ValueError(f"AdaSelection: methods must be 1 to {_MOST_METHODS}, got {len(methods)}")
    selectors = tuple(_as_method(method) for method in methods)
    names = [selector.name for selector in selectors]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"AdaSelection: methods must be given once each, got {twice[0]!r} twice")
    return selectors


def _as_method(method: Method) -> Selector:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"AdaSelection: methods must be of {', '.join(METHODS)}, selectors or functions, "
                f"got {method!r}"
            )
        return METHODS[method](1.0)
    if isinstance(method, Selector):
        if type(method).statistic is Selector.statistic:
            raise ValueError(
                f"AdaSelection: methods must have a statistic, {type(method).__name__} has none"
            )
        return method
    if isinstance(method, type) or not callable(method):
        got = method if isinstance(method, type) else type(method)
        raise TypeError(
            "AdaSelection: methods must be names, selectors or functions of the scores, "
            f"got {got.__name__}"
        )
    return FunctionSelector(method, 1.0)


def _is_fused(method: Selector) -> bool:
    # A subclass that computes another statistic is not the method whose code it inherited.
    built_in = None if method.code is None else _BY_CODE.get(method.code)
    return built_in is not None and type(method).statistic is built_in.statistic


def _check_numbers(beta: object, curriculum_power: object) -> None:
    for name, value in (("beta", beta), ("curriculum_power", curriculum_power)):
        if value is None and name == "curriculum_power":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"AdaSelection: {name} must be a number, got {type(value).__name__}")
        if not 0.0 <= value < math.inf:
            raise ValueError(f"AdaSelection: {name} must be finite and at least 0, got {value}")
