"""The experiments of the near-neighbour paper: NN-K against RANDOM-K, and what decides which wins.

Walia and Singhal, "Adaptive Learning with Dynamic Batch Creation Using Near-Neighbors", section 5:
training loss over iterations on skin with the MLP (figure 4), on HIGGS with logistic regression
(figure 6) and with the MLP (figure 1), mean gradient norms of all samples and of the neighbours of
the largest (figure 3), and gradient norms over the distance from a sample (figure 7). SUSY cannot
be had here; bike stands in for a further set of figure 3, as a regression.

Usage:
    python bench/papers/near_neighbors.py            about half an hour on two cores
    python bench/papers/near_neighbors.py --quick    under a minute, needs no data: does it run?
    python bench/papers/near_neighbors.py --full     longer and with all rows, for a GPU or a night
    python bench/papers/near_neighbors.py --report   figures and tables again, without training

Every finished run is kept in fastsel-compare/papers; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import near_neighbors_report as report
import side_by_side
import torch
from torch import Tensor, nn

import fastsel
from fastsel import data
from fastsel.compare.batches import stream_seed
from fastsel.compare.models import make_model
from fastsel.data import Dataset
from fastsel.diagnose import diagnose
from fastsel.select.exact_scoring import ExactScorer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bench, with what all benches share
import harness

LEARNING_RATE = 0.01
NEIGHBORS = 32
MONITORED = 2000  # samples whose loss is followed


@dataclass(frozen=True)
class Job:
    """One run: a training, or a diagnosis.

    Attributes:
        figure: The paper's figure it is for.
        dataset: The data set.
        model: A model of `fastsel compare`.
        strategy: ``NN-25``, ``RANDOM-25`` and so on; ``plain NN-25`` leaves the weights out;
            ``diagnosis``.
        seed: Of weights, batches and draws.
        steps: Training steps.
        batch_size: Samples of a batch.
        append: Whether neighbours are added to a whole uniform batch, as in figures 1 and 2.
        rows: At most so many training samples.
        out: The folder of finished runs.
        data_dir: As for `fastsel.data.load`.
    """

    figure: int
    dataset: str
    model: str
    strategy: str
    seed: int
    steps: int
    batch_size: int
    append: bool
    rows: int
    out: Path
    data_dir: Path | None

    @property
    def path(self) -> Path:
        """Where the finished run is kept."""
        words = (self.figure, self.dataset, self.model, self.strategy.replace(" ", "-"), self.seed,
                 self.steps, self.batch_size, self.rows)  # fmt: skip
        return self.out / ("_".join(map(str, words)) + ".json")


@functools.cache
def load(name: str, data_dir: Path | None) -> Dataset:
    """A data set."""
    return data.load(name, data_dir=data_dir)


@functools.lru_cache(maxsize=2)
def prepared(
    dataset: str, rows: int, data_dir: Path | None
) -> tuple[Tensor, Tensor, fastsel.NeighborTable]:
    """Inputs and target of some of the training samples, and their neighbours."""
    whole = load(dataset, data_dir)
    generator = torch.Generator().manual_seed(stream_seed("paper rows", 0))
    picked = torch.randperm(len(whole.train_target), generator=generator)[:rows].sort().values
    inputs = whole.train_inputs[picked]
    table = fastsel.NeighborTable.build(inputs.flatten(1), NEIGHBORS)
    return inputs, whole.train_target[picked], table


def train(job: Job, tell: side_by_side.Tell) -> dict[str, Any]:
    """Trains on batches of a strategy; the loss of some samples and the batches' gradient norms."""
    whole = load(job.dataset, job.data_dir)
    inputs, target, table = prepared(job.dataset, job.rows, job.data_dir)
    # The same weights and the same first batch for every strategy of a seed.
    model = make_model(job.model, whole, stream_seed("weights", job.seed))
    is_classes = whole.task == "classification"
    loss_of: Any = nn.functional.cross_entropy if is_classes else nn.functional.mse_loss
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    # In eval mode and without weights, a second pass as in the paper: in train mode a batch norm
    # hands a sample part of the others' gradients, which no division by its weight undoes.
    criterion: nn.Module = nn.CrossEntropyLoss() if is_classes else nn.MSELoss()
    scorer = ExactScorer(model, criterion)
    plain, _, name = job.strategy.rpartition(" ")
    kind, _, percent = name.partition("-")
    batches = fastsel.NeighborBatches(
        table,
        job.batch_size,
        share=int(percent) / 100,
        mode="neighbors" if kind == "NN" else "random",
        append=job.append,
        seed=job.seed,
    )
    followed = slice(0, min(MONITORED, len(target)))
    losses: list[float] = []
    batch_norms: list[float] = []
    for step in range(job.steps + 1):
        if step % 2 == 0 or step == job.steps:
            losses.append(_loss(model, loss_of, inputs[followed], target[followed]))
        if step == job.steps:
            break
        batch = batches.next()
        optimizer.zero_grad(set_to_none=True)
        weights = torch.ones_like(batch.weights) if plain else batch.weights
        x, y = inputs[batch.indices], target[batch.indices]
        norms = scorer(x, y, {"grad_norm"}).grad_norm
        assert norms is not None
        (weights * loss_of(model(x), y, reduction="none")).mean().backward()
        batches.update(batch.indices, norms)
        batch_norms.append(float(norms.mean()))
        optimizer.step()
        tell(None)
    return {"losses": losses, "norms": batch_norms}


