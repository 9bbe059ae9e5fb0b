"""The models `compare` trains: linear, the paper's MLP, two small conv nets, ResNet-18."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsel.compare.errors import CompareError
from fastsel.data import Dataset

MODELS = ("linear", "mlp", "cnn", "small_cnn", "resnet18")
_OF_IMAGES = ("cnn", "small_cnn", "resnet18")
# The learning rate of each optimizer and model unless --lr says otherwise; that of SGD is the one
# of AdaSelection's experiments (its table 2).
DEFAULT_LR = {
    "adam": {**dict.fromkeys(MODELS, 1e-3), "linear": 1e-2},
    "sgd": dict.fromkeys(MODELS, 1e-2),
}

_MLP_WIDTHS = (2048, 512, 128)
_RESNET_WIDTHS = (64, 128, 256, 512)
# Larger images get ResNet's own stem; smaller ones would vanish in it.
_LARGE_IMAGE = 64


def linear(inputs: int, outputs: int) -> nn.Module:
    """Logistic regression (or, with one output and squared error, linear regression)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def mlp(inputs: int, outputs: int) -> nn.Module:
    """The multi-layer perceptron of the near-neighbour paper.

    Walia & Singhal, "Adaptive Learning with Dynamic Batch Creation Using Near-Neighbors",
    section 4: hidden layers of 2048, 512 and 128 units, each fully connected -> batch norm -> ReLU.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for width in _MLP_WIDTHS:
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def cnn(channels: int, outputs: int) -> nn.Module:
    """A small conv net: two 3x3 convolutions with batch norm and pooling, global mean, linear."""
    layers: list[nn.Module] = []
    for width in (32, 64):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, outputs))


def small_cnn(channels: int, outputs: int) -> nn.Module:
    """A conv net for many runs on a CPU: three 3x3 convolutions of stride 2 with batch norm.

    A fifth of the work of `cnn` on images of 32 x 32 pixels.
    """
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, outputs))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, section 3.3 and figure 5, left)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:  # option B: a projection where the shape changes
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(cast(Tensor, self.norm2(self.conv2(hidden)) + self.shortcut(x)))


def resnet18(channels: int, outputs: int, *, large_images: bool = False) -> nn.Module:
    """ResNet-18 (He et al., "Deep Residual Learning", arXiv:1512.03385, table 1).

    Args:
        channels: Channels of the images.
        outputs: Classes.
        large_images: The paper's ImageNet stem (7x7, stride 2, max-pool); otherwise one 3x3
            convolution at full size, as in its CIFAR networks (section 4.2).
    """
    stem: list[nn.Module]
    if large_images:
        stem = [nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64),
                nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]  # fmt: skip
    else:
        stem = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks: list[nn.Module] = []
    before = 64
    for width in _RESNET_WIDTHS:
        stride = 1 if width == before else 2
        blocks += [_BasicBlock(before, width, stride), _BasicBlock(width, width, 1)]
        before = width
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs)
    )


def resolve_model(name: str, data: Dataset) -> str:
    """Turn "auto" into a model (images: cnn, tables: mlp) and check that the model fits the data.

    Raises:
        CompareError: Unknown name, or an image model for a table.
    """
    if name == "auto":
        return "cnn" if data.is_image and min(data.train_inputs.shape[2:]) >= 8 else "mlp"
    if name not in MODELS:
        raise CompareError(f"model must be auto, {', '.join(MODELS)}, got {name!r}")
    if name in _OF_IMAGES:
        if not data.is_image:
            raise CompareError(f"model {name} needs images, {data.name} is a table: use mlp")
        if min(data.train_inputs.shape[2:]) < 8:
            raise CompareError(f"model {name} needs images of 8x8 pixels or more: use mlp")
    return name


def make_model(name: str, data: Dataset, seed: int) -> nn.Module:
    """Build a model for a data set; the same seed gives the same initial weights.

    Args:
        name: One of `MODELS`.
        data: Gives the shapes of inputs and outputs.
        seed: Seed of the initialisation; torch's global generator is left as it was.

    Returns:
        A model on the CPU: `[B, ...]` to logits `[B, classes]`, or to `[B]` for a regression.
    """
    shape = data.train_inputs.shape[1:]
    images = data.is_image
    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: linear(shape.numel(), data.num_outputs),
        "mlp": lambda: mlp(shape.numel(), data.num_outputs),
        "cnn": lambda: cnn(shape[0], data.num_outputs),
        "small_cnn": lambda: small_cnn(shape[0], data.num_outputs),
        "resnet18": lambda: resnet18(
            shape[0], data.num_outputs, large_images=images and min(shape[1:]) > _LARGE_IMAGE
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = makers[name]()
    # A regression's [B, 1] becomes [B], the shape of its target.
    return nn.Sequential(model, nn.Flatten(0)) if data.task == "regression" else model
