"""`torch.nn.MultiheadAttention` by its parts: its projections are linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

Names = tuple["str | None", "str | None"]


def multi_head_attention(
    capture: Capture,
    func: Callable[..., Any],
    query: Tensor,  # [T, B, E]
    key: Tensor,  # [S, B, E_k]
    value: Tensor,  # [S, B, E_v]
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """`F.multi_head_attention_forward`, whose tensors have time first, in the very same operations.

    Raises:
        NotImplementedError: `bias_k` and `bias_v`, or static keys, which have no norm rule.
    """
    weights = (in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight)
    biases = (in_proj_bias, out_proj_bias, bias_k, bias_v)
    names = [capture.name(p) for p in (*weights, out_proj_weight, *biases)]
    known = next((name for name in names if name is not None), None)
    if known is None:
        return func(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
            bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
            key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
            k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal,
        )  # fmt: skip
    layer = capture.layer(known)
    if bias_k is not None or bias_v is not None or static_k is not None or static_v is not None:
        raise NotImplementedError(
            f"GradNorms: layer {layer!r} adds bias_k and bias_v or takes static keys, for which "
            "there is no norm rule: build it without them"
        )
    if query.dim() != 3:
        raise ValueError(
            f"GradNorms: layer {layer!r} got a query of shape {list(query.shape)}, which has no "
            "batch dimension: add one, also for a single sample"
        )
    if embed_dim_to_check != query.shape[2]:
        raise ValueError(
            f"GradNorms: layer {layer!r} expects {embed_dim_to_check} features, got "
            f"{query.shape[2]}"
        )
    if is_causal and attn_mask is None:
        raise ValueError(f"GradNorms: layer {layer!r} needs attn_mask where is_causal=True")

    target_length, batch, width = query.shape
    if batch in (target_length, key.shape[0]):
        capture.mixing.saw_square(layer)
    if use_separate_proj_weight:
        assert q_proj_weight is not None and k_proj_weight is not None and v_proj_weight is not None
        projected = _separate(
            capture,
            (query, key, value),
            (q_proj_weight, k_proj_weight, v_proj_weight),
            in_proj_bias,
        )
    else:
        assert in_proj_weight is not None
        projected = _packed(capture, query, key, value, in_proj_weight, in_proj_bias)
    head = width // num_heads
    q, k, v = (
        x.reshape(x.shape[0], batch * num_heads, head).transpose(0, 1) for x in projected
    )  # [B * heads, T or S, head]
    mask, is_causal = _mask(
        attn_mask, key_padding_mask, is_causal and not need_weights, query.dtype, batch, num_heads
    )
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, head)], 1) for x in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1))
    dropout_p = dropout_p if training else 0.0
    source_length = k.shape[1]

    attention_weights = None
    if need_weights:
        scaled = q * math.sqrt(1.0 / head)
        logits = (
            torch.bmm(scaled, k.transpose(1, 2))
            if mask is None
            else torch.baddbmm(mask, scaled, k.transpose(1, 2))
        )
        attention_weights = F.dropout(logits.softmax(-1), dropout_p)
        mixed = torch.bmm(attention_weights, v).transpose(0, 1)
        attention_weights = attention_weights.view(batch, num_heads, target_length, source_length)
        if average_attn_weights:
            attention_weights = attention_weights.mean(1)
    else:
        if mask is not None:
            mask = (
                mask.unsqueeze(0) if mask.shape[0] == 1 else mask.unflatten(0, (batch, num_heads))
            )
        q, k, v = (x.unflatten(0, (batch, num_heads)) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        mixed = mixed.permute(2, 0, 1, 3)
    mixed = mixed.reshape(target_length * batch, width)
    out = _linear(capture, mixed, out_proj_weight, out_proj_bias, (target_length, batch))
    return out.view(target_length, batch, width), attention_weights


def _linear(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: tuple[int, int],
    names: Names | None = None,
) -> Tensor:
    from fastsel.grad_norms.handlers import named_linear

    names = (capture.name(weight), capture.name(bias)) if names is None else names
    return named_linear(capture, input, weight, bias, names, rows)


def _packed(
    capture: Capture, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections by one weight ``[3 E, E]``, in as few products as the inputs allow."""
    width = query.shape[-1]
    whole = capture.name(weight), capture.name(bias)

    def part(input: Tensor, first: int, last: int) -> Tensor:
        rows = slice(first * width, last * width)
        names = tuple(None if n is None else f"{n}[{rows.start}:{rows.stop}]" for n in whole)
        return _linear(
            capture, input, weight[rows], None if bias is None else bias[rows],
            (input.shape[0], input.shape[1]), names,  # type: ignore[arg-type]
        )  # fmt: skip

    def split(out: Tensor, count: int) -> tuple[Tensor, ...]:
        out = out.unflatten(-1, (count, width)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        return tuple(out.contiguous().unbind(0))

    if key is value:
        if query is key:
            shape = (query.shape[0], query.shape[1])
            q, k, v = split(_linear(capture, query, weight, bias, shape), 3)
            return q, k, v
        k, v = split(part(key, 1, 3), 2)
        return part(query, 0, 1), k, v
    return part(query, 0, 1), part(key, 1, 2), part(value, 2, 3)


def _separate(
    capture: Capture,
    inputs: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections by three weights, with one bias ``[3 E]``."""
    width = weights[0].shape[0]
    name = capture.name(bias)
    outs = []
    for i, (input, weight) in enumerate(zip(inputs, weights, strict=True)):
        rows = slice(i * width, (i + 1) * width)
        bias_name = None if name is None else f"{name}[{rows.start}:{rows.stop}]"
        part = None if bias is None else bias[rows]
        shape = (input.shape[0], input.shape[1])
        outs.append(_linear(capture, input, weight, part, shape, (capture.name(weight), bias_name)))
    return outs[0], outs[1], outs[2]


def _mask(
    attn_mask: Tensor | None,  # [T, S] or [B * heads, T, S]
    key_padding_mask: Tensor | None,  # [B, S]
    is_causal: bool,
    dtype: torch.dtype,
    batch: int,
    num_heads: int,
) -> tuple[Tensor | None, bool]:
    """Both masks as one that is added to the logits, and whether attention knows it without."""
    if is_causal and key_padding_mask is None:
        return None, True
    mask = None if attn_mask is None else _additive(attn_mask, dtype)
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype)
        padding = padding.view(batch, 1, 1, -1).expand(-1, num_heads, -1, -1).flatten(0, 1)
        mask = padding if mask is None else mask + padding
    return mask, False


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
