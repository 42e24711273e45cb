"""A pytest plugin for a machine without a GPU: tests are collected, and run, as on a machine with one.

`pytest -p simulated_gpu`: torch says that there is a CUDA device, an H200, on which nothing can be allocated. Whatever
is imported, marked, parametrised or chosen by that answer is then as it will be there.
"""

from __future__ import annotations

import types

import torch

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150_754_820_096,
    L2_cache_size=60 << 20,
)

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: PROPERTIES
torch.cuda.get_device_name = lambda device=None: PROPERTIES.name
torch.cuda.current_device = lambda: 0
torch.cuda.manual_seed_all = lambda seed: None
