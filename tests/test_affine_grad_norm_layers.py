"""`affine_grad_norm_sq` and `bias_grad_norm_sq` against autograd, on torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

Norms = tuple[Tensor, Tensor]  # of weight and bias, [B] each


def per_sample_norms(
    layer: Callable[[Tensor, Tensor, Tensor], Tensor], weight: Tensor, bias: Tensor, x: Tensor
) -> Norms:
    """Squared norms of per-sample gradients by vmap(grad), the loss being sum(sin(output))."""

    def loss(weight: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
        return layer(sample[None], weight, bias).sin().sum()

    grads = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, x)
    of_weight, of_bias = (g.flatten(1).square().sum(1) for g in grads)
    return of_weight, of_bias


def our_norms(
    backend: Backend,
    layer: Callable[[Tensor, Tensor, Tensor], Tensor],
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    as_rows: Callable[[Tensor], Tensor],
) -> Norms:
    """The same from the normalised input and the output's gradient, as a backward pass has them."""
    normalized = layer(x, torch.ones_like(weight), torch.zeros_like(bias))
    output = layer(x, weight, bias).detach().requires_grad_()
    (grad_outputs,) = torch.autograd.grad(output.sin().sum(), output)
    rows, grads = as_rows(normalized), as_rows(grad_outputs)
    return backend.grad_norm_sq("affine", rows, grads), backend.grad_norm_sq("bias", grads)


def last(x: Tensor) -> Tensor:
    return x


def channels(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


LAYERS: dict[str, tuple[Any, tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (12,), w, b), (4, 9, 12), 12, last),
    "layer_norm_of_rows": (lambda x, w, b: F.layer_norm(x, (12,), w, b), (4, 12), 12, last),
    "rms_norm": (lambda x, w, b: F.rms_norm(x, (12,), w, 1e-6) + b, (4, 3, 5, 12), 12, last),
    "group_norm": (lambda x, w, b: F.group_norm(x, 3, w, b), (4, 12, 5, 7), 12, channels),
    "group_norm_of_a_line": (lambda x, w, b: F.group_norm(x, 2, w, b), (3, 6, 50), 6, channels),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        (3, 8, 4, 4),
        8,
        channels,
    ),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, torch.zeros_like(w) + 0.1, torch.ones_like(w) * 2, w, b),
        (5, 6, 3, 3),
        6,
        channels,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(LAYERS))
def test_layers(backend: Backend, name: str, dtype: torch.dtype) -> None:
    layer, shape, width, as_rows = LAYERS[name]
    x = torch.randn(shape, dtype=dtype)
    weight, bias = torch.randn(2, width, dtype=dtype)
    expected = per_sample_norms(layer, weight, bias, x)
    actual = our_norms(backend, layer, weight, bias, x, as_rows)
    # Float32: autograd's own gradients are off by some 1e-6.
    rtol = 1e-10 if dtype == torch.float64 else 2e-5
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), truth, rtol=rtol, atol=0)
