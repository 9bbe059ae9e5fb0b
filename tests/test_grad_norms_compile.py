"""`GradNorms` under ``torch.compile(fullgraph=True)``."""

from __future__ import annotations

import pytest
import torch
from grad_norm_samples import MODELS, Case, TiedTransformer, mean_loss, true_norms
from torch import Tensor, nn

from fastsel.grad_norms import GradNorms
from fastsel.grad_norms.compiled import _TRACES_HOOKS

NAMES = (
    "mlp",
    "linear, many positions, changed in place",
    "conv2d",
    "conv2d, groups",
    "conv transpose 2d",
    "embedding",
    "layer norm",
    "rms norm",
    "group norm",
    "batch norm, eval",
    "transformer, tied",
    *(f"broadcast, {way}" for way in (0, 2, 4, 8, 11)),
)


def make(case: Case) -> tuple[nn.Module, Tensor]:
    """A case's model and inputs."""
    torch.manual_seed(0)
    return case[0](), case[1]()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def check(norms: GradNorms, model: nn.Module, x: Tensor) -> None:
    """The norms of the last batch are those of a backward a sample."""
    expected = true_norms(model, x)
    found = norms.norms_by_parameter
    assert all(name in found or not norm.any() for name, norm in expected.items())
    for name, values in found.items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("exact_grad", [False, True], ids=["by-product", "exact_grad"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_in_one_graph(name: str, backend: str, exact_grad: bool) -> None:
    if backend == "inductor" and exact_grad and name not in ("mlp", "transformer, tied"):
        pytest.skip("what differs between backends is seen on two models")
    model, _ = make(MODELS[name])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    norms = GradNorms(model, exact_grad=exact_grad)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            x = MODELS[name][1]()
            optimizer.zero_grad()
            with norms:
                mean_loss(compiled(x)).backward()
            before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            check(norms, model, x)
            model.zero_grad()
            mean_loss(model(x)).backward()
            for parameter, grad in before.items():
                plain = model.get_parameter(parameter).grad
                assert plain is not None
                torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-6)
            optimizer.step()


def test_a_whole_step_compiled() -> None:
    model, x = make(MODELS["mlp"])
    norms = GradNorms(model)

    @torch.compile(fullgraph=True)
    def loss(x: Tensor) -> Tensor:
        return mean_loss(model(x))

    with norms:
        loss(x).backward()
    check(norms, model, x)


def test_accumulation() -> None:
    model, x = make(MODELS["mlp"])
    compiled = torch.compile(model, fullgraph=True)
    norms = GradNorms(model)
    with norms:
        for part in x.split(3):
            mean_loss(compiled(part)).backward()
    check(norms, model, x)


def test_a_layer_that_repeats_is_refused_until_it_is_known() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())  # type: ignore[no-any-return]

    model, x = Repeats(), torch.randn(4, 6)
    norms = GradNorms(model)
    with norms, pytest.raises(RuntimeError, match=r"uses the layer of 'layer.*more than once"):
        mean_loss(torch.compile(model, fullgraph=True)(x)).backward()
    torch.compiler.reset()
    for known in (GradNorms(model, shared=["layer.weight", "layer.bias"]), norms):
        if known is norms:
            with known:  # an uncompiled step teaches it too
                mean_loss(model(x)).backward()
        with known:
            mean_loss(torch.compile(model, fullgraph=True)(x)).backward()
        check(known, model, x)


def test_two_forwards_before_a_backward_are_refused() -> None:
    model, x = make(MODELS["mlp"])
    compiled = torch.compile(model, fullgraph=True)
    with (
        GradNorms(model),
        pytest.raises(RuntimeError, match=r"modified by an inplace operation|twice through"),
    ):
        (mean_loss(compiled(x)) + mean_loss(compiled(x.sin()))).backward()


def test_tied_weights_are_known_from_the_start() -> None:
    model = TiedTransformer()
    x = torch.randint(0, 50, (3, 12))
    norms = GradNorms(model)
    with norms:
        mean_loss(torch.compile(model, fullgraph=True)(x)).backward()
    check(norms, model, x)


@pytest.mark.skipif(not _TRACES_HOOKS, reason="torch before 2.13 takes one compiled graph a model")
@pytest.mark.parametrize("positions", [3, 5])  # of the latter there are as many as samples
@pytest.mark.parametrize("kind", ["layers", "layers, fullgraph", "encoder"])
def test_a_compiled_part_of_an_eager_model(kind: str, positions: int) -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.block: nn.Module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())
            if kind == "encoder":  # which torch traces beside no mode with fullgraph=True
                self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.first(x))  # type: ignore[no-any-return]

    model, x = Regions(), torch.randn(5, positions, 6)
    expected = true_norms(model, x)
    model.block.compile(fullgraph="fullgraph" in kind, backend="aot_eager")
    norms = GradNorms(model)
    for _ in range(2):
        with norms:
            mean_loss(model(x)).backward()
        for name, values in norms.norms_by_parameter.items():
            torch.testing.assert_close(values.double(), expected[name], rtol=1e-4, atol=1e-6)
