"""simd.h and half.h against torch and float64, on every instruction set of this CPU."""

import pytest
import torch

from vqfast import _native

pytestmark = pytest.mark.skipif(_native.load() is None, reason="native library not built")


@pytest.fixture(params=_native.ISAS)
def isa(request):
    library = _native.load()
    if request.param not in library.supported():
        pytest.skip(f"this CPU lacks {request.param}")
    before = library.selected()
    library.select(request.param)
    yield request.param
    library.select(before)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 4099])
def test_exp_is_accurate_to_two_ulp(isa, n):
    x = torch.linspace(-90, 89, n)
    y = torch.empty(n)
    _native.launcher("simd_exp")(x, y)
    exact = x.double().exp()
    normal = (x > -87.33) & (x < 88.72)
    relative = ((y.double() - exact).abs() / exact)[normal]
    assert relative.numel() == 0 or relative.max() < 2e-7


def test_exp_of_the_extremes(isa):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1000.0, 1000.0, 0.0, -0.0])
    y = torch.empty_like(x)
    _native.launcher("simd_exp")(x, y)
    assert y[0].isnan()
    assert y[1:].tolist() == [float("inf"), 0.0, 0.0, float("inf"), 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_conversions_round_as_torch(isa, dtype):
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20011,), generator=g, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32).clone()
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    x = torch.cat([x, every, torch.randn(999, generator=g), torch.randn(999, generator=g) * 1e-6])
    stored, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    _native.launcher("simd_round")(x, stored, back)
    expected = x.to(dtype)
    assert torch.equal(stored.isnan(), expected.isnan())
    fine = ~expected.isnan()
    assert torch.equal(stored[fine], expected[fine])
    assert torch.equal(back[fine], expected[fine].float())
