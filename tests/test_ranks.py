"""`SelectiveStep` in several processes: one model everywhere, and the choice that was asked."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_samples import leave_job
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastsel.scores import Scores
from fastsel.select import AdaSelection, CostAwareSwitch, LossMemory, SelectiveStep, Selector

RANKS, B, D, C, STEPS = 2, 8, 5, 3, 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))


def data(step: int) -> tuple[Tensor, Tensor]:
    """The batches of all ranks, one after another; some steps have all hard samples on one rank."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(RANKS * B, D, generator=generator)
    if step % 2:
        inputs[:B] *= 1e-3
    return inputs, torch.randint(0, C, (RANKS * B,), generator=generator)


def make_step(model: nn.Module, selector: str, **options: Any) -> SelectiveStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SelectiveStep(model, nn.CrossEntropyLoss(), optimizer, selector, 0.25, **options)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(selector: str, rank: int | None, **options: Any) -> dict[str, Any]:
    """Trains on one rank's rows; on all rows, in one process, where `rank` is None."""
    model = make_model()
    wrapped = model if rank is None else DistributedDataParallel(model)
    step = make_step(wrapped, selector, **options)
    torch.manual_seed(100 + (rank or 0))  # the ranks' own random streams differ
    chosen = []
    for i in range(STEPS):
        inputs, target = data(i)
        rows = slice(None) if rank is None else slice(rank * B, (rank + 1) * B)
        chosen.append(step(inputs[rows], target[rows]).indices)
    step.flush()
    result = {"weights": weights(model), "chosen": chosen}
    if isinstance(step.selector, AdaSelection):
        result["methods"] = list(step.selector.weights.values())
    return result


SCENARIOS: dict[str, dict[str, Any]] = {
    "local": {"selector": "big_loss"},
    "global": {"selector": "big_loss", "across_ranks": True},
    "global adaselection": {"selector": "adaselection", "across_ranks": True},
    "global uniform": {"selector": "uniform", "across_ranks": True},
    "accumulated": {"selector": "big_loss", "accumulation_steps": 2},
    "flushed": {"selector": "big_loss", "accumulation_steps": 3},
}


def switched(rank: int) -> dict[str, Any]:
    """Ranks whose clocks disagree, for the whole length of a decision."""
    model = DistributedDataParallel(make_model())
    step = make_step(model, "big_loss", switch=CostAwareSwitch(overhead=1.0))
    results = [step(*(part[rank * B : (rank + 1) * B] for part in data(i))) for i in range(60)]
    return {
        "weights": weights(model),
        "selected": [result.selected for result in results],
        "decisions": [tuple(decision) for decision in step.switch.decisions],
    }


def switched_together(rank: int) -> dict[str, Any]:
    """The weights of AdaSelection's methods, after plain steps that measured."""
    model = DistributedDataParallel(make_model())
    switch = CostAwareSwitch(overhead=1.0)
    step = make_step(model, "adaselection", switch=switch, across_ranks=True)
    for i in range(60):
        step(*(part[rank * B : (rank + 1) * B] for part in data(i)))
    return {
        "weights": weights(model),
        "methods": list(step.selector.weights.values()),  # type: ignore[attr-defined]
        "share": step.switch.share,
    }


class Noisy(Selector):
    """Draws its statistic, which no rank can know of another."""

    name = "noisy"
    needs = frozenset({"loss"})
    deterministic = False

    def statistic(self, scores: Scores) -> Tensor:
        assert scores.loss is not None
        return torch.randn_like(scores.loss)


