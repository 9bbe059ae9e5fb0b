"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import fastsel
from fastsel.scores import Scores

PARTS = (
    "fastsel.ops",
    "fastsel.grad_norms",
    "fastsel.scores",
    "fastsel.criterion",
    "fastsel.select",
)


def modules() -> list[str]:
    """The modules with examples in those parts of the package."""
    found = [name for _, name, _ in pkgutil.walk_packages(fastsel.__path__, "fastsel.")]
    found = [name for name in found if name.startswith(PARTS)]
    sources = {name: inspect.getsource(importlib.import_module(name)) for name in found}
    return [name for name, source in sources.items() if ">>> " in source]


def test_there_are_examples_everywhere() -> None:
    assert {name.split(".")[1] for name in modules()} == {part.split(".")[1] for part in PARTS}


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    names = {"Scores": Scores, **vars(module), "torch": torch, "fastsel": fastsel}
    result = doctest.testmod(module, globs=names)
    assert result.attempted > 0 or "# doctest: +SKIP" in inspect.getsource(module)
    assert result.failed == 0
