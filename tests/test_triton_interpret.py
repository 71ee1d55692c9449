"""Triton kernels under the interpreter (no GPU) against the references in float64; see
interpreted.py. The search and what belongs to `quantize` are in files of their own."""

import pytest
import torch
from interpreted import DTYPES, Checks, exact, normal, plain, rng, run

check = Checks(__file__)


def within(op, inputs, factor, what):
    """The budget rule for every floating output of an op."""
    from vqfast.testing import compare

    found = run(op, *inputs)
    for i, (o, p, e) in enumerate(zip(found, plain(op, *inputs), exact(op, *inputs), strict=True)):
        ratio = compare.budget_ratio(o, p, e, factor)
        # a result that is zero by cancellation has no scale of its own: for one key dq is k times
        # the difference of two equal sums of d products of order one, in two orders
        noise = e.numel() and (o.double() - e).abs().max() <= 16 * torch.finfo(torch.float32).eps
        assert ratio <= 1 or noise, f"{op} output {i}, {what}: error {ratio:.3g} of the allowed"
    return found


# ---- cross entropy -------------------------------------------------------------------------------


@check
def cross_entropy_meets_the_budget():
    for dtype in DTYPES:
        for N, V in ((1, 1), (3, 7), (5, 513), (2, 5003), (0, 9)):
            logits = 4 * normal(N + V, N, V, dtype=dtype) + 30
            targets = torch.randint(V, (N,), generator=rng(1))
            _, top, log_sum = within("cross_entropy", (logits, targets), 2, f"{dtype} {N}x{V}")
            grad = normal(3, 1).expand(N) if V == 7 else normal(3, N)
            inputs = (grad, logits, targets, top, log_sum)
            within("cross_entropy_backward", inputs, 3, f"{dtype} {N}x{V}")


@check
def cross_entropy_shows_bad_rows_and_masks_impossible_tokens():
    x = normal(5, 6, 40)
    x[0, 3], x[1, 3], x[2] = float("nan"), float("inf"), -float("inf")
    x[3, 5:], x[4, :17] = -float("inf"), -float("inf")
    targets = torch.tensor([0, 0, 0, 2, 20, 99])  # the last is out of range
    loss = run("cross_entropy", x, targets)[0]
    assert loss.isnan().tolist() == [True, True, True, False, False, True]
    right = torch.nn.functional.cross_entropy(x[3:5].double(), targets[3:5], reduction="none")
    assert torch.allclose(loss[3:5].double(), right, rtol=1e-6)


# ---- code statistics -----------------------------------------------------------------------------


