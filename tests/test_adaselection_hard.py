"""`adaselection_` where it is hard: extreme magnitudes, constants, values that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Backend, assert_same_bits
from decisions import BIG, CORESET2, EVERY, GRAD, OF_LOSSES, RHO, UNIFORM, Decisions, batch, best
from hypothesis import given
from hypothesis import strategies as st
from test_adaselection import EXTREME_SCORES, SCORES, TINY, WEIGHTS, check_step
from torch import Tensor

from fastsel import ops

INF, NAN = float("inf"), float("nan")


def hard_losses() -> dict[str, Tensor]:
    """Losses that an implementation may trip over; all finite."""
    normal = torch.randn(200, generator=torch.Generator().manual_seed(3))
    ramp = torch.arange(200.0)
    largest = torch.finfo(torch.float32).max
    return {
        "negative": -normal.abs(),
        "both_signs": normal,
        "zeros": torch.zeros(200),
        "zeros_of_both_signs": torch.tensor([0.0, -0.0]).repeat(100),
        "equal": torch.full((200,), 0.1),
        "equal_but_one": torch.cat([torch.full((199,), 0.1), torch.tensor([0.2])]),
        "two_values": (ramp % 2) + 1,
        "few_values": ramp % 5,
        "far_from_zero": 1000 + 0.01 * normal,
        "one_ulp_apart": torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)) * (ramp % 2)
        + (1 - ramp % 2),
        "outlier": torch.cat([normal.abs(), torch.tensor([1e6])]),
        "outlier_first": torch.cat([torch.tensor([1e6]), normal.abs()]),
        "regression": 3e4 * normal.square(),
        "huge": 1e38 * normal.abs().clamp(max=3),
        "huge_of_both_signs": 1e38 * normal.clamp(-3, 3),
        "largest": torch.cat([torch.full((120,), largest), torch.full((80,), -largest)]),
        "beyond_squares": 1e25 * normal.abs(),
        "tiny": 1e-36 * normal.abs(),
        "subnormal": 1e-42 * ramp,
        "of_all_sizes": torch.exp2((ramp - 100) / 2),
    }


@pytest.mark.parametrize("name", hard_losses())
def test_hard_losses(backend: Backend, name: str) -> None:
    losses = hard_losses()[name]
    decisions = Decisions(backend, OF_LOSSES)
    for inputs in (losses, losses, losses.flip(0)):
        check_step(decisions, {"losses": inputs}, 50, rtol=EXTREME_SCORES)
    # Back to ordinary losses: the weights may move by any factor now.
    decisions(batch(200)["losses"], 50)
    assert decisions.weights.isfinite().all()


@pytest.mark.parametrize(
    ("name", "code"),
    # A difference is rounded where it lies: the hundredths of losses around 1000 are lost in it.
    [(n, c) for n in hard_losses() for c in (GRAD, RHO, 8) if (n, c) != ("far_from_zero", RHO)],
)
def test_hard_inputs_beside_the_losses(backend: Backend, name: str, code: int) -> None:
    hard = hard_losses()[name]
    decisions = Decisions(backend, [UNIFORM, code, BIG])
    inputs = batch(hard.numel())
    inputs.update(grad_norms=hard, reference_losses=hard, statistics=hard[None])
    for _ in range(3):
        check_step(decisions, inputs, 30, rtol=EXTREME_SCORES)


def test_hard_losses_in_float64(cpu: Backend) -> None:
    # Beyond float32 altogether: the same choice as of losses of ordinary size.
    ordinary = Decisions(cpu, [*OF_LOSSES, RHO])
    for exponent in (900, -900):
        scaled = ordinary.clone()
        inputs = {name: batch(100)[name].double() for name in ("losses", "reference_losses")}
        larger = {name: value * 2.0**exponent for name, value in inputs.items()}
        one, other = ordinary.clone()(**inputs, k=30), scaled(**larger, k=30)
        assert torch.equal(one.indices, other.indices)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-14, atol=0)
        assert scaled.losses.isfinite().all()
        scaled(**larger, k=30)
        assert scaled.weights.isfinite().all()


@pytest.mark.parametrize("size", [2, 40, 8193])
@pytest.mark.parametrize("exponent", [0, 40, 105])  # the last in double
def test_the_last_bit_chooses_nothing(backend: Backend, size: int, exponent: int) -> None:
    losses = torch.full((size,), 2.0**exponent)
    losses[-1] *= 1 + 2.0**-23
    choice = Decisions(backend, [BIG], curriculum_power=INF)(losses, 1)
    assert choice.indices.tolist() == [0]
    assert bool((choice.scores == choice.scores[0]).all())
    if exponent > 0:
        unscaled = Decisions(backend, [BIG], curriculum_power=INF, standardize=False)
        assert unscaled(losses, 1).indices.tolist() == [size - 1]


def test_rounding_of_the_mean_chooses_nothing(backend: Backend) -> None:
    # All equally far from their mean, but not in float32.
    losses = torch.tensor([0.1, 3e7]).repeat(7)
    for scale in (1.0, 1e25):
        choice = Decisions(backend, [CORESET2], curriculum_power=INF)(scale * losses, 5)
        assert choice.indices.tolist() == list(range(5))
        assert bool((choice.scores == choice.scores[0]).all())


@pytest.mark.parametrize("exponent", [-70, -20, 20, 90])
def test_scale_does_not_matter(backend: Backend, exponent: int) -> None:
    # Powers of two are exact, so nothing but the methods' losses may change, wherever the
    # arithmetic has to go a longer way.
    methods = [*OF_LOSSES, RHO]
    inputs = {name: batch(300)[name] for name in ("losses", "reference_losses")}
    ordinary, scaled = Decisions(backend, methods), Decisions(backend, methods)
    for _ in range(3):
        one = ordinary(**inputs, k=100)
        other = scaled(**{name: v * 2.0**exponent for name, v in inputs.items()}, k=100)
        torch.testing.assert_close(one.scores, other.scores, rtol=SCORES, atol=TINY)
        torch.testing.assert_close(ordinary.weights, scaled.weights, rtol=WEIGHTS, atol=0)
        torch.testing.assert_close(
            ordinary.losses * 2.0**exponent, scaled.losses, rtol=WEIGHTS, atol=0
        )


# NaN and infinities by the input they stand in; every input has 40 samples.
PLACES = ["losses", "grad_norms", "reference_losses", "statistics"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", PLACES)
def test_excluded(backend: Backend, place: str, value: float, dtype: torch.dtype) -> None:
    inputs = batch(40, dtype=dtype, rows=2)
    rows = inputs[place] if place == "statistics" else inputs[place][None]
    rows[0, [0, 7, 39]] = value
    methods = [*EVERY, 8]
    decisions = Decisions(backend, methods)
    for k in (0, 10, 37, 38, 40):
        check_step(decisions, inputs, k)
    assert int(decisions.excluded) == 15
    # The same as without them.
    keep = torch.ones(40, dtype=torch.bool)
    keep[[0, 7, 39]] = False
    others = {name: v[..., keep] for name, v in inputs.items()}
    one, other = Decisions(backend, methods), Decisions(backend, methods)
    for _ in range(3):
        scores = one(**inputs, k=10).scores.cpu()
        assert_same_bits(scores[keep], other(**others, k=10).scores)
        assert scores[~keep].isnan().all()
    for mine, theirs in zip(one.state[:3], other.state[:3], strict=True):
        assert_same_bits(mine, theirs)


def test_excluded_are_the_last_resort(backend: Backend) -> None:
    decisions = Decisions(backend, [BIG])
    losses = torch.tensor([NAN, 1.0, INF, 0.0, -INF, 2.0])
    for k, expected in ((2, [1, 5]), (3, [1, 3, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5])):
        assert decisions.clone()(losses, k).indices.tolist() == expected
    assert decisions(losses, 6).indices.tolist() == list(range(6))
    assert int(decisions.excluded) == 3


def test_what_no_method_needs_excludes_nothing(backend: Backend) -> None:
    inputs = batch(20, rows=3)
    for name in PLACES[1:]:
        inputs[name] = torch.full_like(inputs[name], NAN)
    inputs["statistics"][1] = torch.arange(20.0)
    decisions = Decisions(backend, [UNIFORM, 9])
    assert decisions(**inputs, k=5).scores.isfinite().all()
    assert int(decisions.excluded) == 0


@pytest.mark.parametrize("size", [0, 1, 30])
def test_nothing_left_changes_nothing(backend: Backend, size: int) -> None:
    decisions = Decisions(backend, EVERY)
    decisions(**batch(9), k=3)
    before = [tensor.clone() for tensor in decisions.state]
    inputs = batch(size)
    inputs["grad_norms"].fill_(NAN)
    choice = decisions(**inputs, k=size // 2)
    assert choice.indices.tolist() == list(range(size // 2))
    assert choice.scores.isnan().all()
    for tensor, same in zip(decisions.state[:3], before[:3], strict=True):
        assert_same_bits(tensor, same)
    assert int(decisions.excluded) == size


def test_excluded_need_not_be_counted(cpu: Backend) -> None:
    losses = torch.tensor([NAN, 1.0])
    state = torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    choice = ops.adaselection_(losses, None, None, [BIG], *state, 1, 0.5, 0.5)
    assert choice.indices.tolist() == [1]


# Anything a float can be, with many equal and some that are not finite.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, -2.0, NAN, INF, -INF, 1e38, 1e-40, 3.0]),
    st.floats(width=32),
    st.floats(0, 5, width=32),
)


@given(st.data())
def test_properties(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 40))
    row = st.lists(values, min_size=size, max_size=size)
    methods = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True))
    decisions = Decisions(
        Backend("cpu"),
        methods,
        beta=data.draw(st.floats(-5, 5)),
        curriculum_power=data.draw(st.sampled_from([0.0, 0.5, 3.0, INF])),
        standardize=data.draw(st.booleans()),
    )
    excluded = 0
    for _ in range(data.draw(st.integers(1, 4))):
        inputs = {name: torch.tensor(data.draw(row)) for name in PLACES[:3]}
        inputs["statistics"] = torch.tensor([data.draw(row), data.draw(row)]).view(2, size)
        k = data.draw(st.integers(0, size))
        before = int(decisions.step)
        indices, scores = decisions(**inputs, k=k)
        used = [inputs["losses"]]
        used += [inputs["grad_norms"]] if GRAD in methods else []
        used += [inputs["reference_losses"]] if RHO in methods else []
        used += [inputs["statistics"][code - 8] for code in methods if code >= 8]
        valid = torch.stack(used).isfinite().all(0)
        excluded += int((~valid).sum())
        assert torch.equal(scores.isnan(), ~valid)
        assert (scores[valid] >= 0).all() and scores[valid].isfinite().all()
        assert torch.equal(indices, best(scores, k))
        assert int(decisions.step) == before + bool(valid.any())
        assert int(decisions.excluded) == excluded
        assert decisions.losses.isfinite().all()
        assert (decisions.weights > 0).all()
        assert math.isclose(float(decisions.weights.double().sum()), 1, rel_tol=1e-6)
