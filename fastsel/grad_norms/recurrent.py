"""Recurrent layers by their parts: linear layers of every step, whose uses of a weight add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture

State = tuple[Tensor, ...]  # h ``[B, H]``, and c of an LSTM
Cell = Callable[[Tensor, Tensor, State], State]


def lstm_cell(inputs: Tensor, hidden: Tensor, state: State) -> State:
    """One step of an LSTM from its two projections ``[B, 4 H]``."""
    i, f, g, o = (inputs + hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(inputs: Tensor, hidden: Tensor, state: State) -> State:
    """One step of a GRU from its two projections ``[B, 3 H]``."""
    ri, zi, ni = inputs.chunk(3, -1)
    rh, zh, nh = hidden.chunk(3, -1)
    z = (zi + zh).sigmoid()
    n = (ni + (ri + rh).sigmoid() * nh).tanh()
    return (n + z * (state[0] - n),)


def tanh_cell(inputs: Tensor, hidden: Tensor, state: State) -> State:
    """One step of a plain recurrent layer ``[B, H]``."""
    return ((inputs + hidden).tanh(),)


def relu_cell(inputs: Tensor, hidden: Tensor, state: State) -> State:
    """One step of a plain recurrent layer with ReLU ``[B, H]``."""
    return ((inputs + hidden).relu(),)


def _layer_handler(cell: Cell) -> Callable[..., Any]:
    """A handler of `torch.lstm` and its like, for sequences of one length."""
    is_lstm = cell is lstm_cell

    def handler(capture: Capture, func: Callable[..., Any], input: Tensor, *rest: Any) -> Any:
        packed = isinstance(rest[0], Tensor) and isinstance(rest[2], (list, tuple))
        params = rest[2] if packed else rest[1]
        known = next((n for n in map(capture.name, params) if n is not None), None)
        if known is None:
            return func(input, *rest)
        layer = capture.layer(known)
        _refuse_exact(capture, layer)
        if packed:
            raise NotImplementedError(
                f"GradNorms: layer {layer!r} got a packed sequence, which has no batch dimension: "
                "pass padded sequences"
            )
        hx, _params, _has_biases, num_layers, dropout, train, bidirectional, batch_first = rest
        state = tuple(hx) if is_lstm else (hx,)
        x = input if batch_first else input.transpose(0, 1)
        if x.shape[0] == x.shape[1]:
            capture.mixing.saw_square(layer)
        directions = 2 if bidirectional else 1
        has_projection = is_lstm and state[0].shape[-1] != state[1].shape[-1]
        each = len(params) // (num_layers * directions)
        finals: list[State] = []
        for level in range(num_layers):
            outs = []
            for direction in range(directions):
                at = level * directions + direction
                own = list(params[at * each : (at + 1) * each])
                projection = own.pop() if has_projection else None
                out, final = _run(
                    capture, cell, x, tuple(s[at] for s in state), own, projection, direction == 1
                )
                outs.append(out)
                finals.append(final)
            x = torch.cat(outs, -1) if directions == 2 else outs[0]
            if dropout and train and level + 1 < num_layers:
                x = F.dropout(x, dropout)
        out = x if batch_first else x.transpose(0, 1)
        return out, *(torch.stack(parts) for parts in zip(*finals, strict=True))

    return handler


def _run(
    capture: Capture,
    cell: Cell,
    x: Tensor,  # [B, T, d]
    state: State,
    params: Sequence[Tensor],  # w_ih, w_hh, and if there are biases b_ih, b_hh
    projection: Tensor | None,
    backwards: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs ``[B, T, H]`` and last state."""
    w_ih, w_hh = params[:2]
    b_ih, b_hh = params[2:] if len(params) == 4 else (None, None)
    if x.shape[1] > 1:
        capture.share(w_hh, b_hh, projection)
    inputs = _linear(capture, x, w_ih, b_ih)  # [B, T, gates]
    outs: list[Tensor] = []
    steps = range(x.shape[1])
    for t in reversed(steps) if backwards else steps:
        state = _step(capture, cell, inputs[:, t], state, w_hh, b_hh, projection)
        outs.append(state[0])
    return torch.stack(outs[::-1] if backwards else outs, 1), state


def _step(
    capture: Capture,
    cell: Cell,
    inputs: Tensor,
    state: State,
    w_hh: Tensor,
    b_hh: Tensor | None,
    projection: Tensor | None,
) -> State:
    state = cell(inputs, _linear(capture, state[0], w_hh, b_hh), state)
    if projection is not None:
        state = (_linear(capture, state[0], projection, None), *state[1:])
    return state


def _cell_handler(cell: Cell) -> Callable[..., Any]:
    """A handler of `torch.lstm_cell` and its like."""

    def handler(
        capture: Capture,
        func: Callable[..., Any],
        input: Tensor,  # [B, d]
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        names = [capture.name(p) for p in (w_ih, w_hh, b_ih, b_hh)]
        known = next((name for name in names if name is not None), None)
        if known is None:
            return func(input, hx, w_ih, w_hh, b_ih, b_hh)
        _refuse_exact(capture, capture.layer(known))
        state = tuple(hx) if cell is lstm_cell else (hx,)
        state = _step(capture, cell, _linear(capture, input, w_ih, b_ih), state, w_hh, b_hh, None)
        return state if cell is lstm_cell else state[0]

    return handler


def _linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from fastsel.grad_norms.handlers import linear

    return linear(capture, F.linear, input, weight, bias)  # type: ignore[no-any-return]


def _refuse_exact(capture: Capture, layer: str) -> None:
    if capture.exact_grad:
        raise ValueError(
            f"GradNorms: layer {layer!r} is recurrent and computed by its parts, so that its "
            "gradients are equal to rounding only: exact_grad=True cannot be kept"
        )


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._VF.lstm: _layer_handler(lstm_cell),
    torch._VF.gru: _layer_handler(gru_cell),
    torch._VF.rnn_tanh: _layer_handler(tanh_cell),
    torch._VF.rnn_relu: _layer_handler(relu_cell),
    torch._VF.lstm_cell: _cell_handler(lstm_cell),
    torch._VF.gru_cell: _cell_handler(gru_cell),
    torch._VF.rnn_tanh_cell: _cell_handler(tanh_cell),
    torch._VF.rnn_relu_cell: _cell_handler(relu_cell),
}
