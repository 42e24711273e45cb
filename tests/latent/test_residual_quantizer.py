"""nn.ResidualVectorQuantizer: levels on the residual, one straight-through gradient, codes back from indices."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import sslkernels as sk

pytestmark = pytest.mark.pairwise


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_against_a_loop_over_levels(backend, dtype, decay, device):
    options = {"decay": decay, "init": rows(3, 8, 5, seed=1)}
    module = sk.nn.ResidualVectorQuantizer(3, 8, 5, **options).to(device)
    levels = [sk.nn.VectorQuantizer(8, 5, decay=decay, init=init).to(device) for init in options["init"]]
    x = rows(4, 6, 5).to(device, dtype).requires_grad_()
    got = module(x)
    assert got.values.shape == x.shape
    assert got.values.dtype == dtype
    assert got.indices.shape == (4, 6, 3)
    assert got.usage.shape == (3, 8)
    residual = x.to(torch.promote_types(dtype, torch.float32))
    total, losses = torch.zeros_like(residual), []
    for number, level in enumerate(levels):
        codes, codebook = level.codebook.clone(), level.codebook if decay is None else level.codebook.clone()
        index = torch.cdist(residual.detach().double().reshape(-1, 5), codes.double()).argmin(1).view(4, 6)
        assert torch.equal(got.indices[..., number], index)
        level(residual.detach())
        torch.testing.assert_close(module.levels[number].codebook, level.codebook)
        code = F.embedding(index, codebook).to(residual.dtype)
        to_codes = F.mse_loss(code, residual.detach()) if decay is None else torch.zeros(())
        losses.append(F.mse_loss(residual, code.detach()) + 4 * (to_codes - to_codes.detach()))
        residual, total = residual - code.detach(), total + code.detach()
    torch.testing.assert_close(got.values, total.to(dtype))
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(got.commitment, loss.to(got.commitment.dtype))
    grad = rows(4, 6, 5, seed=2).to(device, dtype)
    (found,) = torch.autograd.grad(got.values, x, grad, retain_graph=True)
    assert torch.equal(found, grad)
    torch.testing.assert_close(
        torch.autograd.grad(got.commitment, x)[0], torch.autograd.grad(loss, x, retain_graph=True)[0]
    )
    if decay is None:
        for mine, level in zip(module.levels, levels, strict=True):
            (expected,) = torch.autograd.grad(loss, level.codebook, retain_graph=True)
            (found,) = torch.autograd.grad(module.train()(x).commitment, mine.codebook)
            torch.testing.assert_close(found, expected)


def test_each_level_starts_from_the_residual_and_lowers_the_error():
    module = sk.nn.ResidualVectorQuantizer(4, 16, 8, decay=0.8)
    x = rows(512, 8)
    for _ in range(20):
        got = module(x)
    assert all(level.started == 1 for level in module.levels)
    errors = [F.mse_loss(module.eval().decode(module(x).indices[:, :n]), x).item() for n in range(1, 5)]
    assert all(after < 0.85 * before for before, after in itertools.pairwise(errors))
    assert (got.perplexity > 8).all()
    assert got.perplexity.shape == (4,)
    drawn = [sk.nn.ResidualVectorQuantizer(2, 4, 3, init="normal").levels[n].codebook for n in range(2)]
    assert not torch.equal(*drawn)  # levels draw different numbers


def test_a_mask_holds_at_every_level():
    x, mask = rows(40, 3), torch.arange(40) < 31
    with_mask, without = (sk.nn.ResidualVectorQuantizer(3, 4, 3, decay=0.5) for _ in range(2))
    for _ in range(3):
        got, expected = with_mask(torch.where(mask[:, None], x, 1e3), mask=mask), without(x[mask])
        assert torch.equal(got.usage, expected.usage)
        torch.testing.assert_close(got.commitment, expected.commitment)
    for one, other in zip(with_mask.levels, without.levels, strict=True):
        torch.testing.assert_close(one.codebook, other.codebook)


def test_no_rows_and_compile(compiler):
    module = sk.nn.ResidualVectorQuantizer(2, 4, 3, init="normal")
    assert module(torch.empty(0, 3)).indices.shape == (0, 2)
    torch._dynamo.reset()
    eager, compiled = (sk.nn.ResidualVectorQuantizer(2, 4, 3, decay=0.5) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend=compiler)
    for seed in range(3):
        x = rows(20, 3, seed=seed)
        for a, b in zip(step(x), eager(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: sk.nn.ResidualVectorQuantizer(0, 4, 3), ValueError, "num_levels must be at least 1; got 0"),
        (
            lambda: sk.nn.ResidualVectorQuantizer(2, 4, 3, init=torch.zeros(4, 3)),
            ValueError,
            r"init must have shape \(num_levels, num_codes, dim\) = \(2, 4, 3\); got \(4, 3\)",
        ),
        (
            lambda: sk.nn.ResidualVectorQuantizer(2, 4, 3).decode(torch.zeros(5, 3, dtype=torch.int64)),
            ValueError,
            r"indices must have shape \(..., levels\) with levels from 1 to 2; got \(5, 3\)",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match="^ResidualVectorQuantizer: " + message):
        call()
