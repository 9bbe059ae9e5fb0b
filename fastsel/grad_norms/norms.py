"""`GradNorms`: the norm of every sample's gradient, from one ordinary backward."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsel.grad_norms.capture import Capture
from fastsel.grad_norms.hooks import install
from fastsel.grad_norms.noise import NoiseScale, noise_scale


class GradNorms:
    """The L2 norm of each sample's gradient, taken while the batch's gradient is computed.

    Around an ordinary forward and backward it sees what goes into each layer and the gradient of
    what comes out; these two determine every sample's gradient (Goodfellow 2015,
    arXiv:1510.01799), whose norm is taken without forming it. The model is not wrapped or changed.
    Both ways to use it::

        norms = fastsel.GradNorms(model)
        with norms:                                   # each step, or around many
            criterion(model(x), y).backward()
        norms.norms                                   # [B]

        norms.attach()                                # until detach()
        criterion(model(x), y).backward()
        norms.norms, norms.reset()

    Norms are exact for linear layers, convolutions and their transposes, embeddings, layer, RMS,
    group and instance norms, batch norm in eval mode, `torch.nn.MultiheadAttention`, LSTM, GRU and
    RNN; for subclasses of them, for weights used through `torch.nn.functional`, and for parameters
    that are tied or used several times. A parameter used in any other way raises, naming it, unless
    `register_norm_rule` covers its module or `missing` allows it. Frozen parameters do not count.

    Several forwards and backwards since `reset` (gradient accumulation) give the norms of all their
    samples, in order. Two forwards before one backward are taken for two views of the same samples.

    It works under autocast, with activation checkpointing, with DistributedDataParallel and
    ``fully_shard`` (norms are those of the rank's own samples, whole), and under
    ``torch.compile(fullgraph=True)``; there, a layer that runs several times in one forward must be
    named in `shared` or have been seen in an uncompiled step. Make one object and keep it: compiled
    code is tied to it.

    Args:
        model: The module whose parameters count.
        reduction: What the loss does over the batch. ``mean``: the norms are those of the samples'
            own losses, B times what each adds to the gradient. ``sum``: they are what each adds,
            for losses that are summed or weighted by hand.
        exact_grad: Leave torch's own backward alone, so that ``.grad`` is bit for bit what it would
            have been. By default, on the CPU in float32, some layers sum their weight's gradient
            from the very products whose norms are taken: equal to rounding, and cheaper.
        missing: What happens to parameters without a rule: ``raise``, or ``approximate``, which
            leaves them out: the norms are then lower bounds, and `missing_parameters` names what
            they lack.
        batch_norm: Batch norm in train mode mixes the samples: ``refuse``, or ``fixed_statistics``,
            which counts the batch's mean and variance as constants for the layer's own parameters;
            norms of layers before it are of what passes through each sample's activations.
        mixed_loss: A loss that is no sum over samples, such as a contrastive one, leaves no sample
            a gradient of its own. ``raise``: the first ``loss.backward()`` within the context
            looks at the loss's second derivative by the model's output, where it has one; and at
            the model, where a layer has as many positions as samples, so that nothing else tells
            which are which. ``allow``: norms are of what passes through each sample's activations.
        loss_scale: What the loss was multiplied by before the backward: a number such as
            ``1 / accumulation_steps``, or a `torch.amp.GradScaler`, asked when norms are read.
        shared: Names of parameters used several times in one forward; needed under torch.compile
            only, for what is not visible as tied.

    Attributes:
        model: The module.
        loss_scale: As given; may be changed between steps.

    Raises:
        TypeError: `model` is not a module.
        ValueError: An option is not one of its values, the model has no trained parameter, or
            `shared` names none of its parameters.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> norms = fastsel.GradNorms(layer)
        >>> with norms:
        ...     layer(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).mean().backward()
        >>> norms.norms  # of y = w x the gradient is x
        tensor([5., 2.])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        exact_grad: bool = False,
        missing: Literal["raise", "approximate"] = "raise",
        batch_norm: Literal["refuse", "fixed_statistics"] = "refuse",
        mixed_loss: Literal["raise", "allow"] = "raise",
        loss_scale: float | Tensor | torch.amp.GradScaler = 1.0,
        shared: Iterable[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"GradNorms: model must be a module, got {type(model).__name__}")
        for argument, value, allowed in (
            ("reduction", reduction, ("mean", "sum")),
            ("missing", missing, ("raise", "approximate")),
            ("batch_norm", batch_norm, ("refuse", "fixed_statistics")),
            ("mixed_loss", mixed_loss, ("raise", "allow")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"GradNorms: {argument} must be {allowed[0]!r} or {allowed[1]!r}, got {value!r}"
                )
        self.model = model
        self.loss_scale = loss_scale
        self._reduction = reduction
        self._capture = Capture(
            model,
            exact_grad=exact_grad,
            allow_missing=missing == "approximate",
            batch_statistics=batch_norm == "fixed_statistics",
            allow_mixed_loss=mixed_loss == "allow",
            shared=shared,
        )
        handles = install(self._capture)
        self._finalizer = weakref.finalize(self, _remove, handles)

    # ---- when norms are taken ----

    def __enter__(self) -> GradNorms:
        self.attach()
        self.reset()
        return self

    def __exit__(self, *details: object) -> None:
        self.detach()

    def attach(self) -> GradNorms:
        """Takes norms from now on, of forwards in this thread, until `detach`.

        Raises:
            RuntimeError: It does already.
        """
        if self._capture.active:
            raise RuntimeError("GradNorms: attached already; detach it first")
        self._capture.start()
        return self

    def detach(self) -> None:
        """Takes no more norms of new forwards; a backward of an old one still counts."""
        if self._capture.active:
            self._capture.stop()

    def reset(self) -> None:
        """Forgets all norms. Entering the object as a context does it too."""
        self._capture.records.reset()
        self._capture.missing.clear()
        self._capture.forget()

    # ---- what was found ----

    @property
    def norms(self) -> Tensor:
        """The norm of each sample's gradient over all parameters ``[B]``.

        Float32, or float64 where the model is.

        Raises:
            RuntimeError: No backward was seen, or a parameter got a gradient but no norm.
        """
        parts = [
            (torch.stack(list(squared.values())).sum(0).sqrt(), size)
            for squared, size in self._squared()
        ]
        return torch.cat([norm * self._scale(size) for norm, size in parts])

    @property
    def norms_by_parameter(self) -> dict[str, Tensor]:
        """The norm of each sample's gradient of each parameter ``[B]``, by its name in the model.

        A tied parameter comes under its first name. A sample in whose pass a parameter was not used
        has 0.
        """
        passes = self._squared()
        names = dict.fromkeys(name for squared, _ in passes for name in squared)
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for squared, size in passes:
            first = next(iter(squared.values()))
            for name, row in rows.items():
                row.append(squared.get(name, torch.zeros_like(first)).sqrt() * self._scale(size))
        return {name: torch.cat(row) for name, row in rows.items()}

    @property
    def missing_parameters(self) -> tuple[str, ...]:
        """Parameters that were used without a rule and are left out of the norms."""
        return tuple(sorted(self._capture.missing))

    def noise_scale(self, *, group: dist.ProcessGroup | None = None) -> NoiseScale:
        """The simple gradient noise scale, from the norms and the gradients that are there now.

        McCandlish et al. 2018 (arXiv:1812.06162), section 2.2 and appendix A.1, with batches of 1
        and of all N samples. Call it after the backward and before gradients are clipped or
        cleared; they must have been clear before. Parameters without a norm do not count. Passes of
        several sizes weigh their samples as their loss does: with ``reduction="mean"`` by one over
        the size.

        Args:
            group: The processes of data-parallel training that share the batch; one all-reduce.

        Returns:
            `NoiseScale`: ``scale`` in samples, ``trace`` of the gradients' covariance and
            ``grad_norm_sq``, each a tensor of one element. With little data the latter two can be
            negative, and the scale then means nothing: average them over steps and divide.

        Raises:
            RuntimeError: No backward was seen, or there are fewer than two samples.
        """
        passes = self._squared()
        names = {name for squared, _ in passes for name in squared}
        grads = [p.grad for n, p in self._capture.parameters() if n in names and p.grad is not None]
        sizes = [size for _, size in passes]
        means = sizes if self._reduction == "mean" else [sum(sizes)]
        divisor = len(sizes) if self._reduction == "mean" else sum(sizes)
        scale = float(divisor) * _number(self.loss_scale)
        return noise_scale(self.norms, grads, scale, means, group)

    def check_complete(self, names: Iterable[str]) -> None:
        """Raises where one of these parameters has no norm.

        ``loss.backward()`` is looked after by itself; this is for `torch.autograd.grad`.

        Args:
            names: Parameters that have a gradient, by their names in the model.

        Raises:
            RuntimeError: One has no norm, or no backward was seen.
        """
        squared = {name: values for one, _ in self._squared() for name, values in one.items()}
        self._capture.check_gradients(names, squared)

    # ---- the parts ----

    def _squared(self) -> list[tuple[dict[str, Tensor], int]]:
        """For each pass the squared norms by parameter, and its batch size."""
        passes = self._capture.records.finished()
        if not passes:
            raise RuntimeError(
                "GradNorms: no backward was seen: run the forward within the context, or between "
                "attach() and detach(), and call backward on its loss before reading norms"
            )
        found = [(one, one.by_parameter()) for one in passes]
        self._capture.check_complete(found)
        for _, squared in found:
            for name in self._capture.missing & squared.keys():
                del squared[name]  # a part of a norm bounds nothing
        return [(squared, len(next(iter(squared.values())))) for _, squared in found]

    def _scale(self, batch_size: int) -> float:
        return (batch_size if self._reduction == "mean" else 1) / _number(self.loss_scale)


def _number(scale: float | Tensor | torch.amp.GradScaler) -> float:
    if isinstance(scale, torch.amp.GradScaler):
        scale = scale.get_scale()
    number = float(scale)
    if not number > 0 or math.isinf(number):
        raise ValueError(f"GradNorms: loss_scale must be positive and finite, got {number}")
    return number


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
