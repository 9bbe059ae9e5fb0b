"""`GradNorms` in several processes: each rank's norms are those of its own samples."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from grad_norm_samples import mean_loss
from integration_samples import leave_job
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastsel.grad_norms import GradNorms

RANKS, B, STEPS = 2, 4, 3


def make_model() -> nn.Sequential:
    """Layers with norms as a by-product and without."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 6)
    )


def batch(step: int) -> Tensor:
    """The samples of all ranks, one after another."""
    return torch.randn(RANKS * B, 100, 12, generator=torch.Generator().manual_seed(step))


def steps(
    model: nn.Module, rank: int | None, group: Any = None, seen: nn.Module | None = None
) -> list[tuple[Tensor, ...]]:
    """Norms, noise scale and a weight after each step, on one rank's samples or on all."""
    norms = GradNorms(model if seen is None else seen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results: list[tuple[Tensor, ...]] = []
    for i in range(STEPS):
        x = batch(i) if rank is None else batch(i)[rank * B : (rank + 1) * B]
        optimizer.zero_grad()
        with norms:
            mean_loss(model(x)).backward()
        noise = norms.noise_scale(group=group)
        optimizer.step()
        weight = next(iter(model.parameters())).detach()
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        results.append((norms.norms, torch.stack(noise), whole.clone()))
    return results


def work(rank: int, how: str, folder: str) -> None:
    """One rank."""
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    inner = make_model()
    model: nn.Module = inner
    if how != "fully_shard":
        model = DistributedDataParallel(model, static_graph=how == "static graph")
    else:
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    seen = inner if how == "static graph" else model
    torch.save(steps(model, rank, dist.group.WORLD, seen), f"{folder}/{rank}.pt")
    leave_job()


@pytest.mark.parametrize("how", ["ddp", "static graph", "fully_shard"])
def test_ranks_agree_with_one_process(how: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, how, str(tmp_path))) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    expected = steps(make_model(), None)
    for step, (norms, noise, weight) in enumerate(expected):
        joined = torch.cat([found[rank][step][0] for rank in range(RANKS)])
        torch.testing.assert_close(joined, norms, rtol=1e-4, atol=1e-7)
        for rank in range(RANKS):
            torch.testing.assert_close(found[rank][step][1], noise, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(found[rank][step][2], weight, rtol=1e-4, atol=1e-6)
