"""`SelectiveStep` with cheaper scores: of a memory, a table, another model, or now and then."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_same_bits
from step_samples import B, Hooked, N, batch, data, make_model, make_step
from torch.nn import functional as F

from fastsel.scores import Scores
from fastsel.select import LossMemory, ReferenceLosses, Uniform

# ---- a memory in place of the scoring forward ----


def test_a_memory_runs_no_scoring_forward_and_learns_the_losses() -> None:
    model = Hooked(make_model())
    memory = LossMemory(N, decay=0.0)
    step = make_step(model, "big_loss", 0.25, memory=memory, switch="select")
    inputs, target = data()
    for epoch in range(4):
        for begin in range(0, N, B):
            ids = torch.arange(begin, begin + B)
            model.sizes.clear()
            before = copy.deepcopy(model.model)
            result = step(inputs[ids], target[ids], ids)
            assert model.sizes == [B // 4]
            trained = ids[result.indices]
            # The memory holds the loss each sample had when it was trained on.
            with torch.no_grad():
                losses = F.cross_entropy(before(inputs[trained]), target[trained], reduction="none")
            held, due = memory.read(trained, step.selection.steps)
            assert not due.any()
            torch.testing.assert_close(held, losses, rtol=3e-6, atol=1e-7)
        _, due = memory.read(torch.arange(N), step.selection.steps)
        assert int(due.sum()) == N - (epoch + 1) * N // 4


def test_a_memory_chooses_by_what_it_holds() -> None:
    memory = LossMemory(N)
    ids = torch.arange(B)
    memory.update(ids, torch.linspace(0, 1, B), 0)
    step = make_step(make_model(), "big_loss", 0.25, memory=memory, switch="select")
    result = step(*batch(), ids)
    assert result.indices.tolist() == [12, 13, 14, 15]
    assert_same_bits(result.scores.loss, torch.linspace(0, 1, B))  # type: ignore[union-attr,arg-type]


def test_what_is_too_old_is_visited_again() -> None:
    memory = LossMemory(N, max_age=3)
    ids = torch.arange(B)
    memory.update(ids, torch.linspace(0, 1, B), 0)
    step = make_step(make_model(), "big_loss", 0.25, memory=memory, switch="select")
    step.selection.steps = 3
    assert step(*batch(), ids).indices.tolist() == [12, 13, 14, 15]
    # One step later the others are too old; those just seen are not.
    step.selection.steps = 4
    memory.update(torch.tensor([0, 1]), torch.zeros(2), 4)
    indices = step(*batch(), ids).indices
    assert set(indices.tolist()).isdisjoint({0, 1, 12, 13, 14, 15})


def test_a_memory_needs_ids() -> None:
    step = make_step(make_model(), memory=LossMemory(N), switch="select")
    with pytest.raises(ValueError, match="ids must be given where there is a loss memory"):
        step(*batch())


def test_a_memory_holds_losses_only() -> None:
    with pytest.raises(ValueError, match="'grad_norm' needs grad_norm"):
        make_step(make_model(), "grad_norm", memory=LossMemory(N))


# ---- cheaper scoring ----


def test_scores_with_another_model() -> None:
    model, small = make_model(), make_model(seed=9, width=2)
    step = make_step(model, scoring_model=small, switch="select")
    inputs, target = batch()
    with torch.no_grad():
        losses = F.cross_entropy(small(inputs), target, reduction="none")
    result = step(inputs, target)
    assert torch.equal(result.indices, losses.topk(4).indices.sort().values)


def test_scores_in_lower_precision_and_trains_in_full() -> None:
    seen: list[torch.dtype] = []
    model = make_model()
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    make_step(model, scoring_dtype=torch.bfloat16, switch="select")(*batch())
    assert seen == [torch.bfloat16, torch.float32]


def test_scores_every_third_step_and_draws_between() -> None:
    model = Hooked(make_model())
    step = make_step(model, scoring_every=3, switch="select")
    torch.manual_seed(3)
    results = [step(*batch(seed)) for seed in range(9)]
    assert [result.scores is not None for result in results] == 3 * [True, False, False]
    assert model.sizes == 3 * [B, 4, 4, 4]
    torch.manual_seed(3)
    draws = [Uniform(0.25)(Scores(batch_size=B)) for _ in range(6)]
    drawn = [result.indices for result in results if result.scores is None]
    assert all(torch.equal(one, other) for one, other in zip(draws, drawn, strict=True))


def test_scores_every_third_step_and_recalls_between() -> None:
    model = Hooked(make_model())
    step = make_step(model, memory=LossMemory(N), scoring_every=3, switch="select")
    for i in range(6):
        model.sizes.clear()
        assert step(*batch(i), torch.arange(B)).scores is not None
        assert model.sizes == ([B, 4] if i % 3 == 0 else [4])


def test_reference_losses_come_from_a_table() -> None:
    reference = torch.rand(N, generator=torch.Generator().manual_seed(1))
    inputs, target = data()
    ids = torch.arange(7, 7 + B)
    model = make_model()
    step = make_step(model, "rho_loss", 0.25, reference=ReferenceLosses(reference), switch="select")
    with torch.no_grad():
        losses = F.cross_entropy(model(inputs[ids]), target[ids], reduction="none")
    expected = (losses - reference[ids]).topk(4).indices.sort().values
    assert torch.equal(step(inputs[ids], target[ids], ids).indices, expected)


def test_rho_loss_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="'rho_loss' needs a reference"):
        make_step(make_model(), "rho_loss")
