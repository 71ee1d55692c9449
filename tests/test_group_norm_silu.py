"""What is special to group norm + SiLU: layouts, offsets, runs of positions, mixed types."""

import math

import pytest
import torch
import torch.nn.functional as F

import vqfast
from vqfast.ops import group_norm_silu_apply
from vqfast.testing import compare, tolerances

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# B, C, *positions; groups. The last two have several blocks per channel and several runs.
SHAPES = [
    ((2, 64, 8, 8), 32),
    ((3, 6, 5), 3),
    ((4, 32), 4),
    ((1, 39, 7, 11), 13),
    ((2, 12, 2, 3, 5), 1),
    ((1, 32, 71, 67), 32),
    ((2, 100, 33, 41), 4),
]


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make(shape, dtype=torch.float32, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) + offset
    weight = 1 + 0.3 * torch.randn(shape[1], generator=g)
    bias = 0.3 * torch.randn(shape[1], generator=g)
    return [t.to(dtype) for t in (x, weight, bias, torch.randn(shape, generator=g))]


def results(function, leaves, upstream, dtypes):
    """Output and the gradients of x, weight and bias."""
    leaves = [t.to(d).clone().requires_grad_() for t, d in zip(leaves, dtypes, strict=True)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def assert_within_budget(x, weight, bias, upstream, groups, eps=1e-6):
    def plain(x, weight, bias):
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    def ours(x, weight, bias):
        return vqfast.group_norm_silu(x, weight, bias, groups, eps)

    leaves, kinds = (x, weight, bias), (x.dtype, weight.dtype, bias.dtype)
    found = results(ours, leaves, upstream, kinds)
    torchs = results(plain, leaves, upstream, 3 * (x.dtype,))
    exact = results(plain, leaves, upstream.double(), 3 * (torch.float64,))
    names = ("y", "dx", "dw", "db")
    for name, o, p, e, kind in zip(names, found, torchs, exact, kinds[:1] + kinds, strict=True):
        used = compare.budget_ratio(
            o, p, e, tolerances.FORWARD if name == "y" else tolerances.BACKWARD
        )
        assert used <= 1, f"{name}: {used:.2f} of the allowed error"
        assert o.dtype == kind
    assert found[0].stride() == x.stride() == found[1].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_error_against_float64(shape, groups, last, dtype, each_backend):
    x, weight, bias, upstream = make(shape, dtype)
    assert_within_budget(channels_last(x) if last else x, weight, bias, upstream, groups)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_large_offset_costs_no_digits(last, each_backend):
    x, weight, bias, upstream = make((2, 8, 50, 41), offset=1000.0)
    assert_within_budget(channels_last(x) if last else x, weight, bias, upstream, 2)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_every_instruction_set(last, each_isa):
    for dtype in DTYPES:
        x, weight, bias, upstream = make((2, 39, 9, 13), dtype)
        assert_within_budget(channels_last(x) if last else x, weight, bias, upstream, 13)


def test_float32_weights_with_bfloat16_input(each_backend):
    x, weight, bias, upstream = make((2, 16, 9, 9))
    x, upstream = x.bfloat16(), upstream.bfloat16()
    assert_within_budget(x, weight, bias, upstream, 4)


def test_constant_input_gives_silu_of_the_bias(each_backend):
    _, weight, bias, _ = make((1, 8, 10, 10))
    for x in (torch.full((2, 8, 10, 10), 7.3), channels_last(torch.full((2, 8, 10, 10), 7.3))):
        y = vqfast.group_norm_silu(x, weight, bias, 2)
        torch.testing.assert_close(
            y, F.silu(bias)[:, None, None].expand_as(y), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_nan_stays_in_its_group(last, each_backend):
    x, weight, bias, _ = make((2, 8, 5, 5))
    clean = vqfast.group_norm_silu(x, weight, bias, 4)
    x[1, 2, 3, 3] = math.nan
    y = vqfast.group_norm_silu(channels_last(x) if last else x, weight, bias, 4)
    assert y[1, 2:4].isnan().all() and y[0].isfinite().all()
    torch.testing.assert_close(y[1, [0, 1, 4, 5, 6, 7]], clean[1, [0, 1, 4, 5, 6, 7]])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_its_own_statistics_it_gives_its_own_bits(last, dtype, each_isa):
    for shape, groups in SHAPES:
        x, weight, bias, _ = make(shape, dtype)
        x = channels_last(x) if last else x
        y, mean, rstd = torch.ops.vqfast.group_norm_silu(x, weight, bias, groups, 1e-6)
        got = group_norm_silu_apply(x, weight, bias, mean, rstd)
        assert torch.equal(got, y) and got.stride() == y.stride()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_may_come_from_elsewhere(last, dtype, each_isa):
    x, weight, bias, _ = make((2, 39, 9, 13), dtype)
    mean, rstd = torch.full((2, 13), 0.3), torch.tensor([[0.5], [7.0]]).repeat(1, 13)

    def plain(x, weight, bias, mean, rstd):
        mean, rstd = (t.repeat_interleave(3, 1)[..., None, None].to(x) for t in (mean, rstd))
        return F.silu((x - mean) * rstd * weight[:, None, None] + bias[:, None, None])

    given = (channels_last(x) if last else x, weight, bias, mean, rstd)
    exact = plain(*(t.double() for t in given))
    used = compare.budget_ratio(
        group_norm_silu_apply(*given), plain(*given), exact, tolerances.FORWARD
    )
    assert used <= 1, f"{used:.2f} of the allowed error"


@pytest.mark.parametrize("value", [-math.inf, -3e38, -200.0, -90.0, 90.0, 200.0, math.inf])
def test_silu_has_its_limits_far_out(value, each_isa):
    for dtype in DTYPES:
        x = torch.full((1, 1, 40), value).to(dtype)
        one = torch.ones(1, dtype=dtype)
        y = group_norm_silu_apply(x, one, 0 * one, torch.zeros(1, 1), torch.ones(1, 1))
        torch.testing.assert_close(y, F.silu(x), rtol=0, atol=1e-30, equal_nan=True)


def test_apply_refuses():
    x, w, stat = torch.zeros(2, 8, 3, 3), torch.zeros(8), torch.zeros(2, 4)
    for arguments, kind, words in [
        ((x, w, w, stat[:1], stat), ValueError, r"mean must be \[2, 4\].*\[1, 4\]"),
        ((x, w, w, stat, stat[:, :2]), ValueError, r"rstd must be \[2, 4\] to match mean"),
        ((x, w, w, *2 * (torch.zeros(2, 3),)), ValueError, r"\[2, groups\] of 8 channels"),
        ((x, w, w, *2 * (torch.zeros(2, 0),)), ValueError, r"\[2, groups\] of 8 channels"),
        ((x, w[:3], w, stat, stat), ValueError, r"weight must be \[8\]"),
        ((x, w, w, stat.int(), stat), TypeError, "mean .*int32"),
        ((x, w, w, stat, stat.clone().requires_grad_()), RuntimeError, "rstd requires one"),
    ]:
        with pytest.raises(kind, match=words):
            group_norm_silu_apply(*arguments)


def four_groups(x, weight, bias):
    return vqfast.group_norm_silu(x, weight, bias, 4)


@pytest.mark.parametrize("layout", ["channels_last", "turned", "every second image"])
def test_layouts_agree(layout, each_backend):
    x, weight, bias, upstream = make((2, 8, 12, 10))
    other = {
        "channels_last": channels_last(x),
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second image": x.repeat_interleave(2, 0)[::2],
    }[layout]
    assert other.stride() != x.stride() and torch.equal(other, x)
    expected = results(four_groups, (x, weight, bias), upstream, 3 * (x.dtype,))
    leaves = [t.detach().requires_grad_() for t in (other, weight, bias)]
    y = four_groups(*leaves)
    found = [y, *torch.autograd.grad(y, leaves, channels_last(upstream))]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(other, x)  # unchanged


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_equal_bits_for_any_number_of_threads(last):
    x, weight, bias, upstream = make((2, 64, 70, 61))
    x = channels_last(x) if last else x
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(
                results(vqfast.group_norm_silu, (x, weight, bias), upstream, 3 * (x.dtype,))
            )
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)])
def test_empty(shape, each_backend):
    leaves = [torch.empty(shape), torch.ones(8), torch.ones(8)]
    leaves = [t.requires_grad_() for t in leaves]
    y = vqfast.group_norm_silu(*leaves, 4)
    y.sum().backward()
    assert y.shape == shape and not leaves[1].grad.any() and not leaves[2].grad.any()


