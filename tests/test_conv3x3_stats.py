"""Statistics of a convolution's result, and the network that hands them to its normalisations."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from vqfast.nn import blocks, known_stats
from vqfast.nn.attention import SpatialAttention
from vqfast.ops import conv3x3, conv3x3_stats
from vqfast.testing import compare, tolerances
from vqfast.testing.tokenizers import images
from vqfast.testing.tokenizers import tokenizer as make

DTYPES = [torch.float32, torch.bfloat16]
# B, C, O, H, W, residual: direct sums, tiles of many and of few positions, cut at both edges
SHAPES = [
    (3, 3, 66, 33, 50, True),
    (3, 130, 36, 35, 49, True),
    (2, 150, 66, 37, 90, False),
    (2, 130, 72, 27, 29, True),
]


def operands(shape, dtype):
    B, C, outs, H, W, adds = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, H, W, generator=g)
    w = torch.randn(outs, C, 3, 3, generator=g) / (9 * C) ** 0.5
    b = torch.randn(outs, generator=g)
    residual = torch.randn(B, outs, H, W, generator=g) if adds else None
    return [t if t is None else t.to(dtype) for t in (x, w, b, residual)]


def expected(y, groups, eps):
    """mean and rstd of y in float64."""
    values = y.double().reshape(len(y), groups, -1)
    variance, mean = torch.var_mean(values, -1, correction=0)
    return mean, (variance + eps).rsqrt()


def errors(y, mean, rstd, eps=1e-6):
    """Of the mean in deviations, and of rstd relative to it."""
    right_mean, right_rstd = expected(y, mean.shape[1], eps)
    return ((mean - right_mean) * right_rstd).abs().max(), (rstd / right_rstd - 1).abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_result_is_that_of_conv3x3_and_the_statistics_are_its_own(shape, dtype, each_isa):
    given = operands(shape, dtype)
    for groups in (1, 6, shape[2]):
        y, mean, rstd = conv3x3_stats(*given, groups=groups)
        assert torch.equal(y, conv3x3(*given))
        assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == (shape[0], groups)
        assert max(errors(y, mean, rstd)) <= tolerances.STATISTICS_EPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_depend_on_neither_the_batch_nor_the_threads(shape, dtype):
    (x, w, b, residual) = operands(shape, dtype)
    together = conv3x3_stats(x, w, b, residual, groups=3)
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        try:
            torch.set_num_threads(n)
            for i in range(len(x)):
                one = slice(i, i + 1)
                added = None if residual is None else residual[one]
                alone = conv3x3_stats(x[one], w, b, added, groups=3)
                for part, whole in zip(alone, together, strict=True):
                    assert torch.equal(part[0], whole[i])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_offset_costs_no_digits(shape, each_isa):
    (x, w, b, residual) = operands(shape, torch.float32)
    y, mean, rstd = conv3x3_stats(x, w, b + 3e3, residual, groups=6)
    off, scaled = errors(y, mean, rstd)
    # the mean of 3000 is itself rounded
    assert off <= 3e3 * tolerances.EPS[torch.float32] and scaled <= tolerances.STATISTICS_EPS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_first_value_far_from_the_others_costs_few_digits(shape, each_isa):
    # all values equal but those near the corner
    (x, w, b, _) = operands(shape, torch.float32)
    x.zero_()
    x[:, :, 0, 0] = 1e3
    y, mean, rstd = conv3x3_stats(x, w, b, groups=shape[2])
    off, scaled = errors(y, mean, rstd)
    # among the 768 values of a part one is at most 28 deviations from their mean
    assert max(off, scaled) <= 28 * tolerances.STATISTICS_EPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_values_have_no_deviation(shape, dtype, each_isa):
    (x, w, b, _) = operands(shape, dtype)
    y, mean, rstd = conv3x3_stats(0 * x, w, b, groups=shape[2], eps=0.25)
    assert torch.equal(mean, b.float().expand_as(mean)) and (rstd == 2).all()
    assert torch.equal(y, b.view(1, -1, 1, 1).expand_as(y))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_not_finite_stays_in_its_image(value, shape, each_isa):
    (x, w, b, residual) = operands(shape, torch.float32)
    clean = conv3x3_stats(x, w, b, residual, groups=6)
    x[1, 2, 3, 4] = value
    _, mean, rstd = conv3x3_stats(x, w, b, residual, groups=6)
    assert not mean[1].isfinite().any() and rstd[1].isnan().all()
    others = [i for i in range(len(x)) if i != 1]
    assert torch.equal(mean[others], clean[1][others]) and torch.equal(
        rstd[others], clean[2][others]
    )


def test_it_refuses():
    (x, w, b, _) = operands(SHAPES[1], torch.float32)
    for arguments, more, kind, words in [
        ((x, w, b), {"groups": 5}, ValueError, "groups = 5 divides, got 36"),
        ((x, w[:0], b[:0]), {"groups": 5}, ValueError, "groups = 5 divides, got 0"),
        ((x, w, b), {"groups": 0}, ValueError, "groups must be at least 1|groups.*0"),
        ((x, w, b), {"groups": 2.0}, TypeError, "groups must be"),
        ((x, w, b), {"groups": 2, "eps": -1.0}, ValueError, "eps must be"),
        ((x, w, b[:3]), {"groups": 2}, ValueError, r"bias must be \[36\]"),
        ((x, w, b.clone().requires_grad_()), {"groups": 2}, RuntimeError, "conv3x3_stats has no"),
    ]:
        with pytest.raises(kind, match=words):
            conv3x3_stats(*arguments, **more)


# ---- in the network


def wide_network():
    """All its maps are those of which a kernel finds statistics."""
    return make(ch=128, ch_mult=(1, 1), z_channels=128, attn_resolutions=(32,))


def counted(monkeypatch):
    """Normalisations that find their statistics, and those that are given them."""
    calls = {"group_norm_silu": 0, "group_norm_silu_apply": 0}
    for name in calls:
        op = getattr(blocks, name)

        def count(*args, name=name, op=op):
            calls[name] += 1
            return op(*args)

        monkeypatch.setattr(blocks, name, count)
    return calls


def norms_after(parts, kinds):
    """Normalisations with SiLU that read the result of a part of one of these kinds."""
    reads = (blocks.ResBlock, blocks.GroupNormSiLU)
    return sum(isinstance(p, kinds) and isinstance(q, reads) for p, q in pairwise(parts))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_network_reads_a_map_once_where_a_convolution_wrote_it(part, monkeypatch):
    network, calls = getattr(wide_network(), part), counted(monkeypatch)
    x = torch.randn(2, network.conv_in.in_channels, 64, 64)
    with torch.no_grad():
        network(x)
    norms = sum(isinstance(m, blocks.GroupNormSiLU) for m in network.modules())
    found = norms_after(network.parts(), (blocks.Downsample, blocks.Upsample, SpatialAttention))
    assert calls == {"group_norm_silu": found, "group_norm_silu_apply": norms - found}
    assert 0 < found < norms / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_gives_the_same_with_and_without(dtype, monkeypatch):
    tok = wide_network().to(dtype)
    x, exact = images(2, tok.config, 64, 64).to(dtype), copy.deepcopy(tok).double()
    with torch.no_grad():
        codes = tok.encode(x)
        z, y = tok.encode_to_prequant(x), tok.decode(codes)
        exact_z, exact_y = exact.encode_to_prequant(x.double()), exact.decode(codes)
        monkeypatch.setattr(known_stats, "wanted", lambda: False)
        plain_z, plain_y = tok.encode_to_prequant(x), tok.decode(codes)
    assert not torch.equal(y, plain_y)
    assert compare.budget_ratio(z, plain_z, exact_z, tolerances.FORWARD) <= 1
    assert compare.budget_ratio(y, plain_y, exact_y, tolerances.FORWARD) <= 1


def changed(y):
    """In place, and not what a normalisation takes back."""
    return y.mul_(torch.linspace(0.5, 2, y.shape[1]).view(-1, 1, 1))


class Tuned(blocks.Conv3x3):
    def forward(self, x, residual=None):
        return changed(super().forward(x, residual))


def change_by_hook(tok):
    tok.decoder.mid["block_1"].conv1.register_forward_hook(lambda *a: changed(a[2]))
    tok.decoder.mid["block_2"].register_forward_hook(lambda *a: changed(a[2]))
    tok.decoder.up[0].block[0].register_forward_hook(lambda *a: changed(a[2].clone()))


def change_by_class(tok):
    tok.decoder.mid["block_1"].conv1.__class__ = Tuned
    tok.decoder.up[0].block[1].conv2.__class__ = Tuned


@pytest.mark.parametrize("change", [change_by_hook, change_by_class])
def test_maps_that_are_changed_are_normalised_as_they_are_then(change, monkeypatch):
    tok = wide_network()
    codes = torch.randint(64, (1, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = tok.decode(codes)
        change(tok)
        got = tok.decode(codes)
        monkeypatch.setattr(known_stats, "wanted", lambda: False)
        plain = tok.decode(codes)
    assert (got - before).abs().max() > 0.01
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


def test_only_the_last_map_is_known_and_none_outside():
    x, stats = torch.zeros(1, 2), (torch.zeros(1), torch.ones(1))
    assert not known_stats.wanted() and known_stats.note(x, stats) is x
    assert known_stats.of(x) is None
    with known_stats.kept():
        known_stats.note(x, stats)
        assert known_stats.wanted() and known_stats.of(x) is stats
        assert known_stats.of(x.clone()) is None and known_stats.of(x[:]) is None
        with known_stats.kept():
            assert known_stats.of(x) is None
        assert known_stats.of(x) is stats
        other = known_stats.note(torch.zeros(3), stats)
        assert known_stats.of(x) is None and known_stats.of(other) is stats
        known_stats.forget()
        assert known_stats.of(other) is None
    assert known_stats.of(other) is None
