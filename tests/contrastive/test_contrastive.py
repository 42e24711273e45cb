"""The contrastive energies against dense autograd in float64."""

import itertools

import pytest
import tiers
import torch
from contrastive_oracle import contrastive_losses

import sslkernels as sk
from sslkernels.contrastive import score_tiles

DIM = 19
# feature -> its values other than the default; every pair of values of two features is a case.
FEATURES = {
    "energy": ("sigmoid", "hinge"),
    "direction": ("column", "symmetric"),
    "shape": ("square", "wide"),
    "positive": ("permuted", "duplicated", "missing"),
    "in_batch": (False,),
    "masks": ("pairs", "columns"),
    "normalize": (True,),
    "scale": ("tensor", 30.0, -2.0, 0.0),
    "bias": ("tensor",),
    "negatives": ("plain", "masked", "none"),
    "bank": (5,),
    "ids": ("few", "some", "one", "unlike"),
    "bank_ids": ("also", "alone"),
    "same_id": ("positive",),
    "exclude_self": (True,),
    "label_smoothing": (0.1, 1.0),
    "margin": (1.5,),
    "row_weight": (True,),
    "reduction": ("none", "sum"),
    "num_items": (5, "tensor"),
    "frozen": ("query", "key", "both"),
}
DEFAULTS = {
    "energy": "softmax",
    "direction": "row",
    "shape": "tall",
    "positive": None,
    "in_batch": True,
    "masks": None,
    "normalize": False,
    "scale": 1.7,
    "bias": None,
    "negatives": None,
    "bank": None,
    "ids": None,
    "bank_ids": None,
    "same_id": "ignore",
    "exclude_self": False,
    "label_smoothing": 0.0,
    "margin": None,
    "row_weight": False,
    "reduction": "mean",
    "num_items": None,
    "frozen": None,
}


def allowed(case: dict) -> bool:
    if case["label_smoothing"] > 0 and case["energy"] != "softmax":
        return False
    if case["margin"] is not None and case["energy"] != "hinge":
        return False
    if case["exclude_self"] and case["shape"] != "square":
        return False
    if case["direction"] == "column" and case["energy"] != "sigmoid" and (case["negatives"] or case["bank"]):
        return False
    if case["num_items"] is not None and case["reduction"] != "mean":
        return False
    if not case["in_batch"]:
        by_rows = case["direction"] == "row" or case["energy"] == "sigmoid"
        if (
            case["exclude_self"]
            or case["masks"]
            or not by_rows
            or (case["ids"] is not None and case["bank_ids"] != "alone")
        ):
            return False
    supervised = case["ids"] is not None and case["same_id"] == "positive"
    return not (case["exclude_self"] and case["positive"] is None and not supervised)


def completed(case: dict) -> dict:
    """Adjusts the other features so that the case is allowed."""
    if case["shape"] == "tall":
        case["shape"] = "square" if case["positive"] is None or case["exclude_self"] else "wide"
    if case["bank_ids"] is not None:
        case["bank"] = case["bank"] or 5
        case["ids"] = case["ids"] or "few"
    if case["same_id"] == "positive" and case["ids"] is None:
        case["ids"] = "few"
    if case["exclude_self"]:
        case["shape"] = "square"
    if case["margin"] is not None and case["energy"] == "softmax":
        case["energy"] = "hinge"
    if case["frozen"] == "both" and case["scale"] == 1.7:
        case["scale"] = "tensor"
    return case


def allowed_or_none(case: dict) -> dict | None:
    case = completed(case)
    if case["exclude_self"] and case["same_id"] == "positive" and case["bank_ids"] == "alone":
        return None  # refused
    return case if allowed(case) else None


def packed_cases() -> list[dict]:
    """Many features at once."""
    features = {name: (DEFAULTS[name], *values) for name, values in FEATURES.items()}
    features["frozen"] = (None,) * 8 + FEATURES["frozen"]  # what is frozen is not seen
    found = tiers.pairwise_cases(features, allowed_or_none)
    return [pytest.param(case, id=f"packed{number}") for number, case in enumerate(found)]


