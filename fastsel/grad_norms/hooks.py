"""The hooks that stay on a model while somebody holds its `GradNorms`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsel.grad_norms.activations import history, on_gradient
from fastsel.grad_norms.records import refuse_second_derivative
from fastsel.grad_norms.rules import NormRule, norm_rule

if TYPE_CHECKING:
    from fastsel.grad_norms.capture import Capture


class _Before:
    """A hook before a forward that stays behind where its model is copied or saved."""

    def __init__(self, function: Callable[[nn.Module, Any], None]) -> None:
        self._function = function

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._function(module, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Before, (_nothing,)


class _After:
    """The same after a forward."""

    def __init__(self, function: Callable[[nn.Module, Any, Any], None]) -> None:
        self._function = function

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._function(module, args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _After, (_nothing,)


def _nothing(*args: Any) -> None:
    """What a copied hook does."""


def install(capture: Capture) -> list[Any]:
    """Hooks that stay: what begins a forward, rules of one's own, what gets a gradient.

    They hold on to nothing, so that the capture ends with its owner.
    """
    me = weakref.ref(capture)

    def begin(module: nn.Module, args: Any) -> None:
        owner = me()
        if owner is not None and owner.active:
            owner.begin_forward()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        owner = me()
        if owner is not None and owner.active:
            owner.end_forward(output)

    def see_rule(
        rule: NormRule, prefix: str, module: nn.Module, args: tuple[Any, ...], out: Any
    ) -> None:
        owner = me()
        if owner is not None and owner.active and torch.is_grad_enabled():
            watch_rule(owner, rule, prefix, module, args, out)

    def touch(name: str, parameter: Tensor) -> None:
        owner = me()
        if owner is not None and (owner.active or owner.records.current.uses):
            backward = torch._C._current_graph_task_id()
            owner.records.touched.add((backward, name, owner.active))

    handles: list[Any] = [
        capture.model.register_forward_pre_hook(_Before(begin)),
        capture.model.register_forward_hook(_After(end)),
    ]
    for prefix, module in capture.model.named_modules():
        rule = norm_rule(module)
        if rule is not None:
            handles.append(
                module.register_forward_hook(_After(functools.partial(see_rule, rule, prefix)))
            )
            capture.ruled.update(
                f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)
            )
    for parameter, name in capture.names.items():
        if parameter.requires_grad and parameter.is_leaf:
            hook = functools.partial(touch, name)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    return handles


def watch_rule(
    capture: Capture,
    rule: NormRule,
    prefix: str,
    module: nn.Module,
    args: tuple[Any, ...],
    out: Any,
) -> None:
    """Has the gradient of a module's output go through a rule of one's own."""
    own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
    if not own:
        return
    if not isinstance(out, Tensor):
        raise TypeError(
            f"GradNorms: layer {prefix!r} has a norm rule, so it must return one tensor, got "
            f"{type(out).__name__}"
        )
    shape = out.shape
    names = [f"{prefix}.{name}".lstrip(".") for name in own]
    targets = [capture.target(name, out.shape[0]) for name in names]

    def record(grad: Tensor) -> None:
        if capture.mixing.running:
            return
        if not torch.compiler.is_compiling():
            refuse_second_derivative(prefix)
        squared = rule(module, args, grad.view(shape))
        for name, target in zip(own, targets, strict=True):
            if target is None:
                continue
            if not target.alone:
                raise NotImplementedError(
                    f"GradNorms: layer {prefix!r} has a norm rule and runs more than once in a "
                    "pass, for which there is no joint rule"
                )
            if name not in squared:
                raise KeyError(
                    f"GradNorms: the norm rule of {type(module).__name__} gives no norm of {name!r}"
                )
            target.record_norm(squared[name])

    if torch.compiler.is_compiling():
        out.register_hook(record)
    else:
        on_gradient(history(out), record)
