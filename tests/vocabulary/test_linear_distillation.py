"""linear_distillation: the error of every backend over its options, and what eager torch gets wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, REPEATED_DTYPES, Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import sslkernels as sk
from sslkernels.vocabulary.prototypes import chunked_distillation

pytestmark = pytest.mark.pairwise

OP = "linear_distillation"
LEAVES = ("student", "student_weight", "student_bias", "student_temperature", "row_weight")


def make(
    g: torch.Generator,
    rows: int,
    teachers: int,
    vocab: int,
    dim: int,
    *,
    choices: int = 0,
    spread: float = 0.3,
    bias: bool = False,
    every: bool = False,
    learned: bool = False,
    int32: bool = False,
) -> tuple[Tensors, Tensors]:
    """choices: columns of the index, a third of which are -1; spread: standard deviation of the student's logits."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g)

    differentiable = {
        "student": normal(rows, dim),
        "student_weight": normal(vocab, dim, scale=spread * dim**-0.5),
    }
    constant = {
        "teacher": normal(teachers, dim + 3),
        "teacher_weight": normal(vocab, dim + 3, scale=0.1 * (dim + 3) ** -0.5),
    }
    if bias or every:
        differentiable["student_bias"] = normal(vocab, scale=0.1)
        constant |= {"teacher_bias": normal(vocab, scale=0.1), "center": normal(vocab, scale=0.1)}
    if every:
        differentiable["row_weight"] = torch.rand(rows, generator=g)
        constant |= {"student_temperature": torch.tensor(0.3), "teacher_temperature": torch.tensor(0.07)}
    if learned:  # its gradient is one number, of which eager torch may be right to the last bit by chance
        differentiable["student_temperature"] = constant.pop("student_temperature")
    if choices:
        index = torch.randint(0, teachers, (rows, choices), generator=g)
        index[torch.rand(index.shape, generator=g) < 1 / 3] = -1
        constant["teacher_index"] = index.to(torch.int32 if int32 else torch.int64)
    return differentiable, constant


def case(name: str, sizes: tuple[int, int, int, int], *, options: dict | None = None, **tensors) -> Case:
    return Case(OP, name, make, sizes, tensors, options or {})


def cases() -> Iterator[Case]:
    yield case("plain", (9, 9, 53, 9))
    yield case("bias", (10, 10, 128, 8), bias=True)
    yield case("few_rows", (7, 7, 257, 8))
    yield case("one_class", (5, 5, 1, 3))
    yield case("one_teacher", (11, 11, 61, 6), choices=1)
    yield case("several_blocks", (5, 3, 5003, 8), bias=True, choices=2)
    for mode, reduction, divergence in (
        ("fast", "mean", "kl"),
        ("fast", "sum", "cross_entropy"),
        ("compact", "mean", "cross_entropy"),
        ("compact", "none", "kl"),
    ):
        options = {"mode": mode, "reduction": reduction, "divergence": divergence}
        every = reduction != "none"
        yield case(f"{mode}_{reduction}_{divergence}", (13, 5, 71, 12), every=every, choices=3, options=options)
        yield case(
            f"chunks_{mode}_{reduction}_{divergence}",
            (20, 9, 87, 6),
            every=every,
            choices=2,
            options={**options, "workspace_bytes": 1},
        )
    yield case("chunks_of_pairs", (20, 20, 53, 9), bias=True, options={"workspace_bytes": 1})
    yield case("num_items", (13, 5, 71, 8), choices=2, int32=True, options={"num_items": 123})
    yield case("peaked", (11, 11, 301, 16), spread=3.0)


CASES = list(cases())
test_error_is_at_most_that_of_eager = pytest.mark.slow_for(name="triton", dtype=REPEATED_DTYPES)(
    error_is_at_most_that_of_eager(CASES)
)
test_shapes_without_data = shapes_without_data(CASES)


def everything(device: str, rows: int = 12, teachers: int = 5, vocab: int = 37, dtype=torch.float32):
    """(leaves, constants) of a call with all tensors."""
    found = case("", (rows, teachers, vocab, 8), every=True, learned=True, choices=2).inputs(dtype, device)
    return ({name: t.requires_grad_() for name, t in found[0].items()}, found[1])


