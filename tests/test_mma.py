"""The twins of tensor cores and asynchronous copies, and what the kernels compute beside them.

Fragments are held to the layouts of the PTX manual, because a GPU uses the real instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastsel_native import grad_norm, simt
from numpy.typing import NDArray

NAN, INF = float("nan"), float("inf")

# ---- the twins of tensor cores and asynchronous copies ----

Place = tuple[int, int]  # row and column

# Where register i of a lane lies, and for 16-bit values which of two: as the PTX manual says it for
# mma.m16n8k16 and mma.m16n8k8, with g = lane >> 2 and t = lane % 4.
A_NARROW = {
    (i, half): lambda g, t, i=i, half=half: (
        g + (8 if i in (1, 3) else 0),
        t * 2 + half + (8 if i >= 2 else 0),
    )
    for i in range(4)
    for half in range(2)
}
B_NARROW = {
    (i, half): lambda g, t, i=i, half=half: (t * 2 + half + 8 * i, g)
    for i in range(2)
    for half in range(2)
}
A_TF32 = {0: (0, 0), 1: (8, 0), 2: (0, 4), 3: (8, 4)}
C_PLACES = {0: (0, 0), 1: (0, 1), 2: (8, 0), 3: (8, 1)}


def bits16(value: float, dtype: torch.dtype) -> int:
    """The bits of a value that the dtype holds exactly."""
    return int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF


def bits32(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def unpack_sums(registers: list[float]) -> NDArray[np.float64]:
    """C [16, 8] from its registers."""
    c = np.empty((16, 8))
    for lane in range(32):
        for i, (row, column) in C_PLACES.items():
            c[lane // 4 + row, lane % 4 * 2 + column] = registers[lane * 4 + i]
    return c


def pack_sums(c: NDArray[np.float64]) -> list[float]:
    """The registers of C [16, 8]."""
    return [
        float(c[lane // 4 + row, lane % 4 * 2 + column])
        for lane in range(32)
        for row, column in C_PLACES.values()
    ]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_fragments_of_narrow_products(kind: str) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(-9, 10, (16, 16)).astype(float)
    b = rng.integers(-9, 10, (16, 8)).astype(float)
    c = rng.integers(-99, 100, (16, 8)).astype(float)
    dtype = getattr(torch, kind)

    def registers(matrix: NDArray[np.float64], places: dict[Any, Any], count: int) -> list[int]:
        out = []
        for lane in range(32):
            for i in range(count):
                low, high = (
                    bits16(matrix[places[i, half](lane >> 2, lane % 4)], dtype) for half in (0, 1)
                )
                out.append(low | high << 16)
        return out

    product = grad_norm.mma(
        kind, registers(a, A_NARROW, 4), registers(b, B_NARROW, 2), pack_sums(c)
    )
    np.testing.assert_array_equal(unpack_sums(product), a @ b + c)


def test_fragments_of_tf32_products() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(-99, 100, (16, 8)).astype(float)
    b = rng.integers(-99, 100, (8, 8)).astype(float)
    c = rng.integers(-99, 100, (16, 8)).astype(float)
    ignored = 0x1FFF  # the lower 13 bits of a register count for nothing
    a_registers = [
        bits32(a[lane // 4 + row, lane % 4 + column]) | ignored
        for lane in range(32)
        for row, column in A_TF32.values()
    ]
    b_registers = [
        bits32(b[lane % 4 + 4 * i, lane // 4]) | ignored for lane in range(32) for i in range(2)
    ]
    product = grad_norm.mma("tf32", a_registers, b_registers, pack_sums(c))
    np.testing.assert_array_equal(unpack_sums(product), a @ b + c)


@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix(transpose: bool) -> None:
    matrices = np.arange(256).reshape(4, 8, 8)
    registers = grad_norm.ldmatrix(matrices.reshape(-1).tolist(), transpose)
    expected = matrices.transpose(0, 2, 1) if transpose else matrices
    for lane in range(32):
        for m in range(4):
            pair = expected[m, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert registers[lane * 4 + m] == pair[0] | pair[1] << 16


@pytest.fixture(params=[(0, 0), (1, 0), (2, 1), (2, 2)], ids=["forward", "reverse", "r1", "r2"])
def native_order(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Every scheduling order, in the emulator of the native module."""
    assert simt.set_order(*request.param) == 0
    yield request.param
    assert simt.set_order(0, 0) == 0


@pytest.mark.parametrize("valid", [0, 4, 12, 16])
def test_asynchronous_copies(native_order: tuple[int, int], valid: int) -> None:
    lines = list(range(1, 33 * 4 + 1))
    out = np.array(grad_norm.copies(lines, valid, True, True)).reshape(33, 4)
    expected = np.roll(np.array(lines).reshape(33, 4), -1, axis=0)
    expected[:, valid // 4 :] = 0
    np.testing.assert_array_equal(out, expected)


def test_a_copy_nobody_waited_for_shows() -> None:
    lines = list(range(1, 33 * 4 + 1))
    poison = [0xFFFFFFFF] * len(lines)
    assert grad_norm.copies(lines, 16, False, True) == poison
    # Waited for, but not by all: the first thread reads what its neighbour has yet to wait for.
    assert grad_norm.copies(lines, 16, True, False)[:4] == poison[:4]


def test_tf32_pairs() -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal(2000).astype(np.float32) * np.float32(10.0) ** rng.integers(
        -20, 20, 2000
    ).astype(np.float32)
    largest = float(np.finfo(np.float32).max)
    for value in [*values.tolist(), 0.0, -0.0, largest, -largest]:
        pair = grad_norm.split_tf32(value)
        assert all(part & 0x1FFF == 0 for part in pair)
        big, small = (struct.unpack("<f", struct.pack("<I", part))[0] for part in pair)
        # Two roundings to 11 bits; what is cut off instead, near the end, loses one bit more.
        assert abs(big + small - value) <= abs(value) * 2.0 ** (
            -20 if abs(value) == largest else -22
        )
    for payload in (0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF):
        (value,) = struct.unpack("<f", struct.pack("<I", payload))
        assert any(part & 0x7FFFFFFF > 0x7F800000 for part in grad_norm.split_tf32(value))
    for value in (INF, -INF):
        assert grad_norm.split_tf32(value)[0] == bits32(value)


def test_divisor() -> None:
    rng = np.random.default_rng(3)
    divisors = [1, 2, 3, 5, 7, 9, 25, 49, 64, 641, 65_535, 65_536, 65_537, 2**31 - 1]
    for divisor in [*divisors, *rng.integers(1, 2**31, 100).tolist()]:
        numbers = [0, 1, divisor - 1, divisor, 2 * divisor - 1, 2 * divisor, 2**31 - 1]
        for n in [*numbers, *rng.integers(0, 2**31, 20).tolist()]:
            if n < 2**31:
                assert grad_norm.divide(n, divisor) == list(divmod(n, divisor))
