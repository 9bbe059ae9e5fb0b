"""The selectors by name."""

from __future__ import annotations

import torch

from fastsel.select.adaselection import AdaSelection
from fastsel.select.importance import ImportanceSampling
from fastsel.select.methods import METHODS
from fastsel.select.selector import RandomSelector, Selector

SELECTORS: dict[str, type[Selector]] = {
    **METHODS,
    ImportanceSampling.name: ImportanceSampling,
    AdaSelection.name: AdaSelection,
}
"""The selectors by name."""


def make_selector(name: str, *, rate: float, generator: torch.Generator | None = None) -> Selector:
    """Makes a selector by its name.

    Args:
        name: One of `SELECTORS`; ``adaselection:big_loss+small_loss`` names the methods of an
            `AdaSelection`, ``importance:loss`` the score of an `ImportanceSampling`.
        rate: The share of the batch to choose, in (0, 1].
        generator: For selectors that draw at random; the others are deterministic and have no use
            for it.

    Returns:
        The selector.

    Raises:
        ValueError: There is no selector of that name, or `rate` is not in (0, 1].
        TypeError: `rate` is not a number.

    Example:
        >>> make_selector("big_loss", rate=0.25)
        BigLoss(rate=0.25)
        >>> make_selector("adaselection:big_loss+small_loss", rate=0.25).names
        ('big_loss', 'small_loss')
    """
    base, colon, details = name.partition(":")
    kind = SELECTORS.get(base)
    if kind is None:
        raise ValueError(f"make_selector: name must be one of {', '.join(SELECTORS)}, got {name!r}")
    if kind is AdaSelection:
        return AdaSelection(details.split("+"), rate) if colon else AdaSelection(rate=rate)
    if kind is ImportanceSampling:
        by = details if colon else "grad_norm"
        return ImportanceSampling(rate, by, generator=generator)
    if colon:
        raise ValueError(f"make_selector: {base} takes nothing after its name, got {name!r}")
    if issubclass(kind, RandomSelector):
        return kind(rate, generator=generator)
    return kind(rate)


def as_selector(owner: str, selector: Selector | str, rate: float | None) -> Selector:
    """The selector that was given or named.

    Raises:
        TypeError: It is neither a selector nor a name; the message begins with `owner`.
        ValueError: A name comes without a rate, or a selector with one.
    """
    if isinstance(selector, str):
        if rate is None:
            raise ValueError(f"{owner}: rate must be given with the selector's name {selector!r}")
        return make_selector(selector, rate=rate)
    if not isinstance(selector, Selector):
        raise TypeError(
            f"{owner}: selector must be a Selector or a name, got {type(selector).__name__}"
        )
    if rate is not None:
        raise ValueError(
            f"{owner}: rate must not be given beside a selector, which has its own, got {rate}"
        )
    return selector
