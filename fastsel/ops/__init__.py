"""Typed front door of the native operators.

Each function here checks its arguments, so that a mistake is named in Python terms, and calls the
operator of the same name under ``torch.ops.fastsel``. Importing this package loads the native
libraries and gives their operators what ``torch.compile`` and autograd need: shape functions, and
derivatives where something is differentiable. All of them trace under
``torch.compile(fullgraph=True)``, with dynamic shapes too.
"""

from __future__ import annotations

from fastsel.ops import (
    _adaselection,
    _affine_grad_norm,
    _conv_grad_norm,
    _embedding_grad_norm,
    _knn,
    _linear_grad_norm,
    _neighbor_sample,
    _scores,
    _topk,
    _weighted_sample,
)
from fastsel.ops._adaselection import AdaSelectionChoice, adaselection_
from fastsel.ops._affine_grad_norm import affine_grad_norm_sq, bias_grad_norm_sq
from fastsel.ops._conv_grad_norm import conv_grad_norm_sq, conv_weight_grad
from fastsel.ops._embedding_grad_norm import embedding_grad_norm_sq
from fastsel.ops._knn import Neighbors, knn
from fastsel.ops._linear_grad_norm import WeightGrad, linear_grad_norm_sq, linear_weight_grad
from fastsel.ops._neighbor_sample import neighbor_probs, neighbor_sample
from fastsel.ops._scores import SampleScores, sample_scores
from fastsel.ops._topk import TopK, topk
from fastsel.ops._weighted_sample import Draws, weighted_sample

__all__ = [
    "AdaSelectionChoice",
    "Draws",
    "Neighbors",
    "SampleScores",
    "TopK",
    "WeightGrad",
    "adaselection_",
    "affine_grad_norm_sq",
    "bias_grad_norm_sq",
    "conv_grad_norm_sq",
    "conv_weight_grad",
    "embedding_grad_norm_sq",
    "knn",
    "linear_grad_norm_sq",
    "linear_weight_grad",
    "neighbor_probs",
    "neighbor_sample",
    "register",
    "sample_scores",
    "topk",
    "weighted_sample",
]

_registered: set[str] = set()


def register(namespace: str) -> None:
    """Gives the operators of a namespace their shape functions and derivatives.

    ``fastsel`` is registered on import; another build of the same operators, such as the emulated
    CUDA kernels of the test suite, is registered by whoever loads it. A second call for a namespace
    does nothing.

    Args:
        namespace: Where the operators live: ``torch.ops.<namespace>``. Its library must be loaded.

    Raises:
        RuntimeError: The namespace lacks one of the operators.
    """
    if namespace in _registered:
        return
    for module in (
        _scores,
        _topk,
        _adaselection,
        _linear_grad_norm,
        _conv_grad_norm,
        _embedding_grad_norm,
        _affine_grad_norm,
        _weighted_sample,
        _neighbor_sample,
        _knn,
    ):
        module.register(namespace)
    _registered.add(namespace)


register("fastsel")
