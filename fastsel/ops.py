"""Typed front door of the native operators.

Each function here checks its arguments, so that a mistake is named in Python terms, and calls the
operator of the same name under ``torch.ops.fastsel``. Importing this module loads the native
libraries and gives their operators what ``torch.compile`` and autograd need: shape functions, and
derivatives where something is differentiable. All of them trace under
``torch.compile(fullgraph=True)``, with dynamic shapes too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsel import _library

_library.load()

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOAT_NAMES = "float32, float16, bfloat16 or float64"
_require: Callable[[Any, Callable[[], str]], None] = torch._check


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


class TopK(NamedTuple):
    """What `topk` returns.

    Attributes:
        values: The chosen scores ``[..., k]``, in the dtype of the scores.
        indices: Their positions in the last dimension ``[..., k]``, int64.
    """

    values: Tensor  # [..., k]
    indices: Tensor  # [..., k]


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
    _check_float_tensor("sample_scores", "logits", logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"sample_scores: target must be a tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"sample_scores: target must be int64, got {_name(target.dtype)}")
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


def topk(
    scores: Tensor,  # [..., N]
    k: int,
    *,
    largest: bool = True,
    sorted: bool = True,
) -> TopK:
    """Chooses the k best scores of the last dimension, always the same ones.

    The order is total, so the answer is the one a stable sort gives, on every device and at any
    thread count: ties go to the lower index, -0.0 equals +0.0, and NaN is the largest value, as in
    `torch.topk`. ``values`` is differentiable with respect to `scores`.

    Args:
        scores: Any shape ``[..., N]`` of at least one dimension, N may be 0; float32, float16,
            bfloat16, and on the CPU float64. Any strides.
        k: How many to choose, from 0 to N.
        largest: Choose the largest scores; otherwise the smallest (NaN still counts as the
            largest).
        sorted: Order the chosen best first, ties by index. Otherwise they come in ascending order
            of their index, which is cheaper and reads memory in order when rows are gathered with
            it.

    Returns:
        `TopK` of values ``[..., k]`` in the dtype of `scores` and indices ``[..., k]`` in int64.

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: `scores` has no dimension, or k is not between 0 and N.

    Example:
        >>> values, indices = fastsel.topk(torch.tensor([0.5, 2.0, -1.0, 2.0]), 2)
        >>> indices
        tensor([1, 3])
    """
    _check_float_tensor("topk", "scores", scores)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"topk: k must be an int, got {type(k).__name__}")
    if scores.dim() == 0:
        raise ValueError("topk: scores must have at least one dimension, got shape []")
    if not 0 <= k <= scores.shape[-1]:
        raise ValueError(
            f"topk: k must be between 0 and {scores.shape[-1]} "
            f"(the size of the last dimension), got {k}"
        )
    if scores.requires_grad and torch.is_grad_enabled():
        # An autograd registration would cost every call three times the operator's own overhead,
        # and choosing is almost always done without gradients; gathering is differentiable and paid
        # for only here.
        indices = _topk(scores.detach(), k, largest=largest, sorted=sorted)[1]
        return TopK(scores.gather(-1, indices), indices)
    return TopK(*_topk(scores, k, largest=largest, sorted=sorted))


def register(namespace: str) -> None:
    """Gives the operators of a namespace their shape functions and derivatives.

    ``fastsel`` is registered on import; another build of the same operators, such as the emulated
    CUDA kernels of the test suite, is registered by whoever loads it. A second call for a namespace
    does nothing.

    Args:
        namespace: Where the operators live: ``torch.ops.<namespace>``. Its library must be loaded.

    Raises:
        RuntimeError: The namespace lacks one of the operators.
    """
    if namespace in _registered:
        return
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
    torch.library.register_fake(f"{namespace}::topk", _topk_fake)
    torch.library.register_autograd(
        f"{namespace}::sample_scores", backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd(f"{namespace}::sample_scores_backward", _no_second_derivative)
    _registered.add(namespace)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_float_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{op}: {argument} must be {_FLOAT_NAMES}, got {_name(value.dtype)}")
    if value.dtype == torch.float64 and value.device.type == "cuda":
        raise TypeError(
            f"{op}: {argument} may be float64 on the CPU only, got float64 on {value.device}"
        )


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
    _require(logits.dim() == 2, lambda: "sample_scores: logits must be [B, C]")
    _require(target.dim() == 1, lambda: "sample_scores: target must be [B]")
    _require(
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


def _topk_fake(
    scores: Tensor,  # [..., N]
    k: int,
    *,
    largest: bool = True,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    _require(scores.dim() >= 1, lambda: "topk: scores must have at least one dimension")
    _require(k >= 0, lambda: "topk: k must not be negative")
    _require(k <= scores.shape[-1], lambda: "topk: k must not exceed the last dimension")
    shape = (*scores.shape[:-1], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


_registered: set[str] = set()
register("fastsel")
_sample_scores = torch.ops.fastsel.sample_scores.default
_topk = torch.ops.fastsel.topk.default