@check
def code_stats_has_the_bits_of_the_reference():
    few = ((127, 61, 17),)
    shapes = ((0, 5, 3), (1, 1, 1), (1030, 3, 7), *few, (90, 40, 70))
    for dtype in (*DTYPES, torch.float64):
        for N, K, D in shapes if dtype == torch.float32 else few:
            z = normal(N + D, N, D, dtype=dtype)
            index = torch.randint(K, (N,), generator=rng(2))
            index[N // 2 :] = index[N // 2 :].clamp_max(1)  # many rows on few codes
            counts, sums = run("code_stats", index, z, K)
            right_counts, right_sums = plain("code_stats", index, z, K)
            assert torch.equal(counts, right_counts), f"{dtype} {N} {K} {D}"
            assert torch.equal(sums, right_sums) and sums.dtype == right_sums.dtype


@check
def code_stats_keeps_a_bad_row_to_its_own_code():
    z = normal(1, 50, 6)
    index = torch.randint(9, (50,), generator=rng(2))
    clean = run("code_stats", index, z, 9)[1]
    z[7] = float("nan")
    sums = run("code_stats", index, z, 9)[1]
    assert sums[index[7]].isnan().all()
    others = torch.arange(9) != index[7]
    assert torch.equal(sums[others], clean[others])
    strided = run("code_stats", index, normal(1, 6, 50).T, 9)[1]
    assert torch.equal(strided, run("code_stats", index, normal(1, 6, 50).T.contiguous(), 9)[1])


# ---- causal attention ----------------------------------------------------------------------------


def attention_data(dtype, B, H, T, d):
    return [normal(i + T, B, H, T, d, dtype=dtype) for i in range(4)]


@check
def causal_attention_meets_the_budget():
    for dtype in DTYPES:
        for B, H, T, d in (
            (2, 1, 1, 16),
            (1, 2, 37, 59),
            (1, 1, 130, 64),
            (1, 1, 70, 100),
            (1, 1, 19, 256),
            (2, 2, 0, 16),
        ):
            d = min(d, 64) if dtype == torch.float32 else d
            q, k, v, grad = attention_data(dtype, B, H, T, d)
            what = f"{dtype} {B} {H} {T} {d}"
            out, lse = within("causal_attention", (q, k, v, 0.2), 2, what)
            inputs = (grad, q, k, v, out, lse, 0.2)
            # the budget is the one of plain torch from the same saved values
            within("causal_attention_backward", inputs, 3, what)


@check
def causal_attention_reads_any_strides():
    B, H, T, d = 2, 3, 21, 24
    packed = normal(1, B, T, 3, H, d).transpose(1, 3)  # [B, H, 3, T, d]
    q, k, v = packed.unbind(2)
    one = normal(2, B, 1, T, d).expand(B, H, T, d)
    grad = normal(3, 1).expand(B, H, T, d)
    for views in (
        (q, k, v),
        (q, one, one),
        tuple(normal(4 + i, B, H, d, T).transpose(2, 3) for i in range(3)),
    ):
        dense = [t.contiguous() for t in views]
        out, lse = run("causal_attention", *views, 0.3)
        assert torch.equal(out, run("causal_attention", *dense, 0.3)[0])
        found = run("causal_attention_backward", grad, *views, out, lse, 0.3)
        right = run("causal_attention_backward", grad.contiguous(), *dense, out, lse, 0.3)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@check
def causal_attention_never_sees_the_future():
    for dtype in DTYPES:
        for T, seen in ((17, 9), (150, 70)):
            q, k, v, grad = attention_data(dtype, 1, 2, T, 32)
            clean = run("causal_attention", q, k, v, 0.3)
            grad[:, :, seen:] = 0
            right = run("causal_attention_backward", grad, q, k, v, *clean, 0.3)[0]
            k[:, :, seen:], v[:, :, seen:] = float("nan"), float("inf")
            out, lse = run("causal_attention", q, k, v, 0.3)
            assert torch.equal(out[:, :, :seen], clean[0][:, :, :seen])
            assert out[:, :, seen:].isnan().all()  # those rows see it
            dq = run("causal_attention_backward", grad, q, k, v, out, lse, 0.3)[0]
            assert torch.equal(dq[:, :, :seen], right[:, :, :seen])


@check
def causal_attention_hides_the_past_from_later_keys_in_the_backward_pass():
    """A row's q and gradient reach the keys up to it. Row 40 lies in the square of each kernel."""
    for dtype in DTYPES:
        q, k, v, grad = attention_data(dtype, 1, 2, 150, 32)
        out, lse = run("causal_attention", q, k, v, 0.3)
        right = run("causal_attention_backward", grad, q, k, v, out, lse, 0.3)
        grad[:, :, 40, 3], q[:, :, 40, 5] = float("nan"), float("inf")
        dq, dk, dv = run("causal_attention_backward", grad, q, k, v, out, lse, 0.3)
        for found, clean in ((dk, right[1]), (dv, right[2])):
            assert torch.equal(found[:, :, 41:], clean[:, :, 41:])
            assert found[:, :, :41].isnan().any(-1).all()
        others = [t for t in range(150) if t != 40]
        assert torch.equal(dq[:, :, others], right[0][:, :, others])


@check
def causal_attention_shows_one_bad_value_to_the_rows_that_see_it():
    q, k, v, _ = attention_data(torch.float32, 1, 1, 80, 16)
    v[0, 0, 20, 3] = float("nan")
    out = run("causal_attention", q, k, v, 0.3)[0][0, 0]
    bad = torch.zeros(80, 16, dtype=torch.bool)
    bad[20:, 3] = True
    assert torch.equal(out.isnan(), bad)


@check
def causal_attention_takes_the_sign_of_the_scale_from_q():
    for dtype in DTYPES:
        q, k, v, _ = attention_data(dtype, 1, 2, 70, 16)
        out, lse = run("causal_attention", q, k, v, -0.3)
        right = run("causal_attention", -q, k, v, 0.3)
        assert torch.equal(out, right[0]) and torch.equal(lse, right[1])
        within("causal_attention", (q, k, v, -0.3), 2, f"{dtype} negative")
        within("causal_attention", (q, k, v, 0.0), 2, f"{dtype} zero")


@check
def causal_attention_of_impossible_scores_is_zero():
    q, k, v, _ = attention_data(torch.float32, 1, 1, 20, 16)
    q[0, 0, 5], k[0, 0, :, 0] = 0, -float("inf")
    q[0, 0, 5, 0], q[0, 0, :, 1:] = 1, 0
    k[0, 0, :, 1:] = 0
    out, lse = run("causal_attention", q, k, v, 1.0)
    assert (out[0, 0, 5] == 0).all() and lse[0, 0, 5] == float("inf")


# ---- full attention ------------------------------------------------------------------------------


@check
def full_attention_meets_the_budget_and_reads_packed_rows():
    for B, H, T, d in ((2, 1, 1, 16), (1, 2, 37, 59), (2, 1, 70, 512), (1, 1, 130, 100)):
        for scale in (0.2, -0.2, 0.0):
            q, k, v = (normal(i + T, B, H, T, d, dtype=torch.float16) for i in range(3))
            out, lse = within("full_attention", (q, k, v, scale), 2, f"{B} {H} {T} {d} {scale}")
            packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)  # [B, T, 3, H, d]
            found = run("full_attention", *packed.transpose(1, 3).unbind(2), scale)
            assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    run("full_attention", *(normal(1, 2, 2, 0, 16, dtype=torch.float16),) * 3, 0.2)


