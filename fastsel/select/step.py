"""One training step on the chosen part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastsel.scores import Scores, per_sample_scores
from fastsel.select.selectors import Selector, make_selector

Inputs = Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]


class StepResult(NamedTuple):
    """What one `SelectiveStep` did.

    Attributes:
        loss: The loss it trained on, detached, without dimensions.
        indices: The samples it trained on ``[k]``, int64, ascending.
        scores: The scores of the whole batch, None where the selector needs none.
    """

    loss: Tensor
    indices: Tensor  # [k]
    scores: Scores | None


class SelectiveStep:
    """A training step that scores a batch, chooses part of it and trains on that part.

    Calling it runs three phases, which can also be called one by one: `score`, a forward of the
    whole batch without gradients, skipped where the selector needs no scores; `choose`; and
    `train`, the plain step on the chosen samples: ``optimizer.zero_grad(set_to_none=True)``,
    forward, `criterion`, backward, ``optimizer.step()``.

    `train` runs the model in whatever mode the caller put it. Scoring runs it in eval mode, so that
    batch normalisation counts no sample twice and dropout adds no noise to the ranking, and then
    puts every module back into the mode it was in, also when the forward fails. Until `train`
    starts, the step changes nothing: no weight, no gradient, no buffer of an eval-mode model, no
    optimizer state.

    Args:
        model: Called as ``model(inputs)`` for a tensor, ``model(*inputs)`` for a tuple or list and
            ``model(**inputs)`` for a dict.
        criterion: The loss, called as ``criterion(output, target)``; see
            `fastsel.scores.per_sample_scores` for what can be scored. It trains unchanged; should
            it give more than one value, their mean is trained on.
        optimizer: Any `torch.optim.Optimizer` whose ``step`` needs no closure.
        selector: A `Selector`, or the name of one in `SELECTORS`.
        rate: The share of the batch to train on, in (0, 1]; with the name of a selector only, and
            needed there.
        autocast_dtype: Runs both forwards and the criterion under `torch.autocast` with this dtype,
            ``float16`` or ``bfloat16``; None leaves autocast as the caller has it.
        scoring_mode: ``"eval"``, or ``"train"`` to score with each module in the mode it is in:
            dropout then draws and batch normalisation counts the batch once more.
        scaler: Scales the loss for float16 training.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `selector`, `rate` or `scoring_mode` is not one of those above.

    Example:
        >>> model = torch.nn.Linear(8, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = SelectiveStep(model, torch.nn.CrossEntropyLoss(), optimizer, "big_loss", 0.25)
        >>> result = step(torch.randn(32, 8), torch.randint(0, 3, (32,)))
        >>> result.indices.shape
        torch.Size([8])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        selector: Selector | str = "big_loss",
        rate: float | None = None,
        *,
        autocast_dtype: torch.dtype | None = None,
        scoring_mode: str = "eval",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Makes a step."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"SelectiveStep: model must be a torch.nn.Module, got {type(model).__name__}"
            )
        if not callable(criterion):
            raise TypeError(
                f"SelectiveStep: criterion must be callable, got {type(criterion).__name__}"
            )
        if autocast_dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(
                "SelectiveStep: autocast_dtype must be torch.float16, torch.bfloat16 or None, "
                f"got {autocast_dtype}"
            )
        if scoring_mode not in ("eval", "train"):
            raise ValueError(
                f"SelectiveStep: scoring_mode must be 'eval' or 'train', got {scoring_mode!r}"
            )
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.selector = _as_selector(selector, rate)
        self.autocast_dtype = autocast_dtype
        self.scoring_mode = scoring_mode
        self.scaler = scaler

    def __call__(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
    ) -> StepResult:
        """Scores, chooses and trains.

        Args:
            inputs: A tensor, or a tuple, list or dict of tensors, all with the same first dimension
                B of at least 1.
            target: The targets of the same B samples.

        Returns:
            The `StepResult`.

        Raises:
            TypeError: `inputs` or `target` is not of tensors.
            ValueError: The first dimensions differ, the batch is empty, or the criterion cannot be
                scored.
        """
        batch_size = _batch_size(inputs, target)
        scores = self.score(inputs, target)
        indices = self.choose(scores, batch_size, device=target.device)
        return StepResult(self.train(inputs, target, indices), indices, scores)

    def score(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
    ) -> Scores | None:
        """Scores the batch with one forward, or gives None if the selector needs no scores."""
        _batch_size(inputs, target)
        if not self.selector.needs:
            return None
        evaluating = _eval_mode(self.model) if self.scoring_mode == "eval" else nullcontext()
        # Autocast keeps the weights it has cast; those cast here carry no gradient and must not
        # reach the training forward of a caller who holds autocast open around the whole step.
        with torch.no_grad(), evaluating, self._autocast(target.device, cache_enabled=False):
            output = _forward(self.model, inputs)
            return per_sample_scores(self.criterion, output, target, needs=self.selector.needs)

    def choose(
        self, scores: Scores | None, batch_size: int, *, device: torch.device | None = None
    ) -> Tensor:
        """Chooses the samples to train on.

        Args:
            scores: What `score` gave.
            batch_size: B, which a selector without scores goes by.
            device: Where the indices are wanted; by default where the selector makes them.

        Returns:
            Indices ``[k]``, int64.

        Raises:
            ValueError: The scores are of another batch size, or lack what the selector needs.
        """
        if scores is None:
            scores = Scores(batch_size=batch_size, batch_device=device)
        elif scores.size != batch_size:
            raise ValueError(
                f"SelectiveStep: scores must be of the batch's {batch_size} samples, "
                f"got {scores.size}"
            )
        indices = self.selector(scores)
        return indices if device is None else indices.to(device)

    def train(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        indices: Tensor,  # [k]
    ) -> Tensor:
        """Takes one optimizer step on the samples at `indices`; gives its loss, detached."""
        _batch_size(inputs, target)
        if indices.numel() == 0:
            raise ValueError("SelectiveStep: indices must name at least one sample, got none")
        chosen = _take(inputs, indices)
        chosen_target = target.index_select(0, indices.to(target.device))
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast(target.device):
            loss = self.criterion(_forward(self.model, chosen), chosen_target)
            if loss.dim() > 0:
                loss = loss.mean()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return cast(Tensor, loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """The state of the selector; model, optimizer and scaler are the caller's to save."""
        return {"selector": self.selector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; ValueError if it is of another kind of selector."""
        if "selector" not in state:
            raise ValueError("SelectiveStep: state must have the entry 'selector'")
        self.selector.load_state_dict(state["selector"])

    def _autocast(
        self, device: torch.device, *, cache_enabled: bool | None = None
    ) -> AbstractContextManager[Any]:
        dtype = self.autocast_dtype
        if dtype is None:
            if cache_enabled is None or not torch.is_autocast_enabled(device.type):
                return nullcontext()
            dtype = torch.get_autocast_dtype(device.type)
        return torch.autocast(device.type, dtype=dtype, cache_enabled=cache_enabled)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Flag by flag: a model may hold some of its modules in eval mode for good, which model.train()
    # would undo.
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _as_selector(selector: Selector | str, rate: float | None) -> Selector:
    if isinstance(selector, str):
        if rate is None:
            raise ValueError(
                f"SelectiveStep: rate must be given with the selector's name {selector!r}"
            )
        return make_selector(selector, rate=rate)
    if not isinstance(selector, Selector):
        raise TypeError(
            f"SelectiveStep: selector must be a Selector or a name, got {type(selector).__name__}"
        )
    if rate is not None:
        raise ValueError(
            "SelectiveStep: rate must not be given beside a selector, which has its own, "
            f"got {rate}"
        )
    return selector


def _tensors(inputs: Inputs) -> list[tuple[str, Tensor]]:
    if isinstance(inputs, Tensor):
        return [("inputs", inputs)]
    if isinstance(inputs, dict):
        named = [(f"inputs[{key!r}]", value) for key, value in inputs.items()]
    elif isinstance(inputs, (tuple, list)):
        named = [(f"inputs[{i}]", value) for i, value in enumerate(inputs)]
    else:
        raise TypeError(
            "SelectiveStep: inputs must be a tensor, or a tuple, list or dict of tensors, "
            f"got {type(inputs).__name__}"
        )
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(f"SelectiveStep: {name} must be a tensor, got {type(value).__name__}")
    return named


def _batch_size(inputs: Inputs, target: Tensor) -> int:
    if not isinstance(target, Tensor):
        raise TypeError(f"SelectiveStep: target must be a tensor, got {type(target).__name__}")
    if target.dim() == 0:
        raise ValueError("SelectiveStep: target must be [B, ...], got a tensor without dimensions")
    batch_size = target.shape[0]
    for name, value in _tensors(inputs):
        if value.dim() == 0 or value.shape[0] != batch_size:
            raise ValueError(
                f"SelectiveStep: {name} must have the first dimension {batch_size} of target, "
                f"got shape {list(value.shape)}"
            )
    if batch_size == 0:
        raise ValueError("SelectiveStep: the batch must not be empty")
    return batch_size


def _forward(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs)


def _take(inputs: Inputs, indices: Tensor) -> Inputs:
    def rows(value: Tensor) -> Tensor:
        return value.index_select(0, indices.to(value.device))

    if isinstance(inputs, Tensor):
        return rows(inputs)
    if isinstance(inputs, dict):
        return {key: rows(value) for key, value in inputs.items()}
    return tuple(rows(value) for value in inputs)
