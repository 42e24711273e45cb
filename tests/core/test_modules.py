"""Properties of every module of `sslkernels.nn`."""

from __future__ import annotations

import inspect
import io
import pickle

import pytest
import torch

import sslkernels as sk

MODULES = {
    "ClipLoss": {},
    "ContrastiveLoss": {"direction": "symmetric"},
    "CrossEntropyLoss": {"weight": torch.ones(4)},
    "FreeEnergy": {"beta": 2.0},
    "GaussianLatent": {"kl": "mean"},
    "GumbelQuantizer": {"num_codes": 4, "dim": 2},
    "InfoNCELoss": {},
    "LinearCrossEntropyLoss": {"softcap": 30.0},
    "LinearHead": {"in_features": 3, "out_features": 4},
    "NTXentLoss": {},
    "PrototypeLoss": {"prototypes": 4},
    "ResidualVectorQuantizer": {"num_levels": 2, "num_codes": 4, "dim": 2},
    "SigLipLoss": {},
    "TokenMasker": {"mask_id": 3, "vocab_size": 10},
    "VectorQuantizer": {"num_codes": 4, "dim": 2},
}


def test_the_table_is_complete():
    assert set(sk.nn.__all__) == set(MODULES)
    for name in MODULES:
        assert issubclass(getattr(sk.nn, name), torch.nn.Module)
        assert inspect.getdoc(getattr(sk.nn, name))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_survives_pickling(name):
    module = getattr(sk.nn, name)(**MODULES[name])
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module)
    assert repr(again) == repr(module)
    assert again.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("name", MODULES)
def test_pickles_that_name_the_public_path_load(name):
    """`sslkernels.nn.Name` is the pickled path of a version in which `sslkernels.nn` was one file."""
    buffer = io.BytesIO(b"csslkernels.nn\n" + name.encode() + b"\n.")
    assert pickle.load(buffer) is getattr(sk.nn, name)
