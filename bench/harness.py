"""How benches measure: contenders on one workload in one run, medians, and bytes over time.

A bench is a pytest-benchmark test of one contender on one workload; `measure` runs it and notes
what `report.py` needs. The result of a session is one JSON file in bench/results (see
`write_results`).

On a GPU the timed function is a CUDA graph of many launches over rotating inputs, so that the host
is not measured. Where the inputs together outgrow the last-level cache, the cache is not either;
rows say so by `cold`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastsel

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
QUICK = os.environ.get("FASTSEL_BENCH_QUICK") == "1"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Twice an H200's level-two cache: inputs come around only after everything else has been through
# it.
COLD_BYTES = 100 * 2**20
GRAPH_LAUNCHES = 256
# What takes longer is measured once, after the call that warms it up.
LONG_SECONDS = 20

# Anything that pytest-benchmark's fixture is, which has no type of its own.
Benchmark = Any


def measure(
    benchmark: Benchmark,
    function: Callable[..., Any],
    inputs: Callable[[int], Sequence[Any]],
    *,
    op: str,
    workload: str,
    contender: str,
    device: str,
    bytes_moved: int,
    in_graph: bool = True,
) -> None:
    """Times ``function(*inputs(seed))``.

    Args:
        benchmark: pytest-benchmark's fixture.
        function: The contender.
        inputs: Makes its arguments from a seed.
        op: The hot path, such as ``scores``.
        workload: What is computed, such as ``4096 x 1000 float32``: contenders with the same text
        are compared.
        contender: ``fastsel`` or the peer's name.
        device: ``cpu`` or ``cuda``.
        bytes_moved: The fewest bytes that any contender must read and write.
        in_graph: On a GPU, time launches from a CUDA graph. Otherwise the host's work counts: each
            call is waited for.
    """
    benchmark.group = f"{op} {workload} {device}"
    benchmark.extra_info.update(
        op=op,
        workload=workload,
        contender=contender,
        device=device,
        bytes=bytes_moved,
        launches=1,
        cold=False,
    )
    if device == "cpu" or not in_graph:
        arguments = inputs(0)
        if device != "cpu":
            function = _waited_for(function)
        seconds = _seconds(function, arguments)  # compiles what is to be compiled
        is_long = seconds > LONG_SECONDS
        # As many rounds as fit into the time, at least 5: long ones are the least noisy.
        benchmark.pedantic(
            function,
            args=arguments,
            rounds=1 if is_long else _rounds(_seconds(function, arguments)),
            iterations=1,
            warmup_rounds=0 if is_long else 2,
        )
        return
    copies = min(GRAPH_LAUNCHES, COLD_BYTES // max(bytes_moved, 1) + 2)
    sets = [inputs(seed) for seed in range(copies)]
    for arguments in sets[:3]:
        function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(GRAPH_LAUNCHES):
            function(*sets[i % copies])

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.extra_info["launches"] = GRAPH_LAUNCHES
    benchmark.extra_info["cold"] = copies * bytes_moved >= COLD_BYTES
    benchmark.pedantic(replay, rounds=10 if QUICK else 50, iterations=1, warmup_rounds=3)


def _waited_for(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> None:
        function(*arguments)
        torch.cuda.synchronize()

    return run


def _seconds(function: Callable[..., Any], arguments: Sequence[Any]) -> float:
    start = datetime.datetime.now()
    function(*arguments)
    return (datetime.datetime.now() - start).total_seconds()


def _rounds(seconds: float) -> int:
    return int(min(max((0.3 if QUICK else 3.0) / max(seconds, 1e-6), 5), 20 if QUICK else 5000))


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and command of a run."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = match[1] if match else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cpu_kernels": fastsel._library.build_info()["cpu_kernels"],
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastsel": fastsel.__version__,
        "commit": git("rev-parse", "HEAD")
        + ("+changes" if git("status", "--porcelain", "csrc", "fastsel") else ""),
        "command": shlex.join(["python", "-m", "pytest", *sys.argv[1:]]),
    }


def summarise(times: Sequence[float], info: dict[str, Any]) -> dict[str, Any]:
    """One row: median and 20 % / 80 % quantiles in microseconds a call, and GB/s."""
    quantiles = statistics.quantiles(times, n=5) if len(times) > 1 else [times[0]] * 4
    median = statistics.median(times) / info["launches"]
    return {
        **{key: info[key] for key in ("op", "workload", "contender", "device", "cold")},
        "median_us": round(median * 1e6, 3),
        "p20_us": round(quantiles[0] / info["launches"] * 1e6, 3),
        "p80_us": round(quantiles[-1] / info["launches"] * 1e6, 3),
        "gb_per_s": round(info["bytes"] / median / 1e9, 3),
        "rounds": len(times),
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to each row how many times longer than fastsel its contender took in this very run."""
    ours = {
        (row["op"], row["workload"], row["device"]): row["median_us"]
        for row in rows
        if row["contender"] == "fastsel"
    }
    for row in rows:
        reference = ours.get((row["op"], row["workload"], row["device"]))
        row["times_fastsel"] = round(row["median_us"] / reference, 3) if reference else None


def write_results(rows: list[dict[str, Any]]) -> Path:
    """Writes a session to bench/results/<gpu or cpu>-<threads>-threads.json.

    Rows of the same file that this session did not measure again are kept.
    """
    add_ratios(rows)
    origin = provenance()
    name = re.sub(r"[^a-z0-9]+", "-", (origin["gpu"] or origin["cpu"]).lower()).strip("-")
    path = RESULTS / f"{name}-{origin['threads']}-threads.json"
    path.parent.mkdir(exist_ok=True)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    measured = {(row["op"], row["workload"], row["device"]) for row in rows}
    for run in runs:
        run["rows"] = [
            row
            for row in run["rows"]
            if (row["op"], row["workload"], row["device"]) not in measured
        ]
    runs = [run for run in runs if run["rows"]] + [{**origin, "rows": rows}]
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    return path
