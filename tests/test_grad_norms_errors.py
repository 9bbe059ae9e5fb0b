"""What `GradNorms` refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grad_norm_samples import mean_loss
from torch import Tensor, nn

import fastsel
from fastsel.grad_norms import GradNorms


def run(model: nn.Module, *inputs: Tensor, **options: Any) -> GradNorms:
    """One forward and backward of a model within its norms."""
    norms = GradNorms(model, **options)
    with norms:
        mean_loss(model(*inputs)).backward()
    return norms


def test_options() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="GradNorms: model must be a module, got function"):
        GradNorms(mean_loss)  # type: ignore[arg-type]
    for option, value in (("reduction", "none"), ("missing", "skip"), ("batch_norm", "train")):
        with pytest.raises(ValueError, match=f"{option} must be '.*' or '.*', got '{value}'"):
            GradNorms(layer, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shared names no parameter of the model: \['head'\]"):
        GradNorms(layer, shared=["head"])
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        GradNorms(nn.ReLU())
    norms = run(layer, torch.randn(3, 2), loss_scale=0.0)
    with pytest.raises(ValueError, match=r"loss_scale must be positive and finite, got 0\.0"):
        _ = norms.norms


def test_norms_before_any_backward() -> None:
    layer = nn.Linear(2, 2)
    norms = GradNorms(layer)
    for read in (lambda: norms.norms, lambda: norms.norms_by_parameter, norms.noise_scale):
        with pytest.raises(RuntimeError, match="no backward was seen"):
            read()
    with norms:
        layer(torch.randn(3, 2))
    with pytest.raises(RuntimeError, match="no backward was seen"):
        _ = norms.norms


def test_attached_twice() -> None:
    norms = GradNorms(nn.Linear(2, 2)).attach()
    with pytest.raises(RuntimeError, match="attached already"):
        norms.attach()
    norms.detach()
    norms.detach()


class Scale(nn.Module):
    """A parameter that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,i->...i", x, self.scale)


def test_a_parameter_without_a_rule_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Scale())
    with pytest.raises(
        NotImplementedError, match=r"'1\.scale' of Scale is used by einsum.*register"
    ):
        run(model, torch.randn(3, 4))


def test_a_list_of_parameters_is_seen() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.stack([self.row, self.row]).sum(0)

    with pytest.raises(NotImplementedError, match="'row' of Stack is used by stack"):
        run(Stack(), torch.randn(3, 4))


def test_a_use_outside_the_context_is_noticed() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    norms = GradNorms(model)
    x = torch.randn(3, 4)
    with norms:
        hidden = model["body"](x)
    mean_loss(model["head"](hidden)).backward()
    with pytest.raises(RuntimeError, match=r"'head\..*' of Linear got a gradient, but nothing is"):
        _ = norms.norms


def test_batch_dimension_must_be_first_and_the_same() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:  # [B, T, 4]
            return self.second(self.first(x).transpose(0, 1))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"'second' got 5 samples, layer 'first' 3: the first dim"):
        run(Mixed(), torch.randn(3, 5, 4))
    with pytest.raises(ValueError, match=r"layer 'Linear' got shape \[4\], which has no batch"):
        run(nn.Linear(4, 2), torch.randn(4))


def test_integer_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(TypeError, match="layer '0' needs a floating input, got int64"):
        run(model, torch.ones(3, 4, dtype=torch.int64))


def test_a_loss_that_mixes_samples_through_a_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="layer '1' normalises by statistics of the whole batch"):
        run(model, torch.randn(3, 4))
    with pytest.raises(ValueError, match="a batch norm normalises by statistics of the whole"):
        run(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), torch.randn(3, 4))


def contrastive(out: Tensor) -> Tensor:
    """Every sample against every other."""
    similar = out @ out.t()
    return torch.nn.functional.cross_entropy(similar, torch.arange(len(out)))


