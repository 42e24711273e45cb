"""Builds the optional extension with CMake and Ninja. Does not import torch: CMake finds it through the interpreter.

SSLKERNELS_BUILD_EXT: 1 = a failed build of the extension is fatal, 0 = do not build it, unset = build it if possible.
SSLKERNELS_CUDA: 1 = CUDA kernels required, 0 = none, unset = if there is nvcc.
TORCH_CUDA_ARCH_LIST: as in torch, "8.0 9.0+PTX". MAX_JOBS: parallel compilations. CMAKE_ARGS: passed on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("SSLKERNELS_BUILD_EXT", "")


def find_tool(name: str, package: str, attribute: str) -> str:
    """A program on PATH, or the one in the Python package of the same name."""
    try:
        directory = getattr(__import__(package), attribute)
        candidate = Path(directory) / name
        if candidate.exists():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} was not found; install it with: pip install {package}")
    return found


class CMakeBuild(build_ext):
    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if WANTED == "1":
                raise
            print(f"sslkernels: the extension was not built ({error}).", file=sys.stderr)
            print("sslkernels: the package works without it, on its reference and Triton backends.", file=sys.stderr)
            print(
                "sslkernels: it needs torch: pip install --no-build-isolation (SSLKERNELS_BUILD_EXT=1).",
                file=sys.stderr,
            )
            self._without_extension()

    def _without_extension(self) -> None:
        """Makes the wheel that is being built one for any platform, which is what its name then says."""
        self.extensions = self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / (sysconfig.get_config_var("SOABI") or "default")
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            find_tool("cmake", "cmake", "CMAKE_BIN_DIR"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DSSLKERNELS_CUDA={os.environ.get('SSLKERNELS_CUDA', 'auto')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([configure[0], "--build", str(build), "--parallel", jobs], check=True)
        if not target.exists():
            raise RuntimeError(f"the build made no {target}")


extensions = [] if WANTED == "0" else [Extension("sslkernels._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
