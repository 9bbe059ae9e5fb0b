"""Slow, obvious versions of every operator in float64: the truth of the tests and benches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class SampleScores(NamedTuple):
    """The true scores of each row ``[B]``."""

    loss: Float64
    grad_norm: Float64
    entropy: Float64
    lse: Float64


def sample_scores(
    logits: Float64,  # [B, C]
    target: Int64,  # [B]
    *,
    ignore_index: int = -100,
) -> SampleScores:
    """Cross-entropy, last-layer gradient norm, entropy and logsumexp of each row.

    The textbook forms cancel in float64 too: ``1 - p_y`` has no correct digit left at a margin of
    40. So every quantity is written over the classes other than one, as a product or a sum of
    positive terms: the target is left out for the loss and the norm, the largest class for the
    entropy.
    """
    rows = [
        _row_scores(row.astype(np.float64), int(y)) if y != ignore_index else (0.0, 0.0, 0.0, 0.0)
        for row, y in zip(logits, target, strict=True)
    ]
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 4).T
    return SampleScores(*(np.ascontiguousarray(column) for column in columns))


def sample_scores_backward(
    grad_loss: Float64,  # [B]
    logits: Float64,  # [B, C]
    target: Int64,  # [B]
    *,
    ignore_index: int = -100,
) -> Float64:
    """The gradient of ``(grad_loss * loss).sum()`` with respect to the logits ``[B, C]``."""
    grad = np.zeros(logits.shape, dtype=np.float64)
    for b, (row, y) in enumerate(zip(logits.astype(np.float64), target, strict=True)):
        if y == ignore_index:
            continue
        if _undefined(row):
            grad[b] = np.nan
            continue
        others = np.delete(np.arange(row.size), y)
        miss = _sigmoid(_log_sum_exp_minus(row[others], row[y]))  # 1 - p_y
        grad[b, others] = grad_loss[b] * miss * _shares(row[others])
        grad[b, y] = -grad_loss[b] * miss
    return grad


def topk(
    scores: NDArray[Any],  # [..., N]
    k: int,
    *,
    largest: bool = True,
    sorted: bool = True,
) -> tuple[NDArray[Any], Int64]:
    """The k best of the last dimension by a stable sort, NaN as the largest value."""
    nan = np.isnan(scores)
    number = np.where(nan, 0.0, scores.astype(np.float64)) + 0.0  # -0.0 + 0.0 is 0.0
    keys = (-number, ~nan) if largest else (number, nan)  # the last key leads
    order = np.lexsort(keys, axis=-1)
    indices = order[..., :k]
    if not sorted:
        indices = np.sort(indices, axis=-1)
    return np.take_along_axis(scores, indices, axis=-1), indices.astype(np.int64)


def _row_scores(row: Float64, y: int) -> tuple[float, float, float, float]:
    """Loss, gradient norm, entropy and logsumexp of one row."""
    if _undefined(row):
        return (np.nan,) * 4
    others = np.delete(row, y)
    log_odds = _log_sum_exp_minus(others, row[y])  # log((1 - p_y) / p_y)
    loss = _softplus(log_odds)
    miss = _sigmoid(log_odds)  # 1 - p_y
    # ||p - onehot||^2 = (1 - p_y)^2 + sum of (share_j (1 - p_y))^2
    grad_norm = float(miss * np.sqrt(1.0 + np.sum(_shares(others) ** 2)))
    lse = float(row.max() + np.log(np.exp(row - row.max()).sum()))
    return loss, grad_norm, _entropy(row), lse


def _undefined(row: Float64) -> bool:
    return bool(np.isnan(row).any() or np.isposinf(row).any() or np.isneginf(row).all())


def _entropy(row: Float64) -> float:
    """Entropy by the chain rule: whether it is the top class, and which one if not."""
    top = int(row.argmax())
    others = np.delete(row, top)
    log_odds = _log_sum_exp_minus(others, row[top])
    miss = _sigmoid(log_odds)
    if np.isneginf(log_odds):
        return 0.0
    whether = _sigmoid(-log_odds) * _softplus(log_odds) + miss * _softplus(-log_odds)
    share = _shares(others)
    share = share[share > 0]  # p log p is 0 at 0
    return float(whether - miss * np.sum(share * np.log(share)))


def _shares(values: Float64) -> Float64:
    """Softmax, all zero where there is no class to share among."""
    if values.size == 0 or np.isneginf(values).all():
        return np.zeros(values.size)
    weight = np.exp(values - values.max())
    return np.asarray(weight / weight.sum())


def _log_sum_exp_minus(values: Float64, reference: float) -> float:
    """``logsumexp(values) - reference``, subtracting first: exact for logits of any size."""
    if values.size == 0 or np.isneginf(values).all():
        return -np.inf
    top = values.max()
    return float(np.log(np.exp(values - top).sum()) + (top - reference))


def _softplus(x: float) -> float:
    return float(np.logaddexp(0.0, x))


def _sigmoid(x: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -x)))
