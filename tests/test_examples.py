"""The examples run as they are and learn their digits; those in the adapters' docstrings run."""

from __future__ import annotations

import doctest
import runpy
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT

from fastsel.integrations import _shared, accelerate, lightning


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Precision and accumulation are kept for the whole process otherwise."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plain_loop", {"epochs": 5}),
        ("accelerate_loop", {"epochs": 5, "cpu": True}),
        ("lightning_trainer", {"epochs": 5}),
        ("huggingface_trainer", {"epochs": 3}),
    ],
)
def test_it_runs_and_learns(name: str, arguments: dict[str, Any]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    assert example["main"](**arguments) > 0.4  # of ten classes, so guessing gives 0.1


def test_every_example_is_run() -> None:
    listed = {parameters[0] for parameters in test_it_runs_and_learns.pytestmark[0].args[1]}
    assert listed == {path.stem for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("module", [_shared, accelerate, lightning], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module: types.ModuleType) -> None:
    result = doctest.testmod(module, globs={**vars(module), "torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
