"""The experiment of AdaSelection's paper: every method, several rates, against no sampling.

Zhang et al., "AdaSelection: Accelerating Deep Learning Training through Data Subsampling", section
4: methods by the accuracy or loss they end with, averaged over rates (its tables 3 and 4); beside
that, which the paper leaves out, wall time and back-propagated samples to the same target.

Usage:
    python bench/papers/ada_selection.py            an hour on two cores; writes bench/results
    python bench/papers/ada_selection.py --quick    under a minute, needs no data: does it run?
    python bench/papers/ada_selection.py --full     ResNet-18 and longer training, for a GPU
    python bench/papers/ada_selection.py --report   tables and figures again, without training

Every finished run is kept in fastsel-compare/papers; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ada_selection_report as report
import numpy as np
import side_by_side

from fastsel import data
from fastsel.compare import CompareError, compare
from fastsel.compare.events import Event, RunFinished, RunReused
from fastsel.data.dataset import Dataset, split_dataset

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bench, with what all benches share
import harness

RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
LEARNING_RATE = 0.01  # the paper's table 2
EVALUATIONS, TEST_ROWS = 40, 2000


@dataclass(frozen=True)
class Task:
    """One task of the experiment.

    Attributes:
        model: A model of `fastsel.compare`.
        budget: What every run gets: the same number of steps for all methods.
        batch_size: Rows per batch; the paper's table 2 where it has the task.
    """

    model: str
    budget: str
    batch_size: int


@dataclass(frozen=True)
class Plan:
    """A whole experiment; `tasks` by the names of their data sets."""

    tasks: dict[str, Task]
    rates: tuple[float, ...]
    seeds: int
    out: Path
    device: str
    data_dir: Path | None

    @property
    def runs(self) -> int:
        """How many runs it has: no sampling once a task and seed, the others at every rate."""
        return len(self.tasks) * self.seeds * (1 + len(self.rates) * (len(report.METHODS) - 1))


# Sized so that all of it takes less than an hour on two cores of a server of 2023: a run of the
# images and of bike about eight seconds, one of skin four.
DEFAULT = {
    "cifar10": Task("small_cnn", "1400steps", 128),
    "mnist": Task("small_cnn", "900steps", 128),
    "skin": Task("mlp", "600steps", 128),
    "bike": Task("mlp", "1500steps", 100),
    "regression": Task("linear", "400steps", 100),
}
FULL = {
    "cifar10": Task("resnet18", "30epochs", 128),
    "mnist": Task("cnn", "10epochs", 128),
    "skin": Task("mlp", "20epochs", 128),
    "bike": Task("mlp", "50epochs", 100),
    "regression": Task("linear", "100epochs", 100),
}
QUICK = {
    "digits": Task("small_cnn", "12steps", 128),
    "regression": Task("linear", "12steps", 100),
}

Job = tuple[Plan, str, float | None]


@functools.cache
def load(name: str, data_dir: Path | None) -> Dataset:
    """A task's data set.

    "regression" is made here: a plane in ten dimensions with Gaussian noise of a fifth of its
    variance, so that the least squared error of the standardised target is a sixth.
    """
    if name != "regression":
        return data.load(name, data_dir=data_dir)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(10_000, 10)).astype(np.float32)
    slope = rng.normal(size=10)
    noise = rng.normal(size=len(inputs)) * np.linalg.norm(slope) * 0.2**0.5
    return split_dataset("regression", inputs, inputs @ slope + 3 + noise, task="regression")


def work(job: Job, tell: side_by_side.Tell) -> list[dict[str, Any]]:
    """One comparison: a task at one rate, or, without a rate, its runs without sampling."""
    plan, name, rate = job
    task = plan.tasks[name]

    def on_event(event: Event) -> None:
        if isinstance(event, RunFinished | RunReused):
            tell((name, rate, event.run, isinstance(event, RunReused)))
        else:
            tell(None)

    comparison = compare(
        load(name, plan.data_dir),
        strategies=("full",) if rate is None else tuple(report.METHODS)[1:],
        model=task.model,
        budget=task.budget,
        seeds=plan.seeds,
        rate=rate or 1.0,
        batch_size=task.batch_size,
        optimizer="sgd",
        lr=LEARNING_RATE,
        out=plan.out / name,
        device=plan.device,
        threads=1,
        evaluations=EVALUATIONS,
        test_rows=TEST_ROWS,
        on_event=on_event,
    )
    if comparison.interrupted:
        raise KeyboardInterrupt
    return [{"task": name, "rate": rate, "run": run} for run in comparison.runs]


class Progress:
    """Says how far the experiment is, on a terminal in one line that changes."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.trained = total, 0, 0
        self.start = time.monotonic()

    def __call__(self, message: Any) -> None:
        """Takes a worker's message."""
        if message is None:
            return
        name, rate, run, reused = message
        self.done += 1
        self.trained += not reused
        left = (time.monotonic() - self.start) / max(1, self.trained) * (self.total - self.done)
        text = (
            f"[{self.done}/{self.total}] {name} {run.strategy} "
            f"{'' if rate is None else f'rate {rate:g} '}seed {run.seed}: "
            f"{run.final.seconds:.1f} s{' (finished earlier)' if reused else ''}; "
            f"about {left / 60:.0f} min left"
        )
        if sys.stdout.isatty():
            print(f"\r{text[:110]:<110}", end="" if self.done < self.total else "\n", flush=True)
        elif self.done % 25 == 0 or self.done == self.total:
            print(text, flush=True)


