"""Which dimension holds the samples: constants without one, time first, models that mix them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from grad_norm_samples import assert_exact, mean_loss, true_norms
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

    assert_exact(Expanded(), torch.randn(B, 3))


def test_registered_positions_may_be_as_many_as_samples() -> None:
    class Places(nn.Module):
        positions: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(2 * B, 4)
            self.register_buffer("positions", torch.arange(2 * B))

        def forward(self, x: Tensor) -> Tensor:  # [B, T]
            return (self.tokens(x) + self.places(self.positions[: x.shape[1]])).tanh()  # type: ignore[no-any-return]

    assert_exact(Places(), torch.randint(0, 7, (B, B)))


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
        pytest.raises(ValueError, match=r"mixes samples: .*what layer 'first'"),
    ):
        mean_loss(model(x)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


class Recurrent(nn.Module):
    """Of two directions, which returns its outputs and its last states, without the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, (last, _) = self.layer(x)
        return out, last


SQUARE: dict[str, tuple[nn.Module, Tensor, Any]] = {
    "lstm": (nn.LSTM(4, 5), torch.randn(B, B, 4), lambda m, x: m(x)[0].transpose(0, 1)),
    "attention": (
        nn.MultiheadAttention(4, 2),
        torch.randn(B, B, 4),
        lambda m, x: m(x, x, x)[0].transpose(0, 1),
    ),
    "both directions": (Recurrent(), torch.randn(2, 2, 4), lambda m, x: m(x)[0]),
    "encoder": (
        TimeFirst(nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)),
        torch.randn(B, B, 4),
        lambda m, x: m(x),
    ),
}


@pytest.mark.parametrize("case", SQUARE)
def test_as_many_steps_as_samples_in_their_place(case: str) -> None:
    model, x, call = SQUARE[case]
    norms = GradNorms(model)
    with norms:
        mean_loss(call(model, x)).backward()
    found = {name: values.double() for name, values in norms.norms_by_parameter.items()}
    batch_dim = 0 if case in ("both directions", "encoder") else 1
    for i in range(x.shape[batch_dim]):
        model.zero_grad()
        mean_loss(call(model, x.narrow(batch_dim, i, 1))).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            expected = parameter.grad.double().norm()
            torch.testing.assert_close(found[name][i], expected, rtol=1e-5, atol=1e-8)


def test_a_kept_gradient_of_the_output_is_left_alone() -> None:
    grads: list[Tensor] = []
    for _ in range(2):
        torch.manual_seed(0)
        model, x = TimeFirst(nn.Tanh()), torch.randn(B, 4)
        with GradNorms(model) if grads else nullcontext():
            out = model(x)
            out.retain_grad()
            mean_loss(out).backward()
        assert out.grad is not None
        grads.append(out.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("views", [False, True])
def test_losses_over_several_outputs(views: bool) -> None:
    model, x = nn.Linear(4, 3), torch.randn(B, 4)
    norms = GradNorms(model)
    with norms, pytest.raises(ValueError, match="the loss mixes samples"):
        if views:  # of two views, in neither of which the loss has a second derivative
            first, second = model(x), model(x + 1)
            (first @ second.t()).logsumexp(1).sum().backward()
        else:
            out = model(x)
            losses = F.cross_entropy(out @ out.t(), torch.arange(B), reduction="none")
            losses.backward(torch.full((B,), 1 / B))


@dataclass
class Output:
    """What a model may return."""

    loss: float
    logits: Tensor


def test_an_output_in_a_dataclass() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Output:
            return Output(0.0, self.layer(x))

    model = Wrapped()
    with GradNorms(model), pytest.raises(ValueError, match="the loss mixes samples"):
        model(torch.randn(B, 4)).logits.var(0).sum().backward()


def test_what_is_written_or_made_like_a_constant_is_none() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding.from_pretrained(torch.randn(7, 4))
            self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:  # [B, 3]
            state = self.table.weight.new_zeros(len(x), 5)
            for t in range(x.shape[1]):
                state = self.cell(self.table(x[:, t]), state)
            joined = self.table.weight[: len(x)].clone()
            joined = torch.cat([joined, joined.new_zeros(len(x), 5)], 1)
            joined[:, 4:] = state
            picked = torch.index_select(self.table.weight, dim=0, index=x[:, 0])
            return self.head(joined + F.pad(picked, (0, 5)))  # type: ignore[no-any-return]

    model, x = State(), torch.randint(0, 7, (B, 3))
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    fixed = model.table.weight[:B].clone()
    compared = 0
    for i in range(B):
        model.zero_grad()
        with torch.no_grad():
            model.table.weight[0] = fixed[i]  # the rows that a sample reads are by its place
        mean_loss(model(x[i : i + 1])).backward()
        with torch.no_grad():
            model.table.weight[0] = fixed[0]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not (x[i] == 0).any():
                compared += 1
                torch.testing.assert_close(
                    norms.norms_by_parameter[name][i], parameter.grad.norm(), rtol=1e-5, atol=0
                )
    assert compared >= len(norms.norms_by_parameter)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_position_table_used_twice(batch: int) -> None:
    class Twice(nn.Module):
        ids: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ids", torch.arange(8)[None])
            self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(8, 4)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:  # [B, T]
            places = self.places(self.ids[:, : x.shape[1]])
            return self.layer((self.tokens(x) + places).tanh()) + places  # type: ignore[no-any-return]

    assert_exact(Twice(), torch.randint(0, 7, (batch, 3)))


def test_nothing_is_kept_of_forwards_without_a_backward() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(B, 4)
    norms = GradNorms(model)
    with norms:
        out = weakref.ref(model(x))
    gc.collect()
    assert out() is None


class Checkpointed(nn.Module):
    """A part that is computed again in the backward, long enough for norms as a by-product."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.part, self.head = nn.Sequential(*layers), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 64]
        return self.head(checkpoint(self.part, x, use_reentrant=False))  # type: ignore[no-any-return]


BACKWARDS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "backward": lambda model, loss: loss.backward(),
    "inputs": lambda model, loss: loss.backward(inputs=list(model.parameters())),
    "function": lambda model, loss: torch.autograd.backward([loss], [torch.ones_like(loss)]),
    "grad": lambda model, loss: torch.autograd.grad(loss, list(model.parameters())),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_any_backward_through_a_checkpoint(name: str) -> None:
    model, x = Checkpointed().eval(), torch.randn(B, 150, 64)
    expected = true_norms(model, x)
    norms = GradNorms(model)
    for _ in range(2):
        with norms:
            BACKWARDS[name](model, mean_loss(model(x)))
        for parameter, values in norms.norms_by_parameter.items():
            torch.testing.assert_close(values.double(), expected[parameter], rtol=1e-5, atol=0)


def test_looking_leaves_gradients_and_norms_alone() -> None:
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
