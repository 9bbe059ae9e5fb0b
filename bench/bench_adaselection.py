"""One AdaSelection decision against the same decision from torch, eager and compiled.

The peer is `peers.EagerAdaSelection`: all methods in one tensor, the state updated in place. It
does not look for samples that are not finite and leaves the chosen in no order, both of which
fastsel does. The limit: every input is read once, the scores and the chosen are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import peers
import pytest
import torch
from torch import Tensor

import fastsel

LOSS_METHODS = ["uniform", "big_loss", "small_loss"]
NAMES = [*LOSS_METHODS, "grad_norm", "adaboost", "coreset1", "coreset2", "rho_loss"]
METHODS = {
    "1 method": ["big_loss"],
    "3 methods": LOSS_METHODS,
    "5 methods": [*LOSS_METHODS, "grad_norm", "coreset2"],
    "5 methods with coreset1": [*LOSS_METHODS, "grad_norm", "coreset1"],
    "8 methods": NAMES,
}


def fastsel_decision(methods: list[str]) -> Callable[..., Any]:
    """`fastsel.adaselection_` over methods by name, called as the peer is."""
    codes = [NAMES.index(name) for name in methods]

    def decide(
        losses: Tensor,  # [B]
        grad_norms: Tensor,  # [B]
        reference_losses: Tensor,  # [B]
        method_weights: Tensor,  # [M]
        method_losses: Tensor,  # [M]
        step: Tensor,  # [1]
        k: int,
    ) -> fastsel.AdaSelectionChoice:
        return fastsel.adaselection_(
            losses,
            grad_norms,
            reference_losses,
            codes,
            method_weights,
            method_losses,
            step,
            k,
            0.5,
            0.5,
        )

    return decide


CONTENDERS: dict[str, Callable[[list[str]], Callable[..., Any]]] = {
    "fastsel": fastsel_decision,
    "torch.compile": lambda methods: torch.compile(peers.EagerAdaSelection(methods)),
    "torch eager": peers.EagerAdaSelection,
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("batch", [128, 1024, 8192, 65_536])
@pytest.mark.parametrize("device", harness.DEVICES)
def bench_adaselection(
    benchmark: harness.Benchmark, device: str, batch: int, methods: str, contender: str
) -> None:
    """A tenth of a batch of float32 losses chosen by some methods."""
    torch.compiler.reset()
    names = METHODS[methods]

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        losses, norms, old = (
            torch.rand(batch, generator=generator, device=device) for _ in range(3)
        )
        weights = torch.full((len(names),), 1 / len(names), device=device)
        step = torch.zeros(1, dtype=torch.int64, device=device)
        return losses, norms, old, weights, torch.zeros_like(weights), step, batch // 10

    read = 1 + ("grad_norm" in names) + ("rho_loss" in names)
    harness.measure(
        benchmark,
        CONTENDERS[contender](names),
        inputs,
        op="adaselection",
        workload=f"{batch // 10:,} of {batch:,}, {methods}",
        contender=contender,
        device=device,
        bytes_moved=batch * 4 * (read + 1) + batch // 10 * 8,
    )