def experiment(plan: Plan, processes: int, command: str) -> dict[str, Any]:
    """Trains what is left to train and gives the results."""
    # No sampling first, since all rates share it; then rate by rate, so that a slow machine or a
    # busy hour meets all tasks.
    jobs: list[Job] = [(plan, name, None) for name in plan.tasks]
    jobs += [(plan, name, rate) for rate in plan.rates for name in plan.tasks]
    print(f"{plan.runs} runs in {processes} processes of one thread each; kept in {plan.out}")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers, who start from here
    for name in plan.tasks:
        load(name, plan.data_dir)  # downloads once, and fails before anything is trained
    start = time.monotonic()
    progress = Progress(plan.runs)
    origin = harness.provenance()  # now, for this is the code that the runs load
    found = side_by_side.run(work, jobs, processes=processes, on_message=progress)
    sizes = {name: load(name, plan.data_dir) for name in plan.tasks}
    return {
        **origin,
        "command": command,
        "threads": 1,
        "processes": processes,
        "device": plan.device,
        # Runs that were finished earlier took theirs earlier.
        "minutes": round((time.monotonic() - start) / 60, 1),
        "optimizer": "SGD, momentum 0.9",
        "lr": LEARNING_RATE,
        "seeds": plan.seeds,
        "rates": list(plan.rates),
        "tasks": {
            name: {
                "model": task.model, "budget": task.budget, "batch_size": task.batch_size,
                "kind": sizes[name].task, "train_rows": len(sizes[name].train_target),
                "test_rows": min(TEST_ROWS, len(sizes[name].test_target)),
            }
            for name, task in plan.tasks.items()
        },
        **report.collect([run for runs in found for run in runs]),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small and short: does it run?")
    size.add_argument("--full", action="store_true", help="ResNet-18 and longer training")
    parser.add_argument("--report", action="store_true", help="train nothing, report again")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all")
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="RATE", help="default: 0.1 to 0.5"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 3, quick: 2")
    parser.add_argument("--processes", type=int, metavar="N", help="default: 2, on a GPU 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, full: cuda")
    parser.add_argument("--data-dir", type=Path, help="as for fastsel compare")
    parser.add_argument("--out", type=Path, help="where runs are kept")
    parser.add_argument("--results", type=Path, help="the JSON file; figures go beside it")
    options = parser.parse_args(arguments)
    mode = "quick" if options.quick else "full" if options.full else "default"
    tasks = {"quick": QUICK, "full": FULL, "default": DEFAULT}[mode]
    unknown = sorted(set(options.tasks or ()) - set(tasks))
    if unknown:
        parser.error(f"tasks must be of {', '.join(tasks)}, got {', '.join(unknown)}")
    if not all(0 < rate <= 1 for rate in options.rates or ()):
        parser.error(f"rates must be above 0 and at most 1, got {options.rates}")
    device = options.device or ("cuda" if mode == "full" else "cpu")
    plan = Plan(
        {name: task for name, task in tasks.items() if name in (options.tasks or tasks)},
        tuple(options.rates or (RATES[1::3] if mode == "quick" else RATES)),
        options.seeds or (2 if mode == "quick" else 3),
        options.out or harness.ROOT / "fastsel-compare" / "papers" / f"ada_selection-{mode}",
        device,
        options.data_dir,
    )
    # The page shows the whole experiment at its default size; anything else stays beside its runs.
    whole = mode == "default" and not (options.tasks or options.rates or options.seeds)
    path = options.results or (report.RESULTS if whole else plan.out / "ada_selection.json")
    if options.report and not path.is_file():
        parser.error(f"there is no {path} to report; leave --report away to make it")
    if not options.report:
        processes = options.processes or (1 if device == "cuda" else 2)
        try:
            results = experiment(plan, processes, _command(options))
        except (data.DataError, CompareError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(
                f"\nStopped; finished runs are kept in {plan.out}. The same command goes on.",
                file=sys.stderr,
            )
            return 130
        report.write_results(results, path)
    report.write_report(path, page=whole and options.results is None)
    return 0


def _command(options: argparse.Namespace) -> str:
    """The command as anybody may repeat it: where data and results lie changes nothing."""
    words = ["python", "bench/papers/ada_selection.py"]
    for name in ("quick", "full"):
        words += [f"--{name}"] if getattr(options, name) else []
    for name in ("tasks", "rates", "seeds", "processes", "device"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
