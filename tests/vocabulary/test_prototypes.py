"""Centers, and PrototypeLoss against lightly's losses on logits."""

from __future__ import annotations

import copy
import itertools

import peers
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from cases import BACKENDS
from torch import Tensor

import sslkernels as sk

V, D, B = 53, 8, 6
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])


def unit(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(device, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest value; `want` is in float64, so that only `got` is in error."""
    assert want.dtype == torch.float64
    assert float(((got - want).abs().max() / want.abs().max()).detach()) <= TOLERANCE[dtype]


@pytest.mark.full_for(name="triton", dtype=torch.float64)
@DTYPES
@pytest.mark.parametrize("name", BACKENDS)
def test_sinkhorn_equals_lightly(name, dtype, device):
    sinkhorn = peers.lightly_loss("swav_loss").sinkhorn
    rows, head = unit(40, D, dtype=dtype, device=device), unit(V, D, dtype=dtype, device=device, seed=1)
    bias = 0.1 * unit(1, V, dtype=dtype, device=device, seed=2)[0]
    for iterations, temperature in ((1, 0.05), (3, 0.05), (2, 0.3)):
        with sk.use_backend(name):
            center = sk.sinkhorn_center(rows, head, teacher_bias=bias, temperature=temperature, iterations=iterations)
        assert center.shape == (V,)
        assert abs(center.mean()) < 1e-6
        logits = rows @ head.t() + bias
        codes = ((logits - center) / temperature).softmax(1)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(codes, sinkhorn(logits, iterations, temperature), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_sinkhorn_masks_rows_and_chunks_them(name, device, monkeypatch):
    """Rows that do not count may hold anything; a head that overflows exp, and a prototype with logits of -inf."""
    from sslkernels.vocabulary.prototypes import centers

    rows, head = unit(70, D, dtype=torch.float32, device=device), unit(V, D, dtype=torch.float32, device=device, seed=1)
    mask = torch.arange(70, device=device) % 3 > 0
    bias = torch.zeros(V, device=device)
    bias[3] = float("-inf")
    dirty = rows.masked_fill(~mask[:, None], float("nan")).view(7, 10, D)
    monkeypatch.setattr(centers, "WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})
    with sk.use_backend(name):
        got = sk.sinkhorn_center(200 * dirty, head, teacher_bias=bias, row_mask=mask.view(7, 10), temperature=0.5)
    wide = (200 * rows[mask].double() @ head.double().t() + bias) / 0.5
    log_q = wide.clone()
    for _ in range(3):  # in the log domain, in float64
        log_q = log_q - torch.where(wide == -torch.inf, 0, log_q.logsumexp(0))
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    codes = (wide - got.double() / 0.5).softmax(1)
    torch.testing.assert_close(codes, log_q.exp(), rtol=1e-3, atol=1e-5)
    assert got.isfinite().all()
    with sk.use_backend(name):
        assert not sk.sinkhorn_center(dirty, head, row_mask=torch.zeros_like(mask).view(7, 10)).any()


@pytest.mark.parametrize("name", BACKENDS)
def test_sinkhorn_compiles_with_a_mask(name, device):
    """Rows are then masked and not dropped, as on a GPU."""
    rows, head = unit(20, D, dtype=torch.float32, device=device), unit(V, D, dtype=torch.float32, device=device, seed=1)
    mask = torch.arange(20, device=device) % 3 > 0
    compiled = torch.compile(sk.sinkhorn_center, fullgraph=True, backend="eager")
    with sk.use_backend(name):
        got = compiled(rows.masked_fill(~mask[:, None], float("nan")), head, temperature=0.5, row_mask=mask)
        want = sk.sinkhorn_center(rows[mask], head, temperature=0.5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_teacher_center_is_the_mean_logit(dtype, device):
    rows, head = unit(4, 10, D, dtype=dtype, device=device), unit(V, D, dtype=dtype, device=device, seed=1)
    bias = unit(V, dtype=dtype, device=device, seed=2)
    wide = rows.double() @ head.double().t() + bias.double()
    for context in (torch.autocast("cpu", enabled=False), torch.autocast(torch.device(device).type, torch.bfloat16)):
        with context:
            center = sk.teacher_center(rows.requires_grad_(), head, teacher_bias=bias)
        assert center.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not center.requires_grad
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(center.double(), wide.flatten(0, 1).mean(0), rtol=tolerance, atol=tolerance)


CENTER_ERRORS = {
    "iterations": (0, ValueError, "iterations must be at least 1"),
    "temperature": (-1.0, ValueError, r"temperature must be in \(0"),
    "temperature of inf": (float("inf"), ValueError, r"temperature must be in \(0"),
    "row_mask": (torch.ones(3), TypeError, "row_mask must have dtype torch.bool"),
    "teacher_bias": (torch.ones(V + 1), ValueError, "teacher_bias must have shape"),
}


@pytest.mark.parametrize("argument", CENTER_ERRORS)
def test_center_errors(argument):
    value, kind, message = CENTER_ERRORS[argument]
    rows, head = unit(3, D, dtype=torch.float32, device="cpu"), unit(V, D, dtype=torch.float32, device="cpu")
    with pytest.raises(kind, match=rf"^sinkhorn_center: {message}"):
        sk.sinkhorn_center(rows, head, **{argument.split()[0]: value})
    with pytest.raises(ValueError, match=r"^sinkhorn_center: temperature must be positive"):
        sk.sinkhorn_center(rows, head, temperature=torch.tensor(0.0))


class Heads:
    """Features of S student crops and T teacher crops, and the logits that lightly's losses take."""

    def __init__(self, dtype: torch.dtype, device: str, views: int = 4) -> None:
        make = {"dtype": dtype, "device": device}
        self.student = unit(views, B, D, seed=1, **make).requires_grad_()
        self.head = unit(V, D, seed=2, **make).requires_grad_()
        self.bias = (0.1 * unit(V, seed=3, **make)).requires_grad_()
        self.teacher, self.teacher_head = unit(2, B, D, seed=4, **make), unit(V, D, seed=5, **make)

    def in_float64(self) -> Heads:
        """The same values: lightly's losses of them are exact where its float32 rounds as much as ours."""
        exact = copy.copy(self)
        for name, value in vars(self).items():
            setattr(exact, name, value.detach().double().requires_grad_(value.requires_grad))
        return exact

    def student_logits(self) -> Tensor:
        return self.student @ self.head.t() + self.bias

    def teacher_logits(self) -> Tensor:
        return self.teacher @ self.teacher_head.t()

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss.sum(), [self.student, self.head, self.bias])

    def compare(self, loss: Tensor, exact: Heads, want: Tensor) -> None:
        dtype = self.student.dtype
        close(loss, want.reshape(()), dtype)
        for got, expected in zip(self.gradients(loss), exact.gradients(want), strict=True):
            close(got, expected, dtype)


@DTYPES
def test_dino_equals_lightly(dtype, device):
    """Over steps: the center moves. lightly rounds temperatures to float32; these are exact."""
    heads = Heads(dtype, device)
    exact = heads.in_float64()
    theirs = peers.lightly_loss("dino_loss").DINOLoss(
        V, warmup_teacher_temp=0.125, teacher_temp=0.0625, warmup_teacher_temp_epochs=3
    )
    ours = sk.nn.PrototypeLoss.dino(V, teacher_temperature=0.0625, warmup_teacher_temperature=0.125, warmup_steps=3)
    theirs, ours = theirs.to(device, torch.float64), ours.to(device, dtype)
    for step in range(5):
        want = theirs(list(exact.teacher_logits()), list(exact.student_logits()), epoch=step)
        loss = ours(
            list(heads.student), heads.head, list(heads.teacher), heads.teacher_head, student_bias=heads.bias, step=step
        )
        heads.compare(loss, exact, want)
        close(ours.center, theirs.center.flatten(), dtype)
    before = ours.eval().center.clone()
    ours(heads.student, heads.head, heads.teacher, heads.teacher_head)
    assert torch.equal(ours.center, before)


@DTYPES
def test_ibot_equals_lightly(dtype, device):
    heads = Heads(dtype, device, views=2)
    exact = heads.in_float64()
    theirs = peers.lightly_loss("ibot_loss").IBOTPatchLoss(V, teacher_temp=0.0625).to(device, torch.float64)
    ours = sk.nn.PrototypeLoss.ibot(V, teacher_temperature=0.0625).to(device, dtype)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool, device=device)
    mask[0, 1] = mask[2, :2] = True  # 4, 0 and 8 tokens
    for _ in range(3):
        want = theirs(exact.teacher_logits().flatten(0, 1), exact.student_logits().flatten(0, 1), mask)
        loss = ours(
            heads.student.flatten(0, 1),
            heads.head,
            heads.teacher.flatten(0, 1),
            heads.teacher_head,
            student_bias=heads.bias,
            mask=mask,
        )
        heads.compare(loss, exact, want)
        close(ours.center, theirs.center.value.flatten(), dtype)


