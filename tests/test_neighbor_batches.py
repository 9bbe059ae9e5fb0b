"""`NeighborBatches` and `NeighborBatchSampler`: what is in a batch, and that it comes again."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastsel
from fastsel import NeighborBatches, NeighborBatchSampler, NeighborTable

N, K, B = 103, 5, 16


def make_table(rows: int = N) -> NeighborTable:
    """Neighbours of seeded points."""
    points = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    return NeighborTable.build(points, K)


def norms_of(indices: Tensor) -> Tensor:
    """Gradient norms that a few samples dominate, by the sample."""
    return (torch.sin(indices * 1.7) ** 8 + 0.01).float()


def run(batches: NeighborBatches, steps: int) -> list[Tensor]:
    """The indices of so many batches, each told its gradient norms."""
    found = []
    for _ in range(steps):
        batch = batches.next()
        found.append(batch.indices)
        batches.update(batch.indices, norms_of(batch.indices))
    return found


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_an_epoch_goes_once_through_the_data(share: float, world_size: int) -> None:
    table = make_table()
    seen: list[Tensor] = []
    for rank in range(world_size):
        batches = NeighborBatches(table, B, share=share, rank=rank, world_size=world_size)
        uniform = B - round(share * B)
        rows = math.ceil(N / world_size)
        assert len(batches) == math.ceil(rows / uniform)
        parts = run(batches, len(batches))
        assert {len(part) for part in parts[:-1]} == {B}
        first = [part[:uniform] for part in parts[:-1]]
        last = rows - uniform * (len(batches) - 1)
        seen += [*first, parts[-1][:last]]
    counts = torch.cat(seen).bincount(minlength=N)
    assert counts.min() == 1
    assert counts.sum() == math.ceil(N / world_size) * world_size


def test_epochs_differ_and_go_on() -> None:
    batches = NeighborBatches(make_table(), B, share=0.0)
    first = torch.cat(run(batches, len(batches)))
    second = torch.cat(run(batches, len(batches)))
    assert batches.epoch == 1
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert len(NeighborBatches(make_table(), B, share=0.0, drop_last=True)) == N // B


@pytest.mark.parametrize("anchors", [None, 3])
def test_the_share_comes_from_neighbours_of_the_last_batch(anchors: int | None) -> None:
    table = make_table()
    batches = NeighborBatches(table, B, share=0.5, anchors=anchors)
    for _ in range(20):
        before = batches.next()
        norms = norms_of(before.indices)
        norms[::3] = 0
        batches.update(before.indices, norms)
        used = before.indices[norms > 0]
        if anchors is not None:
            used = before.indices[norms.topk(anchors).indices]
        after = batches.next()
        assert torch.isin(after.indices[B // 2 :], table.ids[used]).all()


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_weights_make_the_mixture_unbiased(share: float, ids: torch.dtype) -> None:
    table = make_table()
    values = torch.randn(N, generator=torch.Generator().manual_seed(1)).exp().double()
    estimates = []
    for seed in range(3000):
        batches = NeighborBatches(table.ids.to(ids), B, share=share, seed=seed)
        batches.update(torch.arange(20), norms_of(torch.arange(20)))
        batch = batches.next()
        assert batch.weights.max() <= B / (B - round(share * B)) + 1e-4
        estimates.append((batch.weights * values[batch.indices]).mean())
    found = torch.stack(estimates)
    assert abs(found.mean() - values.mean()) < 5 * found.std() / math.sqrt(len(found))


def test_random_mode_and_first_batches_weigh_evenly() -> None:
    batches = NeighborBatches(make_table(), B)
    assert (batches.next().weights == 1).all()
    random = NeighborBatches(make_table(), B, mode="random")
    random.update(torch.zeros(1, dtype=torch.int64), torch.ones(1))
    drawn = torch.cat([random.next().indices[B // 2 :] for _ in range(400)])
    assert len(drawn.unique()) == N
    table = make_table()
    zero = NeighborBatches(table, B, seed=2**62)
    zero.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert (zero.next().weights == 1).all()
    zero.update(torch.arange(4), torch.zeros(4))
    even = NeighborBatches(table, B, seed=2**62)
    even.next()
    even.update(torch.arange(4), torch.ones(4))
    assert torch.equal(zero.next().indices, even.next().indices)


def test_shares_at_either_end() -> None:
    table = make_table()
    whole = NeighborBatches(table, B, share=1.0)
    assert len(whole) == math.ceil(N / B)
    whole.update(torch.tensor([7]), torch.ones(1))
    batch = whole.next()
    assert torch.isin(batch.indices, table.ids[7]).all()
    torch.testing.assert_close(batch.weights, torch.full((B,), K / N))
    more = NeighborBatches(table, B, share=0.5, append=True)
    assert len(more.next().indices) == B + B // 2
    assert len(more) == math.ceil(N / B)


def test_seeds_and_ranks_draw_differently() -> None:
    options: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"seed": 2}, {"rank": 1, "world_size": 2}, {"world_size": 2},
    ]  # fmt: skip
    drawn = {
        tuple(torch.cat(run(NeighborBatches(make_table(), B, **one), 3)).tolist())
        for one in options
    }
    assert len(drawn) == len(options)
    again = [torch.cat(run(NeighborBatches(make_table(), B, seed=5), 9)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("steps", [0, 1, 5, 13, 14, 30])
def test_resuming(steps: int) -> None:
    table = make_table()
    one = NeighborBatches(table, B, seed=3)
    run(one, steps)
    saved = io.BytesIO()
    torch.save(one.state_dict(), saved)
    saved.seek(0)
    two = NeighborBatches(table, B)
    two.load_state_dict(torch.load(saved))
    for mine, other in zip(run(one, 20), run(two, 20), strict=True):
        assert torch.equal(mine, other)


def test_arguments() -> None:
    table = make_table()
    wrong: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([1], {}, TypeError, "table must be a NeighborTable or its ids, got list"),
        (table.ids[0], {}, ValueError, r"table must be \[N, K\], got \[5\]"),
        (table, {"batch_size": 0}, ValueError, "batch_size must be positive, got 0"),
        (table, {"share": 1.5}, ValueError, "share must be between 0 and 1, got 1.5"),
        (table, {"mode": "nn"}, ValueError, "mode must be one of .*, got 'nn'"),
        (table, {"anchors": 0}, ValueError, "anchors must be positive, got 0"),
        (table, {"rank": 2, "world_size": 2}, ValueError, "rank must be between 0 and 1, got 2"),
    ]
    for value, options, error, match in wrong:
        with pytest.raises(error, match=f"NeighborBatches: {match}"):
            NeighborBatches(value, **{"batch_size": B, **options})
    batches = NeighborBatches(table, B)
    indices = torch.arange(4)
    updates: list[tuple[Tensor, Tensor, type[Exception], str]] = [
        (indices, torch.ones(3), ValueError, r"of one shape \[b\], got \[4\] and \[3\]"),
        (indices, torch.tensor([1, 1, math.nan, 1]), ValueError, "not negative, got nan"),
        (indices, torch.tensor([1.0, 1, -2, 1]), ValueError, "not negative, got -2"),
        (indices + 101, torch.ones(4), IndexError, "between 0 and 102, got 101 to 104"),
    ]
    for where, norms, error, match in updates:
        with pytest.raises(error, match=f"NeighborBatches: .*{match}"):
            batches.update(where, norms)
    assert (batches.next().weights == 1).all()  # nothing of it was taken in


# ---- with a DataLoader ----


class Squares(Dataset[Tensor]):
    """A data set whose items tell their index."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index**2))


