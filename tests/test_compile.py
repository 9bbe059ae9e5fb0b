"""The operators under `torch.compile`: no graph break, no recompilation, the same results."""

from __future__ import annotations

from collections.abc import Iterator

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
