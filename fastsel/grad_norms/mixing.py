"""Finds out whether a model or its loss mixes samples, so that none has a gradient of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastsel.grad_norms.activations import history
from fastsel.grad_norms.checks import batch_first


class Mixing:
    """What is known of a model's samples, and what forwards left to find it out.

    The loss is always looked at, the model only where a layer that mixes positions has as many of
    them as there are samples: then nothing else tells that the model takes one for the other.

    Args:
        known: Whether there is nothing to find out.

    Attributes:
        known: The same, later on.
        running: Whether a backward that only looks is running.
    """

    def __init__(self, known: bool) -> None:
        self.known = known
        self.running = False
        self._ambiguous = ""
        self._outputs: list[Any] = []
        self._layers: list[_Layer] = []

    def forget(self) -> None:
        """Forgets what forwards left."""
        self._ambiguous = ""
        self._outputs = []
        self._layers = []

    def saw_square(self, name: str) -> None:
        """Notes a layer whose positions, which it mixes, are as many as the samples."""
        if not torch.compiler.is_compiling():
            self._ambiguous = self._ambiguous or name

    def saw_layer(
        self, name: str, out: Tensor, input: Tensor | None, rows: tuple[int, int] | None = None
    ) -> None:
        """Notes what a layer returned, if samples come in there: its input has no history."""
        if self.known or torch.compiler.is_compiling() or len(self._layers) >= _MOST:
            return
        if input is None or input.is_leaf:
            edge = get_gradient_edge(history(out))
            self._layers.append(_Layer(name, edge, out.shape, rows))

    def saw_output(self, output: Any) -> None:
        """Notes what the model returned, of the latest forwards."""
        if not self.known:
            self._outputs = [*self._outputs[-_MOST + 1 :], output]

    def check(
        self, loss: Tensor, gradient: Tensor | None, batch_size: int | None, *, inside: bool
    ) -> None:
        """Raises where the loss mixes samples, or the model does, which is looked at if `inside`.

        Args:
            loss: With its history, which is kept.
            gradient: That of the backward; None of a scalar.
            batch_size: B.
            inside: Whether a backward through the model may be run.
        """
        outputs = [
            out
            for out in _tensors(self._outputs)
            if out.requires_grad and not out.is_leaf and out.dim() > 0
        ]
        layers, ambiguous = self._layers, self._ambiguous
        self.forget()
        if batch_size is None or batch_size < 2:
            return  # a batch of one sample tells nothing
        kept = [(out, out.grad) for out in outputs if out.retains_grad]
        try:
            if ambiguous and inside and layers:
                refuse_mixed_samples(outputs, layers, batch_size, ambiguous)
            firsts = [out for out in outputs if out.shape[0] == batch_size]
            if firsts and not _waits(loss, firsts):
                seconds = [out for out in firsts if out.dim() > 1 and out.shape[1] == batch_size]
                dims = (0, 1) if ambiguous and len(seconds) == len(firsts) else (0,)
                refuse_mixed_loss(loss, gradient, firsts, batch_size, dims)
                # Positions and samples of different number would have been told apart before.
                self.known = True
        finally:
            for out, grad in kept:
                out.grad = grad


# How many outputs and layers are kept until a backward comes.
_MOST = 8


class _Layer(NamedTuple):
    name: str
    edge: GradientEdge
    shape: torch.Size
    rows: tuple[int, int] | None  # as in `batch_first`


def may_look_inside(model: nn.Module) -> bool:
    """Whether a backward through the model has no effect but its gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return False
    # Sharded parameters are gathered, and their gradients reduced, by hooks on activations.
    return all(type(parameter) is nn.Parameter for parameter in model.parameters())


def refuse_mixed_samples(
    outputs: Sequence[Tensor], layers: Sequence[_Layer], batch_size: int, ambiguous: str
) -> None:
    """Raises where a sample's output depends on what a layer returned for another.

    Backwards through the model, of outputs that are cleared for about half of the samples. So every
    mixing of the whole batch shows; that of a single pair may not. Where an output has several
    dimensions of the batch's size, one along which nothing mixes is enough.

    Args:
        outputs: What the model returned.
        layers: Those where samples come in.
        batch_size: B.
        ambiguous: The layer that gave rise to it.

    Raises:
        ValueError: Samples mix, naming the layer whose samples do.
    """
    # By the parity of the ones in a sample's number: neighbours differ, and so do halves.
    chosen = torch.tensor([i.bit_count() % 2 == 1 for i in range(batch_size)])
    edges = [layer.edge for layer in layers]
    for out in outputs:
        mixed = []
        for dim in [i for i, size in enumerate(out.shape) if size == batch_size]:
            mask = chosen.to(out.device).view(*[-1 if i == dim else 1 for i in range(out.dim())])
            try:
                grads = torch.autograd.grad(
                    [get_gradient_edge(out)], edges, [_weights(out) * mask], retain_graph=True,
                    allow_unused=True,
                )  # fmt: skip
            except RuntimeError as error:
                if "Checkpointing is not compatible" not in str(error):
                    raise
                return  # a reentrant checkpoint's backward cannot be part of another
            mixed.append([_mixes(g, layer, chosen) for g, layer in zip(grads, layers, strict=True)])
        if mixed and all(any(one) for one in mixed):
            name = layers[mixed[0].index(True)].name
            raise ValueError(
                f"GradNorms: the model mixes samples: layer {ambiguous!r} has as many positions as "
                f"there are samples, and what layer {name!r} returns at one place of its first "
                "dimension reaches the output at another, so that it is not the batch: it must be "
                "in every layer. GradNorms(..., mixed_loss='allow') gives the norms of what passes "
                "through each place of it"
            )


