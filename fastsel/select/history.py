"""How the weights of AdaSelection's methods have moved, recorded on the device and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor


class WeightHistory:
    """The weights of M methods at every so many steps; the last ones, if there are too many.

    Recording takes a few small operations on the device, the same ones every step, so that it can
    be compiled and captured in a CUDA graph: each window of `every` steps has a row, which holds
    the window's latest step.

    Args:
        every: Steps to a record.
        methods: M.
        capacity: How many records are kept: (8 + 4 M) bytes each.

    Raises:
        ValueError: An argument is below 1.

    Example:
        >>> history = WeightHistory(1, methods=2)
        >>> history.record(torch.tensor([1]), torch.tensor([0.25, 0.75]))
        >>> history.read()
        (tensor([1]), tensor([[0.2500, 0.7500]]))
    """

    def __init__(self, every: int, methods: int, capacity: int = 4096) -> None:
        """Makes an empty history."""
        for name, value in (("every", every), ("methods", methods), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"WeightHistory: {name} must be an int of at least 1, got {value!r}"
                )
        self.every = every
        self.steps = torch.zeros(capacity, dtype=torch.int64)  # 0: empty
        self.weights = torch.zeros(capacity, methods)

    def to(self, device: torch.device) -> None:
        """Moves the records."""
        self.steps, self.weights = self.steps.to(device), self.weights.to(device)

    def record(
        self,
        step: Tensor,  # [1]
        weights: Tensor,  # [M]
    ) -> None:
        """Writes down the weights after step number `step`, counted from 1; 0 leaves no record."""
        window = torch.div(step - 1, self.every, rounding_mode="floor")
        row = torch.remainder(window, self.steps.shape[0])
        self.steps.index_copy_(0, row, step)
        self.weights.index_copy_(0, row, weights.unsqueeze(0))

    def read(self) -> tuple[Tensor, Tensor]:
        """Steps ``[T]``, ascending, int64, and weights ``[T, M]``, float32, on the CPU."""
        steps, weights = self.steps.cpu(), self.weights.cpu()
        order = steps.argsort()
        order = order[steps[order] > 0]
        return steps[order], weights[order]

    def state_dict(self) -> dict[str, Any]:
        """The records."""
        return {
            "every": self.every,
            "steps": self.steps.clone(),
            "weights": self.weights.clone(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError unless `load_state_dict` can take the state."""
        missing = sorted({"every", "steps", "weights"} - state.keys())
        if missing:
            raise ValueError(f"load_state_dict: history must have {', '.join(missing)}")
        steps, weights, methods = state["steps"], state["weights"], self.weights.shape[1]
        if steps.dim() != 1 or weights.shape != (len(steps), methods):
            raise ValueError(
                f"load_state_dict: history must be steps [T] and weights [T, {methods}], "
                f"got {list(steps.shape)} and {list(weights.shape)}"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over records; their number and their distance become this history's."""
        self.check_state(state)
        steps, weights = state["steps"], state["weights"]
        device = self.steps.device
        self.every = int(state["every"])
        if steps.shape == self.steps.shape:
            self.steps.copy_(steps)
            self.weights.copy_(weights)
        else:
            self.steps = steps.to(device, copy=True)
            self.weights = weights.to(device, copy=True)


def plot_weights(
    history: Any,
    path: str | PathLike[str] | None = None,
    *,
    methods: Sequence[str] | None = None,
) -> Any:
    """Draws the weights of AdaSelection's methods over the steps, as figure 8 of its paper does.

    Args:
        history: An `AdaSelection` that records, or steps ``[T]`` and weights ``[T, M]`` as its
            ``history()`` gives them.
        path: Where the figure goes, in the format that the ending names; None saves nothing.
        methods: The names of the methods ``[M]``; needed unless `history` is a selector.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: Nothing has been recorded, or the number of names is not M.

    Example:
        >>> steps, weights = torch.tensor([1, 2]), torch.tensor([[0.5, 0.5], [0.4, 0.6]])
        >>> figure = plot_weights((steps, weights), methods=("big_loss", "small_loss"))
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['big_loss', 'small_loss']
    """
    if not isinstance(history, tuple):
        methods = tuple(history.weights) if methods is None else methods
        history = history.history()
    steps, weights = history
    if len(steps) == 0:
        raise ValueError(
            "plot_weights: history must hold at least one record, got none: an AdaSelection "
            "records with record_every of at least 1"
        )
    if methods is None or len(methods) != weights.shape[1]:
        got = "none" if methods is None else len(methods)
        raise ValueError(f"plot_weights: methods must be {weights.shape[1]} names, got {got}")
    # Drawing alone needs this package, which would slow down every import of fastsel.
    from fastsel.data.optional import require

    figure = require("matplotlib.figure", "drawing method weights").Figure(
        figsize=(7.2, 4.2), layout="constrained"
    )
    axes = figure.add_subplot()
    for name, curve in zip(methods, weights.T.tolist(), strict=True):
        axes.plot(steps.tolist(), curve, label=name, linewidth=1.6)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("method weight")
    axes.set_ylim(bottom=0.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
