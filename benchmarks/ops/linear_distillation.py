"""Distillation over a head of K prototypes, and centers of its logits: features and head -> loss, gradients, center."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.providers import EAGER, OURS

FLOOR = "four matmuls (floor)"
FLOOR_OF_LOGITS = "three matmuls (floor)"
PAIRS = {"N": 1024, "M": 1024, "D": 256, "K": 65536}
QUICK_PAIRS = {**PAIRS, "N": 512, "M": 512}
CROPS = {"N": 640, "M": 128, "D": 256, "K": 65536}
LARGE = {"N": 512, "M": 512, "D": 256, "K": 262144}
STUDENT, TEACHER = 0.1, 0.04


def crops(rows: int, teachers: int) -> Tensor:
    """DINO: of each image two teacher crops and `rows / (teachers / 2)` student crops, of which the first two are the
    teacher's and are not compared with themselves."""
    images = teachers // 2
    index = torch.arange(teachers).view(2, images).t().expand(rows // images, images, 2).clone()
    for crop in range(2):
        index[crop, :, crop] = -1
    return index.reshape(-1, 2)


def matmuls(case: Case, inputs: Inputs) -> Run:
    """Only the products, into preallocated memory: no fused loss does less."""
    student, head, teacher, teacher_head = (inputs[key] for key in ("student", "head", "teacher", "teacher_head"))
    logits, teacher_logits = (
        torch.empty(len(rows), len(head), dtype=case.dtype, device=head.device) for rows in (student, teacher)
    )
    grad_student, grad_head = torch.empty_like(student), torch.empty_like(head)

    def call() -> tuple[Tensor, ...]:
        torch.mm(teacher, teacher_head.t(), out=teacher_logits)
        torch.mm(student, head.t(), out=logits)
        torch.mm(logits, head, out=grad_student)
        torch.mm(logits.t(), student, out=grad_head)
        return (grad_student, grad_head)

    return Run(call, owned=(logits, teacher_logits, grad_student, grad_head))


def features(rows: int, width: int, seed: int, case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, device=device), dim=1).to(case.dtype)


