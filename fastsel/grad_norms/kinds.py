"""How one use of a parameter turns activations and output gradients into per-sample norms.

A use is a kind, a tensor of activations, the gradient of what came out, and integers that describe
the geometry. `norm_sq` is for a parameter used once; `joint_norm_sq` for one that is used several
times in a pass, whose gradients add up before the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR, CONV, EMBEDDING, SCALE, SHIFT, MATMUL = range(6)
SUM = "a scale or shift"
NAMES = ("a linear layer", "a convolution", "an embedding", SUM, SUM, "a matrix")


class Use(NamedTuple):
    """One use of a parameter, complete once its gradient has come.

    Attributes:
        kind: `LINEAR`, `CONV`, `EMBEDDING`, `SCALE`, `SHIFT`, or `MATMUL`, a linear layer whose
            weight is the other way round.
        activations: What the parameter met, batch first: inputs ``[B, T..., d]`` of a linear layer,
            ``[B, C, spatial...]`` of a convolution, indices ``[B, T...]`` of an embedding,
            normalized inputs ``[B, T, D]`` of a scale; nothing for a shift.
        grads: The gradient of what came out, batch first; ``[B, T, D]`` for a scale or a shift.
        options: kernel size, stride, padding, dilation and groups of a convolution in one list,
            preceded by 1 if it is transposed; the padding index of an embedding.
    """

    kind: int
    activations: Tensor | None
    grads: Tensor
    options: Sequence[int] = ()


def norm_sq(use: Use) -> Tensor:  # [B]
    """The squared norm of each sample's gradient of a parameter used once."""
    ops = torch.ops.fastsel
    if use.kind == SHIFT:
        return ops.bias_grad_norm_sq(use.grads)  # type: ignore[no-any-return]
    assert use.activations is not None
    if use.kind == EMBEDDING:
        return ops.embedding_grad_norm_sq(  # type: ignore[no-any-return]
            use.activations, use.grads, use.options[0]
        )
    activations = use.activations.to(use.grads.dtype)
    if use.kind in (LINEAR, MATMUL):
        return ops.linear_grad_norm_sq(activations, use.grads)  # type: ignore[no-any-return]
    if use.kind == SCALE:
        return ops.affine_grad_norm_sq(activations, use.grads)  # type: ignore[no-any-return]
    image, other = conv_roles(use.options[0] == 1, activations, use.grads)
    geometry = split_geometry(use.options)
    return ops.conv_grad_norm_sq(image, other, *geometry)  # type: ignore[no-any-return]


