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


def topk() -> None:
    """One length for each regime: registers, shared memory, a grid."""
    for n in (100, 10_000, 40_000, 1_000_000):
        for k in (1, 64, 6000):
            fastsel.topk(torch.randn(2, n, device="cuda"), min(k, n))


if __name__ == "__main__":
    scores()
    topk()
    torch.cuda.synchronize()
    print("done")
