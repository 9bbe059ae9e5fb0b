"""What keeps norms from being wrong without a word: unseen uses, mixed passes, odd strides."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from grad_norm_samples import assert_exact, mean_loss, true_norms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastsel
from fastsel import ops
from fastsel.grad_norms import GradNorms
from fastsel.select.exact_scoring import ExactScorer


class Joined(nn.Module):
    """The gradients of what is concatenated are slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(x), self.second(x)], 1).tanh())  # type: ignore[no-any-return]


def test_gradients_that_are_slices() -> None:
    assert_exact(Joined(), torch.randn(5, 6))
    a, g = torch.randn(5, 10), torch.randn(5, 20)[:, 3:10]
    assert torch.equal(
        fastsel.linear_grad_norm_sq(a, g), fastsel.linear_grad_norm_sq(a, g.contiguous())
    )
    spread = torch.randn(1, 7).expand(5, 7)
    assert torch.equal(
        fastsel.linear_grad_norm_sq(a, spread),
        fastsel.linear_grad_norm_sq(a, spread.contiguous()),
    )


def test_a_bias_without_a_weight() -> None:
    assert ops.linear_weight_grad(torch.zeros(2, 3, 0), torch.ones(2, 3, 2)).bias_grad.tolist() == [
        6,
        6,
    ]
    x, g = torch.zeros(2, 0, 5), torch.ones(2, 2, 5)
    result = ops.conv_weight_grad(x, g, [3], [1], [1], [1], 1)
    assert result.bias_grad.tolist() == [10, 10]


def test_columns_of_a_table() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.columns = nn.ModuleList(nn.Embedding(7, 4) for _ in range(3))
            self.head = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:  # [B, 3]
            parts = [column(x[:, i]) for i, column in enumerate(self.columns)]
            return self.head(torch.cat(parts, 1))  # type: ignore[no-any-return]

    assert_exact(Table(), torch.randint(0, 7, (5, 3)))


@pytest.mark.parametrize("positions_first", [False, True])
def test_as_many_positions_as_samples(positions_first: bool) -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)

        def forward(self, x: Tensor) -> Tensor:  # [B, 5]
            if positions_first:
                places = self.places(torch.arange(5))
                return self.tokens(x) + places  # type: ignore[no-any-return]
            return self.tokens(x) + self.places(torch.arange(5))  # type: ignore[no-any-return]

    with GradNorms(model := Places()), pytest.raises(ValueError, match=r"pass them as \[1, T\]"):
        model(torch.randint(0, 7, (5, 5)))


def test_a_reentrant_checkpoint_is_noticed() -> None:
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    norms = GradNorms(nn.ModuleList([a, b, c]))
    with norms:
        hidden = checkpoint(lambda h: b(h).tanh(), a(torch.randn(3, 4)), use_reentrant=True)
        mean_loss(c(hidden)).backward()
    with pytest.raises(RuntimeError, match=r"'1\..*got a gradient, but nothing is known"):
        _ = norms.norms


