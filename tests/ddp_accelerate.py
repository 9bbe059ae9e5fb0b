"""One process of two that train together; run by test_integrations_accelerate.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from integration_samples import (
    B,
    K,
    assert_same_weights,
    largest_losses,
    leave_job,
    network,
    samples,
    sgd_steps,
)
from test_integrations_accelerate import prepared
from torch import Tensor, distributed, nn

from fastsel.select import CostAwareSwitch, Uniform

BATCHES = 4
RANK = int(os.environ["RANK"])


def batches_of(rank: int, count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    inputs, target = (part[rank::2] for part in samples(2 * count))
    return [(inputs[i : i + B], target[i : i + B]) for i in range(0, count * B, B)]


def train(selector: Any = "big_loss", count: int = BATCHES, **options: Any) -> tuple[Any, ...]:
    accumulation = options.pop("accumulation", 1)
    accelerator, model, step = prepared(
        selector, options=options, gradient_accumulation_steps=accumulation
    )
    results = []
    for inputs, target in batches_of(RANK, count):
        with accelerator.accumulate(model):
            results.append(step(inputs, target))
    return accelerator, model, step, results


def expected_weights(*, together: bool, accumulation: int = 1) -> nn.Module:
    """The weights after training on what the ranks choose, by themselves or together."""
    model = network()
    group: list[tuple[Tensor, Tensor]] = []
    for parts in zip(batches_of(0), batches_of(1), strict=True):
        if together:
            inputs, target = (torch.cat(both) for both in zip(*parts, strict=True))
            rows = largest_losses(model(inputs), target, 2 * K)
            group.append((inputs[rows], target[rows]))
        else:
            for inputs, target in parts:
                rows = largest_losses(model(inputs), target)
                group.append((inputs[rows], target[rows]))
        if len(group) >= (1 if together else 2) * accumulation:
            sgd_steps(model, [group])
            group = []
    return model


def main(folder: Path) -> None:
    for together, accumulation in ((False, 1), (True, 1), (False, 2), (True, 2)):
        _, model, _, _ = train(across_ranks=together, accumulation=accumulation)
        expected = expected_weights(together=together, accumulation=accumulation)
        # Gradients are averaged after the backward here and before it there: another rounding.
        assert_same_weights(model, expected, bits=False)

    def own_draws() -> Uniform:
        return Uniform(0.25, generator=torch.Generator().manual_seed(RANK))

    accelerator, _, step, _ = train(own_draws())
    accelerator.save_state(str(folder))
    next_draw = step.choose(None, B)
    again, _, resumed, _ = train(own_draws(), 1)
    again.load_state(str(folder))
    assert torch.equal(resumed.choose(None, B), next_draw)
    draws: list[Any] = [None, None]
    distributed.all_gather_object(draws, next_draw.tolist())
    assert draws[0] != draws[1]

    # A switch that looks at every fourth plain step.
    _, _, step, results = train("big_loss", 40, switch=CostAwareSwitch(overhead=1.0))
    sizes = [len(result.indices) for result in results]
    seen: list[Any] = [None, None]
    distributed.all_gather_object(seen, (sizes, step.switch.decisions))
    assert seen[0] == seen[1]
    assert set(sizes) == {B, K}
    assert step.switch.decisions


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_job()
