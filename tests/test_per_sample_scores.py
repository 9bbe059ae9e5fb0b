"""Per-sample scores of every kind of criterion, against a loop over single samples."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.scores import Scores, per_sample_scores

ALL = ("loss", "grad_norm", "entropy")


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes(*shape: int, high: int = 5) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def one_by_one(
    loss_of: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor
) -> Scores:
    """Scores from differentiating each sample's own loss, one backward a sample."""
    losses, norms = [], []
    for b in range(output.shape[0]):
        leaf = output[b : b + 1].double().requires_grad_()
        wide = target[b : b + 1].double() if target.is_floating_point() else target[b : b + 1]
        loss = loss_of(leaf, wide)
        (grad,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.detach())
        norms.append(torch.linalg.vector_norm(grad))
    return Scores(loss=torch.stack(losses).float(), grad_norm=torch.stack(norms).float())


def assert_scores(actual: Scores, expected: Scores) -> None:
    assert actual.loss is not None
    assert actual.grad_norm is not None
    # A handful of float32 operations against float64.
    torch.testing.assert_close(actual.loss, expected.loss, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(actual.grad_norm, expected.grad_norm, rtol=3e-6, atol=1e-7)


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])

# criterion, loss of one sample in float64, output, target
CRITERIA: dict[str, tuple[Any, Callable[..., Tensor], Tensor, Tensor]] = {
    "cross_entropy": (nn.CrossEntropyLoss(), F.cross_entropy, seeded(9, 5), classes(9)),
    "cross_entropy_function": (F.cross_entropy, F.cross_entropy, seeded(9, 5), classes(9)),
    "cross_entropy_sum": (
        nn.CrossEntropyLoss(reduction="sum"),
        F.cross_entropy,
        seeded(9, 5),
        classes(9),
    ),
    "class_weights": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        functools.partial(F.cross_entropy, weight=WEIGHT.double(), reduction="sum"),
        seeded(9, 5),
        classes(9),
    ),
    "label_smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        seeded(9, 5),
        classes(9),
    ),
    "partial_label_smoothing": (
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        seeded(9, 5),
        classes(9),
    ),
    "probabilities": (
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        seeded(9, 5),
        seeded(9, 5).softmax(1),
    ),
    "tokens": (nn.CrossEntropyLoss(), F.cross_entropy, seeded(4, 5, 7), classes(4, 7)),
    "tokens_smoothed": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        functools.partial(F.cross_entropy, label_smoothing=0.2),
        seeded(4, 5, 7),
        classes(4, 7),
    ),
    "pixels": (nn.CrossEntropyLoss(), F.cross_entropy, seeded(3, 5, 4, 6), classes(3, 4, 6)),
    "nll": (nn.NLLLoss(), F.nll_loss, seeded(9, 5).log_softmax(1), classes(9)),
    "mse": (nn.MSELoss(), F.mse_loss, seeded(9, 3), seeded(9, 3) + 1),
    "mse_flat": (nn.MSELoss(), F.mse_loss, seeded(9), seeded(9) + 1),
    "mse_sum": (nn.MSELoss(reduction="sum"), F.mse_loss, seeded(9, 3), seeded(9, 3) + 1),
    "mse_function": (F.mse_loss, F.mse_loss, seeded(9, 3), seeded(9, 3) + 1),
    "mse_image": (nn.MSELoss(), F.mse_loss, seeded(4, 2, 3, 5), seeded(4, 2, 3, 5) + 1),
    "l1": (nn.L1Loss(), F.l1_loss, seeded(9, 3), seeded(9, 3) + 1),
    "smooth_l1": (nn.SmoothL1Loss(), F.smooth_l1_loss, seeded(9, 3), seeded(9, 3) + 1),
    "huber": (
        nn.HuberLoss(delta=0.5),
        functools.partial(F.huber_loss, delta=0.5),
        seeded(9, 3),
        seeded(9, 3) + 1,
    ),
    "bce": (
        nn.BCEWithLogitsLoss(),
        F.binary_cross_entropy_with_logits,
        seeded(9, 3),
        classes(9, 3, high=2).float(),
    ),
    "callable": (
        lambda output, target: (output - target).abs().pow(3).sum(1),
        lambda output, target: (output - target).abs().pow(3).sum(),
        seeded(9, 3),
        seeded(9, 3) + 1,
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_against_one_sample_at_a_time(name: str) -> None:
    criterion, loss_of, output, target = CRITERIA[name]
    assert_scores(
        per_sample_scores(criterion, output, target, needs=("loss", "grad_norm")),
        one_by_one(loss_of, output, target),
    )
    only_loss = per_sample_scores(criterion, output, target).loss
    # The loss does not depend on what else was asked for.
    torch.testing.assert_close(
        only_loss, per_sample_scores(criterion, output, target, needs=ALL[:2]).loss
    )


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["native", "generic"])
@pytest.mark.parametrize("shape", [(6,), (6, 8), (6, 2, 4)], ids=str)
def test_ignored_positions(shape: tuple[int, ...], smoothing: float, ignore_index: int) -> None:
    output, target = seeded(6, 5, *shape[1:]), classes(*shape)
    target.view(6, -1)[:3, ::2] = ignore_index
    target[0] = ignore_index  # a sample without anything to learn from
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing, ignore_index=ignore_index)
    scores = per_sample_scores(criterion, output, target, needs=ALL)
    kept = (target != ignore_index).view(6, -1).any(1)
    assert kept.any()
    expected = one_by_one(criterion, output[kept], target[kept])
    for name in ALL:
        score = getattr(scores, name)
        assert (score[~kept] == 0).all()
        assert score.isfinite().all()
    assert scores.loss is not None
    assert scores.grad_norm is not None
    assert_scores(Scores(loss=scores.loss[kept], grad_norm=scores.grad_norm[kept]), expected)


