"""What the adapters share: a step that a framework takes, rows of its batches, checks, states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import PackedSequence

from fastsel.data import optional
from fastsel.select import ranks
from fastsel.select.adaselection import AdaSelection
from fastsel.select.batch import Inputs, blanked, forward, rebuilt
from fastsel.select.clock import Stopwatch
from fastsel.select.scoring import autocast, eval_mode
from fastsel.select.selection import BatchSelection
from fastsel.select.selector import Selector
from fastsel.select.switch import Plan


class RunningStep:
    """One training step that a framework takes, from its batch to its optimizer's step.

    Args:
        selection: What chooses.
        device: Where the step runs.
        model: What is trained, as the scoring forward would call it.

    Attributes:
        plan: What the step is to do.
        share: What was chosen; None before that, and in a plain step.
        batch_size: B, 0 until a batch was seen.
    """

    def __init__(self, selection: BatchSelection, device: torch.device, model: nn.Module) -> None:
        """Starts the step's clock."""
        self.plan: Plan = selection.plan()
        self.share: ranks.Share | None = None
        self.batch_size = 0
        self._selection = selection
        self._model = model
        self._watch: Stopwatch | None = selection.start(self.plan, device)
        self._scores: Any = None
        self._measured: Tensor | None = None
        self._trained = False

    @property
    def wants_output(self) -> bool:
        """Whether `trained` has a use for the training forward's output."""
        if self._trained:
            return False
        measures = self.plan.measure and not self.plan.select
        return measures or self._selection.memory is not None

    @property
    def fraction(self) -> float:
        """The share of the batch's samples that the step trains on."""
        if self.share is None:
            return 1.0
        return len(self.share.choice.indices) / max(self.batch_size, 1)

    def choose(self, inputs: Inputs, target: Tensor, ids: Tensor | None) -> ranks.Share | None:
        """What to train on; None for the whole batch. Asked again, it gives the same answer.

        Raises:
            TypeError: Inputs or target are not of tensors.
            ValueError: They are not of one batch, or the choice has weights, which the framework's
                own training step cannot apply.
        """
        if self.batch_size:  # optimizers with a closure take the step's forward several times
            return self.share
        self.batch_size = batch_size = self._selection.check(inputs, target, ids)
        if not self.plan.select:
            return None
        self._scores = self._selection.score(inputs, target, ids, plan=self.plan)
        share = self._selection.choose(
            self._scores, batch_size, device=target.device, plan=self.plan
        )
        if share.choice.weights is not None:
            raise ValueError(_weights_message(self._selection.owner, self._selection.selector))
        self.share = share
        return share

    def take(self, rows: Callable[[Any, Tensor], Any], batch: Any) -> Any:
        """The chosen rows of the framework's batch, all of it in a plain step."""
        if self.share is None:
            return batch
        taken = rows(batch, self.share.choice.indices)
        return taken if self.share.usable is None else blanked(taken, self.share.usable)

    def trained(
        self,
        output: Any,  # [k, ...], or [B, ...] in a plain step
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None,  # [B]
    ) -> None:
        """Learns from the training forward; `output` is None if that could not be observed.

        Raises:
            ValueError: There is a loss memory, and no output to fill it from.
        """
        if not self.wants_output:
            return
        self._trained = True
        selection = self._selection
        if output is None and selection.memory is not None:
            raise ValueError(
                f"{selection.owner}: a loss memory needs the output of the training forward, but "
                "the training step did not call the model's forward exactly once"
            )
        if self.share is not None:
            indices = self.share.choice.indices
            if ids is not None:
                ids = ids.to(indices.device, non_blocking=indices.is_cuda).index_select(0, indices)
            selection.remember(output, target.index_select(0, indices), ids)
            return
        if not self.plan.measure:
            selection.remember(output, target, ids)
            return
        if self._watch is not None:
            self._watch.mark("step")
        if output is None:
            output = self._forward_again(inputs, target)
        self._measured = selection.measure_output(output, inputs, target, ids)
        if self._watch is not None:
            self._watch.mark("measure")

    def finish(self, *, timed: bool = True) -> None:
        """Ends the step; with `timed` False its seconds say nothing, as when it was cut short."""
        selection, watch = self._selection, self._watch
        if watch is not None:
            watch.mark("step")
            if self.plan.measure and self.share is not None:
                self._measured = selection.share_of(self._scores, self.share)
                watch.mark("measure")
        extended = self.plan.select and selection.scores_were_extended
        selection.finish(self.plan, watch, share=self._measured, timed=timed and not extended)

    def _forward_again(self, inputs: Inputs, target: Tensor) -> Any:
        scorer = self._selection.scorer
        casting = autocast(scorer.autocast_dtype, target.device, cache_enabled=False)
        with torch.no_grad(), eval_mode(self._model), casting:
            return forward(self._model, inputs)


class Figures:
    """What a log is told: means since it was told last, and what the selector and switch think."""

    def __init__(self) -> None:
        """Starts with no steps."""
        self._steps = 0
        self._fractions = 0.0
        self._selected = 0

    def add(self, step: RunningStep) -> None:
        """Counts a step."""
        self._steps += 1
        self._fractions += step.fraction
        self._selected += step.plan.select

    def take(self, selection: BatchSelection) -> dict[str, float]:
        """The figures by name; waits for the device if the selector's weights are among them."""
        steps = max(self._steps, 1)
        figures = {
            "fastsel/chosen": self._fractions / steps,
            "fastsel/selecting": self._selected / steps,
        }
        for name, value in (("share", selection.switch.share), ("cost", selection.switch.cost)):
            if value is not None:
                figures[f"fastsel/{name}"] = value
        if isinstance(selection.selector, AdaSelection):
            for name, weight in selection.selector.weights.items():
                figures[f"fastsel/weight/{name}"] = weight
        self._steps, self._fractions, self._selected = 0, 0.0, 0
        return figures


