"""The near-neighbour experiment's figures and its page's table, each beside the paper's claim."""

from __future__ import annotations

import functools
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastsel.diagnose import Smoothness

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "papers" / "near_neighbors.json"
PAGE = ROOT / "docs" / "papers" / "near_neighbors.md"
BEGIN, END = (
    "<!-- results: written by bench/papers/near_neighbors.py -->",
    "<!-- end of results -->",
)
EARLY = 80  # iterations, of figure 4's claim
COLORS = {"NN-0": "#555555", "NN-25": "#56b4e9", "NN-50": "#0072b2", "RANDOM-25": "#e69f00",
          "RANDOM-50": "#d55e00", "plain NN-50": "#009e73"}  # fmt: skip
# What is compared in each figure: strategy, what with, up to which iteration, the paper's claim of
# the former's loss over the latter's.
CLAIMS: dict[int, list[tuple[str, str, int | None, str]]] = {
    4: [("NN-25", "NN-0", EARLY, "below"), ("NN-50", "NN-0", EARLY, "below"),
        ("plain NN-50", "NN-0", EARLY, "below")],
    6: [("NN-25", "NN-0", None, "below"), ("NN-50", "NN-0", None, "below"),
        ("plain NN-50", "NN-0", None, "below")],
    1: [("NN-25", "RANDOM-25", None, "above"), ("NN-50", "RANDOM-50", None, "above"),
        ("plain NN-50", "RANDOM-50", None, "above")],
}  # fmt: skip


def trainings(results: dict[str, Any], figure: int) -> dict[str, list[dict[str, Any]]]:
    """The runs of a figure by strategy, seeds in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        if run["job"]["figure"] == figure and "losses" in run:
            found.setdefault(run["job"]["strategy"], []).append(run)
    return found


def ratio(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], until: int | None
) -> tuple[float, float, float]:
    """The mean loss over iterations, one strategy's over another's: mean, least and most of seeds.

    Losses are of every other iteration.
    """
    last = None if until is None else until // 2 + 1
    values = [
        statistics.fmean(a["losses"][:last]) / statistics.fmean(b["losses"][:last])
        for a, b in zip(ours, theirs, strict=True)
    ]
    return statistics.fmean(values), min(values), max(values)


def verdict(low: float, high: float, claim: str) -> str:
    """Whether all seeds agree with the paper's claim, or with its contrary."""
    if low <= 1 <= high:
        return "seeds differ"
    return "agrees" if (high < 1) == (claim == "below") else "does not agree"


def tables(results: dict[str, Any]) -> str:
    """The page's tables."""
    machine = results["gpu"] or f"{results['cpu']}, two processes of one thread"
    lines = [
        f"{machine}; torch {results['torch']}, commit {results['commit'][:10]} "
        f"({results['date']}), `{results['command']}`, {results['minutes']} minutes.",
        "",
        "| figure | run | mean training loss over the other's (least to most of seeds) | "
        "the paper | |",
        "|---|---|---|---|---|",
    ]
    for figure, claims in CLAIMS.items():
        runs = trainings(results, figure)
        for ours, theirs, until, claim in claims:
            if ours not in runs or theirs not in runs:
                continue
            job = runs[ours][0]["job"]
            mean, low, high = ratio(runs[ours], runs[theirs], until)
            span = "all iterations" if until is None else f"the first {until} iterations"
            lines.append(
                f"| {figure} | {job['dataset']}, {job['model']}: {ours} over {theirs}, {span} | "
                f"{mean:.3f} ({low:.3f} to {high:.3f}) | {claim} | {verdict(low, high, claim)} |"
            )
    lines += [
        "",
        "| figure 3: data, model | neighbours' mean gradient norm over all samples', first to "
        "last | at the end (95 %) | smooth up to; neighbours at |",
        "|---|---|---|---|",
    ]
    for run in results["runs"]:
        if "suitability" not in run:
            continue
        first, last = run["suitability"][0], run["suitability"][-1]
        near = sorted(run["smoothness"]["neighbor_distances"])
        lines.append(
            f"| {run['job']['dataset']}, {run['model']} | {first['ratio']:.2f} to "
            f"{last['ratio']:.2f} | {last['ratio_low']:.2f} to {last['ratio_high']:.2f} | "
            f"{_radius(run['smoothness']):.2g}; {near[0]:.2g} to {near[-1]:.2g} |"
        )
    return "\n".join([*lines, ""])


