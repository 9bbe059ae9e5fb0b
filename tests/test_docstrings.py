"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import types

import pytest
import torch

import fastsel
from fastsel import ops, scores
from fastsel.select import selectors, step


@pytest.mark.parametrize("module", [ops, scores, selectors, step], ids=lambda m: m.__name__)
def test_examples(module: types.ModuleType) -> None:
    names = {**vars(module), "torch": torch, "fastsel": fastsel}
    result = doctest.testmod(module, globs=names)
    assert result.attempted > 0
    assert result.failed == 0
