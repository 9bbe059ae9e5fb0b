"""Packages what CMakeLists.txt builds; everything else is in pyproject.toml.

The op libraries hold no Python, so a wheel is tagged for a platform and for every Python 3:
py3-none-linux_x86_64.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_VARIABLES = ("FASTSEL_CUDA", "FASTSEL_CUDA_ARCHS", "FASTSEL_SANITIZE", "FASTSEL_TESTS")


class CMakeBuild(build_ext):
    """Runs CMake with ninja; the libraries land in fastsel/lib."""

    def run(self) -> None:
        """Configures and builds; an editable install builds in place, with what the tests need."""
        in_place = self.inplace or self.editable_mode
        package = ROOT / "fastsel" if in_place else Path(self.build_lib).resolve() / "fastsel"
        build = ROOT / "build" / "dev" if in_place else Path(self.build_temp).resolve()
        settings = {
            "Python_EXECUTABLE": sys.executable,
            "FASTSEL_LIBRARY_DIR": str(package / "lib"),
            "FASTSEL_TESTS": "ON" if in_place else "OFF",
            "FASTSEL_CUDA": "auto",  # said anew each time, or the build folder would remember
        }
        settings |= {name: os.environ[name] for name in CMAKE_VARIABLES if name in os.environ}
        # A CUDA build takes its compiler from CUDA_HOME where that is set, as torch's own
        # extensions do.
        if "CUDA_HOME" in os.environ:
            settings["CMAKE_CUDA_COMPILER"] = str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
        options = [f"-D{name}={value}" for name, value in settings.items()]
        # cmake and ninja of this Python's environment come first, activated or not.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            sys.exit("fastsel: cmake was not found: pip install cmake ninja")
        try:
            configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
            subprocess.run(configure, check=True, env=environment)
            subprocess.run([cmake, "--build", str(build)], check=True, env=environment)
        except subprocess.CalledProcessError as error:
            sys.exit(
                "fastsel: the native build failed; the reason stands above. It needs a C++20 "
                "compiler (g++ >= 12 or clang >= 15), torch >= 2.10, cmake >= 3.25 and ninja. "
                f"({error})"
            )

    def get_outputs(self) -> list[str]:
        """The files that the build makes, for the installer's record."""
        return [str(path) for path in (Path(self.build_lib) / "fastsel" / "lib").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """None: an editable install finds the libraries where they were built."""
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel that is tied to a platform but to no Python version."""

    def finalize_options(self) -> None:
        """Marks the wheel as holding native code."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, no Python ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """Installs into the platform's site-packages."""

    def has_ext_modules(self) -> bool:
        """True: there are native libraries, if no extension modules."""
        return True


setup(
    ext_modules=[Extension("fastsel.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    distclass=NativeDistribution,
)
