"""What happens to each function of torch that uses parameters, while a `Capture` is on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsel.grad_norms import attention, backward, by_product, convolution, recurrent
from fastsel.grad_norms.batch_free import Source
from fastsel.grad_norms.checks import batch_first, check_input
from fastsel.grad_norms.kinds import EMBEDDING, LINEAR, MATMUL, SCALE, SHIFT, Use

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

Call = Callable[..., Any]


# ---- linear, embedding ----


def linear(
    capture: Capture, func: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    """`F.linear`: input ``[B, T..., d]``."""
    return named_linear(capture, input, weight, bias, (capture.name(weight), capture.name(bias)))


def named_linear(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str | None, str | None],
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """A linear layer whose parameters have these names; `rows` as in `batch_first`."""
    if names == (None, None):
        return F.linear(input, weight, bias)
    if weight.dim() != 2:
        return capture.plain(F.linear, (input, weight, bias))  # type: ignore[no-any-return]
    if capture.without_samples(input, names):
        return F.linear(input, weight, bias)
    check_input(capture, names[0] or names[1] or "", input, 2)
    if by_product.wanted_linear(capture, names[0], input, weight, rows):
        return by_product.linear(capture, input, weight, bias, names, rows)
    batch_size = input.shape[0] if rows is None else rows[1]
    shape = input.shape[:-1]

    def uses(a: Tensor | None, g: Tensor) -> Sequence[Use | None]:
        g = batch_first(g.reshape(*shape, g.shape[-1]), rows)
        weight_use = None if a is None else Use(LINEAR, batch_first(a, rows), g)
        return weight_use, Use(SHIFT, None, g)

    # A frozen weight's input is not kept for its bias.
    saved = None if names[0] is None else input

    if torch.compiler.is_compiling() and input.dim() > 2:
        # What torch returns is a view then, whose hooks are lost once it is changed in place.
        flat = F.linear(input.flatten(0, -2), weight, bias)
        flat = capture.watch(flat, saved, names, uses, batch_size)
        unflattened: Tensor = flat.unflatten(0, shape)
        return unflattened
    out = F.linear(input, weight, bias)
    return capture.watch(out, saved, names, uses, batch_size, rows)


def embedding(
    capture: Capture,
    func: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`F.embedding`: indices ``[B, T...]``."""
    out = func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    name = capture.name(weight)
    if name is None:
        return out
    if scale_grad_by_freq:
        raise ValueError(
            f"GradNorms: layer {capture.layer(name)!r} has scale_grad_by_freq=True, which divides "
            "by how often a token occurs in the whole batch: a sample has no gradient of its own"
        )
    check_input(capture, name, input, 1, floating=False)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    batch_size = capture.batch_size()
    other_size = batch_size is not None and input.shape[0] != batch_size
    if capture.constant(input) or (other_size and (input.dim() == 1 or input.shape[0] == 1)):
        # Positions, for every sample.
        capture.batch_free.sources[out] = Source(name, input, padding)
        return out

    def uses(indices: Tensor | None, g: Tensor) -> Sequence[Use | None]:
        return (Use(EMBEDDING, indices, g, (padding,)),)

    watched = capture.watch(out, input, (name,), uses, input.shape[0])
    if input.dim() == 1:
        capture.batch_free.singles[watched] = name
    return watched


def matmul(capture: Capture, func: Call, input: Tensor, other: Tensor, **kwargs: Any) -> Any:
    """`torch.matmul` of activations ``[B, T..., d]`` and a parameter ``[d, p]``."""
    name = capture.name(other) if isinstance(other, Tensor) and other.dim() == 2 else None
    if name is None or kwargs or capture.name(input) is not None or capture.constant(input):
        return capture.plain(func, (input, other), kwargs)
    check_input(capture, name, input, 2)
    out = func(input, other)

    def uses(a: Tensor | None, g: Tensor) -> Sequence[Use | None]:
        return (Use(MATMUL, a, g.reshape(*input_shape, g.shape[-1])),)

    input_shape = input.shape[:-1]
    return capture.watch(out, input, (name,), uses, input.shape[0])


