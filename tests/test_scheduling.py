"""CUDA kernels in every scheduling order: a missing barrier shows as a changed result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from conftest import SIMT_ORDERS, Backend, assert_same_bits, set_simt_device, set_simt_order
from sample import Sample
from samples import SAMPLES, logits_and_target
from torch import Tensor

SMALL = [sample for sample in SAMPLES if not sample.cpu_only]
OTHER_ORDERS = [
    (order, seed)
    for order in SIMT_ORDERS
    for seed in range(1 if order == "reverse" else 3)
    if order != "forward"
]


def same_in_every_order(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """Runs once forward and then in the other orders; the bits must not move."""
    set_simt_order("forward")
    expected = run()
    for order, seed in OTHER_ORDERS:
        set_simt_order(order, seed)
        for result, first in zip(run(), expected, strict=True):
            assert_same_bits(result, first)


@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_samples(simt: Backend, sample: Sample) -> None:
    operator = getattr(simt.ops, sample.op)

    def run() -> tuple[Tensor, ...]:
        args, kwargs = sample.make()  # anew, as the operator may change them
        results = operator(*args, **kwargs)
        changed = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return (*((results,) if isinstance(results, Tensor) else results), *changed)

    same_in_every_order(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch_size", "classes"), [(40, 10), (9, 257), (3, 5000), (1, 60_000)])
def test_scores(simt: Backend, batch_size: int, classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = logits_and_target(generator, batch_size, classes, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        scores = simt.sample_scores(leaf, target)
        (grad,) = torch.autograd.grad(scores.loss.sum(), leaf)
        return (*scores, grad)

    same_in_every_order(run)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize(
    ("shape", "k"),
    [((700,), 64), ((5, 300), 100), ((20_000,), 500), ((2, 40_000), 5000), ((120_000,), 1000)],
)
def test_topk(simt: Backend, shape: tuple[int, ...], k: int, largest: bool) -> None:
    # Rounded scores tie, and ties are where an order of execution leaks into the result.
    scores = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 20).round()
    same_in_every_order(lambda: tuple(simt.topk(scores, k, largest=largest)))


@pytest.mark.parametrize(
    "device", [(1, 64 * 1024), (3, 64 * 1024), (13, 96 * 1024), (8, 227 * 1024)], ids=str
)
@pytest.mark.parametrize(
    ("shape", "k"), [((70_001,), 3000), ((70_001,), 20_000), ((3, 40_000), 100), ((30, 20_000), 9)]
)
def test_topk_on_other_devices(
    simt: Backend, device: tuple[int, int], shape: tuple[int, ...], k: int
) -> None:
    # The size of the GPU decides which kernel runs, on how many blocks, and what fits on chip.
    set_simt_device(*device)
    scores = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 200).round()
    indices = torch.from_numpy(reference.topk(scores.double().numpy(), k)[1])
    assert torch.equal(simt.topk(scores, k).indices, indices)
    same_in_every_order(lambda: tuple(simt.topk(scores, k)))


@pytest.mark.parametrize("device", [(1, 64 * 1024), (13, 96 * 1024), (200, 96 * 1024)], ids=str)
@pytest.mark.parametrize(("batch_size", "classes"), [(1, 60_000), (5, 20_000), (70, 300)])
def test_scores_on_other_devices(
    simt: Backend, device: tuple[int, int], batch_size: int, classes: int
) -> None:
    set_simt_device(*device)
    generator = torch.Generator().manual_seed(3)
    logits, target = logits_and_target(generator, batch_size, classes)
    wide = reference.sample_scores(logits.double().numpy(), target.numpy())
    scores = simt.sample_scores(logits, target)
    for score, expected in zip(scores, wide, strict=True):
        # Sums of up to 60,000 float32 exponentials.
        torch.testing.assert_close(score, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6)
    same_in_every_order(lambda: tuple(simt.sample_scores(logits, target)))