@DTYPES
def test_swav_equals_lightly(dtype, device):
    heads = Heads(dtype, device)
    exact = heads.in_float64()
    queue = unit(2, 5, D, dtype=dtype, device=device, seed=9)
    for given in (None, queue):
        logits = exact.student_logits()
        queue_logits = None if given is None else list(given.double() @ exact.head.t() + exact.bias)
        want = peers.lightly_loss("swav_loss").SwaVLoss()(list(logits[:2]), list(logits[2:]), queue_logits)
        module = sk.nn.PrototypeLoss.swav(V, return_stats=True)
        loss, stats = module(heads.student, heads.head, student_bias=heads.bias, queue=given)
        heads.compare(loss, exact, want)
        assert len(stats) == 2


def test_nonfinite_batches_leave_the_center(device):
    """No token is masked in any image, a row overflowed, a prototype is masked."""
    heads = Heads(torch.float32, device)
    module = sk.nn.PrototypeLoss.ibot(V).to(device)
    module.center.fill_(0.25)
    before = module.center.clone()
    none = torch.zeros(3, 4, dtype=torch.bool, device=device)
    loss = module(heads.student[0, :0], heads.head, heads.teacher[0, :0], heads.teacher_head, mask=none)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, [heads.student, heads.head]))
    assert torch.equal(module.center, before)

    rows = sk.nn.PrototypeLoss(V).to(device)
    rows.center.copy_(before)
    spoilt = heads.teacher[0].clone()
    spoilt[1, 2] = float("inf")
    assert rows(heads.student[0], heads.head, spoilt, heads.teacher_head).isnan()
    assert torch.equal(rows.center, before)
    bias = torch.zeros(V, device=device)
    bias[3] = float("-inf")
    rows(heads.student[0], heads.head, heads.teacher[0], heads.teacher_head, teacher_bias=bias)
    assert torch.equal(rows.center == before, torch.arange(V, device=device) == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_center_stays_in_float32(dtype, device):
    """In half precision an update of a thousandth would round to nothing."""
    heads = Heads(torch.float32, device)
    modules = [sk.nn.PrototypeLoss(V, center_momentum=0.999).to(device, to) for to in (torch.float32, dtype)]
    for module in modules:
        module.center.fill_(1)
        module(heads.student[0], heads.head, heads.teacher[0], heads.teacher_head)
    assert modules[1].center.dtype == torch.float32
    assert torch.equal(modules[0].center, modules[1].center)
    assert (modules[1].center != 1).all()


def test_computing_again_in_backward_is_refused(device):
    """The center has moved since: the gradient would be another one, and the center would move twice."""
    heads = Heads(torch.float32, device)
    module = sk.nn.PrototypeLoss(V).to(device)
    given = (heads.student[0], heads.head, heads.teacher[0], heads.teacher_head)
    loss = torch.utils.checkpoint.checkpoint(module, *given, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"^PrototypeLoss: in training it cannot be computed again"):
        loss.backward()
    expected = torch.autograd.grad(module.eval()(*given), heads.head)
    again = torch.utils.checkpoint.checkpoint(module, *given, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, heads.head)[0], expected[0])


