"""Results, tables and figures of the AdaSelection experiment."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastsel.compare.run import Point, Run
from fastsel.data.optional import require

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "papers" / "ada_selection.json"
PAGE = ROOT / "docs" / "papers" / "ada_selection.md"
_BEGIN, _END = "<!-- tables: written by bench/papers/ada_selection.py -->", "<!-- end of tables -->"

# In the order of the paper's tables 3 and 4; its one column of AdaSelection is three here.
METHODS = {
    "full": "no sampling",
    "adaselection:big_loss+small_loss": "Ada [BL, SL]",
    "adaselection:big_loss+small_loss+uniform": "Ada [BL, SL, U]",
    "adaselection:big_loss+small_loss+uniform+grad_norm": "Ada [BL, SL, U, GN]",
    "uniform": "uniform",
    "big_loss": "big loss",
    "small_loss": "small loss",
    "adaboost": "AdaBoost",
    "grad_norm": "grad norm",
    "coreset1": "coresets 1",
    "coreset2": "coresets 2",
}
MIXTURES = tuple(name for name in METHODS if name.startswith("adaselection"))
# Parts of the way that training without sampling went: easy to come to, and nearly its best.
TARGETS = (0.8, 0.95)
_WEIGHT_RECORDS = 40

Row = dict[str, Any]


# ---- results -----------------------------------------------------------------------------------


def collect(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of all runs: a row a task, method and rate, with one entry a seed in each list.

    Args:
        runs: ``{"task", "rate", "run"}`` each, the rate None for a run without sampling.
    """
    plain = {(r["task"], r["run"].seed): r["run"] for r in runs if r["rate"] is None}
    groups: dict[tuple[str, str, float | None], list[Run]] = defaultdict(list)
    for one in runs:
        groups[one["task"], one["run"].strategy, one["rate"]].append(one["run"])
    rows, weights = [], []
    for (task, strategy, rate), group in groups.items():
        group.sort(key=lambda run: run.seed)
        reached = {
            f"{part:g}": [reach(run, target_of(plain[task, run.seed], part)) for run in group]
            for part in TARGETS
        }
        rows.append(
            {
                "task": task,
                "strategy": strategy,
                "rate": rate,
                "metric": [_if_sound(run, metric_of(run.final), 6) for run in group],
                "loss": [_if_sound(run, run.final.test_loss, 6) for run in group],
                "samples": [run.final.samples for run in group],
                "seconds": [_if_sound(run, run.final.seconds, 4) for run in group],
                "cpu_seconds": [_if_sound(run, run.cpu_seconds, 4) for run in group],
                "samples_to": {k: [r and round(r[0]) for r in v] for k, v in reached.items()},
                "seconds_to": {k: [r and round(r[1], 4) for r in v] for k, v in reached.items()},
                "excluded": [run.excluded for run in group],
            }
        )
        if strategy in MIXTURES:
            weights.append({"task": task, "strategy": strategy, "rate": rate, **_weights(group)})
    return {"rows": rows, "weights": weights}


def metric_of(point: Point) -> float:
    """Accuracy, or the test loss of a regression."""
    return point.test_loss if point.accuracy is None else point.accuracy


def target_of(plain: Run, part: float) -> float:
    """What training without sampling had reached when it had gone `part` of its way.

    The way is that from its first evaluation to its best one.
    """
    values = [metric_of(point) for point in plain.curve]
    best = max(values) if plain.final.accuracy is not None else min(values)
    return values[0] + part * (best - values[0])


def reach(run: Run, target: float) -> tuple[float, float] | None:
    """Samples and seconds to the target, interpolated between two evaluations; None if never."""
    sign = 1 if run.final.accuracy is None else -1
    before: Point | None = None
    for point in run.curve:
        if sign * metric_of(point) <= sign * target:
            if before is None:
                return point.samples, point.seconds
            gap = metric_of(before) - metric_of(point)
            part = (metric_of(before) - target) / gap
            return (
                before.samples + part * (point.samples - before.samples),
                before.seconds + part * (point.seconds - before.seconds),
            )
        before = point
    return None


