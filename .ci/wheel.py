"""Checks the wheel in a folder: its tag, its contents, and that what it installs runs.

Usage: wheel.py WHEEL_FOLDER BUILD_FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROGRAM = """
import fastsel, torch
assert fastsel.__file__.startswith({folder!r}), fastsel.__file__
scores = fastsel.sample_scores(torch.eye(3), torch.arange(3))
expected = torch.nn.functional.cross_entropy(torch.eye(3), torch.arange(3), reduction="none")
assert torch.allclose(scores.loss, expected)
assert fastsel.topk(torch.arange(5.0), 2).indices.tolist() == [4, 3]
"""


def weak_symbols(build: Path) -> list[str]:
    """Functions that the linker may share between the builds for different instruction sets.

    Such a function would be compiled for AVX-512 and be run by a machine without it.
    """
    found = []
    units = list(build.glob("CMakeFiles/fastsel_a*.dir/**/*_simd.cpp.o"))
    assert units or os.uname().machine != "x86_64", f"no SIMD unit was found in {build}"
    for unit in units:
        listing = subprocess.run(
            ["nm", "-C", unit], check=True, capture_output=True, text=True
        ).stdout
        isa = unit.parts[-4].removeprefix("fastsel_").removesuffix(".dir")
        lines = (line for line in listing.splitlines() if " W " in line or " u " in line)
        found += [f"{unit.name} ({isa}): {line}" for line in lines if f"cpu::{isa}::" not in line]
    return found


def main(wheels: Path, build: Path) -> None:
    """Raises AssertionError where the wheel is not as it should be."""
    (wheel,) = wheels.glob("*.whl")
    assert wheel.stem.endswith("-py3-none-linux_" + os.uname().machine), wheel
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastsel/lib/libfastsel_cpu.so" in names, names
    versioned = [name for name in names if "cpython" in name or "abi3" in name or "simt" in name]
    assert not versioned, f"the wheel must hold no Python-versioned and no test binary: {versioned}"
    assert not weak_symbols(build), weak_symbols(build)
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        environment = {**os.environ, "PYTHONPATH": folder}
        program = PROGRAM.format(folder=folder)
        subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=folder)
    print(wheel.name, "is sound")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