# ---- normalisations ----


def layer_norm(
    capture: Capture,
    func: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """`F.layer_norm`: input ``[B, T..., *normalized_shape]``."""
    out = func(input, normalized_shape, weight, bias, eps)
    dims = len(normalized_shape)

    def normalized(x: Tensor) -> Tensor:
        return F.layer_norm(x, normalized_shape, None, None, eps)

    return watch_affine(capture, out, input, weight, bias, normalized, trailing=dims)


def rms_norm(
    capture: Capture,
    func: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """`F.rms_norm`: input ``[B, T..., *normalized_shape]``."""
    out = func(input, normalized_shape, weight, eps)
    dims = len(normalized_shape)

    def normalized(x: Tensor) -> Tensor:
        return F.rms_norm(x, normalized_shape, None, eps)

    return watch_affine(capture, out, input, weight, None, normalized, trailing=dims)


def group_norm(
    capture: Capture,
    func: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """`F.group_norm`: input ``[B, C, *]``."""
    out = func(input, num_groups, weight, bias, eps)

    def normalized(x: Tensor) -> Tensor:
        return F.group_norm(x, num_groups, None, None, eps)

    return watch_affine(capture, out, input, weight, bias, normalized)


def instance_norm(
    capture: Capture,
    func: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`F.instance_norm`: input ``[B, C, *]``."""
    out = func(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )  # fmt: skip
    # With the samples' own statistics the running ones are not read, and must not move twice.
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)

    def normalized(x: Tensor) -> Tensor:
        return F.instance_norm(x, mean, var, None, None, use_input_stats, momentum, eps)

    return watch_affine(capture, out, input, weight, bias, normalized)


def batch_norm(
    capture: Capture,
    func: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`F.batch_norm`: input ``[B, C, *]``; batch statistics only on request."""
    if training and not capture.batch_statistics:
        name = capture.name(weight) or capture.name(bias)
        which = "a batch norm" if name is None else f"layer {capture.layer(name)!r}"
        raise ValueError(
            f"GradNorms: {which} normalises by statistics of the whole batch, so that no sample "
            "has a gradient of its own: use GroupNorm, put the layer into eval(), or take "
            "GradNorms(..., batch_norm='fixed_statistics'), which counts the statistics as "
            "constants"
        )
    out = func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var = (None, None) if training else (running_mean, running_var)

    def normalized(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, None, None, training, 0.0, eps)

    return watch_affine(capture, out, input, weight, bias, normalized)


def watch_affine(
    capture: Capture,
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[Tensor], Tensor],
    trailing: int | None = None,
) -> Tensor:
    """What a normalisation returns, watched for the scale and shift of dimensions or channels."""
    names = capture.name(weight), capture.name(bias)
    if names == (None, None) or capture.without_samples(input, names):
        return out
    check_input(capture, names[0] or names[1] or "", input, 2)
    has_weight = names[0] is not None

    def by_position(x: Tensor) -> Tensor:  # [B, positions, parameters]
        if trailing is None:
            return x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)
        batch = x.shape[0]
        size = 1
        for n in x.shape[x.dim() - trailing :]:
            size *= n
        return x.reshape(batch, -1, size) if x.numel() > 0 else x.new_zeros(batch, 0, size)

    def uses(x: Tensor | None, g: Tensor) -> Sequence[Use | None]:
        grads = by_position(g)
        scale = None
        if has_weight:
            assert x is not None
            scale = Use(SCALE, by_position(normalized(x.to(g.dtype))), grads)
        return scale, Use(SHIFT, None, grads)

    return capture.watch(out, input if has_weight else None, names, uses, input.shape[0])


HANDLERS: dict[Call, Call] = {
    **backward.HANDLERS,
    F.linear: linear,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,  # what compiled code sees of it
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    **convolution.HANDLERS,
    F.multi_head_attention_forward: attention.multi_head_attention,
    **recurrent.HANDLERS,
}
