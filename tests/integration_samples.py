"""What the tests of the adapters share: data, small networks, a switch that does as it is told."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from fastsel.select.switch import Agreement, CostAwareSwitch, Plan

B, D, C = 16, 6, 3
RATE = 0.25
K = 4

SELECT = Plan(select=True, measure=False)
PLAIN = Plan(select=False, measure=False)
MEASURED_SELECT = Plan(select=True, measure=True)
MEASURED_PLAIN = Plan(select=False, measure=True)


class Observation(NamedTuple):
    """What a switch was told about a step."""

    plan: Plan
    seconds: float | None
    share: float


class ScriptedSwitch(CostAwareSwitch):
    """Plans as it is told, the last plan for good, and keeps what it hears."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        super().__init__()
        self._plans = list(plans)
        self.observed: list[Observation] = []

    def plan(self, unheard: int = 0) -> Plan:
        return self._plans.pop(0) if len(self._plans) > 1 else self._plans[0]

    def observe(
        self,
        plan: Plan,
        *,
        seconds: float | None,
        share: float = math.nan,
        probe_seconds: float = 0.0,
        cycle: int = 1,
        agree: Agreement | None = None,
    ) -> None:
        self.observed.append(Observation(plan, seconds, share))


def network(seed: int = 1) -> nn.Sequential:
    """A small classifier with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, C))


def samples(batches: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, D]`` and classes ``[N]`` that a network can learn."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batches * B, D, generator=generator)
    rule = torch.randn(D, C, generator=generator)
    return inputs, (inputs @ rule).argmax(1)


def largest_losses(logits: Tensor, target: Tensor, k: int = K) -> Tensor:
    """The k samples that ``big_loss`` has to choose, indices ascending."""
    losses = F.cross_entropy(logits.detach(), target, reduction="none")
    return losses.argsort(descending=True, stable=True)[:k].sort().values


def backward_of(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], autocast: bool = False
) -> None:
    """Leaves the gradients of the mean of the batches' mean losses."""
    model.zero_grad(set_to_none=True)
    for inputs, target in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(inputs), target) / len(batches)
        torch.autograd.backward(loss)


def sgd_steps(model: nn.Module, batches: Iterable[Any], lr: float = 0.1) -> None:
    """Textbook steps: one for each batch, or list of batches whose gradients accumulate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in batches:
        backward_of(model, batch if isinstance(batch, list) else [batch])
        optimizer.step()
    model.zero_grad(set_to_none=True)


def assert_same_weights(one: nn.Module, other: nn.Module, *, bits: bool = True) -> None:
    """Equal parameters; without `bits` up to what another order of additions changes."""
    rtol, atol = (0.0, 0.0) if bits else (1e-5, 1e-6)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.detach(), second.detach(), rtol=rtol, atol=atol)


def run_ranks(script: str, *arguments: object, ranks: int = 2) -> None:
    """Runs a script of this folder as that many processes of one torch.distributed job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = Path(__file__).resolve().parent
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)]),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / script), *map(str, arguments)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output}"


def leave_job() -> None:
    """Ends one process of a distributed test, once it has found nothing wrong.

    At an ordinary exit torch 2.13 aborts now and then, once its gloo threads have run.
    """
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
