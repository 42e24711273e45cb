"""Builds the optional extension with CMake and Ninja. Does not import torch: CMake finds it through the interpreter.

The build takes torch from the interpreter or, if it is isolated, from the environment that pip installs into. Without
torch or a compiler the wheel is tagged py3-none-any and contains the file BUILD_FAILED; the package warns on import.

SSLKERNELS_BUILD_EXT: 1 = a failed build of the extension is fatal, 0 = do not build it, unset = build it if possible.
SSLKERNELS_CUDA: 1 = CUDA kernels required, 0 = none, unset = if there is nvcc.
SSLKERNELS_TORCH: the folder of the torch whose headers are taken. SSLKERNELS_BUILD_DIR: where objects are kept; builds
for several Pythons that share it, and the torch, compile the kernels once.
TORCH_CUDA_ARCH_LIST: as in torch; unset = the GPUs of this machine, or else "8.0 9.0+PTX". MAX_JOBS: parallel
compilations. CMAKE_ARGS: passed on.
"""

from __future__ import annotations

import importlib.util
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
SCHEMES = sysconfig.get_scheme_names()
REMEDY = "SSLKERNELS_BUILD_EXT=1 pip install --force-reinstall --no-deps ."


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


def parent_variables() -> dict[str, str]:
    """The environment variables of the process that started this one: uv names the environment of the build as
    VIRTUAL_ENV, and has itself the one that it installs into."""
    try:
        content = Path(f"/proc/{os.getppid()}/environ").read_text()
    except (OSError, UnicodeDecodeError):
        return {}
    return {name: value for name, equals, value in (each.partition("=") for each in content.split("\0")) if equals}


def find_torch() -> str:
    """The folder of the package torch."""
    if os.environ.get("SSLKERNELS_TORCH"):
        return os.environ["SSLKERNELS_TORCH"]
    environments = [sysconfig.get_path("platlib")]  # pip isolates a build from them, and keeps the interpreter
    for variables in (os.environ, parent_variables()):
        for folder in filter(None, (variables.get("VIRTUAL_ENV"), variables.get("CONDA_PREFIX"))):
            bases = {"base": folder, "platbase": folder}
            environments.append(sysconfig.get_path("platlib", "venv" if "venv" in SCHEMES else None, bases))
    found = importlib.util.find_spec("torch")
    folders = [found.submodule_search_locations[0]] if found and found.submodule_search_locations else []
    for folder in [*folders, *(f"{environment}/torch" for environment in environments)]:
        if (Path(folder) / "version.py").exists():
            return str(folder)
    raise RuntimeError("torch was not found in " + ", ".join(environments))


class CMakeBuild(build_ext):
    def run(self) -> None:
        note = self._package() / "BUILD_FAILED"
        note.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            if WANTED == "1":
                raise
            reason = f"{error}".replace("\n", " ")
            rule = "*" * 100
            print(f"{rule}\nsslkernels: THE EXTENSION WAS NOT BUILT: {reason}", file=sys.stderr)
            print("The package works without it, slower, on its reference and Triton backends.", file=sys.stderr)
            print(f"With torch and a C++ compiler: {REMEDY}\n{rule}", file=sys.stderr)
            self._without_extension()
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n")

    def _package(self) -> Path:
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "sslkernels"

    def _without_extension(self) -> None:
        """Makes the wheel that is being built one for any platform, which is what its name then says."""
        self.extensions = self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        own = ROOT / "build" / (sysconfig.get_config_var("SOABI") or "default")
        build = Path(os.environ.get("SSLKERNELS_BUILD_DIR") or own).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            find_tool("cmake", "cmake", "CMAKE_BIN_DIR"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            *("-U", "Python_*", "-U", "_Python_*", "-U", "pybind11_*"),  # the folder may have been another Python's
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSSLKERNELS_TORCH={find_torch()}",
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
