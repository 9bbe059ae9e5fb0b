"""torch's own consistency checks of every operator, backend and sample input."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from sample import Sample
from samples import SAMPLES

ALL_TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(backend: Backend, sample: Sample) -> None:
    args, kwargs = sample.make(device=backend.device)
    operator = getattr(backend.ops, sample.op).default
    results = torch.library.opcheck(operator, args, kwargs, test_utils=ALL_TESTS)
    assert set(results) == set(ALL_TESTS)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.op == "sample_scores"], ids=str)
def test_opcheck_with_gradient(backend: Backend, sample: Sample) -> None:
    args, kwargs = sample.make(device=backend.device, requires_grad=True)
    results = torch.library.opcheck(
        backend.ops.sample_scores.default, args, kwargs, test_utils=ALL_TESTS
    )
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_has_samples() -> None:
    # A new operator without sample inputs would escape every check above.
    schemas = torch._C._jit_get_all_schemas()
    names = {
        schema.name.removeprefix("fastsel::")
        for schema in schemas
        if schema.name.startswith("fastsel::")
    }
    assert names == {sample.op for sample in SAMPLES}
