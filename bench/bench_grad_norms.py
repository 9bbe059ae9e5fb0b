"""What the norms of all samples' gradients add to a training step, for whole models.

One forward and one backward, the clearing of the gradients included; the plain step is the row that
the others are read against. The limit: nothing, the norms come from what the backward holds anyway.
`bench/grad_norms.py` measures the same in turns, and the memory.
"""

from __future__ import annotations

import grad_norm_models as models
import harness
import pytest


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("device", harness.DEVICES)
@pytest.mark.parametrize("contender", models.CONTENDERS)
@pytest.mark.parametrize("workload", models.WORKLOADS)
def bench_grad_norms(
    benchmark: harness.Benchmark, workload: str, contender: str, device: str
) -> None:
    """A step up to the optimizer, and the norms of its samples."""
    case = models.make_case(workload, device)
    model, inputs, target = case
    if reason := models.refusal(contender, model, len(inputs)):
        pytest.skip(reason)
    step = models.make_step(workload, contender, case)
    harness.measure(
        benchmark,
        lambda _: step(),
        lambda _: (None,),
        op="grad_norms",
        workload=workload,
        contender=contender,
        device=device,
        bytes_moved=inputs.nbytes + target.nbytes,
        in_graph=False,
    )
