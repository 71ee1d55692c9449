"""Counts and sums per code: values, determinism, errors."""

import pytest
import torch

import vqfast
from vqfast import _native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(N, K, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(K, (N,), generator=g), torch.randn(N, D, generator=g)


def plain(indices, z, K):
    """One row after another, in float64."""
    counts, sums = [0] * K, torch.zeros(K, z.shape[1], dtype=torch.float64)
    for n, k in enumerate(indices.tolist()):
        counts[k] += 1
        sums[k] += z[n].double()
    return torch.tensor(counts), sums.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_and_sums_are_those_of_a_plain_loop(each_backend, dtype):
    for N, K, D in ((0, 3, 2), (1, 1, 1), (300, 7, 5), (50, 200, 33)):
        indices, z = case(N, K, D)
        counts, sums = vqfast.code_stats(indices, z.to(dtype), K)
        expected = plain(indices, z.to(dtype), K)
        assert torch.equal(counts, expected[0]) and torch.equal(sums, expected[1])


def test_every_isa_and_thread_count_gives_equal_bits(each_isa, each_thread_count):
    indices, z = case(5000, 37, 19)
    indices[:4000] = 11  # nearly all rows on one code
    counts, sums = vqfast.code_stats(indices, z, 37)
    expected = plain(indices, z, 37)
    assert torch.equal(counts, expected[0]) and torch.equal(sums, expected[1])


def test_sums_do_not_lose_what_float32_would():
    z = torch.full((100_000, 1), 0.1)
    _, sums = vqfast.code_stats(torch.zeros(100_000, dtype=torch.int64), z, 1)
    assert abs(sums.item() - 100_000 * float(z[0])) < 1e-2  # one float32 accumulator is off by 1.4


def test_float64_keeps_float64():
    indices, z = case(60, 9, 4)
    _, sums = vqfast.code_stats(indices, z.double(), 9)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums.float(), plain(indices, z, 9)[1])


def test_leading_dimensions_and_strides_and_small_integers():
    indices, z = case(60, 9, 4)
    shaped = z.T.contiguous().T.reshape(3, 4, 5, 4).permute(2, 0, 1, 3)
    ids = indices.reshape(3, 4, 5).permute(2, 0, 1).to(torch.int32)
    counts, sums = vqfast.code_stats(ids, shaped, 9)
    assert torch.equal(counts, plain(indices, z, 9)[0])
    torch.testing.assert_close(sums, plain(indices, z, 9)[1])


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda i, z: (i.float(), z, 9), TypeError, "indices.*float32"),
        (lambda i, z: (i, z.long(), 9), TypeError, "z.*int64"),
        (lambda i, z: (i, z, 9.0), TypeError, "K.*float"),
        (lambda i, z: (i, z, 0), ValueError, "K.*0"),
        (lambda i, z: (i[:5], z, 9), ValueError, r"z must be \[5, 'D'\].*\[60, 4\]"),
        (lambda i, z: (i + 1, z, 9), ValueError, "indices.*0..8.*9"),
        (lambda i, z: (i - 1, z, 9), ValueError, "indices.*0..8.*-1"),
        (lambda i, z: (i, z.to("meta"), 9), ValueError, "z.*cpu.*meta"),
    ],
)
def test_wrong_arguments_name_what_came(change, kind, text):
    indices, z = case(60, 9, 4)
    indices[:2] = torch.tensor([0, 8])
    with pytest.raises(kind, match=text):
        vqfast.code_stats(*change(indices, z))


@pytest.mark.skipif(_native.load() is None, reason="native library not built")
def test_the_kernel_itself_never_writes_out_of_bounds():
    indices, z = case(60, 9, 4)
    for bad in (-1, 9, 1 << 40):
        indices[30] = bad
        with pytest.raises(IndexError, match=str(bad)), vqfast.backend("cpu"):
            torch.ops.vqfast.code_stats(indices, z, 9)
