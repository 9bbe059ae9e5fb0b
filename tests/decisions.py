"""AdaSelection's decisions step after step, on any backend, beside the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from conftest import Backend, to_numpy
from reference import AdaSelection
from torch import Tensor

from fastsel import ops

UNIFORM, BIG, SMALL, GRAD, ADABOOST, CORESET1, CORESET2, RHO = range(8)
EVERY = list(range(8))
# The largest sets of methods whose scores depend on the losses alone.
OF_LOSSES = [UNIFORM, BIG, SMALL, ADABOOST, CORESET1, CORESET2]


class Decisions:
    """The state of a mixture of methods, and the operator on it.

    Attributes:
        weights: ``[M]``.
        losses: ``[M]``.
        step: ``[1]``.
        excluded: ``[1]``.
    """

    def __init__(
        self,
        backend: Backend,
        methods: Sequence[int],
        *,
        beta: float = 0.5,
        curriculum_power: float = 0.5,
        standardize: bool = True,
    ) -> None:
        self.backend = backend
        self.methods = list(methods)
        self.beta, self.curriculum_power = beta, curriculum_power
        self.standardize = standardize
        count, device = len(self.methods), backend.device
        self.weights = torch.full((count,), 1 / count, device=device)
        self.losses = torch.zeros(count, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.excluded = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a decision changes."""
        return self.weights, self.losses, self.step, self.excluded

    def reference(self) -> AdaSelection:
        """A reference in this state."""
        other = AdaSelection(
            self.methods,
            beta=self.beta,
            curriculum_power=self.curriculum_power,
            standardize=self.standardize,
        )
        other.weights, other.losses = to_numpy(self.weights), to_numpy(self.losses)
        other.step, other.excluded = int(self.step), int(self.excluded)
        return other

    def clone(self) -> Decisions:
        """Another of the same state."""
        other = Decisions(
            self.backend,
            self.methods,
            beta=self.beta,
            curriculum_power=self.curriculum_power,
            standardize=self.standardize,
        )
        for to, source in zip(other.state, self.state, strict=True):
            to.copy_(source)
        return other

    def __call__(
        self,
        losses: Tensor,  # [B]
        k: int,
        *,
        grad_norms: Tensor | None = None,  # [B]
        reference_losses: Tensor | None = None,  # [B]
        statistics: Tensor | None = None,  # [S, B]
    ) -> ops.AdaSelectionChoice:
        """One decision."""

        def here(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(self.backend.device)

        simt = self.backend.name == "simt"
        function: Any = self.backend.ops.adaselection_ if simt else ops.adaselection_
        choice = function(
            here(losses),
            here(grad_norms),
            here(reference_losses),
            self.methods,
            self.weights,
            self.losses,
            self.step,
            k,
            self.beta,
            self.curriculum_power,
            self.standardize,
            statistics=here(statistics),
            excluded=self.excluded,
        )
        return ops.AdaSelectionChoice(*choice)


def best(scores: Tensor, k: int) -> Tensor:
    """The indices ``[k]`` of the k largest scores, NaN last, ties to the lower index, ascending."""
    values = scores.double().cpu().numpy()
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")
    return torch.from_numpy(np.sort(order[:k]))


def batch(
    size: int, seed: int = 0, *, dtype: torch.dtype = torch.float32, rows: int = 0
) -> dict[str, Any]:
    """Everything that methods read: losses like those of a classifier, and the rest beside them."""
    generator = torch.Generator().manual_seed(seed)
    losses = -torch.log1p(-0.999 * torch.rand(size, generator=generator))
    scale = torch.rand(size, generator=generator)
    old = losses * scale + 0.1 * torch.rand(size, generator=generator)
    return {
        "losses": losses.to(dtype),
        "grad_norms": (losses.sqrt() + scale).to(dtype),
        "reference_losses": old.to(dtype),
        "statistics": torch.randn(rows, size, generator=generator).to(dtype) if rows else None,
    }
