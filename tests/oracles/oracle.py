"""The losses as formulas in plain torch, independent of the package: differentiable, in any dtype.

In float64 they are the truth; in the dtype under test they are eager torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    logit_scale: float = 1.0,
    on_empty: str = "nan",
) -> Tensor:
    """Logits (..., V), targets (...)."""
    vocab = input.shape[-1]
    z = logit_scale * input.reshape(-1, vocab)
    y = target.reshape(-1).long()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    valid = y != ignore_index
    index = torch.where(valid, y, 0)
    w = torch.ones(vocab, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    log_probability = torch.log_softmax(z, dim=-1)
    nll = -log_probability.gather(1, index[:, None]).squeeze(1)
    loss = (1 - label_smoothing) * w[index] * nll
    if label_smoothing:
        loss = loss + label_smoothing / vocab * -(w * log_probability).sum(1)
    z_part = z_loss * torch.logsumexp(z, dim=-1) ** 2 if z_loss else torch.zeros_like(loss)
    tokens = 1 if token_weight is None else token_weight.reshape(-1)
    loss, z_part = (torch.where(valid, part, 0) * tokens for part in (loss, z_part))
    if reduction == "none":
        return (loss + z_part).reshape(target.shape)
    if reduction == "sum":
        return (loss + z_part).sum()
    if on_empty == "zero" and not valid.any():
        return (loss + z_part).sum()
    if num_items is not None:
        return (loss + z_part).sum() / num_items
    return loss.sum() / torch.where(valid, w[index], 0).sum() + z_part.sum() / valid.sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    mode: str = "auto",
    capacity: int | None = None,
    workspace_bytes: int | None = None,
    **options,
) -> Tensor:
    logits = logit_scale * (input @ linear_weight.t())
    if linear_bias is not None:
        logits = logits + linear_bias
    return cross_entropy(logits, target, **options)


def negative_sampling_loss(
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    *,
    reduction: str = "mean",
    exclude_positive: bool = False,
) -> Tensor:
    u = F.embedding(center, center_weight)
    positive = torch.einsum("...d,...d->...", u, F.embedding(context, context_weight))
    negative = torch.einsum("...d,...kd->...k", u, F.embedding(negatives.clamp(min=0), context_weight))
    terms = torch.where(negatives == -1, 0, F.logsigmoid(-negative))
    if exclude_positive:
        terms = torch.where(negatives == context.unsqueeze(-1), 0, terms)
    loss = -F.logsigmoid(positive) - terms.sum(-1)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def glove_loss(
    center: Tensor,
    context: Tensor,
    count: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    center_bias: Tensor,
    context_bias: Tensor,
    *,
    x_max: float = 100.0,
    alpha: float = 0.75,
    reduction: str = "mean",
) -> Tensor:
    u, v = F.embedding(center, center_weight), F.embedding(context, context_weight)
    count = count if count.is_floating_point() else count.to(center_weight.dtype)
    score = torch.einsum("...d,...d->...", u, v)
    score = (
        score + F.embedding(center, center_bias[:, None])[..., 0] + F.embedding(context, context_bias[:, None])[..., 0]
    )
    weight = torch.where(count < x_max, (count / x_max) ** alpha, torch.ones_like(count))
    loss = weight * (score - torch.log(count)) ** 2
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def error(value: Tensor, truth: Tensor) -> float:
    """Error relative to the norm of the truth; infinite if the non-finite values differ."""
    value, truth = value.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if not torch.equal(finite, value.isfinite()) or not torch.equal(
        value[~finite].nan_to_num(nan=1.5), truth[~finite].nan_to_num(nan=1.5)
    ):
        return float("inf")
    difference = (value[finite] - truth[finite]).norm()
    return 0.0 if difference == 0 else (difference / truth[finite].norm()).item()


def linear_distillation(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    center: Tensor | None = None,
    teacher_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    divergence: str = "cross_entropy",
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    on_empty: str = "nan",
    mode: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """Teacher rows (M, Dt) and indices (N, T), -1 for none."""
    logits = teacher @ teacher_weight.t()
    for shift in (teacher_bias, None if center is None else -center):
        logits = logits if shift is None else logits + shift
    q = torch.softmax(logits / teacher_temperature, 1)
    valid = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if teacher_index is not None:
        given = teacher_index >= 0
        valid = given.any(-1)
        q = (q[teacher_index.long().clamp_min(0)] * given.unsqueeze(-1)).sum(-2)
        q = q / given.sum(-1, keepdim=True).clamp_min(1)
    z = student @ student_weight.t()
    z = (z if student_bias is None else z + student_bias) / student_temperature
    loss = -(q * torch.log_softmax(z, -1)).sum(-1)
    if divergence == "kl":
        loss = loss + torch.special.xlogy(q, q).sum(-1)
    loss = torch.where(valid, loss, 0)
    loss = loss if row_weight is None else loss * row_weight
    if reduction == "none":
        return loss
    if reduction == "sum" or (on_empty == "zero" and not valid.any()):
        return loss.sum()
    return loss.sum() / (valid.sum() if num_items is None else num_items)
