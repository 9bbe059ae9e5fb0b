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


if __name__ == "__main__":
    scores()
    topk()
    torch.cuda.synchronize()
    print("done")