@check
def full_attention_shows_a_bad_value_in_every_row_and_impossible_scores_as_zeros():
    q, k, v = (normal(i, 1, 1, 50, 16, dtype=torch.float16) for i in range(3))
    v[0, 0, 45, 3] = float("nan")
    out = run("full_attention", q, k, v, 0.3)[0][0, 0]
    assert out[:, 3].isnan().all() and out[:, :3].isfinite().all()
    q[0, 0, 5], k[0, 0, :, 0], q[0, 0, 5, 0] = 0, -float("inf"), 1
    k[0, 0, :, 1:], q[0, 0, :, 1:] = 0, 0
    out, lse = run("full_attention", q, k, v.nan_to_num(), 1.0)
    assert (out[0, 0, 5] == 0).all() and lse[0, 0, 5] == float("inf")


# ---- group norm + SiLU ---------------------------------------------------------------------------

_NORM_SHAPES = (  # B, C, positions, groups
    (2, 64, (9, 7), 32), (3, 32, (1, 1), 8), (1, 39, (5, 11), 13), (1, 6, (50, 50), 2),
    (2, 8, (), 4), (1, 72, (3,), 1),
)  # fmt: skip


@check
def group_norm_silu_meets_the_budget():
    for dtype in DTYPES:
        for B, C, positions, groups in _NORM_SHAPES:
            for last in (False, True):
                x = normal(C, B, C, *positions) * 2 + 3
                x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).to(dtype)
                dy = (
                    normal(C + 1, B, *positions, C).movedim(-1, 1)
                    if last
                    else normal(C + 1, *x.shape)
                )
                weight, bias = 1 + 0.3 * normal(1, C), 0.3 * normal(2, C)
                what = f"{dtype} {B} {C} {positions} {groups} last {last}"
                inputs = (x, weight, bias, groups, 1e-6)
                y, mean, rstd = within("group_norm_silu", inputs, 2, what)
                assert y.stride() == x.stride()
                inputs = (dy.to(dtype), x, weight, bias, mean, rstd, groups)
                dx = within("group_norm_silu_backward", inputs, 3, what)[0]
                assert dx.stride() == x.stride()


