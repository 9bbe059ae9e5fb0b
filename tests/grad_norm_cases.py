"""Calls of the gradient norm operators that reach every kernel, for the tests of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import reference
import torch
from conftest import assert_same_bits, set_simt_order, to_numpy
from fastsel_native import grad_norm
from numpy.typing import NDArray
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["direct", "gram", "auto"]
ORDERS = [("reverse", 0), ("random", 1), ("random", 2)]

# Products are exact (16-bit values) or right to 21 bits (float32 values), sums of them in float32.
# That is relative to sums of magnitudes: what is left of random terms is some ten times smaller in
# the direct form, and less in the Gram form, which adds products of two such sums.
TOLERANCE = {"direct": 2e-6, "gram": 2e-5, "auto": 2e-5}


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    """Values with all their bits in use."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_norms(actual: Tensor, expected: NDArray[np.float64], form: str) -> None:
    """Float32 norms [B] within the form's tolerance."""
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=TOLERANCE[form], atol=0)


def same_in_every_order(run: Callable[[], Tensor]) -> None:
    """The bits must not move: a missing barrier or wait shows as a result that does."""
    set_simt_order("forward")
    first = run()
    for order, seed in ORDERS:
        set_simt_order(order, seed)
        assert_same_bits(run(), first)


class Linear(NamedTuple):
    """Sizes of a linear layer's call."""

    batch: int
    positions: int
    d: int
    p: int

    def plan(self, form: str, multiprocessors: int = 4) -> dict[str, Any]:
        """What choose_linear_norm_plan makes of it."""
        plan: dict[str, Any] = grad_norm.plan(
            False, self.batch, 1, self.positions, self.d, self.p, form, multiprocessors
        )
        return plan

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Activations and gradients."""
        shape = (self.batch, self.positions)
        return normal((*shape, self.d), dtype), normal((*shape, self.p), dtype, 8)


def linear_reference(a: Tensor, g: Tensor) -> NDArray[np.float64]:
    """In float64."""
    return reference.linear_grad_norm_sq(to_numpy(a), to_numpy(g))


LINEAR = [
    Linear(3, 2, 1, 4),
    Linear(3, 7, 5, 3),
    Linear(2, 33, 64, 64),
    Linear(2, 63, 31, 65),
    Linear(2, 64, 64, 128),
    Linear(2, 65, 72, 40),
    Linear(1, 129, 130, 66),
    Linear(70, 3, 6, 9),
]


class Conv(NamedTuple):
    """A convolution's call; `outputs` and `channels` are those of all groups."""

    batch: int
    channels: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def out_size(self) -> tuple[int, ...]:
        """Output positions by dimension."""
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    def plan(self, form: str, multiprocessors: int = 4) -> dict[str, Any]:
        """What choose_conv_norm_plan makes of it."""
        columns = self.channels // self.groups * int(np.prod(self.kernel))
        plan: dict[str, Any] = grad_norm.plan(
            True, self.batch, self.groups, int(np.prod(self.out_size)), columns,
            self.outputs // self.groups, form, multiprocessors,
        )  # fmt: skip
        return plan

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Inputs and gradients."""
        x = normal((self.batch, self.channels, *self.size), dtype)
        return x, normal((self.batch, self.outputs, *self.out_size), dtype, 8)

    def rest(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        """The operator's further arguments."""
        return (
            list(self.kernel),
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.groups,
        )


def conv_reference(x: Tensor, g: Tensor, case: Conv) -> NDArray[np.float64]:
    """In float64."""
    return reference.conv_grad_norm_sq(to_numpy(x), to_numpy(g), *case.rest())


CONV = [
    Conv(2, 5, 7, (9,), (3,), (1,), (1,), (1,)),
    Conv(2, 30, 70, (70,), (3,), (1,), (2,), (2,)),
    Conv(1, 66, 65, (130,), (2,), (2,), (0,), (1,)),
    Conv(2, 9, 40, (8, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    Conv(1, 20, 34, (11, 8), (3, 2), (2, 1), (1, 0), (1, 3)),
    Conv(1, 66, 48, (8, 8), (1, 1), (2, 2), (0, 0), (1, 1)),
    Conv(1, 40, 36, (9, 7), (3, 5), (1, 2), (4, 0), (3, 1), 2),
    Conv(1, 64, 64, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    Conv(1, 12, 40, (5, 6, 4), (2, 3, 2), (1, 2, 1), (0, 1, 1), (1, 1, 2)),
    Conv(1, 30, 32, (4, 5, 6), (3, 1, 2), (2, 1, 3), (1, 0, 0), (1, 2, 1), 2),
    # As large as the input: one position.
    Conv(3, 8, 33, (4, 4), (4, 4), (1, 1), (0, 0), (1, 1)),
    # One tap, one after another in memory.
    Conv(2, 65, 70, (9, 8), (1, 1), (1, 1), (0, 0), (1, 1)),
    Conv(2, 64, 96, (67,), (1,), (1,), (0,), (1,), 2),
    Conv(1, 33, 64, (3, 4, 5), (1, 1, 1), (1, 1, 1), (0, 0, 0), (2, 3, 4)),
]


# Groups too small for a tile, and the threads that take each item.
NARROW = [
    (Conv(2, 6, 6, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 6), 32),
    (Conv(2, 4, 12, (20, 20), (5, 5), (1, 1), (2, 2), (1, 1), 4), 256),
    (Conv(3, 6, 9, (40,), (4,), (3,), (2,), (2,), 3), 32),
    (Conv(1, 2, 2, (7, 8, 6), (2, 3, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 2), 256),
    (Conv(70, 10, 10, (5,), (3,), (1,), (1,), (1,), 10), 32),
]
