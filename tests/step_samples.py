"""Models, batches and steps shared by the tests of `SelectiveStep`'s options."""

from __future__ import annotations

from typing import Any

import torch
from conftest import assert_same_bits
from torch import Tensor, nn

from fastsel.select import SelectiveStep

B, D, C, N = 16, 5, 3, 64


def make_model(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, width), nn.Tanh(), nn.Linear(width, C))


def data(seed: int = 0, size: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, D, generator=generator)
    return inputs, torch.randint(0, C, (size,), generator=generator)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return data(seed, B)


def make_step(
    model: nn.Module,
    selector: Any = "big_loss",
    rate: Any = 0.25,
    criterion: Any = None,
    **options: Any,
) -> SelectiveStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SelectiveStep(
        model, criterion or nn.CrossEntropyLoss(), optimizer, selector, rate, **options
    )


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert_same_bits(first.detach(), second.detach())


class Hooked(nn.Module):
    """Counts the samples that pass through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(inputs.shape[0])
        out: Tensor = self.model(inputs)
        return out
