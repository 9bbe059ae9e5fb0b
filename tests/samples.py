"""One table of sample inputs per operator, for opcheck and the emulator's thread orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sample import Sample
from samples_grad_norm import GRAD_NORMS
from samples_sampling import SAMPLING
from torch import Tensor


def logits_and_target(
    generator: torch.Generator,
    batch_size: int,
    classes: int,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    ignored: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Normal logits ``[B, C]`` of a scale, and targets ``[B]`` of which a share is ignored."""
    logits = scale * torch.randn(batch_size, classes, generator=generator)
    target = torch.randint(0, classes, (batch_size,), generator=generator)
    if ignored > 0:
        skip = torch.rand(batch_size, generator=generator) < ignored
        target = torch.where(skip, torch.full_like(target, ignore_index), target)
    return logits.to(dtype), target


def _scores(
    batch_size: int, classes: int, **options: Any
) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: logits_and_target(generator, batch_size, classes, **options)


def _transposed(generator: torch.Generator) -> tuple[Tensor, ...]:
    logits, target = logits_and_target(generator, 10, 6)
    return logits.t(), target[:1].expand(6)


def _strided(generator: torch.Generator) -> tuple[Tensor, ...]:
    logits, target = logits_and_target(generator, 12, 40)
    return logits[::2, 1::3], target[::2] % 13


def _backward(
    batch_size: int, classes: int, **options: Any
) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        logits, target = logits_and_target(generator, batch_size, classes, **options)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(
            wide, target, reduction="none", ignore_index=options.get("ignore_index", -100)
        )
        grad_loss = torch.randn(batch_size, generator=generator).to(wide.dtype)
        return grad_loss, logits, target, loss, wide.logsumexp(1)

    return make


