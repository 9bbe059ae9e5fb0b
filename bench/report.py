"""Turns bench/results into the tables of the README and of the docs.

Usage:
    python bench/report.py                       rewrite the tables
    python bench/report.py --check               fail if they are out of date
    python bench/report.py --keep RESULTS...     first keep these results.json of `fastsel compare`,
                                                 without their curves, in bench/results/compare
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

RESULTS = harness.RESULTS
README = harness.ROOT / "README.md"
STEP_PAGE = harness.ROOT / "docs" / "selective_step.md"
NORMS_PAGE = harness.ROOT / "docs" / "grad_norms.md"
SWITCH = RESULTS / "switch.json"
GRAD_NORMS = RESULTS / "grad_norms.json"
STEP = "selective_step"
LAYER = "grad_norm"
# Whole steps, and what has a page of its own.
NOT_IN_README = (STEP, "grad_norms", LAYER)


def duration(microseconds: float) -> str:
    """A time in the unit that suits it."""
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1000:.3g} ms"


def kernel_rows(run: dict[str, Any], wanted: Callable[[str], bool]) -> list[str]:
    """The table of one session of benches, a workload a line, its contenders side by side."""
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in run["rows"]:
        cases[row["op"], row["workload"], row["device"]][row["contender"]] = row
    lines = ["| work | fastsel | GB/s | peers: time (times fastsel's) |", "|---|---|---|---|"]
    for (op, workload, _), contenders in cases.items():
        if not wanted(op):
            continue
        ours = contenders.get("fastsel")
        if ours is None:  # the copy that others are read against
            for name, row in contenders.items():
                time, speed = duration(row["median_us"]), f"{row['gb_per_s']:.3g}"
                lines.append(f"| {op} {workload} ({name}) | {time} | {speed} | |")
            continue
        others = ", ".join(
            f"{name} {duration(row['median_us'])} ({row['times_fastsel']:.3g} ×)"
            for name, row in contenders.items()
            if name != "fastsel"
        )
        time = duration(ours["median_us"])
        lines.append(f"| {op} {workload} | {time} | {ours['gb_per_s']:.3g} | {others} |")
    return lines


def kernels() -> str:
    """Every session of benches, but for what stands elsewhere."""
    return sessions(lambda op: op not in NOT_IN_README)


def layers() -> str:
    """Every session of the norms of single layers."""
    return sessions(lambda op: op == LAYER)


def sessions(wanted: Callable[[str], bool]) -> str:
    """The tables of all sessions that have rows of wanted operators."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        for run in json.loads(path.read_text()).get("runs", []):
            machine = run["gpu"] or f"{run['cpu']}, {run['threads']} threads, {run['cpu_kernels']}"
            versions = f"torch {run['torch']}, NumPy {run['numpy']}, commit {run['commit'][:10]}"
            rows = kernel_rows(run, wanted)
            if len(rows) > 2:
                parts += [f"{machine}; {versions} ({run['date']}); medians:", "", *rows, ""]
    return "\n".join(parts)