@pytest.mark.full_for(name=("triton", "reference"))
@pytest.mark.parametrize("mode", ["fast", "compact"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_subset_of_gradients(name, mode, device):
    """Each combination of leaves gives the same gradients, twice with a retained graph, and no others."""
    leaves, constant = everything(device)
    whole = oracle.linear_distillation(**leaves, **constant)
    expected = dict(zip(leaves, torch.autograd.grad(whole, list(leaves.values())), strict=True))
    count = len(leaves)
    for wanted in itertools.product((False, True), repeat=count):
        if sum(wanted) not in (0, 1, count - 1, count):
            continue
        some = {k: t.detach().requires_grad_(w) for (k, t), w in zip(leaves.items(), wanted, strict=True)}
        with sk.use_backend(name):
            loss = sk.linear_distillation(**some, **constant, mode=mode)
            assert loss.requires_grad == any(wanted)
            named = {k: t for k, t in some.items() if t.requires_grad}
            for _ in range(2 * any(wanted)):
                found = torch.autograd.grad(2 * loss, list(named.values()), retain_graph=True)
                for k, grad in zip(named, found, strict=True):
                    torch.testing.assert_close(grad, 2 * expected[k], rtol=2e-5, atol=1e-6)


@pytest.mark.full_for(name="triton", divergence="cross_entropy")
@pytest.mark.parametrize("divergence", ["cross_entropy", "kl"])
@pytest.mark.parametrize("name", BACKENDS)
def test_statistics_equal_float64(name, divergence, device):
    leaves, constant = everything(device, rows=20, teachers=7, vocab=501)
    wide = {k: t.detach().double() if t.is_floating_point() else t for k, t in (leaves | constant).items()}
    with sk.use_backend(name):
        loss, stats = sk.linear_distillation(**leaves, **constant, divergence=divergence, return_stats=True)
    assert loss.requires_grad
    assert not any(part.requires_grad for part in stats)

    index = constant["teacher_index"]
    given, valid = (index >= 0).double(), (index >= 0).any(1)
    teacher = wide["teacher"] @ wide["teacher_weight"].t() + wide["teacher_bias"] - wide["center"]
    q = (teacher / wide["teacher_temperature"]).softmax(1)[index.clamp_min(0)]
    q = (q * given[..., None]).sum(1) / given.sum(1, keepdim=True).clamp_min(1)
    z = wide["student"] @ wide["student_weight"].t() + wide["student_bias"]
    p = (z / wide["student_temperature"]).softmax(1)
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    for got, dist in ((stats.teacher_entropy, q), (stats.student_entropy, p)):
        torch.testing.assert_close(got, torch.where(valid, torch.special.entr(dist).sum(1), 0), **close)
    assert torch.equal(stats.agreement, (q.argmax(1) == p.argmax(1)) & valid)
    usage = q[valid].mean(0)
    torch.testing.assert_close(stats.usage, usage, **close)
    torch.testing.assert_close(stats.perplexity, torch.special.entr(usage).sum().exp(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_equals_the_functions_of_torch(dtype, device):
    """On logits: the head is the identity."""
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 64, generator=g, dtype=dtype).to(device) for _ in range(2))
    head = torch.eye(64, dtype=dtype, device=device)
    x, y = (student.clone().requires_grad_() for _ in range(2))
    for divergence in ("kl", "cross_entropy"):
        loss = sk.linear_distillation(x, head, teacher, head, teacher_temperature=0.5, divergence=divergence)
        q = (teacher / 0.5).softmax(1)
        truth = F.kl_div((y / 0.1).log_softmax(1), q, reduction="batchmean")
        truth = truth if divergence == "kl" else F.cross_entropy(y / 0.1, q)
        torch.testing.assert_close(loss, truth, rtol=tolerance, atol=tolerance)
        pairs = zip(torch.autograd.grad(loss, x), torch.autograd.grad(truth, y), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_confident_rows_keep_their_loss(name, device):
    """A teacher and a student that agree up to 1e-12: in float32 the loss and gradient are right to their digits."""
    gaps = torch.tensor([12.0, 20.0, 27.0])
    head = torch.eye(3, dtype=torch.float32, device=device)
    student = torch.zeros(3, 3, device=device)
    student[:, 1] = gaps.to(device)
    teacher = torch.zeros(3, 3, device=device)
    teacher[:, 1] = gaps.flip(0).to(device)
    options = {"student_temperature": 1.0, "teacher_temperature": 1.0, "reduction": "none"}
    x, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    with sk.use_backend(name):
        loss = sk.linear_distillation(x, head, teacher, head, **options)
        (grad,) = torch.autograd.grad(loss.sum(), x)
    # 1 - q of float64 cancels, too: the loss is a sum over the other columns.
    q = teacher.double().softmax(1)
    truth = torch.log1p(2 * (-wide[:, 1]).exp()) + (q[:, 0] * (wide[:, 1] - wide[:, 0])) * 2
    torch.testing.assert_close(loss, truth.float(), rtol=1e-5, atol=0)
    other = wide.softmax(1)[:, 0] - q[:, 0]
    expected = torch.stack([other, -2 * other, other], 1)
    torch.testing.assert_close(grad, expected.float(), rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("name", BACKENDS)
def test_confident_rows_keep_divergence_and_entropy(name, device):
    """The divergence is of the order of what both leave to other columns, in float32 to its digits: also with a student
    that is confident elsewhere, and with a mixture of teachers."""
    head = torch.eye(4, dtype=torch.float32, device=device)
    student, teacher = torch.zeros(4, 4, device=device), torch.zeros(3, 4, device=device)
    student[:3, 1] = torch.tensor([19.0, 15.0, 20.0])
    student[3, 2] = 18.0
    teacher[:, 1] = torch.tensor([19.3, 16.0, 18.0])
    index = torch.tensor([[0, -1], [1, -1], [0, 2], [1, 0]], device=device)
    options = {"student_temperature": 1.0, "teacher_temperature": 1.0, "reduction": "none", "divergence": "kl"}
    with sk.use_backend(name):
        loss, stats = sk.linear_distillation(
            student, head, teacher, head, teacher_index=index, return_stats=True, **options
        )

    def others(logits: Tensor) -> Tensor:
        """What the probability of each of the columns but the largest is, exactly."""
        small = (-logits.amax(1, keepdim=True)).double().exp()
        return small / (1 + 3 * small)

    q_other, p_other = others(teacher), others(student)
    q_other = torch.stack([q_other[0], q_other[1], (q_other[0] + q_other[2]) / 2, (q_other[1] + q_other[0]) / 2])[:, 0]
    p_other = p_other[:, 0]
    log_q, log_p = torch.log1p(-3 * q_other), torch.log1p(-3 * p_other)
    # The terms q log(q / p) + p - q: of each other column, and of the largest, which is of the second order.
    ratio = q_other / p_other
    at_largest = (1 - 3 * q_other) * (log_q - log_p) + 3 * (q_other - p_other)
    agree = 3 * (q_other * ratio.log() + p_other - q_other) + at_largest
    differ = (1 - 3 * q_other) * (log_q - p_other.log()) + q_other * (q_other.log() - log_p) + 2 * q_other * ratio.log()
    truth = torch.where(torch.arange(4, device=device) < 3, agree, differ)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=0)
    entropy = -3 * q_other * q_other.log() - (1 - 3 * q_other) * log_q
    torch.testing.assert_close(stats.teacher_entropy.double(), entropy, rtol=1e-5, atol=0)
    assert stats.agreement.tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", BACKENDS)
def test_centers_far_from_zero_cost_no_digits(name, device):
    leaves, constant = everything(device)
    far = {**constant, "center": constant["center"].double() + 2.0**20, "teacher_temperature": 0.01}
    near = {k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in far.items()}
    wide = {k: t.detach().double() for k, t in leaves.items()}
    truth = oracle.linear_distillation(**wide, **near)
    with sk.use_backend(name):
        loss = sk.linear_distillation(**leaves, **far)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_has_its_own_values_only(name, device):
    """NaN in a student row and in a teacher row reach the rows that have them; -inf logits have probability 0; rows
    without a teacher may hold anything."""
    leaves, constant = everything(device)
    index = torch.tensor([[0, 1], [1, -1], [2, 3], [-1, -1], [3, 4], [4, 0]] * 2, device=device)
    student = leaves["student"].detach().clone()
    student[0, 2] = float("nan")
    student[3] = float("nan")
    teacher = constant["teacher"].clone()
    teacher[2] = float("inf")
    bias = leaves["student_bias"].detach().clone()
    bias[5], center = float("-inf"), constant["center"].clone()
    center[5:7] = float("inf")
    given = {"student_bias": bias, "center": center, "teacher": teacher, "teacher_index": index}
    rest = {k: v for k, v in (leaves | constant).items() if k not in given and k != "student"}
    student.requires_grad_()
    with sk.use_backend(name):
        loss, stats = sk.linear_distillation(student, **given, **rest, reduction="none", return_stats=True)
        (grad,) = torch.autograd.grad(loss[[1, 3, 4, 5, 7]].sum(), student)
    bad = torch.zeros(12, dtype=torch.bool)
    bad[[0, 2, 8]] = True
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(stats.student_entropy[[0, 3]].isnan().cpu(), torch.tensor([True, False]))
    assert loss[[3, 9]].tolist() == [0, 0]
    assert not grad[3].any()
    assert not grad[[1, 4, 5, 7]].isnan().any()


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("mode", ["fast", "compact"])
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_without_a_teacher_reach_no_gradient(name, mode, dropped, device, monkeypatch):
    """Dropped, as on a CPU, or computed, as on a GPU."""
    monkeypatch.setattr(chunked_distillation, "drops_rows", lambda _: dropped)
    leaves, constant = everything(device)
    constant["teacher_index"][3] = -1
    found = []
    for value in (0.0, float("nan")):
        student = leaves["student"].detach().clone()
        student[3] = value
        some = {**leaves, "student": student.requires_grad_()}
        with sk.use_backend(name):
            loss = sk.linear_distillation(**some, **constant, mode=mode)
            found.append([loss, *torch.autograd.grad(loss, list(some.values()))])
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["fast", "compact"])
@pytest.mark.parametrize("name", BACKENDS)
def test_small_weights_reach_the_gradients_in_float16(name, mode, device):
    """A weight of 2^-30 under a loss scale of 2^30, as of a mean over many rows: float16 would hold neither."""
    leaves, constant = everything(device)
    half = {k: leaves[k].detach().half().requires_grad_() for k in ("student", "student_weight", "student_bias")}
    rest = {k: v for k, v in (leaves | constant).items() if k not in half and k != "row_weight"}
    found = []
    for weight in (1.0, 2.0**-30):
        rows = torch.full((12,), weight, device=device)
        with sk.use_backend(name):
            loss = sk.linear_distillation(**half, **rest, row_weight=rows, reduction="sum", mode=mode)
            found.append(torch.autograd.grad(loss, list(half.values()), torch.full_like(loss, 1 / weight)))
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["fast", "compact"])
@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows(name, mode, device):
    leaves, constant = everything(device)
    none = torch.full((12, 2), -1, device=device)
    for index, rows, teachers in ((none, 12, 5), (none, 12, 0), (none[:0], 0, 5), (None, 0, 0)):
        some = {k: t[:rows] if k in ("student", "row_weight") else t for k, t in leaves.items()}
        rest = {**constant, "teacher_index": index, "teacher": constant["teacher"][:teachers]}
        with sk.use_backend(name):
            assert sk.linear_distillation(**some, **rest, mode=mode).isnan()
            zero = sk.linear_distillation(**some, **rest, mode=mode, on_empty="zero")
            grads = torch.autograd.grad(zero, [leaves["student_weight"], leaves["student_bias"]])
        assert zero == 0
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", BACKENDS)
def test_batch_dimensions_and_layouts(name, device):
    leaves, constant = everything(device)
    with sk.use_backend(name):
        flat = sk.linear_distillation(**leaves, **constant, reduction="none")
        shaped = {k: t.view(3, 4, *t.shape[1:]) if k in ("student", "row_weight") else t for k, t in leaves.items()}
        shaped["student"] = shaped["student"].transpose(0, 1).contiguous().transpose(0, 1)
        index = constant["teacher_index"].view(3, 4, 2)
        teacher = constant["teacher"].view(5, 1, -1)
        batched = sk.linear_distillation(
            **shaped, **(constant | {"teacher_index": index, "teacher": teacher}), reduction="none"
        )
    assert torch.equal(batched, flat.view(3, 4))


def test_double_backward_raises(device):
    leaves, constant = everything(device)
    for mode, leaf in itertools.product(("fast", "compact"), ("student", "student_temperature", "row_weight")):
        loss = sk.linear_distillation(**leaves, **constant, mode=mode).square()
        (grad,) = torch.autograd.grad(loss, leaves[leaf], create_graph=True)
        if mode == "compact" and leaf == "row_weight":
            continue  # the product with the losses is torch's, and has a second derivative
        with pytest.raises(NotImplementedError, match=r"^linear_distillation: double backward"):
            grad.sum().backward()


def test_autocast(device):
    """bfloat16 products of float32 tensors: as if they had been rounded."""
    leaves, constant = everything(device)
    rounded = ("student", "student_weight", "teacher", "teacher_weight")
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        loss = sk.linear_distillation(**leaves, **constant)
        grads = torch.autograd.grad(loss, list(leaves.values()))
    given = {k: t.detach().bfloat16().float() if k in rounded else t.detach() for k, t in (leaves | constant).items()}
    truth = oracle.linear_distillation(**given)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    assert [g.dtype for g in grads] == [torch.float32] * len(leaves)


@pytest.mark.costly("compiles two graphs")
def test_compiles_whole_and_for_every_temperature(device):
    leaves, constant = everything(device)
    del leaves["student_temperature"]
    torch._dynamo.reset()  # an earlier compilation may leave names of floats that the next frame makes constants
    frames = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def step(student_temperature: float, **tensors: Tensor) -> Tensor:
        return sk.linear_distillation(student_temperature=student_temperature, **tensors)

    for temperature in (0.5, 0.25, 0.125):
        loss = step(temperature, **leaves, **constant)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        eager = sk.linear_distillation(student_temperature=temperature, **leaves, **constant)
        torch.testing.assert_close(loss, eager)
        for got, want in zip(grads, torch.autograd.grad(eager, list(leaves.values())), strict=True):
            torch.testing.assert_close(got, want)
    assert frames.frame_count <= 2  # the first value is a constant of the graph


WRONG = {
    "student": (torch.zeros(12, 8, dtype=torch.int64), TypeError, "student must have dtype"),
    "student_weight": (torch.zeros(37, 7), ValueError, r"student_weight must have shape \(V, D\)"),
    "student_bias": (torch.zeros(36), ValueError, r"student_bias must have shape \(V,\)"),
    "teacher": (torch.zeros(5, 11, dtype=torch.float64), TypeError, "teacher must not be float64|teacher_weight must"),
    "teacher_weight": (torch.zeros(36, 11), ValueError, "teacher_weight must have as many rows as student_weight"),
    "teacher_bias": (torch.zeros(36), ValueError, "teacher_bias must have shape"),
    "center": (torch.zeros(1, 37), ValueError, "center must have shape"),
    "teacher_index": (torch.zeros(12, dtype=torch.int64), ValueError, "teacher_index must have shape"),
    "row_weight": (torch.zeros(11), ValueError, "row_weight must have shape"),
    "student_temperature": (0.0, ValueError, r"student_temperature must be in \(0"),
    "teacher_temperature": (torch.tensor(1.0, requires_grad=True), ValueError, "teacher_temperature must not require"),
    "divergence": ("js", ValueError, "divergence must be"),
    "reduction": ("max", ValueError, "reduction must be"),
    "num_items": (torch.zeros(2), ValueError, "num_items must be"),
    "on_empty": ("one", ValueError, "on_empty must be"),
    "mode": ("slow", ValueError, "mode must be"),
    "workspace_bytes": (0, ValueError, "workspace_bytes must be at least 1"),
    "process_group": (object(), TypeError, "process_group must be a torch"),
    "return_stats": (1, TypeError, "return_stats must be a bool"),
}


@pytest.mark.parametrize("argument", WRONG)
def test_errors(argument, device):
    leaves, constant = everything(device)
    value, kind, message = WRONG[argument]
    value = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(kind, match=rf"^linear_distillation: ({message})"):
        sk.linear_distillation(**(leaves | constant | {argument: value}))


@pytest.mark.parametrize("name", BACKENDS)
def test_errors_in_the_data(name, device):
    leaves, constant = everything(device)
    for change, message in (
        (
            {"teacher_index": constant["teacher_index"].index_fill(0, torch.tensor(3, device=device), 5)},
            "teacher_index",
        ),
        ({"teacher_index": constant["teacher_index"] - 1}, "teacher_index"),
        ({"student_temperature": torch.tensor(-1.0, device=device)}, "student_temperature"),
        ({"teacher_temperature": torch.tensor(0.0, device=device)}, "teacher_temperature"),
    ):
        with sk.use_backend(name):
            if device == "cpu":
                with pytest.raises(ValueError, match=rf"^linear_distillation: {message} must be"):
                    sk.linear_distillation(**(leaves | constant | change))
            else:
                assert sk.linear_distillation(**(leaves | constant | change)).isnan()
