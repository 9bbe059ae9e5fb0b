"""Reference losses: what another model, not trained on a sample, makes of it (for `RhoLoss`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsel.scores import Scores
from fastsel.select.batch import Inputs, check_batch
from fastsel.select.memory import check_range
from fastsel.select.scoring import Scorer, check_autocast_dtype
from fastsel.select.selector import outside_inference_mode


class ReferenceModel:
    """Reference losses from a model, computed batch by batch.

    Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not
    Yet Learnt" (ICML 2022), section 3: a small model trained on holdout data will do. One forward a
    batch, in eval mode and without gradients; where every sample is seen several times,
    `ReferenceLosses` cost that forward once.

    Args:
        model: The reference model, on the device of the batches. It is not changed.
        criterion: Its loss; None takes the criterion of the model in training.
        autocast_dtype: Runs it under `torch.autocast` with this dtype, ``float16`` or ``bfloat16``.

    Raises:
        TypeError: `model` is not a module, or `criterion` not callable.
        ValueError: `autocast_dtype` is not one of those above.

    Example:
        >>> reference = ReferenceModel(torch.nn.Linear(8, 3), torch.nn.CrossEntropyLoss())
        >>> reference.losses(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any] | None = None,
        *,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a reference of a model."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"ReferenceModel: model must be a torch.nn.Module, got {type(model).__name__}"
            )
        if criterion is not None and not callable(criterion):
            raise TypeError(
                f"ReferenceModel: criterion must be callable, got {type(criterion).__name__}"
            )
        check_autocast_dtype("ReferenceModel", "autocast_dtype", autocast_dtype)
        self.model = model
        self.criterion = criterion
        self._scorer = Scorer(
            model, criterion or _no_criterion, autocast_dtype=autocast_dtype, scoring_mode="eval"
        )

    def losses(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
        criterion: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The reference losses ``[B]`` of a batch.

        Args:
            inputs: The batch, as the model takes it.
            target: Its targets.
            ids: Not looked at.
            criterion: The loss where the reference has none of its own.

        Raises:
            ValueError: There is no criterion, or it gives no per-sample losses.
        """
        self._scorer.criterion = self.criterion or criterion or _no_criterion
        loss = self._scorer(inputs, target, {"loss"}).loss
        assert loss is not None
        return loss

    def add_to(
        self,
        scores: Scores,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
        criterion: Callable[..., Any] | None = None,
    ) -> Scores:
        """The scores with ``reference_loss``; the arguments are those of `losses`."""
        loss = self.losses(inputs, target, ids, criterion)
        return dataclasses.replace(scores, reference_loss=loss)


class ReferenceLosses:
    """Reference losses from a table: one number for every sample of the data set.

    Args:
        losses: The losses ``[N]``, a floating-point tensor or array, or the path of a file that
            holds one: ``.npy``, or ``.pt`` as `torch.save` writes it. Kept as float32. A sample
            whose reference is NaN or infinite is one that `RhoLoss` puts last.

    Raises:
        TypeError: `losses` is not of a floating-point dtype.
        ValueError: They are not ``[N]`` with N of at least 1, or the path ends otherwise.
        OSError: The file cannot be read.

    Example:
        >>> reference = ReferenceLosses(torch.tensor([0.5, 0.25, 2.0]))
        >>> reference.losses(None, torch.zeros(2), ids=torch.tensor([2, 0]))
        tensor([2.0000, 0.5000])
    """

    def __init__(self, losses: Tensor | np.ndarray[Any, Any] | str | PathLike[str]) -> None:
        """Makes a reference of a table."""
        table = _read(losses) if isinstance(losses, (str, PathLike)) else losses
        if isinstance(table, np.ndarray):
            table = torch.from_numpy(table)
        if not isinstance(table, Tensor) or not table.is_floating_point():
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(
                f"ReferenceLosses: losses must be a floating-point tensor or array, got {got}"
            )
        if table.dim() != 1 or len(table) == 0:
            raise ValueError(
                f"ReferenceLosses: losses must be [N], N at least 1, got {list(table.shape)}"
            )
        self.table = table.detach().to(torch.float32, copy=True)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        criterion: Callable[..., Any],
        batches: Iterable[tuple[Inputs, Tensor]],
    ) -> ReferenceLosses:
        """Computes the table with a model.

        Args:
            model: The reference model.
            criterion: Its loss.
            batches: Inputs and targets of the whole data set, in its order: a `DataLoader` without
                shuffling, with the tensors on the model's device.

        Example:
            >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
            >>> model = torch.nn.Linear(8, 3)
            >>> len(ReferenceLosses.of(model, torch.nn.CrossEntropyLoss(), data).table)
            12
        """
        reference = ReferenceModel(model, criterion)
        losses = []
        for inputs, target in batches:
            check_batch("ReferenceLosses.of", inputs, target)
            losses.append(reference.losses(inputs, target))
        if not losses:
            raise ValueError("ReferenceLosses.of: batches must hold at least one batch, got none")
        return cls(torch.cat(losses))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the table to a ``.npy`` or ``.pt`` file."""
        _check_ending(path)
        if fspath(path).endswith(".npy"):
            np.save(path, self.table.cpu().numpy())
        else:
            torch.save(self.table.cpu(), path)

    def losses(
        self,
        inputs: Inputs | None,
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
        criterion: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The reference losses ``[B]`` of a batch, on the device of its targets.

        Args:
            inputs: Not looked at.
            target: The batch's targets.
            ids: The samples' positions in the data set ``[B]``, int64, each in [0, N).
            criterion: Not looked at.

        Raises:
            ValueError: `ids` is missing, or not ``[B]``.
            TypeError: `ids` is not int64.
            IndexError: An id is outside [0, N); on CUDA a device-side assertion fails instead.
        """
        if ids is None:
            raise ValueError("ReferenceLosses: ids must be given, the samples' positions, got None")
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ReferenceLosses: ids must be an int64 tensor, got {got}")
        if ids.dim() != 1 or len(ids) != target.shape[0]:
            raise ValueError(
                f"ReferenceLosses: ids must be [B] with B = {target.shape[0]} as target, "
                f"got shape {list(ids.shape)}"
            )
        check_range("ReferenceLosses", ids, len(self.table))
        if self.table.device != target.device:
            with outside_inference_mode():
                self.table = self.table.to(target.device)
        return self.table.index_select(0, ids.to(target.device, non_blocking=target.is_cuda))

    def add_to(
        self,
        scores: Scores,
        inputs: Inputs | None,
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
        criterion: Callable[..., Any] | None = None,
    ) -> Scores:
        """The scores with ``reference_loss``; the arguments are those of `losses`."""
        return dataclasses.replace(scores, reference_loss=self.losses(inputs, target, ids))


def _no_criterion(output: object, target: Tensor) -> Tensor:
    raise ValueError(
        "ReferenceModel: criterion must be given, to the reference or with the batch, got None"
    )


def _check_ending(path: str | PathLike[str]) -> None:
    if not fspath(path).endswith((".npy", ".pt")):
        raise ValueError(f"ReferenceLosses: the file must end in .npy or .pt, got {fspath(path)!r}")


def _read(path: str | PathLike[str]) -> object:
    _check_ending(path)
    if fspath(path).endswith(".npy"):
        array: object = np.load(path, allow_pickle=False)
        return array
    loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    return loaded
