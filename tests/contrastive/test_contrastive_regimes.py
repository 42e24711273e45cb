"""Hard regimes of the contrastive energies: large scores, half precision, large batches, collapse, no candidates."""

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_oracle import contrastive_losses
from oracle import error

import sslkernels as sk
from sslkernels.contrastive import score_tiles
from sslkernels.contrastive.score_tiles import ReferencePairs
from sslkernels.core.chunks import row_pitch

pytestmark = pytest.mark.pairwise

OP = "contrastive_energy"
ENERGIES = ("softmax", "sigmoid", "hinge")


@pytest.fixture
def small_row_blocks(monkeypatch):
    """Row blocks of 16 rows."""
    monkeypatch.setattr(score_tiles, "WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})


def gradients(function, leaves, grad_output=None):
    loss = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return loss, torch.autograd.grad(loss, wanted, grad_output)


def as_eager(case):
    """The loss by the dense formulas, in the dtype of the leaves."""

    def loss(query, key, scale, **options):
        losses, has = contrastive_losses(query, key, logit_scale=scale, **options)
        return losses.sum() / has.sum()

    return lambda *leaves: loss(*leaves, **case)


def check_against_eager(case, leaves, roundings=1.0):
    """The error against float64 is at most that of eager torch in the same dtype, plus `roundings` of the output."""
    dtype = leaves[0].dtype
    got, grads = gradients(lambda x, y, s: sk.contrastive_energy(x, y, logit_scale=s, **case), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want, want_grads = gradients(as_eager(case), exact)
    eager, eager_grads = gradients(as_eager(case), leaves)
    allowed = roundings * torch.finfo(dtype).eps
    assert error(got, want) <= error(eager, want) + 8 * torch.finfo(torch.float32).eps
    for name, one, two, three in zip(("query", "key", "scale"), grads, want_grads, eager_grads, strict=True):
        assert error(one, two) <= error(three, two) + allowed, name


def leaves_of(rows, keys, dim, dtype=torch.float32, scale=20.0, spread=1.0):
    torch.manual_seed(rows + dim)
    x = (spread * F.normalize(torch.randn(rows, dim), dim=1)).to(dtype).requires_grad_()
    y = (spread * F.normalize(torch.randn(keys, dim), dim=1)).to(dtype).requires_grad_()
    return x, y, torch.tensor(scale, requires_grad=True)


@pytest.mark.parametrize("direction", ["row", "symmetric"])
@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_several_row_blocks_in_every_dtype(backend, dtype, energy, direction, small_row_blocks):
    """Several row blocks add to the gradient of a key, in float32 even for half precision."""
    rows, keys = (37, 41) if backend == "triton" else (131, 157)
    case = {"energy": energy, "direction": direction, "normalize": True}
    check_against_eager(case, leaves_of(rows, keys, 33, dtype))


@pytest.mark.parametrize("energy", ENERGIES)
def test_options_over_several_row_blocks(backend, energy, small_row_blocks):
    torch.manual_seed(0)
    n, m = (35, 40) if backend == "triton" else (71, 83)
    case = {
        "energy": energy, "direction": "symmetric", "positive": torch.randint(0, m, (n,)), "bank": torch.randn(19, 24),
        "query_ids": torch.randint(0, 9, (n,)), "key_ids": torch.randint(0, 9, (m,)), "same_id": "positive",
    }  # fmt: skip
    if energy == "softmax":
        case["label_smoothing"] = 0.1
    x, y = torch.randn(n, 24).requires_grad_(), torch.randn(m, 24).requires_grad_()
    check_wide(case, (x, y, torch.tensor(0.5, requires_grad=True)))


def check_wide(case, leaves, rtol=1e-5):
    """Float32 against float64, relative to a gradient's norm; relative to the loss for the scale's, which cancels."""
    got, grads = gradients(lambda x, y, s: sk.contrastive_energy(x, y, logit_scale=s, **case), leaves)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want, want_grads = gradients(as_eager(wide), exact)
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)
    for one, two in zip(grads, want_grads, strict=True):
        size = two.norm() if two.dim() else torch.maximum(two.abs(), want.detach().abs())
        assert (one.double() - two).norm() < rtol * size


@pytest.mark.parametrize("direction", ["row", "column", "symmetric"])
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_scale(backend, direction, scale):
    """Temperatures of 0.01 and 0.001: scores of +-100, where exponentials with one common shift would be 0."""
    for spread in ("random", "opposite"):
        x, y, s = leaves_of(33, 33, 16, scale=scale)
        if spread == "opposite":  # the best cosine of a row is below -0.3
            with torch.no_grad():
                centre = F.normalize(torch.randn(16), dim=0)
                x.copy_(F.normalize(centre + 0.3 * x, dim=1))
                y.copy_(F.normalize(-centre + 0.3 * y, dim=1))
        check_wide({"direction": direction, "normalize": True}, (x, y, s), rtol=3e-4 if scale > 100 else 3e-5)


@pytest.mark.parametrize("direction", ["row", "column", "symmetric"])
def test_scores_without_bound(backend, direction):
    """Unnormalised features: scores of thousands, rows and columns of very different magnitude."""
    torch.manual_seed(0)
    x = (torch.randn(33, 16) * torch.logspace(-3, 2, 33)[:, None]).requires_grad_()
    y = (torch.randn(33, 16) * torch.logspace(-3, 2, 33).flip(0)[:, None]).requires_grad_()
    s = torch.tensor(1.0, requires_grad=True)
    check_wide({"direction": direction}, (x, y, s), rtol=1e-4)


def test_a_confident_pair_keeps_its_loss_and_gradient(backend):
    """40 nats ahead of 5 negatives, where logsumexp(s) - s is 0 in float32 and in float64."""
    x = (40**0.5 * torch.eye(6)).requires_grad_()
    y = (40**0.5 * torch.eye(6)).requires_grad_()
    probability = math.exp(-40)
    want = probability * 40**0.5 * (torch.ones(6, 6) - 6 * torch.eye(6)) / 6
    for direction in ("row", "column", "symmetric"):
        loss, grads = gradients(lambda x, y, d=direction: sk.contrastive_energy(x, y, direction=d), (x, y))
        torch.testing.assert_close(loss, torch.tensor(5 * probability), rtol=1e-5, atol=0)
        for grad in grads:
            torch.testing.assert_close(grad, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("energy", ENERGIES)
def test_one_query(backend, energy):
    """N = 1: no negatives, only the positive has a gradient."""
    x, y = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5, requires_grad=True)
    for direction in ("row", "column", "symmetric"):
        loss = sk.contrastive_energy(x, y, energy=energy, direction=direction)
        grad = torch.autograd.grad(loss, x)[0]
        if energy == "sigmoid":
            torch.testing.assert_close(loss, F.softplus(-(x * y).sum()))
            assert grad.abs().max() > 0
        else:
            assert loss == 0
            assert torch.equal(grad, torch.zeros_like(grad))
    loss = sk.nt_xent(x, y)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("energy", ENERGIES)
def test_all_per_query_negatives_masked(backend, energy):
    """Masked negatives may hold anything."""
    query, key = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    negatives = torch.full((4, 3, 5), float("nan"), requires_grad=True)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    loss = sk.contrastive_energy(query, key, energy=energy, negatives=negatives, negatives_mask=mask)
    want = sk.contrastive_energy(query, key, energy=energy)
    torch.testing.assert_close(loss, want)
    got, grad_negatives = torch.autograd.grad(loss, (query, negatives))
    torch.testing.assert_close(got, torch.autograd.grad(want, query)[0])
    assert torch.equal(grad_negatives, torch.zeros_like(grad_negatives))


def test_no_positive_left(backend):
    """No id occurs twice, so no row has a positive: the mean is NaN, sums and gradients are 0."""
    z = torch.randn(5, 4, requires_grad=True)
    options = {"query_ids": torch.arange(5), "key_ids": torch.arange(5), "same_id": "positive", "exclude_self": True}
    assert sk.contrastive_energy(z, z, **options).isnan()
    for reduction in ("sum", "none"):
        loss = sk.contrastive_energy(z, z, **options, reduction=reduction).sum()
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))
    _, stats = sk.contrastive_energy(z, z, **options, return_stats=True)
    assert stats.rank.tolist() == [-1] * 5
    assert stats.top1.tolist() == [0] * 5
    some = torch.tensor([0, 1, 0, 2, 3])  # two rows count
    options.update(query_ids=some, key_ids=some)
    rows = sk.contrastive_energy(z, z, **options, reduction="none")
    torch.testing.assert_close(sk.contrastive_energy(z, z, **options), rows.sum() / 2)
    assert torch.equal(rows == 0, torch.tensor([False, True, False, True, True]))


