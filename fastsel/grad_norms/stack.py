"""Which captures are on, and torch's stack of modes that they are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.overrides import _pop_mode, _push_mode

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

active: list[Capture] = []


def set_active(captures: Sequence[Capture]) -> None:
    """Notes which are on, and whether one is alone."""
    active[:] = captures
    for capture in captures:
        capture.alone = len(captures) == 1


def leave(capture: Capture) -> None:
    """Takes a capture off the stack of modes, where others may have been entered since."""
    above = []
    while torch._C._len_torch_function_stack() > 0:
        mode = _pop_mode()
        if mode is capture:
            break
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
