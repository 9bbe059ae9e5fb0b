"""Scores with every sample's true gradient norm, for which the scoring forward gets a backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastsel.grad_norms import GradNorms
from fastsel.scores import Scores, per_sample_losses, per_sample_scores
from fastsel.select.batch import Inputs, forward
from fastsel.select.scoring import Scorer, autocast, eval_mode
from fastsel.select.selector import Selector


class ExactScorer(Scorer):
    """A `Scorer` whose gradient norms are those of the whole network, by `GradNorms`.

    Where gradient norms are asked for, the batch goes forward and backward once, about the cost of
    a plain step without the optimizer's; the gradients themselves are thrown away, and those that
    the parameters hold stay as they are.

    Args:
        model: The model to score with; see `GradNorms` for the layers that have norms.
        criterion: The loss; see `fastsel.scores.per_sample_losses`.
        autocast_dtype: As in `Scorer`.
        scoring_mode: As in `Scorer`.

    Raises:
        ValueError: As `Scorer` and `GradNorms` raise it.

    Example:
        >>> scorer = ExactScorer(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss())
        >>> scorer(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), {"grad_norm"}).grad_norm.shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any],
        *,
        autocast_dtype: torch.dtype | None = None,
        scoring_mode: str = "eval",
    ) -> None:
        """Makes a scorer."""
        super().__init__(model, criterion, autocast_dtype=autocast_dtype, scoring_mode=scoring_mode)
        self._norms = GradNorms(model, reduction="sum")

    def __call__(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        needs: Collection[str],
    ) -> Scores:
        """Scores the batch; `needs` as in `fastsel.scores.per_sample_scores`."""
        if "grad_norm" not in needs:
            return super().__call__(inputs, target, needs)
        evaluating = eval_mode(self.model) if self.scoring_mode == "eval" else nullcontext()
        casting = autocast(self.autocast_dtype, target.device, cache_enabled=False)
        with torch.enable_grad(), evaluating, casting, _unreduced(self.model), self._norms:
            output = forward(self.model, inputs)
            losses = per_sample_losses(self.criterion, output, target)
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            # Within the norms' context, as checkpointed layers run again.
            grads = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        self._norms.check_complete(
            name for name, grad in zip(trained, grads, strict=True) if grad is not None
        )
        others = (frozenset(needs) - {"grad_norm"}) | {"loss"}
        with torch.no_grad():
            output = output.detach() if isinstance(output, Tensor) else output
            scores = per_sample_scores(self.criterion, output, target, needs=others)
        return dataclasses.replace(scores, grad_norm=self._norms.norms)


def _unreduced(model: nn.Module) -> AbstractContextManager[Any]:
    """DistributedDataParallel expects a backward that it reduces after every other forward."""
    no_sync = getattr(model, "no_sync", None)
    return nullcontext() if no_sync is None else no_sync()


def check_grad_norms(owner: str, grad_norms: str, selector: Selector) -> None:
    """ValueError, beginning with `owner`, unless this is a kind that the selector has use for."""
    if grad_norms not in ("bound", "exact"):
        raise ValueError(f"{owner}: grad_norms must be 'bound' or 'exact', got {grad_norms!r}")
    if grad_norms == "exact" and "grad_norm" not in selector.needs:
        raise ValueError(
            f"{owner}: grad_norms='exact' is for selectors that need gradient norms, but "
            f"{selector.name!r} needs {', '.join(sorted(selector.needs)) or 'no scores'}"
        )