@pytest.mark.parametrize("normalize", [False, True])
def test_collapse(backend, normalize):
    """All features equal: loss log N, no gradient that separates them, and statistics that show it."""
    z = torch.ones(8, 4, requires_grad=True)
    loss, stats = sk.contrastive_energy(z, z.detach(), direction="symmetric", normalize=normalize, return_stats=True)
    torch.testing.assert_close(loss, torch.tensor(8.0).log())
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.zeros_like(z), rtol=0, atol=1e-6)
    torch.testing.assert_close(stats.uniformity, torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(stats.alignment, torch.tensor(0.0), rtol=0, atol=1e-6)
    assert stats.rank.tolist() == [3.5] * 8  # all equal: at chance
    assert stats.top1.tolist() == [1 / 8] * 8


def test_features_of_norm_zero(backend):
    """Like F.normalize: divided by the constant 1e-12; no NaN."""
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    x[2] = 0
    y[1] = 0
    leaves = (x.requires_grad_(), y.requires_grad_(), torch.tensor(3.0, requires_grad=True))
    got, grads = gradients(
        lambda x, y, s: sk.contrastive_energy(x, y, logit_scale=s, normalize=True, direction="symmetric"), leaves
    )
    want, want_grads = gradients(as_eager({"normalize": True, "direction": "symmetric"}), leaves)
    torch.testing.assert_close(got, want.float())
    for one, two in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6 * float(two.abs().max()))


