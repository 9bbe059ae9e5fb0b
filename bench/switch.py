"""What the cost-aware switch costs where selection loses, and keeps where it wins.

Usage:
    python bench/switch.py [--seeds 5] [--threads 2] [--quick]

Two tasks are trained plainly, always selecting, and with the switch, from the same weights on the
same batches. The three take turns of a few steps, the order rotating, so that whatever else the
machine does meets all of them. Evaluations are off the clock. On the losing task the figure is the
time of the same number of steps over plain training's. On the winning one it is the share of the
time saved that the switch keeps, over all seeds, until the test loss is the best of plain training;
the others may go on for that. Written to bench/results/switch.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import harness
import torch
from torch import Tensor, nn

from fastsel import data as datasets
from fastsel.compare.models import make_model
from fastsel.data import Dataset
from fastsel.select import SelectiveStep

ARMS = {"plain": "plain", "select": "select", "switch": "auto"}
TURN = 10
SMOOTH = 10
TEST_ROWS = 4096
# How long the others may take to plain training's best, in its time.
PATIENCE = 1.5


@dataclass(frozen=True)
class Task:
    """A task: data set, batch size, rate, steps, and whether selecting wins there."""

    data: str
    batch_size: int
    rate: float
    steps: int
    wins: bool
    selector: str = "grad_norm"
    model: str = "mlp"
    lr: float = 1e-3


# The steps on skin are two epochs.
TASKS = (
    Task("covtype", 128, 0.3, steps=1000, wins=False),
    Task("skin", 512, 0.3, steps=800, wins=True),
)


class Arm:
    """One way to train, with its clock and its curve of (seconds, test loss)."""

    def __init__(self, data: Dataset, task: Task, switch: str, seed: int) -> None:
        """Makes the same model for every arm of a seed."""
        self.data = data
        self.model = make_model(task.model, data, seed)
        self.criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=task.lr)
        self.step = SelectiveStep(
            self.model, self.criterion, optimizer, task.selector, task.rate, switch=switch
        )
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []
        self.selected = 0

    def train(self, rows: Tensor) -> None:
        """One step on these rows; the clock runs."""
        inputs, target = self.data.train_inputs[rows], self.data.train_target[rows]
        start = time.perf_counter()
        result = self.step(inputs, target)
        self.seconds += time.perf_counter() - start
        self.selected += result.selected

    @torch.no_grad()
    def evaluate(self) -> None:
        """Adds a point to the curve; the clock stands still."""
        self.model.eval()
        output = self.model(self.data.test_inputs[:TEST_ROWS])
        loss = self.criterion(output.double(), self.data.test_target[:TEST_ROWS])
        self.model.train()
        self.curve.append((self.seconds, float(loss)))

    def smoothed(self) -> list[tuple[float, float]]:
        """The curve with every loss the mean of the last few: single ones are luck."""
        losses = [loss for _, loss in self.curve]
        return [
            (seconds, statistics.mean(losses[max(0, i + 1 - SMOOTH) : i + 1]))
            for i, (seconds, _) in enumerate(self.curve)
        ]

    def time_to(self, goal: float) -> float | None:
        """Seconds until the smoothed test loss first was at the goal."""
        return next((seconds for seconds, loss in self.smoothed() if loss <= goal), None)


def run(data: Dataset, task: Task, steps: int, seed: int) -> dict[str, Any]:
    """All arms of one task and seed."""
    arms = {name: Arm(data, task, switch, seed) for name, switch in ARMS.items()}
    for switch in ARMS.values():  # threads and caches, on models thrown away
        throwaway = Arm(data, task, switch, seed)
        for _ in range(5):
            throwaway.train(torch.arange(task.batch_size))
    generator = torch.Generator().manual_seed(seed)

    def take_turn(order: list[Arm]) -> None:
        turn = [
            torch.randint(0, len(data.train_target), (task.batch_size,), generator=generator)
            for _ in range(TURN)
        ]
        for arm in order:
            for rows in turn:
                arm.train(rows)
            arm.evaluate()

    order = list(arms.values())
    for _ in range(0, steps, TURN):
        order = order[1:] + order[:1]
        take_turn(order)
    seconds = {name: arm.seconds for name, arm in arms.items()}
    goal = min(loss for _, loss in arms["plain"].smoothed())
    if task.wins:
        late = [arm for arm in arms.values() if arm.time_to(goal) is None]
        while late:
            take_turn(late)
            late = [
                arm
                for arm in late
                if arm.time_to(goal) is None and arm.seconds < PATIENCE * seconds["plain"]
            ]
    decisions = arms["switch"].step.switch.decisions
    return {
        "seed": seed,
        "seconds": seconds,
        "goal": goal,
        "seconds_to_goal": {name: arm.time_to(goal) for name, arm in arms.items()},
        "final_loss": {name: arm.curve[-1][1] for name, arm in arms.items()},
        "steps_selected": arms["switch"].selected,
        "decisions": [decision._asdict() for decision in decisions],
    }


def figure(task: Task, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figure of a task over all seeds, and the seconds that it is made of."""
    key = "seconds_to_goal" if task.wins else "seconds"
    for one in runs:
        missing = [arm for arm, seconds in one[key].items() if seconds is None]
        if missing:
            sys.exit(f"{task.data} seed {one['seed']}: {missing} did not reach the goal")
    total = {arm: sum(one[key][arm] for one in runs) for arm in ARMS}
    if not task.wins:
        value = total["switch"] / total["plain"]
        return {"figure": "time with the switch over plain training's", "value": value, **total}
    if total["select"] >= total["plain"]:
        sys.exit(f"{task.data}: selecting did not win: {total}")
    kept = (total["plain"] - total["switch"]) / (total["plain"] - total["select"])
    return {"figure": "share of the saved time that the switch keeps", "value": kept, **total}


def main() -> None:
    """Runs the tasks and writes what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    origin = harness.provenance() | {"command": shlex.join(["python", *sys.argv])}
    seeds = 1 if arguments.quick else arguments.seeds
    results = []
    for task in TASKS:
        data = datasets.load(task.data)
        runs = []
        for seed in range(seeds):
            steps = 100 if arguments.quick else task.steps
            runs.append(run(data, task, steps, seed))
            shown = {name: round(value, 2) for name, value in runs[-1]["seconds"].items()}
            print(f"{task.data} seed {seed}: seconds {shown}, to the goal "
                  f"{runs[-1]['seconds_to_goal']}, selected {runs[-1]['steps_selected']} steps",
                  flush=True)  # fmt: skip
        result = figure(task, runs)
        print(f"{task.data}: {result['figure']}: {result['value']:.3f}")
        results.append({"task": asdict(task), **result, "runs": runs})
    if not arguments.quick:
        path = harness.RESULTS / "switch.json"
        path.write_text(json.dumps({**origin, "tasks": results}, indent=1) + "\n")
        print(f"written to {path.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
