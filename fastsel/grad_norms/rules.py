"""Norm rules of one's own, for modules that use parameters in ways fastsel does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NormRule = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, Tensor]]

_rules: dict[type[nn.Module], NormRule] = {}


def register_norm_rule(module_type: type[nn.Module], rule: NormRule | None) -> None:
    """Teaches `GradNorms` the parameters of a module of one's own.

    The rule replaces whatever fastsel knows of the functions that the module calls, for the
    parameters that the module holds itself; those of its children keep their own rules. Subclasses
    inherit it. `GradNorms` objects made before do not see it.

    Args:
        module_type: The class.
        rule: ``rule(module, inputs, grad_output)`` gives for each of the module's own trained
            parameters, by its name in the module, the squared norm of every sample's gradient
            ``[B]``. `inputs` are the positional arguments of its forward, `grad_output` the
            gradient of what it returns, which must be one tensor. None takes a rule back.

    Raises:
        TypeError: `module_type` is not a class of modules, or `rule` cannot be called.

    Example:
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(3))
        ...
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> def rule(module, inputs, grad_output):
        ...     return {"weight": (inputs[0] * grad_output).square().sum(-1)}
        >>> fastsel.register_norm_rule(Scale, rule)
        >>> norms = fastsel.GradNorms(Scale(), reduction="sum")
        >>> with norms:
        ...     norms.model(torch.tensor([[3.0, 4.0, 0.0]])).sum().backward()
        >>> norms.norms
        tensor([5.])
    """
    if not isinstance(module_type, type) or not issubclass(module_type, nn.Module):
        raise TypeError(
            f"register_norm_rule: module_type must be a class of modules, got {module_type!r}"
        )
    if rule is None:
        _rules.pop(module_type, None)
        return
    if not callable(rule):
        raise TypeError(f"register_norm_rule: rule must be callable, got {type(rule).__name__}")
    _rules[module_type] = rule


def norm_rule(module: nn.Module) -> NormRule | None:
    """The rule of a module's class, or of the nearest of its bases."""
    for base in type(module).__mro__:
        if base in _rules:
            return _rules[base]
        if (base.__module__, base.__qualname__) == ("transformers.pytorch_utils", "Conv1D"):
            return _transformers_conv1d
    return None


def _transformers_conv1d(
    module: nn.Module, inputs: tuple[Any, ...], grad_output: Tensor
) -> Mapping[str, Tensor]:
    """GPT-2's linear layers, which flatten batch and positions before their product."""
    (x,) = inputs  # [B, T..., d]
    return {
        "weight": torch.ops.fastsel.linear_grad_norm_sq(x.detach().to(grad_output), grad_output),
        "bias": torch.ops.fastsel.bias_grad_norm_sq(grad_output),
    }
