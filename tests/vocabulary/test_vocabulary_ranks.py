"""Losses over slices of a vocabulary (gloo): every rank gets the loss, statistics and gradients of one process."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from datetime import timedelta
from functools import partial

import interpreter
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiers import pairwise_cases
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import sslkernels as sk
from benchmarks import over_ranks as over_ranks_benchmark

pytestmark = pytest.mark.costly("processes start")
ROWS, DIM, VOCAB = 24, 5, 21
FEATURES = {
    "backend": ["cpu", "reference", "triton"],
    "dtype": [torch.float32, torch.float64],
    "slices": ["uneven", "even", "one empty"],
    "target": ["indices", "indices", "probabilities"],
    "ignored": ["some", "none", "all", "first sequence"],  # with sequence_parallel all rows of a rank
    "reduction": ["mean", "sum", "none"],
    "mode": ["auto", "compact", "no gradient"],
    "bias": [False, True, "masked"],
    "weight": [False, True],
    "label_smoothing": [0.0, 0.1],
    "z_loss": [0.0, 0.01],
    "softcap": [None, 2.0],
    "logit_scale": [1.0, 0.7, "learned"],
    "token_weight": [False, True],
    "num_items": [None, 7],
    "shift": [0, 1],
    "stats": [False, True],
    "input": ["reduce", "partial", "sequence_parallel"],
    "capacity": [None, ROWS],
    "workspace_bytes": [None, 1],
    "ignore_index": [-100, 2],
}


def allowed(case):
    case = dict(case)
    if case["target"] == "probabilities":
        case |= {"ignored": "none", "shift": 0, "stats": False, "capacity": None, "ignore_index": -100}
        case["input"] = "partial" if case["input"] == "partial" else "reduce"
    if case["reduction"] != "mean":
        case["num_items"] = None
    if case["bias"] == "masked" and case["label_smoothing"]:
        case["weight"] = True  # a masked class would make every loss infinite
    return case


CASES = pairwise_cases(FEATURES, allowed)


def sizes_of(case, world):
    if case["slices"] == "even":
        return [VOCAB // world] * (world - 1) + [VOCAB - VOCAB // world * (world - 1)]
    sizes = [3, 2, 1, 4][: world - 1]
    if case["slices"] == "one empty" and world > 1:
        sizes[0] = 0
    return [*sizes, VOCAB - sum(sizes)]


def problem(number, case):
    """The tensors of all ranks."""
    generator = torch.Generator().manual_seed(number)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case["dtype"])

    made = {"input": draw(4, ROWS // 4, DIM), "linear_weight": draw(VOCAB, DIM)}
    if case["target"] == "probabilities":
        made["target"] = draw(4, ROWS // 4, VOCAB).softmax(-1)
    else:
        made["target"] = torch.randint(0, VOCAB, (4, ROWS // 4), generator=generator)
        made["target"][made["target"] == case["ignore_index"]] = 5
        ignored = {"some": torch.rand(4, ROWS // 4, generator=generator) < 0.4, "none": False, "all": True}
        ignored["first sequence"] = torch.arange(4).unsqueeze(1) == 0
        made["target"] = made["target"].masked_fill(torch.as_tensor(ignored[case["ignored"]]), case["ignore_index"])
    if case["bias"]:
        made["linear_bias"] = draw(VOCAB)
        if case["bias"] == "masked":  # the whole of a first slice, and a class of the last
            made["linear_bias"][:3] = made["linear_bias"][-1] = -torch.inf
            if case["target"] == "probabilities":
                made["target"][..., :3] = made["target"][..., -1] = 0
            else:
                allowed_class = (made["target"] < 3) & (made["target"] >= 0) & (made["target"] != case["ignore_index"])
                made["target"][allowed_class] = 4
                made["target"][made["target"] == VOCAB - 1] = 4
    if case["weight"]:
        made["weight"] = draw(VOCAB).abs()
        if case["bias"] == "masked":
            made["weight"][:3] = made["weight"][-1] = 0
    if case["token_weight"]:
        made["token_weight"] = draw(4, ROWS // 4).abs()
    if case["logit_scale"] == "learned":
        made["logit_scale"] = torch.tensor(0.8, dtype=case["dtype"])
    return made


def own(made, case, world, rank):
    """The arguments of a rank."""
    sizes, mine = sizes_of(case, world), dict(made)
    columns = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name in ("linear_weight", "linear_bias"):
        if name in made:
            mine[name] = made[name][columns]
    if case["target"] == "probabilities":
        mine["target"] = made["target"][..., columns]
    if case["input"] == "sequence_parallel":
        for name in ("input", "target", "token_weight"):
            if name in made:
                mine[name] = mine[name][own_rows(world, rank)]
    return {name: tensor.clone() for name, tensor in mine.items()}


def own_rows(world, rank):
    """4 sequences: with 2 ranks 1 and 3 of them, with 4 ranks a rank has none."""
    counts = {1: [4], 2: [1, 3], 4: [1, 0, 2, 1]}[world]
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


LEAVES = ("input", "linear_weight", "linear_bias", "token_weight", "logit_scale")


def result_of(case, tensors, **over):
    tensors = dict(tensors)
    for name in LEAVES:
        if name in tensors and case["mode"] != "no gradient":
            tensors[name].requires_grad_()
    options = {name: case[name] for name in ("label_smoothing", "z_loss", "softcap", "reduction", "num_items", "shift")}
    options |= {name: case[name] for name in ("capacity", "workspace_bytes", "ignore_index")}
    if "logit_scale" not in tensors:
        options["logit_scale"] = case["logit_scale"]
    mode = "compact" if case["mode"] == "compact" else "auto"
    with sk.use_backend(case["backend"]):
        loss = sk.linear_cross_entropy(**tensors, **options, mode=mode, return_stats=case["stats"], **over)
        loss, stats = loss if case["stats"] else (loss, ())
        if case["mode"] != "no gradient":
            factors = torch.linspace(0.5, 1.7, loss.numel(), dtype=loss.dtype).reshape(loss.shape).to(loss.device)
            (loss * factors).sum().backward()
    grads = {name: tensors[name].grad for name in LEAVES if name in tensors}
    return {"loss": loss.detach(), "stats": tuple(stats), **grads}


def over_ranks(case):
    if case["input"] == "sequence_parallel":
        return {"sequence_parallel": True}
    return {"input_grad": case["input"]}


def cases_of(rank, world, device):
    found = []
    for number, case in enumerate(CASES):
        mine = {name: tensor.to(device) for name, tensor in own(problem(number, case), case, world, rank).items()}
        if device != "cpu" and case["backend"] == "cpu":
            case = case | {"backend": "cuda"}
        result = result_of(case, mine, process_group=dist.group.WORLD, **over_ranks(case))
        found.append(tree_map_only(torch.Tensor, torch.Tensor.cpu, result))
    return found


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    interpreter.repair()
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = cases_of(rank, world, "cpu")
    torch.save((found, {name: find(rank, world) for name, find in SPECIAL.items()}), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sliced(tensor, world, rank):
    """A slice that is one row longer on the last rank than it would be of equal ones."""
    size = tensor.shape[0] // world
    return tensor[size * rank : None if rank == world - 1 else size * (rank + 1)]


def loss_of_slices(rank, world, input, linear_weight, target, **options):
    return sk.linear_cross_entropy(
        input, sliced(linear_weight, world, rank), target, process_group=dist.group.WORLD, reduction="none", **options
    )


def message_of(function) -> str:
    try:
        function()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def confident_problem():
    """Rows whose targets are up to 80 ahead of all others, in every slice."""
    target = torch.arange(12)
    return torch.eye(12), 80 * torch.eye(12) + torch.linspace(0, 1, 144).reshape(12, 12), target


def confident(rank, world):
    return loss_of_slices(rank, world, *confident_problem())


def not_finite(rank, world):
    """A NaN in a row, in the classes of whole slices, and only masked classes."""
    input, weight, target = confident_problem()
    rows = input.clone()
    rows[3] = torch.nan
    classes = weight.clone()
    classes[:6] = torch.nan
    bias = torch.full((12,), -torch.inf)  # every class is masked
    return [
        loss_of_slices(rank, world, rows, weight, target),
        loss_of_slices(rank, world, input, classes, target, linear_bias=sliced(torch.zeros(12), world, rank)),
        loss_of_slices(rank, world, input, weight, target, linear_bias=sliced(bias, world, rank)),
    ]


def refusals(rank, world):
    input, weight, target = confident_problem()
    return [
        message_of(lambda: loss_of_slices(rank, world, input, weight, target + 1)),
        message_of(lambda: loss_of_slices(rank, world, input, weight.clone(), target, vocab_start=5 * rank)),
        message_of(lambda: loss_of_slices(rank, world, input, weight, target, weight=torch.ones(5))),
        message_of(lambda: loss_of_slices(rank, world, input, weight, target.float()[:, None].expand(12, 1))),
    ]


def checked_ranks(rank, world):
    input, weight, target = confident_problem()
    os.environ["SSLKERNELS_CHECK_RANKS"] = "1"
    try:
        return [
            message_of(lambda: loss_of_slices(rank, world, input, weight, target, z_loss=0.1 * rank)),
            message_of(lambda: loss_of_slices(rank, world, input, weight.requires_grad_(rank == 0), target)),
            message_of(lambda: loss_of_slices(rank, world, input, weight.detach(), target)),
            message_of(
                lambda: sk.linear_sample(
                    input, sliced(weight.detach(), world, rank), temperature=1.0 + rank, process_group=dist.group.WORLD
                )
            ),
        ]
    finally:
        del os.environ["SSLKERNELS_CHECK_RANKS"]


def two_heads(rank, world):
    """Heads of which the first rank's slices have equal sizes: a size tells nothing of the other ranks."""
    losses = []
    for more in (0, 2):
        weight = torch.linspace(-1, 1, 3 * world + more)[:, None]
        own = weight[3 * rank : 3 * rank + 3 + (more if rank == world - 1 else 0)]
        target = torch.arange(3 * world + more)
        losses += [
            sk.linear_cross_entropy(torch.ones(len(target), 1), own, target, process_group=dist.group.WORLD)
            for _ in range(2)
        ]
    return losses