class LinearDistillation(Benchmark):
    op = "linear_distillation"
    shape_keys = ("N", "M", "D", "K")
    names = ("student", "head", "teacher", "teacher_head", "center", "index")
    leaves = ("student", "head")
    results = ("loss", "grad student", "grad head")
    settings = frozenset({"backward"})
    twin_rows = 64
    host = HostCase({"N": 32, "M": 32, "D": 64, "K": 1000}, 3.0)

    def cost(self, case: Case) -> tuple[int, int]:
        """Features and heads are read, the gradients of the student's written; one matmul of the teacher, one or three
        of the student."""
        n, m, d, k = (case.shape[key] for key in self.shape_keys)
        touched = (n + m + 2 * k) * d
        written = (n + k) * d if case.backward else 0
        return (touched + written) * case.dtype.itemsize, 2 * d * k * (m + n * (3 if case.backward else 1))

    def hand_sums(self) -> list[HandSum]:
        case = self.case({"N": 10, "M": 4, "D": 8, "K": 100})
        read, written = 10 * 8 + 4 * 8 + 2 * 100 * 8, 10 * 8 + 100 * 8
        return [HandSum(case, 4 * (read + written), 2 * 8 * 100 * (4 + 30))]

    def cases(self, device: str) -> list[Case]:
        if device == "cpu":
            return [self.case(PAIRS), self.case(QUICK_PAIRS), self.case(CROPS), self.case(LARGE)]
        shapes = (PAIRS, {**CROPS, "N": 5120, "M": 1024}, {"N": 16384, "M": 16384, "D": 256, "K": 131072})
        return [self.case(shape, torch.bfloat16) for shape in shapes]

    def smoke_cases(self, device: str) -> list[Case]:
        rows = {"N": 33, "M": 33, "D": 32, "K": 515}
        return [self.case(rows), self.case({**rows, "N": 24, "M": 8}, torch.bfloat16)]

    def default_cases(self, device: str) -> list[Case]:
        return [self.case(QUICK_PAIRS)] if device == "cpu" else self.cases(device)[:1]

    def twin(self, case: Case) -> Case:
        """Whole images: their rows, or pairs of rows."""
        n, m = case.shape["N"], case.shape["M"]
        images = m if n == m else m // 2
        fewer = max(images * self.twin_rows // n, 1)
        return self.case({**case.shape, "N": n // images * fewer, "M": m // images * fewer}, case.dtype)

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """Unit features and prototypes, as of a DINO head."""
        n, m, d, k = (case.shape[key] for key in self.shape_keys)
        inputs = {
            "student": features(n, d, 1, case, device),
            "head": features(k, d, 2, case, device),
            "teacher": features(m, d, 3, case, device),
            "teacher_head": features(k, d, 4, case, device),
            "center": 0.01 * features(1, k, 5, case, device)[0],
        }
        if n != m:
            inputs["index"] = crops(n, m).to(device)
        return inputs

    @staticmethod
    def plain(
        student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, center: Tensor, index: Tensor | None
    ) -> Tensor:
        q = ((teacher @ teacher_head.t() - center) / TEACHER).softmax(-1)
        log_p = (student @ head.t() / STUDENT).log_softmax(-1)
        if index is None:
            return -(q * log_p).sum(-1).mean()
        valid = (index >= 0).to(q.dtype)
        q = q[index.clamp_min(0)] * valid[..., None]
        return -(q.sum(1) / valid.sum(1, keepdim=True) * log_p).sum(-1).mean()

    @staticmethod
    def fused(
        student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, center: Tensor, index: Tensor | None
    ) -> Tensor:
        return sk.linear_distillation(
            student,
            head,
            teacher,
            teacher_head,
            center=center,
            student_temperature=STUDENT,
            teacher_temperature=TEACHER,
            teacher_index=index,
        )

    @staticmethod
    def careful(
        student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, center: Tensor, index: Tensor | None
    ) -> Tensor:
        """Eager torch that keeps one tensor of (N, K) for backward beside the targets: no log-probabilities."""
        with torch.no_grad():
            q = ((teacher @ teacher_head.t()).sub_(center).div_(TEACHER)).softmax(-1)
            if index is not None:
                share = (index >= 0).to(q.dtype) / (index >= 0).sum(1, keepdim=True)
                first, second = (index.clamp_min(0).unbind(1)[side] for side in (0, 1))
                q = (q[first] * share[:, :1]).addcmul_(q[second], share[:, 1:])
        z = (student / STUDENT) @ head.t()
        return (z.logsumexp(-1) - torch.linalg.vecdot(q, z)).mean()

    @staticmethod
    def built(
        student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, center: Tensor, index: Tensor | None
    ) -> Tensor:
        """The log-sum-exp from `linear_cross_entropy`, and the mean logit of a target as a product with the mean
        prototype: the targets alone are materialised."""
        with torch.no_grad():
            q = ((teacher @ teacher_head.t()).sub_(center).div_(TEACHER)).softmax(-1)
        mean = q @ head
        if index is not None:
            share = (index >= 0).to(mean.dtype) / (index >= 0).sum(1, keepdim=True)
            mean = (mean[index.clamp_min(0)] * share[..., None]).sum(1)
        target = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        loss = sk.linear_cross_entropy(student, head, target, logit_scale=1 / STUDENT)
        return loss + ((student * (head[0] - mean)).sum(-1) / STUDENT).mean()

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        found = [
            Provider("careful eager torch", self.run(self.careful), patience=providers.patience(device)),
            Provider("from linear_cross_entropy", self.run(self.built)),
        ]
        return [*found, Provider(FLOOR, matmuls, is_floor=True)] if case.backward else found

    def limits(self, case: Case, device: str) -> list[Bar]:
        over_floor = providers.time_ratio(OURS, FLOOR)
        if device == "cuda":
            return [Bar("median / the bare matmuls", case.name, over_floor, 1.5)]
        if case.shape == LARGE:
            return [Bar("MB beyond the gradients", case.name, providers.memory_mb, 300)]
        limit = 1.3 if case.shape == PAIRS else 1.1
        found = [
            Bar("median / the bare matmuls", case.name, over_floor, limit),
            Bar("MB beyond the gradients", case.name, providers.memory_mb, 200),
        ]
        if case.shape == PAIRS:
            faster = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, faster, 1.5, True))
        return found


class SinkhornCenter(Benchmark):
    op = "sinkhorn_center"
    shape_keys = ("N", "D", "K")
    names = ("teacher", "head")
    results = ("codes",)
    differentiable = False
    compiles = False
    host = HostCase({"N": 32, "D": 64, "K": 1000})

    def cost(self, case: Case) -> tuple[int, int]:
        """Features and head are read, the center written; three matmuls."""
        n, d, k = (case.shape[key] for key in self.shape_keys)
        return (n + k) * d * case.dtype.itemsize + 4 * k, 3 * 2 * n * d * k

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"N": 10, "D": 8, "K": 100}), (10 + 100) * 8 * 4 + 400, 6 * 10 * 8 * 100)]

    def cases(self, device: str) -> list[Case]:
        if device == "cuda":
            return [self.case({"N": 2048, "D": 256, "K": 65536}, torch.bfloat16)]
        return [self.case({"N": n, "D": 256, "K": 65536}) for n in (1024, 2048)]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 33, "D": 32, "K": 515})]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        n, d, k = (case.shape[key] for key in self.shape_keys)
        return {"teacher": features(n, d, 1, case, device), "head": features(k, d, 2, case, device)}

    @staticmethod
    def plain(teacher: Tensor, head: Tensor) -> Tensor:
        """The center is read off one row of the codes of SwAV's loop."""
        logits = (teacher @ head.t()).to(torch.promote_types(teacher.dtype, torch.float32))
        q = torch.exp(logits / 0.07)
        for _ in range(3):
            q /= q.sum(0)
            q /= q.sum(1, keepdim=True)
        center = logits[0] - 0.07 * q[0].log()
        return center - center.mean()

    @staticmethod
    def fused(teacher: Tensor, head: Tensor) -> Tensor:
        return sk.sinkhorn_center(teacher, head, temperature=0.07)

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        def build(case: Case, t: Inputs) -> Run:
            logits = torch.empty(len(t["teacher"]), len(t["head"]), dtype=case.dtype, device=device)

            def call() -> Sequence[Tensor]:
                for _ in range(3):
                    torch.mm(t["teacher"], t["head"].t(), out=logits)
                return (logits,)

            return Run(call, owned=(logits,))

        return [Provider(FLOOR_OF_LOGITS, build, is_floor=True)]

    def limits(self, case: Case, device: str) -> list[Bar]:
        over_floor = providers.time_ratio(OURS, FLOOR_OF_LOGITS)
        return [
            Bar("median / three matmuls", case.name, over_floor, 1.3),
            Bar("MB beyond the results", case.name, providers.memory_mb, 200 if device == "cpu" else 1100),
        ]


