"""The exact search against a float64 oracle: hostile data, every instruction set and backend."""

import ctypes
import importlib
import mmap
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import vqfast
from vqfast import _dispatch, _native

METRICS = ("l2", "cosine", "dot")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_native = pytest.mark.skipif(_native.load() is None, reason="native library not built")


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _unit(x):
    total = np.zeros(len(x))
    for d in range(x.shape[1]):
        total = total + x[:, d] * x[:, d]
    return x / np.maximum(np.sqrt(total), 1e-12)[:, None]


def oracle(z, codebook, metric="l2"):
    """The definition, without tricks: float64 scores in index order, then the first least."""
    x, c = z.double().numpy(), codebook.double().numpy()
    dead, odd = ~np.isfinite(c).all(1), ~np.isfinite(x).all(1)
    x, c = np.where(odd[:, None], 0.0, x), np.where(dead[:, None], 0.0, c)
    if metric == "cosine":
        x, c = _unit(x), _unit(c)
    score = np.zeros((len(x), len(c)))
    for d in range(x.shape[1]):
        if metric == "dot":
            score = score - x[:, d, None] * c[None, :, d]
        else:
            difference = x[:, d, None] - c[None, :, d]
            score = score + difference * difference
    score[:, dead] = np.inf
    best = score.argmin(1)
    best[odd] = 0
    distance = score[np.arange(len(x)), best]
    distance[odd | np.isinf(distance)] = np.nan
    return torch.from_numpy(best), torch.from_numpy(distance).float()


def assert_exact(z, codebook, metric="l2"):
    found, distance = vqfast.nearest(z, codebook, metric=metric, return_distance=True)
    expected, score = oracle(z, codebook, metric)
    assert torch.equal(found, expected)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, score, rtol=0, atol=0, equal_nan=True)


def _clustered(N, K, D):
    codebook = normal(2, K, D)
    return codebook[torch.arange(N) % K] + 1e-4 * normal(1, N, D), codebook


def _integers(N, K, D):
    g = torch.Generator().manual_seed(5)
    return tuple(torch.randint(-2, 3, (n, D), generator=g).float() for n in (N, K))


def _wide(N, K, D):
    z, c = normal(1, N, D), normal(2, K, D)
    powers = [10.0 ** (torch.arange(n) % 25 - 6)[:, None] for n in (N, K)]
    return z * powers[0], c * powers[1].flip(0)


def _shift_one(N, K, D):
    z, c = normal(1, N, D), normal(2, K, D)
    z[:, 0] += 1e5
    c[:, 0] += 1e5
    return z, c


def _near_ties(N, K, D):
    """The two best codes of a row are as far as each other up to 1e-7, and lie far apart in K."""
    z = 3 * normal(1, N, D)
    codebook = 100 * normal(2, K, D)
    step = torch.nn.functional.normalize(normal(3, K, D), dim=1)
    for n in range(min(N, K // 2)):
        codebook[n] = z[n] + step[n]
        codebook[K - 1 - n] = z[n] + step[K - 1 - n] * (1 + 1e-7 * (n % 5 - 2))
    return z, codebook


HARD = {
    "near ties": _near_ties,
    "taming init": lambda N, K, D: (normal(1, N, D), (normal(2, K, D).frac()) / K),
    "near codes": _clustered,
    "equal to codes": lambda N, K, D: (normal(2, K, D)[torch.arange(N) % K], normal(2, K, D)),
    "shifted by 1e4": lambda N, K, D: (normal(1, N, D) + 1e4, normal(2, K, D) + 1e4),
    "tight and far": lambda N, K, D: (1e-2 * normal(1, N, D) + 1e4, 1e-2 * normal(2, K, D) + 1e4),
    "one far coordinate": _shift_one,
    "one far code": lambda N, K, D: (normal(1, N, D), normal(2, K, D) + 1e9 * torch.eye(K, D)),
    "integer ties": _integers,
    "13 codes": lambda N, K, D: (normal(1, N, D), normal(2, 13, D)[torch.arange(K) % 13]),
    "one code": lambda N, K, D: (normal(1, N, D), normal(2, 1, D).repeat(K, 1)),
    "zeros": lambda N, K, D: (torch.zeros(N, D), -torch.zeros(K, D).cumsum(0)),
    "norms 1e-6..1e18": _wide,
    "far rows": lambda N, K, D: (normal(1, N, D) * 1e25, normal(2, K, D) * 1e-12),
    **{
        f"scale {s:g}": lambda N, K, D, s=s: (normal(1, N, D) * s, normal(2, K, D) * s)
        for s in (1e-40, 1e-30, 1e-18, 1e18, 1e30)
    },
}  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 257])
def test_indices_and_distances_are_the_oracles_on_every_isa(each_isa, D, metric):
    for (N, K), dtype in zip(
        ((0, 5), (1, 1), (25, 67), (13, 1025)), (*DTYPES, DTYPES[0]), strict=True
    ):
        assert_exact(normal(1, N, D).to(dtype), normal(2, K, D).to(dtype), metric)


