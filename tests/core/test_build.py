"""The compiled extension, and installing with and without it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import resources
from benchmarks.benchmark import discover
from benchmarks.kernels.kernel import KernelBenchmark, compiled, floors
from scripts import wheels
from sslkernels.__main__ import report
from sslkernels.core import native

ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(native.extension is None, reason=f"no compiled extension: {native.load_error}")
needs_cuda_kernels = pytest.mark.skipif(
    native.extension is None or not native.extension.build_info()["cuda"], reason="no CUDA kernels were compiled"
)


@needs_extension
def test_no_unstable_torch_symbol_is_used():
    """Only the stable C ABI of torch: an object that works with every later torch."""
    if shutil.which("nm") is None or shutil.which("c++filt") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--undefined-only", native.extension.__file__]
    assert "torch_parallel_for" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert wheels.unstable_symbols(Path(native.extension.__file__)) == []


def wheel_of(folder: Path, *, tag: str, name_tag: str = "", files: dict[str, Path | str]) -> Path:
    """A wheel of some files, as auditwheel would name it."""
    path = folder / f"sslkernels-0.1.0-{name_tag or tag}.whl"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("sslkernels-0.1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        for name, content in {"sslkernels/py.typed": "", **files}.items():
            opened.writestr(name, content if isinstance(content, str) else content.read_bytes())
    return path


@pytest.mark.full
@needs_extension
def test_the_audit_of_wheels(tmp_path):
    """The extension that was built here passes in a wheel of this Python; each fault that a wheel can have fails."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("no readelf")
    built = Path(native.extension.__file__)
    python, name = f"cp{sys.version_info.major}{sys.version_info.minor}", f"sslkernels/{built.name}"
    tag, abi3 = f"{python}-{python}-manylinux_2_34_x86_64", "cp310-abi3-manylinux_2_34_x86_64"
    assert wheels.faults(wheel_of(tmp_path, tag=tag, files={name: built})) == []
    for options, fault in (
        ({"tag": f"{python}-{python}-linux_x86_64", "files": {name: built}}, "not a manylinux"),
        (
            {"tag": tag, "name_tag": abi3, "files": {name: built}},
            "does not have the tags",
        ),
        ({"tag": "cp39-cp39-manylinux_2_34_x86_64", "files": {name: built}}, "its only library must be"),
        ({"tag": tag, "files": {}}, "its only library must be"),
        ({"tag": tag, "files": {name: built, "sslkernels/BUILD_FAILED": "no compiler"}}, "BUILD_FAILED"),
        # A library of torch, which the stable ABI does not promise.
        ({"tag": tag, "files": {name: Path(torch.__file__).parent / "lib" / "libshm.so"}}, "wants c10::"),
        ({"tag": tag, "files": {name: Path(torch.__file__).parent / "lib" / "libshm.so"}}, "needs libc10.so"),
    ):
        found = wheels.faults(wheel_of(tmp_path, **options))
        assert any(fault in each for each in found), (fault, found)


def built_wheels() -> list[Path]:
    return sorted((wheels.FOLDER / "repaired").glob("*.whl"))


@pytest.mark.skipif(not built_wheels(), reason="`make wheels` has built none")
def test_wheels_that_were_built_are_in_order():
    assert {wheel.name: wheels.faults(wheel) for wheel in built_wheels()} == {w.name: [] for w in built_wheels()}


@needs_cuda_kernels
def test_cuda_kernels_are_registered_even_with_a_cpu_only_torch():
    assert native.extension.build_info()["cuda_architectures"]
    families = [benchmark for benchmark in discover() if isinstance(benchmark, KernelBenchmark)]
    on_gpus_alone = {name for family in families for name, kernel in family.kernels.items() if not kernel.runs_on_cpu}
    for op in floors():
        for key in ("CUDA",) if op in on_gpus_alone else ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sslkernels_native::{op}", key), op


@pytest.fixture(scope="module")
def machine_code():
    if resources.cuobjdump() is None:
        pytest.skip("no cuobjdump")
    return resources.kernels()


@pytest.mark.full
@needs_cuda_kernels
def test_cuda_kernels_do_not_spill(machine_code):
    built = {int(re.sub("[a-z]", "", a)) for a in native.extension.build_info()["cuda_architectures"]}
    assert {kernel.architecture for kernel in machine_code} == built
    for kernel in machine_code:
        assert kernel.spilled == 0, kernel


@pytest.mark.full
@needs_cuda_kernels
def test_registers_leave_room_for_enough_warps(machine_code):
    """At least half of the warps of a multiprocessor are resident; a quarter for float64 kernels."""
    for kernel in machine_code:
        assert kernel.warps >= (16 if "double" in kernel.name else 32), kernel


@pytest.mark.full
@needs_cuda_kernels
def test_memory_is_accessed_by_16_bytes(machine_code):
    """Even if rows are not aligned to 16 bytes, as with an odd vocabulary."""
    for kernel in machine_code:
        known = [entry for entry in compiled() if kernel.name.startswith(entry.name)]
        assert kernel.wide_loads > 0 or any(entry.loads for entry in known), kernel
        assert kernel.wide_stores > 0 or any(entry.stores for entry in known), kernel


@pytest.mark.full
@needs_cuda_kernels
def test_every_operator_has_its_kernels_in_the_machine_code(machine_code):
    names = {kernel.name for kernel in machine_code}
    starts = {*floors(), *(entry.name for entry in compiled())} - {entry.instead_of for entry in compiled()}
    assert [start for start in starts if not any(name.startswith(start) for name in names)] == []
    assert [name for name in names if not name.startswith(tuple(starts))] == []


