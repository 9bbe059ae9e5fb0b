"""`adaselection_`: the wrapper and the shape function."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsel.ops._checks import check_float_tensor, name, require

_MOST_METHODS = 16
_FIRST_STATISTIC = 8
_GRAD_NORM, _RHO_LOSS = 3, 7


class AdaSelectionChoice(NamedTuple):
    """What `adaselection_` returns.

    Attributes:
        indices: The chosen samples ``[k]``, int64, in ascending order.
        scores: What each sample scored ``[B]``; NaN where it was excluded.
    """

    indices: Tensor  # [k]
    scores: Tensor  # [B]


def adaselection_(
    losses: Tensor,  # [B]
    grad_norms: Tensor | None,  # [B]
    reference_losses: Tensor | None,  # [B]
    methods: Sequence[int],  # [M]
    method_weights: Tensor,  # [M]
    method_losses: Tensor,  # [M]
    step: Tensor,  # [1]
    k: int,
    beta: float,
    curriculum_power: float,
    standardize: bool = True,
    *,
    statistics: Tensor | None = None,  # [S, B]
    excluded: Tensor | None = None,  # [1]
) -> AdaSelectionChoice:
    """Makes the whole AdaSelection decision of one step and updates its state in place.

    Minghe Zhang et al., "AdaSelection: Accelerating Deep Learning Training through Data
    Subsampling", sections 3.1 and 3.2. The published text lost its formulas; docs/adaselection.md
    says how each is read.

    1. Every method m has a statistic s_m(i) of the samples: uniform (code 0) 0; big_loss (1) the
       loss l_i; small_loss (2) -l_i; grad_norm (3) the gradient norm; adaboost (4)
       1/2 ln((1 + x) / (1 - x)) with x = l_i / (1.0001 max |l|) (equation 1); coreset1 (5) how far
       the rank of l_i lies from the middle; coreset2 (6) -|l_i - mean l|; rho_loss (7) l_i minus
       the reference loss; 8 + j row j of `statistics`.
    2. Its sample importances are alpha_m = softmax(s_m / std(s_m)) (equation 2), its loss is
       L_m = sum of alpha_m(i) l_i.
    3. Its weight w_m is multiplied by exp(beta |L_m - L_m before| / |L_m before|), and the
       weights are normalised to sum 1 (equation 3). The first step (`step` 0) only normalises.
    4. A sample's score is exp(-l_i / (mean |l| t^curriculum_power)) * sum of w_m alpha_m(i) with
       t = `step` + 1 (equations 4 and 5); its exponent is held below 80.
    5. The k largest scores are chosen, ties to the lower index (equation 6).

    A sample is excluded if its loss, or a gradient norm, reference loss or statistic that one of
    the methods uses, is NaN or infinite. It takes no part in any of the above, has score NaN, and
    is chosen only when fewer than k others are left: then the excluded of the lowest indices are.
    Where all samples are excluded the weights, losses and step stay as they are.

    Nothing is differentiable: inputs are taken as they are, without their gradients. The result
    does not depend on the number of threads, and nothing waits for the device.

    Args:
        losses: ``[B]``, float32, float16, bfloat16, and on the CPU float64. Any stride.
        grad_norms: ``[B]`` for grad_norm; otherwise ignored.
        reference_losses: ``[B]`` for rho_loss; otherwise ignored.
        methods: The codes of 1 to 16 methods, each once.
        method_weights: State ``[M]``, float32: the methods' weights, positive.
        method_losses: State ``[M]``, float32: L_m of the step before; not looked at in the first.
        step: State, one int64: how many steps have been made.
        k: How many to choose, from 0 to B.
        beta: How strongly weights follow the losses; finite.
        curriculum_power: At least 0; infinity leaves the reward out.
        standardize: Divide each statistic by its population standard deviation over the batch.
            One whose deviation is at most 2^-22 of its largest magnitude is constant but for
            rounding, and all samples are alike to it.
        statistics: ``[S, B]`` for method codes from 8 on.
        excluded: State, one int64, to which the number of excluded samples is added.

    Per-sample inputs share one dtype, all tensors one device; state tensors are contiguous.

    Returns:
        `AdaSelectionChoice` of indices ``[k]`` and scores ``[B]``, float32 (float64 for float64
        losses).

    Raises:
        TypeError: An argument is not of the type or dtype above.
        ValueError: A shape, device, code or number does not fit. No state has changed then.

    Example:
        >>> weights, losses, step = torch.full((2,), 0.5), torch.zeros(2), torch.zeros(1).long()
        >>> batch = torch.tensor([0.1, 2.0, 0.3, 1.0])
        >>> fastsel.adaselection_(
        ...     batch, None, None, [0, 1], weights, losses, step, 2, beta=0.5, curriculum_power=0.5
        ... ).indices
        tensor([0, 2])
        >>> step, losses
        (tensor([1]), tensor([0.8500, 1.5967]))
    """
    # The operator checks everything itself. Saying it in Python terms first would cost as much as
    # the decision, so unless something looks odd, that is left to the case that it refuses.
    odd = (
        type(k) is not int
        or type(beta) is not float
        or type(curriculum_power) is not float
        or type(standardize) is not bool
        or not isinstance(methods, (list, tuple))
    )
    if odd or torch.compiler.is_compiling():
        _check(
            losses,
            grad_norms,
            reference_losses,
            methods,
            method_weights,
            method_losses,
            step,
            k,
            beta,
            curriculum_power,
            standardize,
            statistics,
            excluded,
        )
    try:
        if losses.requires_grad:
            losses = losses.detach()
        if grad_norms is not None and grad_norms.requires_grad:
            grad_norms = grad_norms.detach()
        if reference_losses is not None and reference_losses.requires_grad:
            reference_losses = reference_losses.detach()
        if statistics is not None and statistics.requires_grad:
            statistics = statistics.detach()
        if method_weights.requires_grad or method_losses.requires_grad:
            raise ValueError("adaselection_: state must not require a gradient")
        return AdaSelectionChoice(
            *_adaselection(
                losses,
                grad_norms,
                reference_losses,
                methods,
                method_weights,
                method_losses,
                step,
                k,
                beta,
                curriculum_power,
                standardize,
                statistics=statistics,
                excluded=excluded,
            )
        )
    except (AttributeError, RuntimeError, TypeError, ValueError):
        _check(
            losses,
            grad_norms,
            reference_losses,
            methods,
            method_weights,
            method_losses,
            step,
            k,
            beta,
            curriculum_power,
            standardize,
            statistics,
            excluded,
        )
        if step.device.type == "cpu" and step.item() < 0:
            raise ValueError(
                f"adaselection_: step must not be negative, got {step.item()}"
            ) from None
        raise


def register(namespace: str) -> None:
    """Gives the operator of a namespace its shape function."""
    torch.library.register_fake(f"{namespace}::adaselection_", _adaselection_fake)


def _fail(error: type[Exception], argument: str, expected: str, got: object) -> None:
    raise error(f"adaselection_: {argument} must {expected}, got {got}")


def _check(
    losses: Tensor,  # [B]
    grad_norms: Tensor | None,  # [B]
    reference_losses: Tensor | None,  # [B]
    methods: Sequence[int],  # [M]
    method_weights: Tensor,  # [M]
    method_losses: Tensor,  # [M]
    step: Tensor,  # [1]
    k: int,
    beta: float,
    curriculum_power: float,
    standardize: bool,
    statistics: Tensor | None,  # [S, B]
    excluded: Tensor | None,  # [1]
) -> None:
    """Raises what is wrong with the arguments, in the words of Python."""
    check_float_tensor("adaselection_", "losses", losses)
    if losses.dim() != 1:
        _fail(ValueError, "losses", "be [B]", f"shape {list(losses.shape)}")
    _check_methods(methods, statistics)
    _check_per_sample("grad_norms", "grad_norm (3)", grad_norms, losses, _GRAD_NORM in methods)
    _check_per_sample(
        "reference_losses", "rho_loss (7)", reference_losses, losses, _RHO_LOSS in methods
    )
    if statistics is not None and max(methods) >= _FIRST_STATISTIC:
        _check_like_losses("statistics", statistics, losses)
        if statistics.shape[1] != losses.shape[0]:
            _fail(
                ValueError,
                "statistics",
                f"be [S, B] with B = {losses.shape[0]} as in losses",
                f"shape {list(statistics.shape)}",
            )
    for argument, state in (("method_weights", method_weights), ("method_losses", method_losses)):
        _check_state(argument, state, losses, torch.float32)
        if state.dim() != 1 or state.shape[0] != len(methods):
            _fail(
                ValueError,
                argument,
                f"be [M] with M = {len(methods)} as in methods",
                f"shape {list(state.shape)}",
            )
    _check_counter("step", step, losses)
    if excluded is not None:
        _check_counter("excluded", excluded, losses)
    _check_numbers(k, losses.shape[0], beta, curriculum_power)
    if not isinstance(standardize, bool):
        _fail(TypeError, "standardize", "be a bool", type(standardize).__name__)


def _check_methods(methods: Sequence[int], statistics: Tensor | None) -> None:
    if not isinstance(methods, (list, tuple)):
        _fail(TypeError, "methods", "be a list or tuple of codes", type(methods).__name__)
    for code in methods:
        if isinstance(code, bool) or not isinstance(code, int):
            _fail(TypeError, "methods", "be int codes", type(code).__name__)
    if not 1 <= len(methods) <= _MOST_METHODS:
        _fail(ValueError, "methods", f"be 1 to {_MOST_METHODS} codes", len(methods))
    if statistics is not None:
        check_float_tensor("adaselection_", "statistics", statistics)
    rows = 0
    if max(methods) >= _FIRST_STATISTIC:
        if statistics is None:
            _fail(
                ValueError,
                "statistics",
                f"be given for method codes from {_FIRST_STATISTIC}",
                None,
            )
        assert statistics is not None
        if statistics.dim() != 2:
            _fail(ValueError, "statistics", "be [S, B]", f"shape {list(statistics.shape)}")
        rows = statistics.shape[0]
    for code in methods:
        if not 0 <= code < _FIRST_STATISTIC + rows:
            _fail(ValueError, "methods", f"be codes from 0 to {_FIRST_STATISTIC + rows - 1}", code)
    for code in methods:
        if methods.count(code) > 1:
            _fail(ValueError, "methods", "name each method once", f"{code} twice")


def _check_like_losses(argument: str, tensor: Tensor, losses: Tensor) -> None:
    if tensor.dtype != losses.dtype:
        _fail(TypeError, argument, f"be {name(losses.dtype)} as losses are", name(tensor.dtype))
    if tensor.device != losses.device:
        _fail(ValueError, argument, f"be on {losses.device} as losses are", tensor.device)


def _check_per_sample(
    argument: str,
    method: str,
    tensor: Tensor | None,  # [B]
    losses: Tensor,  # [B]
    needed: bool,
) -> None:
    if tensor is not None and not isinstance(tensor, Tensor):
        _fail(TypeError, argument, "be a tensor or None", type(tensor).__name__)
    if not needed:
        return
    if tensor is None:
        _fail(ValueError, argument, f"be given for method {method}", None)
    assert tensor is not None
    _check_like_losses(argument, tensor, losses)
    if tensor.dim() != 1 or tensor.shape[0] != losses.shape[0]:
        _fail(
            ValueError,
            argument,
            f"be [B] with B = {losses.shape[0]} as in losses",
            f"shape {list(tensor.shape)}",
        )


def _check_state(argument: str, state: Tensor, losses: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(state, Tensor):
        _fail(TypeError, argument, "be a tensor", type(state).__name__)
    if state.dtype != dtype:
        _fail(TypeError, argument, f"be {name(dtype)}", name(state.dtype))
    if state.device != losses.device:
        _fail(ValueError, argument, f"be on {losses.device} as losses are", state.device)
    if state.requires_grad:
        _fail(ValueError, argument, "not require a gradient", "requires_grad=True")
    if not state.is_contiguous():
        _fail(ValueError, argument, "be contiguous", f"strides {list(state.stride())}")


def _check_counter(argument: str, counter: Tensor, losses: Tensor) -> None:
    _check_state(argument, counter, losses, torch.int64)
    if counter.numel() != 1:
        _fail(ValueError, argument, "have one element", f"shape {list(counter.shape)}")


def _check_numbers(k: int, batch_size: int, beta: float, curriculum_power: float) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        _fail(TypeError, "k", "be an int", type(k).__name__)
    if not 0 <= k <= batch_size:
        _fail(ValueError, "k", f"be between 0 and {batch_size} (the size of the batch)", k)
    for argument, number in (("beta", beta), ("curriculum_power", curriculum_power)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            _fail(TypeError, argument, "be a number", type(number).__name__)
    if not -math.inf < beta < math.inf:
        _fail(ValueError, "beta", "be finite", beta)
    if not curriculum_power >= 0:
        _fail(
            ValueError,
            "curriculum_power",
            "be at least 0 (infinity for no reward)",
            curriculum_power,
        )


def _adaselection_fake(
    losses: Tensor,  # [B]
    grad_norms: Tensor | None,  # [B]
    reference_losses: Tensor | None,  # [B]
    methods: Sequence[int],  # [M]
    method_weights: Tensor,  # [M]
    method_losses: Tensor,  # [M]
    step: Tensor,  # [1]
    k: int,
    beta: float,
    curriculum_power: float,
    standardize: bool = True,
    *,
    statistics: Tensor | None = None,  # [S, B]
    excluded: Tensor | None = None,  # [1]
) -> tuple[Tensor, Tensor]:
    require(losses.dim() == 1, lambda: "adaselection_: losses must be [B]")
    require(k >= 0, lambda: "adaselection_: k must not be negative")
    require(k <= losses.shape[0], lambda: "adaselection_: k must not exceed the size of the batch")
    per_sample = (
        ("grad_norms", grad_norms, _GRAD_NORM in methods),
        ("reference_losses", reference_losses, _RHO_LOSS in methods),
    )
    for argument, tensor, needed in per_sample:
        if needed:
            fits = tensor is not None and tensor.dim() == 1 and tensor.shape[0] == losses.shape[0]
            require(fits, functools.partial("adaselection_: {} must be [B]".format, argument))
    # A tensor without data would bring the call here whatever the others are.
    for state in (method_weights, method_losses, step, excluded):
        require(
            state is None or state.device == losses.device,
            lambda: "adaselection_: losses and state must be on one device",
        )
    dtype = torch.float64 if losses.dtype == torch.float64 else torch.float32
    return losses.new_empty((k,), dtype=torch.int64), losses.new_empty(losses.shape, dtype=dtype)


_adaselection = torch.ops.fastsel.adaselection_.default
