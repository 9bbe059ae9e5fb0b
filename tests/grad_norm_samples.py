"""Small models for `GradNorms`, and the truth about their gradients: one sample at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsel.grad_norms import GradNorms

Loss = Callable[[Any], Tensor]


def mean_loss(out: Tensor) -> Tensor:
    """The mean over samples of a loss that is no symmetric function of a sample's outputs."""
    flat = out.flatten(1)
    weights = torch.linspace(-1, 2, flat.shape[1], dtype=out.dtype, device=out.device)
    return ((flat * weights).mean(1).sin() + flat.square().mean(1)).mean()


def true_norms(model: nn.Module, x: Tensor, loss: Loss = mean_loss) -> dict[str, Tensor]:
    """The norm of each sample's gradient of each parameter ``[B]``, by one backward a sample.

    Gradients that were there are put back.
    """
    kept = {name: p.grad for name, p in model.named_parameters()}
    rows: dict[str, list[Tensor]] = {
        name: [] for name, p in model.named_parameters() if p.requires_grad
    }
    for sample in x.split(1):
        model.zero_grad()
        loss(model(sample)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                rows[name].append(torch.zeros(()) if grad is None else grad.double().norm())
    for name, parameter in model.named_parameters():
        parameter.grad = kept[name]
    return {name: torch.stack(row).double() for name, row in rows.items()}


def assert_exact(model: nn.Module, x: Tensor) -> None:
    """`GradNorms` agrees with a backward a sample."""
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    expected = true_norms(model, x)
    found = norms.norms_by_parameter
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=1e-7)


