"""Every public op on a GPU, on each of its backends, against the reference on the host; and real sizes of the ops that
have no file of their own in this folder."""

from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch
from kernel_files import kernels
from public_calls import CALLS, differentiable
from raw_operators import tensors
from torch import Tensor

import sslkernels as sk
from sslkernels.core import backends

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("as_users_run")]
DEVICE = "cuda"
KERNEL_BACKENDS = ("cuda", "triton")
TABLE = sk.AliasTable([50, 20, 7, 0, 3])


def files_of(name: str) -> pytest.MarkDecorator:
    op = CALLS[name].op
    beside = {
        "linear_cross_entropy": ["cross_entropy"],
        "linear_distillation": ["linear_cross_entropy"],
        "contrastive_energy": ["info_nce"] if "negatives" in name or "masks" in name else [],
    }
    return kernels(op, *beside.get(op, []))


def skip_without(op: str, backend: str) -> None:
    reason = backends.why_not(op, backend, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("backend_name", KERNEL_BACKENDS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=files_of(name)) for name in CALLS])
def test_results_and_gradients(backend_name, name):
    call = CALLS[name]
    skip_without(call.op, backend_name)
    leaves = call.leaves("cpu")
    there = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]
    found = []
    for backend, own in (("reference", leaves), (backend_name, there)):
        with sk.use_backend(backend):
            results = call.run(*own)
            outputs = differentiable(results)
            # All weights are different, so that no two elements of a gradient can be exchanged.
            weights = [torch.linspace(0.5, 1.5, max(o.numel(), 1)).reshape(o.shape).to(o) for o in outputs]
            grads = torch.autograd.grad(outputs, own, weights, allow_unused=True)
        found.append([*tensors(results), *(g.to_dense() for g in grads if g is not None)])
    for want, got in zip(*found, strict=True):
        assert got.device.type == DEVICE
        torch.testing.assert_close(got.cpu(), want, rtol=2e-4, atol=2e-5)


def draws(device: str) -> dict[str, tuple[str, object]]:
    """Name -> (op, the call) of ops without a gradient."""
    g = torch.Generator().manual_seed(0)
    ids = (torch.arange(7 * 568) * 7 % 31_000 + 10).reshape(7, 568).to(device)
    rows, head, bias = (torch.randn(shape, generator=g).to(device) for shape in ((70, 24), (133, 24), (133,)))
    sentinels = range(32099, 31999, -1)
    table = TABLE.to(device)
    return {
        "corrupt_spans": (
            "corrupt_spans",
            lambda: sk.corrupt_spans(ids, sentinel_ids=sentinels, eos_id=1, seed=3),
        ),
        "corrupt_spans, int32": (
            "corrupt_spans",
            lambda: sk.corrupt_spans(ids.int(), sentinel_ids=sentinels, density=0.3, mean_span=2.0, seed=3),
        ),
        "mask_tokens": (
            "mask_tokens",
            lambda: sk.mask_tokens(ids, mask_id=3, vocab_size=31_010, mean_span=2.0, seed=1),
        ),
        "AliasTable": ("AliasTable", lambda: table.draw((70, 11), seed=-5)),
        "linear_sample": (
            "linear_sample",
            lambda: sk.linear_sample(rows, head, linear_bias=bias, seed=1, num_samples=3),
        ),
        "teacher_center": ("linear_distillation", lambda: sk.teacher_center(rows, head)),
        "sinkhorn_center": (
            "linear_distillation",
            lambda: sk.sinkhorn_center(rows, head, teacher_bias=bias, temperature=0.5, iterations=3),
        ),
        **{
            name: ("random", partial(getattr(sk, name), (70, 11), 1, device=device))
            for name in ("random_bits", "random_uniform", "random_exponential", "random_gumbel", "random_normal")
        },
    }


def public_name(op: str, name: str) -> str:
    return name if op == "random" else op


@pytest.mark.parametrize("backend_name", KERNEL_BACKENDS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=kernels(op)) for name, (op, _) in draws("cpu").items()])
def test_results_of_ops_without_a_gradient(backend_name, name):
    op, run = draws(DEVICE)[name]
    skip_without(public_name(op, name), backend_name)
    with sk.use_backend(backend_name):
        got = run()
    with sk.use_backend("reference"):
        expected = draws("cpu")[name][1]()
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert one.device.type == DEVICE
        torch.testing.assert_close(one.cpu(), other, rtol=2e-4, atol=2e-5)


def prototypes(rows: int, vocab: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, dim), (vocab, dim), (rows // 2, dim), (vocab, dim))
    made = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return [torch.nn.functional.normalize(part, dim=1).to(DEVICE, dtype) for part in made]


@kernels("linear_distillation", "linear_cross_entropy")
@pytest.mark.parametrize("backend_name", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1000, 65_536, 65_539])
def test_prototypes_of_real_sizes(backend_name, dtype, vocab):
    """The gradients against float64, beside what the reference gives in the same dtype."""
    skip_without("linear_distillation", backend_name)
    rows, head, teacher, teacher_head = prototypes(512, vocab, 256, dtype)
    index = torch.stack([torch.arange(512) % 256, (torch.arange(512) * 7) % 257 - 1], dim=1).to(DEVICE)

    def step(backend: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [rows.detach().to(kind).requires_grad_(), head.detach().to(kind).requires_grad_()]
        with sk.use_backend(backend):
            loss = sk.linear_distillation(
                *leaves, teacher.to(kind), teacher_head.to(kind), teacher_index=index,
                student_temperature=0.1, teacher_temperature=0.05,
            )  # fmt: skip
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    truth, rough = step("reference", torch.float64), step("reference", dtype)
    for got, reference, exact in zip(step(backend_name, dtype), rough, truth, strict=True):
        assert oracle.error(got, exact) <= oracle.error(reference, exact) + torch.finfo(dtype).eps
