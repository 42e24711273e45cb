"""Bad input: the error names the function, the argument, the rule and the value."""

from __future__ import annotations

import numpy
import pytest
import torch
from kernel_files import kernels

import sslkernels as sk

X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, -100])
Z = torch.randn(4, 5)

CROSS_ENTROPY = [
    (dict(input=[1.0]), TypeError, r"input must be a torch.Tensor; got list"),
    (dict(input=Z.long()), TypeError, r"input must have dtype .*float16 or torch.float64; got torch.int64"),
    (dict(input=torch.tensor(1.0)), ValueError, r"input must have shape .*\(V,\).*; got \(\)"),
    (dict(target=Y[:3]), ValueError, r"target must have shape \(4,\) .*; got \(3,\)"),
    (dict(target=Y.bool()), TypeError, r"target must have dtype .*; got torch.bool"),
    (dict(target=torch.rand(4)), ValueError, r"target \(class probabilities\) must have shape .*; got \(4,\)"),
    (dict(target=torch.tensor([0, 1, 2, 5])), ValueError, r"target must be in \[0, 5\) or ignore_index=-100; got 5"),
    (dict(target=torch.tensor([0, 1, 2, -1])), ValueError, r"target must be in \[0, 5\) or ignore_index=-100; got -1"),
    (dict(weight=torch.rand(4)), ValueError, r"weight must have shape \(V,\) = \(5,\); got \(4,\)"),
    (dict(weight=torch.ones(5, dtype=torch.int64)), TypeError, r"weight must have dtype"),
    (dict(weight=torch.rand(5, requires_grad=True)), ValueError, r"weight must not require grad"),
    (dict(reduction="avg"), ValueError, r"reduction must be 'none', 'mean' or 'sum'; got 'avg'"),
    (dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
    (dict(label_smoothing="0.1"), TypeError, r"label_smoothing must be a number; got str"),
    (dict(z_loss=-1.0), ValueError, r"z_loss must be in \[0, inf\]; got -1.0"),
    (dict(softcap=0.0), ValueError, r"softcap must be in \(0, inf\]; got 0.0"),
    (dict(softcap=-2.0), ValueError, r"softcap must be in \(0, inf\]; got -2.0"),
    (dict(ignore_index=0.5), TypeError, r"ignore_index must be an int; got float"),
    (dict(input=Z.to_sparse()), TypeError, r"input must have a strided layout"),
    (dict(input=Z.to("meta")), ValueError, r"target must be on the device of input, meta; got cpu"),
]
LINEAR_CROSS_ENTROPY = [
    (dict(input=torch.tensor(1.0)), ValueError, r"input must have shape \(..., D\); got \(\)"),
    (
        dict(linear_weight=torch.randn(5, 4)),
        ValueError,
        r"linear_weight must have shape \(V, D\) = \(5, 3\); got \(5, 4\)",
    ),
    (dict(linear_weight=torch.randn(5)), ValueError, r"linear_weight must have shape \(V, D\); got \(5,\)"),
    (dict(linear_weight=torch.randn(0, 3)), ValueError, r"linear_weight must have at least one row; got \(0, 3\)"),
    (
        dict(linear_weight=W.bfloat16()),
        TypeError,
        r"linear_weight must have the dtype of input, torch.float32, outside autocast; got",
    ),
    (dict(target=Y.float()), TypeError, r"target must have dtype torch.int64 or torch.int32; got torch.float32"),
    (dict(target=Y[:2]), ValueError, r"target must have shape .* = \(4,\); got \(2,\)"),
    (
        dict(target=torch.rand(4, 6)),
        ValueError,
        r"target \(class probabilities\) must have shape \(..., V\) = \(4, 5\); got",
    ),
    (dict(target=torch.tensor([0, 1, 2, 5])), ValueError, r"target must be in \[0, 5\) or ignore_index=-100; got 5"),
    (dict(linear_bias=torch.randn(4)), ValueError, r"linear_bias must have shape \(V,\) = \(5,\); got \(4,\)"),
    (dict(weight=torch.randn(4)), ValueError, r"weight must have shape \(V,\) = \(5,\); got \(4,\)"),
    (dict(token_weight=torch.randn(3)), ValueError, r"token_weight must have shape .* = \(4,\); got \(3,\)"),
    (dict(num_items=-1), ValueError, r"num_items must be in \[0, inf\]; got -1"),
    (dict(num_items="4"), TypeError, r"num_items must be a number; got str"),
    (dict(num_items=torch.ones(2)), ValueError, r"num_items must be an int or a 0-d tensor; got \(2,\)"),
    (
        dict(num_items=4, reduction="sum"),
        ValueError,
        r"num_items must be None unless reduction is \"mean\"; got reduction='sum'",
    ),
    (dict(mode="slow"), ValueError, r"mode must be 'auto', 'fast' or 'compact'; got 'slow'"),
    (dict(logit_scale="2"), TypeError, r"logit_scale must be a number; got str"),
    (dict(capacity=-1), ValueError, r"capacity must be at least 0; got -1"),
    (dict(capacity=2.0), TypeError, r"capacity must be an int or None; got float"),
    (dict(capacity=True), TypeError, r"capacity must be an int or None; got bool"),
    (dict(capacity=2), ValueError, r"capacity must be at least the number of valid rows, 3; got 2"),
    (dict(workspace_bytes=0), ValueError, r"workspace_bytes must be at least 1; got 0"),
    (dict(workspace_bytes=1e6), TypeError, r"workspace_bytes must be an int or None; got float"),
    (dict(vocab_start=3), ValueError, r"vocab_start must be 0 without a process_group; got 3"),
    (dict(process_group=object()), TypeError, r"process_group must be a torch.distributed.ProcessGroup .*; got object"),
    (dict(sequence_parallel=True), ValueError, r"sequence_parallel must be False without a process_group; got True"),
    (dict(input_grad="partial"), ValueError, r"input_grad must be 'reduce' without a process_group; got 'partial'"),
    (dict(input_grad="none"), ValueError, r"input_grad must be 'reduce' or 'partial'; got 'none'"),
    (dict(reduction="avg"), ValueError, r"reduction must be"),
    (dict(label_smoothing=-0.1), ValueError, r"label_smoothing must be in \[0, 1\]; got -0.1"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), CROSS_ENTROPY, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_cross_entropy(change, kind, message):
    with pytest.raises(kind, match=r"^cross_entropy: " + message):
        sk.cross_entropy(**{"input": Z, "target": Y, **change})


@pytest.mark.parametrize(
    ("change", "kind", "message"), LINEAR_CROSS_ENTROPY, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_linear_cross_entropy(change, kind, message):
    with pytest.raises(kind, match=r"^linear_cross_entropy: " + message):
        sk.linear_cross_entropy(**{"input": X, "linear_weight": W, "target": Y, **change})


def test_distributed_tensors_are_refused_with_advice():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = distribute_tensor(W, init_device_mesh("cpu", (1,)))
        advice = r"linear_weight must be a plain tensor .*module that owns it.*grad_placements.*; got DTensor"
        with pytest.raises(TypeError, match=advice):
            sk.linear_cross_entropy(X, sharded, Y)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_and_non_string_choices_are_refused():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    calls = [
        (
            lambda: sk.gaussian_kl(nested, nested),
            TypeError,
            "gaussian_kl: mean must be a plain tensor; got a nested one",
        ),
        (
            lambda: sk.gumbel_softmax(nested),
            TypeError,
            "gumbel_softmax: logits must be a plain tensor; got a nested one",
        ),
        (
            lambda: sk.free_energy(X, mode=numpy.ones(2)),
            ValueError,
            "free_energy: mode must be 'soft' or 'min'; got array",
        ),
        (lambda: sk.gaussian_kl(X, X, reduction=X), ValueError, "gaussian_kl: reduction must be 'none', 'row', "),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        sk.cross_entropy(Z, Y, None, -100)
    with pytest.raises(TypeError):
        sk.linear_cross_entropy(X, W, Y, None)


@kernels("cross_entropy")
@pytest.mark.gpu
def test_target_out_of_range_on_a_gpu_is_nan_only_in_its_row():
    target = torch.tensor([0, 1, 5, -100], device="cuda")
    for name in sk.available_backends("cross_entropy", "cuda"):
        with sk.use_backend(name):
            loss = sk.cross_entropy(Z.cuda(), target, reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False]
