"""What a comparison is asked to do, checked and completed before any work starts."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsel._version import __version__
from fastsel.compare.budget import Budget, default_budget, parse_budget
from fastsel.compare.errors import CompareError
from fastsel.compare.models import DEFAULT_LR, resolve_model
from fastsel.compare.optimizers import OPTIMIZERS
from fastsel.compare.strategies import REFERENCE, resolve_strategies
from fastsel.data import Dataset

# Raised when training, timing or the run files change meaning: older runs are then redone.
RUN_FORMAT = 2
# Beyond these a setting is a slip: a step of this size destroys any model, and the plan of all runs
# is kept in memory.
_MAX_LR = 1000.0
_MAX_COUNTS = {"seeds": 1000, "threads": 1024}


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison, complete: nothing is left to decide.

    Attributes:
        strategies: Names from `fastsel.compare.strategies`.
        seeds: One run per strategy and seed.
        model: A model of `fastsel.compare.models`.
        budget: In steps, samples or seconds.
        rate: Share of each batch that is trained on (all of it for "full").
        batch_size: Rows per batch.
        optimizer: "adam", or "sgd" with momentum 0.9.
        lr: Its learning rate, constant, the same for all strategies.
        device: "cpu" or "cuda".
        threads: torch's threads.
        evaluations: Evaluations per run, evenly spaced in the budget, beside one at the start.
        test_rows: Test rows evaluated on (a fixed random part of the test split).
    """

    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str
    budget: Budget
    rate: float
    batch_size: int
    optimizer: str
    lr: float
    device: str
    threads: int
    evaluations: int
    test_rows: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **asdict(self),
            "budget": str(self.budget),
            "strategies": list(self.strategies),
            "seeds": list(self.seeds),
        }


def complete(
    data: Dataset,
    *,
    strategies: tuple[str, ...],
    seeds: int,
    model: str,
    budget: str | Budget | None,
    rate: float,
    batch_size: int,
    optimizer: str,
    lr: float | None,
    device: str,
    threads: int | None,
    evaluations: int,
    test_rows: int,
) -> Settings:
    """Check settings and fill in the defaults; the arguments are those of `compare`.

    Raises:
        CompareError: Names the setting, what was expected and what came.
    """
    strategies = resolve_strategies(strategies, data.task)
    for name, value in (("seeds", seeds), ("batch_size", batch_size), ("evaluations", evaluations),
                        ("test_rows", test_rows), ("threads", threads)):  # fmt: skip
        if value is None:
            continue
        most = _MAX_COUNTS.get(name)
        if value < 1 or (most and value > most):
            bound = f" and at most {most}" if most else ""
            raise CompareError(f"{name} must be at least 1{bound}, got {value}")
    if not 0 < rate <= 1:
        raise CompareError(f"rate must be above 0 and at most 1, got {rate}")
    if optimizer not in OPTIMIZERS:
        raise CompareError(f"optimizer must be {' or '.join(OPTIMIZERS)}, got {optimizer!r}")
    if lr is not None and not 0 < lr <= _MAX_LR:
        raise CompareError(f"lr must be above 0 and at most {_MAX_LR:g}, got {lr}")
    if device not in ("cpu", "cuda"):
        raise CompareError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise CompareError("device cuda was asked for, but torch sees no CUDA GPU here")
    rows = len(data.train_target)
    batch_size = min(batch_size, rows)
    model = resolve_model(model, data)
    chosen = max(1, round(rate * batch_size))
    if chosen < 2 and model != "linear" and set(strategies) != {REFERENCE}:
        raise CompareError(
            f"rate {rate:g} of a batch of {batch_size} is {chosen} sample, but model {model} has "
            "batch norm, which needs two: raise rate or batch_size"
        )
    steps_per_epoch = rows // batch_size
    if budget is None:
        budget = default_budget(steps_per_epoch)
    elif isinstance(budget, str):
        budget = parse_budget(budget)
    return Settings(
        strategies=strategies,
        seeds=tuple(range(seeds)),
        model=model,
        budget=budget.in_steps(steps_per_epoch),
        rate=rate,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr if lr is not None else DEFAULT_LR[optimizer][model],
        device=device,
        threads=threads or torch.get_num_threads(),
        evaluations=evaluations,
        test_rows=min(test_rows, len(data.test_target)),
    )


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # no such file outside Linux
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """What the seconds were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": cpu_name(), "gpu": gpu, "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    return {
        "fastsel": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def identity(settings: Settings, fingerprint: str, strategy: str, seed: int) -> dict[str, Any]:
    """Everything a run's result depends on: two runs of equal identity need not be done twice.

    Args:
        settings: The comparison's settings; which other strategies and seeds run beside this
            one is left out, since it changes nothing in this run.
        fingerprint: The data's, from `Dataset.fingerprint`.
        strategy: The run's strategy.
        seed: The run's seed.
    """
    return {
        "run_format": RUN_FORMAT,
        "data": fingerprint,
        "strategy": strategy,
        "seed": seed,
        "model": settings.model,
        "budget": str(settings.budget),
        # The whole batch is trained on in the reference, whatever the rate.
        "rate": 1.0 if strategy == REFERENCE else settings.rate,
        "batch_size": settings.batch_size,
        "optimizer": settings.optimizer,
        "lr": settings.lr,
        "device": settings.device,
        "threads": settings.threads,
        "evaluations": settings.evaluations,
        "test_rows": settings.test_rows,
        **{f"{name} version": value for name, value in versions().items()},
        **machine(),
    }


def identity_hash(identity: dict[str, Any]) -> str:
    """SHA-256 of an identity in canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
