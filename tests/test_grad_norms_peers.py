"""The faults of other implementations of per-sample gradient norms, each as something that works.

What was seen where: research on Opacus, fastDP, BackPACK, nanoGNS and FlashNorm. Launches on the
current stream and the reproducibility of kernels are in the tests of the operators.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_bits
from grad_norm_samples import TiedTransformer, mean_loss, true_norms
from torch import Tensor, nn

import fastsel
from fastsel.grad_norms import GradNorms


def assert_exact(model: nn.Module, x: Tensor) -> None:
    """`GradNorms` agrees with a backward a sample."""
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    expected = true_norms(model, x)
    assert norms.norms_by_parameter.keys() == expected.keys()
    for name, found in norms.norms_by_parameter.items():
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_linear_layer_on_four_dimensions() -> None:  # Opacus: AttributeError
    assert_exact(
        nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), torch.randn(3, 4, 5, 6)
    )


def test_functional_use_of_a_weight() -> None:  # Opacus: AttributeError
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight, self.layer.bias)

    assert_exact(Functional(), torch.randn(3, 5, 6))


def test_tied_weights() -> None:  # Opacus: NotImplementedError; fastDP: the last use wins
    assert_exact(TiedTransformer(), torch.randint(0, 50, (3, 20)))


def test_batch_norm_in_eval_mode() -> None:  # Opacus: NotImplementedError
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
    model(torch.randn(8, 3, 9, 9))
    assert_exact(model.eval(), torch.randn(3, 3, 9, 9))


@pytest.mark.parametrize("t", [1, 8, 100, 1024, 4096])
def test_the_form_follows_the_number_of_positions(t: int) -> None:
    # Opacus always takes the Gram form, fastDP keeps the choice of its first batch: one module
    # here.
    layer = nn.Linear(64, 64)
    norms = GradNorms(layer, exact_grad=True)
    for positions in (8, t, 8):
        x = torch.randn(2, positions, 64)
        with norms:
            mean_loss(layer(x)).backward()
        expected = true_norms(layer, x)
        torch.testing.assert_close(
            norms.norms_by_parameter["weight"].double(), expected["weight"], rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [5, 14], ids=["few positions", "many positions"])
def test_grouped_convolutions(groups: int, size: int) -> None:
    # BackPACK and fastDP: too large by about the square root of the groups; Opacus: groups^2
    # blocks.
    assert_exact(nn.Conv2d(8, 16, 3, groups=groups), torch.randn(3, 8, size, size))


def test_conv3d() -> None:  # fastDP: named in the README, not in the table
    assert_exact(nn.Conv3d(2, 4, 3, padding=1), torch.randn(2, 2, 4, 5, 6))


def test_subclasses() -> None:  # fastDP: silently frozen
    class Mine(nn.Linear):
        pass

    class MyConv(nn.Conv2d):
        pass

    assert_exact(
        nn.Sequential(MyConv(3, 4, 3), nn.Flatten(), Mine(4 * 25, 3)), torch.randn(3, 3, 7, 7)
    )


def test_layer_norm_is_in_the_sum() -> None:  # BackPACK: a warning, and a norm that is too short
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    x = torch.randn(4, 5, 6)
    assert_exact(model, x)
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    parts = torch.stack(list(norms.norms_by_parameter.values()))
    assert parts.shape[0] == 6
    torch.testing.assert_close(norms.norms, parts.square().sum(0).sqrt())


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 2, 3, 7)])
def test_layer_norm_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    # nanoGNS: three dimensions, the last one only.
    assert_exact(nn.Sequential(nn.LayerNorm(shape), nn.Tanh()), torch.randn(4, *shape))


def test_same_bits_run_after_run() -> None:  # FlashNorm and nanoGNS: atomic additions
    model, x = TiedTransformer(), torch.randint(0, 50, (3, 40))
    norms = GradNorms(model)
    results = []
    for _ in range(3):
        with norms:
            mean_loss(model(x)).backward()
        results.append(norms.norms)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cancelling_terms(dtype: torch.dtype) -> None:
    # Every Gram form: negative for one sample of eight in bfloat16, wrong by 2.5 % in float32.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 32, 512, generator=generator)
    g = torch.randn(8, 32, 512, generator=generator)
    a = torch.cat([a, a + 1e-2 * torch.randn(a.shape, generator=generator)], 1).to(dtype)
    g = torch.cat([g, -g], 1).to(dtype)
    truth = torch.einsum("btd,btp->bdp", a.double(), g.double()).square().sum((1, 2))
    for form in ("auto", "gram"):
        found = fastsel.linear_grad_norm_sq(a, g, form=form)
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


def test_memory_of_a_depthwise_convolution() -> None:
    # Opacus: 37 MiB for 256 channels. Here nothing larger than a sample's own product is allocated.
    x, g = torch.randn(8, 256, 14, 14), torch.randn(8, 256, 14, 14)
    with torch.profiler.profile(profile_memory=True) as profile:
        fastsel.conv_grad_norm_sq(x, g, [3, 3], [1, 1], [1, 1], [1, 1], 256)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events() or ())
    assert allocated < 4096