@pytest.mark.parametrize("shape", [(6,), (6, 8)], ids=str)
def test_entropy_is_the_same_on_both_paths(shape: tuple[int, ...]) -> None:
    output, target = seeded(6, 5, *shape[1:]), classes(*shape)
    target.view(6, -1)[:4, ::2] = -100
    native = per_sample_scores(nn.CrossEntropyLoss(), output, target, needs=ALL)
    generic = per_sample_scores(nn.CrossEntropyLoss(label_smoothing=0.1), output, target, needs=ALL)
    # Two float32 softmaxes of moderate logits.
    torch.testing.assert_close(native.entropy, generic.entropy, rtol=3e-6, atol=1e-7)


def test_the_fast_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsel import ops

    calls = []
    real = ops.sample_scores

    def counting(*args: Any, **kwargs: Any) -> ops.SampleScores:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "sample_scores", counting)
    per_sample_scores(nn.CrossEntropyLoss(ignore_index=1), seeded(4, 5, 7), classes(4, 7))
    per_sample_scores(F.cross_entropy, seeded(4, 5), classes(4))
    assert calls == [{"ignore_index": 1}, {"ignore_index": -100}]
    per_sample_scores(nn.CrossEntropyLoss(weight=WEIGHT), seeded(4, 5), classes(4))

    class Halved(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) / 2

    halved = per_sample_scores(Halved(), seeded(4, 5), classes(4)).loss
    assert len(calls) == 2
    plain = per_sample_scores(nn.CrossEntropyLoss(), seeded(4, 5), classes(4)).loss
    assert plain is not None
    # Two float32 softmaxes of moderate logits.
    torch.testing.assert_close(halved, plain / 2, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    output, target = seeded(4, 5).to(dtype), classes(4)
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)):
        scores = per_sample_scores(criterion, output, target, needs=ALL)
        for name in ALL:
            assert getattr(scores, name).dtype == torch.promote_types(dtype, torch.float32)


def test_empty_batch() -> None:
    for output, target in [
        (seeded(0, 5), classes(0)),
        (seeded(0, 5, 7), classes(0, 7)),
        (seeded(3, 5, 0), classes(3, 0)),
    ]:
        for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)):
            scores = per_sample_scores(criterion, output, target, needs=ALL)
            assert scores.size == output.shape[0]
            assert scores.loss is not None
            assert (scores.loss == 0).all()


def test_nothing_is_changed() -> None:
    criterion = nn.MSELoss(reduction="sum")
    output = seeded(4, 3).requires_grad_()
    scores = per_sample_scores(criterion, output, seeded(4, 3) + 1, needs=ALL[:2])
    assert criterion.reduction == "sum"
    assert output.grad is None
    assert scores.loss is not None
    assert scores.grad_norm is not None
    assert not scores.loss.requires_grad
    assert not scores.grad_norm.requires_grad


