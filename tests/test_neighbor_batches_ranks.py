"""`NeighborBatchSampler` in several processes: ranks share the epoch's order."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import torch
from integration_samples import leave_job
from torch import distributed as dist

from fastsel import NeighborBatchSampler

RANKS, N, B = 2, 61, 8


def work(rank: int, folder: str) -> None:
    """One rank's epoch; each is told gradients of its own samples."""
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    features = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    sampler = NeighborBatchSampler(features, B, neighbors=4, seed=5)
    batches = []
    for _ in sampler:
        batch = sampler.taken()
        sampler.update(batch.indices, torch.ones(len(batch.indices)))
        batches.append(batch.indices)
    torch.save(batches, f"{folder}/{rank}.pt")
    leave_job()


def test_ranks_share_an_epoch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, str(tmp_path))) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert len(found[0]) == len(found[1]) == 8  # 31 samples each, 4 of them a batch
    uniform = torch.cat([batch[: B // 2] for one in found for batch in one[:-1]])
    last = torch.cat([one[-1][:3] for one in found])
    seen = torch.cat([uniform, last]).bincount(minlength=N)
    assert seen.min() == 1
    assert seen.sum() == 62  # one more than there are, so that both have as many batches
    near = [torch.cat([batch[B // 2 :] for batch in one[1:-1]]) for one in found]
    assert not torch.equal(*near)
