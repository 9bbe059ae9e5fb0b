"""Sees every use of a model's parameters in a forward, and records its gradient in the backward.

A `torch.overrides.TorchFunctionMode` looks at the calls of `torch.nn.functional`, so that it does
not matter which module makes them: subclasses, functional use of a module's weight, tied and
repeated layers come out alike, and the model is not changed. torch.compile traces it like any other
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsel.grad_norms import broadcast, handlers, stack
from fastsel.grad_norms.activations import Keeper, history, on_gradient
from fastsel.grad_norms.batch_free import EXPANDING, BatchFree, Source, flat
from fastsel.grad_norms.compiled import Uses, record_all, watch_compiled
from fastsel.grad_norms.mixing import Mixing, may_look_inside
from fastsel.grad_norms.records import Pass, Records, Target, in_backward, refuse_second_derivative

Call = Callable[..., Any]


class Capture(TorchFunctionMode):
    """The mode; see the module's text. `GradNorms` makes and enters it.

    Attributes:
        records: Where the gradients go.
        mixing: Looks whether samples mix, until it knows.
        alone: Whether no other capture is on, whose mode would not see into a function of ours.
        shared: Parameters known to be used more than once in a forward.
        names: The model's parameters and their names, as they are in this forward.
        ruled: Parameters that a rule of one's own sees to.
        missing: Parameters that were used where there is no rule, if that is allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        exact_grad: bool,
        allow_missing: bool,
        batch_statistics: bool,
        allow_mixed_loss: bool,
        shared: Iterable[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.active = False
        self.exact_grad = exact_grad
        self.allow_missing = allow_missing
        self.batch_statistics = batch_statistics
        self.mixing = Mixing(known=allow_mixed_loss)
        self.alone = True
        self.records = Records()
        self.missing: set[str] = set()
        self.shared = set(shared)
        self.token = torch.zeros(1)
        self._compiled_uses: dict[str, int] = {}
        self._compiled_batch: int | None = None
        self.names: dict[Tensor, str] = {}
        self.batch_free = BatchFree()
        self._foreign: set[int] = set()
        self.ruled: set[str] = set()
        self.refresh()
        if not any(parameter.requires_grad for parameter in self.names):
            raise ValueError("GradNorms: the model has no parameter that requires a gradient")
        unknown = sorted(self.shared - set(dict(model.named_parameters(remove_duplicate=False))))
        if unknown:
            raise ValueError(f"GradNorms: shared names no parameter of the model: {unknown}")

    def refresh(self) -> None:
        """Reads the model's parameters again: sharding replaces them in the forward."""
        self.names = {}
        self._foreign.clear()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter in self.names:
                self.shared.add(self.names[parameter])
            else:
                self.names[parameter] = name
        frozen = (parameter for parameter in self.names if not parameter.requires_grad)
        self.batch_free.fixed = dict.fromkeys([*frozen, *self.model.buffers()])
        device = next((p.device for p in self.names), torch.device("cpu"))
        self.token = self.token.to(device)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters as they are now, by their first names."""
        yield from self.model.named_parameters()

    # ---- when it is on ----

    def start(self) -> None:
        """Looks at every call from now on."""
        self.active = True
        stack.set_active([*stack.active, self])
        self.refresh()
        self.batch_free.forget()
        self._compiled_uses = {}
        self._compiled_batch = None
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Looks at none."""
        self.active = False
        stack.set_active([one for one in stack.active if one is not self])
        stack.leave(self)
        self.forget()

    def forget(self) -> None:
        """Forgets what forwards left that no backward has come for."""
        self.batch_free.forget()
        self.mixing.forget()

    def begin_forward(self) -> None:
        """The whole model's forward starts."""
        self.batch_free.forget()
        if torch.compiler.is_compiling():
            self._compiled_uses = {}
            self._compiled_batch = None
        elif not in_backward():
            self._used_in_forward = False
            if self.records.begin():
                self.mixing.forget()

    def end_forward(self, output: Any) -> None:
        """The whole model's forward is over."""
        self.batch_free.forget()  # nor has a compiled graph to return them
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not in_backward():
            self.mixing.saw_output(output)

    def __torch_function__(
        self, func: Call, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = handlers.HANDLERS.get(func)
        if handler is not None and self._grad_enabled(args):
            out = handler(self, func, *args, **kwargs)
        else:
            out = self.plain(func, args, kwargs)
        self.batch_free.note_constant(func, (*args, *kwargs.values()), out)
        return out

    def plain(self, func: Call, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Any:
        """Calls a function that has no rule, and raises where a parameter goes into it."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in broadcast.ELEMENTWISE or func in EXPANDING:
            args = broadcast.meets_batch(self, func, args)
        out = func(*args, **kwargs)
        if func is Tensor.unsqueeze and (source := self.source(args[0])) is not None:
            self.batch_free.sources[out] = source
        else:
            values = [v for v in flat((*args, *kwargs.values())) if isinstance(v, Tensor)]
            for value in values:
                self._check_use(func, value, out, values)
        return out

    def _grad_enabled(self, args: Sequence[Any]) -> bool:
        """Whether gradients are kept; raises where inference mode forbids them for good."""
        if torch.is_grad_enabled():
            return True
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            for value in args:
                name = self.name(value) if isinstance(value, Tensor) else None
                if name is not None:
                    raise RuntimeError(
                        f"GradNorms: layer {self.layer(name)!r} runs in inference mode, which "
                        "keeps no gradients: evaluate under torch.no_grad() instead"
                    )
        return False

    # ---- what has no samples ----

    def constant(self, value: Any) -> bool:
        """Whether a tensor is a buffer, a frozen parameter, or made of nothing but these."""
        return self.batch_free.constant(value)

    def without_samples(self, input: Tensor, names: Sequence[str | None]) -> bool:
        """Whether a layer gets a constant, and its parameters are allowed to have no norm."""
        if not self.constant(input):
            return False
        known = [name.partition("[")[0] for name in names if name is not None]
        if not self.allow_missing:
            raise NotImplementedError(
                f"GradNorms: layer {self.layer(known[0])!r} gets a buffer or frozen parameter, "
                "which has no batch dimension and no norm rule: expand it to the batch, or take "
                "GradNorms(..., missing='approximate') to leave the layer out of the norms"
            )
        self.missing.update(known)
        return True

    # ---- which parameters count ----

    def name(self, parameter: Tensor | None) -> str | None:
        """The name of a parameter that is trained, None of anything else."""
        if parameter is None or not parameter.requires_grad:
            return None
        if parameter in self.names:
            known = self.names[parameter]
            return None if known in self.ruled else known
        if torch.compiler.is_compiling() or not parameter.is_leaf:
            return None
        if id(parameter) not in self._foreign:
            known_foreign = {*self._foreign, id(parameter)}
            self.refresh()
            if parameter in self.names:
                known = self.names[parameter]
                return None if known in self.ruled else known
            self._foreign = known_foreign
        return None

    def source(self, value: Any) -> Source | None:
        """What a tensor without a batch dimension stands for, if it is known."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        if value in self.batch_free.sources:
            return self.batch_free.sources[value]
        name = self.name(value) if value in self.names else None
        return None if name is None else Source(name)

    def refuse_positions(self, value: Tensor) -> None:
        """Raises where such a tensor turns out to be of positions."""
        if value in self.batch_free.singles:
            layer = self.layer(self.batch_free.singles[value])
            raise ValueError(
                f"GradNorms: layer {layer!r} got as many positions as there are samples, "
                "or before any layer that tells the batch: pass them as [1, T]"
            )

    def _check_use(self, func: Call, value: Tensor, out: Any, values: Sequence[Tensor]) -> None:
        """Raises where a parameter goes, among `values`, into something that has no rule."""
        outs = out if isinstance(out, (list, tuple)) else (out,)
        if not any(isinstance(one, Tensor) and one.requires_grad for one in outs) or out is value:
            return
        if value in self.batch_free.sources:
            name = self.batch_free.sources[value].name
            raise NotImplementedError(
                f"GradNorms: layer {self.layer(name)!r} gives {list(value.shape)}, without a batch "
                f"dimension, which goes into {getattr(func, '__name__', func)}: expand its input "
                "to the batch"
            )
        if value not in self.names or not value.requires_grad:
            return
        name = self.names[value]
        if name in self.ruled:
            return
        if self.allow_missing:
            self.missing.add(name)
            return
        met = (
            " together with a constant of the model"
            if any([self.constant(one) for one in values])
            else ""
        )
        raise NotImplementedError(
            f"GradNorms: parameter {name!r} of {self._owner(name)} is used by "
            f"{getattr(func, '__name__', func)}{met}, for which there is no norm rule: "
            "register_norm_rule for its module, or GradNorms(..., missing='approximate') to leave "
            "it out of the norms"
        )

    def _owner(self, name: str) -> str:
        module = self.model.get_submodule(name.rpartition(".")[0])
        return type(module).__name__

    def check_complete(self, passes: Sequence[tuple[Pass, Mapping[str, Tensor]]]) -> None:
        """Raises where a parameter got a gradient but no norm: the sum would be short."""
        known = {backward for one, _ in passes for backward in one.backwards}
        for backward, name, active in sorted(self.records.touched):
            if name in self.missing:
                continue
            seen = [squared for one, squared in passes if backward in one.backwards]
            # A backward of its own inside another's is that of a reentrant checkpoint.
            if any(name not in squared for squared in seen) or (active and backward not in known):
                self.raise_unseen(name)

    def check_gradients(self, names: Iterable[str], squared: Mapping[str, Tensor]) -> None:
        """Raises where one of these parameters, which have a gradient, has no norm."""
        for name in names:
            if name not in squared and name not in self.missing:
                self.raise_unseen(name)

    def raise_unseen(self, name: str) -> None:
        """Says that a parameter's gradient came from nobody knows where."""
        raise RuntimeError(
            f"GradNorms: parameter {name!r} of {self._owner(name)} got a gradient, but nothing is "
            "known of how: it was used outside the context, in a reentrant checkpoint, or where "
            "no norm rule sees it (register_norm_rule for its module)"
        )

    def check_loss(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Raises where the latest forwards or their loss mix samples; looks until it knows."""
        looking = [one for one in stack.active if not one.mixing.known]
        if looking:
            for one in stack.active:
                one.pause(True)
            try:
                with self:  # checkpointed layers run again, and must do what they did
                    for one in looking:
                        size = one.records.current.batch_size
                        inside = not one.batch_statistics and may_look_inside(one.model)
                        one.mixing.check(loss, gradient, size, inside=inside)
            finally:
                for one in stack.active:
                    one.pause(False)
        self._used_in_forward = False

    def pause(self, paused: bool) -> None:
        """Records nothing of a backward that only looks."""
        self.mixing.running = self.records.paused = paused

    # ---- recording ----

    def layer(self, name: str) -> str:
        """The layer of a parameter, for errors."""
        return name.rpartition(".")[0] or type(self.model).__name__

    def _check_batch(self, name: str, size: int) -> None:
        """The first dimension is the same everywhere, or it is not the batch."""
        current = self.records.current
        if current.batch_size is None:
            current.batch_size, current.first_layer = size, self.layer(name)
        elif current.batch_size != size and not self._used_in_forward:
            # The forward before this one had no backward, and other samples.
            self.records.current = Pass()
            self._check_batch(name, size)
        elif current.batch_size != size:
            raise ValueError(
                f"GradNorms: layer {self.layer(name)!r} got {size} samples, layer "
                f"{current.first_layer!r} {current.batch_size}: the first dimension must be the "
                "batch in every layer, and the same"
            )

    def batch_size(self) -> int | None:
        """Samples in the layers that this forward went through so far, if any."""
        if torch.compiler.is_compiling():
            return self._compiled_batch
        return self.records.current.batch_size

    def _new_use(self, name: str, batch_size: int) -> int:
        """The number of a use that starts here; -1 where activations are computed once more."""
        if torch.compiler.is_compiling():
            if self._compiled_batch is None:
                self._compiled_batch = batch_size
            number = self._compiled_uses.get(name, 0)
            self._compiled_uses[name] = number + 1
            return number
        if in_backward():
            return -1
        self.records.begin()
        self._check_batch(name, batch_size)
        self._used_in_forward = True
        number = self.records.current.new_use(name)
        if number > 0:
            self.shared.add(name)
        return number

    def share(self, *parameters: Tensor | None) -> None:
        """Notes that parameters are about to be used several times."""
        for name in map(self.name, parameters):
            if name is not None:
                self.shared.add(name)

    def target(self, name: str | None, batch_size: int) -> Target | None:
        """Where the gradient of a parameter's new use goes; None where it is not wanted."""
        if name is None:
            return None
        number = self._new_use(name, batch_size)
        if number < 0:
            return None
        if torch.compiler.is_compiling():
            return Target(name, number, name in self.shared, None, self.token, self.records.handle)
        return Target(name, number, False, self.records.current, self.token, self.records.handle)

    def watch(
        self,
        out: Tensor,
        saved: Tensor | None,
        names: Sequence[str | None],
        uses: Uses,
        batch_size: int,
        rows: tuple[int, int] | None = None,
        *,
        own_node: bool = False,
    ) -> Tensor:
        """`out`, whose gradient is recorded for each of `names`, None among them ignored.

        Args:
            out: What a layer returns.
            saved: What `uses` needs of the forward; released as soon as it was used.
            names: The parameters.
            uses: From `saved` and the gradient of `out`, the use of each parameter.
            batch_size: Samples in `out`.
            rows: As in `batch_first`.
            own_node: `out` is a view of what others use too, so that its base tells nothing.
        """
        if not out.requires_grad or not any(name is not None for name in names):
            return out
        targets = [self.target(name, batch_size) for name in names]
        if torch.compiler.is_compiling():
            kept = None if saved is None else saved.detach()
            return watch_compiled(out, kept, targets, uses)
        layer = self.layer(next(name for name in names if name is not None))
        keeper = None if saved is None else Keeper(saved, layer)
        if all(target is None for target in targets):
            return out  # computed once more; what was kept is counted by a checkpoint
        self.mixing.saw_layer(layer, out, saved, rows)
        shape = out.shape

        def record(grad: Tensor) -> None:
            if self.mixing.running:
                return
            refuse_second_derivative(layer)
            for target in targets:
                if target is not None:
                    target.refuse_second()
            kept = None if keeper is None else keeper.release()
            record_all(targets, uses(kept, grad.view(shape)))

        on_gradient(out if own_node else history(out), record)
        return out