def conv_roles(transposed: bool, activations: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The large and the small image: a transposed convolution exchanges them."""
    return (grads, activations) if transposed else (activations, grads)


def split_geometry(
    options: Sequence[int],
) -> tuple[list[int], list[int], list[int], list[int], int]:
    """Kernel size, stride, padding, dilation and groups from a convolution's options."""
    dims = (len(options) - 2) // 4
    kernel, stride, padding, dilation = (
        list(options[1 + i * dims : 1 + (i + 1) * dims]) for i in range(4)
    )
    return kernel, stride, padding, dilation, options[-1]


def compact(use: Use) -> Use:
    """The same use in less memory, where its gradient is a vector a sample: the vector itself."""
    if use.kind not in (SCALE, SHIFT):
        return use
    grads = use.grads.to(torch.promote_types(use.grads.dtype, torch.float32))
    if use.activations is not None:
        grads = grads * use.activations
    return Use(SHIFT, None, grads.flatten(1, -2).sum(1) if grads.dim() > 2 else grads)


def joint_norm_sq(uses: Sequence[Use], parameter: str) -> Tensor:  # [B]
    """The squared norm of each sample's gradient of a parameter that was used several times.

    Raises:
        NotImplementedError: The uses are of kinds that have no common rule.
    """
    kinds = {use.kind for use in uses}
    if len(uses) == 1:
        return norm_sq(uses[0])
    if kinds in ({LINEAR}, {MATMUL}):
        return norm_sq(_concatenated(uses))
    if kinds == {EMBEDDING} and len({tuple(use.options) for use in uses}) == 1:
        return norm_sq(_concatenated(uses))
    if kinds == {LINEAR, EMBEDDING} and len({u.options[0] for u in uses if u.options}) == 1:
        linear = _concatenated([use for use in uses if use.kind == LINEAR])
        embedding = _concatenated([use for use in uses if use.kind == EMBEDDING])
        cross = _linear_embedding_cross(linear, embedding)
        return (norm_sq(linear) + norm_sq(embedding) + 2 * cross).clamp(min=0)
    if kinds == {CONV}:
        return _unfolded_norm_sq(uses, parameter)
    if kinds <= {SCALE, SHIFT}:
        sums = [compact(use).grads for use in uses]
        return torch.stack(sums).sum(0).square().sum(-1)
    names = " and ".join(NAMES[kind] for kind in sorted(kinds))
    raise NotImplementedError(
        f"GradNorms: parameter {parameter!r} is used as {names} in one pass, for which there is no "
        "joint rule: register_norm_rule for the module that does so, or GradNorms(..., "
        "missing='approximate')"
    )


def _concatenated(uses: Sequence[Use]) -> Use:
    """Several uses as one of more positions."""
    if len(uses) == 1:
        return uses[0]
    first = uses[0]
    activations = []
    for use in uses:
        assert use.activations is not None
        rows = use.activations
        indices = use.kind == EMBEDDING
        activations.append(
            rows.reshape(rows.shape[0], -1)
            if indices
            else rows.to(first.grads.dtype).reshape(rows.shape[0], -1, rows.shape[-1])
        )
    grads = [use.grads.reshape(use.grads.shape[0], -1, use.grads.shape[-1]) for use in uses]
    return Use(
        first.kind,
        torch.cat(activations, 1),
        torch.cat([grad.to(grads[0].dtype) for grad in grads], 1),
        first.options,
    )


def _linear_embedding_cross(linear: Use, embedding: Use) -> Tensor:  # [B]
    """``<G^T A, E>`` of a table W ``[V, D]`` that embeds tokens and maps ``[D]`` to ``[V]``.

    Row v of the linear layer's gradient is ``sum_s G[s, v] A[s]``, of the embedding's the sum of
    the gradients e_t of the positions with token v; so the product is ``sum_{s, t} G[s, v_t]
    <A[s], e_t>``. A sample at a time: S x T of it is held, never V x D.
    """
    assert linear.activations is not None and embedding.activations is not None
    batch = linear.grads.shape[0]
    a = linear.activations.reshape(batch, -1, linear.activations.shape[-1])  # [B, S, D]
    g = linear.grads.reshape(batch, -1, linear.grads.shape[-1])  # [B, S, V]
    tokens = embedding.activations.reshape(batch, -1)  # [B, T]
    e = embedding.grads.reshape(batch, -1, embedding.grads.shape[-1])  # [B, T, D]
    kept = tokens != embedding.options[0]
    wide = torch.promote_types(torch.float32, torch.promote_types(a.dtype, e.dtype))
    cross = [
        (
            (a_b.to(wide) @ (e_b.to(wide) * kept_b[:, None]).t())
            * g_b.index_select(1, tokens_b).to(wide)
        ).sum()
        for a_b, g_b, e_b, tokens_b, kept_b in zip(a, g, e, tokens.long(), kept, strict=True)
    ]
    return torch.stack(cross) if cross else norm_sq(embedding)


def _unfolded_norm_sq(uses: Sequence[Use], parameter: str) -> Tensor:  # [B]
    """Convolutions that share a weight, as linear layers over unfolded images."""
    rows = []
    for use in uses:
        assert use.activations is not None
        image, other = conv_roles(
            use.options[0] == 1, use.activations.to(use.grads.dtype), use.grads
        )
        kernel, stride, padding, dilation, groups = split_geometry(use.options)
        unfolded = _unfold(image, kernel, stride, padding, dilation, list(other.shape[2:]))
        batch, columns, positions = unfolded.shape
        a = unfolded.reshape(batch * groups, columns // groups, positions).transpose(1, 2)
        g = other.reshape(batch * groups, other.shape[1] // groups, positions).transpose(1, 2)
        rows.append((a, g, batch, groups))
    if len({row[3] for row in rows}) > 1:
        raise NotImplementedError(
            f"GradNorms: parameter {parameter!r} is shared by convolutions of different groups, "
            "for which there is no joint rule"
        )
    a = torch.cat([row[0] for row in rows], 1)
    g = torch.cat([row[1] for row in rows], 1)
    norms = torch.ops.fastsel.linear_grad_norm_sq(a, g)
    return norms.reshape(rows[0][2], rows[0][3]).sum(1)  # type: ignore[no-any-return]


def _unfold(
    image: Tensor,  # [B, C, spatial...]
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
) -> Tensor:  # [B, C * kernel, positions]
    dims = len(kernel)
    image = F.pad(image, [p for pad in reversed(padding) for p in (pad, pad)])
    for axis in range(dims):
        steps = torch.arange(size[axis], device=image.device) * stride[axis]
        taps = torch.arange(kernel[axis], device=image.device) * dilation[axis]
        # One spatial axis becomes two: taps at the end of the channels, positions in its place.
        at = 2 + 2 * axis
        picked = image.index_select(at, (steps[:, None] + taps).flatten())
        image = picked.unflatten(at, (size[axis], kernel[axis])).movedim(at + 1, 2 + axis)
        image = image.contiguous()
    return image.reshape(image.shape[0], image.shape[1] * _product(kernel), _product(size))


def _product(values: Sequence[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
