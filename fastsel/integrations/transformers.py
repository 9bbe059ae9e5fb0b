"""Hugging Face Transformers: a Trainer that trains on the chosen part of each batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsel.integrations._shared import (
    Figures,
    RunningStep,
    make_selection,
    on_cpu,
    require,
    take_rows,
)
from fastsel.select import ranks
from fastsel.select.selection import BatchSelection
from fastsel.select.selector import Selector
from fastsel.select.switch import CostAwareSwitch

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
    from transformers import Trainer as _TrainerBase
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
else:
    _transformers = require("transformers", "transformers")
    require("accelerate", "transformers")  # which the Trainer needs and transformers does not
    Trainer, TrainerCallback = _transformers.Trainer, _transformers.TrainerCallback
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = require(
        "transformers.models.auto.modeling_auto", "transformers"
    ).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    _TrainerBase = object

_OWNER = "SelectiveTrainer"
_IGNORED = -100
_log = logging.getLogger(__name__)


class SelectiveTrainerMixin(_TrainerBase):
    """Makes any subclass of `transformers.Trainer` train on the chosen part of each batch.

    Put it before the Trainer: ``class MyTrainer(SelectiveTrainerMixin, Seq2SeqTrainer)``. Each
    ``training_step`` scores its batch with a forward without labels, in eval mode and without
    gradients, and hands the chosen rows to the Trainer's own; or the whole batch, while choosing
    does not pay. Loss, gradient accumulation, mixed precision, DDP and evaluation stay the
    Trainer's. A loss that the Trainer divides by the number of label tokens is divided by those of
    the chosen rows, so that every batch keeps its weight in an accumulated step.

    The default criterion is cross-entropy on ``logits``: over the tokens, with the labels shifted,
    for causal language models; over tokens or samples as they are for others. ``label_names``, here
    ``labels``, says where the targets are. For other models and losses give a `criterion`, or
    override `scoring_inputs_and_target` and `scoring_logits`.

    The cost-aware switch times a training step up to its optimizer's. Logs get ``fastsel/chosen``,
    the share of samples trained on, and ``fastsel/selecting``, the share of steps that chose, both
    since the log before; ``fastsel/share`` and ``fastsel/cost``, what the switch compares; and for
    `AdaSelection` ``fastsel/weight/<method>``.

    Checkpoints hold the state of every process, ``fastsel_<process>.pt``. A job of another size
    goes on with the first one's.

    Args:
        args: Those of the Trainer.
        selector: A `Selector`, or the name of one; one that gives weights cannot be used, for the
            model gives one loss.
        rate: The share of the batch to train on, in (0, 1]; with a selector's name only.
        criterion: The loss to score with, called as ``criterion(logits, labels)``, with classes in
            dimension 1 for tokens; see `fastsel.scores.per_sample_scores`.
        switch: ``"auto"``, ``"select"``, ``"plain"`` or a `CostAwareSwitch`; see `SelectiveStep`.
        shift_labels: Whether the logits at a token are for the next one; None finds out.
        ids_key: The key of a batch's positions in the data set, if it has them. The model never
            sees it.
        selection_options: The other arguments of `SelectiveStep` that are about choosing:
            ``scoring_dtype``, ``scoring_mode``, ``scoring_model``, ``scoring_every``, ``memory``,
            ``reference``, ``across_ranks``, ``process_group``, ``autocast_dtype``.
        kwargs: Those of the Trainer.

    Attributes:
        selection: The `fastsel.select.selection.BatchSelection` behind it; ``selection.selector``
            and ``selection.switch`` are its selector and its switch.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, the arguments do not fit together, or the selector
            gives weights.
    """

    def __init__(
        self,
        *args: Any,
        selector: Selector | str = "adaselection",
        rate: float | None = None,
        criterion: Callable[..., Any] | None = None,
        switch: CostAwareSwitch | str = "auto",
        shift_labels: bool | None = None,
        ids_key: str | None = None,
        selection_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Makes the Trainer and what chooses."""
        self.selection: BatchSelection = make_selection(
            _OWNER,
            nn.CrossEntropyLoss(ignore_index=_IGNORED) if criterion is None else criterion,
            selector,
            rate,
            {"switch": switch, **(selection_options or {})},
        )
        self._default_criterion = criterion is None
        self._shift_labels = shift_labels
        self._ids_key = ids_key
        self._figures = Figures()
        self._step: RunningStep | None = None
        self._look: Callable[[Any], None] | None = None
        self._scored_model: _Logits | None = None
        super().__init__(*args, **kwargs)
        if self.selection.scorer.model is (selection_options or {}).get("scoring_model"):
            self.selection.scorer.model = _Logits(self.selection.scorer.model, self.scoring_logits)
        else:
            self._scored_model = _Logits(self.model, self.scoring_logits)
            self.selection.scorer.model = self._scored_model
        self.add_callback(_StepEnd(self._finish_step))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The Trainer's training step, on the chosen rows of the batch."""
        self._finish_step(timed=False)  # should the one before have been cut short
        self.selection.cycle = self.args.gradient_accumulation_steps
        model.train()
        trained = _Logits(model, self.scoring_logits)
        if self._scored_model is not None:
            trained, self._scored_model.model = self._scored_model, model
        step = RunningStep(self.selection, self.args.device, trained)
        ids = self._ids_of(inputs)
        inputs = self._prepare_inputs(inputs)
        scored, target = self.scoring_inputs_and_target(inputs)
        share = step.choose(scored, target, ids)
        chosen = step.take(functools.partial(take_rows, batch_size=step.batch_size), inputs)
        if share is not None and num_items_in_batch is not None:
            # Of the items of this batch and others, those here shrink to the chosen part.
            kept = target.index_select(0, share.choice.indices)
            num_items_in_batch = num_items_in_batch * (_items(kept) / _items(target))
        self._step = step
        self._look = functools.partial(step.trained, inputs=scored, target=target, ids=ids)
        loss: Tensor = super().training_step(model, chosen, num_items_in_batch)
        if step.wants_output:
            self._look(None)
        self._look = None
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The Trainer's loss; in a training step its outputs are kept where they are of use."""
        step = self._step
        if step is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, output = super().compute_loss(model, inputs, True, **kwargs)
        if step.wants_output and self._look is not None:
            self._look(self.scoring_logits(output))
        if step.share is not None and step.share.scale != 1.0:
            loss = loss * step.share.scale
        return (loss, output) if return_outputs else loss

    def scoring_inputs_and_target(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """What the scoring forward is called with, and the targets that its logits are held to.

        Args:
            inputs: The batch, on the device of the model.

        Returns:
            The inputs without labels (an encoder-decoder keeps them: its decoder's inputs come from
            there) and the labels, without the first token where they are shifted.

        Raises:
            ValueError: The labels are not one tensor, or the default criterion is not for them.
        """
        names = [name for name in self.label_names if name in inputs]
        if len(names) != 1 or not isinstance(inputs[names[0]], Tensor):
            raise ValueError(
                f"{_OWNER}: a batch must have one tensor of labels (label_names), got {names} "
                f"among {', '.join(inputs)}; override scoring_inputs_and_target for others"
            )
        labels = inputs[names[0]]
        if self._default_criterion and labels.is_floating_point():
            raise ValueError(
                f"{_OWNER}: criterion must be given for labels of {labels.dtype}, the default is "
                "cross-entropy over classes"
            )
        keep = self._is_encoder_decoder()
        scored = {name: part for name, part in inputs.items() if keep or name != names[0]}
        return scored, labels[:, 1:] if self._shifts() else labels

    def scoring_logits(self, output: Any) -> Tensor:
        """The logits in a model's output, as the criterion takes them.

        Args:
            output: What the model gave.

        Returns:
            ``[B, C]``, or ``[B, C, T]`` for tokens; without the last token where labels are
            shifted.

        Raises:
            TypeError: There are no ``logits`` in the output.
        """
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{_OWNER}: the model's output must have logits, got {type(output).__name__}; "
                "override scoring_logits for others"
            )
        if self._shifts():
            logits = logits[:, :-1]
        return logits.movedim(2, 1) if logits.dim() == 3 else logits

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with the selection's figures beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **self._figures.take(self.selection)}
        super().log(logs, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        # Evaluation comes by here, too: the model is to see no ids there either.
        if self._ids_key is not None and self._ids_key in inputs:
            inputs = {name: part for name, part in inputs.items() if name != self._ids_key}
        return super()._prepare_inputs(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer drops columns that the model's forward does not name.
        super()._set_signature_columns_if_needed()
        if self._ids_key is not None and self._ids_key not in self._signature_columns:
            self._signature_columns.append(self._ids_key)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        path = self._state_path(output_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"processes": self.args.world_size, "state": self.selection.state_dict()}
        torch.save(on_cpu(state), path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        own, first = _load(self._state_path(checkpoint)), _load(self._state_path(checkpoint, 0))
        fits = own is not None and own["processes"] == self.args.world_size
        # What one process does not find, none may use: their switches have to decide alike.
        found = [float(fits), float(first is not None)]
        if self.args.world_size > 1:
            found = ranks.mean_over_ranks(found, self.selection.process_group)
        if found[0] == 1.0 and own is not None:
            self.selection.load_state_dict(own["state"])
        elif found[1] == 1.0 and first is not None:
            _log.warning(
                "%s: the state was saved by %d processes and is loaded by %d; every one takes the "
                "first one's", _OWNER, first["processes"], self.args.world_size,
            )  # fmt: skip
            self.selection.load_state_dict(first["state"])
        else:
            path = self._state_path(checkpoint)
            _log.warning("%s: there is no %s, so the selection starts anew", _OWNER, path)

    def _state_path(self, folder: str, process: int | None = None) -> Path:
        index = self.args.process_index if process is None else process
        return Path(folder) / f"fastsel_{index}.pt"

    def _ids_of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        if self._ids_key is None:
            return None
        if self._ids_key not in inputs:
            raise ValueError(
                f"{_OWNER}: a batch must have the ids_key {self._ids_key!r}, "
                f"got {', '.join(inputs)}"
            )
        ids = inputs[self._ids_key]
        return ids.to(self.args.device) if isinstance(ids, Tensor) else ids

    def _is_encoder_decoder(self) -> bool:
        config = getattr(self.model, "config", None)
        return bool(getattr(config, "is_encoder_decoder", False))

    def _shifts(self) -> bool:
        if self._shift_labels is None:
            model: Any = self.model
            if hasattr(model, "get_base_model"):  # an adapter around it, of peft
                model = model.get_base_model()
            causal = (
                getattr(model, "loss_type", None) == "ForCausalLM"
                or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            )
            self._shift_labels = causal and not self._is_encoder_decoder()
        return self._shift_labels

    def _finish_step(self, *, timed: bool = True) -> None:
        step, self._step = self._step, None
        self._look = None
        if step is not None:
            step.finish(timed=timed)
            self._figures.add(step)


class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
    """A `transformers.Trainer` that trains on the chosen part of each batch.

    See `SelectiveTrainerMixin`; arguments that it does not name are the Trainer's.

    Example:
        >>> trainer = SelectiveTrainer(
        ...     model, training_args, train_dataset=dataset, selector="grad_norm", rate=0.3
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """


def _load(path: Path) -> dict[str, Any] | None:
    """The saved state at a path; None if there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class _StepEnd(TrainerCallback):
    """Tells when the Trainer's step is over, the optimizer's included."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish()


class _Logits(nn.Module):
    """A model that gives nothing but its logits."""

    def __init__(self, model: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._logits = logits

    def forward(self, **inputs: Any) -> Tensor:
        """The logits, as the criterion takes them."""
        return self._logits(self.model(**inputs))


def _items(
    target: Tensor,  # [B, ...]
) -> Tensor:
    """How many targets count, at least 1."""
    return target.ne(_IGNORED).sum().clamp(min=1)


__all__ = ["SelectiveTrainer", "SelectiveTrainerMixin"]
