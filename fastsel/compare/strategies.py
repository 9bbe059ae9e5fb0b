"""The strategies a comparison can hold against each other, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsel.compare.errors import CompareError
from fastsel.data.dataset import Task
from fastsel.select import SELECTORS, Selector, make_selector

REFERENCE = "full"
BASELINE = "uniform"
# AdaSelection under the cost-aware switch: the one strategy that may take plain steps.
SWITCHED = "auto"
MIXTURE = "adaselection"
STRATEGIES = (REFERENCE, *SELECTORS, SWITCHED)
# Short, so that a first look takes minutes; the others are one option away.
DEFAULT_STRATEGIES = (
    REFERENCE, BASELINE, "big_loss", "small_loss", "grad_norm", MIXTURE, SWITCHED
)  # fmt: skip
ALL = "all"
# These look at class probabilities, which a regression has none of.
_OF_CLASSES = frozenset({"entropy", "margin"})


def title(strategy: str) -> str:
    """The name as it is shown: a long mixture's may then break between its methods."""
    return strategy.replace(":", ": ").replace("+", " + ")


def selector_for(strategy: str, rate: float, generator: torch.Generator | None = None) -> Selector:
    """The selector of a strategy.

    Args:
        strategy: A name in `SELECTORS`, a mixture such as ``adaselection:big_loss+small_loss``, or
            "auto".
        rate: The share of a batch it chooses.
        generator: For those that draw at random.

    Raises:
        ValueError: There is no such selector.
    """
    name = MIXTURE if strategy == SWITCHED else strategy
    return make_selector(name, rate=rate, generator=generator)


def resolve_strategies(names: Sequence[str], task: Task) -> tuple[str, ...]:
    """Check names of strategies and put all that fit the task in place of "all".

    Args:
        names: "full", "auto", names of selectors, mixtures, and "all".
        task: "classification" or "regression".

    Returns:
        The names, each once.

    Raises:
        CompareError: A name is unknown, given twice, or means nothing for the task.
    """
    fitting = [name for name in STRATEGIES if task == "classification" or name not in _OF_CLASSES]
    if ALL in names:
        after = [name for name in names if name != ALL and name not in fitting]
        names = [*fitting, *after]
    if not names or len(set(names)) < len(names):
        raise CompareError(f"{_EXPECTED}, each once, got {', '.join(names) or 'none'}")
    for name in names:
        if name == REFERENCE:
            continue
        try:
            needs = selector_for(name, rate=1.0).needs
        except ValueError as error:
            text = f"{_EXPECTED}, got {', '.join(names)}"
            raise CompareError(f"{text}: {error}" if ":" in name else text) from None
        if task == "regression" and needs & _OF_CLASSES:
            raise CompareError(
                f"strategy {name} looks at class probabilities, which a regression has none of"
            )
    return tuple(names)


_EXPECTED = (
    f"strategies must be one or more of {', '.join(STRATEGIES)}, a mixture such as "
    f"{MIXTURE}:big_loss+small_loss, or {ALL}"
)
