"""Losses of sentence-transformers, without their matrices of scores.

>>> import torch
>>> from sentence_transformers import SentenceTransformer
>>> import sslkernels as sk
>>> class Encoder(torch.nn.Linear):  # stands for a SentenceTransformer
...     def forward(self, features):
...         return {"sentence_embedding": super().forward(features["x"])}
>>> loss = sk.integrations.sentence_transformers.MultipleNegativesRankingLoss(Encoder(8, 4), scale=20.0)
>>> anchors, positives = {"x": torch.randn(16, 8)}, {"x": torch.randn(16, 8)}
>>> loss([anchors, positives], labels=None).backward()

The two classes take the arguments of the library's. Their losses of a row are sums over candidates, which need not be
in one matrix: a joint partition is `log(exp(a) + exp(b))` of the loss a of the queries and the loss b of the documents.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score
from torch import Tensor

from sslkernels.contrastive.energy import contrastive_energy
from sslkernels.integrations import warn_once

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(library.MultipleNegativesRankingLoss):
    """The class of sentence-transformers, fused.

    A hardness mode, a similarity other than `cos_sim` and `dot_score`, sparse embeddings, and `doc_to_doc` without
    `doc_to_query` are computed by the library's code, with one warning.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        why = _uncovered(self, embeddings)
        if why is None and len(embeddings) >= 2:
            return _ranking_loss(self, embeddings[0], embeddings[1:])
        if why is not None:
            warn_once(self, why)
        return super().compute_loss_from_embeddings(embeddings, labels)


class CachedMultipleNegativesRankingLoss(library.CachedMultipleNegativesRankingLoss):
    """The class of sentence-transformers, fused, as `MultipleNegativesRankingLoss`.

    Embeddings are computed in mini-batches, the loss of all of them in one pass: it needs no mini-batches.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        embeddings = [torch.cat(parts) for parts in reps]
        why = _uncovered(self, embeddings)
        if why is not None:
            warn_once(self, why)
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = _ranking_loss(self, embeddings[0], embeddings[1:])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _uncovered(loss: Any, embeddings: list[Tensor]) -> str | None:
    """What of the options is left to the library's code."""
    if loss.hardness_mode is not None and loss.hardness_strength > 0.0:
        return f"hardness_mode={loss.hardness_mode!r}"
    if loss.similarity_fct not in (cos_sim, dot_score):
        return f"similarity_fct={loss.similarity_fct!r}"
    if "doc_to_doc" in loss.directions and "doc_to_query" not in loss.directions:
        return "doc_to_doc without doc_to_query"
    if any(each.layout != torch.strided for each in embeddings):
        return "an embedding that is sparse"
    return None


def _ranking_loss(loss: Any, queries: Tensor, docs: list[Tensor]) -> Tensor:
    directions, count = set(loss.directions), queries.shape[0]
    options: dict[str, Any] = {"logit_scale": float(loss.scale), "normalize": loss.similarity_fct is cos_sim}
    if directions == {"query_to_doc", "doc_to_query"} and (
        loss.partition_mode == "per_direction" and not loss.gather_across_devices
    ):
        return contrastive_energy(queries, torch.cat(docs), direction="symmetric", **options)
    local, offset = (queries, docs[0]), 0
    if loss.gather_across_devices:
        queries, docs = all_gather_with_grad(queries), [all_gather_with_grad(doc) for doc in docs]
        offset = torch.distributed.get_rank() * count if torch.distributed.is_initialized() else 0
    every_doc, owners = torch.cat(docs), torch.arange(queries.shape[0], device=queries.device)
    own = owners[offset : offset + count]

    # The keys of the queries and of their documents, and the row that a key belongs to: it is left out of that row.
    of_queries, of_docs = [(every_doc, owners.new_full((every_doc.shape[0],), -1))], []
    if "query_to_query" in directions:
        of_queries.append((queries, owners))
    if "doc_to_query" in directions:
        of_docs.append((queries, torch.full_like(owners, -1)))
    if "doc_to_doc" in directions:
        of_docs.append((every_doc, owners.repeat(len(docs))))

    joint = bool(of_docs) and loss.partition_mode == "joint"
    losses = []
    for rows, keys in zip(local, (of_queries, of_docs) if of_docs else (of_queries,), strict=False):
        key, ids = (torch.cat(each) for each in zip(*keys, strict=True))
        excluded: dict[str, Any] = {"query_ids": own, "key_ids": ids} if len(keys) > 1 else {}
        reduction = "none" if joint else "mean"
        losses.append(contrastive_energy(rows, key, positive=own, reduction=reduction, **excluded, **options))
    return torch.logaddexp(*losses).mean() if joint else torch.stack(losses).mean()