class TiedTransformer(nn.Module):
    """Token and position embeddings, a block, and a head tied to the token embedding."""

    def __init__(self, vocabulary: int = 50, width: int = 32, positions: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.final = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:  # [B, T] -> [B, T, V]
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        h = self.tokens(x) + self.positions(places)
        y = self.norm(h)
        h = h + self.attention(y, y, y, need_weights=False)[0]
        h = h + self.down(F.gelu(self.up(h)))
        return self.head(self.final(h))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent layer and a head on all its outputs."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 8] -> [B, T, 3]
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


class Cells(nn.Module):
    """An LSTM cell and a GRU cell, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(8, 6)
        self.gru = nn.GRUCell(6, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 8] -> [B, 5]
        state = x.new_zeros(x.shape[0], 6), x.new_zeros(x.shape[0], 6)
        hidden = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
            hidden = self.gru(state[0], hidden)
        return hidden


class Attention(nn.Module):
    """Attention of one sequence to itself, to another, or to two others."""

    def __init__(self, inputs: int, **options: Any) -> None:
        super().__init__()
        self.inputs = inputs
        self.embed = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.batch_first = bool(options.get("batch_first", False))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 16]
        y, z = self.embed(x), 2 * x
        if not self.batch_first:
            y, z = y.transpose(0, 1), z.transpose(0, 1)
        key, value = ((y, y), (z, z), (z, z.sin()))[self.inputs - 1]
        out = self.attention(y, key, value, need_weights=self.inputs == 1)[0]
        return out if self.batch_first else out.transpose(0, 1)  # type: ignore[no-any-return]


class Called(nn.Module):
    """One layer called as often as there are inputs along the second dimension, results added."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # [B, calls, ...]
        return torch.stack([self.layer(part.sin()) for part in x.unbind(1)]).sum(0)


class Broadcast(nn.Module):
    """Parameters without a batch dimension that meet the batch, each in the way of its number."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(20, 8)
        self.table = nn.Parameter(torch.randn(12, 8))
        self.batched_table = nn.Parameter(torch.randn(1, 12, 8))
        self.column = nn.Parameter(torch.randn(12, 1))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.positions = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 12]
        h = self.embed(x)
        places = torch.arange(12, device=x.device)
        ways: tuple[Callable[[], Tensor], ...] = (
            lambda: h + self.batched_table,
            lambda: self.table - h,
            lambda: torch.cat([self.token.expand(len(x), -1, -1), h], 1),
            lambda: self.scale * h,
            lambda: h.sin() * self.column,
            lambda: self.scale / h.cosh(),
            lambda: h.sin().add_(self.table),
            lambda: (h + self.scale).sin() * self.scale,
            lambda: h + self.positions(places),
            lambda: h + self.positions(places[None]),
            lambda: self.positions(places).unsqueeze(0) + h,
            lambda: h @ self.matrix,
            lambda: torch.matmul(h, self.matrix).relu_(),
            lambda: h + self.token,
        )
        return self.head(ways[self.way]())  # type: ignore[no-any-return]


BROADCASTS = range(14)


def eval_batch_norm(channels: int) -> nn.Module:
    """A batch norm in eval mode whose statistics are not trivial."""
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.normal_()  # type: ignore[union-attr]
    layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return layer.eval()


def images(*shape: int) -> Callable[[], Tensor]:
    """Makes normal inputs of a shape."""
    return lambda: torch.randn(*shape)


def tokens(*shape: int, below: int = 50) -> Callable[[], Tensor]:
    """Makes token indices of a shape."""
    return lambda: torch.randint(0, below, shape)


def _affine(layer: nn.Module) -> nn.Module:
    """The layer with a scale and a shift that are not trivial, between two linear maps."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


# What is special, a model, and inputs. Sizes make some layers take each of the ways there are.
Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
MODELS: dict[str, Case] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 5)), images(9, 10)),
    "linear, 3-d": (lambda: nn.Linear(12, 7), images(4, 5, 12)),
    "linear, 4-d": (lambda: nn.Linear(12, 70), images(3, 4, 50, 12)),
    "linear, many positions, changed in place": (
        lambda: nn.Sequential(nn.Linear(40, 64), nn.ReLU(inplace=True), nn.Linear(64, 40)),
        images(3, 200, 40),
    ),
    "linear, no bias": (lambda: nn.Linear(30, 40, bias=False), images(3, 150, 30)),
    "conv1d": (lambda: nn.Conv1d(4, 9, 3, stride=2, padding=1), images(3, 4, 301)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True)),
        images(4, 3, 16, 16),
    ),
    "conv2d, few positions": (lambda: nn.Conv2d(32, 32, 3), images(3, 32, 4, 4)),
    "conv2d, groups": (lambda: nn.Conv2d(12, 32, 3, groups=4, dilation=2), images(3, 12, 20, 20)),
    "conv2d, depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12), images(3, 12, 9, 9)),
    "conv2d, same": (lambda: nn.Conv2d(3, 8, (2, 3), padding="same"), images(3, 3, 15, 15)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 8, 3, padding="valid"), images(3, 3, 15, 15)),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        images(3, 3, 15, 15),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 8, (3, 2, 3), padding=(1, 0, 1)), images(3, 2, 5, 6, 7)),
    "conv transpose 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), images(3, 4, 20)),
    "conv transpose 2d": (
        lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=4),
        images(3, 8, 7, 6),
    ),
    "conv transpose 2d, dilated": (
        lambda: nn.ConvTranspose2d(2, 3, 2, stride=1, output_padding=1, dilation=2),
        images(3, 2, 5, 5),
    ),
    "conv transpose 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), images(2, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(20, 6, padding_idx=3), tokens(4, 12, below=20)),
    "layer norm": (
        lambda: nn.Sequential(_affine(nn.LayerNorm(12)), nn.Linear(12, 5)),
        images(4, 7, 12),
    ),
    "layer norm of two dimensions": (
        lambda: nn.Sequential(_affine(nn.LayerNorm([7, 12])), nn.Linear(12, 5)),
        images(4, 7, 12),
    ),
    "rms norm": (lambda: nn.Sequential(_affine(nn.RMSNorm(12)), nn.Tanh()), images(4, 7, 12)),
    "group norm": (
        lambda: nn.Sequential(_affine(nn.GroupNorm(3, 12)), nn.Tanh()),
        images(4, 12, 9),
    ),
    "instance norm": (
        lambda: nn.Sequential(_affine(nn.InstanceNorm2d(5, affine=True)), nn.Tanh()),
        images(4, 5, 6, 6),
    ),
    "batch norm, eval": (lambda: nn.Sequential(eval_batch_norm(5), nn.Tanh()), images(4, 5, 6, 6)),
    "attention": (lambda: Attention(1, batch_first=True), images(3, 9, 16)),
    "attention, time first": (lambda: Attention(1), images(3, 90, 16)),
    "attention, two inputs": (lambda: Attention(2, batch_first=True), images(3, 90, 16)),
    "attention, three inputs": (lambda: Attention(3), images(3, 9, 16)),
    "attention, other widths": (
        lambda: Attention(3, kdim=16, vdim=16, batch_first=True),
        images(3, 90, 16),
    ),
    "attention, zero": (
        lambda: Attention(2, bias=False, add_zero_attn=True, batch_first=True),
        images(3, 9, 16),
    ),
    "transformer, tied": (TiedTransformer, tokens(4, 48)),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
            2,
            enable_nested_tensor=False,
        ),
        images(3, 90, 32),
    ),
}
MODELS |= {
    f"broadcast, {way}": (functools.partial(Broadcast, way), tokens(5, 12, below=20))
    for way in BROADCASTS
}
RECURRENT: dict[str, Case] = {
    "lstm": (
        lambda: Recurrent(nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), 12),
        images(3, 7, 8),
    ),
    "lstm, projected": (
        lambda: Recurrent(nn.LSTM(8, 6, proj_size=4, batch_first=True), 4),
        images(3, 7, 8),
    ),
    "gru": (lambda: Recurrent(nn.GRU(8, 6, num_layers=2, batch_first=True), 6), images(3, 7, 8)),
    "gru, no bias, one step": (
        lambda: Recurrent(nn.GRU(8, 6, bias=False, batch_first=True), 6),
        images(3, 1, 8),
    ),
    "rnn": (lambda: Recurrent(nn.RNN(8, 6, batch_first=True), 6), images(3, 7, 8)),
    "rnn, relu": (
        lambda: Recurrent(nn.RNN(8, 6, nonlinearity="relu", batch_first=True), 6),
        images(3, 7, 8),
    ),
    "cells": (Cells, images(3, 5, 8)),
}
SHARED: dict[str, Case] = {
    "linear": (lambda: Called(nn.Linear(12, 9)), images(3, 2, 12)),
    "linear, many positions": (lambda: Called(nn.Linear(40, 50)), images(3, 3, 150, 40)),
    "conv": (lambda: Called(nn.Conv2d(4, 6, 3, padding=1, groups=2)), images(3, 2, 4, 9, 8)),
    "conv transpose": (lambda: Called(nn.ConvTranspose1d(4, 6, 3, stride=2)), images(3, 2, 4, 9)),
    "layer norm": (
        lambda: nn.Sequential(Called(_affine(nn.LayerNorm(12))), nn.Tanh()),
        images(3, 2, 5, 12),
    ),
    "attention": (
        lambda: Called(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)),
        images(3, 2, 9, 16),
    ),
}
