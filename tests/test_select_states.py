"""Selectors' states: they resume exactly, and nothing else is taken for one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from conftest import assert_same_bits

from fastsel.scores import Scores
from fastsel.select import (
    SELECTORS,
    BigLoss,
    ImportanceSampling,
    Selector,
    Uniform,
    make_selector,
)

NAN = float("nan")


def test_uniform_resumes_exactly() -> None:
    selector = Uniform(0.5, generator=torch.Generator().manual_seed(3))
    batch = Scores(batch_size=100)
    selector(batch)
    state = selector.state_dict()
    expected = [selector(batch).tolist() for _ in range(3)]
    assert expected[0] != expected[1]
    resumed = Uniform(0.9, generator=torch.Generator().manual_seed(99))
    resumed.load_state_dict(state)
    assert resumed.rate == 0.5
    assert [resumed(batch).tolist() for _ in range(3)] == expected


@pytest.mark.parametrize("name", SELECTORS)
def test_resumes_bit_for_bit(name: str) -> None:
    """Some steps, a file, and the same steps as without it."""

    def made(seed: int) -> Selector:
        return make_selector(name, rate=0.3, generator=torch.Generator().manual_seed(seed))

    def batch(i: int) -> Scores:
        values = torch.rand(50, generator=torch.Generator().manual_seed(i))
        values[i] = NAN
        return Scores(loss=values, grad_norm=values.flip(0), entropy=values, margin=values,
                      reference_loss=values.roll(3))  # fmt: skip

    first = made(1)
    for i in range(5):
        first.select(batch(i))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = made(2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.excluded == first.excluded
    for i in range(5, 10):
        expected, actual = first.select(batch(i)), resumed.select(batch(i))
        assert torch.equal(actual.indices, expected.indices)
        assert (actual.weights is None) == (expected.weights is None)
        if actual.weights is not None and expected.weights is not None:
            assert torch.equal(actual.weights, expected.weights)
    assert_same_state(resumed.state_dict(), first.state_dict())


def assert_same_state(actual: Any, expected: Any) -> None:
    """Equal entries, tensors bit for bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same_state(actual[key], expected[key])
    elif isinstance(actual, torch.Tensor):
        assert_same_bits(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize("name", SELECTORS)
def test_states_are_of_one_kind(name: str) -> None:
    state = make_selector(name, rate=0.25).state_dict()
    same = make_selector(name, rate=0.5)
    same.load_state_dict(state)
    assert same.rate == 0.25
    for key in set(state) - {"name"}:
        with pytest.raises(ValueError, match=f"of the selector '{name}' must have {key}$"):
            same.load_state_dict({k: v for k, v in state.items() if k != key})
    for other in set(SELECTORS) - {name}:
        with pytest.raises(
            ValueError, match=f"state must be of the selector '{other}', got that of '{name}'"
        ):
            make_selector(other, rate=0.5).load_state_dict(state)


def test_states_that_cannot_be_resumed() -> None:
    with_generator = Uniform(0.5, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"was saved with none, but this selector has one"):
        with_generator.load_state_dict(Uniform(0.5).state_dict())
    with pytest.raises(ValueError, match=r"was saved with one, but this selector has none"):
        Uniform(0.5).load_state_dict(with_generator.state_dict())
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got 2.0"):
        BigLoss(0.5).load_state_dict({"name": "big_loss", "rate": 2.0, "excluded": 0})
    big_loss = BigLoss(0.5)
    with pytest.raises(ValueError, match=r"of the selector 'big_loss' must have excluded$"):
        big_loss.load_state_dict({"name": "big_loss", "rate": 0.25})
    assert big_loss.rate == 0.5
    drawing = ImportanceSampling(0.5, "loss")
    with pytest.raises(ValueError, match="must draw by 'grad_norm' as the state does"):
        drawing.load_state_dict(ImportanceSampling(0.5).state_dict())
    with pytest.raises(ValueError, match="got that of None"):
        BigLoss(0.5).load_state_dict({})
