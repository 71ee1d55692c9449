"""The Triton step of a GPT under the interpreter (no GPU): every packed format, hostile sizes, any
batch; see interpreted.py."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from interpreted import Checks, exact, normal, plain, rng, run

check = Checks(__file__)
L, H, V = 1, 2, 37
NAN = float("nan")


def model(d, S, bits, heads=H):
    """Packed weights of one layer: tok_emb, pos_emb, vectors, weights."""
    from vqfast.ops._packed import pack_matrix
    from vqfast.ops.decode_step import VECTORS_PER_LAYER, matrices

    E = heads * d
    weights = [pack_matrix(normal(N + K, N, K) / math.sqrt(K), bits) for N, K in matrices(L, E, V)]
    vectors = normal(3, (L * VECTORS_PER_LAYER + 2) * E)
    return 2 + normal(1, V, E), normal(2, S, E), vectors, torch.cat(weights)


def caches(B, S, d, written, dtype=torch.float32, heads=H):
    """Key and value cache with NaN from slot written[b] of each sequence on."""
    k, v = normal(4, 2, L, B, heads, S, d).to(dtype)
    for b, n in enumerate(written):
        k[:, b, :, n:] = v[:, b, :, n:] = NAN
    return k, v


def rows(*columns):
    """Tokens, slots, positions of the rows (slot, position); tokens follow from both."""
    slots, positions = (torch.tensor(c) for c in zip(*columns, strict=True))
    return (slots * 7 + positions * 3) % V, slots, positions


def one_product_after_another():
    """The interpreter's dot is a BLAS call, whose bits depend on the shape; here it adds the
    products in the order of k, as the tensor cores and the multiply-adds of a GPU do.
    """
    from triton.runtime import interpreter

    def dot(self, a, b, d, *_):
        total = d.data.copy()
        for k in range(a.data.shape[-1]):
            total += a.data[..., k : k + 1] * b.data[..., k : k + 1, :]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    return mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot)


def bfloat16_as_on_a_gpu():
    """The interpreter cuts float32 to bfloat16 and computes with its bits as with integers; here it
    rounds, and operands are bfloat16 as they are on a GPU.
    """
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from vqfast.kernels import decode_step

    def is_bfloat16(x):
        return x.scalar == bfloat16

    def wide(x):
        if is_bfloat16(x.dtype):
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data

    def narrow(x):
        values = torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
        return TensorHandle(values.view(torch.uint16).numpy(), bfloat16)

    def cast(self, x, to, old=InterpreterBuilder.cast_impl):
        if is_bfloat16(to) == is_bfloat16(x.dtype):
            return old(self, x, to)
        if is_bfloat16(to):
            return narrow(x.data)
        return old(self, TensorHandle(wide(x), float32), to)

    def binary(self, x, y, op, old=InterpreterBuilder.binary_op):
        if is_bfloat16(x.dtype):
            return narrow(op(wide(x), wide(y)))
        return old(self, x, y, op)

    def dot(self, a, b, d, *_):
        return TensorHandle(wide(a) @ wide(b) + d.data, d.dtype.scalar)

    stack = contextlib.ExitStack()
    for name, function in (("cast_impl", cast), ("binary_op", binary), ("create_dot", dot)):
        stack.enter_context(mock.patch.object(InterpreterBuilder, name, function))
    stack.enter_context(mock.patch.object(decode_step, "_operand", lambda t, bits: bfloat16))
    return stack


def step(where, k, v, packed, bits, n_logits):
    """Logits, and the caches as the kernel leaves them."""
    with one_product_after_another():
        return run("decode_step", *where, k, v, *packed, bits, n_logits)


def within(inputs, what):
    """The budget rule for the logits and both caches."""
    from vqfast import _dispatch
    from vqfast.testing import check as checking

    ok, error, why = checking.check_case("decode_step", inputs, "triton")
    assert ok, f"{what}: {why} (worst {error:.3g})"
    assert _dispatch.OPS["decode_step"].reason("triton", inputs) is None


@check
def step_meets_the_budget_in_every_format():
    for bits, d, dtype in (
        (32, 29, torch.float32), (16, 32, torch.bfloat16), (8, 20, torch.float32),
        (4, 33, torch.bfloat16), (32, 16, torch.float16),
    ):  # fmt: skip
        B, S, T = 3, 9, 3
        where = rows(*((b, 4 + t) for t in range(T) for b in (2, 0, 1)))
        inputs = (*where, *caches(B, S, d, (4,) * 3, dtype), *model(d, S, bits), bits, 7)
        within(inputs, f"{bits} bits, d {d}")


@check
def step_meets_the_budget_with_the_operands_of_a_gpu():
    for bits, d, dtype in (
        (16, 32, torch.float32),
        (8, 20, torch.bfloat16),
        (4, 33, torch.float32),
    ):
        where = rows((1, 4), (0, 4), (1, 5))
        inputs = (*where, *caches(2, 7, d, (4, 4), dtype), *model(d, 7, bits), bits, 3)
        with bfloat16_as_on_a_gpu():
            within(inputs, f"{bits} bits, d {d}")


@check
def first_and_last_slots_and_more_splits_than_one():
    """Position 0 alone; the last slot of a cache of 131 slots, where a split is of 128."""
    S, d = 131, 16
    where = rows((0, 0), (1, 130), (2, 127), (3, 128))
    inputs = (*where, *caches(4, S, d, (0, 130, 127, 128)), *model(d, S, 16), 16, 4)
    within(inputs, "splits")


@check
def every_number_of_rows_and_every_place_has_the_same_bits():
    """R = 1, 7, 64 and 65 of one set of rows, in two orders, in calls of their own caches."""
    S, d, bits = 5, 16, 32
    all_rows = [(b, t) for b in range(13) for t in range(S)]
    packed, (k, v) = model(d, S, bits), caches(13, S, d, (0,) * 13)
    whole, wk, wv = step(rows(*all_rows), k, v, packed, bits, 65)
    assert whole.isfinite().all() and wk.isfinite().all()
    order = torch.randperm(65, generator=rng(5)).tolist()
    mixed, mk, mv = step(rows(*(all_rows[i] for i in order)), k, v, packed, bits, 65)
    assert torch.equal(mixed, whole[order]) and torch.equal(mk, wk) and torch.equal(mv, wv)
    for n in (1, 7, 64):
        some, sk, sv = step(rows(*all_rows[:n]), k, v, packed, bits, n)
        assert torch.equal(some, whole[:n]), n
        done = torch.tensor([i < n for i in range(65)]).view(13, S)[None, :, None, :, None]
        assert torch.equal(sk.isnan(), ~done.expand_as(sk)), n
        assert torch.equal(sk.nan_to_num() * done, wk * done), n
        assert torch.equal(sv.nan_to_num() * done, wv * done), n


@check
def a_row_has_its_bits_in_every_small_format():
    for bits in (16, 8, 4):
        S, d = 6, 32
        packed, (k, v) = model(d, S, bits), caches(20, S, d, (3,) * 20, torch.bfloat16)
        whole = step(rows(*((b, 3) for b in range(20))), k, v, packed, bits, 20)[0]
        for b in (0, 7, 19):
            alone = step(rows((b, 3)), k, v, packed, bits, 1)[0]
            assert torch.equal(alone[0], whole[b]), f"{bits} bits, row {b}"


@check
def logits_are_of_the_last_rows_and_none_is_allowed():
    S, d = 4, 16
    where = rows((0, 0), (0, 1), (1, 0), (0, 2), (1, 1))
    packed, (k, v) = model(d, S, 8), caches(2, S, d, (0, 0))
    whole, wk, _ = step(where, k, v, packed, 8, 5)
    for n in (0, 1, 3):
        some, sk, _ = step(where, k, v, packed, 8, n)
        assert torch.equal(some, whole[5 - n :]) and torch.equal(sk.isnan(), wk.isnan())


@check
def a_row_that_is_not_finite_touches_no_other():
    S, d, bits = 4, 16, 16
    tok_emb, *rest = model(d, S, bits)
    where, (k, v) = rows((0, 2), (1, 1), (2, 0)), caches(3, S, d, (2, 1, 0))
    clean = step(where, k, v, (tok_emb, *rest), bits, 3)[0]
    tok_emb[where[0][1], 5] = float("inf")
    sick = step(where, k, v, (tok_emb, *rest), bits, 3)[0]
    assert sick[1].isnan().all() and torch.equal(sick[[0, 2]], clean[[0, 2]])


@check
def refusals_name_the_reason():
    from vqfast import _dispatch, ops  # noqa: F401  (registers)

    why = _dispatch.OPS["decode_step"].reason
    good = (*rows((0, 0)), *caches(1, 2, 16, (0,)), *model(16, 2, 8), 8, 1)
    assert why("triton", good) is None
    wide = (*good[:3], *caches(1, 2, 257, (0,), heads=1), *good[5:])
    assert "257" in why("triton", wide)
    double = (*good[:3], good[3].double(), *good[4:])
    assert "k_cache is float64" in why("triton", double)
    assert "v_cache is not contiguous" in why(
        "triton", (*good[:4], good[4].transpose(0, 1).expand(2, 1, -1, -1, -1), *good[5:])
    )
    assert "tok_emb is bfloat16" in why("triton", (*good[:5], good[5].bfloat16(), *good[6:]))
    assert "16 bytes" in why(
        "triton", (*good[:8], torch.cat([good[8][:4], good[8]])[4:], *good[9:])
    )
    assert "bits = 2" in why("triton", (*good[:9], 2, 1))


@check
def rows_draw_at_positions_of_their_own():
    """The second row of sample_index is added to the position."""
    x, index = 2 * normal(1, 9, 50), torch.arange(9)
    at = torch.tensor([0, 5, 2**32 - 3, 7, 7, 1, 0, 9, 4])
    options = (1.0, 20, 0.9, 11)
    both = torch.stack([index, at])
    found = run("sample_logits", x, both, *options, 2)[0]
    assert torch.equal(found, plain("sample_logits", x, both, *options, 2)[0])
    assert torch.equal(found, exact("sample_logits", x, both, *options, 2)[0])
    for b in range(9):
        place = (int(at[b]) + 2) % 2**32
        one = run("sample_logits", x[b : b + 1], index[b : b + 1], *options, place)[0]
        assert one[0] == found[b], b


@pytest.mark.parametrize("name", check.functions)
def test_interpreted(name):
    check.passed(name)


if __name__ == "__main__":
    check.run()
