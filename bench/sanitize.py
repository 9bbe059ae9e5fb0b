"""Every CUDA kernel once, on small inputs: what `bench/device.sh` runs under compute-sanitizer."""

from __future__ import annotations

import torch

import fastsel


def scores() -> None:
    """One row length for each kernel, aligned and not, with a backward."""
    for classes in (10, 1001, 5003, 70_001):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(5, classes, device="cuda", dtype=dtype, requires_grad=True)
            target = torch.randint(0, classes, (5,), device="cuda")
            fastsel.sample_scores(logits, target).loss.sum().backward()


# Rows and columns that reach every top-k kernel, and each home of the keys, on a GPU with 132
# multiprocessors of 227 KB: registers of a small and of a large block, shared memory, a grid with
# the keys in shared memory, one block a row and many blocks a row with lists.
# tests/test_topk_kernels.py holds this to the launch plans.
TOPK_SHAPES = ((2, 100), (2, 10_000), (2, 20_000), (2, 40_000), (140, 70_000), (1, 14_000_000))


def topk() -> None:
    """Sorted in the kernel, sorted afterwards, and one result."""
    for rows, columns in TOPK_SHAPES:
        for k in (1, 64, 6000):
            fastsel.topk(torch.randn(rows, columns, device="cuda"), min(k, columns))


# Batch sizes for each of adaselection_'s kernels on such a GPU: a small block, a large one, a grid.
# tests/test_adaselection_kernels.py holds this to the launch plans.
ADASELECTION_SIZES = (1000, 5000, 20_000)


def adaselection() -> None:
    """Every method, from a first step and a later one, with samples that are excluded."""
    methods = [*range(8), 9]
    for size in ADASELECTION_SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            losses, norms, old = torch.rand(3, size, device="cuda").to(dtype)
            losses[::7] = float("nan")
            weights = torch.full((9,), 1 / 9, device="cuda")
            counters = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
            rows = torch.randn(2, size, device="cuda").to(dtype)
            for k in (size // 10, size):
                fastsel.adaselection_(
                    losses, norms, old, methods, weights, torch.zeros_like(weights), counters[0],
                    k, 0.5, 0.5, statistics=rows, excluded=counters[1],
                )  # fmt: skip


if __name__ == "__main__":
    scores()
    topk()
    adaselection()
    torch.cuda.synchronize()
    print("done")