def _normal(
    *shape: int, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: (torch.randn(*shape, generator=generator).to(dtype),)


def _ties(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(0, 3, (3, 100), generator=generator).float(),)


def _special(generator: torch.Generator) -> tuple[Tensor, ...]:
    inf, nan = float("inf"), float("nan")
    return (torch.tensor([0.0, nan, -0.0, inf, 1e-45, -inf, nan, -1e-45, 3.4e38, -3.4e38]),)


def _every_other(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(4, 70, generator=generator).t()[::2],)


def _decision(
    batch_size: int,
    methods: list[int],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    step: int = 0,
    beta: float = 0.5,
    curriculum_power: float = 0.5,
    stride: int = 1,
) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """The positional arguments of `adaselection_`."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        def positive() -> Tensor:
            return torch.rand(batch_size * stride, generator=generator).to(dtype)[::stride]

        return (
            positive(),
            positive() if 3 in methods else None,
            positive() if 7 in methods else None,
            methods,
            torch.full((len(methods),), 1 / len(methods)),
            torch.rand(len(methods), generator=generator),
            torch.tensor([step]),
            k,
            beta,
            curriculum_power,
        )

    return make


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


SAMPLES: list[Sample] = [
    Sample("sample_scores", "plain", _scores(8, 10)),
    Sample("sample_scores", "empty", _scores(0, 10)),
    Sample("sample_scores", "one_class", _scores(3, 1)),
    Sample("sample_scores", "odd", _scores(5, 333)),
    Sample("sample_scores", "float16", _scores(4, 65, dtype=torch.float16)),
    Sample("sample_scores", "bfloat16", _scores(4, 65, dtype=torch.bfloat16)),
    Sample("sample_scores", "float64", _scores(4, 17, dtype=torch.float64), cpu_only=True),
    Sample("sample_scores", "ignored", _scores(8, 10, ignored=0.5)),
    Sample(
        "sample_scores",
        "ignore_index",
        _scores(8, 10, ignored=0.5, ignore_index=3),
        kwargs={"ignore_index": 3},
    ),
    Sample("sample_scores", "transposed", _transposed),
    Sample("sample_scores", "strided", _strided),
    Sample("sample_scores_backward", "plain", _backward(8, 10)),
    Sample("sample_scores_backward", "empty", _backward(0, 10)),
    Sample("sample_scores_backward", "odd", _backward(5, 333)),
    Sample("sample_scores_backward", "float16", _backward(4, 65, dtype=torch.float16)),
    Sample("sample_scores_backward", "bfloat16", _backward(4, 65, dtype=torch.bfloat16)),
    Sample(
        "sample_scores_backward", "float64", _backward(4, 17, dtype=torch.float64), cpu_only=True
    ),
    Sample(
        "sample_scores_backward",
        "ignore_index",
        _backward(8, 10, ignored=0.5, ignore_index=3),
        kwargs={"ignore_index": 3},
    ),
    Sample("topk", "plain", _normal(100), (10,)),
    Sample("topk", "rows", _normal(2, 3, 50), (7,)),
    Sample("topk", "nothing", _normal(4, 9), (0,)),
    Sample("topk", "everything", _normal(33), (33,)),
    Sample("topk", "empty", _normal(3, 0), (0,)),
    Sample("topk", "no_rows", _normal(0, 5), (2,)),
    Sample("topk", "smallest", _normal(100), (10,), {"largest": False}),
    Sample("topk", "unsorted", _normal(100), (10,), {"sorted": False}),
    Sample("topk", "smallest_unsorted", _normal(100), (10,), {"largest": False, "sorted": False}),
    Sample("topk", "float16", _normal(100, dtype=torch.float16), (10,)),
    Sample("topk", "bfloat16", _normal(100, dtype=torch.bfloat16), (10,)),
    Sample("topk", "float64", _normal(100, dtype=torch.float64), (10,), cpu_only=True),
    Sample("topk", "ties", _ties, (30,)),
    # NaN and the largest values stay unchosen: opcheck compares values, and NaN is equal to
    # nothing.
    Sample("topk", "special", _special, (6,), {"largest": False}),
    Sample("topk", "strided", _every_other, (3,)),
    # No sample is excluded, because its score would be NaN.
    Sample("adaselection_", "plain", _decision(40, [0, 1, 2, 3], 10)),
    Sample("adaselection_", "every_method", _decision(70, [7, 6, 5, 4, 3, 2, 1, 0], 20, step=3)),
    Sample("adaselection_", "one_method", _decision(33, [1], 5)),
    Sample("adaselection_", "one_sample", _decision(1, [0, 1, 5], 1)),
    Sample("adaselection_", "empty", _decision(0, [0, 3], 0)),
    Sample("adaselection_", "nothing", _decision(9, [2], 0)),
    Sample("adaselection_", "everything", _decision(17, [6, 0], 17, step=1)),
    Sample("adaselection_", "several_warps", _decision(1000, [1, 5, 4], 300, step=9)),
    Sample("adaselection_", "no_reward", _decision(20, [1], 5, curriculum_power=float("inf"))),
    Sample("adaselection_", "as_they_are", _decision(20, [1, 2], 5), (False,)),
    Sample("adaselection_", "strided", _decision(20, [1, 3], 5, stride=3)),
    Sample("adaselection_", "float16", _decision(30, [4, 5], 5, dtype=torch.float16)),
    Sample("adaselection_", "bfloat16", _decision(30, [4, 5], 5, dtype=torch.bfloat16)),
    Sample(
        "adaselection_", "float64", _decision(30, [0, 4], 5, dtype=torch.float64), cpu_only=True
    ),
    Sample(
        "adaselection_",
        "statistics",
        _decision(30, [9, 0, 8], 5, step=2),
        kwargs={"statistics": _rows(2, 30), "excluded": torch.tensor([4])},
    ),
    Sample(
        "adaselection_",
        "strided_statistics",
        _decision(30, [8, 10], 5),
        kwargs={"statistics": _rows(30, 3).t(), "excluded": torch.tensor(0)},
    ),
    *GRAD_NORMS,
    *SAMPLING,
]