class Chunks(nn.Module):
    """A weight in parts, by a function that returns several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.layer.weight.chunk(2)
        return self.head(self.layer(x).tanh() + F.linear(x, first).repeat(1, 2))  # type: ignore[no-any-return]


def test_parts_and_keyword_arguments_are_seen() -> None:
    x = torch.randn(3, 4)
    with GradNorms(model := Chunks()), pytest.raises(NotImplementedError, match="by chunk"):
        model(x)
    layer = nn.LayerNorm(4)
    with GradNorms(layer), pytest.raises(NotImplementedError, match="is used by"):
        torch.special.xlog1py(layer(x), other=layer.weight)


def test_exact_scores_are_looked_after() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return _Times.apply(self.layer(x), self.gate)  # type: ignore[no-any-return, no-untyped-call]

    scorer = ExactScorer(Hidden(), nn.CrossEntropyLoss())
    with pytest.raises((RuntimeError, NotImplementedError), match="'gate' of Hidden"):
        scorer(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]), {"grad_norm"})


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors  # type: ignore[attr-defined]
        return g * gate, (g * x).sum(0)


def test_passes_through_parts_of_a_model() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": nn.Linear(6, 3)})
    x = torch.randn(9, 4)
    norms = GradNorms(model)
    with norms:
        for part in x.split(3):
            mean_loss(model["head"](model["body"](part).tanh())).backward()
    whole = nn.Sequential(model["body"], nn.Tanh(), model["head"])
    expected = true_norms(whole, x)
    torch.testing.assert_close(
        norms.norms_by_parameter["body.weight"].double(), expected["0.weight"], rtol=1e-5, atol=0
    )


def test_a_forward_without_a_backward_and_then_another_batch_size() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    norms = GradNorms(model)
    with norms:
        model(torch.randn(4, 4))
        mean_loss(model(torch.randn(5, 4))).backward()
    assert norms.norms.shape == (5,)


def test_two_forwards_with_a_backward_each_are_refused() -> None:
    model = nn.Linear(4, 3)
    with GradNorms(model):
        first, second = mean_loss(model(torch.randn(5, 4))), mean_loss(model(torch.randn(5, 4)))
        first.backward()
        with pytest.raises(RuntimeError, match="in different backwards"):
            second.backward()


def test_an_input_changed_in_place_under_autocast() -> None:
    norm, layer = nn.LayerNorm(4), nn.Linear(4, 4)
    model = nn.ModuleList([norm, layer])
    with GradNorms(model), torch.autocast("cpu", torch.bfloat16):
        hidden = norm(torch.randn(3, 4))
        out = layer(hidden)
        hidden.mul_(0.1).add_(out)
        with pytest.raises(RuntimeError, match="layer '1' was changed in place"):
            mean_loss(hidden.float()).backward()


def test_partly_missing_parameters_do_not_count() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            twice = torch.einsum("bi,oi->bo", x, self.layer.weight)
            return self.head(self.layer(x) - 0.9 * twice)  # type: ignore[no-any-return]

    model, x = Partly(), torch.randn(5, 4)
    norms = GradNorms(model, missing="approximate")
    with norms:
        mean_loss(model(x)).backward()
    assert norms.missing_parameters == ("layer.weight",)
    assert "layer.weight" not in norms.norms_by_parameter
    total = torch.stack(list(true_norms(model, x).values())).square().sum(0).sqrt()
    assert (norms.norms <= total + 1e-6).all()


def test_detaching_in_any_order() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    a, b = GradNorms(first).attach(), GradNorms(second).attach()
    a.detach()
    x = torch.randn(5, 4)
    mean_loss(second(x)).backward()
    mean_loss(first(x)).backward()
    b.detach()
    assert b.norms.shape == (5,)
    with pytest.raises(RuntimeError, match="no backward was seen"):
        _ = a.norms
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_any_pair_of_samples_that_mixes_is_seen(shift: int) -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(8, 4)
    with GradNorms(model), pytest.raises(ValueError, match="the loss mixes samples"):
        out = model(x)
        (out * out.roll(shift, 0)).sum().backward()


def test_a_loss_that_is_not_finite_is_not_taken_for_mixed() -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(8, 4)
    x[3] = float("nan")
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    assert norms.norms.isnan().tolist() == [i == 3 for i in range(8)]


def test_the_model_can_be_copied_and_saved(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(5, 4)
    norms = GradNorms(model)
    double = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with norms:
        double(torch.randn(2, 4))
        loaded(torch.randn(3, 4))
        mean_loss(model(x)).backward()
    expected = true_norms(model, x)
    for name, values in norms.norms_by_parameter.items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("positions", [1, 200])
def test_hooks_on_activations_are_seen(positions: int) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
            self.head = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body[0](x)
            hidden.register_hook(lambda g: g * torch.linspace(0, 1, 64))
            hidden = self.body[1](hidden)
            hidden.register_hook(lambda g: 3 * g)
            return self.head(hidden.tanh())  # type: ignore[no-any-return]

    assert_exact(Clipped(), torch.randn(5, positions, 64))


@pytest.mark.parametrize("positions", [1, 200])
def test_a_part_within_the_whole(positions: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    x = torch.randn(5, positions, 64)
    whole, part = GradNorms(model), GradNorms(model[2])
    with whole, part:
        mean_loss(model(x)).backward()
    expected = true_norms(model, x)
    for norms, prefix in ((whole, ""), (part, "2.")):
        for name, values in norms.norms_by_parameter.items():
            torch.testing.assert_close(values.double(), expected[prefix + name], rtol=1e-5, atol=0)


def test_a_checkpoint_keeps_no_activations() -> None:
    layers = nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4)
    inside: list[weakref.ref[Tensor]] = []

    def part(hidden: Tensor) -> Tensor:
        for layer in layers:
            inside.append(weakref.ref(hidden))
            hidden = layer(hidden)
        return hidden

    x = torch.randn(5, 4)
    with GradNorms(nn.ModuleList(layers)):
        out = checkpoint(part, x, use_reentrant=False)
        gc.collect()
        assert [one() is None for one in inside] == [False, True, True, True]
        mean_loss(out).backward()


def test_what_no_layer_of_torch_does() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row, self.square = nn.Parameter(torch.randn(4)), nn.Parameter(torch.eye(4))

    model, x = Odd(), torch.randn(5, 4)
    with GradNorms(model):
        with pytest.raises(NotImplementedError, match="'row' of Odd is used by linear"):
            F.linear(x, model.row)
        with pytest.raises(RuntimeError, match="support automatic diff"):
            torch.matmul(x, model.square, out=torch.empty(5, 4))
    kernel = nn.Parameter(torch.randn(4, 2, 3))
    model.register_parameter("kernel", kernel)
    norms = GradNorms(model)
    with norms, pytest.raises(NotImplementedError, match="'kernel' is shared by convolutions of"):
        thin, wide = torch.randn(5, 2, 8), torch.randn(5, 4, 8)
        mean_loss(F.conv1d(thin, kernel) + F.conv1d(wide, kernel, groups=2)).backward()
