"""nn.VectorQuantizer: its state is in its buffers alone, whatever way they were filled."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import sslkernels as sk


def batches(count, rows=64, dim=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, dim, generator=generator) for _ in range(count)]


def trained(**options):
    module = sk.nn.VectorQuantizer(8, 4, decay=0.9, seed=-3, **options)
    for x in batches(4):
        module(x)
    return module


def copied(state, fresh):
    for name, value in fresh.state_dict().items():
        value.copy_(state[name])
    return fresh


def through_data(state, fresh):
    for name, value in fresh.state_dict().items():
        value.data.copy_(state[name])
    return fresh


def assigned(state, fresh):
    fresh.load_state_dict(state, assign=True)
    return fresh


def set_as_buffers(state, fresh):
    for name in state:
        setattr(fresh, name, state[name].clone())
    return fresh


WAYS = {f.__name__: f for f in (copied, through_data, assigned, set_as_buffers)}


@pytest.mark.parametrize("way", WAYS)
def test_a_module_continues_however_its_buffers_were_filled(way):
    module = trained()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fresh = WAYS[way](state, sk.nn.VectorQuantizer(8, 4, decay=0.9, seed=5))
    for x in batches(6)[4:]:
        assert all(map(torch.equal, module(x), fresh(x)))
    for name, value in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    # And one that had not started starts, though the module it is copied into had.
    unstarted = sk.nn.VectorQuantizer(8, 4, decay=0.9, seed=-3)
    other = WAYS[way]({k: v.clone() for k, v in unstarted.state_dict().items()}, trained())
    x = batches(1)[0]
    assert all(map(torch.equal, unstarted(x), other(x)))


def test_functional_call_takes_the_state_that_it_is_given():
    module, fresh = trained(), sk.nn.VectorQuantizer(8, 4, decay=0.9)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    x = batches(5)[4]
    got, expected = torch.func.functional_call(fresh, state, (x,)), module(x)
    assert all(map(torch.equal, got, expected))
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value)
        assert torch.equal(fresh.state_dict()[name], before[name])


def test_every_buffer_can_be_averaged():
    module = sk.nn.VectorQuantizer(8, 4, decay=0.9, seed=2**63 + 12345)
    averaged = AveragedModel(module, use_buffers=True)
    assert all(buffer.is_floating_point() for buffer in module.buffers())
    for x in batches(5):
        module(x)
        averaged.update_parameters(module)
    assert averaged.module.started > 0
    assert torch.equal(averaged.module.seed, module.seed)
    before = averaged.module.codebook.clone()
    x = batches(6)[5]
    got = averaged.train()(x)
    assert torch.equal(got.values, before[got.indices])


def test_a_state_in_half_precision_raises():
    module = trained()
    half = {name: value.bfloat16() for name, value in module.state_dict().items()}
    loaded = sk.nn.VectorQuantizer(8, 4, decay=0.9)
    loaded.load_state_dict(half, assign=True)
    with pytest.raises(TypeError, match=r"^VectorQuantizer: buffer 'codebook' must be float32 or float64 in training"):
        loaded(batches(1)[0])
    loaded.eval()(batches(1)[0])
    loaded = sk.nn.VectorQuantizer(8, 4, decay=0.9)
    loaded.load_state_dict(half)  # copied into float32
    loaded(batches(1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_changes_no_draw(dtype):
    """The number of the step and the seed stay exact."""
    module = trained().to(dtype)
    with torch.no_grad():
        module.steps.fill_(2**40 + 1)
    module.steps.add_(1)
    assert module.to(dtype).steps == 2**40 + 2
    assert torch.equal(module.seed.double(), trained().seed.double())


def test_a_dead_code_wakes_within_a_hundred_steps():
    """Data that moved away from all codes but one."""
    module = sk.nn.VectorQuantizer(16, 4, seed=1)
    for x in batches(150):
        module(x)
    moved = [10 + x for x in batches(100)]
    for x in moved:
        got = module(x)
    assert (got.usage > 0).sum() >= 12


def test_rows_outside_the_mask_are_as_if_they_were_not_there():
    modules = [sk.nn.VectorQuantizer(8, 4, decay=0.5, revive_below=0.6, init=init) for init in ["data", "kmeans"] * 2]
    generator = torch.Generator().manual_seed(0)
    for x in batches(5):
        bad = torch.cat([x, 100 * torch.randn(9, 4, generator=generator)])
        mask = torch.arange(73) < 64
        for with_mask, without in zip(modules[:2], modules[2:], strict=True):
            got, expected = with_mask(bad, mask=mask), without(x)
            assert torch.equal(got.values[:64], expected.values)
            assert torch.equal(got.usage, expected.usage)
            torch.testing.assert_close(got.commitment, expected.commitment)
            assert got.indices.shape == (73,)
            for name, value in without.state_dict().items():
                assert torch.equal(with_mask.state_dict()[name], value)
            evaluated = with_mask.eval()(bad, mask=mask)
            assert evaluated.usage.sum() == 64
            with_mask.train()


def test_a_masked_first_batch_starts_nothing():
    module = sk.nn.VectorQuantizer(8, 4)
    x = batches(1)[0]
    module(x, mask=torch.zeros(64, dtype=torch.bool))
    assert module.started == 0
    module(x)
    assert module.started == 1


def test_kmeans_starts_from_distant_rows():
    """One row of each of eight clusters, of which one has most of the rows."""
    generator = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(8, 4, generator=generator)
    which = torch.cat([torch.zeros(500, dtype=torch.int64), torch.arange(1, 8).repeat(4)])
    x = centers[which] + 0.01 * torch.randn(len(which), 4, generator=generator)
    found = []
    for seed in (0, 1):
        one, other = (sk.nn.VectorQuantizer(8, 4, init="kmeans", decay=None, seed=seed) for _ in range(2))
        got = one(x)
        other(x)
        assert torch.equal(one.codebook, other.codebook)
        assert (one.codebook.detach()[:, None] == x).all(2).any(1).all()
        assert set(which[torch.cdist(one.codebook.detach(), x).argmin(1)].tolist()) == set(range(8))
        assert (got.usage > 0).all()
        found.append(one.codebook.detach())
    assert not torch.equal(*found)
    few = sk.nn.VectorQuantizer(8, 4, init="kmeans", decay=None)
    few(x[:3])
    assert len(few.codebook.detach().unique(dim=0)) == 3


@pytest.mark.full
def test_kmeans_draws_by_squared_distance():
    """Rows at 0, 1 and 3: after 0 the second is 3 with probability 9/10, after 1 with 4/5, after 3 never."""
    rows, counts = torch.tensor([[0.0], [1.0], [3.0]]), torch.zeros(3, 3)
    for seed in range(3000):
        module = sk.nn.VectorQuantizer(2, 1, init="kmeans", decay=None, seed=seed)
        module(rows)
        first, second = (int((rows[:, 0] == code).nonzero()) for code in module.codebook.detach()[:, 0])
        counts[first, second] += 1
    total = counts.sum(1)
    truth = torch.tensor([[0, 0.1, 0.9], [0.2, 0, 0.8], [9 / 13, 4 / 13, 0]])
    error = 4.5 * (truth * (1 - truth) / total[:, None]).sqrt()
    assert ((counts / total[:, None] - truth).abs() <= error).all()
    assert ((total / 3000 - 1 / 3).abs() <= 4.5 * (2 / 9 / 3000) ** 0.5).all()


@pytest.mark.parametrize("make", [sk.nn.VectorQuantizer, lambda *a, **k: sk.nn.ResidualVectorQuantizer(2, *a, **k)])
def test_decode_gives_the_codes(make):
    module = make(8, 4).eval()
    x = batches(1)[0].unflatten(0, (8, 8))
    got = module(x)
    torch.testing.assert_close(module.decode(got.indices), got.values)
    torch.testing.assert_close(module.decode(got.indices.int()), got.values)
    for bad, kind in ((got.indices + 100, ValueError), (got.indices - 100, ValueError), (x, TypeError)):
        with pytest.raises(kind, match=r"Quantizer: indices must"):
            module.decode(bad)


def test_a_module_round_trips_through_pickle():
    module = trained()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded, twin = torch.load(file, weights_only=False), copy.deepcopy(module)
    x = batches(5)[4]
    expected = module(x)
    assert all(map(torch.equal, loaded(x), expected))
    assert all(map(torch.equal, twin(x), expected))