def test_a_loss_that_mixes_samples() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(6, 4)
    with GradNorms(model), pytest.raises(ValueError, match="the loss mixes samples"):
        contrastive(model(x)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    norms = GradNorms(model, mixed_loss="allow")
    with norms:
        contrastive(model(x)).backward()
    assert norms.norms.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_that_do_not_mix_samples(reduction: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, -100, 2, 2, 0])
    weight = torch.rand(3)
    for criterion in (
        nn.CrossEntropyLoss(weight, reduction=reduction),
        nn.MultiMarginLoss(reduction=reduction),
        lambda out, _: nn.functional.huber_loss(out, x[:, :3], reduction=reduction),
        lambda out, _: fastsel.sample_scores(out, y).loss.sum(),
        lambda out, _: out.sum(),
    ):
        target = y.clamp(min=0) if isinstance(criterion, nn.MultiMarginLoss) else y
        norms = GradNorms(model)
        with norms:
            for _ in range(2):
                criterion(model(x), target).backward()
        assert len(norms.norms) == 12


def test_an_embedding_scaled_by_frequency() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True))
    with pytest.raises(ValueError, match="layer '0' has scale_grad_by_freq=True"):
        run(model, torch.tensor([[1, 2], [2, 2]]))


def test_second_derivatives() -> None:
    for width in (3, 200):  # torch's backward, and the one with norms as a by-product
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        x = torch.randn(2, 150, width, requires_grad=True)
        with GradNorms(model):
            loss = mean_loss(model(x))
            with pytest.raises(RuntimeError, match="create_graph=True reached layer '0'"):
                torch.autograd.grad(loss, x, create_graph=True)


def test_a_second_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with GradNorms(model):
        loss = mean_loss(model(torch.randn(3, 4)))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"a second time through the layer of '2\.weight'"):
            loss.backward()


def test_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    norms = GradNorms(model)
    x = torch.randn(3, 4)
    with norms, torch.inference_mode(), pytest.raises(RuntimeError, match="layer '0' runs in inf"):
        model(x)


def test_a_recurrent_layer_with_exact_grad_or_packed() -> None:
    layer = nn.LSTM(4, 3, batch_first=True)
    with (
        GradNorms(layer, exact_grad=True),
        pytest.raises(ValueError, match=r"layer 'LSTM' is recurrent.*exact_grad=True cannot"),
    ):
        layer(torch.randn(2, 5, 4))
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 4), [5, 3], batch_first=True)
    with (
        GradNorms(layer),
        pytest.raises(NotImplementedError, match=r"layer 'LSTM' got a packed sequence"),
    ):
        layer(packed)


def test_attention_with_bias_rows() -> None:
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
    x = torch.randn(2, 3, 8)
    with (
        GradNorms(model),
        pytest.raises(NotImplementedError, match=r"layer 'MultiheadAttention' adds bias_k"),
    ):
        model(x, x, x)


def test_a_whole_and_a_part_of_one_parameter() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    norms = GradNorms(layer)
    with norms:
        mean_loss(layer(x, x, x)[0] + layer(x, z, z)[0]).backward()
    with pytest.raises(NotImplementedError, match="'in_proj_weight' is used both as a whole and"):
        _ = norms.norms


def test_kinds_without_a_joint_rule() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:  # [B, 4, 4]
            kernel = self.layer.weight
            whole = torch.nn.functional.layer_norm(x, (4, 4), kernel)
            return self.layer(whole)  # type: ignore[no-any-return]

    with pytest.raises(
        NotImplementedError, match="is used as a linear layer and a scale or shift in"
    ):
        run(Twice(), torch.randn(3, 4, 4))


def test_rules() -> None:
    with pytest.raises(TypeError, match="module_type must be a class of modules, got Scale"):
        fastsel.register_norm_rule(Scale(), print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rule must be callable, got int"):
        fastsel.register_norm_rule(Scale, 3)  # type: ignore[arg-type]
    fastsel.register_norm_rule(Scale, lambda module, inputs, grad: {})
    try:
        with pytest.raises(KeyError, match="norm rule of Scale gives no norm of 'scale'"):
            run(nn.Sequential(Scale()), torch.randn(3, 4))
    finally:
        fastsel.register_norm_rule(Scale, None)


def test_noise_scale_of_one_sample() -> None:
    norms = run(nn.Linear(4, 2), torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="noise_scale needs at least two samples, got 1"):
        norms.noise_scale()
