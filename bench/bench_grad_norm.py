"""Per-sample gradient norms of one layer, from its input and the gradient of its output.

The limit of norms is reading both once; of the products, the flops of the cheaper form. Batches are
such that a call takes milliseconds on two cores. What stores more than `LIMIT_BYTES` is left out.
The rows of `linear_weight_grad` and `conv_weight_grad` show what the norms cost as a by-product of
the weight's gradient, beside torch's gradient alone and torch's with the norms taken after it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsel

LIMIT_BYTES = 2 * 2**30
Contender = Callable[[Tensor, Tensor], Any]


def norms_of(gradients: Tensor) -> Tensor:  # [B, ...] -> [B]
    """The norm of each sample's gradient."""
    norms: Tensor = gradients.flatten(1).norm(dim=1)
    return norms


def sampler(name: str, layer: nn.Module) -> Contender:
    """Opacus' rule for a layer's first trained parameter, as norms ``[B]``.

    Args:
        name: Where it is in `opacus.grad_sample`: ``linear.compute_linear_norm_sample``.
        layer: Gives the parameters and the geometry.
    """
    pytest.importorskip("opacus", reason="opacus is not installed: bench/requirements.txt")
    module, function = name.split(".")
    rule = getattr(importlib.import_module(f"opacus.grad_sample.{module}"), function)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def norms(first: Tensor, grad_outputs: Tensor) -> Tensor:
        result: Tensor = rule(layer, [first], grad_outputs)[parameters[0]]
        return norms_of(result) if "grad_sample" in name else result

    return norms


def normal(device: str, *shapes: Sequence[int]) -> Callable[[int], tuple[Tensor, ...]]:
    """Makes normal tensors of these shapes from a seed."""

    def inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        return tuple(torch.randn(*shape, generator=generator, device=device) for shape in shapes)

    return inputs


def skip_above_limit(what: str, floats: int) -> None:
    """Skips a contender that would store too much."""
    if 4 * floats > LIMIT_BYTES:
        pytest.skip(f"{what} takes {4 * floats / 1e9:.1f} GB")


# ---- linear layers ----

# How many positions all samples have together, by (d, p); a single position does no product.
TOKENS = {(64, 64): 65_536, (768, 768): 16_384, (768, 3072): 4096, (3072, 768): 4096}
SINGLE = {(64, 64): 131_072, (768, 768): 32_768, (768, 3072): 16_384, (3072, 768): 16_384}


