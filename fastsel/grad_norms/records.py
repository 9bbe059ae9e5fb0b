"""What backwards leave behind: norms of parameters used once, uses of those used more often."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsel.grad_norms.kinds import Use, compact, joint_norm_sq, norm_sq


class Pass:
    """One forward and backward of one batch.

    Attributes:
        batch_size: Samples, None before the first layer.
        uses: How often each parameter was used in the forward.
        norms: The squared norms ``[B]`` of each parameter whose gradient is complete. Of a
            parameter of which parts were used by themselves, ``name[first:last]`` names its rows.
        backwards: The backwards, by torch's number, that brought gradients.
    """

    def __init__(self) -> None:
        self.batch_size: int | None = None
        self.first_layer = ""
        self.uses: dict[str, int] = {}
        self.norms: dict[str, Tensor] = {}
        self.backwards: set[int] = set()
        self._waiting: dict[str, list[Use]] = {}
        self._arrived: dict[str, set[int]] = {}
        self._fired: set[tuple[str, int]] = set()

    @property
    def fired(self) -> bool:
        """Whether a backward has reached this pass."""
        return bool(self._fired)

    def new_use(self, parameter: str) -> int:
        """The number of this use among those of the parameter, from 0."""
        number = self.uses.get(parameter, 0)
        self.uses[parameter] = number + 1
        return number

    def shared(self, parameter: str) -> bool:
        """Whether the parameter was used more than once."""
        return self.uses.get(parameter, 0) > 1

    def has(self, parameter: str, number: int) -> bool:
        """Whether the gradient of a use has come."""
        return (parameter, number) in self._fired

    def add(self, parameter: str, number: int, use: Use) -> None:
        """Takes the gradient of a use: its norm at once, or later with the parameter's other uses.

        Raises:
            RuntimeError: It has come before: backward ran twice through one forward.
        """
        self._fire(parameter, number)
        if not self.shared(parameter):
            self.norms[parameter] = norm_sq(use)
            return
        waiting = self._waiting.setdefault(parameter, [])
        waiting.append(compact(use))
        self._arrived.setdefault(parameter, set()).add(torch._C._current_graph_task_id())
        if len(self._arrived[parameter]) > 1:
            raise RuntimeError(
                f"GradNorms: the uses of parameter {parameter!r} in one pass got their gradients "
                "in different backwards: run each forward's backward before the next forward"
            )
        if len(waiting) == self.uses[parameter]:
            self.norms[parameter] = joint_norm_sq(self._waiting.pop(parameter), parameter)

    def add_norm(self, parameter: str, number: int, squared: Tensor) -> None:  # [B]
        """Takes the squared norms of a parameter used once."""
        self._fire(parameter, number)
        if parameter in self.norms:
            raise RuntimeError(
                f"GradNorms: a compiled model uses the layer of {parameter!r} more than once: name "
                "it in GradNorms(..., shared=[...]), or run the first step uncompiled"
            )
        self.norms[parameter] = squared

    def by_parameter(self) -> dict[str, Tensor]:
        """The squared norms of whole parameters.

        Raises:
            NotImplementedError: A parameter was used as a whole and in parts, which have no joint
                rule.
            ValueError: Parameters saw different numbers of samples.
        """
        found: dict[str, Tensor] = {}
        parts: dict[str, list[range]] = {}
        partly = {
            parameter: joint_norm_sq(uses, parameter) for parameter, uses in self._waiting.items()
        }
        for key, squared in {**self.norms, **partly}.items():
            name, _, rows = key.partition("[")
            place = range(1 << 62)
            if rows:
                first, last = rows[:-1].split(":")
                place = range(int(first), int(last))
            for other in parts.setdefault(name, []):
                if max(other.start, place.start) < min(other.stop, place.stop):
                    raise NotImplementedError(
                        f"GradNorms: parameter {name!r} is used both as a whole and in part in one "
                        "pass, for which there is no joint rule"
                    )
            parts[name].append(place)
            first_name = next(iter(found), name)
            if len(found.get(first_name, squared)) != len(squared):
                raise ValueError(
                    f"GradNorms: the layer of {name!r} saw {len(squared)} samples, that of "
                    f"{first_name!r} {len(found[first_name])}: the first dimension must be the "
                    "batch in every layer, and the same"
                )
            found[name] = found[name] + squared if name in found else squared
        return found

    def refuse_second(self, parameter: str, number: int) -> None:
        """Raises where the gradient of a use has come before."""
        if (parameter, number) in self._fired:
            raise RuntimeError(
                f"GradNorms: backward ran a second time through the layer of {parameter!r}: the "
                "norms are of one backward a forward; run the forward again"
            )

    def _fire(self, parameter: str, number: int) -> None:
        self.refuse_second(parameter, number)
        self._fired.add((parameter, number))
        self.backwards.add(torch._C._current_graph_task_id())


class Records:
    """The passes since the last reset, and the door through which compiled code reaches them.

    Attributes:
        passes: Those that are over.
        current: The one that a forward adds to.
        touched: Parameters that got a gradient, with the number of the backward, and whether the
            capture was on.
        handle: By which compiled code names this object.
        paused: A backward that only looks is running: compiled code's calls count for nothing.
    """

    def __init__(self) -> None:
        self.paused = False
        self.passes: list[Pass] = []
        self.current = Pass()
        self.touched: set[tuple[int, str, bool]] = set()
        self.handle = id(self)
        _records[self.handle] = self

    def reset(self) -> None:
        """Forgets every pass."""
        self.passes.clear()
        self.touched.clear()
        self.current = Pass()

    def begin(self) -> bool:
        """A forward of the whole model starts; whether it is a new pass: a backward has been."""
        is_new = self.current.fired
        if is_new:
            self.close()
        return is_new

    def close(self) -> None:
        """Ends the current pass."""
        if self.current.fired:
            self.passes.append(self.current)
        self.current = Pass()

    def finished(self) -> list[Pass]:
        """Every pass that a backward has reached, in order."""
        return [*self.passes, *([self.current] if self.current.fired else [])]

    def _compiled_pass(self, parameter: str, number: int) -> Pass:
        # A compiled forward is not seen; a use whose gradient comes again begins the next pass.
        if self.current.has(parameter, number):
            if torch._C._current_graph_task_id() in self.current.backwards:
                raise RuntimeError(
                    f"GradNorms: one backward reached the layer of {parameter!r} twice through "
                    "compiled code: a compiled forward may run once before its backward, and not "
                    "with backend='eager'"
                )
            self.close()
        return self.current

    def add_compiled_norm(self, parameter: str, number: int, squared: Tensor) -> None:
        """`Pass.add_norm` from compiled code."""
        current = self._compiled_pass(parameter, number)
        current.uses.setdefault(parameter, 1)
        current.add_norm(parameter, number, squared)

    def add_compiled_use(self, parameter: str, number: int, use: Use) -> None:
        """`Pass.add` of a shared parameter from compiled code, of as many uses as may come."""
        current = self._compiled_pass(parameter, number)
        current.uses[parameter] = 1 << 30  # never complete before the pass is
        current.add(parameter, number, use)


@dataclass(frozen=True)
class Target:
    """Where the gradient of one use of a parameter goes.

    Attributes:
        parameter: Its name.
        number: The number of the use among the parameter's.
        shared: Compiled code only: the parameter is known to be used more than once.
        owner: The pass; None in compiled code, which goes through `token` and `handle`.
    """

    parameter: str
    number: int
    shared: bool
    owner: Pass | None
    token: Tensor
    handle: int

    @property
    def alone(self) -> bool:
        """Whether the parameter's other uses, if any, can be ignored. Asked in the backward."""
        return not (self.shared if self.owner is None else self.owner.shared(self.parameter))

    def refuse_second(self) -> None:
        """Raises where the gradient of the use has come before."""
        if self.owner is not None:
            self.owner.refuse_second(self.parameter, self.number)

    def record(self, use: Use) -> None:
        """Takes the use, whose gradient has come."""
        if self.owner is not None:
            self.owner.add(self.parameter, self.number, use)
        elif self.shared:
            record_use(
                self.token, use.activations, use.grads, use.kind, list(use.options), self.handle,
                self.parameter, self.number,
            )  # fmt: skip
        else:
            self.record_norm(norm_sq(use))

    def record_norm(self, squared: Tensor) -> None:  # [B]
        """Takes the squared norms of a use that is `alone`."""
        if self.owner is not None:
            self.owner.add_norm(self.parameter, self.number, squared)
        else:
            record_norm(self.token, squared, self.handle, self.parameter, self.number)


