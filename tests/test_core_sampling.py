"""The exponentials and keys of weighted sampling, through the native test module."""

from __future__ import annotations

import math

import fastsel_native as native
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

words = st.integers(0, 2**32 - 1)
SMALL = 1 << 22  # words below it get 32 bits more


@given(words, words)
@example(0, 0)
@example(0, 2**32 - 1)
@example(SMALL - 1, 2**32 - 1)
@example(SMALL, 0)
@example(2**32 - 1, 2**32 - 1)
@example(2**30 - 1, 0)
@example(2**30, 0)
def test_exponentials(word: int, low: int) -> None:
    u = (word * 2**32 + low + 0.5) / 2**64
    # Of 1 - u all bits matter where u is near 1.
    beyond = ((2**32 - 1 - word) * 2**32 + (2**32 - 1 - low) + 0.5) / 2**64
    exact = -math.log1p(-u) if u < 0.5 else -math.log(beyond)
    assert native.exponential_double(word, low) == pytest.approx(exact, rel=4e-16)
    narrow = native.exponential_float(word, low)
    if word < SMALL:
        assert narrow == pytest.approx(exact, rel=3e-7)
    else:  # the middle of the word's interval
        middle, rest = (word + 0.5) / 2**32, (2**32 - word - 0.5) / 2**32
        exact = -math.log1p(-middle) if middle < 0.5 else -math.log(rest)
        assert narrow == pytest.approx(exact, rel=3e-7)


def test_small_exponentials_are_distinct() -> None:
    # The smallest thousand of 5e7 uniform words are the ones that win; of a 24-bit grid, 314.
    generator = np.random.default_rng(0)
    small = generator.integers(0, 85_900, 1000)
    low = generator.integers(0, 2**32, 1000)
    found = {native.exponential_float(int(a), int(b)) for a, b in zip(small, low, strict=True)}
    assert len(found) >= 999


positive = st.floats(0, 2.0**127, exclude_min=True, width=32)


@given(st.floats(2.0**-66, 23.0, width=32), positive, st.floats(2.0**-66, 23.0, width=32), positive)
def test_keys_have_the_order_of_quotients(e: float, w: float, f: float, v: float) -> None:
    keys = native.quotient_key_float(e, w), native.quotient_key_float(f, v)
    wide = native.quotient_key_double(e, w), native.quotient_key_double(f, v)
    # Of logarithms, since the quotients may be beyond a double's range.
    difference = (math.log2(e) - math.log2(w)) - (math.log2(f) - math.log2(v))
    if abs(difference) > 1e-6:
        assert (keys[0] < keys[1]) == (difference < 0)
        assert (wide[0] < wide[1]) == (difference < 0)
    assert min(keys) > 0 and max(keys) < 2**32 - 1
    assert min(wide) > 0 and max(wide) < 2**64 - 1


@given(st.floats(2.0**-66, 23.0, width=32), positive)
@example(2.0**-65, 2.0**127)
@example(22.9, 2.0**-149)
def test_keys_say_what_they_stand_for(e: float, w: float) -> None:
    for key, value, precision in (
        (native.quotient_key_float, native.key_value_float, 1e-7),
        (native.quotient_key_double, native.key_value_double, 1e-15),
    ):
        mantissa, exponent = value(key(e, w))
        assert 1 <= mantissa < 2
        exact = math.frexp(e)[0] / math.frexp(w)[0] * 2.0 ** (math.frexp(e)[1] - math.frexp(w)[1])
        assert mantissa * 2.0**exponent == pytest.approx(exact, rel=precision)


@given(st.floats(5e-324, 1.7e308), st.floats(2.0**-65, 45.0))
def test_keys_of_doubles(w: float, e: float) -> None:
    mantissa, exponent = native.key_value_double(native.quotient_key_double(e, w))
    exact = math.log2(e) - math.log2(w)
    assert math.log2(mantissa) + exponent == pytest.approx(exact, abs=1e-12 * max(1, abs(exact)))
