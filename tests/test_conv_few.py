"""Convolutions on few positions: weights of another precision, batches, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.ops import conv3x3_weight, conv_few, conv_few_input, conv_few_weight


def test_a_float32_weight_counts_as_its_rounding():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 37, 5, 6, generator=g).bfloat16()
    w, b = torch.randn(33, 37, 3, 3, generator=g), torch.randn(33, generator=g).bfloat16().float()
    grad = torch.randn(2, 33, 5, 6, generator=g).bfloat16()
    y = conv_few(x, w, b, padding=1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, conv_few(x, w.bfloat16(), b.bfloat16(), padding=1))
    dx = conv_few_input(grad, w, (5, 6), padding=1)
    assert torch.equal(dx, conv_few_input(grad, w.bfloat16(), (5, 6), padding=1))


@pytest.mark.parametrize("weight_gradient", [conv_few_weight, conv3x3_weight])
def test_a_float32_gradient_is_what_a_bfloat16_one_rounds(weight_gradient):
    g = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(1, 32, 32, 32, generator=g).bfloat16() for _ in range(2))
    args = (x, grad, 3) if weight_gradient is conv_few_weight else (x, grad)
    more = {"padding": 1} if weight_gradient is conv_few_weight else {}
    wide = weight_gradient(*args, **more, dtype=torch.float32)
    for ours, rounded in zip(wide, weight_gradient(*args, **more), strict=True):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, ours.bfloat16().float())
        assert torch.equal(ours.bfloat16(), rounded)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match="dtype must be bfloat16, or float32"):
            weight_gradient(*args, **more, dtype=dtype)
    with pytest.raises(TypeError, match="dtype must be float32"):
        weight_gradient(x.float(), grad.float(), *args[2:], **more, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_does_not_depend_on_its_batch(dtype):
    x, w = torch.randn(5, 40, 7, 5).to(dtype), torch.randn(48, 40, 4, 4).to(dtype)
    y = conv_few(x, w, stride=2, padding=1)
    dx = conv_few_input(y, w, (7, 5), stride=2, padding=1)
    for i in range(5):
        assert torch.equal(conv_few(x[i : i + 1], w, stride=2, padding=1), y[i : i + 1])
        alone = conv_few_input(y[i : i + 1], w, (7, 5), stride=2, padding=1)
        assert torch.equal(alone, dx[i : i + 1])


def test_results_are_equal_for_any_number_of_threads():
    x, w = torch.randn(2, 200, 4, 4), torch.randn(150, 200, 3, 3)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = conv_few(x, w, padding=1)
            dx = conv_few_input(y, w, (4, 4), padding=1)
            found.append((y, dx, *conv_few_weight(x, y, 3, padding=1)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_many_positions_and_few_channels_take_the_reference():
    for B, C, outs, side in ((2, 16, 16, 40), (1, 3, 20, 4), (1, 20, 3, 4)):
        x, w = torch.randn(B, C, side, side), torch.randn(outs, C, 3, 3)
        expected = F.conv2d(x, w, padding=1)
        torch.testing.assert_close(conv_few(x, w, padding=1), expected, rtol=1e-4, atol=1e-4)


def test_refusals_name_the_argument():
    x, w, b = torch.randn(2, 16, 4, 4), torch.randn(16, 16, 3, 3), torch.randn(16)
    refused = [
        ((x, w.double(), b), {}, TypeError, "weight"),
        ((x, w.bfloat16(), b.bfloat16()), {}, TypeError, "weight"),
        ((x.bfloat16(), w, b.bfloat16()), {}, TypeError, "bias"),
        ((x, w[:, :8], b), {}, ValueError, "weight"),
        ((x, w[..., :2], b), {}, ValueError, "weight"),
        ((x, w, b[:3]), {}, ValueError, "bias"),
        ((x[0], w, b), {}, ValueError, "x"),
        ((x, w, b), {"stride": 0}, ValueError, "stride"),
        ((x, w, b), {"padding": -1}, ValueError, "padding"),
        ((x[..., :2, :], w, b), {}, ValueError, "weight"),
        ((x, w.clone().requires_grad_(), b), {}, RuntimeError, "gradient"),
    ]
    for args, steps, error, text in refused:
        with pytest.raises(error, match=text):
            conv_few(*args, **steps)
    grad = torch.randn(2, 16, 2, 2)
    for call in (
        lambda: conv_few_input(grad, w, (5, 4)),
        lambda: conv_few_input(grad[:, :8], w, (4, 4)),
        lambda: conv_few_weight(x, grad, 2),
        lambda: conv_few_weight(x, grad[:1], 3),
    ):
        with pytest.raises(ValueError, match=r"grad|weight"):
            call()