def test_tiny_float16_features_normalise(backend):
    """Norms whose square underflows in float16, as the eps of 1e-12 does."""
    x = torch.randn(6, 8).half()
    small = (x * 2**-14).requires_grad_()
    loss = sk.contrastive_energy(small, x, normalize=True)
    torch.testing.assert_close(loss, sk.contrastive_energy(small.detach().float(), x.float(), normalize=True))
    assert torch.autograd.grad(loss, small)[0].isfinite().all()


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("direction", ["row", "symmetric"])
def test_nan_stays_in_its_row_or_columns(backend, energy, direction):
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    x[3, 1] = float("nan")
    rows = sk.contrastive_energy(x, y, energy=energy, direction=direction, reduction="none")
    if direction == "row" or energy == "sigmoid":
        assert rows.isnan().tolist() == [False, False, False, True, False]
    else:  # every column contains the row
        assert rows.isnan().all()


def float16_case(rows, dtype, energy):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(rows, 16), dim=1).to(dtype).requires_grad_()
    y = F.normalize(torch.randn(rows, 16), dim=1).to(dtype).requires_grad_()
    options = {"direction": "symmetric"} if energy == "softmax" else {"energy": "sigmoid", "logit_bias": -10.0}
    return x, y, {**options, "logit_scale": 10.0}


@pytest.mark.parametrize(("count", "num_items"), [(1024, 2**18), pytest.param(16384, None, marks=pytest.mark.full)])
@pytest.mark.parametrize("energy", ["softmax", "sigmoid"])
def test_float16_gradients_of_a_large_batch(energy, count, num_items):
    """Gradients in float16 with a loss scale equal the float32 gradients to float16's precision. 1 / N times a
    probability underflows in float16: 1 / N must not enter the half-precision tile."""
    loss_scale = 2.0**16
    results = {}
    for dtype in (torch.float16, torch.float32):
        x, y, options = float16_case(count, torch.float16, energy)
        x, y = x.detach().to(dtype).requires_grad_(), y.detach().to(dtype).requires_grad_()
        loss = sk.contrastive_energy(x, y, num_items=num_items, **options)
        results[dtype] = torch.autograd.grad(loss * loss_scale, (x, y))
    for half, single in zip(results[torch.float16], results[torch.float32], strict=True):
        assert half.dtype == torch.float16
        assert error(half, single) < torch.finfo(torch.float16).eps


