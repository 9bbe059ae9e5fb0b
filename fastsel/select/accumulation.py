"""Backward passes, and an optimizer step after every so many of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastsel.select import ranks


class GradientAccumulation:
    """Takes an optimizer step with the mean gradient of several losses.

    Args:
        model: What is trained; may be wrapped in DistributedDataParallel.
        optimizer: Any whose ``step`` needs no closure.
        steps: Losses to an optimizer step.
        scaler: Scales the losses for float16 training.
        backward: Called with a loss instead of ``loss.backward()``.
        process_group: The ranks; by default all of them.

    Attributes:
        pending: Losses since the last optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int = 1,
        *,
        scaler: torch.amp.GradScaler | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        process_group: Any = None,
    ) -> None:
        """Starts with no gradients."""
        self.steps = steps
        self.scaler = scaler
        self.pending = 0
        self._model = model
        self._optimizer = optimizer
        self._backward = backward
        self._process_group = process_group

    def add(self, forward: Callable[[], Tensor], scale: float = 1.0) -> Tensor:
        """Runs a forward and the backward of `scale` times its loss; gives the loss, detached.

        Should the forward fail, no weight has changed.
        """
        if self.pending == 0:
            self._optimizer.zero_grad(set_to_none=True)
        last = self.pending + 1 == self.steps
        with nullcontext() if last else self._without_communication():
            loss = forward()
            factor = scale / self.steps
            self._run_backward(loss if factor == 1.0 else loss * factor)
        self.pending += 1
        if last:
            self.pending = 0
            self._optimizer_step()
        return loss.detach()

    def flush(self) -> bool:
        """Takes the optimizer step for the losses since the last one; whether there were any."""
        if self.pending == 0:
            return False
        self.pending = 0
        if hasattr(self._model, "no_sync"):  # these gradients have not met those of other ranks
            ranks.average_gradients(self._model, self._process_group)
        self._optimizer_step()
        return True

    def _run_backward(self, loss: Tensor) -> None:
        if self._backward is not None:
            self._backward(loss)
        else:
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _optimizer_step(self) -> None:
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()

    def _without_communication(self) -> AbstractContextManager[Any]:
        # Gradients of the ranks need to meet once per optimizer step only.
        no_sync = getattr(self._model, "no_sync", None)
        if no_sync is None or ranks.world_size(self._process_group) == 1:
            return nullcontext()
        return no_sync()  # type: ignore[no-any-return]
