"""Backwards within a `Capture`: it stays on, as what is checkpointed runs again.

torch leaves a mode while it runs a function that the mode has seen. Of edges of the graph it sees
nothing, so they are handed on in the tensors' place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

Call = Callable[..., Any]


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) or not isinstance(value, Sequence) else list(value)


def _edges(values: Sequence[Any]) -> list[Any]:
    return [get_gradient_edge(v) if isinstance(v, Tensor) else v for v in values]


def _starts(values: Sequence[Any], grads: Any) -> list[Any] | None:
    """The gradients that a backward starts with; None where torch is to say what is wrong."""
    given = [None] * len(values) if grads is None else _listed(grads)
    found: list[Any] = []
    if len(given) != len(values):
        return None
    for value, grad in zip(values, given, strict=True):
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        if grad is None and value.numel() != 1:
            return None
        found.append(torch.ones_like(value) if grad is None else grad)
    return found


def backward(
    capture: Capture,
    func: Call,
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """`torch.autograd.backward`."""
    values = _listed(tensors)
    starts = _starts(values, grad_tensors)
    wanted = None if inputs is None else _listed(inputs)
    if starts is None or any(not v.requires_grad for v in wanted or () if isinstance(v, Tensor)):
        func(tensors, grad_tensors, retain_graph, create_graph, inputs)
        return
    if wanted is None and len(values) == 1:
        capture.check_loss(values[0], starts[0])
    ends = None if wanted is None else _edges(wanted)
    edges = _edges(values)
    with capture:
        torch.autograd.backward(edges, starts, retain_graph, create_graph, inputs=ends)


def tensor_backward(
    capture: Capture,
    func: Call,
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """`Tensor.backward`."""
    backward(capture, torch.autograd.backward, loss, gradient, retain_graph, create_graph, inputs)


def grad(
    capture: Capture,
    func: Call,
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """`torch.autograd.grad`."""
    values, wanted = _listed(outputs), _listed(inputs)
    starts = _starts(values, grad_outputs)
    seen = all(not isinstance(v, Tensor) or v.requires_grad for v in wanted)
    if starts is None or not seen or is_grads_batched or materialize_grads:
        return func(
            outputs, inputs, grad_outputs, retain_graph, create_graph, only_inputs,
            allow_unused, is_grads_batched, materialize_grads,
        )  # fmt: skip
    edges, ends = _edges(values), _edges(wanted)
    with capture:
        return torch.autograd.grad(
            edges, ends, starts, retain_graph, create_graph, allow_unused=bool(allow_unused)
        )


HANDLERS: dict[Call, Call] = {
    Tensor.backward: tensor_backward,
    torch.autograd.backward: backward,
    torch.autograd.grad: grad,
}
