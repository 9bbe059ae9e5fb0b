"""The optimizers `compare` trains with."""

from __future__ import annotations

import torch
from torch import nn

# As in AdaSelection's experiments (its section 4).
SGD_MOMENTUM = 0.9
OPTIMIZERS = {"adam": "Adam", "sgd": f"SGD with momentum {SGD_MOMENTUM}"}


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make an optimizer.

    Args:
        name: One of `OPTIMIZERS`.
        model: Whose parameters it steps.
        lr: Learning rate.
    """
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=SGD_MOMENTUM)
    return torch.optim.Adam(model.parameters(), lr=lr)
