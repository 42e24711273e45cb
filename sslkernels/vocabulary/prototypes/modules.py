"""The prototype losses of DINO, iBOT and SwAV as one module, which holds the center and the temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.modules import Options, options_of
from sslkernels.random.seeds import in_backward
from sslkernels.vocabulary.prototypes.centers import sinkhorn_center, teacher_center
from sslkernels.vocabulary.prototypes.linear_distillation import DistillationStats, linear_distillation

NAME = "PrototypeLoss"


class _StepHeads(NamedTuple):
    """The heads of a step, and the teacher's temperature at it."""

    student_weight: Tensor
    student_bias: Tensor | None
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    teacher_temperature: float


class PrototypeLoss(Options):
    """Module of `linear_distillation` that holds the teacher's center. The heads are arguments of forward: what a DINO
    head multiplies last, its features and its prototypes, so that the logits are never materialised.

    `PrototypeLoss.dino`, `.ibot` and `.swav` set `pairs` and the defaults of these methods.

    Args:
        prototypes: V, the rows of the heads.
        pairs: which rows are compared. "rows": student `(..., D)` and teacher `(..., Dt)` row by row. "crops": student
            `(S, B, D)` and teacher `(T, B, Dt)` or sequences of `(B, D)`, every student crop with every teacher crop
            but itself (crop t of the teacher is crop t of the student). "tokens": student and teacher `(n, D)`, the
            masked tokens of a `mask` `(B, ...)`, of which every image has the same weight. "views": swapped
            assignments, each of the first `assigned_views` of student `(S, B, D)` being the teacher of all others.
        student_temperature: divides the student's logits; a number, or a parameter of one element.
        teacher_temperature: divides the teacher's.
        warmup_teacher_temperature: that at step 0, if `warmup_steps` is not 0.
        warmup_steps: steps over which the teacher's temperature changes linearly to `teacher_temperature`; forward
            takes the `step`.
        centering: "ema": the average of `teacher_center`, updated after the loss while the module trains, at least in
            float32; what is not finite, for a batch of no rows or one that overflowed, does not move it. "sinkhorn":
            `sinkhorn_center` of each batch, in "views" of each view; "none".
        center_momentum: how much of the average a batch keeps.
        sinkhorn_iterations: see `sinkhorn_center`.
        assigned_views: with "views", how many of the first views get an assignment.
        mode: see `linear_distillation`.
        workspace_bytes: see `linear_distillation`.
        process_group: ranks over whose rows centers are computed; None: this process.
        return_stats: also return `DistillationStats`; with "views" a tuple of one for each assigned view.

    >>> import sslkernels as sk
    >>> prototypes = torch.randn(1000, 16)
    >>> loss = sk.nn.PrototypeLoss.dino(1000)
    >>> loss(torch.randn(4, 8, 16), prototypes, torch.randn(2, 8, 16), prototypes).shape
    torch.Size([])
    """

    center: Tensor

    @checks.with_python_numbers
    def __init__(
        self,
        prototypes: int,
        *,
        pairs: str = "rows",
        student_temperature: float | Tensor = 0.1,
        teacher_temperature: float = 0.04,
        warmup_teacher_temperature: float | None = None,
        warmup_steps: int = 0,
        centering: str = "ema",
        center_momentum: float = 0.9,
        sinkhorn_iterations: int = 3,
        assigned_views: int = 2,
        mode: str = "auto",
        workspace_bytes: int | None = None,
        process_group: Any = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))
        checks.integer(NAME, "prototypes", prototypes, low=1)
        checks.choice(NAME, "pairs", pairs, ("rows", "crops", "tokens", "views"))
        checks.number(NAME, "teacher_temperature", teacher_temperature, low=0.0, low_open=True)
        checks.integer(NAME, "warmup_steps", warmup_steps, low=0)
        if (warmup_steps > 0) != (warmup_teacher_temperature is not None):
            must = "be given if and only if warmup_steps is not 0"
            checks.fail(ValueError, NAME, "warmup_teacher_temperature", must, warmup_teacher_temperature)
        if warmup_teacher_temperature is not None:
            checks.number(NAME, "warmup_teacher_temperature", warmup_teacher_temperature, low=0.0, low_open=True)
        checks.choice(NAME, "centering", centering, ("ema", "sinkhorn", "none"))
        checks.number(NAME, "center_momentum", center_momentum, low=0.0, high=1.0)
        checks.integer(NAME, "sinkhorn_iterations", sinkhorn_iterations, low=1)
        checks.integer(NAME, "assigned_views", assigned_views, low=1)
        if pairs == "views" and centering == "ema":
            checks.fail(ValueError, NAME, "centering", 'be "sinkhorn" or "none" with pairs="views"', repr(centering))
        self.register_buffer("center", torch.zeros(prototypes) if centering == "ema" else None)

    @classmethod
    def dino(cls, prototypes: int, **options: Any) -> PrototypeLoss:
        """All pairs of crops but the same one, and the average center (Caron et al., 2021); centering="sinkhorn" is
        DINOv2's and DINOv3's."""
        return cls(prototypes, pairs="crops", **options)

    @classmethod
    def ibot(cls, prototypes: int, **options: Any) -> PrototypeLoss:
        """Masked tokens (Zhou et al., "iBOT: image BERT pre-training with online tokenizer", 2022)."""
        return cls(prototypes, pairs="tokens", **options)

    @classmethod
    def swav(cls, prototypes: int, **options: Any) -> PrototypeLoss:
        """Swapped Sinkhorn assignments at temperature 0.05 (Caron et al., 2020)."""
        return cls(prototypes, **{"pairs": "views", "centering": "sinkhorn", "teacher_temperature": 0.05, **options})

    def temperature_at(self, step: int | None) -> float:
        """The teacher's temperature at a step of the schedule; None: after it."""
        checks.integer(NAME, "step", step, low=0, optional=True)
        if step is None or step >= self.warmup_steps:
            return self.teacher_temperature
        start = self.warmup_teacher_temperature
        return start + (self.teacher_temperature - start) * step / max(self.warmup_steps - 1, 1)

    @checks.with_python_numbers
    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        student_weight: Tensor,
        teacher: Tensor | Sequence[Tensor] | None = None,
        teacher_weight: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        queue: Tensor | None = None,
        step: int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss, a scalar.

        student, teacher: features, as `pairs` says. student_weight, teacher_weight: `(V, D)`, `(V, Dt)`. With
        pairs="views" the teacher is the student if it is None. mask: bool `(B, ...)` with as many True as there are
        rows, only with "tokens", where it is required. queue: features `(T, Q, Dt)` that join the Sinkhorn of each
        assigned view, only with "views".
        """
        self._check(teacher, teacher_weight, mask, queue)
        if self.centering == "ema" and self.training and in_backward():
            raise RuntimeError(
                f"{NAME}: in training it cannot be computed again in backward (activation checkpointing), for its "
                "center has moved since; leave it out of the checkpointed function"
            )
        if teacher is None:
            teacher, teacher_weight, teacher_bias = student, student_weight, student_bias
        heads = _StepHeads(student_weight, student_bias, teacher_weight, teacher_bias, self.temperature_at(step))
        student, teacher = _stacked(student), _stacked(teacher)
        if self.pairs == "views":
            return self._views(student, teacher, queue, heads)
        index, row_weight, num_items = None, None, None
        if self.pairs == "crops":
            index, row_weight, num_items = _crops(student, teacher)
        elif self.pairs == "tokens":
            row_weight, num_items = _tokens(student, mask)
        center = self.center
        if self.centering == "sinkhorn":
            center = self._sinkhorn(teacher, heads)
        result = self._distil(
            student, teacher, heads, center=center, teacher_index=index, row_weight=row_weight, num_items=num_items
        )
        if self.centering == "ema" and self.training:
            self._update(teacher, heads)
        return result

    def _check(self, teacher: Any, teacher_weight: Tensor | None, mask: Tensor | None, queue: Tensor | None) -> None:
        if (teacher is None) != (teacher_weight is None):
            checks.fail(ValueError, NAME, "teacher_weight", "be given if and only if teacher is", teacher_weight)
        if teacher is None and self.pairs != "views":
            checks.fail(TypeError, NAME, "teacher", 'be given unless pairs is "views"', None)
        if (mask is not None) != (self.pairs == "tokens"):
            must = 'be given if and only if pairs is "tokens"'
            checks.fail(ValueError, NAME, "mask", must, None if mask is None else tuple(mask.shape))
        if queue is not None and self.pairs != "views":
            checks.fail(ValueError, NAME, "queue", 'be None unless pairs is "views"', tuple(queue.shape))

    def _distil(self, student: Tensor, teacher: Tensor, heads: _StepHeads, **rows: Any) -> Any:
        return linear_distillation(
            student,
            heads.student_weight,
            teacher,
            heads.teacher_weight,
            student_bias=heads.student_bias,
            teacher_bias=heads.teacher_bias,
            student_temperature=self.student_temperature,
            teacher_temperature=heads.teacher_temperature,
            mode=self.mode,
            workspace_bytes=self.workspace_bytes,
            return_stats=self.return_stats,
            **rows,
        )

    def _sinkhorn(self, teacher: Tensor, heads: _StepHeads) -> Tensor:
        return sinkhorn_center(
            teacher,
            heads.teacher_weight,
            teacher_bias=heads.teacher_bias,
            temperature=heads.teacher_temperature,
            iterations=self.sinkhorn_iterations,
            process_group=self.process_group,
        )

    @torch.no_grad()
    def _update(self, teacher: Tensor, heads: _StepHeads) -> None:
        batch = teacher_center(
            teacher, heads.teacher_weight, teacher_bias=heads.teacher_bias, process_group=self.process_group
        )
        average = self.center.lerp(batch.to(self.center.dtype), 1 - self.center_momentum)
        # No rows have no mean, and a step that overflowed must not end the training.
        self.center.copy_(torch.where(batch.isfinite(), average, self.center))

    def _apply(self, fn: Any, recurse: bool = True) -> PrototypeLoss:
        """Keeps the center in float32, which in half precision would stop moving."""
        before = self.center
        super()._apply(fn, recurse)
        if before is not None and self.center.dtype in (torch.float16, torch.bfloat16):
            self.center = before.to(self.center.device)
        return self

    def _views(self, student: Tensor, teacher: Tensor, queue: Tensor | None, heads: _StepHeads) -> Any:
        """Each assigned view is the teacher of the other views, with a center of its own."""
        views, batch = student.shape[:2]
        if views < 2 or teacher.shape[0] < self.assigned_views or views < self.assigned_views:
            must = f"have at least 2 views, and {self.assigned_views} to assign"
            checks.fail(ValueError, NAME, "student", must, tuple(student.shape))
        index = torch.arange(batch, device=student.device)[:, None].expand(views - 1, batch, 1)
        losses: list[Tensor] = []
        stats: list[DistillationStats] = []
        for view in range(self.assigned_views):
            codes, center = teacher[view], None
            if self.centering == "sinkhorn":
                center = self._sinkhorn(codes if queue is None else torch.cat([codes, queue[view]]), heads)
            others = torch.cat([student[:view], student[view + 1 :]])
            result = self._distil(others, codes, heads, center=center, teacher_index=index)
            if self.return_stats:
                result, found = result
                stats.append(found)
            losses.append(result)
        loss = torch.stack(losses).mean()
        return (loss, tuple(stats)) if self.return_stats else loss


def _stacked(features: Tensor | Sequence[Tensor]) -> Tensor:
    return features if isinstance(features, Tensor) else torch.stack(list(features))


def _crops(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, int]:
    """Teacher rows (S, B, T) of each student crop, the number of them, and the number of pairs of the batch."""
    for name, features in (("student", student), ("teacher", teacher)):
        checks.dims(NAME, name, features, 3, "(crops, batch, D)", high=3)
    (views, batch), crops = student.shape[:2], teacher.shape[0]
    if teacher.shape[1] != batch:
        checks.fail(ValueError, NAME, "teacher", f"have the batch size of student, {batch}", tuple(teacher.shape))
    device = student.device
    rows = torch.arange(crops * batch, device=device).view(crops, batch).t()
    same = torch.arange(views, device=device)[:, None] == torch.arange(crops, device=device)
    pairs = views * crops - min(views, crops)
    if pairs == 0:
        checks.fail(ValueError, NAME, "student", "have a crop that the teacher does not", tuple(student.shape))
    index = torch.where(same[:, None], -1, rows)
    weight = (~same).sum(1).to(torch.float32)[:, None].expand(views, batch)
    return index, weight, pairs * batch


def _tokens(student: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """The weight of each masked token, one over their number in the image, and the number of images."""
    checks.tensor(NAME, "mask", mask, (torch.bool,))
    checks.dims(NAME, "mask", mask, 2, "(B, ...)")
    flat = mask.flatten(1)
    image = flat.nonzero()[:, 0]
    if image.shape[0] != student.shape[0]:
        must = f"have as many True as student has rows, {student.shape[0]}"
        checks.fail(ValueError, NAME, "mask", must, image.shape[0])
    return (1 / flat.sum(1).to(torch.float32))[image], mask.shape[0]
