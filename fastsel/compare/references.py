"""Reference losses for RHO-loss, from models that have not seen the rows they judge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsel.compare.batches import BatchOrder, stream_seed
from fastsel.compare.models import make_model
from fastsel.compare.optimizers import make_optimizer
from fastsel.compare.settings import Settings
from fastsel.compare.timing import Clock
from fastsel.data import Dataset
from fastsel.scores import per_sample_scores

# Each of the two reference models gets this share of a run's budget. Little, for it is lost to the
# run; enough to tell hard rows from hopeless ones, which is all the method asks of it.
BUDGET_SHARE = 0.1
_SCORING_BATCH = 1024


def cross_fitted_losses(
    data: Dataset, settings: Settings, criterion: nn.Module, seed: int, clock: Clock
) -> tuple[Tensor, int]:
    """Reference loss of every train row, from a model of the same kind that did not train on it.

    Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not
    Yet Learnt" (ICML 2022): section 3 takes the reference losses from a model trained on held-out
    data, and where none can be spared, appendix D lets two models, each trained on one half of the
    rows, judge the other half. So here: two random halves, plain steps with the settings of the
    run, `BUDGET_SHARE` of its budget each.

    Args:
        data: The data set, on the device.
        settings: The comparison's settings.
        criterion: The loss.
        seed: The run's seed.
        clock: Its phase "prepare" is under way; a budget of seconds goes by it.

    Returns:
        Losses `[N]`, and the number of samples back-propagated for them.
    """
    rows = len(data.train_target)
    generator = torch.Generator().manual_seed(stream_seed("reference halves", seed))
    halves = torch.randperm(rows, generator=generator).chunk(2)
    losses = torch.empty(rows, device=settings.device)  # [N]
    samples = 0
    for i, (own, other) in enumerate((halves, halves[::-1])):
        model = make_model(settings.model, data, stream_seed(f"reference weights {i}", seed))
        model.to(settings.device)
        samples += _train(model, data, settings, criterion, own, clock, f"reference {i} {seed}")
        losses[other.to(settings.device)] = _losses(model, data, criterion, other)
    return losses, samples


def _train(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    criterion: nn.Module,
    rows: Tensor,  # [N / 2]
    clock: Clock,
    purpose: str,
) -> int:
    """Plain steps on `rows` until the model's share of the budget is used; samples it took."""
    optimizer = make_optimizer(settings.optimizer, model, settings.lr)
    batches = BatchOrder(len(rows), min(settings.batch_size, len(rows)), stream_seed(purpose, 0))
    rows = rows.to(settings.device)
    steps, start = 0, clock.now
    while (
        settings.budget.used(
            steps=steps, samples=steps * batches.batch_size, seconds=clock.now - start
        )
        < BUDGET_SHARE * settings.budget.amount
    ):
        batch = rows[batches.next_batch().to(settings.device)]
        optimizer.zero_grad(set_to_none=True)
        output = model(data.train_inputs.index_select(0, batch))
        criterion(output, data.train_target.index_select(0, batch)).backward()
        optimizer.step()
        steps += 1
    return steps * batches.batch_size


@torch.no_grad()
def _losses(
    model: nn.Module,
    data: Dataset,
    criterion: nn.Module,
    rows: Tensor,  # [M]
) -> Tensor:  # [M]
    model.eval()
    losses = []
    for part in torch.split(rows.to(data.train_target.device), _SCORING_BATCH):
        output = model(data.train_inputs.index_select(0, part))
        target = data.train_target.index_select(0, part)
        loss = per_sample_scores(criterion, output, target).loss
        assert loss is not None
        losses.append(loss)
    return torch.cat(losses)
