"""What is special to attention over all positions: odd sizes, wide heads, views, block borders."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import vqfast
from vqfast.ops.full_attention import full_attention
from vqfast.testing import compare, tolerances

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(B, H, T, d, dtype=torch.float32, sharp=1.0):
    q, k, v = (normal(B, H, T, d, seed=i, dtype=dtype) for i in range(3))
    return q * sharp, k, v


def exact_attention(q, k, v, scale=None):
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return scores.softmax(-1) @ v


def results(attention, leaves, upstream, dtype, **options):
    """Output and the gradients of q, k and v."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]


def assert_within_budget(leaves, **options):
    dtype, upstream = leaves[0].dtype, normal(*leaves[0].shape, seed=9, dtype=leaves[0].dtype)
    ours = results(full_attention, leaves, upstream, dtype, **options)
    plain = results(F.scaled_dot_product_attention, leaves, upstream, dtype, **options)
    exact = results(exact_attention, leaves, upstream, torch.float64, **options)
    for name, o, p, e in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        factor = tolerances.FORWARD if name == "out" else tolerances.BACKWARD
        used = compare.budget_ratio(o, p, e, factor)
        assert used <= 1, f"{name}: {used:.2f} of the allowed error"
        assert o.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 40, 59, 256, 270, 512])
def test_error_against_float64_at_odd_head_dims(d, dtype, each_isa):
    assert_within_budget(qkv(2, 1, 67, d, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 6, 15, 25, 33, 63, 64, 65, 95, 96, 97, 193, 289])
def test_error_against_float64_at_block_borders(T, dtype, each_isa):
    assert_within_budget(qkv(1, 2, T, 64, dtype, sharp=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranges_of_keys_are_added_and_threads_change_no_bit(dtype):
    leaves, threads, found = qkv(1, 1, 1001, 24, dtype), torch.get_num_threads(), []
    assert_within_budget(leaves)
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            with vqfast.backend("cpu"):
                found.append(results(full_attention, leaves, leaves[0], dtype))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("sharp", "options"),
    [(100.0, {}), (1e-4, {}), (1.0, {"scale": 2.0}), (1.0, {"scale": 0.0})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_tiny_and_scaled_logits(sharp, options, dtype, each_backend):
    # an odd T: what stands beside the last key must not count, whatever the scale makes of it
    assert_within_budget(qkv(2, 1, 67, 64, dtype, sharp=sharp), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_far_below_zero_at_an_odd_length(dtype, each_backend):
    q, k, v = qkv(1, 1, 33, 16, dtype)  # lse = -200: e^-lse is infinite beside the last key
    assert_within_budget((q.abs() + 1, -k.abs() - 3, v), scale=4.0)


def test_negative_scale_is_a_negated_query(each_backend):
    q, k, v = qkv(1, 2, 70, 24)
    expected = full_attention(-q, k, v, scale=0.3)
    assert torch.equal(full_attention(q, k, v, scale=-0.3), expected)


def test_a_bad_value_shows_in_every_row(each_backend):
    q, k, v = qkv(1, 1, 40, 16)
    k[0, 0, 7, 3] = math.nan
    assert full_attention(q, k, v).isnan().all()


def test_nothing_to_attend_to_gives_zeros(each_backend):
    q, k, v = torch.ones(1, 1, 3, 16), torch.full((1, 1, 3, 16), -math.inf), torch.ones(1, 1, 3, 16)
    assert not full_attention(q, k, v).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_feature_maps_are_read_in_place(channels_last, dtype, each_backend):
    maps = [normal(2, 40, 5, 7, seed=i, dtype=dtype) for i in range(4)]
    if channels_last:
        maps = [t.contiguous(memory_format=torch.channels_last) for t in maps]
    *leaves, upstream = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in maps)
    kept = [t.clone() for t in leaves]
    expected = results(full_attention, kept, upstream.clone(), dtype)
    raw, scale = importlib.import_module("vqfast.ops.full_attention"), 1 / math.sqrt(40)
    out, lse = raw._OP(*leaves, scale)
    found = out, *raw._BACKWARD(upstream, *leaves, out, lse, scale)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, kept, strict=True))


@pytest.mark.parametrize("shape", [(0, 1, 5, 16), (2, 1, 0, 16)])
def test_empty(shape, each_backend):
    q = torch.empty(shape, requires_grad=True)
    out = full_attention(q, q, q)
    out.sum().backward()
    assert out.shape == shape and q.grad.shape == shape


def test_gradcheck_in_float64():
    leaves = [t.double().requires_grad_() for t in qkv(1, 2, 7, 3)]
    assert torch.autograd.gradcheck(full_attention, leaves)


def test_chunks_of_the_reference_fit_together(monkeypatch):
    module = importlib.import_module("vqfast.ops.full_attention")
    leaves = [t.double() for t in qkv(1, 2, 61, 8)]
    whole = results(full_attention, leaves, leaves[0], torch.float64)
    monkeypatch.setattr(module, "_CHUNK", 7 * 2 * 61)
    pieces = results(full_attention, leaves, leaves[0], torch.float64)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_wider_heads_go_to_the_reference():
    q = normal(1, 1, 5, 513)
    assert "512" in vqfast._dispatch.OPS["full_attention"].explain(q, q, q, 1.0)["cpu"]
    assert_within_budget((q, q, q))


def test_bad_arguments_are_named():
    q = torch.zeros(2, 3, 5, 16)
    with pytest.raises(TypeError, match=r"k .*float16"):
        full_attention(q, q.half(), q)
    with pytest.raises(ValueError, match=r"v .*5, 16.*4, 16"):
        full_attention(q, q, q[:, :, :4])
    with pytest.raises(ValueError, match="scale"):
        full_attention(q, q, q, scale=math.nan)
