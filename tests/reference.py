"""Slow, obvious versions of every operator in float64: the truth of the tests and benches."""

from __future__ import annotations

from collections.abc import Sequence
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


class AdaSelection:
    """The decisions of `adaselection_` by their definitions, the state carried from step to step.

    The state is rounded to float32 after each step, as the operator keeps it.

    Attributes:
        weights: The methods' weights ``[M]``.
        losses: Their losses in the last step ``[M]``.
        step: How many steps there were.
        excluded: How many samples were excluded in all of them.
    """

    def __init__(
        self,
        methods: Sequence[int],  # [M]
        *,
        beta: float = 0.5,
        curriculum_power: float = 0.5,
        standardize: bool = True,
        weights: Sequence[float] | None = None,  # [M]
    ) -> None:
        """Equal weights, unless given."""
        self.methods = list(methods)
        self.beta, self.curriculum_power = beta, curriculum_power
        self.standardize = standardize
        equal = [1 / len(self.methods)] * len(self.methods)
        self.weights = _as_float32(np.array(equal if weights is None else weights))
        self.losses = np.zeros(len(self.methods))
        self.step = self.excluded = 0

    def decide(
        self,
        losses: Float64,  # [B]
        k: int,
        *,
        grad_norms: Float64 | None = None,  # [B]
        reference_losses: Float64 | None = None,  # [B]
        statistics: Float64 | None = None,  # [S, B]
    ) -> tuple[Int64, Float64]:
        """Indices ``[k]`` and scores ``[B]`` of one step."""
        used = [losses]
        for code in self.methods:
            if code == 3:
                assert grad_norms is not None
                used.append(grad_norms)
            if code == 7:
                assert reference_losses is not None
                used.append(reference_losses)
            if code >= 8:
                assert statistics is not None
                used.append(statistics[code - 8])
        valid = np.flatnonzero(np.isfinite(np.stack(used)).all(0))
        scores = np.full(losses.shape, np.nan)
        self.excluded += losses.size - valid.size
        if valid.size > 0:
            scores[valid] = self._score([values[valid] for values in used])
        last_excluded = np.where(np.isnan(scores), -np.inf, scores)
        order = np.argsort(-last_excluded, kind="stable")
        return np.sort(order[:k]).astype(np.int64), scores

    def _score(self, used: list[Float64]) -> Float64:  # [1 + inputs of methods, n] -> [n]
        losses, inputs = used[0], iter(used[1:])
        importance = np.stack(
            [
                self._importance(_statistic(code, losses, next(inputs) if _reads(code) else losses))
                for code in self.methods
            ]
        )  # [M, n]
        current = importance @ losses  # [M]
        factor = np.ones(len(self.methods))
        if self.step > 0:
            smallest = float(np.finfo(np.float32).tiny)
            before = np.maximum(np.abs(self.losses), smallest)
            exponent = self.beta * np.abs(current - self.losses) / before
            factor = np.exp(exponent - exponent.max())
        grown = np.maximum(self.weights * factor, float(np.finfo(np.float32).tiny))
        self.weights = _as_float32(grown / grown.sum())
        self.losses = _as_float32(current)
        self.step += 1
        exponent = np.zeros(losses.shape)
        if np.isfinite(self.curriculum_power) and losses.any():
            mean = np.abs(losses).mean()
            exponent = -losses / (mean * self.step**self.curriculum_power)
        return np.asarray(np.exp(np.minimum(exponent, 80.0)) * (self.weights @ importance))

    def _importance(self, statistic: Float64) -> Float64:
        std = statistic.std() if self.standardize else 1.0
        if self.standardize and std <= 2.0**-22 * np.abs(statistic).max():
            std = np.inf  # constant: all samples are alike
        weight = np.exp((statistic - statistic.max()) / std)
        return np.asarray(weight / weight.sum())


def _reads(code: int) -> bool:
    """Whether a method of AdaSelection reads something beside the losses."""
    return code in (3, 7) or code >= 8


def _statistic(code: int, losses: Float64, other: Float64) -> Float64:
    n = losses.size
    if code == 0:
        return np.zeros(n)
    if code == 1:
        return losses
    if code == 2:
        return -losses
    if code == 4:
        largest = np.abs(losses).max()
        x = losses / (1.0001 * largest) if largest > 0 else losses
        return np.asarray(0.5 * np.log((1 + x) / (1 - x)))
    if code == 5:
        rank = np.empty(n)
        rank[np.argsort(losses, kind="stable")] = np.arange(n)
        return np.asarray(np.abs(rank - (n - 1) / 2))
    if code == 6:
        return np.asarray(-np.abs(losses - losses.mean()))
    return losses - other if code == 7 else other