@pytest.mark.parametrize("name", HARD)
def test_hard_data_on_every_isa(each_isa, name):
    for D in (3, 8, 40):
        z, codebook = HARD[name](65, 259, D)
        assert_exact(z, codebook)
        assert_exact(z[:3], codebook)  # a few rows are not screened


@pytest.mark.parametrize("name", HARD)
def test_hard_data_on_the_reference(name):
    with vqfast.backend("reference"):
        for metric in METRICS if "scale" not in name else METRICS[:1]:
            assert_exact(*HARD[name](33, 130, 12), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("D", [1, 2, 3, 4])
def test_cells_of_codes_on_every_isa(each_isa, D, metric):
    # 2,048 codes and rows are the least for which codes are cut into cells
    N, K = 2048 + 19, 2048 + 33
    z, codebook = normal(1, N, D), normal(2, K, D)
    uneven = codebook * 10.0 ** (torch.arange(K) % 9 - 4)[:, None]
    sick, dead = z.clone(), codebook.clone()
    sick[::97, 0], dead[::5, -1], dead[1::4] = float("nan"), float("inf"), codebook[:1]
    for rows, codes in (
        (z, codebook),
        ((4 * z).round(), (2 * codebook).round()),
        (z + 1e4, codebook + 1e4),
        (100 * z, uneven),
        (codebook[torch.arange(N) % K], codebook),
        (sick, dead),
        (z.half(), codebook.bfloat16()),
    ):
        assert_exact(rows, codes, metric)


def test_cells_of_equal_or_bad_codes(each_isa):
    z = normal(1, 2500, 2)
    assert vqfast.nearest(z, torch.ones(4096, 2)).eq(0).all()
    found, distance = vqfast.nearest(z, torch.full((4096, 2), torch.inf), return_distance=True)
    assert found.eq(0).all() and distance.isnan().all()


@pytest.mark.parametrize("D", [5, 8, 12])
def test_many_codes_on_every_isa(each_isa, D):
    # where int8 takes over from float32 at few dimensions
    for name in ("near ties", "equal to codes", "shifted by 1e4", "norms 1e-6..1e18", "13 codes"):
        assert_exact(*HARD[name](40, 4100, D))
    z, codebook = normal(1, 40, D), normal(2, 4100, D)
    for metric in METRICS:
        assert_exact(z, codebook, metric)


def test_codebook_of_several_integer_runs(each_isa):
    # 32 MiB of packed codes are 1,024 of these; the last run repeats codes of the first
    D, K = 32768 // 2, 3000
    codebook = normal(3, K, D)
    codebook[2900:] = codebook[:100]
    ids = torch.tensor([5, 1023, 1024, 1025, 2047, 2048, 2899, 2950, 0])
    assert vqfast.nearest(codebook[ids] + 1e-3, codebook).tolist() == [*ids[:-2].tolist(), 50, 0]


def test_codebook_of_several_runs(each_isa):
    # more codes than are packed at once (65,536), with repeats of the early ones at the end
    codebook = normal(3, 66_000, 3)
    codebook[65_900:] = codebook[:100]
    z = codebook[torch.tensor([5, 65_536, 65_535, 65_950, 0])] + 1e-6
    assert vqfast.nearest(z, codebook).tolist() == [5, 65_536, 65_535, 50, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_bad_rows_and_codes_touch_nothing_else(each_backend, metric, dtype):
    for K, D in ((65, 3), (300, 40)):
        z, codebook = normal(1, 50, D).to(dtype), normal(2, K, D).to(dtype)
        sick, dead = z.clone(), codebook.clone()
        sick[::7, -1] = torch.tensor([float("nan"), float("inf")]).repeat(4)
        dead[:: K // 3, 0] = float("-inf")
        dead[1, 0] = float("nan")
        for a, b in ((sick, codebook), (z, dead), (sick, dead)):
            assert_exact(a, b, metric)


def test_only_bad_codes_give_index_0(each_backend):
    found, distance = vqfast.nearest(
        normal(1, 5, 3), torch.full((4, 3), float("nan")), return_distance=True
    )
    assert found.tolist() == [0] * 5 and distance.isnan().all()


def test_float64_needs_the_reference_and_is_exact_there():
    z, codebook = normal(1, 40, 7).double(), normal(2, 90, 7).double()
    codebook[50] = codebook[7] = z[3] + 1e-14  # a tie that float32 cannot see from z
    assert_exact(z, codebook)
    big = vqfast.nearest(z * 1e200, codebook * 1e200)  # squares overflow: all are equally far
    assert big.tolist() == [0] * 40
    with pytest.raises(vqfast.BackendError, match="float64"), vqfast.backend("cpu"):
        vqfast.nearest(z, codebook)


@pytest.mark.parametrize("pair", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_dtypes_may_differ(each_backend, pair):
    assert_exact(normal(1, 40, 9).to(pair[0]), normal(2, 77, 9).to(pair[1]))


@needs_native
def test_splits_threads_and_backends_agree(each_thread_count):
    z, codebook = _clustered(999, 517, 24)
    whole = vqfast.nearest(z, codebook)
    split = torch.cat([vqfast.nearest(part, codebook) for part in z.split((1, 2, 61, 935))])
    with vqfast.backend("reference"):
        assert torch.equal(vqfast.nearest(z, codebook), whole)
    assert torch.equal(split, whole)
    assert torch.equal(whole, oracle(z, codebook)[0])


def test_long_searches_are_cut_for_interrupts(monkeypatch):
    module, sizes = importlib.import_module("vqfast.ops.nearest"), []
    op = module._OP

    def counted(z, codebook, metric):
        sizes.append(len(z))
        return op(z, codebook, metric)

    monkeypatch.setattr(module, "_OP", counted)
    monkeypatch.setattr(module, "_WORK", 100 * 50 * 4)
    z, codebook = normal(1, 250, 4), normal(2, 50, 4)
    assert torch.equal(vqfast.nearest(z, codebook), oracle(z, codebook)[0])
    assert sizes == [100, 100, 50]


def test_views_equal_their_contiguous_copies_and_stay_unchanged():
    base, image = normal(1, 60, 70), normal(2, 2, 33, 5, 3)
    code = normal(3, 130, 70)[:64, :33]
    flat = normal(4, 33 * 20 + 1)
    views = (
        base[::2, 1:34],
        base[:, 0:66:2],
        base[:1, :33].expand(65, 33),
        flat[1:].view(20, 33),
        base[:33].T,
        image.permute(0, 2, 3, 1),
        image.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        base[0, :33],
        base[:0, None, :33],
    )
    for z in views:
        for c in (code, normal(5, 33, 64).T, code[:1].expand(9, 33)):
            kept = z.clone(), c.clone()
            found = vqfast.nearest(z, c)
            assert found.shape == z.shape[:-1]
            rows = z.reshape(-1, 33)
            assert torch.equal(found.reshape(-1), oracle(rows, c)[0])
            assert torch.equal(z, kept[0]) and torch.equal(c, kept[1])


def test_a_codebook_changed_behind_torchs_back_is_seen():
    z, codebook = normal(1, 30, 8), normal(2, 200, 8)
    for edit in (lambda: codebook.neg_(), lambda: codebook.numpy().__imul__(-1)):
        edit()
        assert torch.equal(vqfast.nearest(z, codebook), oracle(z, codebook)[0])


BAD = {
    "z list": (lambda z, c: ([[1.0]], c), TypeError, "z.*list"),
    "codebook array": (lambda z, c: (z, c.numpy()), TypeError, "codebook.*ndarray"),
    "z int64": (lambda z, c: (z.long(), c), TypeError, "z.*int64"),
    "codebook complex": (lambda z, c: (z, c.to(torch.complex64)), TypeError, "codebook.*complex64"),
    "other D": (lambda z, c: (z, c[:, :5]), ValueError, r"codebook.*7.*\[9, 5\]"),
    "codebook 1-D": (lambda z, c: (z, c[0]), ValueError, r"codebook.*\[7\]"),
    "z 0-D": (lambda z, c: (z[0, 0], c[:, :1]), ValueError, "z must be"),
    "K = 0": (lambda z, c: (z, c[:0]), ValueError, r"codebook.*\[0, 7\]"),
    "D = 0": (lambda z, c: (z[:, :0], c[:, :0]), ValueError, r"\[9, 0\]"),
    "device": (lambda z, c: (z, c.to("meta")), ValueError, "codebook.*cpu.*meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_name_what_came(name):
    make, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        vqfast.nearest(*make(normal(1, 6, 7), normal(2, 9, 7)))


def test_unknown_metric():
    with pytest.raises(ValueError, match="metric.*l3"):
        vqfast.nearest(normal(1, 6, 7), normal(2, 9, 7), metric="l3")


def _child(code):
    """Runs code in a fresh process, as a crash or a memory peak must not be ours."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


EDGE = """
    import sys, torch, vqfast
    sys.path.insert(0, {folder!r})
    from test_nearest import at_page_edge, normal, oracle
    for N, K, D in ((7, 5, 3), (33, 1025, 4), (1, 17, 8), (65, 63, 33), (5, 300, 255)):
        for dtype in (torch.float32, torch.float16):
            z, c = (at_page_edge(normal(n, n, D).to(dtype)) for n in (N, K))
            assert torch.equal(vqfast.nearest(z, c), oracle(z, c)[0]), (N, K, D, dtype)
"""


def at_page_edge(t):
    """A copy of t that ends where a page ends; touching the next page is SIGSEGV."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    area = mmap.mmap(-1, (size // page + 2) * page)
    end = len(area) - page
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + end), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(
        memoryview(area)[:end], dtype=t.dtype, offset=end - size, count=t.numel()
    )
    return flat.view(t.shape).copy_(t)


@needs_native
def test_nothing_is_read_past_the_end():
    _child(EDGE.format(folder=os.path.dirname(__file__)))


MEMORY = """
    import resource, torch, vqfast
    from vqfast import _native
    torch.set_num_threads(2)
    runs = [("reference", 4_000)] + [("cpu", 131_073)] * (_native.load() is not None)
    z, c = torch.randn(131_073, 4), torch.randn(16384, 4)
    vqfast.nearest(z[:100], c)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, N in runs:
        with vqfast.backend(name):
            vqfast.nearest(z[:N], c)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_bounded():
    # MiB; N x K alone would be 500 MiB of float64 and 8 GiB of float32
    assert all(float(peak) < 200 for peak in _child(MEMORY).split())


def test_wrong_formula_is_caught_by_the_oracle():
    z, codebook = normal(1, 300, 256), HARD["taming init"](1, 1024, 256)[1]
    textbook = (
        z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    ).argmin(1)
    assert not torch.equal(textbook, oracle(z, codebook)[0])


def test_forced_backends_that_cannot_run_say_why():
    with pytest.raises(vqfast.BackendError, match="cuda"), _dispatch.backend("triton"):
        vqfast.nearest(normal(1, 4, 3), normal(2, 5, 3))
