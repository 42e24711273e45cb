"""The losses of sentence-transformers, open_clip and lightly, and diffusers' posterior: the numbers of the library."""

from __future__ import annotations

import doctest
import importlib
import itertools
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from integrations_peers import integration, needs, ran_in_two_ranks
from torch.nn.functional import normalize

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def leaves(*shapes: tuple[int, ...], unit: bool = False, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return [(normalize(each, dim=-1) if unit else each).requires_grad_() for each in drawn]


def assert_same(fused: Any, own: Any, tensors: list[torch.Tensor]) -> None:
    """`fused()` and `own()` are equal, and so are their gradients."""
    results = []
    for function in (own, fused):
        for tensor in tensors:
            tensor.grad = None
        loss = function()
        (3 * loss).sum().backward()
        results.append([loss.detach(), *(tensor.grad for tensor in tensors)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Encoder(torch.nn.Sequential):
    """Stands for a SentenceTransformer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(6, 5))

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": super().forward(features["x"])}


DIRECTIONS = [
    ("query_to_doc", *rest)
    for count in range(4)
    for rest in itertools.combinations(("doc_to_query", "query_to_query", "doc_to_doc"), count)
]


def ranking(cached: bool, fused: bool, **options: Any) -> torch.nn.Module:
    needs("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses as own

    import sslkernels.integrations.sentence_transformers as ours

    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    return getattr(ours if fused else own, name)(Encoder(), **options)


def ranked(loss: torch.nn.Module, columns: int, rows: int = 7) -> list[torch.Tensor]:
    features = [{"x": x} for x in torch.randn(columns, rows, 6, generator=torch.Generator().manual_seed(1))]
    value = loss(features, None)
    value.backward()
    return [value.detach(), loss.model[0].weight.grad, loss.model[0].bias.grad]


@pytest.mark.parametrize("partition_mode", ["joint", "per_direction"])
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_ranking_losses(cached, columns, partition_mode):
    options: dict[str, Any] = {"mini_batch_size": 3} if cached else {}
    for directions in DIRECTIONS:
        if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & {*directions}:
            continue
        options |= {"directions": directions, "partition_mode": partition_mode}
        covered = "doc_to_doc" not in directions or "doc_to_query" in directions
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = ranked(ranking(cached, True, **options), columns)
        assert bool(caught) == (not covered), directions
        for one, other in zip(actual, ranked(ranking(cached, False, **options), columns), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE, msg=str(directions))


@pytest.mark.parametrize("cached", [False, True])
def test_options_of_ranking_losses_that_the_library_computes(cached):
    from sentence_transformers.util import dot_score

    def manhattan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(a, b, p=1)

    for options, warned in (
        ({"similarity_fct": dot_score, "scale": 1.0}, 0),
        ({"hardness_mode": "all_negatives", "hardness_strength": 2.0}, 1),
        ({"hardness_mode": "hard_negatives", "hardness_strength": 2.0, "directions": DIRECTIONS[1]}, 1),
        ({"similarity_fct": manhattan}, 1),
    ):
        loss = ranking(cached, True, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = ranked(loss, 3)
            ranked(loss, 3)
        assert len(caught) == warned
        assert all("RankingLoss: " in str(each.message) for each in caught)
        for one, other in zip(actual[:1], ranked(ranking(cached, False, **options), 3)[:1], strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    with pytest.raises(ValueError, match="Expected at least 2"):
        ranked(ranking(cached, True), 1)


def ranking_over_ranks(rank: int) -> None:
    for cached, directions in itertools.product((False, True), (DIRECTIONS[0], DIRECTIONS[1], DIRECTIONS[-1])):
        options = {"directions": directions, "gather_across_devices": True}
        if cached:
            options["mini_batch_size"] = 3
        results = []
        for fused in (False, True):
            loss = ranking(cached, fused, **options).double()
            draw = torch.Generator().manual_seed(rank)
            value = loss([{"x": x} for x in torch.randn(3, 4, 6, generator=draw, dtype=torch.float64)], None)
            value.backward()
            results.append([value.detach(), loss.model[0].weight.grad])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, **TOLERANCE)


CLIP = [(False, False), (False, True), (True, True), (True, False)]


def clip_over_ranks(rank: int) -> None:
    clip = integration("open_clip")
    image, text = leaves((4, 6), (4, 6), unit=True, seed=rank)
    scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    for local_loss, gather_with_grad in CLIP:
        options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank, "world_size": 2}
        own, fused = clip.library.ClipLoss(**options), clip.ClipLoss(**options)
        assert_same(lambda: fused(image, text, scale), lambda: own(image, text, scale), [image, text, scale])  # noqa: B023
    for implementation in ("bidir", "shift", "reduce", "gather"):
        options = {"rank": rank, "world_size": 2, "dist_impl": implementation}
        own, fused = clip.library.SigLipLoss(**options), clip.SigLipLoss(**options)
        pair = [image, text, scale, bias]
        assert_same(lambda: fused(*pair), lambda: own(*pair), pair)  # noqa: B023


def nt_xent_over_ranks(rank: int) -> None:
    lightly = integration("lightly")
    views = leaves((4, 6), (4, 6), seed=rank)
    for bank in (0, (10, 6)):
        torch.manual_seed(0)
        own = lightly.library.NTXentLoss(memory_bank_size=bank, gather_distributed=True).double()
        torch.manual_seed(0)
        fused = lightly.NTXentLoss(memory_bank_size=bank, gather_distributed=True).double()
        assert_same(lambda: fused(*views), lambda: own(*views), views)  # noqa: B023


def stable_pretraining_over_ranks(rank: int) -> None:
    ours = integration("stable_pretraining")
    if not hasattr(ours.library, "get_rank"):  # before 0.1.8 the library drops what it gathers
        return
    views = leaves((4, 6), (4, 6), seed=rank)
    for own, fused in ((ours.library.NTXEntLoss(), ours.NTXEntLoss()), (ours.multimodal.CLIPLoss(), ours.CLIPLoss())):
        assert_same(lambda: fused(*views), lambda: own(*views), views)  # noqa: B023


def over_ranks(rank: int) -> None:
    stable_pretraining_over_ranks(rank)
    ranking_over_ranks(rank)
    clip_over_ranks(rank)
    nt_xent_over_ranks(rank)


@pytest.mark.full
@pytest.mark.costly("two ranks import the libraries")
def test_losses_over_ranks():
    ran_in_two_ranks(over_ranks)


def test_losses_of_open_clip():
    clip = integration("open_clip")
    image, text = leaves((7, 6), (7, 6), unit=True)
    scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    own, fused = clip.library.ClipLoss(cache_labels=True), clip.ClipLoss(cache_labels=True)
    assert_same(lambda: fused(image, text, scale), lambda: own(image, text, scale), [image, text, scale])
    named = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": bias}
    assert_same(
        lambda: sum(fused(**named, output_dict=True).values()),
        lambda: sum(own(**named, output_dict=True).values()),
        [image, text, scale, bias],
    )
    own, fused = clip.library.SigLipLoss(), clip.SigLipLoss()
    assert_same(
        lambda: sum(fused(**named, output_dict=True).values()),
        lambda: sum(own(**named, output_dict=True).values()),
        [image, text, scale, bias],
    )
    assert isinstance(fused, clip.library.SigLipLoss)


def test_newer_signatures_of_open_clip(monkeypatch):
    """The branch main has dropped `use_horovod` and has a `chunk_size` of SigLipLoss."""
    clip = integration("open_clip")
    gathered = []

    def gather_features(image_features, text_features, local_loss=False, gather_with_grad=False, rank=0, world_size=1):
        gathered.append((local_loss, gather_with_grad, rank, world_size))
        return torch.cat([image_features] * 2), torch.cat([text_features] * 2)

    class Newer(clip.SigLipLoss):
        def __init__(self, chunk_size: int | None = None, **options: Any) -> None:
            super().__init__(**options)
            self.chunk_size = chunk_size

    monkeypatch.setattr(clip.library, "gather_features", gather_features)
    image, text = leaves((4, 6), (4, 6), unit=True)
    loss = clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=1, world_size=2)
    assert loss(image, text, 2.0).isfinite()
    assert gathered == [(True, True, 1, 2)]
    pair = (image, text, 2.0, -1.0)
    torch.testing.assert_close(Newer(chunk_size=2)(*pair), clip.library.SigLipLoss()(*pair), **TOLERANCE)


@pytest.mark.parametrize("bank", [0, (10, 6)])
def test_nt_xent_of_lightly(bank):
    lightly = integration("lightly")
    views = leaves((7, 6), (7, 6))
    losses = []
    for module in (lightly.library, lightly):
        torch.manual_seed(0)
        losses.append(module.NTXentLoss(temperature=0.2, memory_bank_size=bank).double())
    own, fused = losses
    for _ in range(3):  # the queue fills
        assert_same(lambda: fused(*views), lambda: own(*views), views)
    assert torch.equal(own.memory_bank.bank, fused.memory_bank.bank)
    frozen = [each.detach() for each in views]
    torch.testing.assert_close(fused(*frozen), own(*frozen), **TOLERANCE)
    assert torch.equal(own.memory_bank.bank, fused.memory_bank.bank)
    with pytest.raises(ValueError, match="temperature"):
        lightly.NTXentLoss(temperature=0.0)


def test_losses_of_stable_pretraining():
    ours = integration("stable_pretraining")
    first, second = leaves((7, 6), (9, 6))
    scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    own, fused = ours.library.InfoNCELoss(), ours.InfoNCELoss()
    target = torch.tensor([0, 3, 1, -100, 8, 2, 2])
    mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[torch.arange(7), target.clamp(min=0)] = False
    tensors = [first, second]
    for options in ({}, {"mask": mask}):
        args = (first, second, target)
        assert_same(lambda: fused(*args, **options), lambda: own(*args, **options), tensors)  # noqa: B023
    options = {"logit_scale": scale}
    assert_same(lambda: fused(*args, **options), lambda: own(*args, **options), [*tensors, scale])
    soft = torch.rand(7, 9).softmax(1)
    with pytest.warns(UserWarning, match="InfoNCELoss: a target of probabilities is not covered"):
        assert_same(lambda: fused(first, second, soft), lambda: own(first, second, soft), tensors)

    views = leaves((5, 6), (5, 6))
    for temperature in (0.5, 0.07):
        own, fused = ours.library.NTXEntLoss(temperature), ours.NTXEntLoss(temperature)
        assert isinstance(fused, ours.library.NTXEntLoss)
        assert_same(lambda: fused(*views), lambda: own(*views), views)  # noqa: B023
    own, fused = ours.multimodal.CLIPLoss(), ours.CLIPLoss()
    for named in ({}, {"logit_scale": scale}):
        pair = {"feats_i": views[0], "feats_j": views[1], **named}
        assert_same(lambda: fused(**pair), lambda: own(**pair), [*pair.values()])  # noqa: B023


def posteriors(parameters: torch.Tensor, **options: Any) -> list[Any]:
    needs("diffusers")
    import sslkernels.integrations.diffusers as ours

    classes = (ours.library.DiagonalGaussianDistribution, ours.DiagonalGaussianDistribution)
    return [each(parameters, **options) for each in classes]


def test_posterior_of_diffusers():
    (parameters, other) = leaves((3, 8, 2, 5), (3, 8, 2, 5))
    with torch.no_grad():
        parameters[0, 4:] *= 30  # beyond the bounds of the logarithm of the variance
    generator = torch.Generator()

    def both(call: Any) -> None:
        assert_same(lambda: call(posteriors(parameters)[1]), lambda: call(posteriors(parameters)[0]), [parameters])

    both(lambda posterior: posterior.sample(generator.manual_seed(0)))
    both(lambda posterior: posterior.mode())
    both(lambda posterior: posterior.nll(other.detach()[:, :4]))
    both(lambda posterior: posterior.std + posterior.var + posterior.logvar)
    with torch.no_grad():
        parameters.clamp_(-5, 5)
    both(lambda posterior: posterior.kl())
    for index in (0, 1):
        assert_same(
            lambda i=index: posteriors(parameters)[1].kl(posteriors(other)[i]),
            lambda: posteriors(parameters)[0].kl(posteriors(other)[0]),
            [parameters, other],
        )


def test_samples_without_stored_noise():
    (parameters,) = leaves((3, 8, 2, 5))
    _, posterior = posteriors(parameters)
    z = posterior.sample(seed=5)
    assert z.shape == (3, 4, 2, 5)
    assert torch.equal(z, posterior.sample(seed=5))
    z.sum().backward()
    eps = (z - posterior.mean) / posterior.std
    torch.testing.assert_close(parameters.grad[:, 4:], (posterior.std * eps / 2).detach(), **TOLERANCE)


def test_posteriors_that_the_library_computes():
    (parameters,) = leaves((3, 8, 2, 5))
    own, fused = posteriors(parameters, deterministic=True)
    for call in (
        lambda posterior: posterior.sample(),
        lambda posterior: posterior.kl(),
        lambda posterior: posterior.std,
    ):
        assert torch.equal(call(fused), call(own))
    (video,) = leaves((3, 8, 2, 5, 2))
    own, fused = posteriors(video)
    with pytest.warns(UserWarning, match="kl of parameters of 5 dimensions"):
        first = fused.kl()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused.kl(), first)
    assert torch.equal(first, own.kl())


def test_nothing_is_imported_before_it_is_used():
    code = f"import sys, sslkernels as sk; assert not {{*{LIBRARIES}}} & {{*sys.modules}}; sk.integrations"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"teacher_temp": 0.06}, {"epoch": 1}, {"epoch": 9}], ids=str)
def test_dino_of_lightly(options, dtype):
    """Two global and three local crops over steps that move the center."""
    lightly = integration("lightly")
    found = []
    for kind in (lightly.dino_loss.DINOLoss, lightly.DINOLoss):
        loss_of = kind(output_dim=50, warmup_teacher_temp=0.02, warmup_teacher_temp_epochs=4).to(dtype)
        generator = torch.Generator().manual_seed(0)
        results = []
        for _ in range(3):
            teacher = [torch.randn(6, 50, generator=generator, dtype=dtype) for _ in range(2)]
            student = [torch.randn(6, 50, generator=generator, dtype=dtype).requires_grad_() for _ in range(5)]
            loss = loss_of(teacher, student, **options)
            results += [loss.detach(), *torch.autograd.grad(loss, student), loss_of.center.clone()]
        found.append(results)
    relative = 1e-6 if dtype == torch.float32 else 1e-12
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative / 10)
    with pytest.raises(ValueError, match="at least two views"):
        lightly.DINOLoss(output_dim=50)([teacher[0].float()], [student[0].float()])


LIBRARIES = ("diffusers", "lightly", "open_clip", "sentence_transformers", "stable_pretraining", "transformers")


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_example_of_a_module_runs(name):
    if name in ("lightly", "open_clip", "stable_pretraining"):
        module = integration(name)
    else:
        needs(name)
        module = importlib.import_module(f"sslkernels.integrations.{name}")
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(module, name)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert runner.run(example).failed == 0