def _weights(group: Sequence[Run]) -> dict[str, Any]:
    """Method weights against steps, means over seeds."""
    found = [run.method_weights for run in group if run.method_weights]
    every = max(1, math.ceil(len(found[0].steps) / _WEIGHT_RECORDS))
    places = range(0, min(len(one.steps) for one in found), every)
    return {
        "steps": [found[0].steps[i] for i in places],
        "weights": [
            [
                round(statistics.fmean(one.weights[i][m] for one in found), 4)
                for m in range(len(found[0].methods))
            ]
            for i in places
        ],
    }


def _if_sound(run: Run, value: float, digits: int) -> float | None:
    # A model of NaN has an accuracy all the same, that of guessing, and its run ended early.
    return round(value, digits) if run.status == "finished" and math.isfinite(value) else None


def write_results(results: dict[str, Any], path: Path) -> None:
    """Writes the JSON file, a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in results.items() if key not in ("rows", "weights")}
    parts = [json.dumps(head, indent=1, allow_nan=False)[:-2]]
    for key in ("rows", "weights"):
        lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in results[key])
        parts.append(f' "{key}": [\n  {lines}\n ]')
    path.write_text(",\n".join(parts) + "\n}\n")


# ---- tables ------------------------------------------------------------------------------------


class Table:
    """Results by task, method and rate; training without sampling counts at every rate."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.tasks: dict[str, Any] = results["tasks"]
        self.rates: list[float] = results["rates"]
        self._rows = {(r["task"], r["strategy"], r["rate"]): r for r in results["rows"]}

    def row(self, task: str, strategy: str, rate: float) -> Row:
        """The row of a cell."""
        found: Row = self._rows[task, strategy, None if strategy == "full" else rate]
        return found

    def higher_is_better(self, task: str) -> bool:
        """Whether the task's metric is an accuracy."""
        return bool(self.tasks[task]["kind"] == "classification")

    def ranks(self, task: str) -> dict[str, list[float]]:
        """Rank of each method at each rate, for each seed its mean over the rates."""
        seeds = self.results["seeds"]
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            totals: dict[str, float] = defaultdict(float)
            for rate in self.rates:
                values = {m: self.row(task, m, rate)["metric"][seed] for m in METHODS}
                for name, rank in rank_of(values, self.higher_is_better(task)).items():
                    totals[name] += rank / len(self.rates)
            for name, total in totals.items():
                found.setdefault(name, []).append(total)
        return found

    def averages(self, task: str, key: str = "metric") -> dict[str, list[float]]:
        """For each method and seed the mean over the rates; NaN if a run diverged."""
        return {
            method: [
                statistics.fmean(
                    math.nan if value is None else value
                    for value in (self.row(task, method, r)[key][seed] for r in self.rates)
                )
                for seed in range(self.results["seeds"])
            ]
            for method in METHODS
        }

    def to_target(
        self, task: str, method: str, key: str, part: float
    ) -> tuple[float | None, int, int]:
        """Geometric mean, over the runs that reached a target, of `key` over no sampling's.

        Returns:
            It, the number of such runs and the number of all.
        """
        logs, runs = [], 0
        for rate in self.rates if method != "full" else self.rates[:1]:
            mine, plain = (self.row(task, m, rate)[key][f"{part:g}"] for m in (method, "full"))
            runs += len(mine)
            logs += [math.log(a / b) for a, b in zip(mine, plain, strict=True) if a and b]
        return (math.exp(statistics.fmean(logs)) if logs else None), len(logs), runs


def rank_of(values: dict[str, float | None], higher_is_better: bool) -> dict[str, float]:
    """Ranks from 1, the best; equal values share the mean of theirs; None comes last."""
    sign = -1 if higher_is_better else 1
    keys = {name: math.inf if v is None else sign * v for name, v in values.items()}
    return {
        name: sum(k < key for k in keys.values()) + (sum(k == key for k in keys.values()) + 1) / 2
        for name, key in keys.items()
    }


