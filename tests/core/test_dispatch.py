"""The choice of a backend, and the modules that an import loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sslkernels as sk
from sslkernels.core import backends, native, preference

PACKAGE = Path(sk.__file__).parent


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_import_loads_torch_alone():
    heavy = ("triton", "transformers", "matplotlib", "rich")
    result = python(f"import sys, sslkernels; print([m for m in {heavy} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_compiled_extension_runs_here():
    """If a compiler built it, it must load; CI sets the variable that turns its absence into a failure."""
    if native.extension is None and os.environ.get("SSLKERNELS_BUILD_EXT") != "1":
        pytest.skip(str(native.load_error))
    assert native.extension is not None, native.load_error
    assert "cpu" in sk.available_backends("cross_entropy", "cpu")


def test_use_backend_nests_and_restores_after_an_error():
    before = backends.current_choice()
    with sk.use_backend("reference"):
        with sk.use_backend("auto"):
            assert backends.current_choice() == "auto"
        assert backends.current_choice() == "reference"
    block = sk.use_backend("reference")
    block.__enter__()
    assert block.__exit__(KeyError, KeyError(), None) is not True
    assert backends.current_choice() == before


@pytest.mark.full
def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"use_backend: name must be one of auto, cuda, triton, cpu, reference; got 'x'"
    ):
        sk.use_backend("x").__enter__()
    with pytest.raises(ValueError, match=r"available_backends: op must be one of .*; got 'softmax'"):
        sk.available_backends("softmax")


@pytest.mark.full
def test_an_explicit_backend_that_cannot_run_raises_and_says_why():
    logits, target = torch.randn(2, 3), torch.tensor([0, 1])
    with (
        sk.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"cross_entropy: backend 'cuda' cannot run on cpu: it runs on cuda"),
    ):
        sk.cross_entropy(logits, target)
    code = "import torch, sslkernels as sk; sk.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))"
    result = python(code, SSLKERNELS_BACKEND="triton")
    assert "backend 'triton' cannot run on cpu" in result.stderr
    result = python(code, SSLKERNELS_BACKEND="reference")
    assert result.returncode == 0, result.stderr


@pytest.mark.full
def test_without_the_extension_the_reference_runs(tmp_path):
    """A machine without a compiler has only the Python files."""
    (tmp_path / "sslkernels").symlink_to(PACKAGE)
    code = (
        "import sys; sys.modules['sslkernels._C'] = None\n"
        "import torch, sslkernels as sk\n"
        "print(sk.available_backends('cross_entropy', 'cpu'))\n"
        "sk.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))\n"
        "from sslkernels.__main__ import report; print(report())\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "('reference',)" in result.stdout
    assert "extension  not loaded" in result.stdout
    assert "build it with" in result.stdout


def test_shapes_without_data():
    """On the device "meta", which has no autocast; other ops: `shapes_without_data` of their cases."""
    x = torch.empty(3, 5, device="meta", requires_grad=True)
    table = torch.empty(7, 5, device="meta")
    results = [
        sk.gaussian_rsample(x, x, 2)[0],
        sk.gaussian_kl(x, x),
        sk.gumbel_softmax(x),
        sk.gumbel_quantize(x, table[:5]).values,
        sk.linear_sample(x, table).logprob,
        sk.vector_quantize(x, table).commitment,
        sk.contrastive_energy(x, x),
    ]
    for result in results:
        assert torch.autograd.grad(result.sum(), x)[0].shape == x.shape


@pytest.mark.full
def test_report_names_every_op_and_reason():
    result = subprocess.run([sys.executable, "-m", "sslkernels"], capture_output=True, text=True, check=True)
    for op in backends.public_ops():
        assert op in result.stdout
    assert "triton" in result.stdout
    assert torch.__version__ in result.stdout


@pytest.mark.full
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_compiled_instruction_set_gives_the_same_losses(isa):
    """An environment variable restricts the instruction set; the results agree to rounding."""
    if native.extension is None:
        pytest.skip("no compiled extension")
    code = (
        "import torch, sslkernels as sk; from sslkernels.core import native; torch.manual_seed(0)\n"
        "x = torch.randn(7, 3001, requires_grad=True); y = torch.randint(0, 3001, (7,))\n"
        "for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "    z = x.to(d)\n"
        "    with sk.use_backend('cpu'): loss = sk.cross_entropy(z, y, softcap=20.0, label_smoothing=0.1)\n"
        "    truth = torch.nn.functional.cross_entropy(20 * torch.tanh(z.double() / 20), y, label_smoothing=0.1)\n"
        "    g, h = torch.autograd.grad(loss, x)[0], torch.autograd.grad(truth, x)[0]\n"
        "    assert abs(loss - truth) < 2e-6 * truth, (d, loss, truth)\n"
        "    limit = (torch.finfo(d).eps + 1e-6) * h.norm() + 1e-4 * (d == torch.float16)\n"
        "    assert (g - h).norm() <= limit, d\n"
        "print(native.extension.build_info()['cpu_isa'])\n"
    )
    result = python(code, SSLKERNELS_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    order = ["default", "avx2", "avx512"]
    assert order.index(result.stdout.strip()) <= order.index(isa)


@pytest.mark.full
@pytest.mark.parametrize("name", ["SSLKERNELS_CPU_ISA", "SSLKERNELS_BACKEND"])
def test_environment_variables_that_name_nothing(name):
    result = python("import sslkernels", **{name: "bogus"})
    assert result.returncode == 1
    assert f"ValueError: {name} must be one of " in result.stderr
    assert "got 'bogus'" in result.stderr
    code = "import sslkernels as sk; from sslkernels.core import backends, native; print(backends.current_choice())\n"
    code += "print(native.extension and native.extension.build_info()['cpu_isa'])"
    assert python(code, **{name: ""}).stdout == python(code).stdout


@pytest.mark.full
def test_one_warning_where_the_extension_is_missing():
    code = (
        "import sys; sys.modules['sslkernels._C'] = None\n"
        "import warnings, torch, sslkernels as sk\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    with sk.use_backend('reference'): sk.free_energy(torch.randn(3, 4))\n"
        "    assert not caught\n"
        "    sk.free_energy(torch.randn(3, 4)); sk.cross_entropy(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))\n"
        "assert len(caught) == 1, caught\n"
        "print(caught[0].message)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "free_energy runs in plain torch on cpu" in result.stdout
    assert "the compiled extension did not load" in result.stdout


@pytest.mark.parametrize(
    ("architectures", "ptx", "capability", "runs"),
    [
        (["80", "90", "100"], ["100"], (9, 0), True),
        (["80", "90", "100"], ["100"], (8, 9), True),  # machine code of the same generation
        (["80", "90", "100"], ["100"], (12, 0), True),  # from PTX
        (["80", "90", "100"], ["100"], (7, 5), False),
        (["90a"], [], (9, 0), True),
        (["90a"], [], (10, 0), False),
        (["100a"], [], (10, 3), False),  # machine code for exactly one architecture
        (["90"], [], (8, 0), False),
        (["90"], [], (10, 0), False),
        (["80"], ["80"], (9, 0), True),
    ],
)
def test_architectures_that_the_kernels_run_on(monkeypatch, architectures, ptx, capability, runs):
    info = {"cuda_architectures": architectures, "cuda_ptx": ptx}
    monkeypatch.setattr(backends.native, "extension", SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = backends._why_not_architecture(torch.device("cuda"))
    assert (reason is None) == runs
    if reason is not None:
        assert "TORCH_CUDA_ARCH_LIST" in reason


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(preference, "measurements", dict)
    monkeypatch.setattr(backends, "_registry", [*backends._registry])
    return torch.device("cuda")


def test_the_table_names_public_ops():
    assert {*preference.PREDICTED} <= {*backends.public_ops()}
    for order in (preference.GPU, preference.CPU, *preference.PREDICTED.values()):
        assert order[-1] == "reference"
        assert {*order} <= {*backends.BACKENDS}


def test_a_gpu_prefers_the_predicted_backend(monkeypatch, h200):
    """The choice falls through to what can run."""
    monkeypatch.setattr(backends.Implementations, "why_not", lambda self, name, device: None)
    made = {op: backends.Implementations(op, {}, ()) for op in ("cross_entropy", "vector_quantize")}
    assert {op: each.choose(h200) for op, each in made.items()} == {
        "cross_entropy": "cuda",
        "vector_quantize": "triton",
    }
    without = lambda self, name, device: "it was not built" if name == "cuda" else None  # noqa: E731
    monkeypatch.setattr(backends.Implementations, "why_not", without)
    assert backends.Implementations("cross_entropy", {}, ()).choose(h200) == "triton"
    assert preference.order("cross_entropy", torch.device("cpu")) == ("cpu", "reference")


def test_a_measurement_replaces_the_prediction(monkeypatch, tmp_path, h200):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    path = tmp_path / "measured.json"
    path.write_text('{"sm_90": {"vector_quantize": ["cuda", "triton"]}, "sm_80": {"free_energy": ["triton", "cuda"]}}')
    monkeypatch.setattr(preference, "MEASURED", path)
    preference.measurements.cache_clear()
    try:
        assert preference.order("vector_quantize", h200) == ("cuda", "triton", "reference")
        assert preference.order("free_energy", h200) == ("cuda", "triton", "reference")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        assert preference.order("free_energy", h200) == ("triton", "cuda", "reference")
    finally:
        preference.measurements.cache_clear()