def _as_float32(values: Float64) -> Float64:
    return np.asarray(values.astype(np.float32), dtype=np.float64)


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


def linear_grad_norm_sq(
    activations: Float64,  # [B, T..., d]
    grad_outputs: Float64,  # [B, T..., p]
) -> Float64:
    """The squared norm ``[B]`` of each sample's weight gradient ``G^T A`` of a linear layer."""
    batch, positions = len(activations), int(np.prod(activations.shape[1:-1]))
    a = activations.reshape(batch, positions, activations.shape[-1])
    g = grad_outputs.reshape(batch, positions, grad_outputs.shape[-1])
    return np.array([np.square(g_b.T @ a_b).sum() for a_b, g_b in zip(a, g, strict=True)])


def conv_weight_grads(
    inputs: Float64,  # [B, C_in, spatial...]
    grad_outputs: Float64,  # [B, C_out, spatial...]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Float64:
    """Each sample's weight gradient of a convolution ``[B, C_out, C_in / groups, kernel...]``."""
    batch, in_channels = inputs.shape[:2]
    out_channels, out_size = grad_outputs.shape[1], grad_outputs.shape[2:]
    positions = int(np.prod(out_size))
    around = [(0, 0), (0, 0), *((p, p + s) for p, s in zip(padding, stride, strict=True))]
    padded = np.pad(inputs, around)
    grads = np.zeros((batch, out_channels, in_channels // groups, *kernel_size))
    a_group, g_group = in_channels // groups, out_channels // groups
    for tap in np.ndindex(*kernel_size):
        window = tuple(
            slice(k * d, k * d + (n - 1) * s + 1 if n > 0 else k * d, s)
            for k, d, s, n in zip(tap, dilation, stride, out_size, strict=True)
        )
        place = (slice(None), slice(None), *window)
        seen = padded[place]  # [B, C_in, out spatial...]
        for group in range(groups):
            a = seen[:, group * a_group : (group + 1) * a_group].reshape(batch, a_group, positions)
            rows = slice(group * g_group, (group + 1) * g_group)
            g = grad_outputs[:, rows].reshape(batch, g_group, positions)
            place = (slice(None), rows, slice(None), *tap)
            grads[place] = np.einsum("bpt,bdt->bpd", g, a)
    return grads


def conv_grad_norm_sq(
    inputs: Float64,  # [B, C_in, spatial...]
    grad_outputs: Float64,  # [B, C_out, spatial...]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Float64:
    """The squared norm ``[B]`` of each sample's weight gradient of a convolution."""
    grads = conv_weight_grads(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups)
    return np.asarray(np.square(grads).sum(tuple(range(1, grads.ndim))))


def embedding_grad_norm_sq(
    indices: Int64,  # [B, T...]
    grad_outputs: Float64,  # [B, T..., D]
    padding_idx: int = -1,
) -> Float64:
    """The squared norm ``[B]`` of each sample's gradient of an embedding table."""
    norms = np.zeros(len(indices))
    for b, (tokens, grads) in enumerate(zip(indices, grad_outputs, strict=True)):
        rows: dict[int, Float64] = {}
        for token, grad in zip(
            tokens.reshape(-1), grads.reshape(tokens.size, grad_outputs.shape[-1]), strict=True
        ):
            if token != padding_idx:
                rows[int(token)] = rows.get(int(token), 0.0) + grad
        norms[b] = sum(np.square(row).sum() for row in rows.values())
    return norms


def affine_grad_norm_sq(
    normalized: Float64,  # [B, T..., D]
    grad_outputs: Float64,  # [B, T..., D]
) -> Float64:
    """The squared norm ``[B]`` of each sample's gradient of a normalisation's weight."""
    return bias_grad_norm_sq(normalized * grad_outputs)


def bias_grad_norm_sq(grad_outputs: Float64) -> Float64:  # [B, T..., p] -> [B]
    """The squared norm ``[B]`` of each sample's bias gradient, the sum over positions."""
    batch, width = len(grad_outputs), grad_outputs.shape[-1]
    positions = int(np.prod(grad_outputs.shape[1:-1]))
    return np.asarray(np.square(grad_outputs.reshape(batch, positions, width).sum(1)).sum(1))