def test_sinkhorn_centers_of_a_batch(device):
    """DINOv2: every prototype has about the same mass, so that none collapses."""
    heads = Heads(torch.float64, device)
    loss, stats = sk.nn.PrototypeLoss.dino(
        V, centering="sinkhorn", teacher_temperature=0.5, sinkhorn_iterations=20, return_stats=True
    )(heads.student, heads.head, heads.teacher, heads.teacher_head)
    center = sk.sinkhorn_center(heads.teacher, heads.teacher_head, temperature=0.5, iterations=20)
    q = ((heads.teacher_logits() - center) / 0.5).softmax(-1)
    p = (heads.student @ heads.head.t() / 0.1).log_softmax(-1)
    pairs = [(s, t) for s, t in itertools.product(range(4), range(2)) if s != t]
    truth = torch.stack([-(q[t] * p[s]).sum(-1).mean() for s, t in pairs]).mean()
    torch.testing.assert_close(loss, truth)
    assert float(stats.perplexity) > V - 0.01


def test_the_module_is_plain(device):
    """A learned temperature is a parameter, options are kept, copies are independent."""
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Parameter"):
        sk.nn.PrototypeLoss(V, student_temperature=torch.tensor([0.1], requires_grad=True))
    module = sk.nn.PrototypeLoss(V, student_temperature=torch.nn.Parameter(torch.tensor([0.1]))).to(device)
    assert [name for name, _ in module.named_parameters()] == ["student_temperature"]
    assert list(module.state_dict()) == ["student_temperature", "center"]
    heads = Heads(torch.float32, device, views=2)
    twin = copy.deepcopy(module)
    module(heads.student, heads.head, heads.teacher, heads.teacher_head).backward()
    assert module.student_temperature.grad is not None
    assert module.center.any()
    assert not twin.center.any()
    torch.testing.assert_close(
        module.center, 0.1 * sk.teacher_center(heads.teacher, heads.teacher_head), rtol=1e-6, atol=1e-8
    )


