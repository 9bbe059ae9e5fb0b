"""One training step on the chosen part of a batch, wherever choosing pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsel.criterion import check_averages
from fastsel.scores import Scores, per_sample_losses
from fastsel.select.accumulation import GradientAccumulation
from fastsel.select.batch import Inputs, blanked, forward, take
from fastsel.select.memory import LossMemory
from fastsel.select.ranks import Share
from fastsel.select.references import ReferenceLosses, ReferenceModel
from fastsel.select.scoring import autocast
from fastsel.select.selection import BatchSelection
from fastsel.select.selector import Choice, Selector
from fastsel.select.switch import CostAwareSwitch, Plan


class StepResult(NamedTuple):
    """What one `SelectiveStep` did.

    Attributes:
        loss: The loss it trained on, detached, without dimensions.
        indices: The samples it trained on ``[k]``, int64, ascending.
        scores: The scores of the whole batch, None where none were needed.
        selected: Whether it chose; False for a plain step on the whole batch.
        weights: What the samples' losses were multiplied by ``[k]``, None where all count the same.
        trial: Whether it chose only for the switch to see what that takes, and trained on evenly
            spaced samples instead of the chosen ones.
    """

    loss: Tensor
    indices: Tensor  # [k]
    scores: Scores | None
    selected: bool = True
    weights: Tensor | None = None  # [k]
    trial: bool = False


class SelectiveStep:
    """A training step that scores a batch, chooses part of it and trains on that part.

    Calling it runs three phases, which can also be called one by one: `score`, a forward of the
    whole batch without gradients, skipped where the selector needs no scores; `choose`; and
    `train`, the plain step on the chosen samples: ``optimizer.zero_grad(set_to_none=True)``,
    forward, `criterion`, backward, ``optimizer.step()``.

    **It stops choosing while choosing does not pay.** A `CostAwareSwitch` measures what selective
    and plain steps cost and what the choice is worth, and runs the plain step on the whole batch
    where that is the better use of time; ``step.switch.decisions`` tells when and why. Give
    ``switch="select"`` to choose always. Selectors that need no scores cost nothing and are never
    switched off.

    `train` runs the model in whatever mode the caller put it. Scoring runs it in eval mode, so that
    batch normalisation counts no sample twice and dropout adds no noise to the ranking, and then
    puts every module back into the mode it was in, also when the forward fails. Until `train`
    starts, the step changes nothing: no weight, no gradient, no buffer of an eval-mode model, no
    optimizer state.

    A sample whose scores are not finite is chosen only when fewer than k others are left, and is
    counted in ``step.selector.excluded``.

    Args:
        model: Called as ``model(inputs)`` for a tensor, ``model(*inputs)`` for a tuple or list and
            ``model(**inputs)`` for a dict. May be wrapped in DistributedDataParallel.
        criterion: The loss, called as ``criterion(output, target)``; see
            `fastsel.scores.per_sample_scores` for what can be scored. It trains unchanged, so it
            has to average over the batch, whose size the choice changes; should it give more than
            one value, their mean is trained on. Where a selector gives weights, the mean of the
            samples' weighted losses is.
        optimizer: Any `torch.optim.Optimizer` whose ``step`` needs no closure.
        selector: A `Selector`, or the name of one in `SELECTORS`.
        rate: The share of the batch to train on, in (0, 1]; with the name of a selector only, and
            needed there.
        switch: ``"auto"``, or a `CostAwareSwitch` of your own: choose while it pays; ``"select"``:
            always; ``"plain"``: never.
        autocast_dtype: Runs both forwards and the criterion under `torch.autocast` with this dtype,
            ``float16`` or ``bfloat16``; None leaves autocast as the caller has it.
        scoring_dtype: The same for the scoring forward alone.
        scoring_mode: ``"eval"``, or ``"train"`` to score with each module in the mode it is in:
            dropout then draws and batch normalisation counts the batch once more.
        scoring_model: A model to score with instead, such as a smaller one.
        scoring_every: Score every n-th step only. Between, the choice goes by `memory`, or at
            random where there is none. By default every step is scored without a memory and none
            with one.
        memory: Losses of the data set's samples from when they were last trained on, in place of a
            scoring forward. Samples that are due for a visit are chosen first. Needs `ids`.
        reference: Reference losses, for selectors that need them.
        grad_norms: For selectors that need gradient norms: ``"bound"`` takes those at the model's
            output, which bound the others and cost next to nothing; ``"exact"`` takes each sample's
            true norm by `fastsel.GradNorms`, with a backward of the whole batch.
        accumulation_steps: Optimizer steps come after this many calls, with the mean of their
            gradients; see `flush` for the last ones.
        across_ranks: Under torch.distributed, choose from the batches of all ranks together instead
            of the same number from each. Ranks then train on different numbers of samples, and the
            host waits for that number.
        process_group: The ranks; by default all of them.
        scaler: Scales the loss for float16 training.
        backward: Called with the loss instead of ``loss.backward()``, such as
            ``accelerator.backward``.

    Attributes:
        model: As given, and so are `criterion`, `optimizer`, `scaler`, `autocast_dtype`.
        selection: The `BatchSelection` behind it.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is not one of those above, or the arguments do not fit together.

    Example:
        >>> model = torch.nn.Linear(8, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = SelectiveStep(model, torch.nn.CrossEntropyLoss(), optimizer, "big_loss", 0.25,
        ...                      switch="select")
        >>> result = step(torch.randn(32, 8), torch.randint(0, 3, (32,)))
        >>> result.indices.shape
        torch.Size([8])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        selector: Selector | str = "big_loss",
        rate: float | None = None,
        *,
        switch: CostAwareSwitch | str = "auto",
        autocast_dtype: torch.dtype | None = None,
        scoring_dtype: torch.dtype | None = None,
        scoring_mode: str = "eval",
        scoring_model: nn.Module | None = None,
        scoring_every: int | None = None,
        memory: LossMemory | None = None,
        reference: ReferenceModel | ReferenceLosses | None = None,
        grad_norms: str = "bound",
        accumulation_steps: int = 1,
        across_ranks: bool = False,
        process_group: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        backward: Callable[[Tensor], Any] | None = None,
    ) -> None:
        """Makes a step."""
        self.selection = BatchSelection(
            model, criterion, selector, rate, switch=switch, autocast_dtype=autocast_dtype,
            scoring_dtype=scoring_dtype, scoring_mode=scoring_mode, scoring_model=scoring_model,
            scoring_every=scoring_every, memory=memory, reference=reference, grad_norms=grad_norms,
            across_ranks=across_ranks, process_group=process_group, owner="SelectiveStep",
        )  # fmt: skip
        is_count = isinstance(accumulation_steps, int) and not isinstance(accumulation_steps, bool)
        if not is_count or accumulation_steps < 1:
            raise ValueError(
                "SelectiveStep: accumulation_steps must be an int of at least 1, "
                f"got {accumulation_steps}"
            )
        check_averages("SelectiveStep", criterion, weighed=self.selector.gives_weights)
        if scaler is not None and backward is not None:
            raise ValueError("SelectiveStep: scaler and backward must not both be given")
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.autocast_dtype = autocast_dtype
        self.accumulation_steps = self.selection.cycle = accumulation_steps
        self.scaler = scaler
        self._accumulation = GradientAccumulation(
            model, optimizer, accumulation_steps,
            scaler=scaler, backward=backward, process_group=process_group,
        )  # fmt: skip
        self._loss: Callable[..., tuple[Tensor, Any]] = self._forward_and_loss

    @property
    def selector(self) -> Selector:
        """What chooses."""
        return self.selection.selector

    @property
    def switch(self) -> CostAwareSwitch:
        """What decides whether choosing pays."""
        return self.selection.switch

    def __call__(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
    ) -> StepResult:
        """Scores, chooses and trains; or trains on the whole batch while choosing does not pay.

        Args:
            inputs: A tensor, or a tuple, list or dict of tensors, all with the same first dimension
                B of at least 1.
            target: The targets of the same B samples.
            ids: The samples' positions in the data set ``[B]``, int64; needed for a loss memory and
                for reference losses that come from a table.

        Returns:
            The `StepResult`.

        Raises:
            TypeError: `inputs`, `target` or `ids` is not of tensors.
            ValueError: The first dimensions differ, the batch is empty, `ids` is missing, or the
                criterion cannot be scored.
        """
        batch_size = self.selection.check(inputs, target, ids)
        plan = self.selection.plan()
        if not plan.select:
            return self._plain(plan, inputs, target, ids)
        selection, device = self.selection, target.device
        watch = selection.start(plan, device)
        scores = selection.score(inputs, target, ids, plan=plan)
        share = selection.choose(scores, batch_size, device=device, plan=plan)
        loss = self._train(inputs, target, share, ids)
        measured = None
        if watch is not None:
            watch.mark("step")
            measured = selection.share_of(scores, share) if plan.measure else None
            watch.mark("measure")
        selection.finish(plan, watch, share=measured, timed=not selection.scores_were_extended)
        return StepResult(
            loss, share.choice.indices, scores, True, share.choice.weights, plan.trial
        )

    def score(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
    ) -> Scores | None:
        """Scores the batch with one forward, or gives None if the selector needs no scores.

        With a loss memory, the recalled losses: NaN where a sample is due for a visit.
        """
        self.selection.check(inputs, target, ids)
        return self.selection.score(inputs, target, ids)

    def choose(
        self, scores: Scores | None, batch_size: int, *, device: torch.device | None = None
    ) -> Tensor:
        """Chooses the samples to train on.

        Args:
            scores: What `score` gave.
            batch_size: B, which a selector without scores goes by.
            device: Where the indices are wanted; by default where the selector makes them.

        Returns:
            Indices ``[k]``, int64.

        Raises:
            ValueError: The scores are of another batch size, or lack what the selector needs; or
                the selector gives weights, or ranks choose together: only calling the step weighs
                the losses as that asks for.
        """
        if self.selection.across_ranks:
            raise ValueError(
                "SelectiveStep: choose must be without across_ranks, which weighs each rank's "
                "loss; call the step itself instead of its phases"
            )
        choice = self.selection.choose(scores, batch_size, device=device).choice
        if choice.weights is not None:
            raise ValueError(
                f"SelectiveStep: the selector {self.selector.name!r} gives weights here; call the "
                "step itself instead of its phases"
            )
        return choice.indices

    def train(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        indices: Tensor,  # [k]
        ids: Tensor | None = None,  # [B]
    ) -> Tensor:
        """Takes one optimizer step on the samples at `indices`; gives its loss, detached."""
        self.selection.check(inputs, target, ids)
        if indices.numel() == 0:
            raise ValueError("SelectiveStep: indices must name at least one sample, got none")
        loss = self._train(inputs, target, Share(Choice(indices), 1.0), ids)
        self.selection.steps += 1
        return loss

    def flush(self) -> bool:
        """Takes the optimizer step for the calls since the last one, as at the end of an epoch.

        Their gradients are divided by `accumulation_steps` all the same.

        Returns:
            Whether there was anything to take a step for.
        """
        return self._accumulation.flush()

    def compile(self, **options: Any) -> None:
        """Compiles the step's two forwards, the scores and the loss with `torch.compile`.

        Choosing is one operator already, and the optimizer's step is the optimizer's to compile.

        Args:
            options: Those of `torch.compile`, such as ``fullgraph=True`` or ``dynamic=True``.
        """
        self.selection.compile(**options)
        self._loss = torch.compile(self._forward_and_loss, **options)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly as this step would, between two optimizer steps.

        Model, optimizer, scaler, reference and torch's random state are the caller's to save; so
        are gradients, should it be saved while some accumulate.
        """
        return {**self.selection.state_dict(), "accumulated": self._accumulation.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: It is not a step's state, or that of another selector; nothing has changed.
        """
        missing = sorted({"accumulated", *BatchSelection.STATE} - state.keys())
        if missing:
            raise ValueError(f"SelectiveStep: state must have {', '.join(missing)}")
        self.selection.load_state_dict(state)
        self._accumulation.pending = state["accumulated"]

    def _plain(self, plan: Plan, inputs: Inputs, target: Tensor, ids: Tensor | None) -> StepResult:
        watch = self.selection.start(plan, target.device)
        share = None

        def look(output: Any) -> None:
            nonlocal share
            if not plan.measure:
                self.selection.remember(output, target, ids)
                return
            if watch is not None:
                watch.mark("step")
            share = self.selection.measure_output(output, inputs, target, ids)
            if watch is not None:
                watch.mark("measure")

        loss = self._take_step(inputs, target, look=look)
        if watch is not None:
            watch.mark("step")
        self.selection.finish(plan, watch, share=share)
        everything = torch.arange(target.shape[0], device=target.device)
        return StepResult(loss, everything, None, False)

    def _train(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        share: Share,
        ids: Tensor | None,  # [B]
    ) -> Tensor:
        indices = share.choice.indices
        chosen, chosen_target = take(inputs, indices), target.index_select(0, indices)
        if share.usable is not None:
            chosen, chosen_target = blanked((chosen, chosen_target), share.usable)

        def look(output: Any) -> None:
            if self.selection.memory is not None and ids is not None:
                chosen_ids = ids.to(indices.device, non_blocking=indices.is_cuda)
                self.selection.remember(output, chosen_target, chosen_ids.index_select(0, indices))

        weights = share.choice.weights
        return self._take_step(chosen, chosen_target, weights, share.scale, look=look)

    def _forward_and_loss(
        self,
        inputs: Inputs,  # [k, ...] each
        target: Tensor,  # [k, ...]
        weights: Tensor | None,  # [k]
    ) -> tuple[Tensor, Any]:
        with autocast(self.autocast_dtype, target.device):
            output = forward(self.model, inputs)
            if weights is None:
                loss = self.criterion(output, target)
                loss = loss.mean() if loss.dim() > 0 else loss
            else:
                loss = (per_sample_losses(self.criterion, output, target) * weights).mean()
        return loss, output

    def _take_step(
        self,
        inputs: Inputs,  # [k, ...] each
        target: Tensor,  # [k, ...]
        weights: Tensor | None = None,  # [k]
        scale: float = 1.0,
        *,
        look: Callable[[Any], None],
    ) -> Tensor:
        def run() -> Tensor:
            loss, output = self._loss(inputs, target, weights)
            look(output)  # before the backward, so that what it refuses trains nothing
            return loss

        return self._accumulation.add(run, scale)
