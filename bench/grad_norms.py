"""What the norms of all samples' gradients cost a training step, in time and memory.

Usage:
    PYTHONPATH=tests python bench/grad_norms.py [--rounds 30] [--threads 2] [--only TEXT] [--quick]

Every contender takes one step a round, the order rotating, so that whatever else the machine does,
and its drifting clock, meets all of them. A contender's figure is the median over the rounds of its
step's time over the plain step's of the same round. Norms are first checked against each other.
Memory is measured in a fresh process each: by how much the resident set grows, at its peak, within
one step that starts without gradients. Beside it, `linear_grad_norm_sq` of one nn.Linear(256, 256)
against the number of positions T, for either form and for the choice between them. Written to
bench/results/grad_norms.json and grad_norms-positions.png; --quick writes nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grad_norm_models as models
import harness
import torch

import fastsel
from fastsel.compare.dress import DRESS, logarithmic
from fastsel.data.optional import require
from fastsel.ops._linear_grad_norm import Form

WARM_UP = 3
# Peers sum in float32, some in the Gram form, which cancels.
AGREEMENT = 2e-3
WIDTH = 256
POSITIONS = tuple(2**i for i in range(3, 13))
TOKENS = 16384  # in a batch: B = TOKENS / T
FORMS: tuple[Form, ...] = ("auto", "direct", "gram")
# glibc gives freed memory back at once, so that the resident set is what is held.
TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def rotate(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of each function, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles."""
    quantiles = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "p20": quantiles[0], "p80": quantiles[-1]}


def measure(workload: str, rounds: int, threads: int) -> dict[str, Any]:
    """Times and memory of all contenders on one workload."""
    case = models.make_case(workload)
    model, inputs, _ = case
    left_out, steps = {}, {}
    for name in models.CONTENDERS:
        reason = models.refusal(name, model, len(inputs))
        if reason:
            left_out[name] = reason
        else:
            steps[name] = models.make_step(workload, name, case)
    truth = steps["fastsel, exact_grad"]()
    assert truth is not None
    for name, step in steps.items():
        for _ in range(WARM_UP):
            norms = step()
        if norms is not None and not torch.allclose(norms, truth, rtol=AGREEMENT):
            worst = float((norms / truth - 1).abs().max())
            sys.exit(f"{workload}: the norms of {name} differ by {worst:.2g}")
    seconds = rotate(dict(steps), rounds)
    del steps
    gc.collect()
    plain = seconds[models.PLAIN]
    memory = {name: peak_bytes(workload, name, threads) for name in seconds}
    rows = []
    for name, times in seconds.items():
        over = spread([one / other for one, other in zip(times, plain, strict=True)])
        over_memory = memory[name] / memory[models.PLAIN]
        rows.append(
            {
                "contender": name,
                "seconds": spread(times),
                "over_plain": over,
                "peak_bytes": memory[name],
                "memory_over_plain": over_memory,
            }
        )
        print(
            f"{workload}: {name:20} {1e3 * statistics.median(times):9.2f} ms"
            f"  {100 * over['median'] - 100:+8.1f} % ({100 * over['p20'] - 100:+.1f} to"
            f" {100 * over['p80'] - 100:+.1f})  {memory[name] / 2**20:9.1f} MiB"
            f"  {100 * over_memory - 100:+7.1f} %",
            flush=True,
        )
    for name, reason in left_out.items():
        print(f"{workload}: {name:20} left out: {reason}", flush=True)
    return {"workload": workload, "rounds": rounds, "rows": rows, "left_out": left_out}


# ---- memory ----