class TeacherCenter(Benchmark):
    op = "teacher_center"
    shape_keys = ("N", "D", "K")
    names = ("teacher", "head")
    results = ("center",)
    differentiable = False
    compiles = False
    host = HostCase({"N": 32, "D": 64, "K": 1000})
    inputs = SinkhornCenter.inputs

    def cost(self, case: Case) -> tuple[int, int]:
        """Features and head are read, the center written; a matmul of one row."""
        n, d, k = (case.shape[key] for key in self.shape_keys)
        return (n + k) * d * case.dtype.itemsize + 4 * k, 2 * d * k

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"N": 10, "D": 8, "K": 100}), (10 + 100) * 8 * 4 + 400, 2 * 8 * 100)]

    def cases(self, device: str) -> list[Case]:
        return [self.case({"N": 2048, "D": 256, "K": 65536}, torch.bfloat16 if device == "cuda" else torch.float32)]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 33, "D": 32, "K": 515})]

    @staticmethod
    def plain(teacher: Tensor, head: Tensor) -> Tensor:
        return (teacher @ head.t()).to(torch.promote_types(teacher.dtype, torch.float32)).mean(0)

    @staticmethod
    def fused(teacher: Tensor, head: Tensor) -> Tensor:
        return sk.teacher_center(teacher, head)

    def backends(self, case: Case, device: torch.device, fused=None, label: str = "") -> list[Provider]:
        """Plain torch on every backend."""
        return [Provider(f"{OURS} torch", self.run(self.fused))]

    def limits(self, case: Case, device: str) -> list[Bar]:
        return [Bar("times faster than eager torch", case.name, providers.time_ratio(EAGER, OURS), 4.0, True)]


BENCHMARKS = (LinearDistillation(), SinkhornCenter(), TeacherCenter())
test_linear_distillation = smoke_test(BENCHMARKS)
