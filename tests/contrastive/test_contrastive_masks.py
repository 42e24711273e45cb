"""Masks of candidates: pairs, keys and rows of the bank, against dense scores in float64."""

import pytest
import torch
from contrastive_oracle import contrastive_losses
from oracle import error
from test_contrastive import DEFAULTS, check

import sslkernels as sk
from benchmarks import memory
from sslkernels.contrastive import score_tiles

OP = "contrastive_energy"
# Together they have each energy, direction and mask with what shares code with it.
CASES = {
    "plain": {"masks": "pairs"},
    "smooth": {"masks": "pairs", "direction": "symmetric", "label_smoothing": 0.2, "exclude_self": True},
    "supervised": {"masks": "columns", "direction": "symmetric", "ids": "few", "same_id": "positive"},
    "shared": {"masks": "pairs", "direction": "symmetric", "positive": "duplicated", "ids": "few"},
    "sigmoid": {"masks": "pairs", "energy": "sigmoid", "bias": "tensor", "bank": 5, "normalize": True},
    "hinge": {"masks": "columns", "energy": "hinge", "direction": "symmetric", "bank": 5, "bank_ids": "also"},
    "hinge of pairs": {"masks": "pairs", "energy": "hinge", "direction": "symmetric", "positive": "missing"},
    "frozen": {"masks": "columns", "frozen": "key", "bank": 5, "negatives": "masked", "reduction": "none"},
}


@pytest.mark.parametrize("name", CASES)
def test_masks_over_several_row_blocks(backend, name, monkeypatch):
    monkeypatch.setattr(score_tiles, "WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})
    case = {**DEFAULTS, "shape": "square", **CASES[name]}
    if case["exclude_self"]:
        case["positive"] = "permuted"
    if case["bank_ids"]:
        case["ids"] = "few"
    rows = 19 if backend == "triton" else 37
    check(case, torch.float32, 3e-5, n=rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_in_half_precision(backend, dtype):
    torch.manual_seed(0)
    x, y = (torch.randn(21, 24).to(dtype).requires_grad_() for _ in range(2))
    mask, keys = torch.rand(21, 21) < 0.5, torch.rand(21) < 0.7
    options = {"direction": "symmetric", "candidate_mask": mask, "key_mask": keys, "normalize": True}
    loss = sk.contrastive_energy(x, y, logit_scale=5.0, **options)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, y)]
    want = contrastive_losses(*exact, logit_scale=5.0, **options)[0].mean()
    assert error(loss, want) <= torch.finfo(dtype).eps
    for got, grad in zip(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(want, exact), strict=True):
        assert error(got, grad) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_a_row_with_its_positive_alone(backend, energy):
    """Only its pair has a loss, and the gradients of the pairs that are left out are 0."""
    x, y, bank = (torch.randn(n, 5, requires_grad=True) for n in (4, 6, 3))
    options = {"candidate_mask": torch.zeros(4, 6, dtype=torch.bool), "bank_mask": torch.zeros(3, dtype=torch.bool)}
    scores = (x.detach() * y.detach()[:4]).sum(1)
    rows, stats = sk.contrastive_energy(
        x, y, bank=bank, energy=energy, direction="row", reduction="none", return_stats=True, **options
    )
    want = -torch.nn.functional.logsigmoid(scores) if energy == "sigmoid" else torch.zeros(4)
    torch.testing.assert_close(rows.detach(), want)
    torch.testing.assert_close(stats.lse, scores)
    assert stats.rank.tolist() == [0.0] * 4
    of_x, of_y, of_bank = torch.autograd.grad(rows.sum(), (x, y, bank))
    assert (of_y[4:] == 0).all()
    assert (of_bank == 0).all()
    assert (of_x != 0).any() == (energy == "sigmoid")


