"""Every CUDA kernel once, on small inputs: what `bench/device.sh` runs under compute-sanitizer."""

from __future__ import annotations

from typing import Any

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


# Positions and columns for each way to share a sample among blocks and to load it, and for each of
# embedding_grad_norm_sq's sorts.
GRAD_NORM_SHAPES = ((3, 20, 16), (300, 49, 33), (2, 3000, 256), (1, 5001, 129))


def grad_norms() -> None:
    """Both layouts, wide and narrow loads, frequent and padding tokens."""
    for shape in GRAD_NORM_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, g = torch.randn(2, *shape, device="cuda").to(dtype)
            fastsel.affine_grad_norm_sq(x, g)
            fastsel.bias_grad_norm_sq(g)
            x, g = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, g))
            fastsel.affine_grad_norm_sq(x, g)
            fastsel.bias_grad_norm_sq(g)
            for tokens in (1, 7, 100_000):
                indices = torch.randint(0, tokens, shape[:2], device="cuda")
                fastsel.embedding_grad_norm_sq(indices, g.contiguous(), 3)
                fastsel.embedding_grad_norm_sq(indices.int(), g.contiguous())


# Batch size, positions, d, p and form of linear_grad_norm_sq for each of its kernels on such a GPU:
# one position with 8 lanes, a warp and several blocks a sample, few positions with several samples
# a tile, both forms with both tiles.
# tests/test_grad_norm_kernels.py holds this and the next to the launch plans.
LINEAR_SHAPES = (
    (5, 1, 100, 37, "auto"),
    (5, 1, 1001, 500, "auto"),
    (5, 1, 70_001, 9000, "auto"),
    (5, 9, 41, 70, "gram"),
    (5, 31, 40, 72, "gram"),
    (3, 37, 41, 70, "direct"),
    (3, 70, 41, 72, "gram"),
    (2, 33, 1001, 1024, "direct"),
    (4, 1000, 40, 31, "gram"),
)


def linear_grad_norm() -> None:
    """Aligned rows and others, in every dtype."""
    for batch_size, positions, d, p, form in LINEAR_SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a = torch.randn(batch_size, positions, d, device="cuda", dtype=dtype)
            g = torch.randn(batch_size, positions, p, device="cuda", dtype=dtype)
            torch.ops.fastsel.linear_grad_norm_sq(a, g, form=form)


# Batch size, channels in and out, input size, kernel, stride, padding, dilation, groups and form of
# conv_grad_norm_sq: small groups with a warp and with a block, both forms with gathered tiles, and
# with tiles of a kernel of one tap.
CONV_SHAPES: tuple[Any, ...] = (
    (64, 128, 128, (5, 7), (3, 3), (1, 1), (1, 1), (1, 1), 128, "auto"),
    (2, 6, 12, (40, 41), (3, 3), (1, 2), (1, 0), (2, 1), 6, "auto"),
    (70, 20, 70, (9, 11), (3, 2), (2, 1), (1, 0), (1, 2), 1, "direct"),
    (2, 20, 70, (9, 11), (3, 2), (2, 1), (1, 0), (1, 2), 2, "gram"),
    (40, 130, 132, (9, 11), (1, 1), (1, 1), (0, 0), (1, 1), 2, "direct"),
    (2, 130, 70, (8, 12), (1, 1), (1, 1), (0, 0), (1, 1), 1, "gram"),
)


def conv_grad_norm() -> None:
    """In every dtype, two spatial dimensions."""
    for batch_size, channels, outputs, size, *geometry, form in CONV_SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(batch_size, channels, *size, device="cuda", dtype=dtype)
            kernel, stride, padding, dilation, groups = geometry
            weight = torch.zeros(outputs, channels // groups, *kernel, device="cuda", dtype=dtype)
            y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
            torch.ops.fastsel.conv_grad_norm_sq(
                x, torch.randn_like(y), kernel, stride, padding, dilation, groups, form=form
            )


if __name__ == "__main__":
    scores()
    topk()
    adaselection()
    grad_norms()
    linear_grad_norm()
    conv_grad_norm()
    torch.cuda.synchronize()
    print("done")
