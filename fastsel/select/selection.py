"""Scoring a batch and choosing from it: all of a selective step but the training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from fastsel.scores import Scores, per_sample_scores
from fastsel.select import ranks
from fastsel.select.batch import Inputs, check_batch, check_ids
from fastsel.select.clock import Stopwatch
from fastsel.select.exact_scoring import ExactScorer, check_grad_norms
from fastsel.select.memory import LossMemory, check_range, due_first, without_due
from fastsel.select.references import ReferenceLosses, ReferenceModel
from fastsel.select.registry import as_selector, make_selector
from fastsel.select.reports import Reports
from fastsel.select.scoring import Scorer, check_autocast_dtype, check_scoring
from fastsel.select.selector import Choice, Selector
from fastsel.select.switch import CostAwareSwitch, Plan, as_switch, gradient_share


class BatchSelection:
    """Scores batches, chooses from them, and decides whether choosing pays.

    What `SelectiveStep` and the adapters to training frameworks are built on; the arguments are
    those of `SelectiveStep`, and the `owner` its errors begin with. One step is

        batch_size = selection.check(inputs, target, ids)
        plan = selection.plan()
        watch = selection.start(plan, device)
        if plan.select:
            scores = selection.score(inputs, target, plan=plan)
            share = selection.choose(scores, batch_size, device=device, plan=plan)
        ...  # train on the chosen samples, or on all of them
        if watch is not None:
            watch.mark("train")
        selection.finish(plan, watch, ...)

    Attributes:
        STATE: What `state_dict` holds.
        cycle: After how many steps their costs repeat: those to an optimizer step.
    """

    STATE = frozenset({"selector", "switch", "memory", "steps"})

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any],
        selector: Selector | str,
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
        across_ranks: bool = False,
        process_group: Any = None,
        owner: str = "BatchSelection",
    ) -> None:
        """Makes a selection."""
        for name, module in (("model", model), ("scoring_model", scoring_model)):
            if not isinstance(module, nn.Module) and (name == "model" or module is not None):
                raise TypeError(
                    f"{owner}: {name} must be a torch.nn.Module, got {type(module).__name__}"
                )
        if not callable(criterion):
            raise TypeError(f"{owner}: criterion must be callable, got {type(criterion).__name__}")
        check_autocast_dtype(owner, "autocast_dtype", autocast_dtype)
        check_autocast_dtype(owner, "scoring_dtype", scoring_dtype)
        check_scoring(owner, scoring_every, scoring_mode)
        self.owner = owner
        self.criterion = criterion
        self.selector = as_selector(owner, selector, rate)
        self.switch = as_switch(owner, switch)
        check_grad_norms(owner, grad_norms, self.selector)
        self._exact = grad_norms == "exact"
        self.scorer = (ExactScorer if self._exact else Scorer)(
            model if scoring_model is None else scoring_model,
            criterion,
            autocast_dtype=scoring_dtype or autocast_dtype,
            scoring_mode=scoring_mode,
        )
        if "reference_loss" in self.selector.needs and reference is None:
            raise ValueError(
                f"{owner}: the selector {self.selector.name!r} needs a reference: a "
                "ReferenceModel or ReferenceLosses"
            )
        if memory is not None and not self.selector.needs <= {"loss", "reference_loss"}:
            raise ValueError(
                f"{owner}: a memory holds losses, but the selector "
                f"{self.selector.name!r} needs {', '.join(sorted(self.selector.needs))}"
            )
        self.memory = memory
        # What a selective step chooses by is then not what tells how good the choice is.
        self._scores_are_others = memory is not None or scoring_model is not None
        self._scoring_model = scoring_model
        self.reference = reference
        self.scoring_every = scoring_every
        self.across_ranks = across_ranks
        self.process_group = process_group
        self.cycle = 1
        self.steps = 0
        self._random = make_selector("uniform", rate=self.selector.rate)
        self._reports = Reports(self.switch, process_group)
        self._norms_known = True
        self._norms_are_free = False
        self.scores_were_extended = False

    def plan(self) -> Plan:
        """What the next step is to do: a selector that needs no scores costs nothing."""
        if not self.selector.needs:
            return Plan(select=self.switch.force != "plain", measure=False, watch=False)
        plan = self.switch.plan(self._reports.unheard)
        if self._reports.measuring:  # its share is about to be known
            return plan._replace(measure=False, watch=plan.trial)
        if plan.measure and plan.select:
            if self._scores_are_others:
                return plan._replace(select=False)
            if self.scoring_every is not None and not self._scoring_is_due():
                return plan._replace(measure=False)
        return plan

    def check(self, inputs: Inputs, target: Tensor, ids: Tensor | None) -> int:
        """The batch size B, if the batch has all that its step needs.

        Raises:
            TypeError: `inputs`, `target` or `ids` is not of tensors, or `ids` not int64.
            ValueError: They are not of one batch, or `ids` is missing where it is needed.
            IndexError: An id is outside the data set; on CUDA a device-side assertion fails later.
        """
        batch_size = check_batch(self.owner, inputs, target)
        check_ids(self.owner, ids, batch_size)
        tables = {} if self.memory is None else {"a loss memory": self.memory.size}
        if isinstance(self.reference, ReferenceLosses) and "reference_loss" in self.selector.needs:
            tables["a table of reference losses"] = len(self.reference.table)
        for what, size in tables.items():
            if ids is None:
                raise ValueError(f"{self.owner}: ids must be given where there is {what}")
            check_range(self.owner, ids, size)
        return batch_size

    def score(
        self,
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
        *,
        plan: Plan | None = None,
    ) -> Scores | None:
        """Scores the batch, or recalls its losses; None if this step chooses without scores.

        A recalled loss is NaN where a sample has never been seen or is due for another visit.
        """
        needs = self.selector.needs
        self.scores_were_extended = False
        if not needs or not self._scoring_is_due():
            if not needs or self.memory is None:
                return None
            return self._with_reference(self._recalled(ids), inputs, target, ids)
        measuring = plan is not None and plan.measure
        if measuring and self._norms_known:
            needs = needs | {"grad_norm"}
        scores = self._try_scoring(functools.partial(self.scorer, inputs, target), needs)
        if not measuring:
            self._norms_are_free = scores.grad_norm is not None
        self.scores_were_extended = measuring and self._norms_known and not self._norms_are_free
        return self._with_reference(scores, inputs, target, ids)

    def choose(
        self,
        scores: Scores | None,
        batch_size: int,
        *,
        device: torch.device | None = None,
        plan: Plan | None = None,
    ) -> ranks.Share:
        """Chooses from the batch, or from those of all ranks together.

        In a trial the choice is made, and evenly spaced samples are given instead.
        """
        selector = self.selector
        if scores is None:
            scores = Scores(batch_size=batch_size, batch_device=device)
            if selector.needs:
                selector, self._random.rate = self._random, selector.rate
        elif scores.size != batch_size:
            raise ValueError(
                f"{self.owner}: scores must be of the batch's {batch_size} samples, "
                f"got {scores.size}"
            )
        recalled = self.memory is not None and not self._scoring_is_due()
        share = self._select(selector, scores, recalled=recalled and not scores.empty)
        choice = share.choice
        if plan is not None and plan.trial:
            k = selector.count(batch_size)
            spaced = torch.arange(k, device=choice.indices.device) * batch_size // k
            share, choice = share._replace(scale=1.0, usable=None), Choice(spaced)
        if device is not None:
            weights = choice.weights
            weights = None if weights is None else weights.to(device)
            choice = Choice(choice.indices.to(device), weights)
        return share._replace(choice=choice)

    def share_of(self, scores: Scores | None, share: ranks.Share) -> Tensor | None:
        """The share of the gradient norm that the choice carries: of the batches it is from.

        Args:
            scores: Of the whole batch, from the model that is trained.
            share: What was chosen.
        """
        if scores is None:
            return None
        size = scores.loss if scores.grad_norm is None else scores.grad_norm
        if size is None:
            return None
        indices = share.choice.indices.to(size.device)
        if not self._globally:
            return gradient_share(size, indices)
        # A rank without a chosen sample has one all the same, at scale 0.
        add_up = functools.partial(ranks.sum_over_ranks, group=self.process_group)
        return gradient_share(size, indices if share.scale > 0 else indices[:0], add_up)

    def measure_output(
        self,
        output: Any,  # [B, ...]
        inputs: Inputs,  # [B, ...] each
        target: Tensor,  # [B, ...]
        ids: Tensor | None = None,  # [B]
    ) -> Tensor | None:
        """The share that a choice would have carried in a plain step, weighed by its output.

        The choice is the one that a selective step makes: by other scores where it goes by those
        of another model or by recalled ones.
        """
        needs = self.selector.needs | ({"grad_norm"} if self._norms_known else {"loss"})
        output = output.detach() if isinstance(output, Tensor) else output
        run = functools.partial(_scores_of, self.criterion, output, target)
        if self._exact:
            run = functools.partial(self.scorer, inputs, target)
        truth = self._try_scoring(run, needs)
        shares = []
        if self.memory is None or self.scoring_every is not None:
            scores = truth
            if self._scoring_model is not None:
                scores = self.scorer(inputs, target, self.selector.needs)
            scores = self._with_reference(scores, inputs, target, ids)
            shares.append(self.share_of(truth, self._select(self.selector, scores)))
        if self.memory is not None:
            scores = self._with_reference(self._recalled(ids), inputs, target, ids)
            choice = self._select(self.selector, scores, recalled=True)
            shares += [self.share_of(truth, choice)] * max(1, self._every - 1)
            if ids is not None and truth.loss is not None:
                self._store(ids, truth.loss)
        known = [share for share in shares if share is not None]
        return torch.stack(known).mean() if known else None

    def remember(
        self,
        output: Any,  # [k, ...]
        target: Tensor,  # [k, ...]
        ids: Tensor | None,  # [k]
    ) -> None:
        """Puts the losses of the samples just trained on into the memory, if there is one."""
        if self.memory is None or ids is None:
            return
        losses = _scores_of(self.criterion, output, target, {"loss"}).loss
        assert losses is not None
        self._store(ids, losses)

    def start(self, plan: Plan, device: torch.device) -> Stopwatch | None:
        """Starts timing a step; None where nobody wants to know."""
        return Stopwatch(device) if plan.watch else None

    def finish(
        self,
        plan: Plan,
        watch: Stopwatch | None,
        *,
        share: Tensor | None = None,
        timed: bool = True,
    ) -> None:
        """Ends a step; the switch hears of it once its seconds are known. See `Reports.add`."""
        self.steps += 1
        if share is not None and self._every > 1 and self.memory is None:
            # The steps that do not score choose at random.
            share = (share + (self._every - 1) * self.selector.rate) / self._every
        cycle = self._cycle(select=plan.select)
        self._reports.add(plan, watch, share=share, timed=timed, cycle=cycle)

    def compile(self, **options: Any) -> None:
        """Compiles the scoring forward; `options` are those of `torch.compile`."""
        self.scorer.compile(**options)

    def state_dict(self) -> dict[str, Any]:
        """The states of selector, switch and memory, and the number of steps."""
        return {
            "selector": self.selector.state_dict(),
            "switch": self.switch.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; on an error nothing has changed."""
        missing = sorted(self.STATE - state.keys())
        if missing:
            raise ValueError(f"{self.owner}: state must have {', '.join(missing)}")
        if (state["memory"] is None) != (self.memory is None):
            raise ValueError(
                f"{self.owner}: a loss memory must be in both, state and step, or in neither"
            )
        before = self.selector.state_dict(), self.switch.state_dict()
        try:
            self.selector.load_state_dict(state["selector"])
            self.switch.load_state_dict(state["switch"])
            if self.memory is not None:
                self.memory.load_state_dict(state["memory"])
        except Exception:
            self.selector.load_state_dict(before[0])
            self.switch.load_state_dict(before[1])
            raise
        self.steps = state["steps"]
        self._reports.clear()

    @property
    def _globally(self) -> bool:
        return self.across_ranks and ranks.world_size(self.process_group) > 1

    @property
    def _every(self) -> int:
        return 1 if self.scoring_every is None else self.scoring_every

    def _cycle(self, *, select: bool) -> int:
        return math.lcm(self.cycle, self._every) if select else self.cycle

    def _select(self, selector: Selector, scores: Scores, *, recalled: bool = False) -> ranks.Share:
        due = None
        if recalled:
            scores, due = without_due(scores)
        if self._globally:
            share = ranks.choose_globally(selector, scores, self.process_group)
        else:
            share = ranks.Share(selector.select(scores), 1.0)
        if due is None or share.choice.weights is not None:
            return share
        return share._replace(choice=Choice(due_first(due, share.choice.indices)))

    def _store(self, ids: Tensor, losses: Tensor) -> None:
        assert self.memory is not None
        if ranks.world_size(self.process_group) > 1:  # samplers deal a sample to any of them
            ids, losses = ranks.gather_rows(self.process_group, ids, losses)
        self.memory.update(ids, losses, self.steps)

    def _scoring_is_due(self) -> bool:
        if self.scoring_every is None:
            return self.memory is None
        return self.steps % self.scoring_every == 0

    def _try_scoring(
        self, run: Callable[[Collection[str]], Scores], needs: frozenset[str]
    ) -> Scores:
        try:
            return run(needs)
        except (TypeError, ValueError):
            if needs == self.selector.needs or "grad_norm" in self.selector.needs:
                raise
            scores = run(self.selector.needs | {"loss"})
            # A criterion without a gradient at the output: its losses stand in from now on.
            self._norms_known = False
            return scores

    def _with_reference(
        self, scores: Scores, inputs: Inputs, target: Tensor, ids: Tensor | None
    ) -> Scores:
        if self.reference is None or "reference_loss" not in self.selector.needs:
            return scores
        return self.reference.add_to(scores, inputs, target, ids, self.criterion)

    def _recalled(self, ids: Tensor | None) -> Scores:
        assert self.memory is not None
        if ids is None:
            raise ValueError(f"{self.owner}: ids must be given where there is a loss memory")
        loss, due = self.memory.read(ids, self.steps)  # [B], [B]
        return Scores(loss=loss.masked_fill(due, math.nan))


def _scores_of(
    criterion: Callable[..., Any],
    output: Any,  # [B, ...]
    target: Tensor,  # [B, ...]
    needs: Collection[str],
) -> Scores:
    return per_sample_scores(criterion, output, target, needs=needs)
