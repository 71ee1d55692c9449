"""What is special to causal attention: the triangle, odd sizes, views, borders of blocks."""

import ctypes
import importlib
import math
import mmap
import os

import pytest
import torch
import torch.nn.functional as F

import vqfast
from vqfast import _dispatch
from vqfast.testing import compare, tolerances

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(B, H, T, d, dtype=torch.float32, sharp=1.0):
    q, k, v = (normal(B, H, T, d, seed=i, dtype=dtype) for i in range(3))
    return q * sharp, k, v


def torch_attention(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def exact_attention(q, k, v, scale=None):
    T, d = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(d) if scale is None else scale)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def results(attention, leaves, upstream, dtype, **options):
    """Output and the gradients of q, k and v."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]


def assert_within_budget(leaves, **options):
    dtype, upstream = leaves[0].dtype, normal(*leaves[0].shape, seed=9, dtype=leaves[0].dtype)
    ours = results(vqfast.causal_attention, leaves, upstream, dtype, **options)
    plain = results(torch_attention, leaves, upstream, dtype, **options)
    exact = results(exact_attention, leaves, upstream, torch.float64, **options)
    for name, o, p, e in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        factor = tolerances.FORWARD if name == "out" else tolerances.BACKWARD
        used = compare.budget_ratio(o, p, e, factor)
        assert used <= 1, f"{name}: {used:.2f} of the allowed error"
        assert o.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 16, 40, 59, 64, 100, 111, 128, 256])
def test_error_against_float64_at_odd_head_dims(d, dtype, each_backend):
    assert_within_budget(qkv(2, 2, 97, d, dtype))


@pytest.mark.parametrize("T", [1, 2, 5, 6, 7, 16, 95, 96, 97, 132, 133, 385, 577])
def test_error_against_float64_at_block_borders(T, each_backend):
    assert_within_budget(qkv(1, 2, T, 64, sharp=3.0))


@pytest.mark.parametrize("d", [7, 48, 130])
@pytest.mark.parametrize("T", [1, 2, 5, 6, 7, 31, 95, 96, 97, 101, 193, 385])
def test_bfloat16_error_against_float64_at_block_borders(T, d, each_isa):
    assert_within_budget(qkv(1, 2, T, d, torch.bfloat16, sharp=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [2017, 4100])
def test_backward_of_long_sequences_adds_ranges_of_keys(T, dtype):
    leaves, upstream = qkv(1, 1, T, 8, dtype), normal(1, 1, T, 8, seed=9, dtype=dtype)
    with vqfast.backend("cpu"):
        kernel = results(vqfast.causal_attention, leaves, upstream, dtype)
    with vqfast.backend("reference"):
        plain = results(vqfast.causal_attention, leaves, upstream, dtype)
        exact = results(vqfast.causal_attention, leaves, upstream, torch.float64)
    for o, p, e in zip(kernel, plain, exact, strict=True):
        assert compare.budget_ratio(o, p, e, tolerances.BACKWARD) <= 1


@pytest.mark.parametrize(
    ("sharp", "options"),
    [(100.0, {}), (1e-4, {}), (1.0, {"scale": 2.0}), (1.0, {"scale": 0.0})],
)
def test_huge_tiny_and_scaled_logits(sharp, options, each_backend):
    assert_within_budget(qkv(2, 2, 66, 64, sharp=sharp), **options)


@pytest.mark.parametrize("T", [130, 300])
def test_lse_fits_the_scores_of_the_backward_pass(T, each_backend):
    # scores of hundreds: where forward and backward round them differently, the weights are off
    assert_within_budget(qkv(2, 2, T, 64, sharp=100.0))


def test_negative_scale_is_a_negated_query(each_backend):
    q, k, v = qkv(1, 2, 70, 24)  # torch's own kernel gives NaN here
    expected = vqfast.causal_attention(-q, k, v, scale=0.3)
    assert torch.equal(vqfast.causal_attention(q, k, v, scale=-0.3), expected)


def test_one_token_passes_through_and_its_scores_get_no_gradient(each_backend):
    leaves = qkv(3, 2, 1, 59, torch.bfloat16)
    out, dq, dk, dv = results(vqfast.causal_attention, leaves, leaves[0], torch.bfloat16)
    assert torch.equal(out, leaves[2]) and torch.equal(dv, leaves[0])
    assert not dq.any() and not dk.any()


def test_nan_in_the_future_is_not_seen(each_isa):
    for T, seen in ((9, 4), (130, 64), (400, 390)):
        leaves = qkv(1, 2, T, 40)
        clean = vqfast.causal_attention(*leaves)
        leaves[1][:, :, seen:], leaves[2][:, :, seen:] = math.nan, math.inf
        assert torch.equal(vqfast.causal_attention(*leaves)[:, :, :seen], clean[:, :, :seen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seen", [36, 37])
def test_nan_in_the_future_is_not_seen_by_the_reference_nor_backward(seen, dtype, each_backend):
    leaves, upstream = qkv(2, 1, 130, 16, dtype), torch.zeros(2, 1, 130, 16, dtype=dtype)
    upstream[:, :, :seen] = normal(2, 1, seen, 16, dtype=dtype)
    clean = results(vqfast.causal_attention, leaves, upstream, dtype)
    leaves[1][:, :, seen:], leaves[2][:, :, seen:] = math.inf, math.nan
    found = results(vqfast.causal_attention, leaves, upstream, dtype)
    for a, b in zip(found[:2], clean[:2], strict=True):  # out and dq; other rows' keys do see NaN
        assert torch.equal(a[:, :, :seen], b[:, :, :seen])


def test_a_row_shows_the_nan_that_it_sees(each_backend):
    q, k, v = qkv(1, 1, 40, 16)
    k[0, 0, 7, 3] = math.nan
    out = vqfast.causal_attention(q, k, v)[0, 0]
    assert out[:7].isfinite().all() and out[7:].isnan().all()


def test_nothing_to_attend_to_gives_zeros(each_backend):
    q, k, v = torch.ones(1, 1, 3, 16), torch.ones(1, 1, 3, 16), normal(1, 1, 3, 16)
    k[0, 0, :2] = -math.inf
    out = vqfast.causal_attention(q, k, v)[0, 0]
    assert not out[:2].any() and torch.equal(out[2], v[0, 0, 2])


def _views(dtype=torch.float32):
    B, H, T, d = 2, 3, 50, 24
    packed, wide = normal(B, T, 3, H, d, dtype=dtype), normal(B, H, 2 * T, d, dtype=dtype)
    shared, turned = normal(B, 1, T, d, dtype=dtype), normal(B, H, d, T, dtype=dtype)
    return {
        "packed": packed.transpose(1, 3).unbind(2),
        "every second row": (wide[:, :, ::2], wide[:, :, 1::2], wide[:, :, ::2]),
        "one head for all": (wide[:, :, :T], *2 * (shared.expand(B, H, T, d),)),
        "last dim strided": 3 * (turned.transpose(2, 3),),
        "misaligned": 3 * (normal(B * H * T * d + 1, dtype=dtype)[1:].view(B, H, T, d),),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _views())
def test_views_equal_their_copies_and_stay_unchanged(name, dtype, each_backend):
    leaves = _views(dtype)[name]
    kept = [t.clone() for t in leaves]
    upstream = normal(*leaves[0].shape[:-1], 1, seed=9, dtype=dtype).expand(leaves[0].shape)
    expected = results(vqfast.causal_attention, kept, upstream.clone(), dtype)
    out = vqfast.causal_attention(*leaves)
    assert torch.equal(out, expected[0])
    raw = importlib.import_module("vqfast.ops.causal_attention")
    scale = 1 / math.sqrt(leaves[0].shape[-1])
    lse = raw._OP(*leaves, scale)[1]
    found = raw._BACKWARD(upstream, *leaves, out, lse, scale)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, kept, strict=True))


def test_only_v_asks_for_a_gradient(each_backend):
    q, k, v = qkv(2, 2, 33, 16)
    v.requires_grad_()
    vqfast.causal_attention(q, k, v).sum().backward()  # an expanded upstream gradient
    assert v.grad is not None and q.grad is None and k.grad is None
    assert not vqfast.causal_attention(q, k, v.detach()).requires_grad


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16), (2, 0, 3, 16)])
def test_empty(shape, each_backend):
    q = torch.empty(shape, requires_grad=True)
    out = vqfast.causal_attention(q, q, q)
    out.sum().backward()
    assert out.shape == shape and q.grad.shape == shape


def test_gradcheck_in_float64():
    leaves = [t.double().requires_grad_() for t in qkv(1, 2, 7, 3)]
    assert torch.autograd.gradcheck(vqfast.causal_attention, leaves)


def test_chunks_of_the_reference_fit_together(monkeypatch):
    module = importlib.import_module("vqfast.ops.causal_attention")
    leaves = [t.double() for t in qkv(1, 2, 61, 8)]
    whole = results(vqfast.causal_attention, leaves, leaves[0], torch.float64)
    monkeypatch.setattr(module, "_CHUNK", 7 * 2 * 61)
    pieces = results(vqfast.causal_attention, leaves, leaves[0], torch.float64)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_a_row_does_not_depend_on_its_batch(each_isa):
    leaves = qkv(5, 3, 77, 32)
    whole = vqfast.causal_attention(*leaves)
    alone = vqfast.causal_attention(*(t[3:4, 1:2] for t in leaves))
    assert torch.equal(alone, whole[3:4, 1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_share_the_rows_and_change_no_bit(dtype):
    leaves, threads, found = qkv(1, 1, 700, 32, dtype), torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):  # one head: the size of a unit of work depends on the threads
            torch.set_num_threads(n)
            with vqfast.backend("cpu"):
                found.append(results(vqfast.causal_attention, leaves, leaves[0], dtype))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_compiles_with_its_backward():
    leaves = [t.requires_grad_() for t in qkv(1, 2, 20, 16)]

    def step(q, k, v):
        return (vqfast.causal_attention(q, k, v, scale=0.2) * v).sum()

    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_wide_heads_go_to_the_reference():
    q = normal(1, 1, 5, 257)
    assert "256" in vqfast.explain("causal_attention", q, q, q)["cpu"]
    with vqfast.backend("cpu"), pytest.raises(vqfast.BackendError, match="256"):
        vqfast.causal_attention(q, q, q)
    assert_within_budget((q, q, q))


def test_no_read_past_the_end_and_right_after_fork():
    """Arrays that end where a page ends, the next page forbidden; in a forked child."""
    module = importlib.import_module("vqfast.ops.causal_attention")
    shape, page = (1, 1, 13, 19), mmap.PAGESIZE

    def at_edge(t):
        area = mmap.mmap(-1, 3 * page)
        end = 2 * page
        start = ctypes.addressof(ctypes.c_char.from_buffer(area)) + end
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) == 0
        flat = torch.frombuffer(
            memoryview(area)[:end], dtype=t.dtype, offset=end - t.nbytes, count=t.numel()
        )
        return flat.view(t.shape).copy_(t)

    for dtype in (torch.float32, torch.bfloat16):
        leaves = [normal(*shape, seed=i, dtype=dtype) for i in range(3)]
        expected = results(vqfast.causal_attention, leaves, leaves[0], dtype)
        child = os.fork()
        if child == 0:
            edge = [at_edge(t) for t in leaves]
            with _dispatch.backend("cpu"):
                out, lse = module._OP(*edge, 1 / math.sqrt(19))
                found = module._BACKWARD(edge[0], *edge, at_edge(out), lse, 1 / math.sqrt(19))
            same = map(torch.equal, (out, *found), expected)
            os._exit(0 if all(same) else 1)
        assert os.waitpid(child, 0)[1] == 0


q4 = torch.zeros(2, 3, 5, 16)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((q4.long(), q4, q4), TypeError, "q .*int64"),
        ((q4, q4, [1.0]), TypeError, "v .*list"),
        ((q4, q4.half(), q4), TypeError, "k .*float16"),
        ((q4[0, 0], q4, q4), ValueError, "q .*4"),
        ((q4, q4[..., :8], q4), ValueError, r"k .*16.*8\]"),
        ((q4, q4, q4[:, :, :4]), ValueError, r"v .*5, 16.*4, 16"),
        ((q4, q4.to("meta"), q4), ValueError, "k .*meta"),
        ((q4[..., :0], q4[..., :0], q4[..., :0]), ValueError, "d >= 1"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, words):
    with pytest.raises(kind, match=words):
        vqfast.causal_attention(*arguments)


@pytest.mark.parametrize(
    ("scale", "kind"), [(math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)]
)
def test_bad_scale_is_named(scale, kind):
    with pytest.raises(kind, match="scale"):
        vqfast.causal_attention(q4, q4, q4, scale=scale)