def my_scalar_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch warns of what is refused here
@pytest.mark.parametrize(
    ("criterion", "output", "target", "needs", "error", "text"),
    [
        (
            my_scalar_loss,
            seeded(4, 3),
            seeded(4, 3),
            ("loss",),
            ValueError,
            "criterion my_scalar_loss gives no per-sample",
        ),
        (
            nn.MSELoss(),
            seeded(4, 1),
            seeded(4),
            ("loss",),
            ValueError,
            "criterion MSELoss broadcast output [4, 1]",
        ),
        (
            nn.MSELoss(),
            seeded(4),
            seeded(4),
            ALL,
            ValueError,
            "entropy is defined for cross-entropy over classes",
        ),
        (
            nn.MSELoss(),
            seeded(4),
            seeded(5),
            ("loss",),
            ValueError,
            "output and target must have the same first dimension",
        ),
        (
            nn.CrossEntropyLoss(),
            seeded(5),
            classes(4),
            ("loss",),
            ValueError,
            "got shapes [5] and [4]",
        ),
        (
            nn.MSELoss(),
            seeded(4),
            seeded(4),
            ("size",),
            ValueError,
            "needs must be of loss, grad_norm, entropy, margin, reference_loss, got ['size']",
        ),
        (
            nn.MSELoss(),
            seeded(4),
            seeded(4),
            ("margin",),
            ValueError,
            "margin is defined for cross-entropy over classes, got criterion MSELoss",
        ),
        (
            lambda o, t: o["a"],
            {"a": seeded(4)},
            seeded(4),
            ("margin",),
            TypeError,
            "margin needs the model's output to be a tensor, got dict",
        ),
        (
            lambda o, t: 1.0,
            seeded(4),
            seeded(4),
            ("loss",),
            ValueError,
            "must return a tensor, got float",
        ),
        (
            lambda o, t: o["a"],
            {"a": seeded(4)},
            seeded(4),
            ("grad_norm",),
            TypeError,
            "grad_norm needs the model's output to be a tensor, got dict",
        ),
        (
            lambda o, t: o.detach(),
            seeded(4),
            seeded(4),
            ("grad_norm",),
            ValueError,
            "cannot be differentiated",
        ),
    ],
)
def test_errors(
    criterion: Any,
    output: Any,
    target: Tensor,
    needs: tuple[str, ...],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match="^per_sample_scores: .*" + re.escape(text)):
        per_sample_scores(criterion, output, target, needs=needs)


def test_any_output_will_do_for_the_loss() -> None:
    scores = per_sample_scores(
        lambda output, target: (output["a"] - target).abs(), {"a": seeded(4)}, seeded(4) + 1
    )
    assert scores.loss is not None
    # One float32 rounding of numbers near 1.
    torch.testing.assert_close(scores.loss, torch.ones(4), rtol=2e-7, atol=0)


def test_scores_check_themselves() -> None:
    assert Scores(batch_size=0).size == 0
    assert Scores(entropy=torch.ones(3)).size == 3
    assert Scores(batch_size=3).device is None
    with pytest.raises(ValueError, match=r"needs one of loss, .*, reference_loss, or a batch_size"):
        Scores()
    with pytest.raises(ValueError, match=r"loss must be \[B\], got shape \[2, 2\]"):
        Scores(loss=torch.ones(2, 2))
    with pytest.raises(
        ValueError, match="grad_norm must have 2 entries as the rest of the batch, got 3"
    ):
        Scores(loss=torch.ones(2), grad_norm=torch.ones(3))
    with pytest.raises(ValueError, match="margin must have 2 entries as the rest of the batch"):
        Scores(loss=torch.ones(2), margin=torch.ones(3))
    with pytest.raises(ValueError, match="reference_loss must have 2 entries as the rest"):
        Scores(loss=torch.ones(2), reference_loss=torch.ones(3))
    for scores in (Scores(margin=torch.ones(3)), Scores(reference_loss=torch.ones(3))):
        assert scores.size == 3
        assert scores.device == torch.device("cpu")
        assert not scores.empty
    assert Scores(batch_size=3).empty
    with pytest.raises(TypeError, match=r"loss must be of a floating-point dtype, got torch.int64"):
        Scores(loss=torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="loss must be a tensor, got list"):
        Scores(loss=[1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_norms_of_well_learnt_samples_in_sixteen_bits(dtype: torch.dtype) -> None:
    """At a margin of 20 the norm is 0 only where it is taken in the output's own dtype."""
    logits = torch.tensor([[20.0, 0.0, 0.0], [12.0, 0.0, 0.0]], dtype=dtype)
    target = torch.tensor([0, 0])
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float32))
    generic = per_sample_scores(weighted, logits, target, needs=("grad_norm",)).grad_norm
    native = per_sample_scores(
        nn.CrossEntropyLoss(), logits, target, needs=("grad_norm",)
    ).grad_norm
    assert generic is not None
    assert native is not None
    # torch's float32 softmax minus the one-hot vector loses what is below 6e-8 of the target's
    # entry; the other classes' entries, which make up half of the norm, keep their precision.
    assert (generic > 0.5 * native).all()
    assert (generic < 1.5 * native + 1.2e-7).all()
