"""Optional packages: imported when needed, with one clear sentence when they are missing."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackageError(ImportError):
    """An optional package is needed for what was asked and is not installed."""


def require(module: str, purpose: str, extra: str = "compare") -> Any:
    """Import an optional package.

    Args:
        module: What to import, for example "matplotlib.pyplot".
        purpose: What it is needed for; opens the error message.
        extra: The extra of fastsel that brings it.

    Returns:
        The module.

    Raises:
        MissingPackageError: The package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise  # a broken installation, not a missing one
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed: pip install 'fastsel[{extra}]'"
        ) from None
