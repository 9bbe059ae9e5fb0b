"""The peers that benches measure against compute what fastsel computes."""

from __future__ import annotations

import numpy as np
import peers
import reference
import torch


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