@torch.no_grad()
def _loss(model: nn.Module, loss_of: Any, inputs: Tensor, target: Tensor) -> float:
    model.eval()
    loss = float(loss_of(model(inputs), target))
    model.train()
    return loss


def work(job: Job, tell: side_by_side.Tell) -> dict[str, Any]:
    """One job, from its file where it is finished."""
    if job.path.is_file():
        found: dict[str, Any] = json.loads(job.path.read_text())
        tell((job, True))
        return found
    if job.strategy == "diagnosis":
        diagnosis = diagnose(
            load(job.dataset, job.data_dir), model=job.model, steps=job.steps, points=20,
            neighbors=NEIGHBORS, rows=job.rows, batch_size=job.batch_size, seed=job.seed,
            on_progress=lambda *_: tell(None),
        )  # fmt: skip
        result = {**asdict(diagnosis), "verdict": diagnosis.verdict}
    else:
        result = train(job, tell)
    result["job"] = {k: v for k, v in asdict(job).items() if k not in ("out", "data_dir")}
    job.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = job.path.with_suffix(".part")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(job.path)
    tell((job, False))
    return result


def jobs(mode: str, seeds: int, out: Path, data_dir: Path | None) -> list[Job]:
    """What a mode runs: the trainings of each figure, then the diagnoses."""
    if mode == "quick":
        size = {"steps": 6, "batch_size": 32, "rows": 300}
        sets = [(4, "digits", "linear", False), (1, "digits", "linear", True)]
        looked = [("digits", "linear")]
    else:
        size = {"steps": 150, "batch_size": 256, "rows": 20_000}
        if mode == "full":
            size = {"steps": 1000, "batch_size": 512, "rows": 10_000_000}
        sets = [
            (4, "skin", "mlp", False), (6, "higgs", "linear", False), (1, "higgs", "mlp", True),
        ]  # fmt: skip
        looked = [(name, model) for model in ("mlp", "linear")
                  for name in ("skin", "higgs", "covtype", "bike")]  # fmt: skip
    made = []
    for figure, dataset, model, append in sets:
        names = ["NN-25", "NN-50", "RANDOM-25", "RANDOM-50", "plain NN-50"]
        if not append:  # of a fixed batch, RANDOM is NN-0
            names = ["NN-0", "NN-25", "NN-50", "plain NN-50"]
        made += [
            Job(figure, dataset, model, name, seed, append=append, out=out, data_dir=data_dir,
                **size)
            for seed in range(seeds) for name in names
        ]  # fmt: skip
    for dataset, model in looked:
        made += [
            Job(3, dataset, model, "diagnosis", 0, append=False, out=out, data_dir=data_dir,
                **{**size, "rows": min(size["rows"], 5000)})
        ]  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small and short: does it run?")
    size.add_argument("--full", action="store_true", help="longer, with all rows")
    parser.add_argument("--report", action="store_true", help="train nothing, report again")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--data-dir", type=Path, help="as for fastsel compare")
    parser.add_argument("--out", type=Path, help="where runs are kept")
    parser.add_argument("--results", type=Path, help="the JSON file; figures go beside it")
    options = parser.parse_args(arguments)
    mode = "quick" if options.quick else "full" if options.full else "default"
    out = options.out or harness.ROOT / "fastsel-compare" / "papers" / f"near_neighbors-{mode}"
    whole = mode == "default" and options.seeds == 3
    path = options.results or (report.RESULTS if whole else out / "near_neighbors.json")
    if options.report:
        if not path.is_file():
            parser.error(f"there is no {path} to report; leave --report away to make it")
        report.write(path, page=whole and options.results is None)
        return 0
    todo = jobs(mode, options.seeds, out, options.data_dir)
    print(f"{len(todo)} runs in {options.processes} processes of one thread each; kept in {out}")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers, who start from here
    origin, start, done = harness.provenance(), time.monotonic(), 0

    def progress(message: Any) -> None:
        nonlocal done
        if message is not None:
            job, reused = message
            done += 1
            where = "finished earlier" if reused else f"{(time.monotonic() - start) / 60:.1f} min"
            print(f"[{done}/{len(todo)}] figure {job.figure}: {job.dataset} {job.model} "
                  f"{job.strategy} seed {job.seed} ({where})", flush=True)  # fmt: skip

    try:
        for name in {job.dataset for job in todo}:
            load(name, options.data_dir)  # downloads once, and fails before anything is trained
        found = side_by_side.run(work, todo, processes=options.processes, on_message=progress)
    except data.DataError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped; finished runs are kept in {out}. The same command goes on.",
              file=sys.stderr)  # fmt: skip
        return 130
    words = [
        "python",
        "bench/papers/near_neighbors.py",
        *([f"--{mode}"] if mode != "default" else []),
    ]
    results = {**origin, "command": shlex.join(words), "seeds": options.seeds,
               "minutes": round((time.monotonic() - start) / 60, 1), "runs": found}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n")
    report.write(path, page=whole and options.results is None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
