"""`adaselection_` against its definitions, step after step, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, assert_same_bits, to_numpy
from decisions import (
    ADABOOST,
    BIG,
    CORESET1,
    CORESET2,
    EVERY,
    GRAD,
    RHO,
    SMALL,
    UNIFORM,
    Decisions,
    batch,
    best,
)
from torch import Tensor

INF, NAN = float("inf"), float("nan")
# Rounded to float32 are the statistic, its difference from the largest, the divisor and their
# quotient, an exponent of at most a dozen here: 4 * 6e-8 * 12, and a few roundings beside it.
SCORES = 5e-6
# Exponents go down to -87 where a batch has outliers; what is below e^-87 is 0.
EXTREME_SCORES = 4e-5
TINY = 1e-37
# A mean loss in float32, and a change of it relative to the last: differences of two such.
WEIGHTS = 5e-6


def check_step(
    decisions: Decisions,
    inputs: dict[str, Any],
    k: int,
    *,
    rtol: float = SCORES,
) -> None:
    """One step, against the reference from the same state."""
    reference = decisions.reference()
    wide: dict[str, Any] = {
        name: None if value is None else to_numpy(value) for name, value in inputs.items()
    }
    expected_indices, expected = reference.decide(k=k, **wide)
    choice = decisions(k=k, **inputs)
    device = decisions.backend.device.type
    assert choice.indices.device.type == choice.scores.device.type == device
    double = inputs["losses"].dtype == torch.float64
    assert choice.scores.dtype == (torch.float64 if double else torch.float32)
    np.testing.assert_allclose(to_numpy(choice.scores), expected, rtol=rtol, atol=TINY)
    assert choice.indices.dtype == torch.int64
    assert torch.equal(choice.indices.cpu(), best(choice.scores, k))
    # Those that the reference would choose, up to scores that rounding may exchange.
    exchanged = set(choice.indices.tolist()) ^ set(expected_indices.tolist())
    if exchanged:
        values = expected[list(exchanged)]
        np.testing.assert_allclose(values, values[0], rtol=2 * rtol, atol=TINY)
    np.testing.assert_allclose(to_numpy(decisions.weights), reference.weights, rtol=WEIGHTS)
    size = np.abs(wide["losses"][np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(
        to_numpy(decisions.losses), reference.losses, rtol=2e-6, atol=1e-6 * size
    )
    assert int(decisions.step) == reference.step
    assert int(decisions.excluded) == reference.excluded


SETS = {
    **{f"only_{code}": [code] for code in EVERY},
    "paper": [UNIFORM, BIG, SMALL, GRAD],
    "every": EVERY,
    "reversed": EVERY[::-1],
    "with_statistics": [8, UNIFORM, 10, BIG],
    "sixteen": [*EVERY, *range(8, 16)],
}


@pytest.mark.parametrize("methods", SETS.values(), ids=SETS)
def test_many_steps(backend: Backend, methods: list[int]) -> None:
    decisions = Decisions(backend, methods)
    for step in range(25):
        inputs = batch(64 + step, step, rows=8)
        inputs["losses"] = inputs["losses"] * 0.9**step
        check_step(decisions, inputs, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 128, 255, 256, 257, 1000, 2049, 4099])
def test_sizes(backend: Backend, size: int, dtype: torch.dtype) -> None:
    decisions = Decisions(backend, [*EVERY, 8])
    for step, k in enumerate(sorted({0, 1, size // 3, size - 1, size})):
        check_step(decisions, batch(size, step, dtype=dtype, rows=1), k)


@pytest.mark.parametrize("size", [8192, 8193, 20_000, 65_536, 70_001])
def test_long_batches(backend: Backend, size: int) -> None:
    backend.need(4 * size)
    decisions = Decisions(backend, EVERY)
    for step in range(2):
        check_step(decisions, batch(size, step), size // 10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0, -1.0])
@pytest.mark.parametrize("curriculum_power", [0.0, 0.5, 2.0, INF])
@pytest.mark.parametrize("standardize", [True, False])
def test_settings(
    backend: Backend, beta: float, curriculum_power: float, standardize: bool
) -> None:
    decisions = Decisions(
        backend, EVERY, beta=beta, curriculum_power=curriculum_power, standardize=standardize
    )
    for step in range(4):
        # coreset1 without a divisor has exponents of half the batch.
        check_step(decisions, batch(50, step), 10, rtol=SCORES if standardize else EXTREME_SCORES)


def chosen(backend: Backend, code: int, k: int, **inputs: Tensor) -> list[int]:
    """What one method alone chooses, without the reward."""
    return Decisions(backend, [code], curriculum_power=INF)(k=k, **inputs).indices.tolist()


def test_one_method_alone(backend: Backend) -> None:
    # Each method is a known rule; the mixture of one chooses by it.
    inputs = batch(101)
    losses, norms, old = inputs["losses"], inputs["grad_norms"], inputs["reference_losses"]

    def largest(statistic: Tensor, k: int) -> list[int]:
        return sorted(statistic.argsort(descending=True, stable=True)[:k].tolist())

    k = 20
    ascending = losses.argsort(stable=True)
    assert chosen(backend, UNIFORM, k, losses=losses) == list(range(k))
    assert chosen(backend, BIG, k, losses=losses) == largest(losses, k)
    assert chosen(backend, SMALL, k, losses=losses) == largest(-losses, k)
    assert chosen(backend, ADABOOST, k, losses=losses) == largest(losses, k)
    assert chosen(backend, GRAD, k, losses=losses, grad_norms=norms) == largest(norms, k)
    assert chosen(backend, RHO, k, losses=losses, reference_losses=old) == largest(losses - old, k)
    ends = torch.cat([ascending[: k // 2], ascending[-k // 2 :]])
    assert chosen(backend, CORESET1, k, losses=losses) == sorted(ends.tolist())
    middle = -(losses - losses.mean()).abs()
    assert chosen(backend, CORESET2, k, losses=losses) == largest(middle, k)


def test_reward_prefers_small_losses_at_first(backend: Backend) -> None:
    decisions = Decisions(backend, [UNIFORM], curriculum_power=1.0)
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert decisions(losses, 2).indices.tolist() == [1, 2]
    decisions.step.fill_(10**9)  # by now all rewards are 1
    scores = decisions(losses, 2).scores
    torch.testing.assert_close(scores, torch.full_like(scores, 0.25), rtol=1e-6, atol=0)


def test_first_step_only_normalises(backend: Backend) -> None:
    decisions = Decisions(backend, [UNIFORM, BIG, SMALL])
    decisions.weights.copy_(torch.tensor([1.0, 2.0, 5.0]))
    decisions.losses.fill_(123.0)
    check_step(decisions, {"losses": batch(30)["losses"]}, 5)
    np.testing.assert_allclose(to_numpy(decisions.weights), [0.125, 0.25, 0.625], rtol=1e-7)


def test_weight_follows_the_change_of_a_methods_loss(backend: Backend) -> None:
    # big_loss sees the largest losses fall, small_loss sees next to nothing happen.
    decisions = Decisions(backend, [BIG, SMALL], beta=2.0, standardize=False)
    low = torch.full((50,), 0.1)
    decisions(torch.cat([low, torch.full((50,), 20.0)]), 10)
    decisions(torch.cat([low, torch.full((50,), 10.0)]), 10)
    big, small = decisions.weights.tolist()
    assert big > 0.6 > small
    assert big + small == pytest.approx(1, abs=1e-6)


def test_a_lost_method_comes_back(backend: Backend) -> None:
    decisions = Decisions(backend, [BIG, SMALL], beta=50.0)
    decisions.step.fill_(5)
    decisions.losses.copy_(torch.tensor([1e-30, 1.0]))
    decisions(batch(20)["losses"], 5)
    assert decisions.weights.min() > 0
    decisions.losses.copy_(torch.tensor([1.0, 1e-30]))
    decisions(batch(20)["losses"], 5)
    assert decisions.weights.argmax() == 1


def test_resumes_bit_for_bit(backend: Backend) -> None:
    whole = Decisions(backend, [*EVERY, 8])
    for step in range(5):
        whole(**batch(77, step, rows=1), k=9)
    resumed = whole.clone()
    for step in range(5, 12):
        inputs = batch(77, step, rows=1)
        for one, other in zip(whole(**inputs, k=9), resumed(**inputs, k=9), strict=True):
            assert_same_bits(one, other)
    for one, other in zip(whole.state, resumed.state, strict=True):
        assert_same_bits(one, other)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [100, 8193, 65_536, 100_003])
def test_same_bits_at_any_thread_count(cpu: Backend, size: int) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        decisions = Decisions(cpu, [*EVERY, 8])
        choices = [decisions(**batch(size, step, rows=1), k=size // 7) for step in range(2)]
        results.append([*decisions.state, *(tensor for choice in choices for tensor in choice)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


@pytest.mark.parametrize("size", [40, 777])
def test_permutation(backend: Backend, size: int) -> None:
    # No method but uniform looks at positions, and no two losses are equal here.
    inputs = batch(size, rows=1)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    moved = {name: value[..., order] for name, value in inputs.items()}
    one, other = Decisions(backend, [*EVERY, 8]), Decisions(backend, [*EVERY, 8])
    for _ in range(3):
        scores, moved_scores = one(**inputs, k=9).scores, other(**moved, k=9).scores
        # Sums in another order.
        torch.testing.assert_close(scores.cpu()[order], moved_scores.cpu(), rtol=SCORES, atol=0)
        torch.testing.assert_close(one.weights, other.weights, rtol=WEIGHTS, atol=0)


@pytest.mark.parametrize("size", [30, 500, 9001])
def test_equal_samples_score_the_same_anywhere(backend: Backend, size: int) -> None:
    # Every lane of a vector, also of the last and incomplete one, rounds alike. coreset1 tells
    # equal losses apart by their positions.
    backend.need(4 * size)
    inputs = {name: value.repeat(3) for name, value in batch(size).items() if value is not None}
    scores = Decisions(backend, [0, 1, 2, 3, 4, 6, 7])(**inputs, k=9).scores.view(3, size)
    assert_same_bits(scores[0], scores[1])
    assert_same_bits(scores[0], scores[2])


def test_any_strides(backend: Backend) -> None:
    inputs = batch(60, rows=4)
    # The statistics: rows apart, samples apart, both; the others: every third element.
    layouts = [
        inputs["statistics"].repeat(1, 2)[:, :60],
        inputs["statistics"].t().contiguous().t(),
        inputs["statistics"].repeat_interleave(2, 1)[:, ::2],
    ]
    spaced = {
        name: inputs[name].repeat_interleave(3)[::3] for name in inputs if name != "statistics"
    }
    methods = [*EVERY, 11, 9]
    expected = Decisions(backend, methods)(**inputs, k=20)
    for statistics in layouts:
        assert torch.equal(statistics, inputs["statistics"])
        assert not statistics.is_contiguous()
        choice = Decisions(backend, methods)(**{**spaced, "statistics": statistics}, k=20)
        for one, other in zip(choice, expected, strict=True):
            assert_same_bits(one, other)
    one_loss = torch.tensor(2.0).expand(7)
    assert Decisions(backend, [BIG, SMALL, CORESET2])(one_loss, 3).indices.tolist() == [0, 1, 2]


def test_sixteen_bit_inputs_are_read_exactly(backend: Backend) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        narrow = batch(333, dtype=dtype, rows=2)
        wide = {name: value.float() for name, value in narrow.items()}
        one, other = Decisions(backend, [*EVERY, 8, 9]), Decisions(backend, [*EVERY, 8, 9])
        for mine, theirs in zip(one(**narrow, k=50), other(**wide, k=50), strict=True):
            assert_same_bits(mine, theirs)


def test_losses_with_a_gradient(cpu: Backend) -> None:
    inputs = batch(20, rows=1)
    decisions, plain = Decisions(cpu, [*EVERY, 8]), Decisions(cpu, [*EVERY, 8])
    choice = decisions(**{name: v.requires_grad_() for name, v in inputs.items()}, k=5)
    assert not choice.scores.requires_grad
    assert not any(tensor.requires_grad for tensor in decisions.state)
    expected = plain(**{name: v.detach() for name, v in inputs.items()}, k=5)
    assert_same_bits(choice.scores, expected.scores)
