"""Hugging Face Accelerate: a `SelectiveStep` on what `Accelerator.prepare` gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastsel.integrations._shared import gather_states, own_state, require
from fastsel.select.selector import Selector
from fastsel.select.step import SelectiveStep

if TYPE_CHECKING:
    import accelerate
else:
    accelerate = require("accelerate", "accelerate")

_OWNER = "accelerated_step"
_OF_THE_ACCELERATOR = ("accumulation_steps", "scaler", "backward")


def accelerated_step(
    accelerator: accelerate.Accelerator,
    model: nn.Module,
    criterion: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    selector: Selector | str = "adaselection",
    rate: float | None = None,
    *,
    max_grad_norm: float | None = None,
    register: bool = True,
    **options: Any,
) -> SelectiveStep:
    """A `SelectiveStep` whose backward, accumulation, precision and ranks are the accelerator's.

    Call it inside ``accelerator.accumulate(model)`` in place of forward, ``accelerator.backward``,
    gradient clipping, ``optimizer.step`` and ``optimizer.zero_grad``; a learning-rate scheduler is
    stepped as ever. Scoring runs through the prepared model, in its precision. Each process chooses
    from its own batch, unless ``across_ranks=True`` has them choose together; the cost-aware switch
    decides the same on all of them.

    Args:
        accelerator: The `accelerate.Accelerator`.
        model: As ``accelerator.prepare`` gave it.
        criterion: The loss, called as ``criterion(output, target)``.
        optimizer: As ``accelerator.prepare`` gave it.
        selector: A `Selector`, or the name of one.
        rate: The share of the batch to train on; with a selector's name only.
        max_grad_norm: Clips the gradients to this norm before each optimizer step.
        register: Has ``accelerator.save_state`` and ``load_state`` take the step's state along,
            that of every process.
        options: The other arguments of `SelectiveStep`, but for those that are the accelerator's
            business: ``accumulation_steps``, ``scaler`` and ``backward``.

    Raises:
        TypeError: An argument is of the wrong type, or one of those that are not taken.
        ValueError: Model or optimizer are not prepared, the accelerator uses an engine that takes
            its own training steps (DeepSpeed, Megatron-LM), or an argument is out of range.

    Example:
        >>> accelerator = accelerate.Accelerator(cpu=True)
        >>> model = torch.nn.Linear(8, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> step = accelerated_step(
        ...     accelerator, model, torch.nn.CrossEntropyLoss(), optimizer, "big_loss", 0.25
        ... )
        >>> with accelerator.accumulate(model):
        ...     result = step(torch.randn(32, 8), torch.randint(0, 3, (32,)))
    """
    if not isinstance(accelerator, accelerate.Accelerator):
        raise TypeError(
            f"{_OWNER}: accelerator must be an accelerate.Accelerator, "
            f"got {type(accelerator).__name__}"
        )
    refused = [name for name in _OF_THE_ACCELERATOR if name in options]
    if refused:
        raise TypeError(f"{_OWNER}: {', '.join(refused)} must be left to the accelerator")
    engine = accelerator.distributed_type.value
    if engine in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"{_OWNER}: accelerator must not use {engine}, which takes its own steps")
    for name, prepared in (("model", model), ("optimizer", optimizer)):
        if not getattr(prepared, "_is_accelerate_prepared", False):
            raise ValueError(f"{_OWNER}: {name} must be what accelerator.prepare gave")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"{_OWNER}: max_grad_norm must be above 0, got {max_grad_norm}")
    adapted: Any = _Optimizer(accelerator, model, optimizer, max_grad_norm)
    step = SelectiveStep(
        model, criterion, adapted, selector, rate, backward=accelerator.backward, **options
    )
    step.selection.cycle = accelerator.gradient_accumulation_steps
    if register:
        accelerator.register_for_checkpointing(_Checkpointed(step))
    return step


class _Optimizer:
    """A prepared optimizer that forgets gradients after its step instead of before the forward.

    The accelerator lets ``zero_grad`` pass in the last call of an accumulation only: there, before
    the forward, it would drop what the calls before have gathered.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Waits for `step`."""

    def step(self) -> None:
        """Clips, steps and forgets; the accelerator makes these do nothing while it accumulates."""
        if self._max_grad_norm is not None and self._accelerator.sync_gradients:
            self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


class _Checkpointed:
    """The state of the steps of all processes, since the accelerator saves only the first one's."""

    def __init__(self, step: SelectiveStep) -> None:
        self._step = step

    def state_dict(self) -> dict[str, Any]:
        """All processes' states; all of them must call it, as ``accelerator.save_state`` does."""
        return gather_states(self._step.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over this process's state."""
        self._step.load_state_dict(own_state(_OWNER, state))