@pytest.mark.slow
@pytest.mark.parametrize("energy", ["softmax", "sigmoid"])
def test_rows_of_a_batch_of_65536_against_float64(energy):
    """Statistics and gradients of sampled rows against a dense float64 computation of their scores."""
    count, dim, scale, bias = 65536, 16, 10.0, -10.0
    torch.manual_seed(0)
    x = F.normalize(torch.randn(count, dim), dim=1).requires_grad_()
    y = F.normalize(torch.randn(count, dim), dim=1).requires_grad_()
    sample = torch.randint(0, count, (64,))
    options = {"energy": energy, "logit_scale": scale, "logit_bias": bias if energy == "sigmoid" else None}
    loss, stats = sk.contrastive_energy(x, y, **options, return_stats=True)
    (grad,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        keys = y.double()
        scores = scale * x[sample].double() @ keys.T + (bias if energy == "sigmoid" else 0.0)
        at = torch.arange(64), sample
        if energy == "softmax":
            slope = scores.softmax(1)
            slope[at] -= 1
        else:
            slope = torch.sigmoid(scores)
            slope[at] -= 1
        want_grad = scale * slope @ keys / count
    torch.testing.assert_close(stats.lse[sample].double(), torch.logsumexp(scores, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.positive[sample].double(), scores[at], rtol=0, atol=1e-5)
    rank, near = stats.rank[sample], 1e-5  # of 65536 scores some tie to rounding
    assert ((scores > scores[at][:, None] + near).sum(1) <= rank).all()
    assert (rank <= (scores > scores[at][:, None] - near).sum(1)).all()
    assert error(grad[sample], want_grad) < 1e-5


def test_statistics(backend):
    """Against the dense scores, in every direction and energy."""
    torch.manual_seed(0)
    n, m = 9, 12
    x, y, bank, negatives = torch.randn(n, 5), torch.randn(m, 5), torch.randn(4, 5), torch.randn(n, 3, 5)
    positive = torch.randint(0, m, (n,))
    mask = torch.rand(n, 3) < 0.5
    scores = 2.0 * torch.cat([x @ y.T, x @ bank.T, torch.einsum("nd,nkd->nk", x, negatives)], 1) - 1.0
    scores[:, m + 4 :].masked_fill_(~mask, float("-inf"))
    at = scores[torch.arange(n), positive]
    cosine = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    pair = torch.zeros(n, m, dtype=torch.bool)
    pair[torch.arange(n), positive] = True
    for energy, direction in (
        ("softmax", "row"),
        ("softmax", "symmetric"),
        ("softmax", "column"),
        ("sigmoid", "row"),
        ("hinge", "symmetric"),
    ):
        options = {"negatives": negatives, "negatives_mask": mask, "bank": bank}
        if direction == "column":  # negatives and bank count in the row direction only
            options, here = {}, scores[:, :m]
        else:
            here = scores
        _, stats = sk.contrastive_energy(
            x, y, positive=positive, energy=energy, direction=direction, logit_scale=2.0, logit_bias=-1.0,
            return_stats=True, **options,
        )  # fmt: skip
        torch.testing.assert_close(stats.lse, torch.logsumexp(here, 1))
        torch.testing.assert_close(stats.positive, at)
        assert stats.rank.tolist() == (here > at[:, None]).sum(1).tolist()
        assert stats.top1.tolist() == (stats.rank == 0).float().tolist()
        torch.testing.assert_close(stats.alignment, (2 - 2 * cosine[pair]).mean())
        torch.testing.assert_close(stats.uniformity, (-2 * (2 - 2 * cosine[~pair])).exp().mean().log())


def test_statistics_of_supervised_pairs(backend):
    """`positive` is the mean over all positives, and only negatives count in `rank`."""
    ids = torch.tensor([0, 1, 0, 1, 0, 2])
    z = torch.randn(6, 3)
    _, stats = sk.contrastive_energy(
        z, z, query_ids=ids, same_id="positive", exclude_self=True, return_stats=True, energy="softmax"
    )
    scores = z @ z.T
    same = (ids[:, None] == ids) & ~torch.eye(6, dtype=torch.bool)
    for i in range(5):
        torch.testing.assert_close(stats.positive[i], scores[i][same[i]].mean())
        following = next(j for j in [*range(i + 1, 6), *range(i)] if ids[j] == ids[i])
        negatives = scores[i][(ids != ids[i])]
        assert stats.rank[i] == (negatives > scores[i, following]).sum()
    assert stats.rank[5] == -1


def test_duplicates_are_no_negatives_by_their_ids(backend):
    """With the same text twice in a batch and no ids, one copy is a negative of the other's image."""
    text = torch.randn(4, 8)
    text[3] = text[0]
    image = (text + 0.01 * torch.randn(4, 8)).requires_grad_()
    ids = torch.tensor([7, 1, 2, 7])
    with_ids = sk.contrastive_energy(image, text, normalize=True, logit_scale=20.0, query_ids=ids, key_ids=ids)
    without = sk.contrastive_energy(image, text, normalize=True, logit_scale=20.0)
    assert with_ids < 0.1 < without
    assert math.isclose(float(without.detach()), 0.5 * math.log(2), rel_tol=0.2)


def test_positives_in_a_queue_are_no_negatives_by_their_ids(backend):
    """The queue contains keys of the batch: appended to the keys, they are left out by their ids."""
    query, key, queue = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(6, 8)
    queue[2], queue[5] = key[1], key[3]
    ids, queue_ids = torch.arange(4), torch.tensor([10, 11, 1, 12, 13, 3])
    keys, key_ids = torch.cat([key, queue]), torch.cat([ids, queue_ids])
    rows = sk.contrastive_energy(query, keys, query_ids=ids, key_ids=key_ids, reduction="none")
    for i in range(4):
        others = torch.cat([key, queue[queue_ids != i]])
        want = F.cross_entropy(query[i] @ others.T, torch.tensor(i))
        torch.testing.assert_close(rows[i], want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_direction_without_loss_adds_no_nan(backend, dtype):
    """Scores near 88 and 177: the exponential of the direction that is not wanted overflows."""
    x = torch.linspace(-30, 30, 64)[:, None].to(dtype).requires_grad_()
    y = torch.linspace(30, -30, 64)[:, None].to(dtype).requires_grad_()
    for direction in ("row", "column"):
        loss = sk.contrastive_energy(x, y, direction=direction)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_duplicates_of_the_positive_are_its_rivals(backend, dtype, normalize):
    """They have its score, but for the rounding of a matmul of another shape."""
    x = torch.randn(33, 100).to(dtype)
    y = (x + 0.1 * torch.randn(33, 100).to(dtype)).contiguous()
    options = {"normalize": normalize, "logit_scale": 20.0, "return_stats": True}
    _, stats = sk.contrastive_energy(x, y, bank=y.clone(), negatives=y[:, None].clone(), **options)
    assert ((stats.rank >= 0) & (stats.rank <= 2)).all()
    same = x[:1].expand(33, 100).contiguous()
    _, stats = sk.contrastive_energy(same, same.clone(), **options)
    assert abs(stats.rank.mean() - 16) <= 1
    assert stats.uniformity <= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_symmetric_scores_over_several_row_blocks(backend, dtype, small_row_blocks):
    """NT-Xent: each product above the diagonal blocks serves two rows."""
    z0, z1 = torch.randn(37, 9, dtype=dtype, requires_grad=True), torch.randn(37, 9, dtype=dtype, requires_grad=True)
    temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    leaves = (z0, z1, temperature)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = F.normalize(torch.cat(exact[:2]), dim=1)
    scores = (z @ z.T / exact[2]).masked_fill(torch.eye(74, dtype=torch.bool), float("-inf"))
    want = F.cross_entropy(scores, torch.arange(74).roll(37))
    loss = sk.nt_xent(z0, z1, temperature=temperature)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=0)
    for got, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, exact), strict=True):
        assert error(got, true) < rtol


