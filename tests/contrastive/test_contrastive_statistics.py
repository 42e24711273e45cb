"""Statistics of the contrastive energies where they matter: at and near collapse, with features of zeros, whatever ids
say, in half precision, against float64 on the dense scores."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk

pytestmark = pytest.mark.pairwise

OP = "contrastive_energy"


def ranks(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """(rank, top1) by the scores (N, M), -inf where a key is no candidate."""
    at = scores[torch.arange(len(positive)), positive][:, None]
    above, equal = (scores > at).sum(1), (scores == at).sum(1) - 1
    return above + equal / 2, torch.where(above == 0, 1 / (1 + equal), 0)


def distances(x: Tensor, y: Tensor, positive: Tensor, itself: bool = False) -> tuple[Tensor, Tensor]:
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    squares = (x[:, None] - y).square().sum(2)
    pair = torch.zeros(squares.shape, dtype=torch.bool)
    pair[torch.arange(len(positive)), positive] = True
    others = ~pair & ~torch.eye(*squares.shape, dtype=torch.bool) if itself else ~pair
    return squares[pair].mean(), (-2 * squares[others]).exp().mean().log()


def statistics(x, y, **options):
    _, stats = sk.contrastive_energy(x, y, return_stats=True, **options)
    assert stats.rank.is_floating_point()
    assert stats.top1.is_floating_point()
    return stats


@pytest.mark.full_for(backend="triton", dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
@pytest.mark.parametrize("normalize", [True, False])
def test_at_collapse_the_ranks_are_at_chance(backend, dtype, energy, normalize):
    """All features are the same, so that all scores are equal, in tiles, banks and per-query negatives alike."""
    torch.manual_seed(0)
    feature = torch.randn(33).to(dtype)
    count, banked, own = 64, 128, 4
    x = feature.expand(count, 33).contiguous()
    options = {"energy": energy, "normalize": normalize, "logit_scale": 3.7, "logit_bias": -0.3}
    alone = statistics(x, x.clone(), **options)
    assert alone.rank.tolist() == [(count - 1) / 2] * count
    torch.testing.assert_close(alone.top1, torch.full((count,), 1 / count))
    torch.testing.assert_close(alone.uniformity, torch.tensor(0.0), rtol=0, atol=1e-6)
    others = {"bank": feature.expand(banked, 33).contiguous(), "negatives": feature.expand(count, own, 33).contiguous()}
    more = statistics(x, x.clone(), **others, **options)
    rivals = count - 1 + banked + own
    assert more.rank.tolist() == [rivals / 2] * count
    torch.testing.assert_close(more.top1, torch.full((count,), 1 / (rivals + 1)))
    own_alone = statistics(x, x.clone(), in_batch=False, negatives=others["negatives"], **options)
    assert own_alone.rank.tolist() == [own / 2] * count


def test_ranks_do_not_depend_on_tiles(monkeypatch):
    """Rows of several tiles, whose positive is in one of them."""
    from sslkernels.contrastive import score_tiles, steps

    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randn(700, 16)
    positive = torch.randint(0, 700, (64,))
    y[5], y[600] = y[int(positive[0])], y[int(positive[1])]  # equal to a positive
    options = {"positive": positive, "direction": "symmetric", "return_stats": True}
    _, want = sk.contrastive_energy(x, y, **options)
    rank, top1 = ranks(x.double() @ y.double().T, positive)
    torch.testing.assert_close(want.rank, rank.float())
    torch.testing.assert_close(want.top1, top1.float())
    assert want.rank[0] % 1 == 0.5
    monkeypatch.setitem(score_tiles.WORKSPACE_BYTES, "cpu", 100_000)
    monkeypatch.setattr(score_tiles, "TILE_COLUMNS", 128)
    assert steps.workspace_bytes(x) == 100_000
    _, stats = sk.contrastive_energy(x, y, **options)
    torch.testing.assert_close(tuple(stats), tuple(want))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dead", [1.0, 0.5])
def test_features_of_zeros_are_points(backend, dead, normalize):
    torch.manual_seed(0)
    x, y = torch.randn(10, 6), torch.randn(12, 6)
    x[: int(dead * 10)] = 0
    y[: int(dead * 12)] = 0
    positive = torch.randperm(12)[:10]
    stats = statistics(x, y, positive=positive, normalize=normalize)
    alignment, uniformity = distances(x, y, positive)
    torch.testing.assert_close(stats.alignment.double(), alignment, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.uniformity.double(), uniformity, rtol=1e-5, atol=1e-6)
    if dead == 1.0:
        assert stats.alignment == 0
        assert stats.uniformity.abs() < 1e-6


@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_ids_do_not_matter_for_alignment_and_uniformity(backend, energy):
    """With one id for all nothing is a negative, and the features collapse: uniformity must show it."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 6), torch.randn(9, 6)
    positive = torch.arange(9)
    for ids in (torch.zeros(9, dtype=torch.int64), torch.arange(9) // 3):
        for same_id in ("ignore", "positive"):
            stats = statistics(x, y, query_ids=ids, key_ids=ids, same_id=same_id, energy=energy)
            torch.testing.assert_close(
                [v.double() for v in stats[-2:]], list(distances(x, y, positive)), rtol=1e-5, atol=1e-6
            )
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 0])
    partner = torch.tensor([1, 8, 3, 2, 5, 4, 7, 6, 0])
    stats = statistics(x, x, query_ids=ids, same_id="positive", exclude_self=True, energy=energy)
    torch.testing.assert_close(
        [v.double() for v in stats[-2:]], list(distances(x, x, partner, itself=True)), rtol=1e-5, atol=1e-6
    )