@check
def group_norm_silu_keeps_its_digits_under_an_offset():
    x = normal(4, 1, 16, 20, 20)
    args = (torch.ones(16), torch.zeros(16), 4, 1e-6)
    y, _, rstd = run("group_norm_silu", x + 4096, *args)
    right, _, right_rstd = exact("group_norm_silu", x + 4096, *args)
    assert (rstd / right_rstd - 1).abs().max() < 1e-6 and (y - right).abs().max() < 1e-5


# ---- sampling ------------------------------------------------------------------------------------


@check
def sampling_equals_the_reference():
    for dtype in DTYPES:
        for B, V in ((5, 1), (12, 257), (3, 1000)):
            x = (3 * normal(V, B, V)).to(dtype)  # float16 has many ties
            x[0, V // 2 :] = -float("inf") if V > 1 else 0.0
            index = torch.randint(1 << 40, (B,), generator=rng(3))
            for options in (
                (1.0, 0, 1.0), (0.0, 3, 0.5), (0.7, 1, 1.0), (1.3, 20, 0.9), (1e-30, 0, 1.0),
                (2.0, 0, 0.3), (1.0, 5000, 0.999), (1.0, 7, 1e-9),
            ):  # fmt: skip
                seed, position = ((1234, 5), (-3, 2**31 + 7), (2**62 + 1, 0))[B % 3]
                inputs = (x, index, *options, seed, position)
                found, right = run("sample_logits", *inputs)[0], plain("sample_logits", *inputs)[0]
                assert torch.equal(found, right), f"{dtype} {B} {V} {options} {seed} {position}"


@check
def sampling_marks_bad_rows_and_touches_no_other():
    x, index = normal(1, 6, 50), torch.arange(6)
    for options in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 5, 0.8)):
        clean = run("sample_logits", x, index, *options, 1, 2)[0]
        sick = x.clone()
        sick[1, 7], sick[3, 0], sick[4] = float("nan"), float("inf"), -float("inf")
        found = run("sample_logits", sick, index, *options, 1, 2)[0]
        assert found[[1, 3, 4]].tolist() == [-1, -1, -1]
        assert torch.equal(found[[0, 2, 5]], clean[[0, 2, 5]])


# ---- cached decoding -----------------------------------------------------------------------------


@check
def decode_attention_meets_the_budget_and_reads_no_unwritten_slot():
    for dtype in DTYPES:
        for B, H, S, d, length in (
            (3, 2, 300, 64, 290),
            (1, 1, 1, 16, 1),
            (2, 3, 41, 59, 37),
            (1, 2, 9, 100, 0),
        ):
            q, k, v = normal(1, B, H, d, dtype=dtype), *normal(2, 2, B, H, S, d, dtype=dtype)
            clean = within("decode_attention", (q, k, v, length), 2, f"{dtype} {B} {H} {S} {d}")[0]
            k[:, :, length:], v[:, :, length:] = float("nan"), float("inf")
            assert torch.equal(run("decode_attention", q, k, v, length)[0], clean)


@check
def decode_attention_is_the_same_in_any_batch():
    q, k, v = normal(1, 5, 2, 32), *normal(2, 2, 5, 2, 50, 32)
    whole = run("decode_attention", q, k, v, 47)[0]
    for b in range(5):
        assert torch.equal(
            run("decode_attention", q[b:][:1], k[b:][:1], v[b:][:1], 47)[0][0], whole[b]
        )


@pytest.mark.parametrize("name", check.functions)
def test_interpreted(name):
    check.passed(name)


if __name__ == "__main__":
    check.run()
