"""`compare`: all runs of a comparison, resumed where they were left, and what comes out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastsel.compare.budget import Budget
from fastsel.compare.conclusion import conclude
from fastsel.compare.errors import CompareError
from fastsel.compare.events import (
    Listener,
    RunFinished,
    RunProgress,
    RunReused,
    RunStarted,
    Started,
)
from fastsel.compare.run import Run
from fastsel.compare.settings import Settings, complete, identity, machine, versions
from fastsel.compare.store import Store, write_json
from fastsel.compare.strategies import DEFAULT_STRATEGIES
from fastsel.compare.summary import Row, disturbed, goals_by_seed, summarise
from fastsel.compare.training import Training, train_run
from fastsel.data import Dataset

DEFAULT_OUT = Path("fastsel-compare")
SCHEMA = 2
_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        data: The data set.
        fingerprint: Its identity.
        settings: The settings, complete.
        runs: Finished and diverged runs.
        rows: The table.
        goal: The goal that was given, or None for uniform's final test loss, seed by seed.
        conclusion: Which strategy pays here, in plain words.
        interrupted: Whether it was stopped before all runs were done.
        out: The output folder.
    """

    data: Dataset
    fingerprint: str
    settings: Settings
    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    goal: float | None
    conclusion: str
    interrupted: bool
    out: Path

    @property
    def goals(self) -> dict[int, float]:
        """The test loss to reach, seed by seed."""
        return goals_by_seed(self.runs, self.goal)

    @property
    def goal_mean(self) -> float | None:
        """The mean goal over seeds, or None without one."""
        return sum(self.goals.values()) / len(self.goals) if self.goals else None

    @property
    def planned(self) -> int:
        """Runs a complete comparison has."""
        return len(self.settings.strategies) * len(self.settings.seeds)

    @property
    def disturbed(self) -> bool:
        """Whether other work on the machine clearly took time from some runs."""
        return disturbed(self.runs)

    def to_json(self) -> dict[str, Any]:
        """The content of results.json; the schema is in docs/compare.md."""
        data = self.data
        return {
            "format": "fastsel-compare",
            "schema": SCHEMA,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "complete": len(self.runs) == self.planned,
            "machine": machine(),
            "versions": versions(),
            "settings": self.settings.to_json(),
            "data": {
                "name": data.name,
                "task": data.task,
                "train_rows": len(data.train_target),
                "test_rows": len(data.test_target),
                "input_shape": list(data.train_inputs.shape[1:]),
                "classes": list(data.classes),
                "features": list(data.features),
                "note": data.note,
                "fingerprint": self.fingerprint,
            },
            "goal": {
                "test_loss": {str(seed): goal for seed, goal in self.goals.items()},
                "mean": self.goal_mean,
                "source": "uniform's final test loss" if self.goal is None else "given",
            },
            "strategies": [asdict(row) for row in self.rows],
            "conclusion": self.conclusion,
            "disturbed": self.disturbed,
            "runs": [run.to_json() for run in self.runs],
        }


