"""Encode and decode in bounded memory give what the network gives for the image as a whole."""

import pytest
import torch

from vqfast.models import tiled, tiled_steps
from vqfast.models.tiled_plan import Plans
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.testing import compare, tolerances

TINY = {
    "ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (16,),
    "resolution": 32, "z_channels": 32, "n_embed": 64, "embed_dim": 8,
}  # fmt: skip
VARIANTS = {
    "f4": {},
    "two blocks, wide steps": {"ch_mult": (1, 1, 4), "num_res_blocks": 2},
    "attention at two levels": {"attn_resolutions": (8, 16)},
    "no attention": {"attn_type": "none"},
    "one level": {"ch_mult": (2,), "attn_resolutions": (32,)},
    "segmentation": {"in_channels": 7, "out_ch": 7},
    "gumbel": {"quantizer": "gumbel", "embed_dim": 32},
    "ema": {"quantizer": "ema"},
    "remapped": {"remap": (1, 2, 7), "unknown_index": 0},
}


def make(**changes):
    torch.manual_seed(0)
    tok = VQGAN(VQGANConfig(**{**TINY, **changes})).eval()
    for name, p in tok.named_parameters():
        if p.dim() == 1:
            p.data = 0.1 * torch.randn_like(p) + ("norm" in name and name.endswith("weight"))
    return tok


def images(B, config, h, w):
    """[B, C, H, W] of h x w codes; brighter towards the bottom, so that bands differ."""
    shape, g = (B, config.in_channels, h * config.factor, w * config.factor), torch.Generator()
    down = torch.linspace(-1, 1, shape[2])[:, None]
    return (torch.rand(shape, generator=g.manual_seed(1)) + 2 * down) / 2


def plans(network, x):
    return Plans(tiled_steps.steps_of(network.parts()), tuple(x.shape[2:]), x.element_size())


def budgets(network, x):
    """From the least to almost the whole; none where the least is more than that."""
    ways = plans(network, x)
    return [m for m in (ways.least, int(1.5 * ways.least), ways.whole() - 1) if m >= ways.least]


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 3), (9, 5), (33, 7)])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_float64_is_that_of_the_whole_image(changes, size):
    tok = make(**changes).double()
    x = images(2, tok.config, *size).double()
    z, codes = tok.encode_to_prequant(x), tok.encode(x)
    y = tok.decode(codes)
    for memory in budgets(tok.encoder, x):
        got = tok.encode_to_prequant(x, max_memory=memory)
        torch.testing.assert_close(got, z, rtol=1e-10, atol=1e-12)
        assert torch.equal(tok.encode(x, max_memory=memory), codes)
    latents = torch.empty(1, tok.config.z_channels, *size, dtype=torch.float64)
    for memory in budgets(tok.decoder, latents):
        got = tok.decode(codes, max_memory=memory)
        torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_keeps_the_rule(dtype):
    tok = make().to(dtype)
    wide = make().to(dtype).double()
    x = images(1, tok.config, 33, 17).to(dtype)
    z = wide.encode_to_prequant(x.double()).to(dtype)
    inner = tok.post_quant_conv(z)
    for network, exact_network, given in (
        (tok.encoder, wide.encoder, x),
        (tok.decoder, wide.decoder, inner),
    ):
        exact, plain = exact_network(given.double()), network(given)
        tried = budgets(network, given)
        assert tried
        for memory in tried:
            got = tiled.forward(network, given, memory)
            assert got.dtype == dtype
            assert compare.budget_ratio(got, plain, exact, tolerances.FORWARD) <= 1


@torch.no_grad()
def test_statistics_are_those_of_the_map_not_of_a_band(monkeypatch):
    tok = make().double()
    x = images(1, tok.config, 33, 7).double()
    memory, want = plans(tok.encoder, x).least, tok.encoder(x)
    add = tiled_steps.Moments.add

    def last_band_alone(self, band):
        if band.numel():
            self.mean = self.squares = None
        add(self, band)

    torch.testing.assert_close(tiled.forward(tok.encoder, x, memory), want)
    monkeypatch.setattr(tiled_steps.Moments, "add", last_band_alone)
    assert (tiled.forward(tok.encoder, x, memory) - want).abs().max() > 1e-3 * want.abs().max()


def test_moments_survive_a_large_offset():
    x = 1e4 + torch.randn(1, 64, 37, 5, generator=torch.Generator().manual_seed(0))
    moments = tiled_steps.Moments(32)
    for band in x.split([1, 0, 20, 16], 2):
        moments.add(band)
    groups = x.double().reshape(32, -1)
    torch.testing.assert_close(moments.mean, groups.mean(1), rtol=1e-9, atol=0)
    var = groups.var(1, correction=0)
    torch.testing.assert_close(moments.squares / moments.count, var, rtol=1e-6, atol=0)


@torch.no_grad()
def test_input_is_left_alone_and_an_image_does_not_see_its_batch():
    tok = make(in_channels=32)
    x = images(3, tok.config, 33, 7)
    before, memory = x.clone(), plans(tok.encoder, x).least
    # not its latents: torch's 1x1 convolution behind the encoder rounds by the size of the batch
    got = tiled.forward(tok.encoder, x, memory)
    assert torch.equal(x, before)
    assert torch.equal(got[1:2], tiled.forward(tok.encoder, x[1:2], memory))
    assert tok.encode(x[:0], max_memory=memory).shape == (0, 33, 7)


def test_more_memory_never_costs_more():
    tok = make(num_res_blocks=2)
    ways = plans(tok.decoder, torch.empty(1, 32, 40, 40))
    sizes = [int(ways.least * 1.3**i) for i in range(8)]
    costs = [sum(map(ways._cost, ways.cheapest(m))) for m in sizes]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert all(ways._memory(hop) <= m for m in sizes for hop in ways.cheapest(m))


def test_refuses():
    tok = make(dropout=0.1)
    x = images(1, tok.config, 33, 7)
    least = plans(tok.encoder, x).least
    with pytest.raises(ValueError, match=f"max_memory must be at least {least} bytes.*132x28"):
        tok.encode(x, max_memory=least - 1)
    for wrong, error in ((0, ValueError), (-1, ValueError), (1e9, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_memory"):
            tok.encode(x, max_memory=wrong)
    with pytest.raises(RuntimeError, match="no gradient"):
        tok.encode_to_prequant(x.clone().requires_grad_(), max_memory=least)
    with pytest.raises(ValueError, match="eval mode"):
        tok.train().encode(x, max_memory=least)


def test_results_have_no_gradient_also_without_no_grad():
    tok = make()
    x = images(1, tok.config, 33, 7)
    assert not tok.encode_to_prequant(x, max_memory=1 << 21).requires_grad
    codes = tok.encode(x, max_memory=1 << 21)
    assert not tok.decode(codes, max_memory=1 << 21).requires_grad
    assert tok.decode(codes).requires_grad