def loop(sampler: NeighborBatchSampler, workers: int, steps: int) -> list[Tensor]:
    """Batches of a training loop of so many steps, each checked against what was taken."""
    loader = DataLoader(Squares(), batch_sampler=sampler, num_workers=workers)
    found: list[Tensor] = []
    while True:
        for x in loader:
            batch = sampler.taken()
            assert torch.equal(x, batch.indices.float() ** 2)
            sampler.update(batch.indices, norms_of(batch.indices))
            found.append(batch.indices)
            if len(found) == steps:
                return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loop_takes_what_it_got(workers: int) -> None:
    sampler = NeighborBatchSampler(make_table(), B)
    assert len(sampler) == 13
    found = loop(sampler, workers, 30)
    assert sampler.batches.epoch == 2
    assert sampler.lag == (4 if workers else 0)
    first = torch.cat([one[: B // 2] for one in found[:12]])
    assert len(first.unique()) == len(first)
    sampler.set_epoch(0)
    with pytest.raises(RuntimeError, match=r"taken.* was called more often than batches"):
        sampler.taken()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 4, 10, 11, 13, 20])
def test_resuming_a_loop(workers: int, steps: int) -> None:
    whole = loop(NeighborBatchSampler(make_table(), B, seed=2), workers, 40)
    sampler = NeighborBatchSampler(make_table(), B, seed=2)
    loop(sampler, workers, steps)
    state = copy.deepcopy(sampler.state_dict())
    again = NeighborBatchSampler(make_table(), B)
    again.load_state_dict(state)
    for mine, other in zip(whole[steps:], loop(again, workers, 40 - steps), strict=True):
        assert torch.equal(mine, other)


def test_a_sampler_from_features() -> None:
    features = torch.randn(N, 3)
    sampler = NeighborBatchSampler(features, B, neighbors=4, metric="cosine", share=0.25)
    expected = NeighborTable.build(features, 4, metric="cosine")
    assert torch.equal(sampler.batches.table, expected.ids)
    assert len(sampler) == math.ceil(N / 12)
    with pytest.raises(ValueError, match="features must be finite"):
        NeighborBatchSampler(features / 0, B)


def test_learning_from_them() -> None:
    # Weighted, the batches' mean gradient is that of the data: both learn the same line.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
    model = torch.nn.Linear(3, 1)
    norms = fastsel.GradNorms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = NeighborBatches(NeighborTable.build(x, K), B)
    for _ in range(150):
        batch = batches.next()
        optimizer.zero_grad()
        with norms:
            losses = (model(x[batch.indices])[:, 0] - y[batch.indices]).square()
            (batch.weights * losses).mean().backward()
        batches.update(batch.indices, norms.norms / batch.weights)
        optimizer.step()
    torch.testing.assert_close(model.weight[0], torch.tensor([1.0, -2.0, 0.5]), atol=1e-3, rtol=0)
