"""fastsel: choose the samples a PyTorch model learns from, with the choosing almost free.

The public names, few:

- `sample_scores`, `topk`, `adaselection_`: the operators, also as ``torch.ops.fastsel.*``.
- `SelectiveStep` and the selectors in `fastsel.select`: one training step on the chosen part of a
batch.
- `fastsel.data`, `fastsel.compare`: data sets, and the comparison of strategies behind ``fastsel
compare``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsel._version import __version__

__all__ = [
    "AdaSelectionChoice",
    "SampleScores",
    "SelectiveStep",
    "TopK",
    "__version__",
    "adaselection_",
    "sample_scores",
    "topk",
]

try:
    from fastsel.ops import (
        AdaSelectionChoice,
        SampleScores,
        TopK,
        adaselection_,
        sample_scores,
        topk,
    )
    from fastsel.select import SelectiveStep
except ImportError as error:
    # The command line is imported through this package and has to start to say what is wrong;
    # everybody else hears it from the first public name they use.
    _failure = error

    if not TYPE_CHECKING:  # a type checker would take any name for a public one

        def __getattr__(name: str) -> object:
            if name in __all__:
                raise ImportError(str(_failure)) from _failure
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
