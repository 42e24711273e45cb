"""Errors of the contrastive energies: they name function, argument, rule and value."""

import pytest
import torch

import sslkernels as sk

Q, K = torch.randn(4, 3), torch.randn(6, 3)
N = torch.randn(4, 2, 3)
IDS = torch.arange(4)
MASK = torch.ones(4, 6, dtype=torch.bool)

CONTRASTIVE = [
    (dict(query=[1.0]), TypeError, r"query must be a torch.Tensor; got list"),
    (dict(query=Q.long()), TypeError, r"query must have dtype .*; got torch.int64"),
    (dict(query=Q[0]), ValueError, r"query must have shape \(N, D\); got \(3,\)"),
    (dict(query=N), ValueError, r"query must have shape \(N, D\); got \(4, 2, 3\)"),
    (dict(key=None), TypeError, r"key must be a torch.Tensor; got NoneType"),
    (dict(key=torch.randn(6, 4)), ValueError, r"key must have shape \(M, D\) = \(6, 3\); got \(6, 4\)"),
    (dict(key=K.bfloat16()), TypeError, r"key must have the dtype of query, torch.float32, outside autocast; got"),
    (dict(key=K[:3]), ValueError, r"positive must be given where key has fewer rows \(3\) than query \(4\); got None"),
    (dict(key=K.to("meta")), ValueError, r"key must be on the device of query, cpu; got meta"),
    (dict(positive=torch.tensor([0, 1, 2, 6])), ValueError, r"positive must be in \[0, 6\), or -1 for none; got 6"),
    (dict(positive=torch.tensor([0, 1, 2, -2])), ValueError, r"positive must be in \[0, 6\), or -1 for none; got -2"),
    (dict(positive=torch.tensor([0, 1])), ValueError, r"positive must have shape \(N,\) = \(4,\); got \(2,\)"),
    (dict(positive=IDS.float()), TypeError, r"positive must have dtype torch.int64 or torch.int32; got torch.float32"),
    (dict(energy="margin"), ValueError, r"energy must be 'softmax', 'sigmoid' or 'hinge'; got 'margin'"),
    (dict(direction="both"), ValueError, r"direction must be 'row', 'column' or 'symmetric'; got 'both'"),
    (dict(same_id="keep"), ValueError, r"same_id must be 'ignore' or 'positive'; got 'keep'"),
    (dict(reduction="avg"), ValueError, r"reduction must be 'none', 'mean' or 'sum'; got 'avg'"),
    (dict(logit_scale="10"), TypeError, r"logit_scale must be a number; got str"),
    (
        dict(logit_scale=torch.ones(2)),
        ValueError,
        r"logit_scale must be a number or a tensor of one element; got \(2,\)",
    ),
    (dict(logit_bias=torch.ones(1).int()), TypeError, r"logit_bias must have dtype .*; got torch.int32"),
    (dict(negatives=torch.randn(4, 3)), ValueError, r"negatives must have shape \(N, K, D\); got \(4, 3\)"),
    (dict(negatives=torch.randn(5, 2, 3)), ValueError, r"negatives must have shape .* = \(4, 2, 3\); got \(5, 2, 3\)"),
    (dict(negatives=N.half()), TypeError, r"negatives must have the dtype of query"),
    (dict(negatives_mask=torch.ones(4, 2).bool()), ValueError, r"negatives_mask must be None without negatives"),
    (dict(negatives=N, negatives_mask=torch.ones(4, 2)), TypeError, r"negatives_mask must have dtype torch.bool; got"),
    (dict(negatives=N, negatives_mask=torch.ones(4).bool()), ValueError, r"negatives_mask must have shape \(N, K\)"),
    (dict(negatives=IDS), ValueError, r"negatives must have shape \(N, K\) with indices; got \(4,\)"),
    (dict(negatives=IDS[:3, None]), ValueError, r"negatives must have shape \(N, K\) with indices = \(4, 1\); got"),
    (dict(negatives=IDS[:, None].short()), TypeError, r"negatives must have dtype .* or torch.int32; got torch.int16"),
    (dict(negatives=IDS[:, None] + 3), ValueError, r"negatives must be in \[0, 6\), or -1 for none; got 6"),
    (dict(bank_ids=IDS, query_ids=IDS), ValueError, r"bank_ids must have shape \(B,\) = \(0,\); got \(4,\)"),
    (dict(bank=K, query_ids=IDS), ValueError, r"key_ids or bank_ids must be given with the other ids; got None"),
    (dict(bank=torch.randn(5, 2)), ValueError, r"bank must have shape \(B, D\) = \(5, 3\); got \(5, 2\)"),
    (
        dict(key=Q.clone(), exclude_self=True, same_id="positive", query_ids=IDS, bank=K, bank_ids=torch.arange(6)),
        ValueError,
        r"key_ids must be given with exclude_self and same_id=\"positive\", where key is not the tensor query",
    ),
    (dict(query_ids=IDS), ValueError, r"key_ids must be given with the other ids; got None"),
    (dict(key_ids=torch.arange(6)), ValueError, r"query_ids must be given with the other ids; got None"),
    (dict(query_ids=IDS, key_ids=IDS), ValueError, r"key_ids must have shape \(M,\) = \(6,\); got \(4,\)"),
    (dict(query_ids=IDS.float(), key_ids=IDS), TypeError, r"query_ids must have dtype"),
    (dict(candidate_mask=torch.ones(4, 6)), TypeError, r"candidate_mask must have dtype torch.bool; got torch.float32"),
    (dict(candidate_mask=MASK[:, :4]), ValueError, r"candidate_mask must have shape \(N, M\) = \(4, 6\); got \(4, 4\)"),
    (dict(key_mask=MASK[0, :4]), ValueError, r"key_mask must have shape \(M,\) = \(6,\); got \(4,\)"),
    (dict(bank_mask=MASK[0]), ValueError, r"bank_mask must be None without bank; got \(6,\)"),
    (dict(bank=K, bank_mask=MASK[0, :4]), ValueError, r"bank_mask must have shape \(B,\) = \(6,\); got \(4,\)"),
    (dict(candidate_mask=MASK, in_batch=False), ValueError, r"candidate_mask must be None with in_batch=False; got"),
    (dict(key_mask=MASK[0], in_batch=False), ValueError, r"key_mask must be None with in_batch=False; got \(6,\)"),
    (dict(exclude_self=True), ValueError, r"key must be the queries with exclude_self; got 6 rows for 4 queries"),
    (dict(exclude_self=True, key=Q), ValueError, r"positive must be given with exclude_self .*; got None"),
    (dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
    (
        dict(label_smoothing=0.1, energy="sigmoid"),
        ValueError,
        r'label_smoothing must be 0 unless energy is "softmax"; got 0.1',
    ),
    (dict(same_id="positive"), ValueError, r'query_ids must be given with same_id="positive"; got None'),
    (dict(normalize="no"), TypeError, r"normalize must be a bool; got str"),
    (dict(exclude_self=1), TypeError, r"exclude_self must be a bool; got int"),
    (
        dict(process_group="world"),
        TypeError,
        r"process_group must be a torch.distributed.ProcessGroup or",
    ),
    (dict(margin=0.5), ValueError, r'margin must be None unless energy is "hinge"; got 0.5'),
    (dict(margin="1", energy="hinge"), TypeError, r"margin must be a number; got str"),
    (dict(on_empty="skip"), ValueError, r"on_empty must be 'nan' or 'zero'; got 'skip'"),
    (dict(num_items=4, reduction="sum"), ValueError, r'num_items must be None unless reduction is "mean"; got'),
    (dict(num_items=-1), ValueError, r"num_items must be in \[0, inf\]; got -1"),
    (dict(num_items=torch.ones(2)), ValueError, r"num_items must be an int or a 0-d tensor; got \(2,\)"),
    (dict(bank=K, direction="column"), ValueError, r'bank must be None with direction="column"; got \(6, 3\)'),
    (dict(negatives=N, direction="column"), ValueError, r'negatives must be None with direction="column"; got'),
    (dict(in_batch=1), TypeError, r"in_batch must be a bool; got int"),
    (dict(in_batch=False, direction="symmetric"), ValueError, r'direction must be "row" with in_batch=False; got'),
    (
        dict(in_batch=False, query_ids=IDS, key_ids=torch.arange(6)),
        ValueError,
        r"key_ids must be None with in_batch=False",
    ),
    (dict(in_batch=False, key=Q, exclude_self=True), ValueError, r"exclude_self must be False with in_batch=False"),
    (dict(row_weight=torch.ones(3)), ValueError, r"row_weight must have shape \(N,\) = \(4,\); got \(3,\)"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), CONTRASTIVE, ids=lambda v: "-".join(v) if isinstance(v, dict) else ""
)
def test_contrastive_energy(change, kind, message):
    with pytest.raises(kind, match=r"^contrastive_energy: " + message):
        sk.contrastive_energy(**{"query": Q, "key": K, **change})


NAMED = [
    (lambda: sk.info_nce(Q, K), ValueError, r"info_nce: positive_key must have shape query.shape = \(4, 3\); got"),
    (lambda: sk.info_nce(Q, Q, K, negative_mode="own"), ValueError, r"info_nce: negative_mode must be 'unpaired' or"),
    (lambda: sk.info_nce(Q, Q, N), ValueError, r'info_nce: negative_keys must have shape \(M, D\) in .*"unpaired"'),
    (lambda: sk.info_nce(Q, Q, K, negative_mode="paired"), ValueError, r"info_nce: negative_keys must have shape"),
    (lambda: sk.info_nce(Q, Q, temperature=0), ValueError, r"info_nce: temperature must not be 0; got 0"),
    (lambda: sk.info_nce(Q, Q, temperature="1"), TypeError, r"info_nce: temperature must be a number; got str"),
    (
        lambda: sk.info_nce(Q, Q, torch.randn(9, 5)),
        ValueError,
        r"info_nce: negative_keys must .* = \(9, 3\)",
    ),
    (
        lambda: sk.info_nce(Q, Q.double()),
        TypeError,
        r"info_nce: positive_key must have the dtype of query",
    ),
    (lambda: sk.nt_xent(Q, Q.double()), TypeError, r"nt_xent: z1 must have the dtype of z0, torch.float32, outside"),
    (lambda: sk.nn.ClipLoss(0.0), ValueError, r"ClipLoss: init_logit_scale must be in \(0, inf\]; got 0.0"),
    (lambda: sk.nn.SigLipLoss(max_logit_scale=-1.0), ValueError, r"SigLipLoss: max_logit_scale must be in \(0, inf\]"),
    (lambda: sk.nt_xent(Q, K), ValueError, r"nt_xent: z1 must have shape z0.shape = \(4, 3\); got \(6, 3\)"),
    (lambda: sk.clip_loss(Q, Q.tolist(), 1.0), TypeError, r"clip_loss: text_features must be a torch.Tensor; got list"),
    (lambda: sk.clip_loss(Q, Q, torch.ones(3)), ValueError, r"clip_loss: logit_scale must be a number or a tensor"),
    (lambda: sk.siglip_loss(Q, Q, 1.0, "x"), TypeError, r"siglip_loss: logit_bias must be a number; got str"),
]


@pytest.mark.parametrize(("call", "kind", "message"), NAMED)
def test_named_losses(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        sk.contrastive_energy(Q, K, IDS)
    with pytest.raises(TypeError):
        sk.info_nce(Q, Q, K, 0.1)