@pytest.mark.parametrize(("normalize", "reduction"), [(False, "mean"), (True, "none")])
def test_masked_features_may_hold_anything(backend, normalize, reduction):
    """Padded keys and rows of a bank; in a mask of pairs it touches gradients, but no loss."""
    torch.manual_seed(0)
    x, y, bank = (torch.randn(n, 5, requires_grad=True) for n in (4, 7, 3))
    keys, banked = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool(), torch.tensor([1, 0, 1]).bool()
    options = {"direction": "symmetric", "normalize": normalize, "key_mask": keys, "bank_mask": banked}
    options |= {"reduction": reduction, "return_stats": False}
    want = sk.contrastive_energy(x, y, bank=bank, **options)
    want_grads = torch.autograd.grad(want.sum(), (x, y, bank))
    with torch.no_grad():
        garbage = [y.clone(), bank.clone()]
        garbage[0][5, 2], garbage[1][1] = float("nan"), float("inf")
    garbage = [g.requires_grad_() for g in garbage]
    got = sk.contrastive_energy(x, garbage[0], bank=garbage[1], **options)
    torch.testing.assert_close(got, want)
    for grad, want_grad in zip(torch.autograd.grad(got.sum(), (x, *garbage)), want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[:, 5] = False
    pairs = sk.contrastive_energy(x, garbage[0], candidate_mask=mask, normalize=normalize, reduction=reduction)
    assert pairs.isfinite().all()


def test_statistics_respect_the_masks(backend):
    torch.manual_seed(0)
    x, y = torch.randn(9, 5), torch.randn(11, 5)
    mask, keys = torch.rand(9, 11) < 0.6, torch.rand(11) < 0.7
    _, stats = sk.contrastive_energy(x, y, candidate_mask=mask, key_mask=keys, return_stats=True)
    _, plain = sk.contrastive_energy(x, y, return_stats=True)
    pairs = (mask & keys) | torch.eye(9, 11, dtype=torch.bool)
    scores = torch.where(pairs, x @ y.T, float("-inf"))
    torch.testing.assert_close(stats.lse, scores.logsumexp(1))
    assert torch.equal(stats.rank, (scores > scores.diagonal()[:, None]).sum(1).float())
    assert torch.equal(stats.top1, (stats.rank == 0).float())
    torch.testing.assert_close(stats.positive, plain.positive)
    torch.testing.assert_close((stats.alignment, stats.uniformity), (plain.alignment, plain.uniformity))


def test_sizes_of_zero_and_one(backend):
    x, y = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5)
    mask = torch.zeros(1, 1, dtype=torch.bool)
    assert sk.contrastive_energy(x, y, candidate_mask=mask, direction="symmetric") == 0
    none = {"candidate_mask": mask[:0], "key_mask": mask[0], "label_smoothing": 0.1, "on_empty": "zero"}
    loss = sk.contrastive_energy(x[:0], y, **none, direction="symmetric")
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_masks_in_a_compiled_graph():
    x, y = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    masks = {"candidate_mask": (torch.rand(6, 6) < 0.5).t(), "key_mask": torch.rand(6) < 0.7}
    module = sk.nn.ContrastiveLoss(direction="symmetric", label_smoothing=0.1)
    want = module(x, y, **masks)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(x, y, **masks)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)))


@pytest.mark.parametrize(("strides", "options"), [("transposed", {"label_smoothing": 0.1}), ("expanded", {})])
def test_a_mask_of_pairs_is_not_copied(strides, options):
    """Peak memory beyond gradients and workspace is less than a copy of the mask (16 MiB)."""
    rows, dim = 4096, 8
    mask = torch.ones(1, rows, dtype=torch.bool).expand(rows, rows) if strides == "expanded" else None
    mask = torch.ones(rows, rows, dtype=torch.bool).t() if mask is None else mask
    x, y = (torch.randn(rows, dim, requires_grad=True) for _ in range(2))

    def run():
        loss = sk.contrastive_energy(x, y, candidate_mask=mask, direction="symmetric", **options)
        return torch.autograd.grad(loss, (x, y))

    with sk.use_backend("cpu"):
        peak, grads = memory.peak_extra(run, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak - sum(grad.nbytes for grad in grads) - score_tiles.WORKSPACE_BYTES["cpu"] < 8 << 20