@pytest.fixture
def products_computed(monkeypatch):
    """The shapes of the tiles of products that are computed, in order."""
    shapes = []
    begin = ReferencePairs.begin

    def counted(self, tile):
        shapes.append(tuple(tile.products.shape))
        begin(self, tile)

    monkeypatch.setattr(ReferencePairs, "begin", counted)
    with sk.use_backend("reference"):
        yield shapes


def test_products_that_fit_the_workspace_are_computed_once(products_computed):
    x, y = (torch.randn(64, 8, requires_grad=True) for _ in range(2))
    sk.clip_loss(x, y, 10.0).backward()
    assert products_computed == [(64, 64)]


def test_the_second_pass_begins_with_the_products_in_memory(products_computed, monkeypatch):
    monkeypatch.setitem(score_tiles.WORKSPACE_BYTES, "cpu", 16 * row_pitch(64) * 4)
    x, y = (torch.randn(64, 8, requires_grad=True) for _ in range(2))
    sk.clip_loss(x, y, 10.0).backward()
    assert products_computed == [(16, 64)] * (4 + 3)
    products_computed.clear()
    sk.info_nce(x, y, temperature=0.1).backward()  # over rows: one pass
    assert products_computed == [(16, 64)] * 4


def test_symmetric_scores_are_kept_as_a_triangle(products_computed):
    x, y = (torch.randn(512, 8, requires_grad=True) for _ in range(2))
    triangle = [(512, 512)] * 3  # two on the diagonal, one for both others
    sk.nt_xent(x, y).backward()
    assert products_computed == triangle
    products_computed.clear()
    sk.nt_xent(x.detach(), y.detach())
    assert products_computed == triangle


