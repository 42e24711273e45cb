"""Losses of lightly: NT-Xent without its matrices of scores, DINO without the log-probabilities of all crops.

>>> import torch
>>> import sslkernels as sk
>>> loss = sk.integrations.lightly.NTXentLoss(temperature=0.1, memory_bank_size=(64, 16))
>>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()

Where the last layer of the head is at hand, `sk.nn.PrototypeLoss.dino` does without the logits, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightly.loss import dino_loss
from lightly.loss import ntx_ent_loss as library
from torch import Tensor
from torch.nn.functional import normalize

from sslkernels.contrastive.energy import contrastive_energy
from sslkernels.contrastive.losses import nt_xent

__all__ = ["DINOLoss", "NTXentLoss"]


class NTXentLoss(library.NTXentLoss):
    """The class of lightly, fused, with and without a memory bank and features gathered from all ranks."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        gathers = self.gather_distributed and library.dist.world_size() > 1
        if self.memory_bank.size[0] == 0:
            group = torch.distributed.group.WORLD if gathers else None
            return nt_xent(out0, out1, temperature=self.temperature, process_group=group)
        out0, out1 = normalize(out0, dim=1), normalize(out1, dim=1)
        out1, bank = self.memory_bank.forward(out1, update=out0.requires_grad)
        bank = bank.to(device=out0.device, dtype=out0.dtype).T
        return contrastive_energy(out0, out1, bank=bank, in_batch=False, logit_scale=1.0 / self.temperature)


class DINOLoss(dino_loss.DINOLoss):
    """The class of lightly, a student's crop at a time: its logits meet the sum of the teacher's probabilities, so that
    neither they nor their log-probabilities are stacked. lightly computes a teacher that wants a gradient."""

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        teachers, students = len(teacher_out), len(student_out)
        pairs = teachers * students - min(teachers, students)
        if pairs == 0 or any(teacher.requires_grad for teacher in teacher_out):
            return super().forward(teacher_out, student_out, teacher_temp, epoch)
        temperature = torch.tensor(self.teacher_temp if teacher_temp is None else teacher_temp)
        if teacher_temp is None and epoch is not None and epoch < self.warmup_teacher_temp_epochs:
            temperature = self.teacher_temp_schedule[epoch]
        targets = [((teacher - self.center[0]) / temperature).softmax(-1) for teacher in teacher_out]
        loss: Any = 0.0
        for crop, student in enumerate(student_out):
            others = targets[:crop] + targets[crop + 1 :]
            if others:
                logits = student / self.student_temp
                lse = logits.logsumexp(-1).sum()
                loss = loss + len(others) * lse - torch.linalg.vecdot(logits, sum(others)).sum()
        self.update_center(torch.stack(list(teacher_out)))
        return loss / (pairs * teacher_out[0].shape[0])
