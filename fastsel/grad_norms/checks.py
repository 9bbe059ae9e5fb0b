"""What handlers ask of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture


def check_input(
    capture: Capture, name: str, input: Tensor, least: int, *, floating: bool = True
) -> None:
    """Raises unless an input has a batch dimension and is of a kind that has gradients."""
    if floating and not input.is_floating_point():
        raise TypeError(
            f"GradNorms: layer {capture.layer(name)!r} needs a floating input, got "
            f"{str(input.dtype).removeprefix('torch.')}"
        )
    if input.dim() < least:
        raise ValueError(
            f"GradNorms: layer {capture.layer(name)!r} got shape {list(input.shape)}, which has no "
            "batch dimension: add one, also for a single sample"
        )


def batch_first(tensor: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """``[T, B, n]`` or ``[T * B, n]`` as ``[B, T, n]`` where `rows` is ``(T, B)``."""
    if rows is None:
        return tensor
    return tensor.reshape(*rows, tensor.shape[-1]).transpose(0, 1)