def _radius(smooth: dict[str, Any]) -> float:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in smooth.items()}
    return Smoothness(**fields).radius


def draw(results: dict[str, Any]) -> dict[str, bytes]:
    """The figures as PNG, by name."""
    drawn = {}
    for figure in CLAIMS:
        runs = trainings(results, figure)
        if runs:
            drawn[f"figure{figure}"] = _png(functools.partial(_curves, runs=runs), 8, 3.4)
    looked = [run for run in results["runs"] if "suitability" in run]
    rows = (len(looked) + 3) // 4
    drawn["figure3"] = _png(lambda canvas: _suitability(canvas, looked), 11, 2.8 * rows)
    drawn["figure7"] = _png(lambda canvas: _smoothness(canvas, looked), 11, 2.8 * rows)
    return drawn


def _curves(canvas: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    loss, norm = canvas.subplots(1, 2)
    for strategy, seeds in runs.items():
        curves = list(zip(*(run["losses"] for run in seeds), strict=True))
        steps = [min(2 * i, seeds[0]["job"]["steps"]) for i in range(len(curves))]
        color = COLORS[strategy]
        loss.plot(steps, [statistics.fmean(c) for c in curves], color=color, label=strategy)
        loss.fill_between(steps, [min(c) for c in curves], [max(c) for c in curves], color=color,
                          alpha=0.15, linewidth=0)  # fmt: skip
        norms = [statistics.fmean(c) for c in zip(*(run["norms"] for run in seeds), strict=True)]
        window = max(len(norms) // 25, 1)
        smooth = [statistics.fmean(norms[max(0, i - window) : i + 1]) for i in range(len(norms))]
        norm.plot(range(len(norms)), smooth, color=color)
    job = next(iter(runs.values()))[0]["job"]
    loss.set(xlabel="iteration", ylabel="training loss", title=f"{job['dataset']}, {job['model']}")
    norm.set(xlabel="iteration", ylabel="mean gradient norm of the batch")
    loss.legend(frameon=False, fontsize=8)


def _suitability(canvas: Any, looked: list[dict[str, Any]]) -> None:
    for i, run in enumerate(looked):
        axes = canvas.add_subplot((len(looked) + 3) // 4, 4, i + 1)
        steps = run["steps"]
        axes.plot(steps, [s["mean_norm"] for s in run["suitability"]], color="#555555", label="all")
        axes.plot(steps, [s["neighbor_norm"] for s in run["suitability"]], color="#0072b2",
                  label="neighbours of the largest")  # fmt: skip
        axes.set(title=f"{run['job']['dataset']}, {run['model']}", xlabel="iteration")
        if i == 0:
            axes.set_ylabel("mean gradient norm")
            axes.legend(frameon=False, fontsize=8)


def _smoothness(canvas: Any, looked: list[dict[str, Any]]) -> None:
    for i, run in enumerate(looked):
        axes = canvas.add_subplot((len(looked) + 3) // 4, 4, i + 1)
        smooth = run["smoothness"]
        axes.plot(smooth["distances"], smooth["norms"], color="#0072b2", label="synthetic")
        axes.scatter(smooth["neighbor_distances"], smooth["neighbor_norms"], s=8, color="#d55e00",
                     label="neighbours")  # fmt: skip
        axes.set(title=f"{run['job']['dataset']}, {run['model']}", xlabel="distance")
        if i == 0:
            axes.set_ylabel("gradient norm")
            axes.legend(frameon=False, fontsize=8)


def _png(make: Callable[[Any], None], width: float, height: float) -> bytes:
    canvas = Figure(figsize=(width, height), layout="constrained")
    make(canvas)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def write(path: Path, *, page: bool) -> None:
    """Writes the figures beside the results, and the tables into the page or onto the screen."""
    results = json.loads(path.read_text())
    for name, image in draw(results).items():
        path.with_name(f"{path.stem}-{name}.png").write_bytes(image)
    text = tables(results)
    if not page:
        print(text)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
