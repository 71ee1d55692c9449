"""Builds vqfast._C (and _C_cuda where nvcc is found) with CMake; maps kernels/ to vqfast.kernels.
Nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja. Without a C++ compiler the package installs
    without kernels."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        if not self._has_compiler():
            print(
                "vqfast: no C++ compiler found; installing without native kernels", file=sys.stderr
            )
            return
        import pybind11  # only here: a build requirement, not one of the package

        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    @staticmethod
    def _has_compiler() -> bool:
        named = os.environ.get("CXX", "").split()
        return any(shutil.which(c) for c in (named[:1] or ["g++", "clang++", "c++"]))


setup(
    packages=[*find_packages(include=["vqfast", "vqfast.*"]), "vqfast.kernels"],
    package_dir={"vqfast": "vqfast", "vqfast.kernels": "kernels"},
    ext_modules=[Extension("vqfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
