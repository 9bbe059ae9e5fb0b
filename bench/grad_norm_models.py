"""Whole models whose per-sample gradient norms are taken, and all that take them.

A `Workload` makes a model and a batch; `steps` makes, of one workload, a step of each contender: a
forward and a backward that leaves the batch's gradient and gives the norms. Each has a model of its
own with the same weights.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from norm_peers import PEERS, VmapNorms
from torch import Tensor, nn

from fastsel.compare.models import mlp, resnet18
from fastsel.grad_norms import GradNorms

PLAIN = "plain step"
OURS: dict[str, dict[str, Any]] = {"fastsel": {}, "fastsel, exact_grad": {"exact_grad": True}}
BY_NAME: dict[str, Any] = {peer.NAME: peer for peer in PEERS}
CONTENDERS = (PLAIN, *OURS, *BY_NAME)
# What the gradients of all samples may take; others than torch.func never hold them all.
LIMIT_BYTES = 4 * 2**30

Case = tuple[nn.Module, Tensor, Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        """Four times the width in between."""
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,  # [B, T, d]
    ) -> Tensor:
        """Attention, then the two linear maps, each added."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, d / heads]
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class TokenModel(nn.Module):
    """A GPT-2 in small, with learned positions: ``[B, T]`` tokens to ``[B, V, T]`` logits."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, tied: bool) -> None:
        """Eight heads; `tied`: the head shares the token embedding's weight."""
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(
        self,
        tokens: Tensor,  # [B, T]
    ) -> Tensor:
        """Logits in torch's layout for token-level classes."""
        # Each sample has its own: peers want the batch first in every layer's input, and Opacus'
        # embedding rule does not take the strides of an expanded tensor.
        places = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
        hidden = self.blocks(self.token(tokens) + self.position(places))  # [B, T, d]
        logits: Tensor = self.head(self.norm(hidden))  # [B, T, V]
        return logits.transpose(1, 2)


def with_group_norm(model: nn.Module) -> nn.Module:
    """Every batch norm replaced by a group norm of 32 groups."""
    for name, module in model.named_children():
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(32, module.num_features))
        else:
            with_group_norm(module)
    return model


def _mlp() -> Case:
    widths = (28, 2048, 512, 128)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 2))
    return model, torch.randn(512, widths[0]), torch.randint(0, 2, (512,))


def _paper_mlp() -> Case:
    return mlp(28, 2), torch.randn(512, 28), torch.randint(0, 2, (512,))


def _conv_net() -> Case:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    return model, torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))


def _token_mlp() -> Case:
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    return model, torch.randn(32, 128, 256), torch.randn(32, 128, 256)


def _resnet18() -> Case:
    model = with_group_norm(resnet18(3, 10))
    return model, torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))


def _gpt(tied: bool) -> Case:
    vocabulary, length = 4096, 128
    tokens = torch.randint(0, vocabulary, (8, length))
    return TokenModel(vocabulary, length, 256, 4, tied), tokens, tokens.roll(-1, 1)


@dataclass(frozen=True)
class Workload:
    """A model, a batch and a loss.

    Attributes:
        make: Makes model, inputs and target from torch's generator.
        criterion: The loss, a mean over samples of equal weight.
        options: What `GradNorms` needs for this model.
    """

    make: Callable[[], Case]
    criterion: Criterion = F.cross_entropy
    options: dict[str, Any] = field(default_factory=dict)


# The batch norm of the paper's MLP mixes the samples: each norm is then that of the sample's own
# gradient with the batch's mean and variance as constants.
WORKLOADS = {
    "MLP, 512 x 28, 2048-512-128": Workload(_mlp),
    "conv net, 128 x 3 x 32 x 32": Workload(_conv_net),
    "token MLP, 32 x 128 tokens, 256-1024": Workload(_token_mlp, F.mse_loss),
    "near-neighbour paper's MLP, with batch norm, 512 x 28": Workload(
        _paper_mlp, options={"batch_norm": "fixed_statistics"}
    ),
    "ResNet-18 with GroupNorm, 16 x 3 x 32 x 32": Workload(_resnet18),
    "GPT-2-like, 8 x 128 tokens, tied head": Workload(functools.partial(_gpt, True)),
    "GPT-2-like, 8 x 128 tokens, untied head": Workload(functools.partial(_gpt, False)),
}


class Step:
    """A training step of one contender up to the optimizer: clear, forward, backward, norms."""

    def __init__(
        self, model: nn.Module, run: Callable[[], Tensor | None], device: torch.device
    ) -> None:
        """Of the model whose gradients `run` leaves."""
        self.model, self.device = model, device
        self._run = run

    def clear(self) -> None:
        """Frees the gradients."""
        self.model.zero_grad()

    def __call__(self) -> Tensor | None:
        """The norms ``[B]``, of the plain step nothing."""
        self.clear()
        norms = self._run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return norms


def refusal(contender: str, model: nn.Module, batch_size: int) -> str:
    """Why a contender is left out of a workload, or nothing."""
    peer = BY_NAME.get(contender)
    if peer is None:
        return ""
    if importlib.util.find_spec(peer.PACKAGE) is None:
        return f"{peer.PACKAGE} is not installed: see bench/requirements.txt"
    needed = VmapNorms.nbytes(model, batch_size)
    if peer is VmapNorms and needed > LIMIT_BYTES:
        return f"needs {needed / 1e9:.1f} GB for the gradients of all samples"
    return str(peer.refusal(model))


def make_case(workload: str, device: str = "cpu") -> Case:
    """A workload's model and batch, the same each time."""
    torch.manual_seed(0)
    model, inputs, target = WORKLOADS[workload].make()
    return model.to(device), inputs.to(device), target.to(device)


def make_step(workload: str, contender: str, case: Case) -> Step:
    """One contender's step on its copy of the model; it must not be refused."""
    setup = WORKLOADS[workload]
    model, inputs, target = case
    if contender in BY_NAME:
        made = BY_NAME[contender](model, setup.criterion)
        return Step(made.model, lambda: made(inputs, target), inputs.device)
    own = copy.deepcopy(model)

    def plain() -> None:
        setup.criterion(own(inputs), target).backward()

    if contender == PLAIN:
        return Step(own, plain, inputs.device)
    norms = GradNorms(own, **setup.options, **OURS[contender])

    def with_norms() -> Tensor:
        with norms:
            plain()
        return norms.norms

    return Step(own, with_norms, inputs.device)