def tables(results: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    table = Table(results)
    best = len(METHODS)
    parts = [
        [_origin(results)],
        _task_lines(table),
        [f"**Average rank over the rates** (the paper's table 3), {results['seeds']} seeds, ± "
         f"their standard deviation. 1 is best of {best}."],
        _grid(table, table.ranks, lambda task: lambda value: f"{value:.1f}", low=True),
        ["**Average accuracy or loss over the rates** (the paper's table 4): accuracy in %, or the "
         "squared error of the standardised target."],
        _grid(table, table.averages, lambda task: _metric_text(table, task)),
        ["**Wall time of a whole run** relative to no sampling, the same number of steps, mean "
         "over rates and seeds."],
        _time_lines(table),
    ]  # fmt: skip
    for part in TARGETS:
        parts += [
            ["**Back-propagated samples to the same target** relative to no sampling, "
             f"{100 * part:g} % of the way: geometric mean over the runs that came so far, and how "
             "many did."],
            _target_lines(table, "samples_to", part),
            [f"**Wall time to the same target**, {100 * part:g} % of the way, likewise."],
            _target_lines(table, "seconds_to", part),
        ]  # fmt: skip
    parts.append(
        ["The way is that of training without sampling from its first evaluation to its best, in "
         "accuracy or loss, seed by seed."]
    )  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _origin(results: dict[str, Any]) -> str:
    machine = results["gpu"] if results["device"] == "cuda" else results["cpu"]
    cpu, wall = (
        sum(seconds for row in results["rows"] for seconds in row[key] if seconds is not None)
        for key in ("cpu_seconds", "seconds")
    )
    commit, changes, _ = results["commit"].partition("+")
    return (
        f"{machine}, {results['processes']} processes of one thread side by side; torch "
        f"{results['torch']}, commit {commit[:10]}{changes and ' with changes'} "
        f"({results['date']}); `{results['command']}`. All runs together trained for "
        f"{wall / 60:.1f} minutes by the clock, {cpu / 60:.1f} minutes of it on the processor."
    )


def _task_lines(table: Table) -> list[str]:
    lines = ["| task | model | budget | batch | train rows | test rows |", "|---" * 6 + "|"]
    for name, task in table.tasks.items():
        rows = (f"{task[key]:,}" for key in ("train_rows", "test_rows"))
        cells = (name, task["model"], task["budget"], str(task["batch_size"]), *rows)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _time_lines(table: Table) -> list[str]:
    lines = _header()
    for task in table.tasks:
        seconds = {m: statistics.fmean(v) for m, v in table.averages(task, "seconds").items()}
        ratios = (seconds[method] / seconds["full"] for method in METHODS)
        cells = ("diverged" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def _target_lines(table: Table, key: str, part: float) -> list[str]:
    lines = _header()
    for task in table.tasks:
        found = (table.to_target(task, method, key, part) for method in METHODS)
        cells = (f"{_times(ratio)} ({n} of {total})" for ratio, n, total in found)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _metric_text(table: Table, task: str) -> Callable[[float], str]:
    if table.higher_is_better(task):
        return lambda value: f"{100 * value:.2f}"
    return lambda value: f"{value:.4f}"


def _header() -> list[str]:
    return [f"| task | {' | '.join(METHODS.values())} |", "|---" * (len(METHODS) + 1) + "|"]


def _grid(
    table: Table,
    values: Callable[[str], dict[str, list[float]]],
    text: Callable[[str], Callable[[float], str]],
    *,
    low: bool = False,
) -> list[str]:
    """A line a task, means ± deviations over seeds, the best in bold."""
    lines = _header()
    for task in table.tasks:
        found = values(task)
        means = {name: statistics.fmean(v) for name, v in found.items()}
        sound = [mean for mean in means.values() if math.isfinite(mean)]
        best = (min if low or not table.higher_is_better(task) else max)(sound, default=math.nan)
        shown = text(task)
        cells = []
        for name in METHODS:
            if not math.isfinite(means[name]):
                cells.append("diverged")
                continue
            spread = f" ± {shown(statistics.stdev(found[name]))}" if len(found[name]) > 1 else ""
            bold = "**" if means[name] == best else ""
            cells.append(f"{bold}{shown(means[name])}{bold}{spread}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def write_report(path: Path, *, page: bool) -> None:
    """Prints the tables of a results file and draws its figures beside it.

    Args:
        path: The file.
        page: Also put the tables into the page in docs.
    """
    figures = require("ada_selection_figures", "the figures")
    results = json.loads(path.read_text())
    text = tables(results)
    print(text)
    for name, drawn in figures.draw(Table(results)).items():
        target = path.with_name(f"{path.stem}-{name}.png")
        target.write_bytes(drawn)
        print(f"Figure: {target}")
    if page:
        before, _, rest = PAGE.read_text().partition(_BEGIN)
        _, _, after = rest.partition(_END)
        PAGE.write_text(f"{before}{_BEGIN}\n\n{text}\n{_END}{after}")
