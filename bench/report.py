"""Turns bench/results/*.json into the README's table of results.

Usage: python bench/report.py [--check]

Rewrites what stands between the two markers in README.md; with --check it changes nothing and fails
if that is out of date.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"


def duration(microseconds: float) -> str:
    """A time in the unit that suits it."""
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1000:.3g} ms"


def table(run: dict[str, Any]) -> list[str]:
    """The rows of one session, a workload a line, its contenders side by side."""
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in run["rows"]:
        cases[row["op"], row["workload"], row["device"]][row["contender"]] = row
    lines = ["| work | fastsel | GB/s | peers: time (times fastsel's) |", "|---|---|---|---|"]
    for (op, workload, _), contenders in cases.items():
        ours = contenders.get("fastsel")
        if ours is None:  # the copy that others are read against
            for name, row in contenders.items():
                time, speed = duration(row["median_us"]), f"{row['gb_per_s']:.3g}"
                lines.append(f"| {op} {workload} ({name}) | {time} | {speed} | |")
            continue
        others = ", ".join(
            f"{name} {duration(row['median_us'])} ({row['times_fastsel']:.2g} ×)"
            for name, row in contenders.items()
            if name != "fastsel"
        )
        time = duration(ours["median_us"])
        lines.append(f"| {op} {workload} | {time} | {ours['gb_per_s']:.3g} | {others} |")
    return lines


def report() -> str:
    """The Markdown of every session in bench/results."""
    parts = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        for run in json.loads(path.read_text())["runs"]:
            machine = run["gpu"] or f"{run['cpu']}, {run['threads']} threads, {run['cpu_kernels']}"
            versions = f"torch {run['torch']}, NumPy {run['numpy']}, commit {run['commit'][:10]}"
            parts += [f"{machine}; {versions} ({run['date']}); medians:", "", *table(run), ""]
    return "\n".join(parts)


def main(check: bool) -> None:
    """Rewrites or checks README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"README.md lacks the lines {BEGIN!r} and {END!r}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    updated = f"{before}{BEGIN}\n\n{report()}\n{END}{after}"
    if check and updated != text:
        sys.exit("README.md's results are out of date: run python bench/report.py")
    readme.write_text(updated)


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