def compare(
    data: Dataset,
    *,
    strategies: Sequence[str] = DEFAULT_STRATEGIES,
    model: str = "auto",
    budget: str | Budget | None = None,
    seeds: int = 3,
    rate: float = 0.3,
    batch_size: int = 128,
    optimizer: str = "adam",
    lr: float | None = None,
    goal: float | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    evaluations: int = 20,
    test_rows: int = 4096,
    checkpoint_seconds: float = 30.0,
    on_event: Listener = lambda event: None,
) -> Comparison:
    """Train with every strategy under equal conditions and say which one pays.

    Within a seed all strategies start from the same weights, see the same batches in the same
    order and get the same budget; the learning rate is constant and the same for all. Runs go
    seed by seed through the strategies, so that slow changes of the machine meet all of them.
    Every finished run is saved at once; a rerun in the same folder takes over the runs whose
    settings, data, versions and machine are the same and trains the others beside those of other
    settings, which stay. Ctrl-C keeps what is finished: the result is then marked as interrupted.

    Args:
        data: From `fastsel.data.load`.
        strategies: "full", the plain step on the whole batch; names of selectors; mixtures such as
            "adaselection:big_loss+small_loss"; "auto", AdaSelection while choosing pays; "all",
            every one of these that fits the task.
        model: "linear", "mlp", "cnn", "small_cnn", "resnet18", or "auto": cnn for images, mlp for
            tables.
        budget: Such as "2000steps", "5epochs", "100000samples" (back-propagated) or "30s" (of
            training); by default 20 epochs, at least 200 and at most 600 steps.
        seeds: Number of seeds.
        rate: Share of each batch that is trained on.
        batch_size: Rows per batch.
        optimizer: "adam", or "sgd" with momentum 0.9.
        lr: Learning rate; by default 0.01 for linear and for SGD, else 0.001.
        goal: Test loss to reach; by default, seed by seed, uniform's final test loss.
        out: Output folder, by default fastsel-compare/<name>; results.json, which tells of the
            latest call, and runs/, which keeps the runs of all, go there.
        device: "cpu" or "cuda".
        threads: torch's threads while it runs; by default as they are.
        evaluations: Evaluations per run, evenly spaced in the budget.
        test_rows: Test rows evaluated on at most (the same random ones everywhere).
        checkpoint_seconds: A run that takes longer is checkpointed this often.
        on_event: Called with the events of `fastsel.compare.events`.

    Returns:
        The comparison; results.json holds the same.

    Raises:
        CompareError: A setting is wrong, or the folder cannot be written.

    Example:
        >>> from fastsel import data
        >>> result = compare(data.load("digits"), seeds=2, budget="50steps")  # doctest: +SKIP
        >>> print(result.conclusion)  # doctest: +SKIP
    """
    settings = complete(
        data, strategies=tuple(strategies), seeds=seeds, model=model, budget=budget, rate=rate,
        batch_size=batch_size, optimizer=optimizer, lr=lr, device=device, threads=threads,
        evaluations=evaluations, test_rows=test_rows,
    )  # fmt: skip
    if goal is not None and not 0 < goal < math.inf:
        raise CompareError(f"goal must be a finite test loss above 0, got {goal}")
    store = Store(Path(out) if out is not None else DEFAULT_OUT / data.name)
    store.prepare()
    fingerprint = data.fingerprint()
    on_event(Started(data, settings, len(settings.strategies) * len(settings.seeds)))
    plan = [
        identity(settings, fingerprint, strategy, seed)
        for seed in settings.seeds
        for strategy in settings.strategies
    ]
    runs: list[Run] = []
    interrupted = False
    with _threads(settings.threads):
        try:
            placed = _to_device(data, settings.device)
            for who in plan:
                runs.append(_one_run(placed, settings, who, store, checkpoint_seconds, on_event))
        except KeyboardInterrupt:
            interrupted = True
            # Runs further on may be there from an earlier time: they count as finished, too.
            runs += [run for who in plan[len(runs) :] if (run := store.find(who)[0])]
    rows = tuple(summarise(runs, settings.strategies, goal))
    comparison = Comparison(
        data, fingerprint, settings, tuple(runs), rows, goal, conclude(runs, rows, goal),
        interrupted, store.out,
    )  # fmt: skip
    write_json(store.out / "results.json", comparison.to_json())
    return comparison


def _one_run(
    data: Dataset,
    settings: Settings,
    who: dict[str, Any],
    store: Store,
    checkpoint_seconds: float,
    on_event: Listener,
) -> Run:
    strategy, seed = who["strategy"], who["seed"]
    found, why = store.find(who)
    if found is not None:
        on_event(RunReused(found))
        return found
    state = store.checkpoint(who)
    on_event(RunStarted(strategy, seed, why, resumed=state is not None))
    shown = saved = time.monotonic()

    def on_step(training: Training) -> None:
        nonlocal shown, saved
        now = time.monotonic()
        if now - shown >= _PROGRESS_SECONDS:
            shown = now
            on_event(
                RunProgress(strategy, seed, min(1.0, training.progress), training.steps,
                            training.curve[-1].test_loss)
            )  # fmt: skip
        if now - saved >= checkpoint_seconds and training.progress < 1 and not training.diverged:
            store.save_checkpoint(who, training.state_dict())
            saved = time.monotonic()

    run = train_run(data, settings, strategy, seed, state=state, on_step=on_step)
    store.save(run, who)
    on_event(RunFinished(run))
    return run


def _to_device(data: Dataset, device: str) -> Dataset:
    tensors = ("train_inputs", "train_target", "test_inputs", "test_target")
    return dataclasses.replace(data, **{name: getattr(data, name).to(device) for name in tensors})


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
