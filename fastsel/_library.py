"""Loads the native op libraries into torch, or says in one sentence why that cannot be."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from fastsel._version import __version__

LIBRARY_DIR = Path(__file__).parent / "lib"
MINIMUM_TORCH = "2.10"


def _path(name: str) -> Path:
    return LIBRARY_DIR / f"libfastsel_{name}.so"


def _check_torch() -> None:
    # torch.__version__ compares as a version, not as text: "2.9" < "2.10".
    if torch.__version__ < MINIMUM_TORCH:
        raise ImportError(
            f"fastsel {__version__} needs torch >= {MINIMUM_TORCH}, found {torch.__version__}: "
            f"pip install 'torch>={MINIMUM_TORCH}'"
        )


@functools.cache
def load() -> tuple[str, ...]:
    """Loads the op libraries once.

    The CUDA library is loaded where it was built and torch has CUDA; without it the CUDA ops are
    simply not there, and calling one on a CUDA tensor says so.

    Returns:
        The backends loaded: ``("cpu",)`` or ``("cpu", "cuda")``.

    Raises:
        ImportError: torch is too old, or the CPU library is missing or does not load.
    """
    _check_torch()
    if not _path("cpu").exists():
        raise ImportError(
            "fastsel's native library is not built: run `pip install --no-build-isolation -e .` "
            "in the source folder (it needs a C++20 compiler such as g++ >= 12), or install a wheel"
        )
    try:
        torch.ops.load_library(str(_path("cpu")))
    except OSError as error:
        raise ImportError(
            f"fastsel's native library {_path('cpu').name} does not load: "
            f"{error.__cause__ or error}"
        ) from error
    if torch.version.cuda is None or not _path("cuda").exists():
        return ("cpu",)
    try:
        torch.ops.load_library(str(_path("cuda")))
    except OSError as error:
        raise ImportError(
            f"fastsel's CUDA library {_path('cuda').name} does not load into torch "
            f"{torch.__version__}: {error.__cause__ or error}"
        ) from error
    return ("cpu", "cuda")


def build_info() -> dict[str, Any]:
    """What is compiled and what is loaded, for ``fastsel info``.

    Returns:
        A dictionary with ``version``, ``loaded`` (backends), ``compiled`` (backends whose library
        exists), ``cpu_kernels`` (``avx512``, ``avx2`` or ``baseline``: what this machine runs) and
        ``library_dir``.
    """
    loaded = load()
    native = ctypes.CDLL(str(_path("cpu")))
    native.fastsel_cpu_isa.restype = ctypes.c_char_p
    return {
        "version": __version__,
        "loaded": list(loaded),
        "compiled": [name for name in ("cpu", "cuda") if _path(name).exists()],
        "cpu_kernels": native.fastsel_cpu_isa().decode(),
        "library_dir": str(LIBRARY_DIR),
    }