def cases() -> list[dict]:
    """Two features at a time, so that a failure names them; and products of features that share code."""
    found = {}
    values = [(name, value) for name, options in FEATURES.items() for value in options]
    for one, two in itertools.combinations(values, 2):
        if one[0] != two[0]:
            case = completed({**DEFAULTS, one[0]: one[1], two[0]: two[1]})
            if allowed(case):
                name = "-".join(
                    f"{k}={v}" for k, v in case.items() if v != DEFAULTS[k] and (k, v) != ("shape", "square")
                )
                found[name or "default"] = case
    # Features that share code: which candidates, in which direction, under which energy; keys that are the positive of
    # several rows, some of weight 0.
    for direction, positive, ids, smoothing, weighed in itertools.product(
        ("column", "symmetric"), (None, "duplicated"), (None, "some"), (0.0, 0.3), ("none", "mean"),
    ):  # fmt: skip
        case = {**DEFAULTS, "direction": direction, "positive": positive, "ids": ids, "label_smoothing": smoothing}
        case |= {"shape": "square", "reduction": weighed, "row_weight": weighed == "mean"}
        case["same_id"] = "ignore" if ids is None else "positive"
        found["-".join(map(str, (direction, positive, ids, smoothing, weighed)))] = case
    for energy, direction, positive, ids, same_id, exclude in itertools.product(
        ("softmax", "sigmoid", "hinge"), ("row", "column", "symmetric"), (None, "permuted", "duplicated", "missing"),
        (None, "some"), ("ignore", "positive"), (False, True),
    ):  # fmt: skip
        case = {**DEFAULTS, "energy": energy, "direction": direction, "positive": positive, "ids": ids}
        case |= {"same_id": same_id, "exclude_self": exclude, "shape": "square"}
        if direction != "column" or energy == "sigmoid":
            case |= {"negatives": "masked", "bank": 3}
        case["label_smoothing"] = 0.2 if energy == "softmax" else 0.0
        if allowed(case) and (ids is not None or same_id == "ignore"):
            found["-".join(map(str, (energy, direction, positive, ids, same_id, exclude)))] = case
    return [pytest.param(case, id=name, marks=pytest.mark.full) for name, case in found.items()]


def make(case: dict, dtype=torch.float64, n: int = 13, dim: int = DIM, seed: int = 0):
    """(tensors that are differentiated, keyword arguments that are not)."""
    torch.manual_seed(seed)
    m = {"square": n, "wide": n + 4, "tall": n}[case["shape"]]
    leaves = {"query": torch.randn(n, dim, dtype=dtype)}
    leaves["key"] = leaves["query"].clone() if case["exclude_self"] else torch.randn(m, dim, dtype=dtype)
    options = {
        "energy": case["energy"],
        "direction": case["direction"],
        "normalize": case["normalize"],
        "in_batch": case["in_batch"],
        "same_id": case["same_id"],
        "exclude_self": case["exclude_self"],
        "label_smoothing": case["label_smoothing"],
        "margin": case["margin"],
    }
    if case["positive"] == "permuted":
        options["positive"] = torch.randperm(m)[:n]
    elif case["positive"] in ("duplicated", "missing"):
        options["positive"] = torch.randint(0, m, (n,)).to(torch.int32)
        options["positive"][: n // 2] = options["positive"][0]
        if case["positive"] == "missing":
            options["positive"][::3] = -1
    if case["scale"] == "tensor":
        leaves["logit_scale"] = torch.tensor(1.3, dtype=dtype)
    else:
        options["logit_scale"] = case["scale"]
    if case["bias"] == "tensor":
        leaves["logit_bias"] = torch.tensor([-0.7], dtype=dtype)
    if case["negatives"] is not None:
        leaves["negatives"] = torch.randn(n, 0 if case["negatives"] == "none" else 6, dim, dtype=dtype)
        if case["negatives"] == "masked":
            options["negatives_mask"] = torch.rand(n, 6) < 0.5
            options["negatives_mask"][1] = False
    if case["bank"] is not None:
        leaves["bank"] = torch.randn(case["bank"], dim, dtype=dtype)
    if case["masks"] == "pairs":
        options["candidate_mask"] = (torch.rand(2 * m, n) < 0.5)[::2].t()
        options["candidate_mask"][2] = False
    if case["masks"] == "columns":
        options["key_mask"] = torch.rand(m) < 0.5
        if case["bank"] is not None:
            options["bank_mask"] = torch.rand(case["bank"]) < 0.5
    if case["ids"] is not None:
        kinds = {"few": 4, "some": 9, "one": 1, "unlike": 10**12}[case["ids"]]
        options["query_ids"] = torch.randint(0, kinds, (n,))
        options["key_ids"] = options["query_ids"].clone() if m == n else torch.randint(0, kinds, (m,))
        if case["bank_ids"] is not None:
            options["bank_ids"] = torch.randint(0, kinds, (case["bank"],))
        if case["bank_ids"] == "alone":
            del options["key_ids"]
    if case["row_weight"]:
        leaves["row_weight"] = torch.rand(n, dtype=dtype) - 0.3
        leaves["row_weight"][::3] = 0
    for name, leaf in leaves.items():
        leaf.requires_grad_(not (case["frozen"] == name or (case["frozen"] == "both" and name in ("query", "key"))))
    return leaves, options


def expected(leaves: dict, options: dict, reduction: str, num_items=None):
    tensors = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in leaves.items()}
    weight = tensors.get("row_weight")
    arguments = {k: v for k, v in tensors.items() if k not in ("query", "key", "row_weight")}
    losses, has = contrastive_losses(tensors["query"], tensors["key"], **arguments, **options)
    if weight is not None:
        losses = losses * weight
    if reduction == "sum":
        return tensors, losses.sum()
    return tensors, losses if reduction == "none" else losses.sum() / (has.sum() if num_items is None else num_items)