def traffic(rank, world):
    """(calls, numbers) of collectives in the first and in the next step, forward and backward."""
    input, weight, target = confident_problem()
    own, counts = sliced(weight, world, rank).clone().requires_grad_(), []
    with pytest.MonkeyPatch.context() as patch:
        for name, position in (("all_reduce", 0), ("all_gather", 1)):
            call = getattr(dist, name)

            def counted(*args, call=call, position=position, **kwargs):
                counts[-1].append(args[position].numel())
                return call(*args, **kwargs)

            patch.setattr(dist, name, counted)
        for _ in range(2):
            x = input.clone().requires_grad_()
            counts.append([])
            loss = sk.linear_cross_entropy(x, own, target, process_group=dist.group.WORLD)
            counts.append([])
            loss.backward()
    return counts


def flops(rank, world):
    """Matmul operations of a step in fast mode."""
    input, weight, target = confident_problem()
    own = sliced(weight, world, rank).clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        x = input.clone().requires_grad_()
        sk.linear_cross_entropy(x, own, target, process_group=dist.group.WORLD).backward()
    return counter.get_total_flops()


def row_ids(rank, world):
    ids = sk.row_ids_of_rank(rank + 2, dist.group.WORLD)
    return ids, sk.random_normal((rank + 2, 5), seed=3, row_ids=ids), masked(ids)