def noisy_mixture(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    selector = AdaSelection(("big_loss", Noisy(1.0)), rate=0.25)
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = SelectiveStep(
        model, nn.CrossEntropyLoss(), optimizer, selector, switch="select", across_ranks=True
    )
    counts = []
    for i in range(4):
        result = step(*(part[rank * B : (rank + 1) * B] for part in data(i)))
        counts.append(len(result.indices))
    return {"methods": list(selector.weights.values()), "counts": counts}


def shared_memory(rank: int) -> dict[str, Any]:
    """Each rank trains on half of the data; the memory knows all of it."""
    memory = LossMemory(RANKS * B)
    step = make_step(
        DistributedDataParallel(make_model()), "big_loss", switch="plain", memory=memory
    )
    rows = torch.arange(RANKS * B)[rank::RANKS]
    inputs, target = data(0)
    step(inputs[rows], target[rows], rows)
    return {"losses": memory.losses, "seen": memory.seen}


def with_a_broken_batch(rank: int) -> Tensor:
    """All samples of one rank are broken; the others have enough to choose from."""
    model = make_model()
    step = make_step(DistributedDataParallel(model), "big_loss", switch="select", across_ranks=True)
    inputs, target = data(0)
    inputs[B:] = torch.nan
    step(inputs[rank * B : (rank + 1) * B], target[rank * B : (rank + 1) * B])
    return weights(model)


def with_a_broken_sample(rank: int) -> dict[str, Any]:
    """The last rank has nothing to choose, and a first sample that must not be touched."""
    model = make_model()
    step = make_step(DistributedDataParallel(model), "big_loss", switch="select", across_ranks=True)
    inputs = torch.randn(B, D, generator=torch.Generator().manual_seed(rank))
    if rank:
        with torch.no_grad():  # all others are right already
            target = model(inputs).argmax(1)
        inputs[0] = torch.nan
    else:
        with torch.no_grad():
            target = model(inputs).argmin(1)
    return {
        "weights": weights(model),
        "chosen": step(inputs, target).indices,
        "after": weights(model),
    }


class WithSpares(nn.Module):
    """Uses one of its layers never, and one on the first rank only."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.used, self.unused, self.here = (nn.Linear(D, C) for _ in range(3))
        self.rank = rank

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.used(inputs)
        return output + self.here(inputs) if self.rank == 0 else output


def flushed_with_spares(rank: int) -> list[bool]:
    """Which parameters have a gradient after a flush."""
    model = WithSpares(rank)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    step = make_step(wrapped, "big_loss", switch="select", accumulation_steps=2)
    inputs, target = data(0)
    step(inputs[:B], target[:B])
    step.flush()
    return [parameter.grad is not None for parameter in model.parameters()]


def work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    results: dict[str, Any] = {
        name: train(rank=rank, switch="select", **options) for name, options in SCENARIOS.items()
    }
    results["switched"] = switched(rank)
    results["switched together"] = switched_together(rank)
    results["broken"] = with_a_broken_sample(rank)
    results["spares"] = flushed_with_spares(rank)
    results["noisy"] = noisy_mixture(rank)
    results["memory"] = shared_memory(rank)
    results["broken batch"] = with_a_broken_batch(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    leave_job()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == RANKS * [0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_end_with_the_same_weights(results: list[dict[str, Any]], name: str) -> None:
    first, second = (result[name]["weights"] for result in results)
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(make_model()))


@pytest.mark.parametrize("name", ["local", "accumulated", "flushed"])
def test_a_local_choice_takes_as_many_from_every_rank(
    results: list[dict[str, Any]], name: str
) -> None:
    assert all(len(chosen) == B // 4 for result in results for chosen in result[name]["chosen"])


@pytest.mark.parametrize("name", ["global", "global adaselection"])
def test_a_global_choice_is_that_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    options = {key: SCENARIOS[name][key] for key in ("selector",)}
    single = train(rank=None, switch="select", **options)
    counts = []
    for i in range(STEPS):
        expected = single["chosen"][i]
        mine = [expected[expected < B], expected[expected >= B] - B]
        counts.append([len(part) for part in mine])
        for result, part in zip(results, mine, strict=True):
            if len(part):
                assert torch.equal(result[name]["chosen"][i], part)
            else:  # takes part in the backward with a sample that counts nothing
                assert result[name]["chosen"][i].tolist() == [0]
    assert any(one != other for one, other in counts)  # the ranks' shares do differ
    # The same means, summed in another order.
    torch.testing.assert_close(results[0][name]["weights"], single["weights"], rtol=1e-5, atol=1e-6)
    for result in results:
        if "methods" in single:
            assert result[name]["methods"] == pytest.approx(single["methods"], rel=1e-5)


def test_a_global_draw_is_shared(results: list[dict[str, Any]]) -> None:
    for i in range(STEPS):
        drawn = [result["global uniform"]["chosen"][i] for result in results]
        # Of 16 samples 4 are drawn; a rank that got none names one that counts nothing.
        assert sum(map(len, drawn)) in (4, 5)


def test_accumulation_equals_the_mean_over_ranks_and_steps(results: list[dict[str, Any]]) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(STEPS):
        if i % 2 == 0:
            optimizer.zero_grad()
        inputs, target = data(i)
        rows = torch.cat(
            [result["accumulated"]["chosen"][i] + rank * B for rank, result in enumerate(results)]
        )
        loss = nn.functional.cross_entropy(model(inputs[rows]), target[rows]) / 2
        torch.autograd.backward(loss)
        if i % 2 == 1:
            optimizer.step()
    torch.testing.assert_close(
        results[0]["accumulated"]["weights"], weights(model), rtol=1e-5, atol=1e-6
    )


def test_the_switch_turns_on_all_ranks_at_once(results: list[dict[str, Any]]) -> None:
    first, second = (result["switched"] for result in results)
    assert first["selected"] == second["selected"]
    assert first["decisions"] == second["decisions"]
    assert first["decisions"]
    assert torch.equal(first["weights"], second["weights"])


def test_measuring_leaves_the_selectors_alike(results: list[dict[str, Any]]) -> None:
    first, second = (result["switched together"] for result in results)
    assert first["methods"] == second["methods"]
    assert first["share"] == second["share"]  # of both batches together
    assert torch.equal(first["weights"], second["weights"])


def test_a_rank_without_a_choice_touches_no_broken_sample(results: list[dict[str, Any]]) -> None:
    first, second = (result["broken"] for result in results)
    assert len(first["chosen"]) == RANKS * B // 4
    assert second["chosen"].tolist() == [1]
    assert first["after"].isfinite().all()
    assert torch.equal(first["after"], second["after"])
    assert not torch.equal(first["after"], first["weights"])


def test_a_flush_gives_no_gradient_to_what_no_rank_used(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["spares"] == [True, True, False, False, True, True]


def test_random_statistics_leave_the_mixture_alike(results: list[dict[str, Any]]) -> None:
    first, second = (result["noisy"] for result in results)
    assert first["methods"] == second["methods"]
    # Of 16 samples 4 are chosen together; a rank without one names one all the same.
    assert all(
        sum(counts) in (4, 5) for counts in zip(first["counts"], second["counts"], strict=True)
    )


def test_a_memory_knows_what_other_ranks_trained_on(results: list[dict[str, Any]]) -> None:
    inputs, target = data(0)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(make_model()(inputs), target, reduction="none")
    for result in results:
        torch.testing.assert_close(result["memory"]["losses"], expected, rtol=3e-6, atol=1e-7)
        assert torch.equal(result["memory"]["seen"], torch.zeros(RANKS * B, dtype=torch.int64))


def test_a_rank_whose_batch_is_broken_breaks_no_weights(results: list[dict[str, Any]]) -> None:
    model = make_model()
    inputs, target = data(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = nn.functional.cross_entropy(model(inputs[:B]), target[:B], reduction="none")
    torch.autograd.backward(loss.topk(RANKS * B // 4).values.mean())
    optimizer.step()
    for result in results:
        torch.testing.assert_close(result["broken batch"], weights(model), rtol=1e-5, atol=1e-6)
