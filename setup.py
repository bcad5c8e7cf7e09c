"""Builds rep_fast._C, and rep_fast._C_cuda where nvcc is, by driving CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE, CUDA_MODULE = "rep_fast", "_C_cuda.*.so"


def find_tool(name: str) -> str:
    """Path of a build tool, the running environment's own before any on PATH (a system cmake may be too old)."""
    beside = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]
    found = shutil.which(name, path=os.pathsep.join(beside)) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} was not found; pip install {name}, or install without --no-build-isolation")
    return found


class CMakeBuild(build_ext):
    """Configure, build and install one CMake project.

    The build directory lies outside setuptools' temporary ones, so that a second `pip install -e .` recompiles only
    what changed.
    """

    def run(self) -> None:
        # setuptools builds elsewhere and copies to the source tree afterwards: `inplace` is off meanwhile
        self.is_checkout = bool(self.editable_mode or self.inplace)
        super().run()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # the module of the CUDA kernels, which setuptools does not know of; a stale one goes where none was built
        built = list((Path(self.build_lib) / PACKAGE).glob(CUDA_MODULE))
        for stale in (ROOT / PACKAGE).glob(CUDA_MODULE):
            stale.unlink()
        for module in built:
            self.copy_file(str(module), str(ROOT / PACKAGE / module.name))

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            # An isolated build runs in a new directory each time: what CMake remembered of the last one is gone.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DREP_FAST_CUDA={os.environ.get('REP_FAST_CUDA', 'AUTO')}",
            # for the tests of a checkout, which find it in the build directory; it is not installed
            f"-DREP_FAST_CUDA_ON_CPU={'ON' if self.is_checkout else 'OFF'}",
        ]  # fmt: skip
        if is_moved(build_dir):
            configure.append("--fresh")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir)], check=True)
        for stale in destination.glob(CUDA_MODULE):  # of a build with nvcc, where this one is without
            stale.unlink()
        subprocess.run([cmake, "--install", str(build_dir), "--prefix", str(destination)], check=True)


def is_moved(build_dir: Path) -> bool:
    """Whether the directory was configured for a source tree elsewhere, which CMake refuses to take over."""
    cache = build_dir / "CMakeCache.txt"
    return cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text()


def extensions() -> list[Extension]:
    """The native module on x86-64 Linux; elsewhere the plain torch bodies serve."""
    if sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64"):
        return [Extension("rep_fast._C", sources=[])]
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
