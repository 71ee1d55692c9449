"""Blocks of the stage-1 network: padding, resampling, attention, convolutions."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.nn import attention
from vqfast.nn.attention import SpatialAttention, spatial_attention
from vqfast.nn.blocks import Conv3x3, Downsample, ResBlock, Upsample, upsample_conv
from vqfast.nn.trained_conv import trained_conv
from vqfast.nn.trained_conv3x3 import trained_conv3x3
from vqfast.ops import conv3x3, conv3x3_down
from vqfast.testing import compare, tolerances


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


def _attention(q, k, v):
    """softmax(q k^T / sqrt(C)) v over the positions of feature maps, written out."""
    rows = [t.flatten(2).transpose(1, 2) for t in (q, k, v)]
    weights = (torch.bmm(rows[0], rows[1].transpose(1, 2)) / q.shape[1] ** 0.5).softmax(-1)
    return torch.bmm(weights, rows[2]).transpose(1, 2).reshape(q.shape)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("side", "dtype"),
    [(5, torch.bfloat16), (17, torch.bfloat16), (17, torch.float32), (33, torch.float32)],
)
def test_attention_keeps_the_error_rule(side, dtype, channels_last):
    g = torch.Generator().manual_seed(0)
    *leaves, upstream = (torch.randn(2, 64, side, side, generator=g).to(dtype) for _ in range(4))
    if channels_last:
        leaves = [t.contiguous(memory_format=torch.channels_last) for t in leaves]

    def pull(function, dtype):
        made = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        out = function(*made)
        return [out.detach(), *torch.autograd.grad(out, made, upstream.to(dtype))]

    exact, low = pull(_attention, torch.float64), pull(_attention, dtype)
    for i, (o, p, e) in enumerate(zip(pull(spatial_attention, dtype), low, exact, strict=True)):
        factor = tolerances.BACKWARD if i else tolerances.FORWARD
        assert o.dtype == dtype and compare.budget_ratio(o, p, e, factor) <= 1
    with torch.no_grad():
        got = spatial_attention(*leaves)
        alone = spatial_attention(*(t[-1:] for t in leaves))
    assert compare.budget_ratio(got, low[0], exact[0], tolerances.FORWARD) <= 1
    assert torch.equal(got[-1:], alone)  # whatever else is in the batch


@pytest.mark.parametrize(
    ("side", "dtype", "ours"),
    [
        (7, torch.bfloat16, False),
        (8, torch.bfloat16, True),
        (31, torch.float32, False),
        (32, torch.float32, True),
        (32, torch.float16, False),
    ],
)
def test_attention_is_the_faster_one_by_the_table(side, dtype, ours, monkeypatch):
    called = []
    monkeypatch.setattr(attention, "full_attention", lambda *t: called.append(1) or t[2])
    spatial_attention(*(torch.randn(1, 32, side, side).to(dtype) for _ in range(3)))
    assert bool(called) == ours


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


def run_with_gradients(conv, inputs, grad, kind):
    """y and the gradient of every input, computed in dtype `kind`."""
    given = [t.to(kind).requires_grad_() for t in inputs]
    y = conv(*given)
    return y.detach(), *torch.autograd.grad(y, given, grad.to(kind))


def assert_within_budget(ours, plain, inputs, grad):
    dtype = grad.dtype
    found = zip(
        run_with_gradients(ours, inputs, grad, dtype),
        run_with_gradients(plain, inputs, grad, dtype),
        run_with_gradients(plain, inputs, grad, torch.float64),
        strict=True,
    )
    for i, (out, theirs, exact) in enumerate(found):
        assert out.dtype == dtype
        factor = tolerances.BACKWARD if i else tolerances.FORWARD
        assert compare.budget_ratio(out, theirs, exact, factor) <= 1


# by Winograd (images one by one, and stacked), by matrices, by torch
@pytest.mark.parametrize(
    ("B", "C", "outs", "H", "W"),
    [
        (2, 64, 48, 32, 34),
        (1, 33, 40, 1, 1025),
        (5, 40, 33, 15, 14),
        (16, 32, 32, 8, 8),
        (3, 32, 64, 5, 7),
        (1, 3, 5, 1, 1),
        (4, 8, 8, 8, 8),
        (2, 8, 40, 16, 20),
    ],
)
@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_convolution_keeps_the_budget_of_every_gradient(B, C, outs, H, W, adds, dtype):
    g = torch.Generator().manual_seed(H)
    shapes = [(B, C, H, W), (outs, C, 3, 3), (outs,)] + [(B, outs, H, W)] * adds
    inputs = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    inputs[1] /= (9 * C) ** 0.5
    grad = torch.randn((B, outs, H, W), generator=g).to(dtype)

    def plain(x, w, b, residual=None):
        y = F.conv2d(x, w, b, padding=1)
        return y if residual is None else y + residual

    assert_within_budget(trained_conv3x3, plain, inputs, grad)


@pytest.mark.parametrize(
    ("B", "C", "outs", "H", "W", "side", "stride", "padding"),
    [
        (2, 16, 24, 8, 8, 1, 1, 0),
        (1, 5, 7, 9, 11, 1, 2, 0),
        (3, 8, 12, 9, 9, 3, 2, 0),
        (2, 8, 12, 8, 10, 4, 2, 1),
        (2, 8, 12, 8, 7, 4, 1, 1),
        (1, 8, 1, 3, 3, 4, 1, 1),
        (4, 8, 12, 16, 16, 3, 1, 1),  # too many positions
        (2, 40, 33, 7, 9, 3, 1, 1),  # dw by Winograd
        (1, 40, 3, 25, 27, 3, 1, 1),  # of torch's convolution too
    ],
)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_by_matrices_keeps_the_budget_of_every_gradient(
    B, C, outs, H, W, side, stride, padding, has_bias, dtype
):
    g = torch.Generator().manual_seed(H)
    shapes = [(B, C, H, W), (outs, C, side, side)] + [(outs,)] * has_bias
    inputs = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    inputs[1] /= side * C**0.5
    steps = {"stride": stride, "padding": padding}

    def plain(x, w, b=None):
        return F.conv2d(x, w, b, **steps)

    grad = torch.randn(plain(*inputs).shape, generator=g).to(dtype)
    assert_within_budget(lambda *t: trained_conv(*t, **steps), plain, inputs, grad)


def test_a_trained_convolution_takes_the_precision_of_autocast():
    x, w = torch.randn(2, 32, 4, 4), torch.randn(32, 32, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in (x, x.repeat(1, 1, 8, 8)):
            given = w.clone().requires_grad_()
            y = trained_conv3x3(batch, given, torch.zeros(32))
            assert y.dtype == torch.bfloat16
            assert torch.autograd.grad(y.sum(), given)[0].dtype == torch.float32
        assert trained_conv(x.double(), w.double(), padding=1).dtype == torch.float64


def test_a_convolution_that_does_not_fit_is_refused_as_by_torch():
    x, w = torch.randn(1, 8, 2, 2), torch.randn(8, 8, 3, 3)
    with pytest.raises(RuntimeError, match="Kernel size"):
        trained_conv(x, w)
    with pytest.raises(RuntimeError, match="channels"):
        trained_conv(torch.randn(1, 7, 4, 4), w)
    weight = torch.randn(32, 32, 3, 3)  # float32 beside bfloat16 is for autocast alone
    for side in (4, 32):
        with pytest.raises(RuntimeError, match="type"):
            trained_conv3x3(torch.randn(1, 32, side, side).bfloat16(), weight, torch.zeros(32))


def test_a_trained_convolution_can_be_added_to_in_place():
    for side in (4, 32):
        x = torch.randn(1, 32, side, side, requires_grad=True)
        w = torch.randn(32, 32, 3, 3, requires_grad=True)
        y = trained_conv3x3(x, w, torch.zeros(32)).add_(1)
        (dw,) = torch.autograd.grad(y.sum(), w)
        (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=1).sum(), w)
        torch.testing.assert_close(dw, expected, rtol=1e-4, atol=1e-3)