def in_backward() -> bool:
    """Whether a backward is running, as when checkpointed activations are computed again."""
    return bool(torch._C._current_graph_task_id() != -1)


def refuse_second_derivative(layer: str) -> None:
    """Raises RuntimeError in a backward with create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"GradNorms: backward with create_graph=True reached layer {layer!r}: norms have no "
            "derivative; leave GradNorms for a second derivative"
        )


_records: weakref.WeakValueDictionary[int, Records] = weakref.WeakValueDictionary()


# Compiled backwards call these two. Each writes into `token`, so that it is neither dropped nor
# moved across another.


@torch.library.custom_op("fastsel_python::record_norm", mutates_args=("token",))
def record_norm(token: Tensor, squared: Tensor, handle: int, parameter: str, number: int) -> None:
    """Hands the squared norms of a parameter used once to `Records`."""
    records = _records.get(handle)
    if records is not None and not records.paused:
        records.add_compiled_norm(parameter, number, squared.clone())


@torch.library.custom_op("fastsel_python::record_use", mutates_args=("token",))
def record_use(
    token: Tensor,
    activations: Tensor | None,
    grads: Tensor,
    kind: int,
    options: Sequence[int],
    handle: int,
    parameter: str,
    number: int,
) -> None:
    """Hands one use of a shared parameter to `Records`."""
    records = _records.get(handle)
    if records is not None and not records.paused:
        kept = None if activations is None else activations.clone()
        records.add_compiled_use(parameter, number, Use(kind, kept, grads.clone(), list(options)))


@record_norm.register_fake
def _(token: Tensor, squared: Tensor, handle: int, parameter: str, number: int) -> None:
    return None


@record_use.register_fake
def _(
    token: Tensor,
    activations: Tensor | None,
    grads: Tensor,
    kind: int,
    options: Sequence[int],
    handle: int,
    parameter: str,
    number: int,
) -> None:
    return None
