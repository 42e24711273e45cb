"""The contrastive energies on dense score matrices, written from their definitions, for autograd in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resolved_positive(positive, ids, count: int, exclude_self: bool) -> list[int]:
    """The positive of each row, -1 for none, in plain Python."""
    index = list(range(count)) if positive is None else positive.tolist()
    if not exclude_self:
        return index
    for i in range(count):
        if index[i] == i:
            same = [] if ids is None else [j for j in [*range(i + 1, count), *range(i)] if ids[j] == ids[i]]
            index[i] = same[0] if same else -1
    return index


def contrastive_losses(
    query: Tensor,
    key: Tensor,
    *,
    positive=None,
    energy="softmax",
    direction="row",
    logit_scale=1.0,
    logit_bias=None,
    normalize=False,
    negatives=None,
    negatives_mask=None,
    bank=None,
    query_ids=None,
    key_ids=None,
    bank_ids=None,
    same_id="ignore",
    exclude_self=False,
    label_smoothing=0.0,
    margin=None,
    in_batch=True,
    candidate_mask=None,
    key_mask=None,
    bank_mask=None,
) -> tuple[Tensor, Tensor]:
    """(losses (N,), which rows count in the mean)."""
    n, m = query.shape[0], key.shape[0]
    if normalize:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        bank = None if bank is None else F.normalize(bank, dim=1)
        if negatives is not None:
            if negatives_mask is not None:
                negatives = torch.where(negatives_mask[..., None], negatives, 1.0)
            negatives = F.normalize(negatives, dim=2)
    bias = 0.0 if logit_bias is None else logit_bias
    scores = logit_scale * (query @ key.T) + bias
    supervised = query_ids is not None and same_id == "positive"
    index = resolved_positive(positive, query_ids if supervised else None, n, exclude_self)
    main = torch.zeros(n, m, dtype=torch.bool)
    for i, j in enumerate(index):
        if j >= 0:
            main[i, j] = True
    has = main.any(1)
    itself = torch.eye(n, m, dtype=torch.bool) if exclude_self else torch.zeros(n, m, dtype=torch.bool)
    same = torch.zeros(n, m, dtype=torch.bool)
    if key_ids is not None:
        same = query_ids[:, None] == key_ids[None, :]
    kept = torch.ones(n, m, dtype=torch.bool)
    for mask in (candidate_mask, key_mask):
        if mask is not None:
            kept = kept & mask
    extras = same & ~itself & ~main & kept
    candidate = ~itself & (kept | main)
    if not supervised:
        candidate = candidate & ~extras
        extras = torch.zeros_like(extras)
    if not in_batch:
        candidate = main.clone()
    negative_scores, valid = scores.new_zeros(n, 0), torch.zeros(n, 0, dtype=torch.bool)
    if negatives is not None:
        negative_scores = logit_scale * torch.einsum("nd,nkd->nk", query, negatives) + bias
        valid = torch.ones_like(negative_scores, dtype=torch.bool) if negatives_mask is None else negatives_mask
    bank_scores = scores.new_zeros(n, 0) if bank is None else logit_scale * (query @ bank.T) + bias

    all_scores = torch.cat([scores, negative_scores, bank_scores], 1)
    none = torch.zeros(n, negative_scores.shape[1] + bank_scores.shape[1], dtype=torch.bool)
    in_bank = torch.ones_like(bank_scores, dtype=torch.bool)
    if bank_mask is not None:
        in_bank = in_bank & bank_mask
    all_extras = torch.cat([extras, none], 1)
    if bank_ids is not None:
        same_in_bank = (query_ids[:, None] == bank_ids) & in_bank
        if supervised:
            all_extras[:, -len(bank_ids) :] = same_in_bank
        else:
            in_bank = in_bank & ~same_in_bank
    all_candidates = torch.cat([candidate, valid, in_bank], 1)
    all_main = torch.cat([main, none], 1)
    row = _energies(all_scores, all_candidates, all_main, all_extras, energy, label_smoothing, margin, supervised)
    if energy == "sigmoid":
        return row, torch.ones(n, dtype=torch.bool)
    if direction == "row":
        return torch.where(has, row, 0), has
    columns = [j if j >= 0 else 0 for j in index]
    own_pair = torch.eye(n, dtype=torch.bool) & has[:, None]  # row i: the queries of key columns[i]
    positives_of_others = main.T[columns] & ~own_pair
    column_extras = extras.T[columns]
    if supervised and energy == "softmax":
        column_extras = column_extras | positives_of_others
        column_loss = _energies(
            scores.T[columns], candidate.T[columns], own_pair, column_extras, energy, label_smoothing, margin, True
        )
    else:
        candidates = candidate.T[columns]
        if energy == "hinge":
            candidates = candidates & ~positives_of_others
        column_loss = _energies(
            scores.T[columns], candidates, own_pair, column_extras, energy, label_smoothing, margin, supervised
        )
    column = torch.where(has, column_loss, 0)
    return (column if direction == "column" else 0.5 * torch.where(has, row, 0) + 0.5 * column), has


def _energies(s, candidate, main, extras, energy, label_smoothing, margin, supervised):
    positive = main | extras
    if energy == "softmax":
        masked = torch.where(candidate, s, float("-inf"))
        # A row without candidates has no log-sum-exp; it has no positive either.
        lse = torch.where(candidate.any(1), torch.logsumexp(torch.where(candidate.any(1)[:, None], masked, 0), 1), 0)
        target = positive if supervised else main
        target = target.double() / target.sum(1, keepdim=True).clamp(min=1)
        smooth = candidate.double() / candidate.sum(1, keepdim=True).clamp(min=1)
        target = (1 - label_smoothing) * target + label_smoothing * smooth
        return lse - torch.where(target > 0, target * s, 0).sum(1)
    if energy == "sigmoid":
        cost = torch.where(positive, -s, s)
        return torch.where(candidate, F.softplus(cost, threshold=1e9), 0).sum(1)
    at = torch.where(main, s, 0).sum(1, keepdim=True)
    cost = (0.2 if margin is None else margin) + s - at
    return torch.where(candidate & ~positive & main.any(1, keepdim=True), cost.clamp(min=0), 0).sum(1)
