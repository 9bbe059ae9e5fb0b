"""Per-sample gradient norms by Opacus, BackPACK and `torch.func`: the peers of `GradNorms`.

Each is made of a model, of which it takes a copy, and a loss that is the mean over samples. Calling
it with inputs and target does one forward and one backward, leaves the batch's gradient in the
copy's ``.grad`` and returns the norms ``[B]``. What a peer refuses, or gets wrong without saying
so, `refusal` says as text, so that it is left out by name and never silently.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that have trained parameters of their own, with their names."""
    return [
        (name or "the model", module)
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def _tied(model: nn.Module) -> bool:
    uses = Counter(
        id(p)
        for _, module in _owners(model)
        for p in module.parameters(recurse=False)
        if p.requires_grad
    )
    return max(uses.values(), default=0) > 1


def _in_place(model: nn.Module) -> bool:
    return any(getattr(module, "inplace", False) for module in model.modules())


def _padded(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.padding_idx is not None


class OpacusGhost:
    """Opacus' ghost clipping, the backward that takes the norms.

    Layers without a norm rule of theirs, convolutions and normalisations among them, are done by
    materialising the gradients of one layer at a time. A linear layer on more than three dimensions
    and a weight used through `torch.nn.functional` end in an AttributeError, which cannot be seen
    from the model.
    """

    NAME = "Opacus ghost"
    PACKAGE = "opacus"

    @staticmethod
    def refusal(model: nn.Module) -> str:
        """Why it cannot take this model's norms, or nothing."""
        if any(isinstance(m, _BATCH_NORMS) for m in model.modules()):
            return "Opacus refuses batch norm (NotImplementedError)"
        if _tied(model):
            return "Opacus' ghost clipping refuses tied weights (NotImplementedError)"
        if _in_place(model):
            return "the hooks of Opacus refuse in-place activations (RuntimeError)"
        for name, module in _owners(model):
            if isinstance(module, (nn.MultiheadAttention, *_RECURRENT)):
                return f"Opacus wants {name} replaced by its own {type(module).__name__}"
            if _padded(module):
                return f"Opacus' norms count the padding of an embedding ({name})"
        return ""

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        fast = importlib.import_module(
            "opacus.grad_sample.grad_sample_module_fast_gradient_clipping"
        )
        self.model = fast.GradSampleModuleFastGradientClipping(
            copy.deepcopy(model), loss_reduction="mean", use_ghost_clipping=True
        )
        self.criterion = criterion

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        self.criterion(self.model(inputs), target).backward()
        return self.model.get_norm_sample()  # type: ignore[no-any-return]


class BackpackNorms:
    """BackPACK's `BatchL2Grad`.

    Of layers without a rule it only warns, so the sum would be short; the norms of grouped
    convolutions and tied weights are wrong.
    """

    NAME = "BackPACK"
    PACKAGE = "backpack"

    @staticmethod
    def refusal(model: nn.Module) -> str:
        """Why it cannot take this model's norms, or nothing."""
        for name, module in _owners(model):
            if isinstance(module, (*_CONVS, *_TRANSPOSED)):
                if module.groups != 1:
                    return f"BackPACK's norms of grouped convolutions are wrong ({name})"
            elif isinstance(module, _BATCH_NORMS):
                if module.training:
                    return "BackPACK refuses batch norm in train mode (NotImplementedError)"
            elif _padded(module):
                return f"BackPACK refuses padding_idx ({name}, NotImplementedError)"
            elif isinstance(module, (nn.RNN, nn.LSTM)):
                if module.num_layers > 1 or module.bidirectional:
                    return f"BackPACK refuses {name}: of one layer and direction only"
            elif not isinstance(module, (nn.Linear, nn.Embedding)):
                return f"BackPACK has no rule for {type(module).__name__}"
        if _in_place(model):
            return "the hooks of BackPACK refuse in-place activations (RuntimeError)"
        return "BackPACK's norms of tied weights are wrong" if _tied(model) else ""

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        backpack = importlib.import_module("backpack")
        self._backpack = backpack.backpack
        self._norm = importlib.import_module("backpack.extensions").BatchL2Grad
        self.model = backpack.extend(copy.deepcopy(model))
        self.criterion = criterion

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        with self._backpack(self._norm()):
            self.criterion(self.model(inputs), target).backward()
        squared: list[Any] = [p.batch_l2 for p in self.model.parameters() if p.requires_grad]
        # Of the mean loss, so each gradient was divided by the batch size.
        norms: Tensor = len(inputs) * torch.stack(squared).sum(0).sqrt()
        return norms


class VmapNorms:
    """`torch.func`: every sample's gradient, materialised, its norm, and their mean."""

    NAME = "vmap(grad)"
    PACKAGE = "torch"

    @staticmethod
    def refusal(model: nn.Module) -> str:
        """Why it cannot take this model's norms, or nothing."""
        for module in model.modules():
            if isinstance(module, _BATCH_NORMS) and module.training:
                return "vmap(grad) cannot see the batch that batch norm in train mode mixes"
            if isinstance(module, (nn.RNN, nn.GRU)):
                return f"vmap has no rule for {type(module).__name__}"
        return ""

    @staticmethod
    def nbytes(model: nn.Module, batch_size: int) -> int:
        """What the gradients of all samples take."""
        return batch_size * sum(p.nbytes for p in model.parameters() if p.requires_grad)

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        self.model = copy.deepcopy(model)
        self.criterion = criterion
        self._gradients = torch.func.vmap(torch.func.grad(self._loss), in_dims=(None, 0, 0))

    def _loss(self, parameters: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(self.model, parameters, (inputs[None],))
        return self.criterion(output, target[None])

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        values = {name: p.detach() for name, p in trained.items()}
        with warnings.catch_warnings():
            # Of operators that vmap runs in a loop.
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            gradients = self._gradients(values, inputs, target)
        for name, parameter in trained.items():
            parameter.grad = gradients[name].mean(0)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()])
        total: Tensor = norms.norm(dim=0)
        return total


PEERS = (OpacusGhost, BackpackNorms, VmapNorms)
