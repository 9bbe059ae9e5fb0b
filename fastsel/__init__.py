"""fastsel: choose the samples a PyTorch model learns from, with the choosing almost free.

The public names, few:

- `sample_scores`, `topk`: the operators, also as ``torch.ops.fastsel.*``.
- `SelectiveStep` and the selectors in `fastsel.select`: one training step on the chosen part of a
batch.
- `fastsel.data`, `fastsel.compare`: data sets, and the comparison of strategies behind ``fastsel
compare``.
"""

from __future__ import annotations

from fastsel._version import __version__
from fastsel.ops import SampleScores, TopK, sample_scores, topk
from fastsel.select import SelectiveStep

__all__ = ["SampleScores", "SelectiveStep", "TopK", "__version__", "sample_scores", "topk"]
