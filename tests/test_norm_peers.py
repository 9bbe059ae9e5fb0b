"""The peers of `GradNorms` give the right norms and gradients where they are said to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from grad_norm_samples import MODELS, RECURRENT, TiedTransformer, mean_loss, true_norms
from norm_peers import PEERS, BackpackNorms, OpacusGhost, VmapNorms
from torch import Tensor, nn

COMMON = ["mlp", "linear, 3-d", "conv1d", "conv2d, few positions", "conv3d"]
SUPPORTED: dict[Any, list[str]] = {
    OpacusGhost: [*COMMON, "layer norm", "rms norm", "group norm", "conv2d, groups",
                  "conv transpose 2d"],
    BackpackNorms: [*COMMON, "batch norm, eval", "conv transpose 1d"],
    VmapNorms: [*COMMON, "conv2d", "embedding", "transformer, tied", "attention", "group norm",
                "batch norm, eval", "conv2d, depthwise"],
}  # fmt: skip
# Fails, or is wrong without a word; nothing else is left out of a bench.
REFUSED: dict[Any, list[str]] = {
    OpacusGhost: ["transformer, tied", "batch norm, eval", "attention", "conv2d", "embedding"],
    BackpackNorms: ["conv2d, groups", "conv2d, depthwise", "layer norm", "rms norm", "group norm",
                    "attention", "conv2d", "embedding", "encoder", "lstm", "gru", "tied"],
    VmapNorms: ["gru", "rnn", "batch norm"],
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")
BY_PEER = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.NAME)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


ALL = MODELS | RECURRENT
ALL["tied"] = tied, lambda: torch.randn(4, 6)
ALL["batch norm"] = (
    lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)),
    lambda: torch.randn(5, 6),
)


def pairs(table: dict[Any, list[str]]) -> pytest.MarkDecorator:
    values = [(peer, name) for peer, names in table.items() for name in names]
    ids = [f"{peer.NAME}: {name}" for peer, name in values]
    return pytest.mark.parametrize(("peer", "name"), values, ids=ids)


def criterion(output: Tensor, _: Tensor) -> Tensor:
    return mean_loss(output)


def run(peer: Any, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Norms and gradients; the target is not looked at."""
    made = peer(model, criterion)
    norms = made(x, torch.zeros(len(x)))
    grads = {
        name.removeprefix("_module."): p.grad
        for name, p in made.model.named_parameters()
        if p.grad is not None
    }
    return norms, grads


@pairs(SUPPORTED)
def test_norms_and_gradients(peer: Any, name: str) -> None:
    pytest.importorskip(peer.PACKAGE)
    torch.manual_seed(0)
    make, inputs = ALL[name]
    model, x = make(), inputs()
    assert peer.refusal(model) == ""
    norms, grads = run(peer, model, x)
    expected = torch.stack(list(true_norms(model, x).values())).square().sum(0).sqrt()
    # float32 sums of thousands, in the Gram form at times.
    torch.testing.assert_close(norms.double(), expected, rtol=1e-3, atol=1e-6)
    mean_loss(model(x)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5)


@BY_PEER
def test_a_second_step_is_not_affected_by_the_first(peer: Any) -> None:
    pytest.importorskip(peer.PACKAGE)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    made = peer(model, criterion)
    for _ in range(2):
        x = torch.randn(5, 6)
        made.model.zero_grad()
        norms = made(x, torch.zeros(5))
        expected = torch.stack(list(true_norms(model, x).values())).square().sum(0).sqrt()
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=1e-6)


@pairs(REFUSED)
def test_a_refusal_has_its_reason(peer: Any, name: str) -> None:
    pytest.importorskip(peer.PACKAGE)
    torch.manual_seed(0)
    make, inputs = ALL[name]
    model, x = make(), inputs()
    assert peer.refusal(model) != ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norms, _ = run(peer, model, x)
    except Exception:  # each peer has its own
        return
    expected = torch.stack(list(true_norms(model, x).values())).square().sum(0).sqrt()
    assert not torch.allclose(norms.double(), expected, rtol=2e-3)


def test_who_takes_what() -> None:
    transformer = TiedTransformer()
    assert "tied" in OpacusGhost.refusal(transformer)
    assert "rule for LayerNorm" in BackpackNorms.refusal(transformer)
    assert VmapNorms.refusal(transformer) == ""
    assert "grouped" in BackpackNorms.refusal(nn.Conv2d(4, 4, 3, groups=2))
    assert "batch norm" in VmapNorms.refusal(nn.BatchNorm1d(4))
    assert VmapNorms.refusal(nn.BatchNorm1d(4).eval()) == ""
    assert VmapNorms.nbytes(nn.Linear(3, 4, bias=False), 5) == 5 * 12 * 4
