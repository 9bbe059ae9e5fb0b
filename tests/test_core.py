"""csrc/core, the arithmetic that CPU and GPU share, through the native test module."""

from __future__ import annotations

import math
import struct

import fastsel_native as native
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

# Random123's known answers for philox4x32 with ten rounds: counter, key, output.
PHILOX_VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert native.philox4x32_10(counter, key) == expected


def test_philox_places_seed_index_and_stream() -> None:
    seed, index, stream = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 0x1122334455667788
    counter = [index & 0xFFFFFFFF, index >> 32, stream & 0xFFFFFFFF, stream >> 32]
    expected = native.philox4x32_10(counter, [seed & 0xFFFFFFFF, seed >> 32])
    assert native.philox(seed, index, stream) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_values_widen_exactly(dtype: torch.dtype) -> None:
    name = "half" if dtype == torch.float16 else "bfloat16"
    widen = getattr(native, f"{name}_to_float")
    bits = torch.arange(1 << 16, dtype=torch.int32)
    expected = bits.to(torch.int16).view(dtype).float()
    actual = torch.tensor([widen(int(b)) for b in bits], dtype=torch.float64).float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_round_as_torch_rounds(dtype: torch.dtype) -> None:
    name = "half" if dtype == torch.float16 else "bfloat16"
    narrow = getattr(native, f"float_to_{name}")
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    halfway = (every[:-1] + every[1:]) / 2  # ties go to even
    values = torch.cat(
        [random.view(torch.float32), every, halfway, torch.tensor([65519.0, 65520.0])]
    )
    expected = values.to(dtype)
    actual = torch.tensor([narrow(float(v)) for v in values], dtype=torch.int32).to(torch.int16)
    torch.testing.assert_close(actual.view(dtype), expected, rtol=0, atol=0, equal_nan=True)


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(FLOATS, FLOATS, st.booleans())
def test_topk_keys_order_as_torch_does(a: float, b: float, largest: bool) -> None:
    for key in (native.topk_key_float, native.topk_key_double):
        ka, kb = key(a, largest), key(b, largest)
        if math.isnan(a) or math.isnan(b):
            better = math.isnan(a) - math.isnan(b)
        else:
            better = (a > b) - (a < b)
        assert (ka > kb) - (ka < kb) == (better if largest else -better)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("largest", [True, False])
def test_sixteen_bit_topk_keys_order_as_the_floats_they_equal(
    dtype: torch.dtype, largest: bool
) -> None:
    name = "half" if dtype == torch.float16 else "bfloat16"
    key = getattr(native, f"topk_key_{name}")
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    narrow = np.array([key(bits, largest) for bits in range(1 << 16)])
    wide = np.array([native.topk_key_float(float(v), largest) for v in values])
    # The same order and the same ties: ranks among the distinct keys agree.
    np.testing.assert_array_equal(
        np.unique(narrow, return_inverse=True)[1], np.unique(wide, return_inverse=True)[1]
    )


def float32(values: list[float]) -> list[float]:
    return [struct.unpack("f", struct.pack("f", v))[0] for v in values]


LOGITS = st.lists(st.floats(-80, 80), min_size=2, max_size=12)


@given(LOGITS, st.data())
def test_merged_states_give_the_scores_of_the_whole_row(
    logits: list[float], data: st.DataObject
) -> None:
    logits = float32(logits)
    target = data.draw(st.integers(0, len(logits) - 1))
    others = [x for j, x in enumerate(logits) if j != target]
    cut = data.draw(st.integers(0, len(others)))
    got = native.row_scores([others[:cut], others[cut:]], logits[target])
    expected = reference.sample_scores(np.array([logits]), np.array([target]))
    # Double throughout; what is left is the rounding of a handful of operations on arguments up to
    # 160. The entropy among the other classes is a difference, hence the absolute part.
    for name, value in zip(("loss", "grad_norm", "entropy", "lse"), got, strict=True):
        np.testing.assert_allclose(value, getattr(expected, name)[0], rtol=1e-12, atol=1e-14)
