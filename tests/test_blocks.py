"""Blocks of the stage-1 network: padding, resampling, attention, convolutions."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.nn.attention import SpatialAttention, spatial_attention
from vqfast.nn.blocks import Conv3x3, Downsample, ResBlock, Upsample, upsample_conv
from vqfast.nn.trained_conv3x3 import trained_conv3x3
from vqfast.ops import conv3x3, conv3x3_down
from vqfast.testing import tolerances


def test_downsampling_pads_right_and_bottom_only():
    down = Downsample(1)
    down.conv.weight.data = torch.zeros(1, 1, 3, 3)
    down.conv.weight.data[0, 0, 2, 2] = 1  # reads the pixel two right and two below
    down.conv.bias.data.zero_()
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert down(x).tolist() == [[[[10.0, 0.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 9, 5), (1, 32, 1, 1), (1, 64, 32, 33)])
def test_upsampling_repeats_then_convolves(shape, dtype):
    up = Upsample(shape[1]).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain = F.conv2d(big, up.conv.weight, up.conv.bias, padding=1)
    exact = F.conv2d(big.double(), up.conv.weight.double(), up.conv.bias.double(), padding=1)
    # the error rule of the project: twice plain torch's, plus eps
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps
    with torch.no_grad():
        folded = upsample_conv(x, up.conv.weight, up.conv.bias)  # what GPUs use
        assert not torch.equal(up(x), plain) or shape[1] < 32 or shape[2] < 16  # the op took it
        outs = (folded, up(x))
    for got in (*outs, up(x)):  # without and with gradients
        assert got.dtype == dtype and got.shape == plain.shape
        assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [(32, 32), (32, 64)])
def test_residual_block_without_gradient_equals_the_one_with(channels, dtype):
    torch.manual_seed(0)
    block, x = ResBlock(*channels), torch.randn(2, channels[0], 32, 33)
    exact = block.double()(x.to(dtype).double())
    block, x = block.to(dtype), x.to(dtype)
    before, plain = x.clone(), block(x)
    with torch.no_grad():
        got = block(x)
    assert torch.equal(x, before)
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 34, 32), (3, 96, 21, 33), (1, 64, 2, 260)])
def test_downsampling_without_gradient_keeps_the_error_rule(shape, dtype):
    torch.manual_seed(0)
    down, x = Downsample(shape[1]).to(dtype), torch.randn(shape).to(dtype)
    plain = down(x)
    exact = down.double()(x.double())
    with torch.no_grad():
        down = down.to(dtype)
        got, alone = down(x), down(x[-1:])
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert got.dtype == dtype and got.shape == exact.shape
    assert (got - exact).abs().max() <= allowed
    assert torch.equal(got[-1:], alone)  # whatever else is in the batch


def test_conv3x3_down_sees_zeros_below_and_to_the_right():
    x, w = torch.ones(1, 32, 18, 22), torch.ones(32, 32, 3, 3)
    y = conv3x3_down(x, w, torch.zeros(32))
    expected = torch.full((9, 11), 9.0 * 32)
    expected[-1] = expected[:, -1] = 6.0 * 32
    expected[-1, -1] = 4.0 * 32
    assert torch.equal(y, expected.expand(1, 32, 9, 11))


def test_conv3x3_down_refuses():
    x, w, b = torch.zeros(1, 32, 8, 8), torch.zeros(16, 32, 3, 3), torch.zeros(16)
    assert conv3x3_down(x, w, b).shape == (1, 16, 4, 4)
    for args, error, words in [
        ((x, w.double(), b), TypeError, "weight must have the dtype of x"),
        ((x, w[:, :31], b), ValueError, r"weight must be \[16, 32, 3, 3\]"),
        ((x, w, b[:3]), ValueError, r"bias must be \[16\]"),
        ((x[..., :1], w, b), ValueError, "sides of at least 2"),
        ((x, w.clone().requires_grad_(), b), RuntimeError, "weight requires one"),
    ]:
        with pytest.raises(error, match=words):
            conv3x3_down(*args)


def test_attention_is_permutation_equivariant_over_positions():
    # not causal, no positions: shuffling the grid shuffles the result
    torch.manual_seed(0)
    attn, x = SpatialAttention(32), torch.randn(2, 32, 3, 5)
    order = torch.randperm(15)
    shuffled = x.flatten(2)[:, :, order].reshape(x.shape)
    torch.testing.assert_close(attn(shuffled), attn(x).flatten(2)[:, :, order].reshape(x.shape))


@pytest.mark.parametrize("side", [5, 17])  # 17: two blocks of queries
def test_attention_without_gradient_keeps_the_error_rule(side):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 64, side, side, generator=g).bfloat16() for _ in range(3))
    rows = [t.flatten(2).transpose(1, 2) for t in (q, k, v)]

    def plain(q, k, v):
        return torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 8).softmax(-1), v)

    exact = plain(*(t.double() for t in rows)).transpose(1, 2).reshape(q.shape)
    low = plain(*rows).transpose(1, 2).reshape(q.shape)
    with torch.no_grad():
        got = spatial_attention(q, k, v)
        alone = spatial_attention(q[-1:], k[-1:], v[-1:])
    allowed = 2 * (low - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert got.dtype == torch.bfloat16 and (got - exact).abs().max() <= allowed
    assert torch.equal(got[-1:], alone)  # whatever else is in the batch


def test_shortcut_exists_only_where_channels_change():
    assert ResBlock(32, 32).nin_shortcut is None
    assert ResBlock(32, 64).nin_shortcut.weight.shape == (64, 32, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 33, 32), (1, 32, 40, 27), (1, 40, 5, 5)])
def test_convolution_without_gradient_keeps_the_error_rule(shape, dtype):
    torch.manual_seed(0)
    conv, x = Conv3x3(shape[1], 48).to(dtype), torch.randn(shape).to(dtype)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    with torch.no_grad():
        got = conv(x)
        alone = conv(x[-1:])
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= allowed
    assert torch.equal(got[-1:], alone)  # whatever else is in the batch


def test_convolution_follows_autocast_and_half_precision():
    conv, x = Conv3x3(32, 32), torch.randn(1, 32, 32, 32)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_conv3x3_refuses():
    x, w, b = torch.zeros(1, 32, 8, 8), torch.zeros(16, 32, 3, 3), torch.zeros(16)
    assert conv3x3(x, w, b).shape == (1, 16, 8, 8)
    for args, error, words in [
        ((x, w.double(), b), TypeError, "weight must have the dtype of x"),
        ((x, w[:, :31], b), ValueError, r"weight must be \[16, 32, 3, 3\]"),
        ((x, w, b[:3]), ValueError, r"bias must be \[16\]"),
        ((x[0], w, b), ValueError, "x must have 4 dimensions"),
        ((x.long(), w, b), TypeError, "int64"),
        ((x, w.clone().requires_grad_(), b), RuntimeError, "weight requires one"),
        ((x, w, b, x), ValueError, r"residual must be \[1, 16, 8, 8\]"),
    ]:
        with pytest.raises(error, match=words):
            conv3x3(*args)
    with pytest.raises(ValueError, match="scale must be 1 or 2, got 3"):
        conv3x3(x, w, b, scale=3)


@pytest.mark.parametrize(
    ("B", "C", "outs", "H", "W"),
    [
        (2, 64, 48, 32, 34),
        (1, 33, 40, 1, 1025),
        (3, 32, 64, 5, 7),
        (1, 3, 5, 1, 1),
        (4, 8, 8, 8, 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_convolution_keeps_the_budget_of_every_gradient(B, C, outs, H, W, dtype):
    g = torch.Generator().manual_seed(H)
    shapes = ((B, C, H, W), (outs, C, 3, 3), (outs,))
    inputs = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    inputs[1] /= (9 * C) ** 0.5
    grad = torch.randn((B, outs, H, W), generator=g).to(dtype)

    def run(conv, kind):
        given = [t.to(kind).requires_grad_() for t in inputs]
        y = conv(*given)
        return y.detach(), *torch.autograd.grad(y, given, grad.to(kind))

    def plain(x, w, b):
        return F.conv2d(x, w, b, padding=1)

    found = zip(
        run(trained_conv3x3, dtype), run(plain, dtype), run(plain, torch.float64), strict=True
    )
    for i, (ours, theirs, exact) in enumerate(found):
        assert ours.dtype == dtype and ours.shape == exact.shape
        factor = tolerances.BACKWARD if i else tolerances.FORWARD
        allowed = factor * (theirs - exact).abs().max() + tolerances.EPS[dtype] * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


def test_a_trained_convolution_can_be_added_to_in_place():
    for side in (4, 32):
        x = torch.randn(1, 32, side, side, requires_grad=True)
        w = torch.randn(32, 32, 3, 3, requires_grad=True)
        y = trained_conv3x3(x, w, torch.zeros(32)).add_(1)
        (dw,) = torch.autograd.grad(y.sum(), w)
        (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=1).sum(), w)
        torch.testing.assert_close(dw, expected, rtol=1e-4, atol=1e-3)
