"""The peers that benches measure against compute what fastsel computes."""

from __future__ import annotations

import numpy as np
import peers
import pytest
import reference
import torch
from decisions import batch

import fastsel


def test_eager_sample_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, generator=generator)
    target = torch.randint(0, 50, (64,), generator=generator)
    expected = reference.sample_scores(logits.numpy(), target.numpy())
    for got, want in zip(peers.eager_sample_scores(logits, target), expected, strict=True):
        # float32 with margins of a few nats: a dozen roundings of numbers near 5.
        np.testing.assert_allclose(got.numpy(), want, rtol=5e-6, atol=5e-6)


def test_argpartition_topk() -> None:
    scores = np.random.default_rng(0).permutation(1000).astype(np.float32)
    _, indices = reference.topk(scores, 100)
    assert set(peers.argpartition_topk(scores, 100)) == set(indices)


LOSS_METHODS = ["uniform", "big_loss", "small_loss"]
NAMES = [*LOSS_METHODS, "grad_norm", "adaboost", "coreset1", "coreset2", "rho_loss"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_eager_adaselection(compiled: bool) -> None:
    peer = peers.EagerAdaSelection(NAMES)
    decide = torch.compile(peer, fullgraph=True) if compiled else peer
    truth = reference.AdaSelection(range(8))
    weights, step = torch.full((8,), 1 / 8), torch.zeros(1, dtype=torch.int64)
    state = {"method_weights": weights, "method_losses": torch.zeros(8), "step": step}
    for seed in range(4):
        inputs = batch(100, seed)
        del inputs["statistics"]
        indices, scores = decide(**inputs, **state, k=9)
        wide = {name: value.double().numpy() for name, value in inputs.items()}
        expected_indices, expected = truth.decide(k=9, **wide)
        # float32 throughout: sums of a hundred, divided by each other.
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4)
        np.testing.assert_allclose(weights.numpy(), truth.weights, rtol=1e-4)
        assert sorted(indices.tolist()) == expected_indices.tolist()
    assert int(step) == 4


def test_numpy_choice() -> None:
    drawn = peers.numpy_choice(
        np.array([0.0, 1.0, 2.0, 0.0, 1.0], dtype=np.float32), 3, replacement=False
    )
    assert set(drawn.tolist()) == {1, 2, 4}


def test_eager_neighbor_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(40, (40, 6), generator=generator)
    picked, weights = (
        torch.randint(40, (9,), generator=generator),
        torch.rand(9, generator=generator),
    )
    seed = torch.tensor([0])
    known = fastsel.neighbor_sample(table, picked, weights, 500, seed)
    probs = dict(zip(known.indices.tolist(), known.probs.tolist(), strict=True))
    indices, found = peers.eager_neighbor_sample(table, picked, weights, 500, seed)
    for index, prob in zip(indices.tolist(), found.tolist(), strict=True):
        assert prob == pytest.approx(probs[index], rel=1e-5)
