"""Statistics of a batch in one tensor, and the step of the averages that it makes."""

import pytest
import torch

from vqfast import _native
from vqfast.nn.quantizers import ema
from vqfast.ops import ema_stats, ema_update
from vqfast.testing import check, compare, tolerances

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_native = pytest.mark.skipif(_native.load() is None, reason="native library not built")


def batch(N, K, D, *, bad=False, skewed=False):
    g = torch.Generator().manual_seed(N + D)
    indices, z = torch.randint(K, (N,), generator=g), torch.randn(N, D, generator=g)
    if skewed:
        indices[:] = K // 2
    if bad:
        z[1::5, 0], z[3::7, -1], z[2::11, D // 2] = float("nan"), float("inf"), -float("inf")
    return indices, z


def in_a_loop(indices, z, K):
    """One finite row after another, in float64."""
    packed = torch.zeros(K, z.shape[1] + 1, dtype=torch.float64)
    for n, k in enumerate(indices.tolist()):
        if z[n].isfinite().all():
            packed[k, :-1] += z[n].double()
            packed[k, -1] += 1
    return packed.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", (False, True))
def test_statistics_are_those_of_a_plain_loop_over_finite_rows(dtype, bad, each_backend, poison):
    for N, K, D in ((0, 3, 2), (1, 1, 1), (300, 7, 5), (50, 200, 33), (40, 3, 130)):
        indices, z = batch(N, K, D, bad=bad)
        packed = ema_stats(indices, z.to(dtype), K)
        assert torch.equal(packed, in_a_loop(indices, z.to(dtype), K))


@pytest.mark.parametrize("skewed", (False, True))
def test_statistics_have_equal_bits_on_every_isa_and_thread_count(
    skewed, each_isa, each_thread_count
):
    indices, z = batch(3000, 37, 130, bad=True, skewed=skewed)
    expected = in_a_loop(indices, z, 37)
    assert all(torch.equal(ema_stats(indices, z, 37), expected) for _ in range(5))


def state(K, D, counts=None):
    g = torch.Generator().manual_seed(K + D)
    if counts is None:
        counts = torch.randint(4, (K,), generator=g).float()
        counts[0] = 2.0  # one at least
    size, average = torch.rand(K, generator=g) + 0.1, torch.randn(K, D, generator=g)
    packed = torch.cat([torch.randn(K, D, generator=g) * counts[:, None], counts[:, None]], dim=1)
    return size, average, average / size[:, None], packed


def published(size, average, weight, packed, decay, eps):
    """arXiv:1711.00937 appendix A.1 with smoothed counts."""
    size = decay * size + (1 - decay) * packed[:, -1]
    average = decay * average + (1 - decay) * packed[:, :-1]
    total = size.sum()
    smooth = (size + eps) / (total + len(size) * eps) * total
    return torch.stack([total, packed[:, -1].sum()]), size, average, average / smooth[:, None]


@pytest.mark.parametrize("decay", (0.0, 0.3, 0.5, 0.99))
def test_the_step_is_the_published_one(decay, each_backend):
    for K, D in ((1, 1), (7, 5), (300, 33), (9, 256)):
        inputs = (*state(K, D), decay, 1e-3)
        found = check.results("ema_update", inputs)
        plain = published(*inputs)
        exact = published(*(t.double() for t in inputs[:4]), *inputs[4:])
        for out, p, e in zip(found, plain, exact, strict=True):
            assert compare.budget_ratio(out, p, e, tolerances.FORWARD) <= 1


@needs_native
def test_the_step_has_equal_bits_on_every_isa_and_thread_count(each_isa, each_thread_count):
    library = _native.load()
    inputs = (*state(777, 45), 0.9, 1e-5)
    found = check.results("ema_update", inputs)
    threads = torch.get_num_threads()
    library.select("base")
    torch.set_num_threads(1)
    expected = check.results("ema_update", inputs)
    torch.set_num_threads(threads)
    library.select(each_isa)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_step_writes_the_buffers_it_is_given(each_backend):
    size, average, weight, packed = state(6, 4)
    kept = [t.data_ptr() for t in (size, average, weight)]
    before, given = weight.clone(), packed.clone()
    ema_update(size, average, weight, packed, decay=0.9, eps=1e-5)
    assert [t.data_ptr() for t in (size, average, weight)] == kept
    assert not torch.equal(weight, before) and torch.equal(packed, given)


def test_a_batch_without_rows_moves_nothing(each_backend):
    inputs = (*state(50, 6, torch.zeros(50)), 0.9, 1e-5)
    totals, *moved = check.results("ema_update", inputs)
    assert all(torch.equal(a, b) for a, b in zip(moved, inputs[:3], strict=True))
    torch.testing.assert_close(totals, torch.stack([inputs[0].sum(), torch.zeros(())]))


def test_a_codebook_that_has_seen_nothing_survives_a_batch_without_rows(each_backend):
    inputs = (torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 3), 0.9, 1e-5)
    _, *moved = check.results("ema_update", inputs)
    assert all(torch.equal(a, b) for a, b in zip(moved, inputs[:3], strict=True))


def test_a_fixed_point_stays(each_backend):
    size, average, weight, _ = state(40, 8)
    packed = torch.cat([average, size[:, None]], dim=1)
    inputs = (size, average, weight, packed, 0.99, 1e-5)
    _, new_size, new_average, _ = check.results("ema_update", inputs)
    assert torch.equal(new_size, size) and torch.equal(new_average, average)


def test_ranks_exchange_one_tensor_a_step(monkeypatch):
    """Two ranks with equal batches: the reduction doubles, and is the only exchange of a step."""
    reduced = []

    def all_reduce(t):
        reduced.append(tuple(t.shape))
        t.mul_(2)

    q = ema.EMAVectorQuantizer(5, 3, 0.25, decay=0.5, dead_code_threshold=0.0)
    q(torch.randn(2, 3, 4, 4))  # the first codes
    expected = q.embedding.cluster_size.clone()
    z = torch.randn(2, 3, 4, 4)
    counts = torch.bincount(q.eval().codes(z).flatten(), minlength=5)
    monkeypatch.setattr(ema, "_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    q.train()(z)
    assert reduced == [(5, 4)]
    torch.testing.assert_close(q.embedding.cluster_size, 0.5 * expected + 0.5 * 2 * counts)


def test_the_gradient_of_z_belongs_to_the_codes_before_the_step():
    q = ema.EMAVectorQuantizer(5, 3, 0.25, decay=0.1)
    q(torch.randn(1, 3, 4, 4))
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    old = q.embedding.weight.clone()
    z_q, loss, (_, _, indices) = q(z)
    assert not torch.equal(q.embedding.weight, old)
    (2 * loss + z_q.sum()).backward()
    rows = z.detach().movedim(1, -1).reshape(-1, 3)
    expected = 1 + 2 * 0.25 * 2 * (rows - old[indices]) / z.numel()
    torch.testing.assert_close(z.grad.movedim(1, -1).reshape(-1, 3), expected)
