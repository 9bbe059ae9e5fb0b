"""A selective step as one CUDA graph: the host launches it and does nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsel.select.batch import Inputs, check_batch

if TYPE_CHECKING:
    from fastsel.select.step import SelectiveStep, StepResult

_WARM_UP_STEPS = 3


class CapturedStep:
    """A `SelectiveStep` captured as a CUDA graph; replaying it costs one launch.

    Everything is in the graph: scoring, the choice, the gather, forward, backward and the
    optimizer's step. So shapes are fixed, the optimizer must be made with ``capturable=True``, the
    model must be capturable itself, and the step always chooses. The three steps that warm up are
    taken on the example batch and count as training.

    Args:
        step: A step with ``switch="select"``, without scaler, gradient accumulation, `across_ranks`
            and `scoring_every`.
        inputs: A batch as the step takes it, on CUDA.
        target: Its targets.
        ids: Its positions in the data set, where the step needs them.

    Raises:
        ValueError: The batch is not on CUDA, or the step does what a graph cannot hold.

    Example:
        >>> captured = CapturedStep(step, inputs, target)  # doctest: +SKIP
        >>> result = captured(inputs, target)  # doctest: +SKIP
    """

    def __init__(
        self,
        step: SelectiveStep,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
    ) -> None:
        """Warms up and captures."""
        check_batch("CapturedStep", inputs, target)
        if not target.is_cuda:
            raise ValueError(f"CapturedStep: target must be on CUDA, got {target.device}")
        selection = step.selection
        wrong = [
            name
            for name, bad in (
                ("switch='select'", step.switch.force != "select"),
                ("no scaler", step.scaler is not None),
                ("accumulation_steps=1", step.accumulation_steps != 1),
                ("across_ranks=False", selection.across_ranks),
                ("scoring_every=None", selection.scoring_every is not None),
                ("no memory", selection.memory is not None),
            )
            if bad
        ]
        if wrong:
            raise ValueError(f"CapturedStep: step must have {', '.join(wrong)}")
        self._inputs = _copied(inputs)
        self._target = target.clone()
        self._ids = None if ids is None else ids.to(target.device, copy=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                step(self._inputs, self._target, self._ids)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = step(self._inputs, self._target, self._ids)
        self._selection = selection
        selection.steps -= 1  # a capture records the step and does not take it

    def __call__(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
    ) -> StepResult:
        """Takes the step; the result's tensors are overwritten by the next one.

        Raises:
            ValueError: The batch is of other parts or another shape than the captured one.
        """
        if (ids is None) != (self._ids is None):
            raise ValueError("CapturedStep: ids must be given both times, or neither")
        ours_by_name, theirs_by_name = dict(_parts(self._inputs)), dict(_parts(inputs))
        if ours_by_name.keys() != theirs_by_name.keys():
            raise ValueError(
                f"CapturedStep: inputs must be {', '.join(ours_by_name)} as captured, "
                f"got {', '.join(theirs_by_name)}"
            )
        _copy_into(self._target, target, "target")
        for name, ours in ours_by_name.items():
            _copy_into(ours, theirs_by_name[name], name)
        if self._ids is not None and ids is not None:
            _copy_into(self._ids, ids, "ids")
        self._graph.replay()
        self._selection.steps += 1
        return self._result


def _parts(inputs: Inputs) -> list[tuple[str, Tensor]]:
    if isinstance(inputs, Tensor):
        return [("inputs", inputs)]
    if isinstance(inputs, dict):
        return [(f"inputs[{key!r}]", inputs[key]) for key in sorted(inputs)]
    return [(f"inputs[{i}]", part) for i, part in enumerate(inputs)]


def _copied(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if isinstance(inputs, dict):
        return {key: part.clone() for key, part in inputs.items()}
    return tuple(part.clone() for part in inputs)


def _copy_into(ours: Tensor, theirs: Tensor, name: str) -> None:
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        raise ValueError(
            f"CapturedStep: {name} must be {list(ours.shape)} of {ours.dtype} as captured, "
            f"got {list(theirs.shape)} of {theirs.dtype}"
        )
    ours.copy_(theirs, non_blocking=True)
