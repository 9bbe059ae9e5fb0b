"""The error a user of `compare` can cause."""

from __future__ import annotations


class CompareError(ValueError):
    """A setting is wrong or the output folder cannot be used; the message says which and why."""