def peak_bytes(workload: str, contender: str, threads: int) -> int:
    """By how much one step's peak exceeds what was resident before, in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--peak", workload, contender]
    run = subprocess.run(
        command, env=os.environ | TRIMMED, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        sys.exit(f"{workload}: {contender}: the process that measures memory failed\n{run.stderr}")
    return int(run.stdout.split()[-1])


def measure_peak(workload: str, contender: str) -> int:
    """The largest of three steps, in this process."""
    step = models.make_step(workload, contender, models.make_case(workload))
    for _ in range(WARM_UP):
        step()
    peaks = []
    for _ in range(3):
        step.clear()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = resident("VmRSS")
        step()
        peaks.append(resident("VmHWM") - before)
    return max(peaks)


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        sys.exit(f"/proc/self/status has no {field}")
    return 1024 * int(match[1])


# ---- time against T ----


def against_positions(rounds: int, most: int) -> list[dict[str, Any]]:
    """`linear_grad_norm_sq` in each form, for batches of as many tokens but samples longer."""
    rows = []
    for t in (t for t in POSITIONS if t <= most):
        generator = torch.Generator().manual_seed(t)
        a, g = (torch.randn(TOKENS // t, t, WIDTH, generator=generator) for _ in range(2))

        steps: dict[str, Callable[[], Any]] = {
            form: functools.partial(fastsel.linear_grad_norm_sq, a, g, form=form) for form in FORMS
        }
        rotate(steps, 2)
        seconds = {form: spread(times) for form, times in rotate(steps, rounds).items()}
        rows.append({"positions": t, "batch": TOKENS // t, "seconds": seconds})
        shown = "  ".join(f"{form} {1e3 * seconds[form]['median']:8.2f} ms" for form in FORMS)
        print(f"T = {t:5}, B = {TOKENS // t:5}: {shown}", flush=True)
    return rows


def draw(rows: list[dict[str, Any]]) -> bytes:
    """The figure of `against_positions` as PNG bytes."""
    dress = DRESS["light"]
    canvas = require("matplotlib.figure", "drawing figures").Figure(
        figsize=(6.4, 3.9), layout="constrained"
    )
    axes = canvas.add_subplot()
    axes.set_title(
        f"Norms of nn.Linear({WIDTH}, {WIDTH}), {TOKENS:,} tokens", loc="left", fontsize=11,
        weight="bold", color=dress["ink"],
    )  # fmt: skip
    for form, color, width, dashes, label in (
        ("direct", "#d55e00", 1.6, "--", "direct form"),
        ("gram", "#0072b2", 1.6, ":", "Gram form"),
        ("auto", "#000000", 2.2, "-", "the choice"),
    ):
        times = [1e3 * row["seconds"][form]["median"] for row in rows]
        axes.plot([row["positions"] for row in rows], times, color=color, linewidth=width,
                  linestyle=dashes, label=label)  # fmt: skip
    axes.set_xscale("log", base=2)
    logarithmic(axes)
    axes.set_xticks([row["positions"] for row in rows], [str(row["positions"]) for row in rows])
    axes.set_xlabel("positions T of a sample")
    axes.set_ylabel("ms")
    axes.grid(color=dress["faint"], linewidth=0.7)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def main() -> None:
    """Measures and writes what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="workloads whose name has this text")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    parser.add_argument("--output", type=Path, help="where to write instead of bench/results")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # BackPACK's hooks, where no input needs a gradient.
    warnings.filterwarnings("ignore", message="Full backward hook")
    if arguments.peak:
        print(measure_peak(*arguments.peak))
        return
    missing = [
        peer.PACKAGE
        for peer in models.BY_NAME.values()
        if importlib.util.find_spec(peer.PACKAGE) is None
    ]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}: "
            "python -m pip install --no-deps -r bench/requirements.txt"
        )
    origin = harness.provenance() | {"command": shlex.join(["python", *sys.argv])}
    rounds = 5 if arguments.quick else arguments.rounds
    workloads = [
        measure(workload, rounds, arguments.threads)
        for workload in models.WORKLOADS
        if arguments.only in workload
    ]
    positions = against_positions(3 if arguments.quick else 10, 512 if arguments.quick else 4096)
    if arguments.quick and arguments.output is None:
        return
    folder = arguments.output or harness.RESULTS
    path = folder / "grad_norms.json"
    results = {**origin, "workloads": workloads, "positions": positions}
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_name("grad_norms-positions.png").write_bytes(draw(positions))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
