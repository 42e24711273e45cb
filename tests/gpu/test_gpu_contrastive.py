"""The contrastive losses on a GPU: real sizes, synchronisations, graphs and memory."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from cuda_graphs import no_synchronisation
from kernel_files import kernels

import sslkernels as sk

pytestmark = [pytest.mark.gpu, kernels("contrastive_energy")]
OP = "contrastive_energy"


def features(rows, dim, dtype=torch.bfloat16):
    x = F.normalize(torch.randn(rows, dim, device="cuda"), dim=1).to(dtype).requires_grad_()
    y = F.normalize(torch.randn(rows, dim, device="cuda"), dim=1).to(dtype).requires_grad_()
    return x, y, torch.tensor(20.0, device="cuda", requires_grad=True)


def eager(energy):
    def loss(x, y, scale):
        scores = scale * (x @ y.t())
        if energy == "sigmoid":
            sign = 2 * torch.eye(len(x), device=x.device, dtype=scores.dtype) - 1
            return -F.logsigmoid(sign * (scores - 10.0)).sum() / len(x)
        target = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2

    return loss


@pytest.mark.parametrize("dim", [64, 200, 256, 512, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("energy", ["softmax", "sigmoid"])
def test_real_sizes(backend, energy, dtype, dim):
    leaves = features(2051, dim, dtype)
    options = {"direction": "symmetric"} if energy == "softmax" else {"energy": "sigmoid", "logit_bias": -10.0}
    loss = sk.contrastive_energy(leaves[0], leaves[1], logit_scale=leaves[2], **options)
    grads = torch.autograd.grad(loss * 1024, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth, rough = eager(energy)(*exact), eager(energy)(*leaves)
    assert oracle.error(loss, truth) <= oracle.error(rough, truth) + 1e-5
    true_grads, rough_grads = torch.autograd.grad(truth * 1024, exact), torch.autograd.grad(rough * 1024, leaves)
    for got, near, true in zip(grads, rough_grads, true_grads, strict=True):
        assert oracle.error(got, true) <= oracle.error(near, true) + torch.finfo(dtype).eps


def every_loss(x, y, scale, negatives, ids):
    options = {"query_ids": ids, "key_ids": ids, "logit_scale": scale, "return_stats": True}
    loss, _ = sk.contrastive_energy(x, y, direction="symmetric", label_smoothing=0.1, negatives=negatives, **options)
    positive = ids.clamp(max=len(x) - 1)
    loss = loss + sk.contrastive_energy(x, y, positive=positive, energy="hinge", direction="symmetric")
    loss = loss + sk.info_nce(x, y, negatives, negative_mode="paired") + sk.info_nce(x, y.detach(), y.detach())
    return loss + sk.nt_xent(x, y) + sk.siglip_loss(x, y, scale, -10.0)


@pytest.mark.usefixtures("as_users_run")
def test_no_synchronisation():
    x, y, scale = features(131, 64)
    negatives = torch.randn(131, 5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 50, (131,), device="cuda")
    every_loss(x, y, scale, negatives, ids).backward()  # compiles
    with no_synchronisation():
        every_loss(x, y, scale, negatives, ids).backward()


@pytest.mark.usefixtures("as_users_run")
def test_cuda_graph_capture_and_replay():
    x, y, scale = features(131, 64)
    negatives = torch.randn(131, 5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 50, (131,), device="cuda")
    leaves = (x, y, scale, negatives)

    def step():
        for leaf in leaves:
            leaf.grad = None
        loss = every_loss(*leaves, ids)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = tuple(leaf.grad for leaf in leaves)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        ids.copy_(torch.randint_like(ids, 0, 50))
    graph.replay()
    replayed = [tensor.clone() for tensor in (loss, *captured)]
    for got, want in zip(replayed, [step(), *(leaf.grad for leaf in leaves)], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)


def test_bitwise_equal_from_run_to_run(backend):
    x, y, scale = features(1500, 512)
    positive = torch.randint(0, 1500, (1500,), device="cuda")

    def gradients():
        loss = sk.contrastive_energy(x, y, positive=positive, direction="symmetric", logit_scale=scale)
        return torch.autograd.grad(loss + sk.nt_xent(x, y), (x, y, scale))

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_an_index_out_of_range_makes_only_its_row_nan(backend):
    x, y, _ = features(5, 16, torch.float32)
    positive = torch.tensor([0, 9, 2, -3, 4], device="cuda")
    rows = sk.contrastive_energy(x, y, positive=positive, reduction="none", direction="symmetric")
    assert rows.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.large
def test_memory_of_a_large_batch():
    """No score matrix is materialised: for N = 65536 it would take 17 GB in float32."""
    x, y, scale = features(65536, 256)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sk.contrastive_energy(x, y, direction="symmetric", logit_scale=scale).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.2e9
    assert x.grad.isfinite().all()


@pytest.mark.large
@pytest.mark.parametrize("energy", ["softmax", "sigmoid"])
def test_float16_gradients_of_a_large_batch(energy):
    """N = 65536: with a loss scale float16 matches float32 to its precision."""
    results = {}
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        x, y, scale = features(65536, 64, torch.float16)
        x, y = x.detach().to(dtype).requires_grad_(), y.detach().to(dtype).requires_grad_()
        options = {"direction": "symmetric"} if energy == "softmax" else {"energy": "sigmoid", "logit_bias": -10.0}
        loss = sk.contrastive_energy(x, y, logit_scale=scale, **options)
        results[dtype] = torch.autograd.grad(loss * 2.0**16, (x, y))
    for half, single in zip(results[torch.float16], results[torch.float32], strict=True):
        assert oracle.error(half, single) < 4 * torch.finfo(torch.float16).eps
