"""The gradient of `sample_scores`' loss, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from conftest import Backend, assert_same_bits, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from samples import logits_and_target
from torch import Tensor

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [
    (0, 10),
    (1, 1),
    (5, 1),
    (1, 2),
    (33, 33),
    (17, 1000),
    (5, 4097),
    (2, 50_257),
    (1, 262_144),
]

# Of one entry, as a share of it. 16-bit gradients: half a unit in the last place, 11 and 8 bits.
# float32: exponents up to 100 round at 100 * 6e-8. float64: the same with 1.1e-16.
ENTRY_RTOL = {
    torch.float32: 8e-6,
    torch.float16: 5.2e-4,
    torch.bfloat16: 4.2e-3,
    torch.float64: 2e-14,
}
# Of the target's entry, which comes from the loss and no exponent.
TARGET_RTOL = {**ENTRY_RTOL, torch.float32: 3e-6}
# Entries below the dtype's smallest normal number lose bits, or are flushed to zero.
ENTRY_ATOL = {
    torch.float32: 1.2e-38,
    torch.float16: 6.2e-5 / 1024,
    torch.bfloat16: 1.2e-38,
    torch.float64: 0.0,
}


def gradient(
    backend: Backend, logits: Tensor, target: Tensor, grad_loss: Tensor, **kwargs: int
) -> Tensor:
    """The gradient with respect to the logits, by autograd."""
    leaf = logits.to(backend.device).detach().requires_grad_()
    loss = backend.sample_scores(leaf, target, **kwargs).loss
    (grad,) = torch.autograd.grad(loss, leaf, grad_loss.to(loss))
    assert grad.dtype == logits.dtype
    assert grad.shape == logits.shape
    return grad.cpu()


def check(backend: Backend, logits: Tensor, target: Tensor, **kwargs: int) -> None:
    """Compares a weighted gradient with the reference, the targets' entries more strictly."""
    grad_loss = torch.linspace(-1.5, 2.0, logits.shape[0])
    actual = to_numpy(gradient(backend, logits, target, grad_loss, **kwargs))
    expected = reference.sample_scores_backward(
        to_numpy(grad_loss), to_numpy(logits), target.numpy(), **kwargs
    )
    dtype = logits.dtype
    # Adding C exponentials rounds the normaliser of them all like sqrt(C).
    summing = (1.1e-16 if dtype == torch.float64 else 6e-8) * logits.shape[1] ** 0.5
    np.testing.assert_allclose(
        actual, expected, rtol=ENTRY_RTOL[dtype] + summing, atol=ENTRY_ATOL[dtype]
    )
    counted = np.flatnonzero(target.numpy() != kwargs.get("ignore_index", -100))
    at_target = counted, target.numpy()[counted]
    np.testing.assert_allclose(
        actual[at_target],
        expected[at_target],
        rtol=TARGET_RTOL[dtype] + summing,
        atol=ENTRY_ATOL[dtype],
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("batch_size", "classes"), SHAPES)
def test_shapes(backend: Backend, batch_size: int, classes: int, dtype: torch.dtype) -> None:
    backend.need(batch_size * classes)
    generator = torch.Generator().manual_seed(classes)
    check(backend, *logits_and_target(generator, batch_size, classes, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("classes", [2, 65])
def test_margins(backend: Backend, classes: int, right: bool, dtype: torch.dtype) -> None:
    # On a well-learnt sample 1 - p_y is a small number of its own, not what is left of 1.
    margins = torch.arange(0.0, 85.0, 4.0)
    generator = torch.Generator().manual_seed(1)
    logits = 0.5 * torch.randn(len(margins), classes, generator=generator)
    standing_out = torch.randint(0, classes, (len(margins),), generator=generator)
    logits[torch.arange(len(margins)), standing_out] += margins
    check(backend, logits.to(dtype), standing_out if right else (standing_out + 1) % classes)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("margin", [0.0, 10.0])
def test_offset_keeps_precision(backend: Backend, offset: float, margin: float) -> None:
    # A float32 logsumexp of 1e4 is off by up to 5e-4, which must not reach the probabilities.
    generator = torch.Generator().manual_seed(2)
    logits, target = logits_and_target(generator, 16, 100)
    logits[torch.arange(16), target] += margin
    check(backend, logits + offset, target)


@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
def test_ignored_rows_get_zeros(backend: Backend, ignore_index: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, target = logits_and_target(generator, 40, 12, ignored=0.5, ignore_index=ignore_index)
    check(backend, logits, target, ignore_index=ignore_index)
    logits[target == ignore_index] = float("nan")
    grad = gradient(backend, logits, target, torch.ones(40), ignore_index=ignore_index)
    assert (grad[target == ignore_index] == 0).all()
    assert grad[target != ignore_index].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_classes(backend: Backend, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, target = logits_and_target(generator, 20, 40, dtype=dtype)
    masked = torch.rand(20, 40, generator=generator) < 0.5
    masked[torch.arange(20), target] = False
    masked[0] = torch.arange(40) != target[0]
    masked[1, target[1]] = True  # an infinite loss has a finite gradient
    logits = logits.masked_fill(masked, -float("inf"))
    check(backend, logits, target)
    grad = gradient(backend, logits, target, torch.ones(20))
    masked[1, target[1]] = False
    assert (grad[masked] == 0).all()
    assert grad[1, target[1]] == -1


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_not_a_number_stays_in_its_row(backend: Backend, poison: float) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 17] = poison
    grad = gradient(backend, logits, torch.zeros(3, dtype=torch.int64), torch.ones(3))
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded_rows", "expanded_classes"])
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    base = torch.randn(24, 24, generator=torch.Generator().manual_seed(5)).to(dtype)
    logits = {
        "transposed": base.t(),
        "strided": base[::3, 1::2],
        "expanded_rows": base[:1].expand(20, 24),
        "expanded_classes": base[:, :1].expand(24, 20),
    }[layout]
    target = torch.arange(2 * logits.shape[0]).remainder(logits.shape[1])[::2]
    check(backend, logits, target)


@pytest.mark.parametrize("reduce", ["sum", "mean", "weighted", "one"])
def test_gradient_of_reductions(backend: Backend, reduce: str) -> None:
    # Reductions hand the backward an expanded or sparse gradient.
    generator = torch.Generator().manual_seed(6)
    logits, target = logits_and_target(generator, 12, 30)
    weight = torch.rand(12, generator=generator)
    reductions = {
        "sum": lambda loss: loss.sum(),
        "mean": lambda loss: loss.mean(),
        "weighted": lambda loss: (weight.to(loss) * loss).sum(),
        "one": lambda loss: loss[3],
    }
    expected_leaf = logits.clone().requires_grad_()
    expected_loss = torch.nn.functional.cross_entropy(expected_leaf, target, reduction="none")
    (expected,) = torch.autograd.grad(reductions[reduce](expected_loss), expected_leaf)
    leaf = logits.to(backend.device).detach().requires_grad_()
    (grad,) = torch.autograd.grad(
        reductions[reduce](backend.sample_scores(leaf, target).loss), leaf
    )
    # Two float32 softmaxes of moderate logits: a few roundings each.
    torch.testing.assert_close(grad.cpu(), expected, rtol=5e-6, atol=1e-8)


def test_gradcheck(cpu: Backend) -> None:
    generator = torch.Generator().manual_seed(7)
    logits, target = logits_and_target(generator, 6, 9, dtype=torch.float64, ignored=0.3)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cpu.sample_scores(x, target).loss, leaf)


def test_only_the_loss_is_differentiable(backend: Backend) -> None:
    logits = torch.randn(4, 5, device=backend.device, requires_grad=True)
    scores = backend.sample_scores(logits, torch.zeros(4, dtype=torch.int64))
    assert scores.loss.requires_grad
    for score in scores[1:]:
        assert not score.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.backward(score.sum())
    assert logits.grad is None


def test_second_derivative_is_refused(backend: Backend) -> None:
    logits = torch.randn(4, 5, device=backend.device, requires_grad=True)
    loss = backend.sample_scores(logits, torch.zeros(4, dtype=torch.int64)).loss
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="sample_scores: the loss can be differentiated once"
    ):
        torch.autograd.backward(grad.pow(2).sum())


def test_same_bits_again(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(8)
    logits, target = logits_and_target(generator, 9, 3000)
    first = gradient(backend, logits, target, torch.ones(9))
    assert_same_bits(gradient(backend, logits, target, torch.ones(9)), first)


@pytest.mark.usefixtures("threads")
def test_same_bits_at_any_thread_count(cpu: Backend) -> None:
    generator = torch.Generator().manual_seed(9)
    logits, target = logits_and_target(generator, 300, 1000)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(gradient(cpu, logits, target, torch.ones(300)))
    assert_same_bits(*results)


rows = st.integers(1, 50).flatmap(
    lambda classes: st.lists(
        st.lists(st.floats(-40, 40, width=32), min_size=classes, max_size=classes),
        min_size=1,
        max_size=5,
    )
)


@given(rows, st.integers(0, 1 << 30))
def test_grad_norm_is_the_norm_of_the_gradient(rows: list[list[float]], pick: int) -> None:
    backend = Backend("cpu")
    logits = torch.tensor(rows)
    target = torch.full((len(rows),), pick % logits.shape[1])
    grad = gradient(backend, logits, target, torch.ones(len(rows)))
    norm = torch.linalg.vector_norm(grad.double(), dim=1).float()
    # Both round as the gradient's entries do.
    torch.testing.assert_close(
        backend.sample_scores(logits, target).grad_norm,
        norm,
        rtol=ENTRY_RTOL[torch.float32],
        atol=1e-37,
    )
    # Probabilities and one-hot both sum to 1; 40 entries of rounding 6e-8 each.
    torch.testing.assert_close(grad.sum(1), torch.zeros(len(rows)), rtol=0, atol=5e-6)
