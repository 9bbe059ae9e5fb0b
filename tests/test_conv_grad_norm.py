"""`conv_grad_norm_sq` and `conv_weight_grad` against the float64 reference, on every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
from conftest import Backend, assert_same_bits, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsel
from fastsel import ops

# float32 products and sums over at most some thousand terms; sixteen-bit inputs are exact in
# float32.
RTOL = 1e-5
FORMS = ("auto", "direct", "gram")


class Conv(NamedTuple):
    """A convolution: channels, image and geometry."""

    batch: int
    channels: tuple[int, int]  # in, out
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What follows the tensors in the operators' arguments."""
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Normal inputs ``[B, C_in, ...]`` and output gradients ``[B, C_out, ...]``."""
        generator = torch.Generator().manual_seed(seed)
        size = ops._conv_grad_norm.output_size(
            self.size, self.kernel, self.stride, self.padding, self.dilation
        )
        x = torch.randn(self.batch, self.channels[0], *self.size, generator=generator)
        g = torch.randn(self.batch, self.channels[1], *size, generator=generator)
        return x.to(dtype), g.to(dtype)


CONVS = {
    "1d": Conv(3, (3, 8), (9,), (3,), (1,), (1,), (1,)),
    "1d-long": Conv(2, (2, 5), (600,), (5,), (2,), (4,), (2,)),
    "2d": Conv(3, (4, 6), (6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d-uneven": Conv(2, (4, 6), (10, 9), (3, 2), (2, 1), (1, 0), (1, 2), 2),
    "2d-pointwise": Conv(3, (17, 20), (5, 5), (1, 1), (1, 1), (0, 0), (1, 1)),
    "2d-strided": Conv(2, (8, 4), (8, 8), (1, 1), (2, 2), (0, 0), (1, 1)),
    "2d-wide-padding": Conv(2, (2, 3), (4, 4), (3, 3), (1, 1), (3, 2), (1, 1)),
    "depthwise": Conv(2, (8, 8), (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "depthwise-multiplier": Conv(2, (6, 12), (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "groups": Conv(2, (8, 12), (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "3d": Conv(2, (2, 3), (5, 6, 7), (3, 2, 3), (1, 2, 2), (1, 1, 0), (1, 1, 2)),
    "many-channels": Conv(2, (3, 70), (9, 9), (3, 3), (2, 2), (1, 1), (1, 1)),
}


def truth(conv: Conv, x: Tensor, g: Tensor) -> Tensor:
    """The reference as a tensor."""
    return torch.from_numpy(reference.conv_grad_norm_sq(to_numpy(x), to_numpy(g), *conv.geometry))


def check(actual: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Close, relative to each value."""
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_equals_reference(backend: Backend, name: str, dtype: torch.dtype, form: str) -> None:
    conv = CONVS[name]
    x, g = conv.tensors(dtype)
    norms = backend.grad_norm_sq("conv", x, g, *conv.geometry, form=form)
    assert norms.dtype == torch.float32
    check(norms, truth(conv, x, g))


