"""What choosing adds to a training step: the scoring forward, the choice and the gather.

Everything is measured beside the plain step on the whole batch, which is the row that the others
are read against. The limit: where a backward costs two forwards, scoring B samples and training on
k of them takes (B + 3k) / (3B) of a plain step, and the choice and the gather nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor, nn

from fastsel.compare.models import cnn, mlp, resnet18
from fastsel.select import AdaSelection, SelectiveStep
from fastsel.select.batch import take

RATE = 0.3
METHODS = ("uniform", "big_loss", "small_loss", "grad_norm", "coreset2")


class TokenModel(nn.Module):
    """A small causal transformer: ``[B, T]`` tokens to ``[B, V, T]`` logits."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        """Pre-norm layers of four heads."""
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(
        self,
        tokens: Tensor,  # [B, T]
    ) -> Tensor:
        """Logits in torch's layout for token-level classes."""
        hidden = self.token(tokens) + self.position  # [B, T, d]
        hidden = self.layers(hidden, mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden)  # [B, T, V]
        return logits.transpose(1, 2)


Case = tuple[nn.Module, Tensor, Tensor]


def _mlp() -> Case:
    return mlp(784, 10), torch.randn(128, 784), torch.randint(0, 10, (128,))


def _cnn() -> Case:
    return cnn(3, 10), torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))


def _resnet18() -> Case:
    return resnet18(3, 10), torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))


def _token() -> Case:
    vocabulary, length = 4096, 64
    tokens = torch.randint(0, vocabulary, (32, length))
    return TokenModel(vocabulary, length, 128, 2), tokens, tokens.roll(-1, 1)


CASES: dict[str, Callable[[], Case]] = {
    "MLP, batch of 128 x 784": _mlp,
    "conv net, batch of 128 x 3 x 32 x 32": _cnn,
    "ResNet-18, batch of 32 x 3 x 32 x 32": _resnet18,
    "transformer, batch of 32 x 64 tokens": _token,
}
PARTS = ("plain step", "selective step", "scoring forward", "choice", "gather")


@pytest.mark.parametrize("device", harness.DEVICES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", CASES)
def bench_selective_step(benchmark: harness.Benchmark, case: str, part: str, device: str) -> None:
    """One part of a step with AdaSelection over five methods at a rate of 0.3."""
    torch.manual_seed(0)
    model, inputs, target = CASES[case]()
    model, inputs, target = model.to(device), inputs.to(device), target.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=True)
    step = SelectiveStep(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        AdaSelection(METHODS, rate=RATE),
        switch="plain" if part == "plain step" else "select",
    )
    run: Callable[[], Any] = functools.partial(step, inputs, target)
    if part == "scoring forward":
        run = functools.partial(step.score, inputs, target)
    elif part in ("choice", "gather"):
        scores = step.score(inputs, target)
        run = functools.partial(step.choose, scores, len(target), device=target.device)
        if part == "gather":
            indices = run()

            def gather() -> tuple[Any, Tensor]:
                return take(inputs, indices), target.index_select(0, indices)

            run = gather

    harness.measure(
        benchmark,
        lambda _: run(),
        lambda _: (None,),
        op="selective_step",
        workload=case,
        contender=part,
        device=device,
        bytes_moved=inputs.nbytes + target.nbytes,
        in_graph=False,
    )
