"""One rank of two that train together; run by test_integrations_transformers.py."""

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
from torch import Tensor, distributed, nn
from transformers_samples import Classifier, Rows, trainer

from fastsel.select import CostAwareSwitch, Uniform

BATCHES = 3


def data(batches: int = BATCHES) -> Rows:
    inputs, target = samples(2 * batches)
    return Rows(x=inputs, labels=target)


def batches_of(rank: int) -> list[tuple[Tensor, Tensor]]:
    """The Trainer deals whole batches out in turn."""
    inputs, target = (part.view(BATCHES, 2, B, *part.shape[1:])[:, rank] for part in samples(6))
    return list(zip(inputs, target, strict=True))


def expected_weights(*, together: bool) -> nn.Module:
    """The weights after training on what the ranks choose, by themselves or together."""
    model = network()
    for parts in zip(batches_of(0), batches_of(1), strict=True):
        if together:
            inputs, target = (torch.cat(both) for both in zip(*parts, strict=True))
            rows = largest_losses(model(inputs), target, 2 * K)
            sgd_steps(model, [(inputs[rows], target[rows])])
        else:
            chosen = [largest_losses(model(x), y) for x, y in parts]
            group = [(x[rows], y[rows]) for (x, y), rows in zip(parts, chosen, strict=True)]
            sgd_steps(model, [group])
    return model


def own_draws() -> Uniform:
    return Uniform(0.25, generator=torch.Generator().manual_seed(int(os.environ["RANK"])))


def main(folder: Path, alone: Path) -> None:
    for together in (False, True):
        model = Classifier()
        options = {"across_ranks": together}
        made = trainer(folder, model, data(), selection_options=options, ddp_backend="gloo")
        made.train()
        # Gradients are averaged after the backward here and before it there: another rounding.
        assert_same_weights(model.net, expected_weights(together=together), bits=False)

    saving = {"save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo"}
    whole, resumed = Classifier(), Classifier()
    trainer(folder, whole, data(), own_draws(), **saving).train()
    checkpoint = folder / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.glob("fastsel_*")) == [
        "fastsel_0.pt",
        "fastsel_1.pt",
    ]
    again = trainer(folder, resumed, data(), own_draws(), **saving)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(resumed, whole)
    assert torch.equal(resumed.batches[-1], whole.batches[-1])

    # Saved by one process: both go on with its state, and with its switch's decisions.
    made = trainer(folder, Classifier(), data(), switch=CostAwareSwitch(), **saving)
    made.train(resume_from_checkpoint=str(alone))
    assert made.selection.steps == 2 + 1

    model = Classifier()
    switch = CostAwareSwitch(overhead=1.0)  # which looks at every fourth plain step
    made = trainer(folder, model, data(40), switch=switch, ddp_backend="gloo")
    made.train()
    seen: list[Any] = [None, None]
    distributed.all_gather_object(seen, (model.sizes, made.selection.switch.decisions))
    assert seen[0] == seen[1]
    assert set(model.sizes) == {B, K}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_job()
