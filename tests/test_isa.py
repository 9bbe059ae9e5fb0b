"""The CPU kernels of every instruction set that this machine can run, not only of its best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsel import _library

HERE = Path(__file__).resolve().parent
SETS = ["baseline", "avx2", "avx512"]  # each runs wherever a later one does
BEST = str(_library.build_info()["cpu_kernels"])

# Inputs that decide about vector code; what is left out does not look at it.
WORDS = "shapes sizes margins masked huge number layouts special equal orders hard strides"
CHOSEN = f"cpu and ({' or '.join(WORDS.split())})"
TESTS = [
    "test_scores.py",
    "test_scores_backward.py",
    "test_topk.py",
    "test_adaselection.py",
    "test_adaselection_hard.py",
    "test_affine_grad_norm.py",
    "test_embedding_grad_norm.py",
]


def python(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the kernels of one instruction set."""
    environment = {**os.environ, "FASTSEL_ISA": instruction_set}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("instruction_set", SETS[: SETS.index(BEST)])
def test_kernels(instruction_set: str) -> None:
    info = "from fastsel import _library; print(_library.build_info()['cpu_kernels'])"
    assert python(instruction_set, "-c", info).stdout.strip() == instruction_set
    files = [str(HERE / name) for name in TESTS]
    result = python(
        instruction_set, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *files
    )
    assert result.returncode == 0, result.stdout[-4000:]
