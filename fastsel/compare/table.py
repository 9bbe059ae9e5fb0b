"""The table of a comparison as text cells, shared by the terminal and the report."""

from __future__ import annotations

import math

from fastsel.compare.conclusion import percent, times
from fastsel.compare.intervals import Spread
from fastsel.compare.optimizers import OPTIMIZERS
from fastsel.compare.references import BUDGET_SHARE
from fastsel.compare.runner import Comparison
from fastsel.compare.strategies import BASELINE, REFERENCE, title
from fastsel.compare.summary import Row

NONE = "–"
TEXT_COLUMNS = 2


def with_spread(value: Spread | None, scale: float = 1.0, unit: str = "") -> str:
    """A mean with its standard deviation, rounded where the deviation stops telling anything.

    The deviation shows two digits if it starts with 1 or 2, else one; the mean shows as many
    places. Without a deviation the mean shows three significant digits.
    """
    if value is None:
        return NONE
    mean = value.mean * scale
    if value.std is None:
        return f"{_rounded(mean, mean, 3)}{unit}"
    std = value.std * scale
    if not std:
        return f"{_rounded(mean, mean, 3)} ± 0{unit}"
    digits = 2 if f"{std:e}"[0] in "12" else 1
    return f"{_rounded(mean, std, digits)} ± {_rounded(std, std, digits)}{unit}"


def _rounded(value: float, scale: float, digits: int) -> str:
    places = digits - 1 - math.floor(math.log10(abs(scale))) if scale else 0
    return f"{value:,.{min(6, max(0, places))}f}"


def short(value: float) -> str:
    """A count in few characters: 1,234 or 56.7k or 1.2M."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.1f}k" if value < 1e6 else f"{value / 1e6:,.2f}M"


def headers(comparison: Comparison) -> tuple[str, ...]:
    """Column headings; the first `TEXT_COLUMNS` are text, the others numbers."""
    metric = "accuracy" if comparison.data.task == "classification" else "RMSE"
    return (
        "strategy", "against uniform", "final test loss", metric, "goal reached", "steps to goal",
        "samples to goal", "seconds to goal", "time vs uniform", "step vs plain", "choosing",
    )  # fmt: skip


def cells(comparison: Comparison, row: Row) -> tuple[str, ...]:
    """The cells of a row, in the order of `headers`."""
    percent = (100, " %") if comparison.data.task == "classification" else (1, "")
    ratio = row.ratio
    return (
        title(row.strategy),
        row.verdict or NONE,
        with_spread(row.final_loss),
        with_spread(row.final_metric, *percent),
        f"{row.reached} of {row.runs}" if comparison.goals else NONE,
        short(row.steps.mean) if row.steps else NONE,
        short(row.samples.mean) if row.samples else NONE,
        with_spread(row.seconds),
        f"{times(ratio.mean)} ({times(ratio.low)}–{times(ratio.high)})" if ratio else NONE,
        f"{row.against_plain:.2f}" if row.against_plain is not None else NONE,
        f"{row.choosing.mean * 100:.0f} %" if row.choosing and row.strategy != REFERENCE else NONE,
    )


def caption(comparison: Comparison) -> str:
    """What was run, in a line or two."""
    s, data = comparison.settings, comparison.data
    chosen = max(1, round(s.rate * s.batch_size))
    return (
        f"{data.name} ({data.task}, {len(data.train_target):,} train rows, evaluated on "
        f"{s.test_rows:,} of {len(data.test_target):,} test rows), {s.model}, "
        f"{OPTIMIZERS[s.optimizer]}, lr {s.lr:g}, "
        f"{s.budget} per run, {chosen} of {s.batch_size} rows chosen per batch, "
        f"{len(s.seeds)} seed{'s' if len(s.seeds) > 1 else ''}, {s.device}, "
        f"{s.threads} thread{'s' if s.threads > 1 else ''}"
    )


def goal_line(comparison: Comparison) -> str:
    """What the goal is."""
    mean = comparison.goal_mean
    if mean is None:
        return f"No goal: {BASELINE} has no finished run and none was given."
    if comparison.goal is not None:
        return f"Goal: test loss {mean:.4g}, as given."
    return f"Goal: uniform's final test loss, seed by seed (mean {mean:.4g})."


def notes(comparison: Comparison) -> list[str]:
    """What the columns do not show: the switch, reference models, samples left out."""
    texts = []
    for row in comparison.rows:
        name = title(row.strategy)
        if row.chose:
            texts.append(
                f"{name} chose in {percent(row.chose.mean)} of its steps; the others trained on "
                "the whole batch."
            )
        if row.preparing and row.preparing.mean:
            texts.append(
                f"{name} spent {percent(row.preparing.mean)} of its training seconds on two "
                f"reference models, each of {percent(BUDGET_SHARE)} of the budget; they and "
                "their samples are counted."
            )
        if row.excluded:
            texts.append(
                f"{name} kept {row.excluded:,} samples out of its choices: their scores were not "
                "finite."
            )
    return texts


def warnings(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the table."""
    notes = []
    if len(comparison.runs) < comparison.planned:
        notes.append(f"Incomplete: {len(comparison.runs)} of {comparison.planned} runs are done.")
    if comparison.disturbed:
        single = ", or with --threads 1," if comparison.settings.threads > 1 else ""
        notes.append(
            "Other work disturbed the clock: steps that do the same work differ by more than half. "
            f"Repeat on a quiet machine{single} before you rely on the seconds."
        )
    return notes