def test_gradcheck_in_float64():
    leaves = [t.double().requires_grad_() for t in make((2, 4, 3, 2))[:3]]
    assert torch.autograd.gradcheck(lambda *a: vqfast.group_norm_silu(*a, 2, 1e-3), leaves)


def test_compiles_with_its_backward():
    x, *rest = make((2, 8, 5, 4))[:3]
    leaves = [t.requires_grad_() for t in (channels_last(x), *rest)]

    def step(x, weight, bias):
        return (vqfast.group_norm_silu(x, weight, bias, 4) * x).sum()

    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


X, W = torch.zeros(2, 8, 3, 3), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (([1.0], W, W, 4), TypeError, "x .*list"),
        ((X.int(), W, W, 4), TypeError, "x .*int32"),
        ((X, None, W, 4), TypeError, "weight .*NoneType"),
        ((X, W, W[:4], 4), ValueError, r"bias .*\[8\].*\[4\]"),
        ((X, W.to("meta"), W, 4), ValueError, "weight .*meta"),
        ((X[0, 0, 0], W, W, 4), ValueError, "x .*dimensions"),
        ((X, W, W, 3), ValueError, "groups = 3 .*8"),
        ((X, W, W, 0), ValueError, "groups .*0"),
        ((X, W, W, 2.0), TypeError, "groups .*float"),
        ((X, W, W, 4, -1.0), ValueError, "eps .*-1"),
        ((X, W, W, 4, math.nan), ValueError, "eps .*nan"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, words):
    with pytest.raises(kind, match=words):
        vqfast.group_norm_silu(*arguments)