def masked(ids):
    """The masked tokens of rows of these numbers."""
    tokens = (7 * ids.unsqueeze(1) + torch.arange(20)) % 90 + 5
    return sk.mask_tokens(tokens, mask_id=1, vocab_size=100, probability=0.4, seed=4, row_ids=ids).input_ids


def benchmarked(rank, world):
    """Gradients of the losses that `benchmarks.over_ranks` times."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(over_ranks_benchmark.SIZES, "vocabulary", (24, 16, 64))
        leaves, others = over_ranks_benchmark.tensors("vocabulary", rank, world)
        for name, loss in over_ranks_benchmark.providers("vocabulary", rank, world).items():
            loss = loss(*[leaf.requires_grad_() for leaf in leaves], *others)
            found[name] = torch.autograd.grad(loss, leaves)
    return found


BERT_LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def bert_problem(dtype):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(64, 32, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(30522, 32, generator=generator)).to(dtype)
    target = torch.randint(0, 30522, (64,), generator=generator)
    target[::3] = -100
    return input, weight, target


def bert(rank, world):
    """The vocabulary of BERT in slices of which one needs fewer chunks than the others."""
    sizes = [2522 if world > 1 else 0, *[9333] * (world - 2)]
    begins = [*itertools.accumulate((0, *sizes[: world - 1])), 30522]
    found = []
    for dtype in BERT_LIMITS:
        input, weight, target = bert_problem(dtype)
        own = weight[begins[rank] : begins[rank + 1]].clone().requires_grad_()
        options = {"workspace_bytes": 1 << 20, "process_group": dist.group.WORLD}
        loss = sk.linear_cross_entropy(input, own, target, **options)
        loss.backward()
        found.append((loss.detach(), input.grad, own.grad))
    return found


SAMPLES = [
    {"backend": backend, "dtype": dtype, "temperature": temperature, "bias": bias, "num_samples": samples}
    for backend, dtype, temperature, bias, samples in (
        ("cpu", torch.float32, 0.7, True, 3),
        ("cpu", torch.float64, 0.0, False, None),
        ("cpu", torch.bfloat16, torch.inf, True, 2),
        ("reference", torch.float32, "rows", True, 2),
        ("reference", torch.float32, 0.0, True, None),
        ("triton", torch.float32, 0.7, True, 2),
        ("triton", torch.bfloat16, "rows", False, None),
        ("cpu", torch.float32, "rows", True, None),
    )
]


def sample_problem(case):
    generator = torch.Generator().manual_seed(7)
    x, w = (torch.randn(n, 8, generator=generator).to(case["dtype"]) for n in (9, 37))
    options = {name: case[name] for name in ("temperature", "num_samples")}
    if case["temperature"] == "rows":
        options["temperature"] = torch.tensor([0.0, 0.5, 1.0, 2.0, torch.inf, 0.7, 0.0, 0.3, 1.5])
    bias = torch.randn(37, generator=generator)
    bias[::3] = -torch.inf
    return x, w, bias if case["bias"] else None, options


def draw(case, x, w, bias, options, **over):
    leaves = [x.requires_grad_(), w.requires_grad_()]
    with sk.use_backend(case["backend"]):
        drawn = sk.linear_sample(x, w, linear_bias=bias, seed=5, **options, **over)
        grads = torch.autograd.grad(drawn.logprob.sum(), leaves)
        with torch.no_grad():
            again = sk.linear_sample(x, w, linear_bias=bias, seed=5, **options, **over)
    return drawn.index, drawn.logprob.detach(), *again, *grads


def samples(rank, world):
    found = []
    for number, case in enumerate(SAMPLES):
        x, w, bias, options = sample_problem(case)
        sizes = [0 if number == 1 else 5] * (world - 1)  # no slice begins with a group of four noise numbers
        sizes = [*sizes, 37 - sum(sizes)]
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        bias = None if bias is None else bias[own]
        found.append(draw(case, x, w[own].clone(), bias, options, process_group=dist.group.WORLD))
    torch.manual_seed(rank)
    x, w, *_ = sample_problem(SAMPLES[0])
    return found, sk.linear_sample(x, sliced(w, world, rank), process_group=dist.group.WORLD)


SPECIAL = {
    function.__name__: function
    for function in (
        samples,
        confident,
        not_finite,
        refusals,
        checked_ranks,
        two_heads,
        traffic,
        flops,
        row_ids,
        bert,
        benchmarked,
    )
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def spawned(function, world, folder):
    mp.spawn(function, (world, free_port(), str(folder)), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module", params=[2, *(pytest.param(world, marks=pytest.mark.full) for world in (1, 4))])
def ranks(request, tmp_path_factory):
    return request.param, spawned(worker, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_slices_give_the_results_of_one_process(ranks, number):
    _, results = ranks
    assert_one_process(number, [cases[number] for cases, _ in results])


def assert_one_process(number, every, limits=(1e-6, 1e-12)):
    """limits: in float32 and float64."""
    case = CASES[number]
    # Triton's interpreter is not there on a GPU.
    alone = case | {"backend": "reference"} if torch.cuda.is_available() else case
    want = result_of(alone, problem(number, case))
    limit = limits[case["dtype"] == torch.float64]

    def same(got, expected, name):
        torch.testing.assert_close(
            got, expected, rtol=4 * limit, atol=limit, equal_nan=True, msg=lambda text: f"{name}: {text}\n{case}"
        )

    for got in every:
        same(got["loss"], want["loss"], "loss")
        for one, other, name in zip(got["stats"], want["stats"], sk.CrossEntropyStats._fields, strict=False):
            same(one, other, name)
        if "logit_scale" in want and case["mode"] != "no gradient":
            same(got["logit_scale"], want["logit_scale"], "logit_scale")
    if case["mode"] == "no gradient":
        return
    for name in ("linear_weight", "linear_bias"):
        if name in want:
            same(torch.cat([got[name] for got in every]), want[name], name)
    if case["input"] == "sequence_parallel":
        for name in ("input", "token_weight"):
            if name in want:
                same(torch.cat([got[name] for got in every]), want[name], name)
        return
    if case["input"] == "partial":
        same(torch.stack([got["input"] for got in every]).sum(0), want["input"], "input")
    for got in every:
        if case["input"] == "reduce":
            same(got["input"], want["input"], "input")
        if "token_weight" in want:
            same(got["token_weight"], want["token_weight"], "token_weight")


def special(ranks, name):
    world, results = ranks
    return world, [found[name] for _, found in results]


def test_a_confident_row_keeps_its_loss(ranks):
    input, weight, target = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in confident_problem()
    )
    want = sk.linear_cross_entropy(input, weight, target, reduction="none").float()
    for got in special(ranks, "confident")[1]:
        torch.testing.assert_close(got, want, rtol=3e-5, atol=0)


def test_nonfinite_logits_reach_every_rank(ranks):
    for row, every, nothing in special(ranks, "not_finite")[1]:
        assert row.isnan().nonzero().flatten().tolist() == [3]
        assert every.isnan().all()
        assert nothing.isnan().all()


def test_every_rank_raises(ranks):
    world, results = special(ranks, "refusals")
    for target, start, weight, probabilities in results:
        assert target == ("ValueError: linear_cross_entropy: target must be in [0, 12) or ignore_index=-100; got 12")
        if world > 1:
            assert start.startswith("ValueError: linear_cross_entropy: vocab_start must be the number of rows of the ")
        assert weight.startswith("ValueError: linear_cross_entropy: weight must have shape (V,) = (12,); got (5,)")
        assert "target (class probabilities) must have shape" in probabilities


def test_ranks_that_disagree_raise_in_debug_mode(ranks):
    world, results = special(ranks, "checked_ranks")
    for options, grads, agreed, sampled in results:
        assert agreed == "nothing was raised"
        if world > 1:
            assert "z_loss must be the same on every rank; got 0.0 on rank 0, 0.1 on rank 1" in options
            assert "linear_weight must be the same on every rank; got a 2-dimensional tensor" in grads
            assert "temperature must be the same on every rank; got 1.0 on rank 0, 2.0 on rank 1" in sampled


def test_heads_with_other_slices(ranks):
    world, results = special(ranks, "two_heads")
    for more, at in ((0, 0), (2, 2)):
        count = 3 * world + more
        logits = torch.linspace(-1, 1, count).expand(count, count)
        want = torch.nn.functional.cross_entropy(logits, torch.arange(count))
        for losses in results:
            torch.testing.assert_close(torch.stack(losses[at : at + 2]), want.expand(2))


def test_three_numbers_a_row_in_forward(ranks):
    """The maximum, then the sum and the target's logit; the sizes of the slices once; in backward the input's."""
    for first, backward, second, again in special(ranks, "traffic")[1]:
        assert second == [12, 24]
        assert first == [2, *second]
        assert backward == again == [12 * 12]


def test_the_matmuls_are_shared(ranks):
    assert sum(special(ranks, "flops")[1]) == 6 * 12 * 12 * 12


def test_what_is_timed_over_ranks_computes_the_same(ranks):
    for found in special(ranks, "benchmarked")[1]:
        ours, *others = found.values()
        for gradients in others:
            torch.testing.assert_close(gradients, ours, rtol=1e-5, atol=1e-7)


def test_noise_does_not_depend_on_the_number_of_ranks(ranks):
    world, results = special(ranks, "row_ids")
    count = sum(rank + 2 for rank in range(world))
    ids, noise, tokens = (torch.cat(parts) for parts in zip(*results, strict=True))
    assert torch.equal(ids, torch.arange(count))
    assert torch.equal(sk.row_ids_of_rank(3, None), torch.arange(3))
    assert torch.equal(noise, sk.random_normal((count, 5), seed=3))
    assert torch.equal(tokens, masked(torch.arange(count)))


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_a_draw_does_not_depend_on_the_number_of_ranks(ranks, number):
    case = SAMPLES[number]
    *want, input_grad, weight_grad = draw(case, *sample_problem(case))
    limit = 1e-12 if case["dtype"] == torch.float64 else 2e-6
    results = [found[0][number] for found in special(ranks, "samples")[1]]
    rough = {"rtol": 0.02, "atol": 0.02} if case["dtype"] == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for *got, grad, _ in results:
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[2], want[2])
        torch.testing.assert_close(got[1], want[1], rtol=limit, atol=limit)
        torch.testing.assert_close(got[3], want[3], rtol=limit, atol=limit)
        torch.testing.assert_close(grad, input_grad, **rough)
    torch.testing.assert_close(torch.cat([result[-1] for result in results]), weight_grad, **rough)


def test_the_first_rank_draws_the_seed(ranks):
    x, w, *_ = sample_problem(SAMPLES[0])
    torch.manual_seed(0)
    want = sk.linear_sample(x, w)
    for _, drawn in special(ranks, "samples")[1]:
        assert torch.equal(drawn.index, want.index)
        torch.testing.assert_close(drawn.logprob, want.logprob)


def test_the_vocabulary_of_bert(ranks):
    _, results = special(ranks, "bert")
    for number, (dtype, limit) in enumerate(BERT_LIMITS.items()):
        input, weight, target = bert_problem(dtype)
        loss = sk.linear_cross_entropy(input, weight.requires_grad_(), target)
        loss.backward()
        found = [result[number] for result in results]
        for got, input_grad, _ in found:
            torch.testing.assert_close(got, loss.detach(), rtol=min(limit, 1e-5), atol=0)
            torch.testing.assert_close(input_grad, input.grad, rtol=limit, atol=limit * input.grad.abs().max().item())
        weight_grad = torch.cat([grad for _, _, grad in found])
        torch.testing.assert_close(weight_grad, weight.grad, rtol=limit, atol=limit * weight.grad.abs().max().item())


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        yield dist.group.WORLD


@pytest.mark.full
def test_slices_compile_in_one_graph(alone):
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(0, 11, (6,))
    w, scale = torch.nn.Parameter(torch.randn(11, 5)), torch.nn.Parameter(torch.tensor(1.1))

    def loss(x, w, y, scale, **options):
        return 2 * sk.linear_cross_entropy(x, w, y, process_group=alone, logit_scale=scale, **options)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for got, want in zip(
        torch.autograd.grad(compiled(x, w, y, scale), (x, w, scale)),
        torch.autograd.grad(loss(x, w, y, scale), (x, w, scale)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="exchanges the numbers of rows on the host"):
        torch.compile(loss, fullgraph=True)(x, w, y, scale, sequence_parallel=True)


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True}, {"input_grad": "partial"}], ids=str)
def test_double_backward_raises(alone, options):
    x, w, scale = (torch.randn(size, requires_grad=True) for size in ((6, 5), (11, 5), ()))
    loss = sk.linear_cross_entropy(x, w, torch.arange(6), logit_scale=scale, process_group=alone, **options)
    for gradient in torch.autograd.grad(loss, (x, w, scale), create_graph=True):
        with pytest.raises(NotImplementedError, match="double backward is not supported"):
            torch.autograd.grad(gradient.sum(), x, retain_graph=True)


ERRORS = [
    (dict(sequence_parallel=True, input_grad="partial"), "input_grad must be 'reduce' with sequence_parallel"),
    (dict(vocab_start=3), "vocab_start must be the number of rows of the ranks before, 0 on rank 0; got 3"),
    (dict(linear_weight=torch.randn(0, 5)), "linear_weight must have at least one row on a rank; got none"),
    (dict(target=torch.rand(6, 11), sequence_parallel=True), "sequence_parallel must be False with class prob"),
    (dict(target=torch.rand(6, 11, requires_grad=True)), "process_group must be None for K-dimensional weights or"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors(alone, change, message):
    given = {"input": torch.randn(6, 5), "linear_weight": torch.randn(11, 5), "target": torch.arange(6)}
    with pytest.raises(ValueError, match="^linear_cross_entropy: " + message):
        sk.linear_cross_entropy(**given | change, process_group=alone)


def one_dies(rank: int, world: int, port: int, folder: str, where: str) -> None:
    """The last rank leaves after the first forward: the others raise in the backward, or in the next forward."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=5))
    input, weight, target = confident_problem()
    own = sliced(weight, world, rank)
    loss = sk.linear_cross_entropy(input.requires_grad_(), own, target, process_group=dist.group.WORLD)
    seen = "left"
    if rank < world - 1:
        try:
            if where == "backward":
                loss.backward()
            else:
                sk.linear_cross_entropy(input, own, target, process_group=dist.group.WORLD)
            seen = "nothing was raised"
        except RuntimeError:
            seen = "raised"
    torch.save(seen, f"{folder}/{rank}.pt")
    os._exit(0)  # no goodbye to the others


@pytest.mark.full
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_dies_makes_the_others_raise(where, tmp_path):
    assert spawned(partial(one_dies, where=where), 2, tmp_path) == ["raised", "left"]
