"""The reference itself against arbitrary precision: all else is measured by it."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import reference

ROWS = [
    ([0.0], 0),
    ([1.0, 2.0, 3.0], 0),
    ([100.0, 0.0, -1.0, 2.0], 0),
    ([100.0, 0.0, -1.0, 2.0], 1),
    ([40.0, 0.0, 0.0, 0.0, 39.0], 0),
    ([-5.0, 60.0, -80.0], 2),
    ([10_000.0, 9_999.5, 9_990.0], 1),
    ([float(x) for x in np.random.default_rng(0).normal(0, 4, 50)], 7),
]


def exact_scores(row: list[float], y: int) -> tuple[list[float], list[float]]:
    """Loss, norm, entropy, logsumexp and the gradient by their definitions, to 120 digits."""
    with mpmath.workdps(120):
        x = [mpmath.mpf(value) for value in row]
        total = mpmath.fsum(mpmath.exp(value) for value in x)
        p = [mpmath.exp(value) / total for value in x]
        grad = [p_j - (j == y) for j, p_j in enumerate(p)]
        norm = mpmath.sqrt(mpmath.fsum(g * g for g in grad))
        entropy = -mpmath.fsum(p_j * mpmath.log(p_j) for p_j in p)
        scores = [-mpmath.log(p[y]), norm, entropy, mpmath.log(total)]
        return [float(s) for s in scores], [float(g) for g in grad]


@pytest.mark.parametrize(("row", "y"), ROWS)
def test_sample_scores_against_definition(row: list[float], y: int) -> None:
    scores, grad = exact_scores(row, y)
    logits, target = np.array([row]), np.array([y])
    # float64 rounds at 1.1e-16; an exponent of up to 100 turns that into 1.1e-14.
    np.testing.assert_allclose(
        np.concatenate(reference.sample_scores(logits, target)), scores, rtol=2e-14, atol=1e-300
    )
    actual = reference.sample_scores_backward(np.ones(1), logits, target)[0]
    np.testing.assert_allclose(actual, grad, rtol=2e-14, atol=1e-300)


def test_topk_order() -> None:
    nan, inf = float("nan"), float("inf")
    scores = np.array([0.0, nan, -0.0, inf, -inf, nan])
    assert reference.topk(scores, 6)[1].tolist() == [1, 5, 3, 0, 2, 4]
    assert reference.topk(scores, 6, largest=False)[1].tolist() == [4, 0, 2, 3, 1, 5]
    assert reference.topk(scores, 3, sorted=False)[1].tolist() == [1, 3, 5]
