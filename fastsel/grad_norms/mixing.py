"""Finds out whether a model or its loss mixes samples, so that none has a gradient of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsel.grad_norms.activations import history
from fastsel.grad_norms.checks import batch_first


class Mixing:
    """What is known of a model's samples, and what a forward left to find it out.

    Args:
        known: Whether there is nothing to find out.

    Attributes:
        known: The same, later on.
        running: Whether a backward that only looks is running.
    """

    def __init__(self, known: bool) -> None:
        self.known = known
        self.running = False
        self._output: Any = None
        self._layers: list[_Layer] = []

    def forget(self) -> None:
        """Forgets what the latest forward left."""
        self._output = None
        self._layers = []

    def saw_layer(
        self, name: str, out: Tensor, input: Tensor | None, rows: tuple[int, int] | None = None
    ) -> None:
        """Notes what a layer returned, if its input has no gradient: where samples come in."""
        if self.known or torch.compiler.is_compiling():
            return
        if input is None or not input.requires_grad:
            edge = torch.autograd.graph.get_gradient_edge(history(out))
            self._layers.append(_Layer(name, edge, out.shape, rows))

    def saw_output(self, output: Any) -> None:
        """Notes what the model returned."""
        if not self.known:
            self._output = output

    def check(self, loss: Tensor, batch_size: int | None, *, inside: bool) -> None:
        """Raises where the latest forward, looked at if `inside`, or its loss mixes samples."""
        output, layers = self._output, self._layers
        self.forget()
        if batch_size is None or batch_size < 2:
            return  # a batch of one sample tells nothing
        outputs = [
            out
            for out in _tensors(output)
            if out.requires_grad and out.dim() > 0 and out.shape[0] == batch_size
        ]
        if outputs:
            if inside and layers:
                refuse_mixed_samples(outputs, layers, batch_size)
            refuse_mixed_loss(loss, outputs, batch_size)
            self.known = True


class _Layer(NamedTuple):
    name: str
    edge: torch.autograd.graph.GradientEdge
    shape: torch.Size
    rows: tuple[int, int] | None  # as in `batch_first`


def may_look_inside(model: nn.Module) -> bool:
    """Whether a backward through the model has no effect but its gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return False
    # Sharded parameters are gathered, and their gradients reduced, by hooks on activations.
    return all(type(parameter) is nn.Parameter for parameter in model.parameters())


def refuse_mixed_samples(
    outputs: Sequence[Tensor], layers: Sequence[_Layer], batch_size: int
) -> None:
    """Raises where a sample's output depends on what a layer returned for another.

    One backward through the model, of outputs that are cleared for about half of the samples. So
    every mixing of the whole batch shows; that of a single pair may not.

    Args:
        outputs: What the model returned ``[B, ...]``.
        layers: Those where samples come in.
        batch_size: B.

    Raises:
        ValueError: Samples mix, naming the layer whose samples do.
    """
    # By the parity of the ones in a sample's number: neighbours differ, and so do halves.
    chosen = torch.tensor([i.bit_count() % 2 == 1 for i in range(batch_size)])
    masks = [chosen.to(out.device).view(-1, *[1] * (out.dim() - 1)) for out in outputs]
    probes = [_weights(out) * mask for out, mask in zip(outputs, masks, strict=True)]
    try:
        grads = torch.autograd.grad(
            outputs, [layer.edge for layer in layers], probes, retain_graph=True, allow_unused=True
        )
    except RuntimeError:  # a backward that may not be part of another, as a reentrant checkpoint's
        return
    for layer, grad in zip(layers, grads, strict=True):
        if grad is None:
            continue
        grad = batch_first(grad.reshape(layer.shape), layer.rows)
        if len(grad) == batch_size and _any(grad[~chosen.to(grad.device)]):
            raise ValueError(
                f"GradNorms: the model mixes samples: what layer {layer.name!r} returns at one "
                "place of the batch reaches the output at another, so that no sample has a "
                "gradient of its own. The first dimension must be the batch in every layer; "
                "GradNorms(..., mixed_loss='allow') gives the norms of what passes through each "
                "place of it"
            )


def _any(values: Tensor) -> bool:
    """Whether a number is not zero; what is not finite says nothing, as it may come of overflow."""
    return bool((values.nan_to_num(0, 0, 0) != 0).any())


def refuse_mixed_loss(loss: Tensor, outputs: Sequence[Tensor], batch_size: int) -> None:
    """Raises where the loss is no sum of functions of one sample's outputs each.

    Of such a sum the derivative by one sample's outputs does not depend on another's, so the
    Hessian by the model's outputs has no entry between samples. One product of it with a vector
    that is zero at every other sample shows whether that is so; it costs two backwards of the loss
    function alone.

    Args:
        loss: A scalar with its history, which is kept.
        outputs: What the model returned ``[B, ...]``.
        batch_size: B.

    Raises:
        ValueError: The loss mixes samples.
    """
    try:
        first = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
        grads = [None if grad is None or not grad.requires_grad else grad for grad in first]
        if all(grad is None for grad in grads):
            return  # a loss that is linear in the outputs
        places = torch.arange(batch_size, device=outputs[0].device)
        # Two samples differ in some bit of their numbers, so some probe has one and not the other.
        crossed = [
            (places >> bit & 1 == 0, _product(outputs, grads, places >> bit & 1 == 1))
            for bit in range((batch_size - 1).bit_length())
        ]
    except RuntimeError:  # torch's error of a function without a second derivative: no other will
        return
    for others, products in crossed:
        for product in products:
            if product is not None and _any(product[others]):
                _refuse()


def _refuse() -> None:
    raise ValueError(
        "GradNorms: the loss mixes samples: its derivative by one sample's output depends on "
        "another's, so that no sample has a gradient of its own; GradNorms(..., "
        "mixed_loss='allow') gives the norms of what passes through each sample"
    )


def _product(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], chosen: Tensor
) -> tuple[Tensor | None, ...]:
    """The Hessian times a vector that is zero outside the chosen samples."""
    probe = [(grad[chosen] * _weights(grad[chosen])).sum() for grad in grads if grad is not None]
    total = torch.stack(probe).sum()
    return torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _weights(like: Tensor) -> Tensor:
    """Numbers without a pattern that a loss might share; no random state is touched."""
    places = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return (places * 1.618 + 0.5).sin().to(like.dtype).reshape(like.shape)
