"""Whether near-neighbour batches will pay: the two diagnostics of the paper, before a long run.

Walia and Singhal, "Adaptive Learning with Dynamic Batch Creation Using Near-Neighbors", section 5:
batches of near neighbours carry more gradient only where neighbours of samples with large gradients
have large gradients too (figure 3), which asks for a loss that is smooth over the distances between
neighbours (figure 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsel import ops
from fastsel.neighbors import NeighborTable
from fastsel.select.exact_scoring import ExactScorer

# Of a 95 % interval of a mean, in standard errors.
_SPREAD = 1.96


@dataclass(frozen=True)
class Suitability:
    """What `suitability` found.

    Attributes:
        mean_norm: The mean gradient norm of all samples.
        neighbor_norm: The mean gradient norm of the neighbours of the largest.
        ratio: The latter over the former.
        ratio_low: Of a 95 % interval over the samples whose neighbours were taken, the low end.
        ratio_high: The high end.
        top_norm: The mean gradient norm of those samples.
    """

    mean_norm: float
    neighbor_norm: float
    ratio: float
    ratio_low: float
    ratio_high: float
    top_norm: float

    @property
    def pays(self) -> bool:
        """Whether neighbours of large gradients have larger ones than the rest."""
        return self.ratio_low > 1

    @property
    def verdict(self) -> str:
        """The finding in words."""
        times = f"{self.ratio:.2f} times ({self.ratio_low:.2f} to {self.ratio_high:.2f})"
        if self.pays:
            return (
                f"Suitable: neighbours of the largest gradients have {times} the mean gradient "
                "norm, so batches of them carry more gradient."
            )
        if self.ratio_high < 1:
            return (
                f"Not suitable: neighbours of the largest gradients have {times} the mean gradient "
                "norm, less than uniform samples."
            )
        return (
            f"Not suitable: neighbours of the largest gradients have {times} the mean gradient "
            "norm, no more than uniform samples as far as can be told."
        )


@dataclass(frozen=True)
class Smoothness:
    """What `smoothness` found.

    Attributes:
        origin_norm: The gradient norm of the sample with the largest.
        distances: How far synthetic points were put from it.
        norms: Their mean gradient norm at each distance.
        spreads: The standard deviation of those norms at each distance.
        neighbor_distances: How far its nearest neighbours in the data are, ascending.
        neighbor_norms: Their gradient norms.
    """

    origin_norm: float
    distances: tuple[float, ...]
    norms: tuple[float, ...]
    spreads: tuple[float, ...]
    neighbor_distances: tuple[float, ...]
    neighbor_norms: tuple[float, ...]

    @property
    def radius(self) -> float:
        """The largest distance up to which all mean norms are within a half of the sample's own."""
        radius = 0.0
        for distance, norm in zip(self.distances, self.norms, strict=True):
            if not 0.5 * self.origin_norm <= norm <= 1.5 * self.origin_norm:
                break
            radius = distance
        return radius

    @property
    def is_smooth(self) -> bool:
        """Whether half of its neighbours are nearer than that."""
        distances = sorted(self.neighbor_distances)
        return distances[len(distances) // 2] <= self.radius

    @property
    def verdict(self) -> str:
        """The finding in words."""
        distances = sorted(self.neighbor_distances)
        where = (
            f"gradient norms stay within a half of the sample's up to a distance of "
            f"{self.radius:.3g}, and its neighbours are {distances[0]:.3g} to "
            f"{distances[-1]:.3g} away"
        )
        return f"Smooth: {where}." if self.is_smooth else f"Not smooth: {where}."


def gradient_norms(
    model: nn.Module,
    criterion: Callable[..., Any],
    inputs: Tensor,  # [N, ...]
    target: Tensor,  # [N, ...]
    *,
    batch_size: int = 512,
) -> Tensor:  # [N]
    """The norm of every sample's gradient of all parameters, the model in eval mode.

    Args:
        model: The model; see `fastsel.GradNorms` for the layers it may have.
        criterion: The loss; see `fastsel.scores.per_sample_losses`.
        inputs: ``[N, ...]``.
        target: ``[N, ...]``.
        batch_size: Samples of a forward and backward.

    Returns:
        ``[N]`` in float32; the parameters' gradients stay as they were.

    Raises:
        ValueError: There are no samples, or inputs and target differ in number.
    """
    if len(inputs) != len(target) or len(inputs) == 0:
        raise ValueError(
            "diagnose: inputs and target must be of as many samples, and some, got "
            f"{len(inputs)} and {len(target)}"
        )
    scorer = ExactScorer(model, criterion)
    parts = []
    for x, y in zip(inputs.split(batch_size), target.split(batch_size), strict=True):
        norms = scorer(x, y, {"grad_norm"}).grad_norm
        assert norms is not None
        parts.append(norms.float())
    return torch.cat(parts)


def suitability(
    norms: Tensor,  # [N]
    table: NeighborTable | Tensor,  # [N, K]
    *,
    top: int = 32,
) -> Suitability:
    """Compares the mean gradient norm with that of the neighbours of the largest (figure 3).

    Args:
        norms: Every sample's gradient norm ``[N]``, as by `gradient_norms`.
        table: The neighbours, or their ids ``[N, K]``.
        top: How many of the largest to take the neighbours of; the paper's 32.

    Returns:
        `Suitability`, with a verdict in words.

    Raises:
        ValueError: The table is of other samples than the norms, a norm is not finite, or all are
            zero.

    Example:
        >>> norms = torch.tensor([5.0, 4.0, 0.1, 0.2])
        >>> table = torch.tensor([[1], [0], [3], [2]])
        >>> fastsel.diagnose.suitability(norms, table, top=2).pays
        True
    """
    ids = table.ids if isinstance(table, NeighborTable) else table
    if norms.dim() != 1 or len(norms) != len(ids):
        raise ValueError(
            f"suitability: norms must be [{len(ids)}], one for each sample of the table, got "
            f"{list(norms.shape)}"
        )
    if not bool(norms.isfinite().all()) or not bool((norms > 0).any()):
        raise ValueError("suitability: norms must be finite and not all zero")
    best = ops.topk(norms, min(top, len(norms)))
    around = norms[ids[best.indices].long()].double().mean(1)  # [top]
    mean = float(norms.double().mean())
    error = float(around.std(correction=1)) / math.sqrt(len(around)) if len(around) > 1 else 0.0
    near = float(around.mean())
    return Suitability(
        mean_norm=mean,
        neighbor_norm=near,
        ratio=near / mean,
        ratio_low=(near - _SPREAD * error) / mean,
        ratio_high=(near + _SPREAD * error) / mean,
        top_norm=float(best.values.double().mean()),
    )


def smoothness(
    model: nn.Module,
    criterion: Callable[..., Any],
    inputs: Tensor,  # [N, ...]
    target: Tensor,  # [N, ...]
    norms: Tensor,  # [N]
    *,
    distances: Sequence[float] | None = None,
    samples: int = 100,
    neighbors: int = 32,
    generator: torch.Generator | None = None,
) -> Smoothness:
    """Gradient norms at growing distance from the sample with the largest (figure 7).

    At each distance synthetic points are put in directions drawn evenly, with the sample's own
    target.

    Args:
        model: The model.
        criterion: The loss.
        inputs: ``[N, ...]``; distances are over all values of a sample.
        target: ``[N, ...]``.
        norms: Every sample's gradient norm ``[N]``, as by `gradient_norms`.
        distances: By default 21 from 0 to twice the distance of the last neighbour.
        samples: Synthetic points at each distance; the paper's 100.
        neighbors: How many of its neighbours in the data to show; the paper's 32.
        generator: Of the directions, on the device of `inputs`.

    Returns:
        `Smoothness`, with a verdict in words.

    Raises:
        ValueError: There are fewer samples than neighbours, or shapes do not fit.
    """
    if not len(inputs) == len(target) == len(norms) > neighbors:
        raise ValueError(
            f"smoothness: inputs, target and norms must be of as many samples, more than "
            f"{neighbors}, got {len(inputs)}, {len(target)} and {len(norms)}"
        )
    flat = inputs.detach().flatten(1).float()
    origin = int(norms.argmax())
    found = ops.knn(flat[origin : origin + 1], flat, neighbors + 1)
    others = found.indices[0][found.indices[0] != origin][:neighbors]
    away = (flat[others].double() - flat[origin].double()).norm(dim=1)
    if distances is None:
        distances = [float(away.max()) * 2 * i / 20 for i in range(21)]
    means, spreads = [], []
    for distance in distances:
        directions = torch.randn(samples, flat.shape[1], generator=generator, device=flat.device)
        directions /= directions.norm(dim=1, keepdim=True)
        points = (flat[origin] + distance * directions).to(inputs.dtype)
        targets = target[origin : origin + 1].expand(samples, *target.shape[1:]).contiguous()
        here = gradient_norms(model, criterion, points.view(-1, *inputs.shape[1:]), targets)
        means.append(float(here.double().mean()))
        spreads.append(float(here.double().std(correction=0)))
    return Smoothness(
        origin_norm=float(norms[origin]),
        distances=tuple(float(distance) for distance in distances),
        norms=tuple(means),
        spreads=tuple(spreads),
        neighbor_distances=tuple(away.tolist()),
        neighbor_norms=tuple(norms[others].tolist()),
    )
