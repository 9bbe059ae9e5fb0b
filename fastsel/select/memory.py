"""A memory of losses: what a data set's samples cost when they were last looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastsel import ops
from fastsel.scores import Scores
from fastsel.select.selector import outside_inference_mode


class LossMemory:
    """An exponential average of every sample's loss, and when it was last brought up to date.

    It replaces the scoring forward by what training has shown anyway, at the price of freshness:
    Loshchilov & Hutter, "Online Batch Selection for Faster Training of Neural Networks" (2015),
    section 3, choose by the latest known losses. `max_age` bounds how old those may get.

    Each sample takes 12 bytes: its loss in float32 and its step in int64. Where the memory lives on
    the device of the batches, nothing here waits for it, and results do not depend on the order in
    which it works.

    Args:
        size: N, the number of samples in the data set.
        decay: What the average keeps of its old value at an update, in [0, 1): 0 holds the latest
            loss.
        max_age: A loss that is older than this many steps is due for another look; None for never.
        device: Where the memory lives, by default the CPU; ids and losses are brought there.

    Raises:
        TypeError: `size` or `max_age` is not an int, or `decay` not a number.
        ValueError: An argument is out of its range.

    Example:
        >>> memory = LossMemory(5, decay=0.5, max_age=10)
        >>> memory.update(torch.tensor([1, 3]), torch.tensor([2.0, 4.0]), step=0)
        >>> memory.update(torch.tensor([3]), torch.tensor([2.0]), step=1)
        >>> memory.read(torch.tensor([3, 0]), step=2)
        (tensor([3., nan]), tensor([False,  True]))
    """

    def __init__(
        self,
        size: int,
        *,
        decay: float = 0.5,
        max_age: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a memory that has seen nothing."""
        for name, value, least in (("size", size, 1), ("max_age", max_age, 0)):
            if value is None and name == "max_age":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"LossMemory: {name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"LossMemory: {name} must be at least {least}, got {value}")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"LossMemory: decay must be a number, got {type(decay).__name__}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"LossMemory: decay must be in [0, 1), got {decay}")
        self.size = size
        self.decay = float(decay)
        self.max_age = max_age
        # The last entry of either takes the writes that must leave no trace.
        with outside_inference_mode():
            self._losses = torch.full((size + 1,), float("nan"), device=device)
            self._seen = torch.full((size + 1,), -1, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the memory lives."""
        return self._losses.device

    @property
    def losses(self) -> Tensor:
        """The averages ``[N]``, float32; NaN for samples never seen."""
        return self._losses[: self.size]

    @property
    def seen(self) -> Tensor:
        """The step of each sample's latest update ``[N]``, int64; -1 for samples never seen."""
        return self._seen[: self.size]

    def to(self, device: torch.device | str) -> LossMemory:
        """Moves the memory; gives itself."""
        with outside_inference_mode():
            self._losses, self._seen = self._losses.to(device), self._seen.to(device)
        return self

    def update(
        self,
        ids: Tensor,  # [B]
        losses: Tensor,  # [B]
        step: int | Tensor,
    ) -> None:
        """Takes in the losses of some samples.

        A first loss is stored as it is, later ones as ``decay * old + (1 - decay) * new``. A loss
        that is NaN or infinite changes nothing: the sample keeps what it had, and its age. Where a
        sample comes several times, its last finite loss counts, once.

        Args:
            ids: The samples' positions in the data set ``[B]``, int64, each in [0, N).
            losses: Their losses ``[B]``.
            step: The number of the step, at least 0: an int, or an int64 tensor of one element.

        Raises:
            TypeError: `ids` is not int64, or `losses` not of a floating-point dtype.
            ValueError: `ids` and `losses` are not ``[B]`` both.
            IndexError: An id is outside [0, N). On CUDA, where finding out would stall the device,
                a device-side assertion fails instead.
        """
        ids = self._checked_ids("update", ids)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(f"LossMemory.update: losses must be a floating-point tensor, got {got}")
        if losses.shape != ids.shape:
            raise ValueError(
                f"LossMemory.update: losses must be [B] with B = {len(ids)} as ids, "
                f"got shape {list(losses.shape)}"
            )
        new = self._bring(losses.detach()).float()
        old = self.losses.index_select(0, ids)  # out-of-range ids fail here
        known = self.seen.index_select(0, ids) >= 0
        new = torch.where(new.isfinite() & known, self.decay * old + (1.0 - self.decay) * new, new)
        rows = ids.masked_fill(~new.isfinite(), self.size)
        # Of equal neighbours in a stable order the last one came last.
        rows, order = torch.sort(rows, stable=True)
        superseded = torch.zeros_like(rows, dtype=torch.bool)
        superseded[:-1] = rows[:-1] == rows[1:]
        rows = rows.masked_fill(superseded, self.size)
        self._losses.index_copy_(0, rows, new[order])
        self._seen.index_copy_(0, rows, self._steps(step, rows))

    def read(
        self,
        ids: Tensor,  # [B]
        step: int | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Recalls the losses of some samples.

        Args:
            ids: The samples' positions in the data set ``[B]``, int64, each in [0, N).
            step: The number of the step, as in `update`.

        Returns:
            The averages ``[B]``, float32, NaN for samples never seen; and which samples are due for
            another look ``[B]``, bool: those never seen, or last seen more than `max_age` steps
            before `step`.

        Raises:
            TypeError: `ids` is not int64.
            ValueError: `ids` is not ``[B]``.
            IndexError: An id is outside [0, N), as in `update`.
        """
        ids = self._checked_ids("read", ids)
        loss = self.losses.index_select(0, ids)
        seen = self.seen.index_select(0, ids)
        due = seen < 0
        if self.max_age is not None:
            due = due | (seen < step - self.max_age)
        return loss, due

    def state_dict(self) -> dict[str, Any]:
        """The settings, and copies of the averages and their steps."""
        return {
            "decay": self.decay,
            "max_age": self.max_age,
            "losses": self.losses.clone(),
            "seen": self.seen.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; on an error nothing has changed.

        Raises:
            ValueError: It is not the state of a memory of this size.
        """
        missing = [key for key in ("decay", "max_age", "losses", "seen") if key not in state]
        if missing:
            raise ValueError(f"LossMemory: state must have {', '.join(missing)}")
        for name, own in (("losses", self.losses), ("seen", self.seen)):
            saved = state[name]
            if saved.shape != own.shape or saved.dtype != own.dtype:
                raise ValueError(
                    f"LossMemory: state must hold {name} of {self.size} samples in {own.dtype}, "
                    f"got {list(saved.shape)} in {saved.dtype}"
                )
        self.decay, self.max_age = state["decay"], state["max_age"]
        self.losses.copy_(state["losses"])
        self.seen.copy_(state["seen"])

    def __repr__(self) -> str:
        """The call that makes such a memory."""
        return f"LossMemory({self.size}, decay={self.decay}, max_age={self.max_age})"

    def _steps(self, step: int | Tensor, rows: Tensor) -> Tensor:
        if isinstance(step, Tensor):
            return step.to(self.device).reshape(1).expand_as(rows)
        return torch.full_like(rows, step)

    def _checked_ids(self, method: str, ids: Tensor) -> Tensor:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"LossMemory.{method}: ids must be an int64 tensor, got {got}")
        if ids.dim() != 1:
            raise ValueError(f"LossMemory.{method}: ids must be [B], got shape {list(ids.shape)}")
        check_range(f"LossMemory.{method}", ids, self.size)
        return self._bring(ids)

    def _bring(self, tensor: Tensor) -> Tensor:
        # On the way to the CPU the copy would be read before it has come.
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")


def check_range(
    owner: str,
    ids: Tensor,  # [B]
    size: int,
) -> None:
    """IndexError if an id is outside [0, size); only where it costs no wait for a device."""
    if not ids.is_cpu or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    least, most = ids.aminmax()
    if int(least) < 0 or int(most) >= size:
        wrong = int(least) if int(least) < 0 else int(most)
        raise IndexError(f"{owner}: ids must be in [0, {size}), got {wrong}")


def without_due(scores: Scores) -> tuple[Scores, Tensor]:
    """The scores with due samples counted as average, and which those are ``[B]``."""
    assert scores.loss is not None
    due = scores.loss.isnan()  # [B]
    known = scores.loss.nan_to_num(nan=0.0).sum() / (~due).sum().clamp(min=1)
    return dataclasses.replace(scores, loss=torch.where(due, known, scores.loss)), due


def due_first(
    due: Tensor,  # [B]
    indices: Tensor,  # [k]
) -> Tensor:
    """As many samples: those due for a visit, then the chosen ones, ties by position."""
    rank = due.to(torch.float32).mul_(2.0)
    rank = rank.index_add(0, indices, torch.ones_like(indices, dtype=torch.float32))
    return ops.topk(rank, len(indices), sorted=False).indices
