"""What int16 factors of ops.conv3x3 must not spoil: inputs of any size, NaN, exact sums."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.ops import conv3x3
from vqfast.testing import compare, tolerances

C, OUTS, SIDE = 160, 40, 36  # more than one block of channels, more than one panel, not a multiple


def operands(seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, C, SIDE, SIDE, generator=g)
    w = torch.randn(OUTS, C, 3, 3, generator=g) / (9 * C) ** 0.5
    return x, w, torch.randn(OUTS, generator=g)


def ratio(x, w, b):
    """Our error over what is allowed, in bfloat16."""
    x, w = (t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, w))
    b = b.bfloat16()
    plain = F.conv2d(x, w, b, padding=1)
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=1)
    return compare.budget_ratio(conv3x3(x, w, b), plain, exact, tolerances.FORWARD)


@pytest.mark.parametrize("spread", [1e1, 1e3, 1e6, 1e12])
def test_large_channels_with_small_weights_keep_the_others(spread, each_isa):
    x, w, b = operands()
    size = spread ** torch.linspace(-1, 1, C)[torch.randperm(C)].view(1, C, 1, 1)
    assert ratio(x * size, w / size, b) <= 1


@pytest.mark.parametrize("power", [-36, -20, -8, 8, 18, 30])
def test_inputs_and_weights_of_any_magnitude(power, each_isa):
    x, w, b = operands()
    assert ratio(x * 10.0**power, w, 0 * b) <= 1
    if abs(power) < 30:
        assert ratio(x, w * 10.0**power, 0 * b) <= 1
        assert ratio(x * 10.0**power, w * 10.0**-power, b) <= 1


@pytest.mark.parametrize("name", ["aligned", "one channel", "one pixel", "checkered", "no weights"])
def test_sums_as_large_as_they_can_be_do_not_overflow(name, each_isa):
    x, w, b = operands()
    if name == "aligned":  # every product has one sign, all of one size
        x, w = torch.full_like(x, 3.0), torch.full_like(w, 0.25)
    if name == "one channel":
        x[:, 1:], w[:, 1:] = 0, 0
    if name == "one pixel":
        pixel = x[..., 17, 18].clone()
        x = torch.zeros_like(x)
        x[..., 17, 18] = pixel
    if name == "checkered":
        i = torch.arange(SIDE)
        x = x.abs() * ((i[:, None] + i) % 2 * 2 - 1)
        w = w.abs() * torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    if name == "no weights":
        w[3] = 0
        w[:, 7] = 0
    assert ratio(x, w, b) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_near_its_pixel(value, dtype, each_isa):
    x, w, b = (t.to(dtype) for t in operands())
    clean = conv3x3(x, w, b)
    x[0, 150, 20, 11] = value
    y = conv3x3(x, w, b)
    assert not y[:, :, 19:22, 10:13].isfinite().any()
    far = torch.ones(SIDE, SIDE, dtype=torch.bool)
    far[20 - 4 : 20 + 5, 11 - 4 : 11 + 5] = False  # tiles of 4x4 that read the pixel
    assert torch.equal(y[..., far], clean[..., far])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_spoils_its_output_alone(value, each_isa):
    x, w, b = (t.bfloat16() for t in operands())
    clean = conv3x3(x, w, b)
    w[5, 140, 1, 2] = value
    y = conv3x3(x, w, b)
    assert not y[:, 5, :, 0].isfinite().any()
    others = [o for o in range(OUTS) if o != 5]
    error = (y[:, others].double() - clean[:, others].double()).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps * clean.abs().max()


def test_zeros_give_the_bias(each_isa):
    x, w, b = (t.bfloat16() for t in operands())
    expected = b.view(1, -1, 1, 1).expand(1, OUTS, SIDE, SIDE)
    assert torch.equal(conv3x3(torch.zeros_like(x), w, b), expected)
    assert torch.equal(conv3x3(x, torch.zeros_like(w), b), expected)
