"""Lightning: a callback that makes a LightningModule train on the chosen part of each batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastsel.data.optional import MissingPackageError
from fastsel.integrations._shared import (
    Figures,
    RunningStep,
    gather_states,
    make_selection,
    own_state,
    require,
    take_rows,
)
from fastsel.select.batch import Inputs
from fastsel.select.selection import BatchSelection
from fastsel.select.selector import Selector
from fastsel.select.switch import CostAwareSwitch

_OWNER = "SelectiveCallback"


def _callback_base() -> Any:
    """A callback class that the trainers of all installed flavours accept.

    ``lightning`` and ``pytorch_lightning`` are copies of each other with classes of their own, and
    a trainer takes callbacks of its own flavour only.
    """
    classes = []
    for module in ("pytorch_lightning", "lightning.pytorch"):
        try:
            classes.append(require(module, "lightning").Callback)
        except MissingPackageError:
            if module == "lightning.pytorch" and not classes:
                raise
    return type("_Callback", tuple(classes), {})


if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
else:
    _Callback = _callback_base()

InputsAndTarget = Callable[[Any], tuple[Inputs, Tensor]]


class SelectiveCallback(_Callback):
    """Makes a fit train on the chosen part of each batch; the LightningModule stays as it is.

    While a fit runs, the module's ``training_step`` is wrapped: it gets the chosen rows of the
    batch, or the whole batch while choosing does not pay. What scores is the module's ``forward``,
    in eval mode and without gradients, with `criterion`. Automatic and manual optimization,
    gradient accumulation, mixed precision and DDP work as without it; validation is not touched.
    After the fit the module is as it was, also after an exception.

    The cost-aware switch times steps from ``on_train_batch_start`` to ``on_train_batch_end``, so
    with everything the trainer does for them, the optimizer's step included. Its plain steps learn
    what a choice would be worth from the training forward, if ``training_step`` calls the module
    itself (``self(inputs)``) exactly once, and else from a forward of their own, now and then.

    Every ``log_every_n_steps`` steps the module logs ``fastsel/chosen``, the share of samples
    trained on; ``fastsel/selecting``, the share of steps that chose (both since they were logged
    last); ``fastsel/share`` and ``fastsel/cost``, what the switch compares; and for `AdaSelection`
    ``fastsel/weight/<method>``.

    The state is saved and restored with the trainer's checkpoints, under DDP that of every rank.

    Args:
        criterion: The loss to score with, called as ``criterion(output, target)`` on what the
            module's ``forward`` gives; see `fastsel.scores.per_sample_scores`.
        selector: A `Selector`, or the name of one; one that gives weights cannot be used, for
            ``training_step`` returns one loss.
        rate: The share of the batch to train on, in (0, 1]; with a selector's name only.
        switch: ``"auto"``, ``"select"``, ``"plain"`` or a `CostAwareSwitch`; see `SelectiveStep`.
        batch_to_inputs_and_target: Gives a batch's inputs, as ``forward`` takes them, and target.
            By default a batch is a tuple or list of two.
        ids_key: Where a batch has the samples' positions in the data set: a key of a dict, or an
            index of a tuple or list. The default `batch_to_inputs_and_target` sees the batch
            without them, ``training_step`` with them.
        take: Gives the rows at some indices ``[k]`` of a batch, for batches of unusual types. By
            default those of every tensor whose first dimension is the batch's, in nested dicts,
            lists and tuples, too.
        log: Whether to log.
        options: The other arguments of `SelectiveStep` that are about choosing: ``scoring_dtype``,
            ``scoring_mode``, ``scoring_model``, ``scoring_every``, ``memory``, ``reference``,
            ``across_ranks``, ``process_group``, ``autocast_dtype``.

    Attributes:
        selection: The `fastsel.select.selection.BatchSelection` behind it; ``selection.selector``
            and ``selection.switch`` are its selector and its switch.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, the arguments do not fit together, or the selector
            gives weights.

    Example:
        >>> callback = SelectiveCallback(nn.CrossEntropyLoss(), "grad_norm", rate=0.3)
        >>> callback.selection.switch.selecting
        False
    """

    def __init__(
        self,
        criterion: Callable[..., Any],
        selector: Selector | str = "adaselection",
        rate: float | None = None,
        *,
        switch: CostAwareSwitch | str = "auto",
        batch_to_inputs_and_target: InputsAndTarget | None = None,
        ids_key: str | int | None = None,
        take: Callable[[Any, Tensor], Any] | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        """Makes a callback."""
        super().__init__()
        self.selection: BatchSelection = make_selection(
            _OWNER, criterion, selector, rate, {"switch": switch, **options}
        )
        self._scores_with_module = options.get("scoring_model") is None
        self._inputs_and_target = batch_to_inputs_and_target
        self._ids_key = ids_key
        self._take = take
        self._log = log
        self._figures = Figures()
        self._step: RunningStep | None = None
        self._restore: Callable[[], None] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wraps the module's training step.

        Raises:
            ValueError: The module takes a ``dataloader_iter``, or it optimizes by hand while ranks
                are to choose together.
        """
        original = pl_module.training_step
        if "dataloader_iter" in inspect.signature(original).parameters:
            raise ValueError(
                f"{_OWNER}: training_step must take a batch, got one that takes a dataloader_iter"
            )
        if self.selection.across_ranks and not pl_module.automatic_optimization:
            raise ValueError(
                f"{_OWNER}: across_ranks scales the loss that training_step returns, which needs "
                "automatic optimization"
            )
        if self._scores_with_module:
            self.selection.scorer.model = pl_module
        own = vars(pl_module).get("training_step")

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._training_step(pl_module, original, args, kwargs)

        # Lightning looks one level below a wrapper for the step's own arguments.
        vars(training_step)["__wrapped__"] = getattr(original, "__wrapped__", original)

        def restore() -> None:
            if own is None:
                del pl_module.training_step
            else:
                pl_module.training_step = own

        pl_module.training_step = training_step
        self._restore = restore

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Plans the step and starts its clock."""
        self._abandon_step()
        self.selection.cycle = trainer.accumulate_grad_batches
        self._step = RunningStep(self.selection, pl_module.device, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tells the switch what the step took, and logs."""
        step, self._step = self._step, None
        if step is None or not step.batch_size:  # the module skipped the batch
            return
        step.finish()
        self._figures.add(step)
        due = trainer._logger_connector.should_update_logs or trainer.fast_dev_run
        if self._log and due and not trainer.barebones:
            for name, value in self._figures.take(self.selection).items():
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Puts the module's own training step back."""
        self._unwrap()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts the module's own training step back."""
        self._unwrap()

    def state_dict(self) -> dict[str, Any]:
        """The state of the selection, of all ranks; during a fit all of them must ask."""
        group = self.selection.process_group
        return gather_states(self.selection.state_dict(), group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; ValueError if it is that of another selection."""
        group = self.selection.process_group
        self.selection.load_state_dict(own_state(_OWNER, state_dict, group))

    def _training_step(
        self, module: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        step = self._step
        if step is None:  # not a step of the fit: a learning-rate finder runs without callbacks
            return original(*args, **kwargs)
        batch = args[0] if args else kwargs["batch"]
        inputs, target, ids = self._parts(batch)
        share = step.choose(inputs, target, ids)
        batch = step.take(functools.partial(self._rows, batch_size=step.batch_size), batch)
        args, kwargs = ((batch, *args[1:]), kwargs) if args else (args, {**kwargs, "batch": batch})
        with _watching(module if step.wants_output else None) as outputs:
            result = original(*args, **kwargs)
        step.trained(outputs[0] if len(outputs) == 1 else None, inputs, target, ids)
        return result if share is None else _scaled(result, share.scale)

    def _parts(self, batch: Any) -> tuple[Inputs, Tensor, Tensor | None]:
        ids, rest = None, batch
        if self._ids_key is not None:
            try:
                ids = batch[self._ids_key]
            except (KeyError, IndexError, TypeError):
                raise ValueError(
                    f"{_OWNER}: the batch has no ids at ids_key {self._ids_key!r}"
                ) from None
            rest = _without(batch, self._ids_key)
        if self._inputs_and_target is not None:
            return (*self._inputs_and_target(rest), ids)
        if not isinstance(rest, (tuple, list)) or len(rest) != 2:
            what = f"{len(rest)}" if isinstance(rest, (tuple, list)) else type(rest).__name__
            raise ValueError(
                f"{_OWNER}: a batch must be a tuple or list of two, inputs and target, got {what}; "
                "give batch_to_inputs_and_target for any other"
            )
        return rest[0], rest[1], ids

    def _rows(self, batch: Any, indices: Tensor, batch_size: int) -> Any:
        if self._take is not None:
            return self._take(batch, indices)
        return take_rows(batch, indices, batch_size)

    def _abandon_step(self) -> None:
        step, self._step = self._step, None
        if step is not None and step.batch_size:
            step.finish(timed=False)

    def _unwrap(self) -> None:
        self._step = None
        restore, self._restore = self._restore, None
        if restore is not None:
            restore()
        if self._scores_with_module:  # the callback outlives the fit, and is to keep no model alive
            self.selection.scorer.model = nn.Identity()


@contextmanager
def _watching(module: Any) -> Iterator[list[Any]]:
    """Collects what the module's forward gives; nothing where there is no module."""
    outputs: list[Any] = []
    # A hook would have a compiled module compile again.
    if module is None or getattr(module, "_compiler_ctx", None) is not None:
        yield outputs
        return

    def hook(_: Any, __: Any, output: Any) -> None:
        outputs.append(output.detach() if isinstance(output, Tensor) else output)

    handle = module.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def _without(batch: Any, key: str | int) -> Any:
    if isinstance(batch, Mapping):
        return {name: part for name, part in batch.items() if name != key}
    position = range(len(batch))[int(key)]
    return [part for index, part in enumerate(batch) if index != position]


def _scaled(result: Any, scale: float) -> Any:
    """What a training step returned, with its loss times `scale`."""
    if scale == 1.0 or result is None:
        return result
    if isinstance(result, Mapping):
        return {**result, "loss": result["loss"] * scale}
    return result * scale


__all__ = ["SelectiveCallback"]
