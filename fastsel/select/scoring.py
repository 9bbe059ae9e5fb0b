"""The scoring forward: what a selector needs to know about a batch, as cheaply as it can be had."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastsel.scores import Scores, per_sample_scores
from fastsel.select.batch import Inputs, forward

_DTYPES = (None, torch.float16, torch.bfloat16)


class Scorer:
    """Scores a batch with one forward without gradients.

    Args:
        model: The model to score with; for a smaller one than is trained, give that.
        criterion: The loss; see `fastsel.scores.per_sample_scores` for what can be scored.
        autocast_dtype: Runs the forward and the criterion under `torch.autocast` with this dtype;
            None leaves autocast as the caller has it.
        scoring_mode: ``"eval"``: the model runs in eval mode and every module is put back into its
            mode afterwards, also when the forward fails. ``"train"``: each module runs in the mode
            it is in.

    Raises:
        ValueError: `autocast_dtype` or `scoring_mode` is not one of those above.

    Example:
        >>> scorer = Scorer(torch.nn.Linear(8, 3), torch.nn.CrossEntropyLoss())
        >>> scorer(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), {"loss"}).loss.shape
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
        check_autocast_dtype("Scorer", "autocast_dtype", autocast_dtype)
        if scoring_mode not in ("eval", "train"):
            raise ValueError(
                f"Scorer: scoring_mode must be 'eval' or 'train', got {scoring_mode!r}"
            )
        self.model = model
        self.criterion = criterion
        self.autocast_dtype = autocast_dtype
        self.scoring_mode = scoring_mode
        self._scores: Callable[..., Scores] = self._forward_and_score

    def __call__(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        needs: Collection[str],
    ) -> Scores:
        """Scores the batch; `needs` as in `fastsel.scores.per_sample_scores`."""
        evaluating = eval_mode(self.model) if self.scoring_mode == "eval" else nullcontext()
        # Autocast keeps the weights it has cast; those cast here carry no gradient and must not
        # reach the training forward of a caller who holds autocast open around the whole step.
        casting = autocast(self.autocast_dtype, target.device, cache_enabled=False)
        with torch.no_grad(), evaluating, casting:
            return self._scores(inputs, target, frozenset(needs))

    def compile(self, **options: Any) -> None:
        """Compiles forward and scores together; `options` are those of `torch.compile`."""
        self._scores = torch.compile(self._forward_and_score, **options)

    def _forward_and_score(self, inputs: Inputs, target: Tensor, needs: frozenset[str]) -> Scores:
        return per_sample_scores(self.criterion, forward(self.model, inputs), target, needs=needs)


def check_scoring(owner: str, every: int | None, mode: str) -> None:
    """ValueError, beginning with `owner`, unless these are a scoring_every and a scoring_mode."""
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"{owner}: scoring_every must be an int of at least 1, got {every}")
    if mode not in ("eval", "train"):
        raise ValueError(f"{owner}: scoring_mode must be 'eval' or 'train', got {mode!r}")


def check_autocast_dtype(owner: str, argument: str, dtype: torch.dtype | None) -> None:
    """ValueError unless autocast can run with `dtype`."""
    if dtype not in _DTYPES:
        raise ValueError(
            f"{owner}: {argument} must be torch.float16, torch.bfloat16 or None, got {dtype}"
        )


def autocast(
    dtype: torch.dtype | None, device: torch.device, *, cache_enabled: bool | None = None
) -> AbstractContextManager[Any]:
    """`torch.autocast` with `dtype`; without one, as the caller has it, but for the cache."""
    if dtype is None:
        if cache_enabled is None or not torch.is_autocast_enabled(device.type):
            return nullcontext()
        dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype, cache_enabled=cache_enabled)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs what is inside with the model in eval mode.

    Flag by flag: a model may hold some of its modules in eval mode for good, which
    ``model.train()`` would undo.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
