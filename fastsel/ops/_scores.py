"""`sample_scores`: the wrapper, shape functions and derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, name, require


class SampleScores(NamedTuple):
    """What `sample_scores` returns; every field is a tensor ``[B]``.

    Attributes:
        loss: Cross-entropy in nats; the only differentiable field.
        grad_norm: Euclidean norm of ``softmax(logits) - onehot(target)``.
        entropy: Entropy of ``softmax(logits)`` in nats.
        lse: ``logsumexp(logits)``.
    """

    loss: Tensor  # [B]
    grad_norm: Tensor  # [B]
    entropy: Tensor  # [B]
    lse: Tensor  # [B]


def sample_scores(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B]
    *,
    ignore_index: int = -100,
) -> SampleScores:
    """Scores every sample of a classification batch in one pass over its logits.

    Gives the cross-entropy, the last-layer gradient norm, the softmax entropy and the logsumexp.
    The gradient norm is ``||softmax(logits) - onehot(target)||_2``, the factor of the upper bound
    of Katharopoulos & Fleuret, "Not All Samples Are Created Equal" (ICML 2018), section 3.2, that
    the last layer alone decides. Losses and gradient norms of samples that the model has learnt
    well keep their relative precision: the target's term stays out of the running sums, so nothing
    cancels. So does their entropy; where one wrong class has nearly all the mass, the entropy is
    exact to about 1e-7 of a nat instead.

    ``loss`` equals ``torch.nn.functional.cross_entropy(logits, target, reduction="none")`` and is
    differentiable with respect to `logits`, once; a second derivative raises NotImplementedError.

    NaN in a row makes all of the row's scores NaN; so does +inf among its logits, and a row of -inf
    alone. Single -inf logits are classes of probability 0; a target among them has loss +inf.

    Args:
        logits: Unnormalised log-probabilities ``[B, C]``, C at least 1; float32, float16, bfloat16,
            and on the CPU float64. Any strides. B may be 0.
        target: The class of each sample ``[B]``, int64, on the same device, each in ``[0, C)`` or
            `ignore_index`.
        ignore_index: Samples with this target score 0 in every field and get a zero gradient.

    Returns:
        `SampleScores` of four tensors ``[B]``: float32 (float64 for float64 logits).

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: Shapes or devices do not fit together.
        IndexError: A target lies outside ``[0, C)``. On CUDA, where finding out would stall the
            host, the scores of such a sample are NaN instead.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> scores = fastsel.sample_scores(logits, torch.tensor([0, 1]))
        >>> scores.loss
        tensor([0.1269, 2.1269])
        >>> scores.grad_norm
        tensor([0.1686, 1.2456])
    """
    check_float_tensor("sample_scores", "logits", logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"sample_scores: target must be a tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"sample_scores: target must be int64, got {name(target.dtype)}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(
            f"sample_scores: ignore_index must be an int, got {type(ignore_index).__name__}"
        )
    if logits.dim() != 2:
        raise ValueError(f"sample_scores: logits must be [B, C], got shape {list(logits.shape)}")
    if logits.shape[1] == 0 and logits.shape[0] > 0:
        raise ValueError(
            f"sample_scores: logits must have at least one class, got shape {list(logits.shape)}"
        )
    if target.dim() != 1 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"sample_scores: target must be [B] with B = {logits.shape[0]} as in logits, "
            f"got shape {list(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(
            f"sample_scores: target must be on {logits.device} as logits are, got {target.device}"
        )
    return SampleScores(*_sample_scores(logits, target, ignore_index=ignore_index))


def register(namespace: str) -> None:
    """Gives the operators of a namespace their shape functions and derivative."""
    backward_op = getattr(torch.ops, namespace).sample_scores_backward.default

    def backward(
        ctx: Any,
        grad_loss: Tensor | None,  # [B]
        *_: Tensor | None,
    ) -> tuple[Tensor | None, None]:
        if grad_loss is None:  # nothing depends on the loss
            return None, None
        logits, target, loss, lse = ctx.saved_tensors
        grad = backward_op(grad_loss, logits, target, loss, lse, ignore_index=ctx.ignore_index)
        return grad, None

    torch.library.register_fake(f"{namespace}::sample_scores", _sample_scores_fake)
    torch.library.register_fake(
        f"{namespace}::sample_scores_backward", _sample_scores_backward_fake
    )
    torch.library.register_autograd(
        f"{namespace}::sample_scores", backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd(f"{namespace}::sample_scores_backward", _no_second_derivative)


def _save_for_backward(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    logits, target = inputs
    loss, grad_norm, entropy, lse = output
    # Not differentiable, and known as such: a loss built from them fails in backward instead of
    # getting zeros.
    ctx.mark_non_differentiable(grad_norm, entropy, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, loss, lse)
    ctx.ignore_index = keyword_only_inputs["ignore_index"]


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "sample_scores: the loss can be differentiated once only; for second derivatives use "
        "torch.nn.functional.cross_entropy"
    )


def _sample_scores_fake(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B]
    *,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require(logits.dim() == 2, lambda: "sample_scores: logits must be [B, C]")
    require(target.dim() == 1, lambda: "sample_scores: target must be [B]")
    require(
        target.shape[0] == logits.shape[0],
        lambda: "sample_scores: target must be [B] with the B of logits",
    )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, grad_norm, entropy, lse = (
        logits.new_empty((logits.shape[0],), dtype=dtype) for _ in range(4)
    )
    return loss, grad_norm, entropy, lse


def _sample_scores_backward_fake(
    grad_loss: Tensor,  # [B]
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B]
    loss: Tensor,  # [B]
    lse: Tensor,  # [B]
    *,
    ignore_index: int = -100,
) -> Tensor:
    return logits.new_empty(logits.shape)


_sample_scores = torch.ops.fastsel.sample_scores.default
