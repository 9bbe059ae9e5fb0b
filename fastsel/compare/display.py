"""What the terminal shows: live bars on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import re
import sys
from types import TracebackType
from typing import Any, Protocol

from fastsel.compare.events import (
    Event,
    RunFinished,
    RunProgress,
    RunReused,
    RunStarted,
    Started,
)
from fastsel.compare.run import Run
from fastsel.compare.runner import Comparison
from fastsel.compare.summary import DIVERGED, FASTER, SLOWER, metric_of
from fastsel.compare.table import (
    TEXT_COLUMNS,
    caption,
    cells,
    goal_line,
    headers,
    notes,
    warnings,
)
from fastsel.data.optional import require

# The live display redraws this often: more would take time from the training it shows.
_REFRESH_PER_SECOND = 4
_VERDICT_STYLES = {FASTER: "bold green", SLOWER: "red", DIVERGED: "red"}
_PLAIN_WIDTH = 160
_WIDE = 140


class Display(Protocol):
    """A context manager that takes events."""

    def __enter__(self) -> Display:
        """Start showing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop showing."""

    def __call__(self, event: Event) -> None:
        """Show an event."""


def make_display(*, quiet: bool) -> Display:
    """Bars on a terminal, lines elsewhere, nothing if quiet."""
    if quiet:
        return _Quiet()
    return _Bars() if sys.stdout.isatty() else _Lines()


def _result(run: Run) -> str:
    point = run.final
    metric = metric_of(point)
    shown = ""
    if metric is not None:
        shown = f", RMSE {metric:.4g}" if point.accuracy is None else f", accuracy {metric:.1%}"
    ending = " DIVERGED" if run.status == "diverged" else ""
    return f"test loss {point.test_loss:.4g}{shown}, {point.seconds:.1f} s{ending}"


def _start(event: RunStarted) -> str:
    how = "resumed from its checkpoint" if event.resumed else f"trained anew: {event.why}"
    return f"{event.strategy} seed {event.seed} {how}"


def _intro(event: Started) -> str:
    data, s = event.data, event.settings
    strategies = _count(len(s.strategies), "strategy", "strategies")
    seeds, runs = _count(len(s.seeds), "seed", "seeds"), _count(event.runs, "run", "runs")
    return (
        f"{data.name}: {data.task}, {len(data.train_target):,} train and "
        f"{len(data.test_target):,} test rows. {strategies} x {seeds} = {runs} of {s.budget} with "
        f"{s.model}."
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


class _Quiet:
    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        pass


class _Lines(_Quiet):
    """One line per run: for logs and pipes."""

    def __enter__(self) -> _Lines:
        self.done = self.total = 0
        return self

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.total = event.runs
            print(_intro(event), flush=True)
        elif isinstance(event, RunStarted) and (event.why or event.resumed):
            print(_start(event), flush=True)
        elif isinstance(event, RunFinished | RunReused):
            self.done += 1
            reused = " (finished earlier)" if isinstance(event, RunReused) else ""
            name = f"{event.run.strategy} seed {event.run.seed}"
            print(f"[{self.done}/{self.total}] {name}: {_result(event.run)}{reused}", flush=True)


class _Bars(_Quiet):
    """rich: a bar over all runs, a bar for the current one, a line for each that is done."""

    def __enter__(self) -> _Bars:
        progress = require("rich.progress", "the display")
        self.progress: Any = progress.Progress(
            progress.TextColumn("{task.description:<22}"),
            progress.BarColumn(bar_width=28),
            progress.TextColumn("{task.percentage:>3.0f}%"),
            progress.TextColumn("{task.fields[note]}", style="dim"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            refresh_per_second=_REFRESH_PER_SECOND,
        )
        self.progress.start()
        self.all = self.current = None
        self.done = 0.0
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        bars = self.progress
        if isinstance(event, Started):
            bars.console.print(_plain(_intro(event)))
            self.all = bars.add_task("all runs", total=event.runs, note="")
        elif isinstance(event, RunStarted):
            if event.why or event.resumed:
                bars.console.print(_plain(f"  {_start(event)}", "yellow"))
            name = f"{event.strategy} seed {event.seed}"
            self.current = bars.add_task(name, total=1.0, note="")
        elif isinstance(event, RunProgress):
            note = f"step {event.step:,}, test loss {event.test_loss:.4g}"
            bars.update(self.current, completed=event.fraction, note=note)
            bars.update(self.all, completed=self.done + event.fraction)
        else:
            self.done += 1
            bars.update(self.all, completed=self.done, note=f"{self.done:.0f} done")
            if self.current is not None:
                bars.remove_task(self.current)
                self.current = None
            reused = isinstance(event, RunReused)
            mark = "[dim]=[/dim]" if reused else "[green]✓[/green]"
            if event.run.status == "diverged":
                mark = "[red]x[/red]"
            ending = " [dim](finished earlier)[/dim]" if reused else ""
            name = f"{event.run.strategy} seed {event.run.seed}"
            bars.console.print(f"{mark} {name:<20} {_result(event.run)}{ending}", highlight=False)


def print_result(comparison: Comparison) -> None:
    """Print the table, what to know about it, and the conclusion."""
    console_module = require("rich.console", "the table")
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    console = console_module.Console(width=width, highlight=False)
    console.print()
    console.print(_plain(caption(comparison), "dim"))
    console.print(_plain(goal_line(comparison), "dim"))
    columns = list(range(len(headers(comparison))))
    # On a narrow terminal two tables: what came out, and what it cost.
    parts = [columns] if console.width >= _WIDE else [columns[:5], columns[:1] + columns[5:]]
    for part in parts:
        console.print(_table(comparison, part))
    for note in notes(comparison):
        console.print(_plain(note, "dim"))
    for note in warnings(comparison):
        console.print(_plain(f"Note: {note}", "yellow"))
    console.print(_plain(comparison.conclusion, "bold"))


def _plain(text: str, style: str = "") -> Any:
    """Text as it is: rich would read "[bold]" or ":key:" in the name of a file as its own."""
    return require("rich.text", "the table").Text(text, style=style)


def _table(comparison: Comparison, columns: list[int]) -> Any:
    table_module = require("rich.table", "the table")
    table = table_module.Table(box=require("rich.box", "the table").SIMPLE_HEAD, padding=(0, 1))
    for i in columns:
        # Headings break into two lines before their last words; numbers never break.
        name = headers(comparison)[i]
        heading = re.sub(r" (to|vs|uniform|test|reached)\b", r"\n\1", name, count=1)
        text = i < TEXT_COLUMNS
        table.add_column(heading, justify="left" if text else "right", no_wrap=not text)
    for row in comparison.rows:
        texts = [_plain(text) for text in cells(comparison, row)]
        texts[1].style = _VERDICT_STYLES.get(row.verdict.split(" (")[0], "")
        table.add_row(*(texts[i] for i in columns))
    return table