def _mixes(grad: Tensor | None, layer: _Layer, chosen: Tensor) -> bool:
    """Whether a layer's output has a gradient for samples that are not chosen."""
    if grad is None:
        return False
    grad = batch_first(grad.reshape(layer.shape), layer.rows).nan_to_num(0, 0, 0).abs()
    if len(grad) != len(chosen) or grad.numel() == 0:
        return False
    # Sums over the whole batch that cancel leave rounding behind.
    return bool(grad[~chosen.to(grad.device)].max() > 1e-4 * grad.max())


def _any(values: Tensor) -> bool:
    """Whether a number is not zero; what is not finite says nothing, as it may come of overflow."""
    return bool((values.nan_to_num(0, 0, 0) != 0).any())


def _waits(loss: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether a backward of the loss would tell DistributedDataParallel that one has begun."""
    ends = {out.grad_fn for out in outputs}
    seen: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or node in ends:
            continue
        if node.name() == "_DDPSinkBackward":
            return True
        seen.add(node)
        ahead.extend(function for function, _ in node.next_functions)
    return False


def refuse_mixed_loss(
    loss: Tensor,
    gradient: Tensor | None,
    outputs: Sequence[Tensor],
    batch_size: int,
    dims: Sequence[int] = (0,),
) -> None:
    """Raises where the loss is no sum of functions of one sample's outputs each.

    Of such a sum the derivative by one sample's outputs does not depend on another's, so the
    Hessian by the model's outputs has no entry between samples. One product of it with a vector
    that is zero at every other sample shows whether that is so; it costs two backwards of the loss
    function alone.

    Args:
        loss: With its history, which is kept.
        gradient: That of the backward; None of a scalar.
        outputs: What the model returned ``[B, ...]``.
        batch_size: B.
        dims: Of the outputs' dimensions those that may be the batch; one that does not mix will do.

    Raises:
        ValueError: The loss mixes samples.
    """
    try:
        edges = [get_gradient_edge(out) for out in outputs]
        gradient = torch.ones_like(loss) if gradient is None else gradient
        first = torch.autograd.grad(
            [get_gradient_edge(loss)], edges, [gradient], create_graph=True, allow_unused=True
        )
        grads = [None if grad is None or not grad.requires_grad else grad for grad in first]
        if all(grad is None for grad in grads):
            return  # a loss that is linear in the outputs
        places = torch.arange(batch_size, device=outputs[0].device)
        # Two samples differ in some bit of their numbers, so some probe has one and not the other.
        bits = [places >> bit & 1 == 1 for bit in range((batch_size - 1).bit_length())]
        crossed = [[_product(edges, grads, one, dim) for one in bits] for dim in dims]
    except RuntimeError:  # torch's error of a function without a second derivative: no other will
        return
    if all(
        any(
            _any(product.movedim(dim, 0)[~one])
            for one, products in zip(bits, found, strict=True)
            for product in products
            if product is not None
        )
        for dim, found in zip(dims, crossed, strict=True)
    ):
        raise ValueError(
            "GradNorms: the loss mixes samples: its derivative by one sample's output depends on "
            "another's, so that no sample has a gradient of its own; GradNorms(..., "
            "mixed_loss='allow') gives the norms of what passes through each sample"
        )


def _product(
    edges: Sequence[GradientEdge], grads: Sequence[Tensor | None], chosen: Tensor, dim: int
) -> tuple[Tensor | None, ...]:
    """The Hessian times a vector that is zero outside the chosen samples."""
    parts = [grad.movedim(dim, 0)[chosen] for grad in grads if grad is not None]
    total = torch.stack([(part * _weights(part)).sum() for part in parts]).sum()
    return torch.autograd.grad(
        [get_gradient_edge(total)], edges, [torch.ones_like(total)], retain_graph=True,
        allow_unused=True,
    )  # fmt: skip


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _weights(like: Tensor) -> Tensor:
    """Numbers without a pattern that a loss might share; no random state is touched."""
    places = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return (places * 1.618 + 0.5).sin().to(like.dtype).reshape(like.shape)