def batch_of(positions: int, d: int, p: int) -> int:
    """Samples of so many positions."""
    return SINGLE[d, p] if positions == 1 else max(TOKENS[d, p] // positions, 2)


def bmm(activations: Tensor, grad_outputs: Tensor) -> Tensor:
    """Every sample's gradient, then the norms."""
    if activations.dim() == 2:
        activations, grad_outputs = activations[:, None], grad_outputs[:, None]
    return norms_of(torch.bmm(grad_outputs.transpose(1, 2), activations))


FORMS = {"fastsel": "auto", "fastsel, direct": "direct", "fastsel, gram": "gram"}


@pytest.mark.parametrize("contender", [*FORMS, "Opacus ghost", "torch.bmm"])
@pytest.mark.parametrize(("d", "p"), TOKENS)
@pytest.mark.parametrize("positions", [1, 128, 1024, 4096])
@pytest.mark.parametrize("device", harness.DEVICES)
def bench_linear_grad_norm(
    benchmark: harness.Benchmark, device: str, positions: int, d: int, p: int, contender: str
) -> None:
    """The norms of a linear layer's weight gradients, of samples of T positions."""
    batch = batch_of(positions, d, p)
    lead = (batch,) if positions == 1 else (batch, positions)
    function: Contender
    if contender in FORMS:
        if positions == 1 and contender != "fastsel":
            pytest.skip("a single position needs neither form")
        function = functools.partial(fastsel.linear_grad_norm_sq, form=FORMS[contender])  # type: ignore[arg-type]
    elif contender == "torch.bmm":
        skip_above_limit("the gradient of every sample", batch * d * p)
        function = bmm
    else:
        if positions > 1:
            skip_above_limit("a pair of Gram matrices of every sample", 2 * batch * positions**2)
        layer = nn.Linear(d, p, bias=False, device=device)
        function = sampler("linear.compute_linear_norm_sample", layer)
    harness.measure(
        benchmark,
        function,
        normal(device, (*lead, d), (*lead, p)),
        op="grad_norm",
        workload=f"linear {batch:,} x {positions:,} positions, {d} to {p}",
        contender=contender,
        device=device,
        bytes_moved=4 * batch * positions * (d + p),
    )


def linear_gradient(activations: Tensor, grad_outputs: Tensor) -> Tensor:
    """Torch's weight gradient."""
    return grad_outputs.flatten(0, 1).t() @ activations.flatten(0, 1)


def linear_gradient_and_norms(activations: Tensor, grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's weight gradient, and the norms beside it."""
    norms = fastsel.linear_grad_norm_sq(activations, grad_outputs)
    return linear_gradient(activations, grad_outputs), norms


WITH_GRADIENT: dict[str, Contender] = {
    "fastsel": fastsel.ops.linear_weight_grad,
    "torch, no norms": linear_gradient,
    "torch, norms beside": linear_gradient_and_norms,
}


@pytest.mark.parametrize("contender", WITH_GRADIENT)
@pytest.mark.parametrize(("d", "p"), TOKENS)
@pytest.mark.parametrize("positions", [128, 1024, 4096])
def bench_linear_weight_grad(
    benchmark: harness.Benchmark, positions: int, d: int, p: int, contender: str
) -> None:
    """A linear layer's weight gradient with the norms as a by-product."""
    batch = batch_of(positions, d, p)
    harness.measure(
        benchmark,
        WITH_GRADIENT[contender],
        normal("cpu", (batch, positions, d), (batch, positions, p)),
        op="grad_norm",
        workload=f"linear gradient and norms {batch:,} x {positions:,} positions, {d} to {p}",
        contender=contender,
        device="cpu",
        bytes_moved=4 * batch * positions * (d + p),
    )


# ---- convolutions ----

# Samples, input channels and size, and the layer: ResNet-18's on images of 32 x 32 and a depthwise.
CONVS: dict[str, tuple[int, int, int, Callable[[], nn.Conv2d]]] = {
    "3x3, 64 channels": (32, 64, 32, lambda: nn.Conv2d(64, 64, 3, 1, 1, bias=False)),
    "3x3, 128 channels": (32, 128, 16, lambda: nn.Conv2d(128, 128, 3, 1, 1, bias=False)),
    "3x3, 256 channels": (32, 256, 8, lambda: nn.Conv2d(256, 256, 3, 1, 1, bias=False)),
    "3x3, 512 channels": (32, 512, 4, lambda: nn.Conv2d(512, 512, 3, 1, 1, bias=False)),
    "1x1 stride 2, 64 to 128 channels": (
        128, 64, 32, lambda: nn.Conv2d(64, 128, 1, 2, bias=False),
    ),
    "3x3 depthwise, 256 channels": (
        128, 256, 14, lambda: nn.Conv2d(256, 256, 3, 1, 1, groups=256, bias=False),
    ),
}  # fmt: skip


def geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    """Kernel size, stride, padding, dilation and groups."""
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups


def unfold_and_bmm(layer: nn.Conv2d) -> Contender:
    """Images unfolded, every sample's gradient by groups, then the norms."""
    kernel, stride, padding, dilation, groups = geometry(layer)

    def norms(images: Tensor, grad_outputs: Tensor) -> Tensor:
        columns = F.unfold(images, kernel, dilation, padding, stride)  # [B, C k k, T]
        batch, _, positions = columns.shape
        columns = columns.view(batch * groups, -1, positions)
        grads = grad_outputs.reshape(batch * groups, -1, positions)
        return norms_of(torch.bmm(grads, columns.transpose(1, 2)).view(batch, -1))

    return norms


def gradient_of_each(layer: nn.Conv2d) -> Contender:
    """torch.func: torch's own weight gradient mapped over the samples, then the norms."""
    _, stride, padding, dilation, groups = geometry(layer)

    def gradient(image: Tensor, grad_output: Tensor) -> Any:
        return torch.ops.aten.convolution_backward(
            grad_output[None], image[None], layer.weight, None, stride, padding, dilation, False,
            [0, 0], groups, [False, True, False],
        )[1]  # fmt: skip

    mapped = torch.func.vmap(gradient)
    return lambda images, grads: norms_of(mapped(images, grads))


def ours(layer: nn.Conv2d) -> Contender:
    """The operator with the layer's geometry."""
    return lambda images, grads: fastsel.conv_grad_norm_sq(images, grads, *geometry(layer))


CONV_NORMS: dict[str, Callable[[nn.Conv2d], Contender]] = {
    "fastsel": ours,
    "unfold and bmm": unfold_and_bmm,
    "Opacus": lambda layer: sampler("conv.compute_conv_grad_sample", layer),
    "torch.func": gradient_of_each,
}


def conv_workload(case: str, device: str) -> tuple[nn.Conv2d, dict[str, Any]]:
    """The layer, and what `harness.measure` wants to know of its workload."""
    batch, channels, size, make = CONVS[case]
    layer = make().to(device)
    out = size // layer.stride[0]
    shapes = (batch, channels, size, size), (batch, layer.out_channels, out, out)
    return layer, {
        "inputs": normal(device, *shapes),
        "op": "grad_norm",
        "workload": f"conv {batch} x {channels} x {size} x {size}, {case}",
        "device": device,
        "bytes_moved": 4 * batch * (channels * size**2 + layer.out_channels * out**2),
    }


@pytest.mark.parametrize("contender", CONV_NORMS)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("device", harness.DEVICES)
def bench_conv_grad_norm(
    benchmark: harness.Benchmark, device: str, case: str, contender: str
) -> None:
    """The norms of a convolution's weight gradients."""
    layer, setup = conv_workload(case, device)
    function = CONV_NORMS[contender](layer)
    harness.measure(benchmark, function, contender=contender, **setup)


def conv_gradient(layer: nn.Conv2d) -> Contender:
    """Torch's gradient of weight and bias."""
    _, stride, padding, dilation, groups = geometry(layer)
    return lambda images, grads: torch.ops.aten.convolution_backward(
        grads, images, layer.weight, [layer.out_channels], stride, padding, dilation, False,
        [0, 0], groups, [False, True, True],
    )  # fmt: skip


def conv_gradient_and_norms(layer: nn.Conv2d) -> Contender:
    """The same, and the norms beside it."""
    gradient, norms = conv_gradient(layer), ours(layer)
    return lambda images, grads: (gradient(images, grads), norms(images, grads))


CONV_GRADIENTS: dict[str, Callable[[nn.Conv2d], Contender]] = {
    "fastsel": lambda layer: (
        lambda images, grads: fastsel.ops.conv_weight_grad(images, grads, *geometry(layer))
    ),
    "torch, no norms": conv_gradient,
    "torch, norms beside": conv_gradient_and_norms,
}


@pytest.mark.parametrize("contender", CONV_GRADIENTS)
@pytest.mark.parametrize("case", CONVS)
def bench_conv_weight_grad(benchmark: harness.Benchmark, case: str, contender: str) -> None:
    """A convolution's weight gradient with the norms as a by-product."""
    layer, setup = conv_workload(case, "cpu")
    setup["workload"] = setup["workload"].replace("conv", "conv gradient and norms", 1)
    function = CONV_GRADIENTS[contender](layer)
    harness.measure(benchmark, function, contender=contender, **setup)


# ---- normalisations, biases, embeddings ----

BATCH, LENGTH, FEATURES, VOCABULARY = 32, 1024, 768, 50_257
HIDDEN = (BATCH, LENGTH, FEATURES)


def eager_affine(normalized: Tensor, grad_outputs: Tensor) -> Tensor:
    """Every sample's gradient of the scale, then the norms."""
    return (normalized * grad_outputs).sum(1).square().sum(-1)


@pytest.mark.parametrize("contender", ["fastsel", "torch eager", "Opacus"])
@pytest.mark.parametrize("device", harness.DEVICES)
def bench_affine_grad_norm(benchmark: harness.Benchmark, device: str, contender: str) -> None:
    """The norms of a layer norm's gradients; Opacus' rule normalises again."""
    function: Contender = eager_affine
    if contender == "fastsel":
        function = fastsel.affine_grad_norm_sq
    elif contender == "Opacus":
        layer = nn.LayerNorm(FEATURES, device=device)
        layer.bias.requires_grad_(False)
        function = sampler("layer_norm.compute_layer_norm_grad_sample", layer)
    harness.measure(
        benchmark,
        function,
        normal(device, HIDDEN, HIDDEN),
        op="grad_norm",
        workload=f"layer norm's scale {BATCH} x {LENGTH} x {FEATURES}",
        contender=contender,
        device=device,
        bytes_moved=2 * 4 * BATCH * LENGTH * FEATURES,
    )


@pytest.mark.parametrize("contender", ["fastsel", "torch eager", "Opacus"])
@pytest.mark.parametrize("device", harness.DEVICES)
def bench_bias_grad_norm(benchmark: harness.Benchmark, device: str, contender: str) -> None:
    """The norms of a bias' gradients; Opacus' rule is that of its linear layer."""
    function: Callable[[Tensor], Any] = lambda grads: grads.sum(1).square().sum(-1)  # noqa: E731
    if contender == "fastsel":
        function = fastsel.bias_grad_norm_sq
    elif contender == "Opacus":
        layer = nn.Linear(FEATURES, FEATURES, device=device)
        layer.weight.requires_grad_(False)
        rule = sampler("linear.compute_linear_norm_sample", layer)
        function = lambda grads: rule(grads, grads)  # noqa: E731
    harness.measure(
        benchmark,
        function,
        normal(device, HIDDEN),
        op="grad_norm",
        workload=f"bias {BATCH} x {LENGTH} x {FEATURES}",
        contender=contender,
        device=device,
        bytes_moved=4 * BATCH * LENGTH * FEATURES,
    )


def eager_embedding(indices: Tensor, grad_outputs: Tensor) -> Tensor:
    """The products of the gradients at all pairs of positions with one token."""
    same = indices[:, :, None] == indices[:, None, :]  # [B, T, T]
    return (same * torch.bmm(grad_outputs, grad_outputs.transpose(1, 2))).sum((1, 2))


@pytest.mark.parametrize("contender", ["fastsel", "torch eager", "Opacus"])
@pytest.mark.parametrize("device", harness.DEVICES)
def bench_embedding_grad_norm(benchmark: harness.Benchmark, device: str, contender: str) -> None:
    """The norms of an embedding's gradients."""
    function: Contender = eager_embedding
    if contender == "fastsel":
        function = fastsel.embedding_grad_norm_sq
    elif contender == "Opacus":
        if device == "cuda":
            pytest.skip("Opacus' rule waits for the device: no graph can be captured")
        layer = nn.Embedding(VOCABULARY, FEATURES, device=device)
        function = sampler("embedding.compute_embedding_norm_sample", layer)

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        (grads,) = normal(device, HIDDEN)(seed)
        generator = torch.Generator(device).manual_seed(seed)
        tokens = torch.randint(VOCABULARY, HIDDEN[:2], generator=generator, device=device)
        return tokens, grads

    harness.measure(
        benchmark,
        function,
        inputs,
        op="grad_norm",
        workload=f"embedding {BATCH} x {LENGTH} x {FEATURES}, {VOCABULARY:,} tokens",
        contender=contender,
        device=device,
        bytes_moved=BATCH * LENGTH * (8 + 4 * FEATURES),
    )