@pytest.mark.parametrize("direction", ["row", "symmetric"])
def test_float16_gradients_of_a_loss_that_counts_nothing_are_zero(backend, direction):
    """float16 gradients are held relative to the largest coefficient, which is 0 here."""
    x, y = (torch.randn(5, 8, dtype=torch.float16, requires_grad=True) for _ in range(2))
    options = {"direction": direction, "row_weight": torch.zeros(5)}
    for loss in (
        sk.contrastive_energy(x, y, reduction="sum", **options),
        0 * sk.contrastive_energy(x, y, direction=direction, reduction="none").sum(),
    ):
        grads = torch.autograd.grad(loss, (x, y))
        assert not any(grad.any() for grad in grads)


SHARED = torch.tensor([0, 0, 1, 1, 2, 3])
OPTIONS = {
    "row": {"direction": "row"},
    "column": {"direction": "column"},
    "symmetric": {"direction": "symmetric", "label_smoothing": 0.1},
    "shared": {"direction": "symmetric", "positive": SHARED},
    "ids": {"direction": "column", "query_ids": SHARED, "key_ids": SHARED, "same_id": "positive"},
    "itself": {"positive": torch.tensor([3, 4, 5, 0, 1, 2]), "exclude_self": True},
    "bank": {"bank": 4},
    "negatives": {"negatives": 3},
    "indices": {"negatives": torch.tensor([[1, 2, 3], [2, 3, -1], [0, 0, 4], [5, 1, 2], [-1, -1, -1], [3, 1, 0]])},
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_keep_their_digits_where_scores_are_large(name, reduction, backend, device):
    """A log-sum-exp of 1536, rounded to float32, is off by up to 6e-5, and so is each probability from it."""
    generator = torch.Generator().manual_seed(3)

    def features(*shape):  # whose scores are exact in float32
        return (torch.randn(*shape, generator=generator) * 8).round().div(8).to(device)

    options = {key: value.to(device) if torch.is_tensor(value) else value for key, value in OPTIONS[name].items()}
    leaves = [features(6, 4), features(6, 4)]
    for key, shape in (("bank", (4, 4)), ("negatives", (6, 3, 4))):
        if isinstance(options.get(key), int):
            options[key] = features(*shape)
    if options.get("exclude_self"):
        leaves = leaves[:1]

    def grads(dtype):
        of = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        floats = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
        loss = sk.contrastive_energy(of[0], of[-1], logit_bias=1536.0, reduction=reduction, **floats)
        return torch.autograd.grad(loss.sum(), of)

    with sk.use_backend(backend):
        got = grads(torch.float32)
    with sk.use_backend("reference"):
        want = grads(torch.float64)
    for one, two in zip(got, want, strict=True):
        assert error(one, two) < 5e-7
