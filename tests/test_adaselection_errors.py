"""`adaselection_` refuses bad input, names it, and leaves its state alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import Backend, assert_same_bits
from torch import Tensor

import fastsel

NAN, INF = float("nan"), float("inf")
FLOATS = "float32, float16, bfloat16 or float64"


def arguments(**changes: Any) -> dict[str, Any]:
    """A decision over four methods of six samples, with changes."""
    return {
        "losses": torch.arange(6.0),
        "grad_norms": torch.ones(6),
        "reference_losses": torch.ones(6),
        "methods": [0, 3, 7, 9],
        "method_weights": torch.full((4,), 0.25),
        "method_losses": torch.ones(4),
        "step": torch.tensor([3]),
        "k": 2,
        "beta": 0.5,
        "curriculum_power": 0.5,
        "standardize": True,
        "statistics": torch.ones(2, 6),
        "excluded": torch.tensor([1]),
        **changes,
    }


STATE = ("method_weights", "method_losses", "step", "excluded")
Change = tuple[dict[str, Any], type[Exception], str]
WRONG: list[Change] = [
    ({"losses": [1.0, 2.0]}, TypeError, "losses must be a tensor, got list"),
    ({"losses": torch.arange(6)}, TypeError, f"losses must be {FLOATS}, got int64"),
    ({"losses": torch.ones(2, 3)}, ValueError, "losses must be [B], got shape [2, 3]"),
    ({"losses": torch.tensor(1.0)}, ValueError, "losses must be [B], got shape []"),
    (
        {"grad_norms": None},
        ValueError,
        "grad_norms must be given for method grad_norm (3), got None",
    ),
    ({"grad_norms": [1.0] * 6}, TypeError, "grad_norms must be a tensor or None, got list"),
    (
        {"grad_norms": torch.ones(5)},
        ValueError,
        "grad_norms must be [B] with B = 6 as in losses, got shape [5]",
    ),
    (
        {"grad_norms": torch.ones(6, 1)},
        ValueError,
        "grad_norms must be [B] with B = 6 as in losses, got shape [6, 1]",
    ),
    (
        {"grad_norms": torch.ones(6).half()},
        TypeError,
        "grad_norms must be float32 as losses are, got float16",
    ),
    (
        {"reference_losses": None},
        ValueError,
        "reference_losses must be given for method rho_loss (7), got None",
    ),
    (
        {"reference_losses": torch.ones(7)},
        ValueError,
        "reference_losses must be [B] with B = 6 as in losses, got shape [7]",
    ),
    (
        {"reference_losses": torch.ones(6).double()},
        TypeError,
        "reference_losses must be float32 as losses are, got float64",
    ),
    ({"methods": 3}, TypeError, "methods must be a list or tuple of codes, got int"),
    ({"methods": "0379"}, TypeError, "methods must be a list or tuple of codes, got str"),
    ({"methods": range(4)}, TypeError, "methods must be a list or tuple of codes, got range"),
    ({"methods": [0, 3.0, 7, 9]}, TypeError, "methods must be int codes, got float"),
    ({"methods": [0, "3", 7, 9]}, TypeError, "methods must be int codes, got str"),
    ({"methods": []}, ValueError, "methods must be 1 to 16 codes, got 0"),
    ({"methods": list(range(17))}, ValueError, "methods must be 1 to 16 codes, got 17"),
    ({"methods": [0, 3, 7, 10]}, ValueError, "methods must be codes from 0 to 9, got 10"),
    ({"methods": [0, 3, 7, -1]}, ValueError, "methods must be codes from 0 to 7, got -1"),
    ({"methods": [0, 3, 7, 3]}, ValueError, "methods must name each method once, got 3 twice"),
    (
        {"statistics": None},
        ValueError,
        "statistics must be given for method codes from 8, got None",
    ),
    ({"statistics": [[1.0] * 6]}, TypeError, "statistics must be a tensor, got list"),
    ({"statistics": torch.ones(6)}, ValueError, "statistics must be [S, B], got shape [6]"),
    (
        {"statistics": torch.ones(2, 5)},
        ValueError,
        "statistics must be [S, B] with B = 6 as in losses, got shape [2, 5]",
    ),
    (
        {"statistics": torch.ones(2, 6).bfloat16()},
        TypeError,
        "statistics must be float32 as losses are, got bfloat16",
    ),
    ({"method_weights": [0.25] * 4}, TypeError, "method_weights must be a tensor, got list"),
    (
        {"method_weights": torch.ones(4).double()},
        TypeError,
        "method_weights must be float32, got float64",
    ),
    (
        {"method_weights": torch.ones(3)},
        ValueError,
        "method_weights must be [M] with M = 4 as in methods, got shape [3]",
    ),
    (
        {"method_losses": torch.ones(4, 1)},
        ValueError,
        "method_losses must be [M] with M = 4 as in methods, got shape [4, 1]",
    ),
    (
        {"method_losses": torch.ones(8)[::2]},
        ValueError,
        "method_losses must be contiguous, got strides [2]",
    ),
    (
        {"method_weights": torch.ones(4, requires_grad=True)},
        ValueError,
        "method_weights must not require a gradient, got requires_grad=True",
    ),
    ({"step": 3}, TypeError, "step must be a tensor, got int"),
    ({"step": torch.tensor([3.0])}, TypeError, "step must be int64, got float32"),
    ({"step": torch.tensor([3, 4])}, ValueError, "step must have one element, got shape [2]"),
    ({"excluded": 0}, TypeError, "excluded must be a tensor, got int"),
    ({"excluded": torch.tensor([0]).int()}, TypeError, "excluded must be int64, got int32"),
    (
        {"excluded": torch.zeros(0, dtype=torch.int64)},
        ValueError,
        "excluded must have one element, got shape [0]",
    ),
    ({"k": True}, TypeError, "k must be an int, got bool"),
    ({"k": 2.0}, TypeError, "k must be an int, got float"),
    ({"k": None}, TypeError, "k must be an int, got NoneType"),
    ({"k": 7}, ValueError, "k must be between 0 and 6 (the size of the batch), got 7"),
    ({"k": -1}, ValueError, "k must be between 0 and 6 (the size of the batch), got -1"),
    ({"beta": "much"}, TypeError, "beta must be a number, got str"),
    ({"beta": NAN}, ValueError, "beta must be finite, got nan"),
    ({"beta": INF}, ValueError, "beta must be finite, got inf"),
    ({"curriculum_power": None}, TypeError, "curriculum_power must be a number, got NoneType"),
    (
        {"curriculum_power": -0.5},
        ValueError,
        "curriculum_power must be at least 0 (infinity for no reward), got -0.5",
    ),
    (
        {"curriculum_power": NAN},
        ValueError,
        "curriculum_power must be at least 0 (infinity for no reward), got nan",
    ),
    ({"standardize": "no"}, TypeError, "standardize must be a bool, got str"),
    ({"standardize": None}, TypeError, "standardize must be a bool, got NoneType"),
    ({"standardize": 1}, TypeError, "standardize must be a bool, got int"),
]


def state_of(call: dict[str, Any]) -> list[Tensor]:
    """Copies of whatever state a call has."""
    return [call[name].detach().clone() for name in STATE if isinstance(call[name], Tensor)]


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    call = arguments(**change)
    before = state_of(call)
    with pytest.raises(error, match=f"^{re.escape(f'adaselection_: {text}')}$"):
        fastsel.adaselection_(**call)
    for now, then in zip(state_of(call), before, strict=True):
        assert_same_bits(now, then)


def test_the_call_that_is_changed_is_right() -> None:
    call = arguments()
    assert fastsel.adaselection_(**call).scores.isfinite().all()
    assert int(call["step"]) == 4


def test_what_is_not_needed_is_not_looked_at() -> None:
    odd = {"grad_norms": torch.ones(3, 3), "reference_losses": torch.ones(2).long()}
    call = arguments(methods=(1, 2, 4, 6), statistics=torch.ones(1).double(), **odd)
    assert fastsel.adaselection_(**call).indices.numel() == 2


def test_numbers_may_be_ints() -> None:
    choice = fastsel.adaselection_(**arguments(beta=1, curriculum_power=0))
    expected = fastsel.adaselection_(**arguments(beta=1.0, curriculum_power=0.0))
    assert_same_bits(choice.scores, expected.scores)


def test_negative_step_on_the_cpu(cpu: Backend) -> None:
    # On a GPU, finding out would stall the host.
    call = arguments(step=torch.tensor([-3]))
    with pytest.raises(ValueError, match=r"^adaselection_: step must not be negative, got -3$"):
        fastsel.adaselection_(**call)
    assert int(call["step"]) == -3


def test_state_on_another_device() -> None:
    meta = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match=r"method_weights must be on cpu as losses are, got meta$"):
        fastsel.adaselection_(**arguments(method_weights=meta))


# The operator's own words, for those who call it directly: of every kind of check, one.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"losses": torch.ones(2, 3)}, "losses must be [B], got [2, 3]"),
    ({"losses": torch.arange(6)}, "must be int64 as losses are, got float32"),
    ({"losses": torch.arange(6), "methods": [0, 1, 2, 4]}, "losses must be float32, float16"),
    ({"grad_norms": None}, "grad_norms must be given for method grad_norm (3), got None"),
    ({"reference_losses": torch.ones(5)}, "reference_losses must be [B] = [6], got [5]"),
    ({"grad_norms": torch.ones(6).half()}, "grad_norms must be float32 as losses are, got float16"),
    ({"methods": []}, "methods must be 1 to 16 codes, got 0"),
    ({"methods": [0, 3, 7, 10]}, "methods must be codes from 0 to 9, got 10"),
    ({"methods": [0, 3, 7, -1]}, "methods must be codes from 0 to 9, got -1"),
    ({"methods": [0, 3, 7, 3]}, "methods must name each method once, got 3 twice"),
    ({"statistics": None}, "statistics must be given for method codes from 8, got None"),
    ({"statistics": torch.ones(6)}, "statistics must be [S, B] with B = 6, got [6]"),
    ({"statistics": torch.tensor(1.0)}, "statistics must be [S, B] with B = 6, got []"),
    ({"method_weights": torch.ones(3)}, "method_weights must be [M] = [4], got [3]"),
    ({"method_losses": torch.ones(4).double()}, "method_losses must be float32, got float64"),
    ({"method_losses": torch.ones(8)[::2]}, "method_losses must be contiguous"),
    ({"step": torch.tensor([3, 4])}, "step must have one element, got [2]"),
    ({"excluded": torch.tensor([0]).int()}, "excluded must be int64, got int32"),
    ({"k": 7}, "k must be between 0 and 6 (the size of the batch), got 7"),
    ({"k": -1}, "k must be between 0 and 6 (the size of the batch), got -1"),
    ({"beta": NAN}, "beta must be finite, got nan"),
    ({"curriculum_power": -1.0}, "curriculum_power must be 0 or more"),
    ({"curriculum_power": NAN}, "curriculum_power must be 0 or more"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_operator_refuses_them_too(backend: Backend, change: dict[str, Any], text: str) -> None:
    call = {
        name: value.to(backend.device) if isinstance(value, Tensor) else value
        for name, value in arguments(**change).items()
    }
    before = state_of(call)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        backend.ops.adaselection_(**call)
    for now, then in zip(state_of(call), before, strict=True):
        assert_same_bits(now, then)


def test_float64_is_for_the_cpu(backend: Backend) -> None:
    double = arguments(losses=torch.arange(6.0).double(), methods=[0, 1, 2, 4])
    call = {
        name: value.to(backend.device) if isinstance(value, Tensor) else value
        for name, value in double.items()
    }
    if backend.name == "cpu":
        assert backend.ops.adaselection_(**call)[1].dtype == torch.float64
        return
    with pytest.raises(RuntimeError, match="losses must be float32, float16 or bfloat16"):
        backend.ops.adaselection_(**call)
    assert int(call["step"]) == 3