@pytest.mark.parametrize("name", CONVS)
def test_reference_is_what_autograd_gives(name: str) -> None:
    conv = CONVS[name]
    x, g = conv.tensors(torch.float64)
    function = getattr(torch.nn.functional, f"conv{len(conv.size)}d")
    in_channels, out_channels = conv.channels
    weight = torch.randn(
        out_channels, in_channels // conv.groups, *conv.kernel, dtype=torch.float64
    )
    weight.requires_grad_()
    norms = []
    for x_b, g_b in zip(x, g, strict=True):
        out = function(
            x_b[None], weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        (grad,) = torch.autograd.grad(out, weight, g_b[None])
        norms.append(grad.square().sum())
    check(torch.stack(norms), truth(conv, x, g), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_several_chunks_and_blocks(cpu: Backend, form: str) -> None:
    # More positions than a chunk, more columns and channels than a block.
    conv = Conv(2, (100, 270), (20, 20), (3, 3), (1, 1), (1, 1), (1, 1))
    x, g = conv.tensors()
    check(cpu.grad_norm_sq("conv", x, g, *conv.geometry, form=form), truth(conv, x, g))


@pytest.mark.parametrize("name", CONVS)
def test_float64(cpu: Backend, name: str) -> None:
    conv = CONVS[name]
    x, g = conv.tensors(torch.float64)
    norms = cpu.grad_norm_sq("conv", x, g, *conv.geometry)
    assert norms.dtype == torch.float64
    check(norms, truth(conv, x, g), 1e-13)


@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(least, most)) for _ in range(dims))

    groups = data.draw(st.integers(1, 3))
    channels = (groups * data.draw(st.integers(1, 4)), groups * data.draw(st.integers(1, 20)))
    conv = Conv(
        data.draw(st.integers(0, 3)), channels, each(1, 8), each(1, 3), each(1, 3), each(0, 2),
        each(1, 2), groups,
    )  # fmt: skip
    form: Any = data.draw(st.sampled_from(FORMS))
    x, g = conv.tensors(seed=data.draw(st.integers(0, 99)))
    norms = fastsel.conv_grad_norm_sq(x, g, *conv.geometry, form=form)
    assert norms.shape == (conv.batch,)
    check(norms, truth(conv, x, g))
    result = ops.conv_weight_grad(x, g, *conv.geometry)
    check(result.weight_norm_sq, truth(conv, x, g))
    grads = reference.conv_weight_grads(to_numpy(x), to_numpy(g), *conv.geometry).sum(0)
    assert result.weight_grad.shape == grads.shape
    np.testing.assert_allclose(to_numpy(result.weight_grad), grads, rtol=1e-4, atol=1e-4)
    sums = to_numpy(g.flatten(2)).sum((0, 2))
    np.testing.assert_allclose(to_numpy(result.bias_grad), sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_not_finite_touches_its_sample_only(backend: Backend, form: str) -> None:
    conv = CONVS["2d"]
    x, g = conv.tensors()
    expected = truth(conv, x, g)
    g[1, 2, 3, 3] = float("nan")
    norms = backend.grad_norm_sq("conv", x, g, *conv.geometry, form=form).double().cpu()
    kept = torch.tensor([0, 2])
    check(norms[kept], expected[kept])
    assert norms[1].isnan()


def test_any_memory_format(backend: Backend) -> None:
    conv = CONVS["2d"]
    x, g = conv.tensors()
    expected = truth(conv, x, g)
    last = torch.channels_last
    moved = x.to(memory_format=last), g.to(memory_format=last)
    check(backend.grad_norm_sq("conv", *moved, *conv.geometry), expected)
    wide = torch.stack([x, x], 2)[:, :, 0], torch.stack([g, g], -1)[..., 1]
    check(backend.grad_norm_sq("conv", *wide, *conv.geometry), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_with_exchanged_roles(backend: Backend, groups: int) -> None:
    layer = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=False)
    x = torch.randn(3, 4, 5, 5)
    out = layer(x)
    g = torch.randn_like(out)
    norms = backend.grad_norm_sq("conv", g, x, [3, 3], [2, 2], [1, 1], [1, 1], groups).cpu()
    for b in range(3):
        (grad,) = torch.autograd.grad(layer(x[b : b + 1]), layer.weight, g[b : b + 1])
        torch.testing.assert_close(norms[b], grad.square().sum(), rtol=RTOL, atol=0)


def test_same_bits_at_any_thread_count(cpu: Backend, threads: None) -> None:
    conv = CONVS["many-channels"]
    x, g = conv.tensors()

    def results() -> tuple[Tensor, ...]:
        forms = [cpu.grad_norm_sq("conv", x, g, *conv.geometry, form=form) for form in FORMS]
        return (*forms, *ops.conv_weight_grad(x, g, *conv.geometry))

    torch.set_num_threads(1)
    expected = results()
    for count in (2, 5):
        torch.set_num_threads(count)
        for result, first in zip(results(), expected, strict=True):
            assert_same_bits(result, first)


@pytest.mark.parametrize("function", [fastsel.conv_grad_norm_sq, ops.conv_weight_grad])
def test_errors(function: Any) -> None:
    name = function.__name__
    conv = CONVS["2d"]
    x, g = conv.tensors()
    kernel, stride, padding, dilation, groups = conv.geometry
    with pytest.raises(TypeError, match=f"{name}: input must be float32.*got int32"):
        function(x.int(), g, *conv.geometry)
    with pytest.raises(TypeError, match="must have the dtype of input, float32, got float16"):
        function(x, g.half(), *conv.geometry)
    with pytest.raises(ValueError, match=r"must be \[B, C, L\].*got shape \[4, 6\]"):
        function(x[0, :, :, 0], g[0, :, :, 0], *conv.geometry)
    with pytest.raises(ValueError, match="batch size and the number of dimensions of input"):
        function(x, g[:1], *conv.geometry)
    with pytest.raises(ValueError, match=r"stride must be 2 integers of at least 1, got \[1\]"):
        function(x, g, kernel, [1], padding, dilation, groups)
    with pytest.raises(
        ValueError, match=r"padding must be 2 integers of at least 0, got \[1, -1\]"
    ):
        function(x, g, kernel, stride, [1, -1], dilation, groups)
    with pytest.raises(ValueError, match=r"groups must divide the 4 channels.*got 3"):
        function(x, g, kernel, stride, padding, dilation, 3)
    with pytest.raises(ValueError, match=r"grad_outputs must be \[3, 4\] along its spatial.*got"):
        function(x, g, kernel, [2, 2], padding, dilation, groups)


def test_the_operator_checks_too(backend: Backend) -> None:
    conv = CONVS["2d"]
    x, g = (tensor.to(backend.device) for tensor in conv.tensors())
    kernel, stride, padding, dilation, groups = conv.geometry
    with pytest.raises(RuntimeError, match="conv_grad_norm_sq: groups must divide"):
        backend.ops.conv_grad_norm_sq(x, g, kernel, stride, padding, dilation, 3)
    with pytest.raises(RuntimeError, match="must have 3 positions along spatial dimension 0"):
        backend.ops.conv_grad_norm_sq(x, g, kernel, [2, 2], padding, dilation, groups)
