"""`GradNorms` with rules of one's own, with rules missing, and the gradient noise scale."""

from __future__ import annotations

import torch
from grad_norm_samples import MODELS, mean_loss, true_norms
from test_grad_norms import check, make
from torch import Tensor, nn

import fastsel
from fastsel.grad_norms import GradNorms

# ---- rules of one's own ----


class Scale(nn.Module):
    """Multiplies by a parameter in a way that nothing is known of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,i->...i", x, self.scale)


def test_register_norm_rule() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Scale(6), nn.Linear(6, 3))
    x = torch.randn(4, 5, 6)
    expected = true_norms(model, x)

    def rule(module: Scale, inputs: tuple[Tensor], grad: Tensor) -> dict[str, Tensor]:
        return {"scale": (inputs[0] * grad).sum(1).square().sum(-1)}

    fastsel.register_norm_rule(Scale, rule)
    try:
        norms = GradNorms(model)
        with norms:
            mean_loss(model(x)).backward()
        check(norms.norms_by_parameter, expected)
    finally:
        fastsel.register_norm_rule(Scale, None)


def test_missing_rules_can_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Scale(6), nn.Linear(6, 3))
    x = torch.randn(4, 5, 6)
    expected = true_norms(model, x)
    norms = GradNorms(model, missing="approximate")
    with norms:
        mean_loss(model(x)).backward()
    assert norms.missing_parameters == ("1.scale",)
    del expected["1.scale"]
    check(norms.norms_by_parameter, expected)


def test_batch_norm_with_fixed_statistics() -> None:
    layer = nn.BatchNorm2d(3)
    nn.init.normal_(layer.weight)
    x = torch.randn(6, 3, 5, 5)
    norms = GradNorms(layer, batch_norm="fixed_statistics")
    with norms:
        mean_loss(layer(x)).backward()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    fixed = nn.BatchNorm2d(3).eval()
    fixed.load_state_dict({**layer.state_dict(), "running_mean": mean, "running_var": var})
    check(norms.norms_by_parameter, true_norms(fixed, x))


# ---- noise scale ----


def test_noise_scale() -> None:
    model = nn.Linear(5, 1, bias=False)
    x = torch.randn(400, 5) + 1
    norms = GradNorms(model)
    with norms:
        model(x).mean().backward()
    found = norms.noise_scale()
    # Of y = w x the gradient of a sample is x itself: mean 1 and unit variance in each of five.
    covariance = x.double().T.cov()
    mean = x.double().mean(0)
    torch.testing.assert_close(found.trace, covariance.trace(), rtol=1e-5, atol=0)
    expected = mean.square().sum() - covariance.trace() / len(x)
    torch.testing.assert_close(found.grad_norm_sq, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.scale, found.trace / found.grad_norm_sq)


def test_noise_scale_over_parts() -> None:
    model, x = make(MODELS["mlp"])
    whole, parts, sums = (
        GradNorms(model),
        GradNorms(model, loss_scale=1 / 3),
        GradNorms(model, reduction="sum"),
    )
    with whole:
        mean_loss(model(x)).backward()
    expected = whole.noise_scale()
    model.zero_grad()
    with parts:
        for part in x.split(3):
            (mean_loss(model(part)) / 3).backward()
    torch.testing.assert_close(parts.noise_scale(), expected, rtol=1e-4, atol=0)
    model.zero_grad()
    with sums:
        (len(x) * mean_loss(model(x))).backward()
    torch.testing.assert_close(sums.noise_scale(), expected, rtol=1e-4, atol=0)


def test_noise_scale_over_unequal_parts() -> None:
    model = nn.Linear(5, 1, bias=False)
    x = torch.randn(400, 5) + 1
    norms = GradNorms(model, loss_scale=0.5)
    parts = x.split([100, 300])
    with norms:
        for part in parts:
            (model(part).mean() / 2).backward()
    found = norms.noise_scale()
    # A mean of means, whose variance is that of a sample over 100 and over 300, a quarter of each.
    mean_sq = torch.stack([part.double().mean(0) for part in parts]).mean(0).square().sum()
    sample_sq = x.double().square().sum(1).mean()
    variance = (1 / 100 + 1 / 300) / 4
    torch.testing.assert_close(found.trace, (sample_sq - mean_sq) / (1 - variance))
    torch.testing.assert_close(found.grad_norm_sq + variance * found.trace, mean_sq)
