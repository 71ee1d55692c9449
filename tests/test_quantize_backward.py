"""The passes around the search: equal bits everywhere, hard histograms, what is saved and when."""

import pytest
import torch
import torch.nn.functional as F

import vqfast
from vqfast import _native
from vqfast.ops import code_order
from vqfast.testing import compare, tolerances

needs_native = pytest.mark.skipif(_native.load() is None, reason="native library not built")
# N, K, D and how rows spread over codes; D >= 64 is shared out by columns when one code has most
SPREADS = {
    "one code": (500, 9, 130), "one code, narrow": (500, 9, 5), "mostly one": (700, 300, 64),
    "more codes than rows": (40, 5000, 33), "even": (1500, 16, 48), "one row": (1, 3, 7),
    "no rows": (0, 4, 6),
}  # fmt: skip


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(spread, dtype=torch.float32, codes_dtype=torch.float32):
    """z near its codes, codebook, indices and a gradient from above."""
    N, K, D = SPREADS[spread]
    codebook = normal(1, K, D).to(codes_dtype)
    indices = torch.randint(K, (N,), generator=torch.Generator().manual_seed(2))
    if "one code" in spread:
        indices[:] = K // 2
    if spread == "mostly one":
        indices[: N * 9 // 10] = 0
    z = (codebook[indices] + 0.3 * normal(3, N, D)).to(dtype)
    return z, codebook, indices, normal(4, N, D).to(dtype)


def raw(z, codebook, indices, upstream):
    """All raw ops of one step, by name."""
    ops = torch.ops.vqfast
    grad_loss = torch.tensor(1.7)
    z_q, loss, partial = ops.straight_through(z, codebook, indices, 1.25)
    order, start = ops.code_order(indices, len(codebook))
    both = ops.quantize_backward(upstream, grad_loss, z, codebook, order, start, 0.25, 1.0)
    alone = ops.straight_through_backward(upstream, grad_loss, z, codebook[indices], 0.25)
    return {
        "z_q": z_q, "loss": loss, "partial": partial, "order": order, "start": start,
        "grad_z": both[0], "grad_codes": both[1], "grad_z alone": alone,
    }  # fmt: skip


def assert_equal_bits(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def portable():
    """What the portable kernels give on one thread, by spread and dtype; made once."""
    library, made = _native.load(), {}

    def of(spread, dtype):
        if (spread, dtype) not in made:
            kept = library.selected(), torch.get_num_threads()
            library.select("base")
            torch.set_num_threads(1)
            try:
                made[spread, dtype] = raw(*make(spread, dtype))
            finally:
                library.select(kept[0])
                torch.set_num_threads(kept[1])
        return made[spread, dtype]

    return of


@needs_native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("spread", SPREADS)
def test_every_isa_and_thread_count_gives_equal_bits(
    spread, dtype, each_isa, each_thread_count, portable, poison
):
    assert_equal_bits(raw(*make(spread, dtype)), portable(spread, dtype))


@needs_native
@pytest.mark.parametrize("spread", ("one code", "even"))
def test_fifty_runs_give_equal_bits(spread):
    inputs, before = make(spread), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = raw(*inputs)
        for _ in range(50):
            assert_equal_bits(raw(*inputs), first)
    finally:
        torch.set_num_threads(before)


def step(z, codebook, indices, upstream, kind):
    """Plain torch: the gradients of sum(z_q · upstream) + 1.7 (0.25 commitment + codes)."""
    z, codebook = (t.detach().to(kind or t.dtype).requires_grad_() for t in (z, codebook))
    z_q = F.embedding(indices, codebook)
    loss = 0.25 * (z_q.detach() - z).square().mean() + (z_q - z.detach()).square().mean()
    total = ((z + (z_q - z).detach()) * upstream.to(kind or upstream.dtype)).sum()
    return dict(zip("zc", torch.autograd.grad(total + 1.7 * loss, (z, codebook)), strict=True))


@pytest.mark.parametrize("codes_dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("spread", [s for s in SPREADS if s != "no rows"])
def test_gradients_keep_the_budget_on_hard_histograms(spread, dtype, codes_dtype, each_backend):
    inputs = make(spread, dtype, codes_dtype)
    found = raw(*inputs)
    plain, exact = step(*inputs, None), step(*inputs, torch.float64)
    ours = {"z": found["grad_z"], "c": found["grad_codes"]}
    for name, value in ours.items():
        assert value.dtype == inputs["zc".index(name)].dtype
        ratio = compare.budget_ratio(value, plain[name], exact[name], tolerances.BACKWARD)
        assert ratio <= 1, name
    used = torch.zeros(len(inputs[1]), dtype=torch.bool)
    used[inputs[2]] = True
    assert not ours["c"][~used].any()
    alone = compare.budget_ratio(found["grad_z alone"], plain["z"], exact["z"], tolerances.BACKWARD)
    assert alone <= 1


@needs_native
def test_the_gradient_of_z_does_not_depend_on_whether_the_codes_are_trained():
    z, codebook, _, upstream = make("even")
    grads = []
    for trained in (False, True):
        leaf = z.clone().requires_grad_()
        q = vqfast.quantize(leaf, codebook.clone().requires_grad_(trained))
        ((q.z_q * upstream).sum() + q.loss).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("K", (1, 5, 5000))
def test_order_is_a_stable_sort(K, each_backend):
    indices = torch.randint(K, (777,), generator=torch.Generator().manual_seed(1))
    order, start = code_order(indices, K)
    assert torch.equal(order, torch.sort(indices, stable=True).indices)
    assert torch.equal(start.diff(), torch.bincount(indices, minlength=K)) and start[0] == 0


@needs_native
def test_raw_ops_never_leave_their_arrays():
    z, codebook, indices, upstream = make("even")
    order, start = code_order(indices, len(codebook))
    ops, rest = torch.ops.vqfast, (0.25, 1.0)
    with vqfast.backend("cpu"):
        for bad in (-1, len(codebook), 1 << 40):
            wrong = indices.clone()
            wrong[7] = bad
            with pytest.raises(IndexError, match=str(bad)):
                ops.straight_through(z, codebook, wrong, 1.0)
            with pytest.raises(IndexError, match=str(bad)):
                ops.code_order(wrong, len(codebook))
        for at, bad in ((0, -1), (3, len(z) + 1), (-1, 1 << 40)):
            wrong = start.clone()
            wrong[at] = bad
            with pytest.raises(IndexError, match="start"):
                ops.quantize_backward(upstream, torch.ones(()), z, codebook, order, wrong, *rest)
        wrong = order.clone()
        wrong[5] = len(z)
        with pytest.raises(IndexError, match="order"):
            ops.quantize_backward(upstream, torch.ones(()), z, codebook, wrong, start, *rest)


# ---- what autograd keeps


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("trained", (False, True))
def test_nothing_of_the_size_of_z_is_kept_beside_z_and_z_q(trained):
    z, codebook = leaves(*make("even")[:2])
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        q = vqfast.quantize(z, codebook.requires_grad_(trained))
    own = {t.data_ptr() for t in (z, codebook, q.z_q, q.indices)}
    assert kept and all(t.data_ptr() in own for t in kept)


def test_latents_changed_before_backward_are_noticed():
    z, codebook = leaves(*make("even")[:2])
    inner = z * 1
    q = vqfast.quantize(inner, codebook)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.loss.backward()


def test_a_trained_codebook_changed_before_backward_is_noticed():
    z, codebook = leaves(*make("even")[:2])
    q = vqfast.quantize(z, codebook)
    with torch.no_grad():
        codebook.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.loss.backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_frozen_codebook_may_move_before_backward(dtype):
    z, codebook, *_ = make("even", dtype, dtype)
    (right,) = leaves(z)
    vqfast.quantize(right, codebook).loss.backward()
    (late,) = leaves(z)
    q = vqfast.quantize(late, codebook)
    codebook.zero_()  # as a moving average does
    q.loss.backward()
    assert torch.equal(late.grad, right.grad)


def test_half_latents_against_a_frozen_float32_codebook_lose_no_digits():
    z, codebook, *_ = make("even", torch.bfloat16)
    (leaf,) = leaves(z)
    q = vqfast.quantize(leaf, codebook)
    q.loss.backward()
    plain, exact = (0.5 * (z.to(kind) - codebook[q.indices].to(kind)) / z.numel()
                    for kind in (torch.float32, torch.float64))  # fmt: skip
    ratio = compare.budget_ratio(leaf.grad, plain.bfloat16(), exact, tolerances.BACKWARD)
    assert ratio <= 1


def test_only_one_of_the_two_outputs_is_used():
    z, codebook = leaves(*make("even")[:2])
    upstream = normal(5, *z.shape)
    grads = torch.autograd.grad(vqfast.quantize(z, codebook).z_q, (z, codebook), upstream,
                                allow_unused=True)  # fmt: skip
    assert torch.equal(grads[0], upstream) and (grads[1] is None or not grads[1].any())
    q = vqfast.quantize(z, codebook)
    from_loss = torch.autograd.grad(q.loss, (z, codebook))
    assert all(g.any() for g in from_loss)
    q = vqfast.quantize(z, codebook)
    added = torch.autograd.grad((q.z_q, q.loss), (z, codebook), (upstream, torch.ones(())))
    torch.testing.assert_close(added[0], upstream + from_loss[0])
    assert torch.equal(added[1], from_loss[1])


def test_an_expanded_gradient_from_above_is_taken():
    z, codebook = leaves(*make("even")[:2])
    q = vqfast.quantize(z, codebook)
    (q.z_q.sum() + 0 * q.loss).backward()
    assert torch.equal(z.grad, torch.ones_like(z))
