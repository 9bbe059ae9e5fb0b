"""Which dimension holds the samples: constants without one, time first, models that mix them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from grad_norm_samples import mean_loss, true_norms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastsel.grad_norms import GradNorms

B = 6


class Constant(nn.Module):
    """A layer with a parameter that meets a constant of as many rows as there are samples."""

    def __init__(self, combine: Callable[[Any, Tensor], Tensor], **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.combine = combine
        self.frozen = nn.Parameter(torch.randn(B, 4), requires_grad=False)
        self.register_buffer("table", torch.randn(2 * B, 4))
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)


CONSTANTS = {
    "gated weight": Constant(lambda m, x: F.linear(x, m.frozen * m.gate), gate=(4,)),
    "low rank": Constant(lambda m, x: F.linear(x, m.frozen + m.frozen @ m.other), other=(4, 4)),
    "scaled table": Constant(lambda m, x: x + m.alpha * m.table[:B], alpha=(1,)),
    "basis": Constant(lambda m, x: x + m.table.narrow(0, 0, B) @ m.coef, coef=(4, 4)),
    "layer over a table": Constant(lambda m, x: x + F.linear(m.table[:B], m.weight), weight=(4, 4)),
    "norm of a table": Constant(lambda m, x: x + F.layer_norm(m.frozen, [4], m.scale), scale=(4,)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTANTS)
def test_a_constant_is_not_taken_for_the_batch(case: str) -> None:
    model, x = CONSTANTS[case], torch.randn(B, 4)
    with GradNorms(model), pytest.raises(NotImplementedError, match=r"constant of the|a buffer or"):
        model(x)
    norms = GradNorms(model, missing="approximate")
    with norms:
        mean_loss(model(x)).backward()
    assert len(norms.missing_parameters) == 1


def test_a_constant_expanded_to_the_batch_is_one() -> None:
    class Expanded(nn.Module):
        table: Tensor
        kind: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kinds = nn.Linear(4, 3), nn.Embedding(2, 3)
            self.register_buffer("table", torch.randn(1, 4))
            self.register_buffer("kind", torch.ones(1, 1, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            first = self.layer(self.table.expand(len(x), -1))
            kinds = self.kinds(self.kind.expand(len(x), 1)).squeeze(1)
            return (first + kinds) * x  # type: ignore[no-any-return]

    model, x = Expanded(), torch.randn(B, 3)
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    for name, values in true_norms(model, x).items():
        torch.testing.assert_close(
            norms.norms_by_parameter[name].double(), values, rtol=1e-5, atol=0
        )


def test_registered_positions_may_be_as_many_as_samples() -> None:
    class Places(nn.Module):
        positions: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(2 * B, 4)
            self.register_buffer("positions", torch.arange(2 * B))

        def forward(self, x: Tensor) -> Tensor:  # [B, T]
            return (self.tokens(x) + self.places(self.positions[: x.shape[1]])).tanh()  # type: ignore[no-any-return]

    model, x = Places(), torch.randint(0, 7, (B, B))
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    for name, values in true_norms(model, x).items():
        torch.testing.assert_close(
            norms.norms_by_parameter[name].double(), values, rtol=1e-5, atol=0
        )


class TimeFirst(nn.Module):
    """Layers that have time first all through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 8), inner, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, 4]
        hidden = self.inner(self.first(x))
        return self.last(hidden[0] if isinstance(hidden, tuple) else hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "inner",
    [nn.TransformerEncoderLayer(8, 2, 16, dropout=0), nn.GRU(8, 8), nn.LSTM(8, 8)],
    ids=["encoder", "gru", "lstm"],
)
def test_time_first_with_as_many_steps_as_samples(inner: nn.Module) -> None:
    model, x = TimeFirst(inner), torch.randn(B, B, 4)
    before = torch.random.get_rng_state()
    with (
        GradNorms(model),
        pytest.raises(ValueError, match="model mixes samples: what layer 'first'"),
    ):
        mean_loss(model(x)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(0),
        lambda h: h + h.roll(1, 0),
        lambda h: 0.7 * h + 0.3 * h[torch.tensor([1, 0, 3, 2, 5, 4])],
        lambda h: h.reshape(B, 2, 4).transpose(0, 1).reshape(B, 8),
    ],
    ids=["centred", "rolled", "mixed pairs", "transposed"],
)
def test_models_that_mix_samples(mix: Callable[[Tensor], Tensor]) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(mix(self.first(x).relu_()))  # type: ignore[no-any-return]

    model, x = Mixer(), torch.randn(B, 4)
    with GradNorms(model), pytest.raises(ValueError, match="the model mixes samples"):
        mean_loss(model(x)).backward()
    norms = GradNorms(model, mixed_loss="allow")
    with norms:
        mean_loss(model(x)).backward()
    assert norms.norms.isfinite().all()


class Checkpointed(nn.Module):
    """A part that is computed again in the backward, long enough for norms as a by-product."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.part, self.head = nn.Sequential(*layers), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 64]
        return self.head(checkpoint(self.part, x, use_reentrant=False))  # type: ignore[no-any-return]


def test_looking_inside_leaves_gradients_and_norms_alone() -> None:
    model, x = Checkpointed(), torch.randn(B, 150, 64)
    found = []
    modes: tuple[Literal["raise", "allow"], ...] = ("raise", "allow")
    for mixed_loss in modes:
        model.zero_grad()
        torch.manual_seed(1)
        norms = GradNorms(model, mixed_loss=mixed_loss)
        with norms:
            mean_loss(model(x)).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([norms.norms, *grads])
    assert all(map(torch.equal, *found))
