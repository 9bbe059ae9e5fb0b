"""fastsel: choose the samples a PyTorch model learns from, with the choosing almost free.

The public names, few:

- `sample_scores`, `topk`, `adaselection_`: the operators, also as ``torch.ops.fastsel.*``.
- `weighted_sample`, `neighbor_sample`, `neighbor_probs`, `knn`: draws by weight, draws from
  neighbours, and the neighbours.
- `NeighborTable`, `TableRefresher`: the nearest neighbours of every sample, kept.
- `fastsel.diagnose`: whether near-neighbour batches will pay.
- `NeighborBatches`, `NeighborBatchSampler`: batches of near neighbours of large gradients.
- `linear_grad_norm_sq`, `conv_grad_norm_sq`, `embedding_grad_norm_sq`, `affine_grad_norm_sq`,
  `bias_grad_norm_sq`: the squared norm of each sample's gradient of a parameter.
- `GradNorms`: the norm of every sample's gradient, from one ordinary backward.
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
    "Draws",
    "GradNorms",
    "NeighborBatchSampler",
    "NeighborBatches",
    "NeighborTable",
    "Neighbors",
    "SampleScores",
    "SelectiveStep",
    "TableRefresher",
    "TopK",
    "__version__",
    "adaselection_",
    "affine_grad_norm_sq",
    "bias_grad_norm_sq",
    "conv_grad_norm_sq",
    "diagnose",
    "embedding_grad_norm_sq",
    "knn",
    "linear_grad_norm_sq",
    "neighbor_probs",
    "neighbor_sample",
    "register_norm_rule",
    "sample_scores",
    "topk",
    "weighted_sample",
]

try:
    from fastsel import diagnose
    from fastsel.grad_norms import GradNorms, register_norm_rule
    from fastsel.neighbors import NeighborTable, TableRefresher
    from fastsel.ops import (
        AdaSelectionChoice,
        Draws,
        Neighbors,
        SampleScores,
        TopK,
        adaselection_,
        affine_grad_norm_sq,
        bias_grad_norm_sq,
        conv_grad_norm_sq,
        embedding_grad_norm_sq,
        knn,
        linear_grad_norm_sq,
        neighbor_probs,
        neighbor_sample,
        sample_scores,
        topk,
        weighted_sample,
    )
    from fastsel.samplers import NeighborBatches, NeighborBatchSampler
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