WRONG = {
    "pairs": ({"pairs": "images"}, "pairs must be"),
    "prototypes": ({"prototypes": 0}, "prototypes must be at least 1"),
    "centering": ({"centering": "mean"}, "centering must be"),
    "views": ({"pairs": "views"}, "centering must be"),
    "warmup": ({"warmup_steps": 3}, "warmup_teacher_temperature must be given"),
    "momentum": ({"center_momentum": 1.5}, "center_momentum must be in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_module_errors(name):
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=rf"^PrototypeLoss: {message}"):
        sk.nn.PrototypeLoss(**{"prototypes": V, **options})


def test_call_errors():
    heads = Heads(torch.float32, "cpu")
    given = (heads.student, heads.head, heads.teacher, heads.teacher_head)
    for module, arguments, message in (
        (sk.nn.PrototypeLoss.dino(V), (heads.student, heads.head), "teacher must be given"),
        (sk.nn.PrototypeLoss.dino(V), given[:3], "teacher_weight must be given"),
        (sk.nn.PrototypeLoss.ibot(V), given, "mask must be given"),
        (sk.nn.PrototypeLoss.dino(V), (heads.student[0], *given[1:]), "student must have shape"),
        (sk.nn.PrototypeLoss.dino(V), (heads.student[:1], heads.head, heads.teacher[:1], heads.head), "student must"),
        (sk.nn.PrototypeLoss.swav(V), (heads.student[:1], heads.head), "student must have at least 2 views"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^PrototypeLoss: {message}"):
            module(*arguments)
