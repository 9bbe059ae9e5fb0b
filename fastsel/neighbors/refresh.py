"""Tables of a model's own features, rebuilt in the background while the model trains."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsel.neighbors.table import NeighborTable


class TableRefresher:
    """Keeps a table of what a layer of a model makes of the data, rebuilt every n steps.

    Call `step` after each training step. Every `every` steps it takes a copy of the model's weights
    and rebuilds the table from them in a thread of its own, on the CPU's other cores or the same
    GPU; training goes on with the table there is. Where the last rebuilding is still running, the
    next one is left out.

    Args:
        model: The model being trained.
        batches: Makes, each time anew, the whole data set's inputs in order, batch by batch.
        layer: The submodule whose output is the features, flattened to ``[B, D]``; empty for the
            model's own.
        every: Training steps between two tables.
        k: As in `NeighborTable.build`.
        options: Further options of `NeighborTable.build`.

    Attributes:
        table: The newest table, from the weights of the step it says; built at once at first.
        built_at: The step whose weights the table is of.

    Raises:
        ValueError: The model has no such layer, or `every` is not positive.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> x = torch.randn(10, 2)
        >>> refresher = fastsel.TableRefresher(model, lambda: x.split(5), layer="0", every=4, k=2)
        >>> refresher.step(), refresher.table.ids.shape
        (False, torch.Size([10, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[], Iterable[Any]],
        *,
        layer: str = "",
        every: int,
        k: int = 32,
        **options: Any,
    ) -> None:
        if layer not in dict(model.named_modules()):
            raise ValueError(f"TableRefresher: the model has no layer {layer!r}")
        if every < 1:
            raise ValueError(f"TableRefresher: every must be positive, got {every}")
        self._model, self._batches, self._layer = model, batches, layer
        self._every, self._k, self._options = every, k, options
        self._steps = 0
        self._thread: threading.Thread | None = None
        self._made: tuple[NeighborTable, int] | None = None
        self._error: BaseException | None = None
        self.table = self._build(model)
        self.built_at = 0

    def step(self) -> bool:
        """Counts a training step; returns whether `table` is a new one.

        Raises:
            RuntimeError: The last rebuilding failed.
        """
        self._steps += 1
        is_new = self._collect()
        if self._steps % self._every == 0 and self._thread is None:
            frozen, at = copy.deepcopy(self._model), self._steps
            self._thread = threading.Thread(target=self._work, args=(frozen, at), daemon=True)
            self._thread.start()
        return is_new

    def wait(self) -> bool:
        """Waits for a rebuilding that is running; returns whether `table` is a new one."""
        if self._thread is not None:
            self._thread.join()
        return self._collect()

    def _collect(self) -> bool:
        if self._thread is None or self._thread.is_alive():
            return False
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError("TableRefresher: the table could not be rebuilt") from error
        assert self._made is not None
        self.table, self.built_at = self._made
        self._made = None
        return True

    def _work(self, model: nn.Module, at: int) -> None:
        try:
            self._made = self._build(model), at
        except BaseException as error:  # what step raises, in the thread that trains
            self._error = error

    def _build(self, model: nn.Module) -> NeighborTable:
        return NeighborTable.build(
            layer_features(model, self._batches(), self._layer), self._k, **self._options
        )


@torch.no_grad()
def layer_features(model: nn.Module, batches: Iterable[Any], layer: str = "") -> Tensor:
    """What a layer makes of inputs ``[N, D]``: the model in eval mode, its flags put back.

    Args:
        model: The model.
        batches: Inputs, batch by batch; several arguments of the model in a tuple.
        layer: The submodule; empty for the model itself.

    Raises:
        TypeError: The layer does not return a tensor.
        RuntimeError: It did not run.
    """
    module = model.get_submodule(layer)
    found: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"NeighborTable: layer {layer!r} must return a tensor, got {type(output).__name__}"
            )
        found.append(output.detach().flatten(1).float())

    flags = {one: one.training for one in model.modules()}
    handle = module.register_forward_hook(keep)
    model.eval()
    try:
        for batch in batches:
            model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        handle.remove()
        for one, training in flags.items():
            one.training = training
    if not found:
        raise RuntimeError(f"NeighborTable: layer {layer!r} did not run: there were no batches")
    return torch.cat(found)
