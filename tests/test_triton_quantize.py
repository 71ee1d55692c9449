"""The Triton kernels around `quantize` and the EMA codebook, under the interpreter (no GPU); see
interpreted.py."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import DTYPES, Checks, normal, rng, run

check = Checks(__file__)
KINDS = ((torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32))
SPREADS = {
    "few codes": (130, 3, 7), "many codes": (20, 61, 17), "wide": (70, 9, 300), "one": (1, 1, 1),
    "no rows": (0, 5, 3),
}  # fmt: skip


def within(what, op, *inputs):
    """The budget rule for every output of the Triton kernel; returns them from a second run, which
    must agree bit for bit."""
    from vqfast.testing.check import check_case

    right, _, why = check_case(op, inputs, "triton")
    assert right, f"{op} {what}: {why}"
    first, again = run(op, *inputs), run(op, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{op} {what}"
    return again


def each_spread():
    """What it is, z [N, D] near its codes, codebook [K, D], indices [N], half of them one code."""
    for what, (N, K, D) in SPREADS.items():
        for dtype, codes_dtype in KINDS:
            codebook = normal(K + D, K, D, dtype=codes_dtype)
            indices = torch.randint(K, (N,), generator=rng(2))
            indices[: N // 2] = K // 2
            z = (codebook[indices] + 0.3 * normal(N + D, N, D)).to(dtype)
            yield f"{what} {dtype} {codes_dtype}", z, codebook, indices


@check
def straight_through():
    for what, z, codebook, indices in each_spread():
        z_q, loss, _ = within(what, "straight_through", z, codebook, indices, 1.25)
        assert torch.equal(z_q, codebook[indices].to(z.dtype)) and loss.shape == ()
        for upstream in (normal(3, *z.shape, dtype=z.dtype), None):
            inputs = (upstream, torch.tensor(1.7), z, codebook[indices], 0.25)
            within(what, "straight_through_backward", *inputs)


def same_bits(found, right, what):
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()), f"{what}: output {i}"
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{what}: output {i}"


def search_then_lookup(z, codebook, x, codes, metric, weight):
    """What `nearest_quantize` does in one op, by the ops that it is made of."""
    found = run("nearest", z, codebook, metric)
    counts = torch.bincount(found[0], minlength=len(codebook))
    return *found, *run("straight_through", x, codes, found[0], weight), counts


@check
def search_and_lookup_in_one_op_have_the_bits_of_two():
    for i, (N, K, D) in enumerate(((1, 1, 1), (70, 131, 4), (33, 300, 17), (9, 65, 70), (0, 5, 3))):
        for j, dtype in enumerate(DTYPES):
            metric = (i + j) % 3
            z, codebook = normal(N, N, D, dtype=dtype), normal(K, K, D)
            x, codes = z, codebook
            if metric == 1:
                x, codes = (F.normalize(t.float(), dim=-1) for t in (z, codebook))
            inputs = (z, codebook, x, codes, metric, 1.25)
            what = f"{N} {K} {D} {dtype} {metric}"
            found = within(what, "nearest_quantize", *inputs)
            same_bits(found, search_then_lookup(*inputs), what)
            assert found[0].numel() == 0 or (found[2] == codes.to(x.dtype)[found[0]]).all()


@check
def rows_without_a_certificate_are_looked_up_too():
    """All rows (equal codes), some in a part of 8, some beyond the first 16, bad rows and codes."""
    from vqfast.kernels import _nearest_launch as launch
    from vqfast.kernels._nearest_screen import SLOW_ROW

    z, codebook = normal(1, 45, 5), normal(2, 300, 5)
    one_code = codebook[:1].repeat(300, 1)
    far = z.clone()
    far[[3, 20, 21, 44]] *= 1e9
    bad, worse = far.clone(), codebook.clone()
    bad[9, 2], bad[40, 0], worse[::2, 1] = float("nan"), -float("inf"), float("inf")
    for what, (rows, book, least, most) in {
        "equal codes": (z, one_code, 45, 45), "far scales": (far, codebook, 4, 20),
        "not finite": (bad, worse, 6, 20), "no code": (bad, codebook * float("nan"), 2, 45),
    }.items():  # fmt: skip
        memory = launch.scratch(rows, book)
        launch.search(rows, book, 0, torch.empty(45, dtype=torch.int64), torch.empty(45), memory)
        slow = (memory[3] == SLOW_ROW.value).any(0)
        assert least <= slow.sum() <= most, f"{what}: {slow}"
        inputs = (rows, book, rows, book, 0, 0.5)
        same_bits(run("nearest_quantize", *inputs), search_then_lookup(*inputs), what)


@check
def quantize_is_one_op_forward():
    import vqfast
    from vqfast import _dispatch
    from vqfast.ops import nearest

    launched, launcher = [], _dispatch.Op._launcher
    _dispatch.Op._launcher = lambda op, name: launched.append((op.name, name)) or launcher(op, name)
    z, codebook = normal(1, 2, 9, 6), normal(2, 40, 6)
    for metric in ("l2", "cosine", "dot"):
        launched.clear()
        with _dispatch.backend("triton"):
            q = vqfast.quantize(z, codebook, metric=metric)
        assert launched == [("nearest_quantize", "triton")], launched
        right = nearest(z, codebook, metric=metric)
        assert torch.equal(q.indices, right)
        codes = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
        assert torch.equal(q.z_q, codes[right])


@check
def both_gradients():
    from vqfast.ops import code_order

    for what, z, codebook, indices in each_spread():
        rows = code_order(indices, len(codebook))
        unused = torch.bincount(indices, minlength=len(codebook)) == 0
        for upstream in (normal(3, *z.shape, dtype=z.dtype), None):
            inputs = (upstream, torch.tensor(1.7), z, codebook, *rows, 0.25, 1.0)
            _, grad_codes = within(what, "quantize_backward", *inputs)
            assert not grad_codes[unused].any(), what


@check
def a_gradient_near_the_codes_is_not_lost_in_rounding():
    from vqfast.ops import code_order

    codebook, indices = 1e3 + normal(1, 3, 4), torch.arange(60) % 3
    z = codebook[indices] + 1e-4 * normal(2, 60, 4)
    rows = code_order(indices, 3)
    _, found = run("quantize_backward", None, torch.tensor(120.0), z, codebook, *rows, 0.25, 1.0)
    right = (codebook.double()[:, None] - z.double().view(20, 3, 4).transpose(0, 1)).sum(1)
    assert (found - right).abs().max() < 1e-6 * right.abs().max()


@check
def statistics_leave_bad_rows_out():
    from vqfast.ops import code_order

    for what, z, codebook, indices in each_spread():
        z[1::4, 0], z[2::7, -1] = float("nan"), -float("inf")
        rows = code_order(indices, len(codebook))
        (packed,) = within(what, "ema_stats", z, *rows)
        counts = torch.bincount(indices[z.isfinite().all(1)], minlength=len(codebook))
        assert torch.equal(packed[:, -1], counts.float()), what


@check
def averages_move_in_place():
    from vqfast.ops.ema_update import sample_inputs
    from vqfast.testing import Case

    for N, K, D in ((1, 5, 3), (1, 70, 300), (0, 7, 4), (1, 2100, 2)):
        for decay in (0.99, 0.2, 0.0):
            case = Case("", "ema_update", {"N": N, "K": K, "D": D}, frozenset())
            inputs = (*sample_inputs(case, torch.float32, "cpu")[:4], decay, 1e-5)
            _, *moved = within(f"{K} {D} {decay}", "ema_update", *inputs)
            if N == 0:  # a batch without rows
                assert all(torch.equal(a, b) for a, b in zip(moved, inputs[:3], strict=True))


@pytest.mark.parametrize("name", check.functions)
def test_interpreted(name):
    check.passed(name)


if __name__ == "__main__":
    check.run()