def make_selection(
    owner: str,
    criterion: Any,
    selector: Selector | str,
    rate: float | None,
    options: dict[str, Any],
) -> BatchSelection:
    """A selection without a model yet; its scorer gets that later, unless there is a scoring model.

    Raises:
        TypeError: An argument is of the wrong type, or an option unknown.
        ValueError: The arguments do not fit together, or the selector gives weights.
    """
    selection = BatchSelection(nn.Identity(), criterion, selector, rate, owner=owner, **options)
    if selection.selector.gives_weights:
        raise ValueError(_weights_message(owner, selection.selector))
    return selection


def take_rows(batch: Any, indices: Tensor, batch_size: int) -> Any:
    """The rows at `indices` of everything in a batch that has one row a sample.

    That is every tensor whose first dimension is B, and every list or tuple of B texts or numbers.
    Dicts, lists, tuples and named tuples are gone through and keep their types. A list or tuple of
    B entries none of which has a row a sample, such as texts, has its entries taken. Other tensors,
    texts, numbers and None stay as they are.

    Args:
        batch: The batch, as the framework hands it to the training step.
        indices: The rows ``[k]``, int64.
        batch_size: B.

    Raises:
        TypeError: Something in the batch is of another type, or of B entries of a list some have a
            row a sample and some have not: it cannot be told what they are.

    Example:
        >>> take_rows({"x": torch.arange(3), "names": ["a", "b", "c"]}, torch.tensor([0, 2]), 3)
        {'x': tensor([0, 2]), 'names': ['a', 'c']}
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or batch.shape[0] != batch_size:
            return batch
        return batch.index_select(0, indices.to(batch.device))
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        return batch
    kind: Any = type(batch)
    if isinstance(batch, Mapping):
        taken = {key: take_rows(part, indices, batch_size) for key, part in batch.items()}
        return rebuilt(batch, taken)
    if not isinstance(batch, (list, tuple)) or isinstance(batch, PackedSequence):
        raise TypeError(
            "take_rows: batch must be made of tensors, dicts, lists, tuples, texts and numbers, "
            f"got {kind.__name__}"
        )
    by_sample = [_has_rows(part, batch_size) for part in batch]
    if len(batch) != batch_size or all(by_sample):
        return rebuilt(batch, [take_rows(part, indices, batch_size) for part in batch])
    if any(by_sample):
        raise TypeError(
            f"take_rows: batch must not hold a {kind.__name__} of as many entries as samples, "
            f"{batch_size}, of which some have {batch_size} rows themselves; pack it into a dict, "
            "or take its rows yourself"
        )
    return rebuilt(batch, [batch[row] for row in indices.tolist()])


def _has_rows(part: Any, batch_size: int) -> bool:
    """Whether there is a tensor with a row a sample in it."""
    if isinstance(part, Tensor):
        return part.dim() > 0 and part.shape[0] == batch_size
    if isinstance(part, Mapping):
        return any(_has_rows(value, batch_size) for value in part.values())
    return isinstance(part, (list, tuple)) and any(_has_rows(value, batch_size) for value in part)


def require(module: str, extra: str) -> Any:
    """Imports a library for the adapter `extra`; MissingPackageError says how to install it."""
    return optional.require(module, f"fastsel.integrations.{extra}", extra)


def gather_states(state: dict[str, Any], group: Any = None) -> dict[str, Any]:
    """The states of all ranks, for a checkpoint that one of them writes; every rank must ask."""
    states: list[Any] = [on_cpu(state)] * ranks.world_size(group)
    if len(states) > 1:
        distributed.all_gather_object(states, states[0], group=group)
    return {"ranks": states}


def own_state(owner: str, gathered: dict[str, Any], group: Any = None) -> dict[str, Any]:
    """This rank's part of what `gather_states` gave; the first one's if the ranks are others now.

    Raises:
        ValueError: It is nothing that `gather_states` gave.
    """
    states = gathered.get("ranks")
    if not isinstance(states, list) or not states:
        raise ValueError(f"{owner}: state must have 'ranks', a list of at least one state")
    world_size = ranks.world_size(group)
    if len(states) != world_size:
        warnings.warn(
            f"{owner}: the state was saved by {len(states)} ranks and is loaded by {world_size}; "
            "every rank takes the first one's",
            stacklevel=2,
        )
        return dict(states[0])
    return dict(states[distributed.get_rank(group) if world_size > 1 else 0])


def on_cpu(state: Any) -> Any:
    """A state with its tensors on the CPU, so that any machine can load it."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: on_cpu(part) for key, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_cpu(part) for part in state)
    return state


def _weights_message(owner: str, selector: Selector) -> str:
    return (
        f"{owner}: the selector {selector.name!r} gives weights, which the framework's own "
        "training step cannot apply; take one without, or fastsel.SelectiveStep in a plain loop"
    )
