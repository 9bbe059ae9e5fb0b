"""What `sample_scores` and its operator say to wrong arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import Backend, backend_names, make_backend

from fastsel import ops

LOGITS = torch.zeros(4, 3)
TARGET = torch.zeros(4, dtype=torch.int64)

WRONG: list[tuple[tuple[Any, Any], type[Exception], str]] = [
    (([[0.0]], TARGET), TypeError, "sample_scores: logits must be a tensor, got list"),
    (
        (LOGITS.int(), TARGET),
        TypeError,
        "sample_scores: logits must be float32, float16, bfloat16 or float64, got int32",
    ),
    (
        (LOGITS.to(torch.complex64), TARGET),
        TypeError,
        "sample_scores: logits must be float32, float16, bfloat16 or float64, got complex64",
    ),
    ((LOGITS, [0] * 4), TypeError, "sample_scores: target must be a tensor, got list"),
    ((LOGITS, TARGET.int()), TypeError, "sample_scores: target must be int64, got int32"),
    ((LOGITS, TARGET.float()), TypeError, "sample_scores: target must be int64, got float32"),
    ((LOGITS, TARGET.bool()), TypeError, "sample_scores: target must be int64, got bool"),
    ((LOGITS[0], TARGET), ValueError, "sample_scores: logits must be [B, C], got shape [3]"),
    (
        (LOGITS[None], TARGET),
        ValueError,
        "sample_scores: logits must be [B, C], got shape [1, 4, 3]",
    ),
    (
        (LOGITS[:, :0], TARGET),
        ValueError,
        "sample_scores: logits must have at least one class, got shape [4, 0]",
    ),
    (
        (LOGITS, TARGET[:3]),
        ValueError,
        "sample_scores: target must be [B] with B = 4 as in logits, got shape [3]",
    ),
    (
        (LOGITS, TARGET[:1]),
        ValueError,
        "sample_scores: target must be [B] with B = 4 as in logits, got shape [1]",
    ),
    (
        (LOGITS, TARGET[:, None]),
        ValueError,
        "sample_scores: target must be [B] with B = 4 as in logits, got shape [4, 1]",
    ),
    (
        (LOGITS, TARGET.to("meta")),
        ValueError,
        "sample_scores: target must be on cpu as logits are, got meta",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrapper(arguments: tuple[Any, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        ops.sample_scores(*arguments)


@pytest.mark.parametrize("ignore_index", [True, 1.0, "0", None])
def test_ignore_index_must_be_an_int(ignore_index: Any) -> None:
    got = type(ignore_index).__name__
    with pytest.raises(TypeError, match=f"^sample_scores: ignore_index must be an int, got {got}$"):
        ops.sample_scores(LOGITS, TARGET, ignore_index=ignore_index)


@pytest.mark.parametrize("bad", [3, -1, -99, 1 << 62])
def test_target_out_of_range(cpu: Backend, bad: int) -> None:
    target = torch.tensor([0, 2, bad, 1])
    text = re.escape(
        f"sample_scores: target must be in [0, 3) or ignore_index -100, got {bad} at position 2"
    )
    with pytest.raises(IndexError, match=text):
        cpu.sample_scores(LOGITS, target)
    with pytest.raises(IndexError, match=text):
        cpu.ops.sample_scores(LOGITS, target)
    assert cpu.sample_scores(LOGITS, target, ignore_index=bad).loss[2] == 0


@pytest.mark.parametrize("bad", [3, -1, 1 << 62])
@pytest.mark.parametrize("name", [name for name in backend_names() if name != "cpu"])
def test_target_out_of_range_on_a_gpu_is_not_a_number(name: str, bad: int) -> None:
    # The host cannot know without waiting for the device, so the row says it.
    backend = make_backend(name)
    logits = LOGITS.to(backend.device).requires_grad_()
    scores = backend.sample_scores(logits, torch.tensor([0, 2, bad, 1]))
    for score in scores:
        assert score.isnan().tolist() == [False, False, True, False]
    torch.autograd.backward(scores.loss.sum())
    assert logits.grad is not None
    assert logits.grad.isnan().all(1).tolist() == [False, False, True, False]


RAW_WRONG = [
    ((LOGITS.int(), TARGET), "sample_scores: logits must be float32, float16"),
    ((LOGITS, TARGET.int()), "sample_scores: target must be int64, got int32"),
    ((LOGITS[0], TARGET), "sample_scores: logits must be [B, C], got [3]"),
    ((LOGITS[:, :0], TARGET), "sample_scores: logits must have at least one class, got [4, 0]"),
    ((LOGITS, TARGET[:3]), "sample_scores: target must be [B] = [4], got [3]"),
    ((LOGITS, TARGET[:, None]), "sample_scores: target must be [B] = [4], got [4, 1]"),
]


@pytest.mark.parametrize(("arguments", "text"), RAW_WRONG, ids=[text for _, text in RAW_WRONG])
def test_operator(backend: Backend, arguments: tuple[Any, Any], text: str) -> None:
    arguments = tuple(tensor.to(backend.device) for tensor in arguments)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        backend.ops.sample_scores(*arguments)


def test_backward_operator(backend: Backend) -> None:
    row = torch.zeros(4, device=backend.device)
    logits, target = LOGITS.to(backend.device), TARGET.to(backend.device)
    backward = backend.ops.sample_scores_backward
    with pytest.raises(
        RuntimeError, match=r"sample_scores_backward: grad_loss must be \[B\] = \[4\], got \[3\]"
    ):
        backward(row[:3], logits, target, row, row)
    with pytest.raises(
        RuntimeError, match="sample_scores_backward: lse must be float32, got float64"
    ):
        backward(row, logits, target, row, row.double())
    with pytest.raises(
        RuntimeError, match="sample_scores_backward: target must be int64, got int32"
    ):
        backward(row, logits, target.int(), row, row)


def test_empty_batches(backend: Backend) -> None:
    for shape in [(0, 3), (0, 0)]:
        logits = torch.zeros(shape, device=backend.device, requires_grad=True)
        scores = backend.sample_scores(logits, TARGET[:0])
        assert [score.shape for score in scores] == [torch.Size([0])] * 4
        torch.autograd.backward(scores.loss.sum())
        assert logits.grad is not None
        assert logits.grad.shape == shape
