"""The operators under `torch.compile`: no graph break, no recompilation, the same results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Backend, assert_same_bits
from samples import logits_and_target
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastsel import ops


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    # Compiled code kept on disk carries the guards of whatever it was first compiled for.
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        yield
    torch.compiler.reset()


def batch(batch_size: int, backend: Backend, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Logits that want a gradient, and targets."""
    logits, target = logits_and_target(
        torch.Generator().manual_seed(batch_size), batch_size, classes
    )
    return logits.to(backend.device).requires_grad_(), target.to(backend.device)


def choose_and_weigh(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both public operators, used as a training step would."""
    scores = ops.sample_scores(logits, target)
    chosen = ops.topk(scores.grad_norm, 8, sorted=False).indices
    return scores.loss[chosen].mean(), scores.entropy, chosen


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_wrappers(cpu: Backend, dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(choose_and_weigh, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch_size in (16, 24, 40):
        logits, target = batch(batch_size, cpu)
        loss, entropy, chosen = compiled(logits, target)
        expected_loss, expected_entropy, expected_chosen = choose_and_weigh(logits, target)
        assert torch.equal(chosen, expected_chosen)
        assert_same_bits(entropy, expected_entropy)
        # The mean of 8 losses may be added in another order.
        torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=0)
        (grad,) = torch.autograd.grad(loss, logits)
        (expected_grad,) = torch.autograd.grad(expected_loss, logits)
        torch.testing.assert_close(grad, expected_grad, rtol=2e-6, atol=0)
    # One graph for every size; where torch has to find out, a static one before it.
    assert counter.frame_count == (1 if dynamic else 2)


def test_k_from_the_batch_size(cpu: Backend) -> None:
    def half(scores: Tensor) -> Tensor:
        return ops.topk(scores, scores.shape[0] // 2).values * 2

    compiled = torch.compile(half, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch_size in (8, 13, 20):
        scores = torch.randn(batch_size)
        assert torch.equal(compiled(scores), half(scores))


def test_no_recompilation_across_steps(cpu: Backend) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(choose_and_weigh, fullgraph=True, backend=counter)
    for _ in range(5):
        logits, target = batch(32, cpu)
        loss, _, _ = compiled(logits, target)
        torch.autograd.backward(loss)
    assert counter.frame_count == 1


def test_operators_of_every_backend(backend: Backend) -> None:
    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad_norm, _, _ = backend.ops.sample_scores(logits, target, ignore_index=3)
        values, indices = backend.ops.topk(grad_norm, 5, largest=False)
        return (loss * loss.detach()).sum() + values.sum(), indices

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch_size in (8, 19):
        logits, target = batch(batch_size, backend)
        loss, indices = compiled(logits, target)
        expected_loss, expected_indices = step(logits, target)
        assert torch.equal(indices, expected_indices)
        # Fused sums of at most 24 terms, in another order.
        torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=0)
        (grad,) = torch.autograd.grad(loss, logits)
        (expected_grad,) = torch.autograd.grad(expected_loss, logits)
        torch.testing.assert_close(grad, expected_grad, rtol=2e-6, atol=0)


def state(methods: int, backend: Backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `adaselection_` changes: weights, losses, step, excluded."""
    device = backend.device
    return (
        torch.full((methods,), 1 / methods, device=device),
        torch.zeros(methods, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def some_losses(size: int, backend: Backend) -> Tensor:
    """Losses of which one is NaN."""
    losses = torch.rand(size, generator=torch.Generator().manual_seed(size))
    losses[size // 2] = float("nan")
    return losses.to(backend.device)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
def test_adaselection(cpu: Backend, dynamic: bool | None, counted: bool) -> None:
    def train(raw: Tensor, weights: Tensor, losses: Tensor, step: Tensor, excluded: Tensor) -> Any:
        loss = raw * raw
        choice = ops.adaselection_(
            loss,
            loss.sqrt(),
            None,
            [0, 1, 3, 5, 8],
            weights,
            losses,
            step,
            raw.shape[0] // 4,
            0.5,
            0.5,
            statistics=raw[None],
            excluded=excluded if counted else None,
        )
        # What was changed in place has to be seen afterwards.
        return loss[choice.indices].mean(), choice.scores * 2, choice.indices, weights + step

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(train, fullgraph=True, dynamic=dynamic, backend=counter)
    mine, theirs = state(5, cpu), state(5, cpu)
    for size in (16, 24, 40, 40):
        raw = some_losses(size, cpu).requires_grad_()
        loss, scores, indices, seen = compiled(raw, *mine)
        expected_loss, expected_scores, expected_indices, expected_seen = train(raw, *theirs)
        assert torch.equal(indices, expected_indices)
        # Squares and roots may be fused, and be another in the last bit.
        torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=0, equal_nan=True)
        torch.testing.assert_close(seen, expected_seen, rtol=1e-5, atol=0)
        assert not scores.requires_grad
        (grad,) = torch.autograd.grad(loss, raw)
        (expected_grad,) = torch.autograd.grad(expected_loss, raw)
        torch.testing.assert_close(grad, expected_grad, rtol=2e-6, atol=0, equal_nan=True)
    assert mine[2].tolist() == theirs[2].tolist() == [4]
    assert mine[3].tolist() == theirs[3].tolist() == [4 if counted else 0]
    assert counter.frame_count == (1 if dynamic else 2)


def test_adaselection_of_every_backend(backend: Backend) -> None:
    def decide(raw: Tensor, weights: Tensor, losses: Tensor, step: Tensor, excluded: Tensor) -> Any:
        return backend.ops.adaselection_(
            raw,
            None,
            None,
            [1, 2, 6],
            weights,
            losses,
            step,
            raw.shape[0] // 3,
            0.5,
            0.5,
            False,
            excluded=excluded,
        )

    compiled = torch.compile(decide, fullgraph=True, dynamic=True)
    mine, theirs = state(3, backend), state(3, backend)
    for size in (8, 19, 33):
        raw = some_losses(size, backend)
        for result, expected in zip(compiled(raw, *mine), decide(raw, *theirs), strict=True):
            assert_same_bits(result, expected)
    for result, expected in zip(mine, theirs, strict=True):
        assert_same_bits(result, expected)


def gradients(batch_size: int, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, T]``, normalised inputs and output gradients ``[B, T, D]``, T varying with B."""
    generator = torch.Generator().manual_seed(batch_size)
    positions = batch_size + 3
    indices = torch.randint(0, 9, (batch_size, positions), generator=generator)
    x, g = torch.randn(2, batch_size, positions, 12, generator=generator)
    return indices.to(backend.device), x.to(backend.device), g.to(backend.device)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_grad_norms(cpu: Backend, dynamic: bool | None) -> None:
    def norms(indices: Tensor, x: Tensor, g: Tensor) -> Tensor:
        embedding = ops.embedding_grad_norm_sq(indices, g, 3)
        affine = ops.affine_grad_norm_sq(x, g) + ops.affine_grad_norm_sq(
            x.transpose(1, 2), g.transpose(1, 2)
        )
        return torch.stack([embedding, affine, ops.bias_grad_norm_sq(g)])

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(norms, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch_size in (8, 12, 20):
        indices, x, g = gradients(batch_size, cpu)
        g.requires_grad_()  # as a gradient of a graph that is kept has it
        actual = compiled(indices, x, g)
        assert_same_bits(actual, norms(indices, x, g))
        assert not actual.requires_grad
    assert counter.frame_count == (1 if dynamic else 2)


def test_grad_norms_of_every_backend(backend: Backend) -> None:
    def norms(indices: Tensor, x: Tensor, g: Tensor) -> Tensor:
        return torch.stack(
            [
                backend.ops.embedding_grad_norm_sq(indices, g, 3),
                backend.ops.affine_grad_norm_sq(x, g),
                backend.ops.bias_grad_norm_sq(g),
            ]
        )

    compiled = torch.compile(norms, fullgraph=True, dynamic=True)
    for batch_size in (8, 19):
        arguments = gradients(batch_size, backend)
        assert_same_bits(compiled(*arguments), norms(*arguments))


def test_differentiable_values(cpu: Backend) -> None:
    compiled = torch.compile(
        lambda scores: ops.topk(scores, 3).values.square().sum(), fullgraph=True
    )
    scores = torch.randn(20, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(scores), scores)
    chosen = ops.topk(scores.detach(), 3)
    assert torch.equal(grad, torch.zeros(20).scatter(0, chosen.indices, 2 * chosen.values))


def test_export(cpu: Backend) -> None:
    class Chooser(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            return choose_and_weigh(logits, target)

    logits, target = batch(16, cpu)
    size = torch.export.Dim("size", min=8, max=512)
    program = torch.export.export(
        Chooser(), (logits.detach(), target), dynamic_shapes=({0: size}, {0: size})
    )
    logits, target = batch(33, cpu)
    assert torch.equal(
        program.module()(logits.detach(), target)[2], choose_and_weigh(logits, target)[2]
    )


def test_wrong_shapes_are_named_while_tracing(backend: Backend) -> None:
    # A shape function that accepts what the kernel refuses would move the error to run time.
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        logits, target = torch.zeros(4, 3, device=backend.device), torch.zeros(5, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="sample_scores: target must be"):
            backend.ops.sample_scores(logits, target.to(backend.device))
        with pytest.raises(RuntimeError, match="topk: k must not exceed"):
            backend.ops.topk(logits, 4)
        with pytest.raises(RuntimeError, match="topk: k must not be negative"):
            backend.ops.topk(logits, -1)
        losses, *rest = logits[:, 0], *state(2, backend)[:3]
        with pytest.raises(RuntimeError, match="adaselection_: losses must be"):
            backend.ops.adaselection_(logits, None, None, [0, 1], *rest, 2, 0.5, 0.5)
        with pytest.raises(RuntimeError, match="adaselection_: grad_norms must be"):
            backend.ops.adaselection_(losses, None, None, [0, 3], *rest, 2, 0.5, 0.5)
        with pytest.raises(RuntimeError, match="adaselection_: reference_losses must be"):
            backend.ops.adaselection_(losses, None, losses[1:], [7], *rest, 2, 0.5, 0.5)
        with pytest.raises(RuntimeError, match="adaselection_: k must not exceed"):
            backend.ops.adaselection_(losses, None, None, [0, 1], *rest, 5, 0.5, 0.5)
        indices = torch.zeros(4, 3, dtype=torch.int64, device=backend.device)
        cube = torch.zeros(4, 3, 2, device=backend.device)
        with pytest.raises(RuntimeError, match="embedding_grad_norm_sq: grad_outputs must be"):
            backend.ops.embedding_grad_norm_sq(indices, cube[:, :2])
        with pytest.raises(RuntimeError, match="embedding_grad_norm_sq: grad_outputs must be"):
            backend.ops.embedding_grad_norm_sq(indices, logits)
        with pytest.raises(RuntimeError, match="affine_grad_norm_sq: grad_outputs must have"):
            backend.ops.affine_grad_norm_sq(cube, cube[:, :, :1])
        with pytest.raises(RuntimeError, match="affine_grad_norm_sq: normalized must be"):
            backend.ops.affine_grad_norm_sq(losses, losses)
        with pytest.raises(RuntimeError, match="bias_grad_norm_sq: grad_outputs must be"):
            backend.ops.bias_grad_norm_sq(losses)


def draw(weights: Tensor, table: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    """The random operators and the search, used as a sampler would."""
    anchors = ops.weighted_sample(weights, 6).indices
    again = ops.weighted_sample(weights, 5, replacement=True)
    near = ops.neighbor_sample(table, anchors, weights[anchors], 4)
    found = ops.knn(features[near.indices], features, 3)
    return anchors, again.indices, near.indices, near.probs, found.indices


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_draws(cpu: Backend, dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(draw, fullgraph=True, dynamic=dynamic, backend=counter)
    for count in (40, 50, 70):
        weights, features = torch.rand(count), torch.randn(count, 5)
        table = ops.knn(features, features, 7).indices
        found = compiled(weights, table, features)
        assert [one.shape[0] for one in found] == [6, 5, 4, 4, 4]
        assert all((one >= 0).all() and (one < count).all() for one in found)
        assert (weights[found[0]] > 0).all()
        torch.testing.assert_close(found[4][:, 0], found[2])
    assert counter.frame_count == (1 if dynamic else 2)