def steps() -> str:
    """Where the time of a selective step goes, in percent of the plain step."""
    parts = [
        "| training step | machine | plain step | scoring | choice | gather | selective step |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        for run in json.loads(path.read_text()).get("runs", []):
            cases: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
            for row in run["rows"]:
                if row["op"] == STEP:
                    cases[row["workload"], row["device"]][row["contender"]] = row["median_us"]
            for (workload, device), times in cases.items():
                plain = times["plain step"]
                where = run["gpu"] if device == "cuda" else f"{run['threads']} threads"
                shares = [
                    f"{100 * times[part] / plain:.2g} %"
                    for part in ("scoring forward", "choice", "gather", "selective step")
                ]
                cells = [workload, where, duration(plain), *shares]
                parts.append(f"| {' | '.join(cells)} |")
    return "\n".join([*parts, ""])


def strategies() -> str:
    """Every kept comparison: seconds to the goal relative to uniform, and the conclusion."""
    kept = [json.loads(path.read_text()) for path in sorted((RESULTS / "compare").glob("*.json"))]
    names = list(dict.fromkeys(row["strategy"] for one in kept for row in one["strategies"]))
    names.remove("uniform")
    lines = [f"| data, model | {' | '.join(names)} | conclusion |", "|---" * (len(names) + 2) + "|"]
    for one in kept:
        cells = {row["strategy"]: ratio(row) for row in one["strategies"]}
        what = f"{one['data']['name']}, {one['settings']['model']}"
        times = " | ".join(cells.get(name, "") for name in names)
        lines.append(f"| {what} | {times} | {one['conclusion']} |")
    return "\n".join([*lines, ""])


def ratio(row: dict[str, Any]) -> str:
    """Seconds to the goal over uniform's, with the 95 % interval."""
    if row["ratio"] is None:
        return str(row["verdict"])
    return "{mean:.2f} ({low:.2f}–{high:.2f})".format(**row["ratio"])


def switch() -> str:
    """What the switch costs where selecting loses, and keeps where it wins."""
    results = json.loads(SWITCH.read_text())
    lines = ["| task | always plain | always selecting | switch | |", "|---|---|---|---|---|"]
    for task in results["tasks"]:
        made, runs = task["task"], task["runs"]
        what = f"{made['data']}, batch of {made['batch_size']}, {made['steps']} steps"
        goal = "to plain training's best test loss" if made["wins"] else "of them all"
        seconds = " | ".join(f"{task[arm]:.1f}" for arm in ("plain", "select", "switch"))
        share = f"{task['value']:.3f} of " + ("the saving" if made["wins"] else "plain")
        lines.append(f"| {what}: seconds {goal} | {seconds} | {share} |")
        losses = " | ".join(
            f"{statistics.fmean(run['final_loss'][arm] for run in runs):.4f}"
            for arm in ("plain", "select", "switch")
        )
        lines.append(f"| the same: test loss at the end | {losses} | |")
        if made["wins"]:
            rest = min(_kept([run for run in runs if run is not one]) for one in runs)
            lines.append(f"| the same without the seed that is best for it | | | | {rest:.3f} |")
    machine = f"{len(runs)} seeds each, {results['cpu']}, {results['threads']} threads."
    return "\n".join([*lines, "", machine, ""])


def _kept(runs: list[dict[str, Any]]) -> float:
    """The share of the seconds saved by selecting that the switch saves, too."""
    plain, select, switched = (
        sum(run["seconds_to_goal"][arm] for run in runs) for arm in ("plain", "select", "switch")
    )
    return float((plain - switched) / (plain - select))


def grad_norms() -> str:
    """What norms add to a training step, in percent of the plain step's time and peak memory."""
    if not GRAD_NORMS.exists():
        return "Not measured yet: `python bench/grad_norms.py`.\n"
    results = json.loads(GRAD_NORMS.read_text())
    names = list(
        dict.fromkeys(
            name
            for one in results["workloads"]
            for name in [row["contender"] for row in one["rows"]] + list(one["left_out"])
            if name != "plain step"
        )
    )
    lines = [f"| forward and backward | plain step | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 2) + "|")
    reasons = []
    for one in results["workloads"]:
        rows = {row["contender"]: row for row in one["rows"]}
        plain = rows["plain step"]
        time = duration(1e6 * plain["seconds"]["median"])
        times = [_over(rows.get(name), "over_plain") for name in names]
        lines.append(f"| {one['workload']} | {time} | {' | '.join(times)} |")
        memory = [_over(rows.get(name), "memory_over_plain") for name in names]
        held = f"{plain['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(f"| the same: peak memory | {held} | {' | '.join(memory)} |")
        reasons += [f"{reason} ({one['workload']})" for reason in one["left_out"].values()]
    machine = f"{results['cpu']}, {results['threads']} threads, torch {results['torch']}."
    left_out = [f"Left out: {'; '.join(reasons)}.", ""] if reasons else []
    return "\n".join([*lines, "", machine, "", *left_out])


def _over(row: dict[str, Any] | None, key: str) -> str:
    """By how much a figure is over the plain step's, with its quantiles where it has them."""
    if row is None:
        return "–"
    value = row[key]
    if not isinstance(value, dict):
        return f"{100 * value - 100:+.0f} %"
    median, low, high = (100 * value[name] - 100 for name in ("median", "p20", "p80"))
    return f"{median:+.0f} % ({low:+.0f} to {high:+.0f})"


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {
        "kernels": kernels,
        "steps": steps,
        "grad_norms": grad_norms,
        "strategies": strategies,
    },
    STEP_PAGE: {"switch": switch},
    NORMS_PAGE: {"grad_norms": grad_norms, "layers": layers},
}


def fill(page: Path) -> str:
    """A page's text with its tables as bench/results has them."""
    text = page.read_text()
    for name, table in TABLES[page].items():
        begin, end = f"<!-- {name}: written by bench/report.py -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            sys.exit(f"{page.name} lacks the lines {begin!r} and {end!r}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{table()}\n{end}{after}"
    return text


def keep(path: Path) -> None:
    """Keeps a comparison's results without its curves, with the commit they were made at."""
    results = json.loads(path.read_text())
    del results["runs"]
    results["commit"] = harness.provenance()["commit"]
    kept = RESULTS / "compare" / f"{results['data']['name']}.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Keeps results, and rewrites or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", nargs="*", type=Path, default=[], metavar="RESULTS")
    arguments = parser.parse_args()
    for path in arguments.keep:
        keep(path)
    for page in TABLES:
        updated = fill(page)
        if arguments.check and updated != page.read_text():
            sys.exit(f"{page.name}'s tables are out of date: run python bench/report.py")
        page.write_text(updated)


if __name__ == "__main__":
    main()
