"""`GradNorms` gives every sample's gradient norm, and leaves gradients what they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from grad_norm_samples import MODELS, RECURRENT, SHARED, Case, mean_loss, true_norms
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastsel.grad_norms import GradNorms

# float32, against a backward a sample that is itself rounded.
RTOL = 1e-5
ALL = {**MODELS, **RECURRENT, **{f"called twice: {name}": case for name, case in SHARED.items()}}
# Recurrent layers are computed by their parts, so their gradients are equal to rounding only.
EXACT = {name: case for name, case in ALL.items() if name not in RECURRENT}


def make(case: Case) -> tuple[nn.Module, Tensor]:
    """A case's model and inputs."""
    torch.manual_seed(0)
    model, x = case[0](), case[1]()
    return model, x


def grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that are there now, copied."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = RTOL, atol: float = 1e-7
) -> None:
    """The same parameters, and close norms."""
    assert actual.keys() == expected.keys()
    for name, norms in actual.items():
        torch.testing.assert_close(norms.double(), expected[name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("exact_grad", [False, True], ids=["by-product", "exact_grad"])
@pytest.mark.parametrize("name", ALL)
def test_exact(name: str, exact_grad: bool) -> None:
    if exact_grad and name not in EXACT:
        pytest.skip("recurrent layers refuse exact_grad")
    model, x = make(ALL[name])
    expected = true_norms(model, x)
    mean_loss(model(x)).backward()
    plain = grads(model)
    model.zero_grad()
    norms = GradNorms(model, exact_grad=exact_grad)
    with norms:
        mean_loss(model(x)).backward()
    found = norms.norms_by_parameter
    unused = {name for name, grad in model.named_parameters() if grad.grad is None}
    check(found, {name: norm for name, norm in expected.items() if name not in unused})
    total = torch.stack(list(expected.values())).square().sum(0).sqrt()
    torch.testing.assert_close(norms.norms.double(), total, rtol=RTOL, atol=0)
    for parameter, grad in grads(model).items():
        if exact_grad:
            assert torch.equal(grad, plain[parameter]), parameter
        else:
            assert (grad - plain[parameter]).norm() <= 1e-6 * plain[parameter].norm(), parameter


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer, tied", "encoder", "layer norm"])
def test_float64_is_tighter(name: str) -> None:
    model, x = make(ALL[name])
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    check(norms.norms_by_parameter, true_norms(model, x), 1e-10, 1e-13)


@pytest.mark.parametrize("name", ["mlp", "conv2d, groups", "embedding", "layer norm", "group norm"])
def test_equals_vmap_of_grad(name: str) -> None:
    model, x = make(ALL[name])
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return mean_loss(torch.func.functional_call(model, values, (sample[None],)))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    expected = {name: g.flatten(1).norm(dim=1).double() for name, g in per_sample.items()}
    check(norms.norms_by_parameter, expected)


# ---- generated models ----


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A few layers of any kinds that fit together, some of them used twice, and inputs."""
    torch.manual_seed(draw(st.integers(0, 999)))
    batch, width = draw(st.integers(1, 4)), draw(st.sampled_from([4, 6, 12]))
    length = draw(st.integers(1, 40))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["linear", "conv", "norm", "group", "again", "act", "attend"]))
        if kind == "linear":
            layers.append(nn.Linear(width, width, bias=draw(st.booleans())))
        elif kind == "conv":
            groups = draw(st.sampled_from([1, 2, width]))
            layers.append(_OverTime(nn.Conv1d(width, width, 3, padding=1, groups=groups)))
        elif kind == "norm":
            layers.append(draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(width))
        elif kind == "group":
            layers.append(_OverTime(nn.GroupNorm(2, width)))
        elif kind == "attend":
            layers.append(_Attend(width))
        elif kind == "again" and layers:
            layers.append(draw(st.sampled_from(layers)))
        else:
            layers.append(draw(st.sampled_from([nn.Tanh(), nn.SiLU()])))
    layers.append(nn.Linear(width, 3))
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.booleans()) or parameter is layers[-1].weight)
    return model, torch.randn(batch, length, width)


class _OverTime(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class _Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x, x, x)[0]  # type: ignore[no-any-return]


@given(network=networks())
def test_any_network(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    expected = true_norms(model, x)
    found = norms.norms_by_parameter
    # A key's bias shifts a row of logits alike, so the softmax gives it no gradient: only rounding.
    size = float(norms.norms.max())
    check(found, {name: expected[name] for name in found}, RTOL, 2e-6 * size)
    for name in expected.keys() - found.keys():
        assert float(expected[name].abs().max()) == 0, name


# ---- losses ----


def test_reductions() -> None:
    model, x = make(MODELS["mlp"])
    expected = true_norms(model, x)
    y = torch.randint(0, 5, (len(x),))
    by_mean, by_sum = GradNorms(model), GradNorms(model, reduction="sum")
    with by_mean:
        F.cross_entropy(model(x), y).backward()
    with by_sum:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    torch.testing.assert_close(by_mean.norms, by_sum.norms)
    weights = torch.rand(len(x))
    with by_sum:
        (weights * F.cross_entropy(model(x), y, reduction="none")).sum().backward()
    torch.testing.assert_close(by_sum.norms, weights * by_mean.norms)
    assert expected.keys() == by_mean.norms_by_parameter.keys()


def test_gradient_accumulation() -> None:
    model, x = make(MODELS["conv2d"])
    expected = true_norms(model, x)
    norms = GradNorms(model, loss_scale=1 / 2)
    with norms:
        for part in x.split(2):
            (mean_loss(model(part)) / 2).backward()
    check(norms.norms_by_parameter, expected)
    mean_loss_grad = grads(model)
    model.zero_grad()
    mean_loss(model(x)).backward()
    for name, grad in grads(model).items():
        torch.testing.assert_close(mean_loss_grad[name], grad, rtol=1e-5, atol=1e-7)


def test_unequal_parts_keep_their_own_means() -> None:
    model, x = make(MODELS["mlp"])
    norms = GradNorms(model)
    with norms:
        for part in x.split(5):
            mean_loss(model(part)).backward()
    check(norms.norms_by_parameter, true_norms(model, x))


def test_grad_scaler() -> None:
    model, x = make(MODELS["mlp"])
    expected = true_norms(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    norms = GradNorms(model, loss_scale=scaler)
    with norms:
        scaler.scale(mean_loss(model(x))).backward()
    check(norms.norms_by_parameter, expected)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "linear, many positions, changed in place"])
def test_autocast(name: str) -> None:
    model, x = make(ALL[name])
    expected = true_norms(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_loss(model(x).float())
    loss.backward()
    plain = grads(model)
    model.zero_grad()
    norms = GradNorms(model)
    with norms:
        with torch.autocast("cpu", torch.bfloat16):
            loss = mean_loss(model(x).float())
        loss.backward()
    # bfloat16 has eight bits.
    check(norms.norms_by_parameter, expected, 0.05, 1e-3)
    for parameter, grad in grads(model).items():
        assert torch.equal(grad, plain[parameter]), parameter


# ---- what counts ----


def test_frozen_parameters_do_not_count() -> None:
    model, x = make(MODELS["encoder"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name and not name.endswith("linear1.bias"))
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    check(norms.norms_by_parameter, true_norms(model, x))


def test_a_frozen_weight_with_a_trained_bias() -> None:
    model = nn.Sequential(nn.Linear(6, 70), nn.Conv1d(3, 20, 3))
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    x = torch.randn(4, 3, 6)
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    check(norms.norms_by_parameter, true_norms(model, x))


def test_a_branch_that_the_loss_ignores() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "other": nn.Linear(4, 3)})
    x = torch.randn(5, 4)
    norms = GradNorms(model)
    with norms:
        model["other"](x)
        mean_loss(model["used"](x)).backward()
    assert set(norms.norms_by_parameter) == {"used.weight", "used.bias"}


def test_a_layer_called_twice_of_which_one_call_counts() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    norms = GradNorms(layer)
    with norms:
        layer(2 * x)
        mean_loss(layer(x)).backward()
    check(norms.norms_by_parameter, true_norms(layer, x))


def test_two_views_of_the_same_samples() -> None:
    model, x = make(MODELS["mlp"])
    views = torch.stack([x, x.cos()], 1)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pair: Tensor) -> Tensor:
            return self.model(pair[:, 0]) * self.model(pair[:, 1])  # type: ignore[no-any-return]

    expected = true_norms(Pair(), views)
    norms = GradNorms(model)
    with norms:
        mean_loss(model(views[:, 0]) * model(views[:, 1])).backward()
    found = {f"model.{name}": value for name, value in norms.norms_by_parameter.items()}
    check(found, expected)


def test_backward_after_the_context_counts() -> None:
    model, x = make(MODELS["mlp"])
    norms = GradNorms(model)
    with norms:
        loss = mean_loss(model(x))
    loss.backward()
    check(norms.norms_by_parameter, true_norms(model, x))


def test_other_models_and_evaluation_do_not_count() -> None:
    model, x = make(MODELS["mlp"])
    teacher, _ = make(MODELS["mlp"])
    norms = GradNorms(model)
    with norms:
        with torch.no_grad():
            model(x[:3])
        (mean_loss(model(x)) + mean_loss(teacher(x))).backward()
    check(norms.norms_by_parameter, true_norms(model, x))


def test_activation_checkpointing() -> None:
    model, x = make(MODELS["encoder"])
    expected = true_norms(model, x)
    norms = GradNorms(model)
    with norms:
        hidden = x
        for layer in model.layers:  # type: ignore[union-attr]
            hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
        mean_loss(hidden).backward()
    check(norms.norms_by_parameter, expected)


def test_attached_object() -> None:
    model, x = make(MODELS["mlp"])
    expected = true_norms(model, x)
    norms = GradNorms(model).attach()
    for _ in range(2):
        mean_loss(model(x)).backward()
        check(norms.norms_by_parameter, expected)
        norms.reset()
    norms.detach()
    mean_loss(model(x)).backward()
    with pytest.raises(RuntimeError, match="no backward was seen"):
        _ = norms.norms


def test_the_model_is_left_alone() -> None:
    model, x = make(MODELS["mlp"])
    before = {name: id(p) for name, p in model.named_parameters()}
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    assert before == {name: id(p) for name, p in model.named_parameters()}
    del norms
    assert not model._forward_pre_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