def test_keys_that_are_no_candidates_count_in_uniformity(backend):
    torch.manual_seed(0)
    x, y, bank = torch.randn(7, 6), torch.randn(9, 6), torch.randn(20, 6)
    positive = torch.randperm(9)[:7]
    for options in ({"bank": bank}, {"negatives": torch.randn(7, 3, 6)}):
        stats = statistics(x, y, positive=positive, in_batch=False, **options)
        torch.testing.assert_close(
            [v.double() for v in stats[-2:]], list(distances(x, y, positive)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_rows_of_a_column_loss_with_given_positives(backend, energy):
    """The columns of a hinge over positives that rows may share are pairs; statistics are over keys all the same."""
    query, key = torch.randn(5, 4), torch.randn(5, 4)
    options = {"energy": energy, "direction": "column"}
    plain = statistics(query, key, **options)
    given = statistics(query, key, positive=torch.arange(5), **options)
    for got, expected in zip(given, plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_query_without_a_positive(backend):
    torch.manual_seed(0)
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    positive = torch.tensor([0, -1, 2, 4, -1])
    for energy in ("softmax", "sigmoid", "hinge"):
        stats = statistics(x, y, positive=positive, energy=energy)
        has = positive >= 0
        rank, top1 = ranks((x @ y.T)[has], positive[has])
        torch.testing.assert_close(stats.rank[has], rank)
        torch.testing.assert_close(stats.top1[has], top1)
        assert stats.rank[~has].tolist() == ([-1, -1] if energy != "sigmoid" else stats.rank[~has].tolist())
        assert stats.top1[~has].tolist() == [0, 0]


@pytest.mark.full_for(dtype=torch.float32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_collapses_is_seen_at_every_step(dtype):
    """Attraction alone draws the features of digits together; the statistics follow float64 all the way."""
    datasets = pytest.importorskip("sklearn.datasets")
    torch.manual_seed(0)
    images = torch.tensor(datasets.load_digits().data[:256], dtype=torch.float32) / 16 - 0.3
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
    everyone = torch.zeros(256, dtype=torch.int64)
    seen = []
    for step in range(60):
        x, y = (encoder(images + 0.3 * torch.randn_like(images)) for _ in range(2))
        (2 - 2 * F.cosine_similarity(x, y, dim=1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4:
            continue
        x, y = (F.normalize(t.detach(), dim=1).to(dtype) for t in (x, y))
        stats = statistics(x, y, normalize=True, logit_scale=10.0)
        _, with_ids = sk.contrastive_energy(
            x, y, normalize=True, logit_scale=10.0, query_ids=everyone, key_ids=everyone, return_stats=True
        )
        scores = F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T
        rank, top1 = ranks(scores, torch.arange(256))
        alignment, uniformity = distances(x, y, torch.arange(256))
        torch.testing.assert_close(stats.rank.mean(), rank.mean(), rtol=0.05, atol=1.0)
        assert abs(stats.top1.mean() - top1.mean()) < 0.02
        for found in (stats, with_ids):
            torch.testing.assert_close(found.alignment.double(), alignment, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.uniformity.double(), uniformity, rtol=1e-4, atol=1e-5)
        seen.append(stats)
    assert seen[0].uniformity < -0.1
    assert seen[-1].uniformity > -0.05
