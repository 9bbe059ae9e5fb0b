"""One rank of two that fit together; run by test_integrations_lightning.py."""

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
from lightning_samples import Module, callback, fit
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsel.select import CostAwareSwitch, Uniform

BATCHES = 3
RANK = int(os.environ["RANK"])
TWO_RANKS = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}


def data(batches: int = BATCHES) -> DataLoader[Any]:
    """This rank's samples, every second one, and their positions."""
    columns = (*samples(2 * batches), torch.arange(2 * batches * B))
    return DataLoader(TensorDataset(*(column[RANK::2] for column in columns)), B)


def batches_of(rank: int) -> list[tuple[Tensor, Tensor]]:
    inputs, target = (part[rank::2] for part in samples(2 * BATCHES))
    return [(inputs[i : i + B], target[i : i + B]) for i in range(0, BATCHES * B, B)]


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


def own_draws() -> Any:
    generator = torch.Generator().manual_seed(RANK)
    return callback(Uniform(0.25, generator=generator), ids_key=2)


def main(folder: Path) -> None:
    for together in (False, True):
        module = Module()
        fit(module, data(), callback(ids_key=2, across_ranks=together), **TWO_RANKS)
        # Gradients are averaged after the backward here and before it there: another rounding.
        assert_same_weights(module.net, expected_weights(together=together), bits=False)

    whole, resumed = Module(), Module()
    fit(whole, data(), own_draws(), **TWO_RANKS, max_epochs=2)
    fit(Module(), data(), own_draws(), **TWO_RANKS).save_checkpoint(folder / "half.ckpt")
    fit(resumed, data(), own_draws(), **TWO_RANKS, max_epochs=2, ckpt_path=folder / "half.ckpt")
    assert_same_weights(resumed, whole)
    drawn = [batch[2].tolist() for batch in resumed.batches]
    assert drawn == [batch[2].tolist() for batch in whole.batches[BATCHES:]]

    module, selective = Module(), callback(ids_key=2, switch=CostAwareSwitch(overhead=1.0))
    fit(module, data(40), selective, **TWO_RANKS)
    seen: list[Any] = [None, None]
    distributed.all_gather_object(seen, (module.sizes, selective.selection.switch.decisions))
    assert seen[0] == seen[1]
    assert set(module.sizes) == {B, K}
    assert selective.selection.switch.decisions


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_job()
