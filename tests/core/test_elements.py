"""The compiled conversions between element types on a CPU, against torch's: every 16-bit number, and every tie."""

from __future__ import annotations

import pytest
import torch

from sslkernels.core import native

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
pytestmark = pytest.mark.skipif(native.extension is None, reason="the extension is not built")


def converted(values, dtype):
    out = torch.empty(values.shape, dtype=dtype)
    torch.ops.sslkernels_native.scale_add(values, None, out, False)
    return out


def every_number(dtype):
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def assert_same_bits(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())


@HALVES
def test_to_float(dtype):
    numbers = every_number(dtype)
    assert_same_bits(converted(numbers, torch.float32), numbers.float())


@HALVES
def test_from_float(dtype):
    """Every number, what is halfway to the next one, the neighbours of both, infinity and NaN."""
    numbers = every_number(dtype).float()
    bits = numbers.view(torch.int32).long()
    step = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps  # of bits, from a normal number to the next
    halfway = torch.where(numbers.isfinite(), bits + round(step) // 2, bits).to(torch.int32).view(torch.float32)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.cat([numbers, halfway, numbers + tiny / 2, torch.tensor([65519.99, 65520.0, 3.4e38, 1e-45, -0.0])])
    up, down = (torch.nextafter(values, torch.full_like(values, end)) for end in (torch.inf, -torch.inf))
    values = torch.cat([values, up, down])
    assert_same_bits(converted(values, dtype), values.to(dtype))