def upstream(loss: torch.Tensor) -> torch.Tensor:
    return (
        torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        if loss.dim()
        else loss.new_tensor(0.7)
    )


def check(case: dict, dtype, rtol: float, **sizes) -> None:
    leaves, options = make(case, dtype, **sizes)
    num_items = torch.tensor(7) if case["num_items"] == "tensor" else case["num_items"]
    tensors, want = expected(leaves, options, case["reduction"], num_items)
    loss = sk.contrastive_energy(**leaves, **options, reduction=case["reduction"], num_items=num_items)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if bool(want.isnan().any()):  # the mean over no rows
        assert want.dim() == 0
        assert bool(loss.isnan())
        return
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=rtol * max(1.0, float(want.detach().abs().max())))
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    if not wanted:
        assert not loss.requires_grad
        return
    grads = torch.autograd.grad(loss, [leaves[k] for k in wanted], upstream(loss))
    want_grads = torch.autograd.grad(
        want, [tensors[k] for k in wanted], upstream(want), allow_unused=True, materialize_grads=True
    )
    for name, grad, want_grad in zip(wanted, grads, want_grads, strict=True):
        assert grad.dtype == leaves[name].dtype
        assert grad.shape == leaves[name].shape
        size = float(want_grad.abs().max()) if want_grad.numel() else 0.0
        if name in ("logit_scale", "logit_bias"):  # sums over all pairs, which may cancel
            size = max(size, float(want.detach().abs().max()))
        atol = rtol * max(size, 1e-3)
        torch.testing.assert_close(grad.double(), want_grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", packed_cases() + cases())
def test_against_dense_float64(case, backend):
    with sk.use_backend(backend):
        check(case, torch.float64, 1e-9)


@pytest.mark.parametrize("case", packed_cases() + cases())
def test_products_computed_once(case, monkeypatch):
    """The plan for kernels that compute the products once, for sums and gradients or for `weighted_sums`."""
    monkeypatch.setattr(score_tiles.ReferencePairs, "fuses_sums", lambda self, features: True)
    monkeypatch.setattr(score_tiles.ReferencePairs, "has_weighted_sums", lambda self, features: True)
    with sk.use_backend("reference"):
        check(case, torch.float64, 1e-9)