def test_setup_imports_no_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.split(".")[0] in {"torch", "numpy", "pybind11"} for name in names)


@pytest.fixture
def source(tmp_path):
    """A copy of the contents of a source distribution."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("csrc", "sslkernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def install(source: Path, **env: str) -> subprocess.CompletedProcess[str]:
    target = source.parent / "installed"
    arguments = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target", str(target), str(source)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "SSLKERNELS_BUILD_EXT": "", **env},
    )  # fmt: skip


@pytest.mark.full
def test_install_without_a_compiler_gives_a_working_package(source):
    result = install(source, CMAKE_ARGS="-DCMAKE_CXX_COMPILER=/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    target = source.parent / "installed"
    assert (target / "sslkernels" / "py.typed").exists()
    (wheel,) = target.glob("sslkernels-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()
    code = (
        # An editable install of this checkout would provide its extension.
        "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
        "import torch, sslkernels as sk\n"
        "assert sk.available_backends('cross_entropy', 'cpu') == ('reference',), sk.available_backends()\n"
        "print(sk.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1])), sk.__file__)\n"
        "from sslkernels.__main__ import report\n"
        "assert 'its build failed' in report()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=source.parent,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(target)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert str(target) in ran.stdout
    # An installer shows nothing of a build that ends well: the package itself says it.
    assert re.search("UserWarning: sslkernels has no compiled kernels .*build failed.*pip install", ran.stderr)


@pytest.mark.full
def test_an_extension_that_is_not_wanted_is_not_missed(source):
    result = install(source, SSLKERNELS_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    target = source.parent / "installed"
    (wheel,) = target.glob("sslkernels-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()
    assert not list(target.rglob("BUILD_FAILED"))


def test_an_isolated_build_finds_torch_where_it_installs(tmp_path):
    """pip runs the interpreter of the environment, without its packages; VIRTUAL_ENV may name an environment; uv sets
    it to the environment of the build, and finds in its own variables where it installs."""
    code = (
        "import sys; sys.path = [path for path in sys.path if 'site-packages' not in path]\n"
        "import runpy, setuptools, sysconfig; setuptools.setup = lambda **options: None\n"
        "get_path = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *of: get_path(name, *of) if of else OWN\n"
        "print(runpy.run_path('setup.py')['find_torch']())"
    )
    site = Path(torch.__file__).parents[1]
    clean = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    (tmp_path / "setuptools").symlink_to(site / "setuptools")
    (tmp_path / "_distutils_hack").symlink_to(site / "_distutils_hack")
    environment = tmp_path / "environment"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (environment / "lib" / python / "site-packages").mkdir(parents=True)
    (environment / "lib" / python / "site-packages" / "torch").symlink_to(site / "torch")

    def found(*, own: str = "/nowhere", of_parent: str = "/nowhere", of_build: str = "/nowhere") -> str:
        with_parent = ("sh", "-c", f'VIRTUAL_ENV={of_build} "$@"; exit $?', "parent")
        ran = subprocess.run(
            [*with_parent, sys.executable, "-c", code.replace("OWN", repr(own))], capture_output=True, text=True,
            check=False, cwd=ROOT, env={**clean, "PYTHONPATH": str(tmp_path), "VIRTUAL_ENV": of_parent},
        )  # fmt: skip
        return ran.stdout.strip() or ran.stderr

    assert "torch was not found in /nowhere" in found()
    places = [{"own": str(site)}, {"of_build": str(environment)}]
    places += [{"of_parent": str(environment)}] if os.path.exists("/proc/self/environ") else []
    for place in places:
        assert Path(found(**place)).samefile(site / "torch"), place


def test_a_source_distribution_has_the_inputs_of_the_build(source):
    shutil.copy(ROOT / "MANIFEST.in", source)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar"]
    subprocess.run(command, check=True, capture_output=True, cwd=source)
    (archive,) = (source / "dist").glob("*.tar")
    with tarfile.open(archive) as opened:
        packed = {str(Path(*Path(name).parts[1:])) for name in opened.getnames()}
    wanted = [path for name in ("csrc", "sslkernels") for path in (source / name).rglob("*.*")]
    assert [path for path in wanted if path.is_file() and str(path.relative_to(source)) not in packed] == []
    assert {"CMakeLists.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE"} <= packed


@needs_extension
def test_an_extension_that_is_older_than_the_package_is_named(monkeypatch, tmp_path):
    built = tmp_path / "sslkernels" / "_C.so"
    source = tmp_path / "sslkernels" / "core" / "operator.py"
    source.parent.mkdir(parents=True)
    for path in (built, source):
        path.touch()
    monkeypatch.setattr(native, "PACKAGE", built.parent)
    monkeypatch.setattr(native.extension, "__file__", str(built))
    os.utime(source, (1, 1))
    assert native.newer_source() is None
    os.utime(built, (0, 0))
    assert native.newer_source() == Path("sslkernels/core/operator.py")
    assert f"OLDER than {native.newer_source()}" in report()


@pytest.mark.full
def test_a_required_extension_that_fails_is_fatal(source):
    result = install(source, CMAKE_ARGS="-DCMAKE_CXX_COMPILER=/nonexistent/c++", SSLKERNELS_BUILD_EXT="1")
    assert result.returncode != 0


def test_version_is_in_one_place():
    from sslkernels.version import __version__

    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert __version__ not in project
    assert "match-runtime" not in project  # with it uv refuses to build a project whose version is dynamic
