"""Encode and decode in bounded memory give what the network gives for the image as a whole."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqfast.models import tiled, tiled_steps
from vqfast.models.tiled_plan import Plans
from vqfast.models.tiled_pool import Pool
from vqfast.testing import compare, tokenizers, tolerances
from vqfast.testing.tokenizers import tokenizer as make

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


def images(B, config, h, w):
    """[B, C, H, W] of h x w codes; brighter towards the bottom, so that bands differ."""
    x = tokenizers.images(B, config, h * config.factor, w * config.factor)
    return (x + 1) / 4 + torch.linspace(-1, 1, x.shape[2])[:, None]


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
    moments = tiled_steps.Moments(32, Pool(1 << 20))
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


def test_without_enough_for_bands_the_error_names_what_the_whole_needs():
    tok = make()
    x = images(1, tok.config, 1, 3)
    least = tiled.least_memory(tok.encoder, (4, 12), 4)
    assert least == plans(tok.encoder, x).whole() < plans(tok.encoder, x).least
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        tok.encode(x, max_memory=least - 1)
    tok.encode(x, max_memory=least)


# ---- memory


def test_pool_gives_freed_memory_again_and_none_that_is_in_use():
    pool, g = Pool(64 << 20), torch.Generator().manual_seed(0)
    like, live = torch.empty(0), []
    for i in range(300):
        rows = int(torch.randint(1, 200, (), generator=g))
        t = pool.empty((1, 32, rows, 256), like).fill_(i)
        assert t.is_contiguous(memory_format=torch.channels_last)
        live.append((i, t))
        if sum(t.numel() * 4 for _, t in live) > 50 << 20:
            del live[int(torch.randint(len(live), (), generator=g))]
            del live[: len(live) // 2]
        assert all((t == i).all() for i, t in live)
        assert pool.mapped <= 64 << 20
    place = t.data_ptr()
    del t, live
    free = pool.empty((1, 32, rows, 256), like)
    assert free.data_ptr() == place


def test_a_tensor_outlives_its_pool():
    t = Pool(1 << 20).empty((1, 32, 100, 100), torch.empty(0)).fill_(3)
    more = Pool(1 << 20).empty((1, 32, 100, 100), torch.empty(0)).fill_(4)
    assert (t == 3).all() and (more == 4).all()


@torch.no_grad()
def test_poison_reaches_no_result(poison):
    tok = make()
    x = images(1, tok.config, 33, 7)
    z = tok.encode_to_prequant(x)
    got = tok.encode_to_prequant(x, max_memory=plans(tok.encoder, x).least)
    torch.testing.assert_close(got, z, rtol=1e-3, atol=1e-4)
    codes = torch.arange(33 * 7).view(1, 33, 7) % 64
    least = tiled.least_memory(tok.decoder, (33, 7), 4)
    got = tok.decode(codes, max_memory=least)
    torch.testing.assert_close(got, tok.decode(codes), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_convolution_by_torch_goes_piece_by_piece(monkeypatch):
    """Its result lies outside the pool, and so outside the limit."""
    tok, sizes = make(out_ch=32), []
    tok.decoder.conv_out.register_forward_hook(lambda conv, given, y: sizes.append(y.nbytes))
    monkeypatch.setattr(tiled_steps, "_PIECE", 1 << 16)
    z = torch.rand(1, 32, 33, 17)
    tiled.forward(tok.decoder, z, plans(tok.decoder, z).whole() - 1)
    row = 32 * 4 * 17 * 4
    assert sizes and max(sizes) <= (1 << 16) + 2 * row


CHILD = """
import json, sys, torch
sys.path.insert(0, {bench!r})
from memory import resident_extra_mib
from vqfast.models import tiled
from vqfast.testing.tokenizers import tokenizer
torch.set_num_threads(1)
tok = tokenizer(ch_mult=(1, 1, 2, 2), attn_resolutions=())
if {forgets}:
    held, reach = [], tiled._Run._pass
    def holding(self, hop, stop):
        held.append(self._maps)
        reach(self, hop, stop)
    tiled._Run._pass = holding
over = []
for network, C, side in ((tok.encoder, 3, 512), (tok.decoder, 32, 64)):
    for size in (side // 4, side):
        x = torch.rand(1, C, size, size).to(memory_format=torch.channels_last)
        plans = tiled.Plans(tiled.steps_of(network.parts()), (size, size), 4)
        hops = plans.cheapest(plans.whole() * 2 // 5)
        memory = max(map(plans._memory, hops))
        peak = resident_extra_mib(lambda: tiled.forward(network, x, memory))
    result = plans.shapes[-1][0]
    over.append(peak - (memory + 4 * result[0] * result[1] * result[2]) / 2**20)
print(json.dumps(over))
"""


@pytest.mark.skipif(
    not (Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="needs Linux and glibc to read the peak",
)
def test_the_process_keeps_the_limit():
    """Of maps of 32 MiB; a forgotten one costs 16 or more, packed weights take 2."""

    def over(forgets):
        bench = str(Path(__file__).resolve().parent.parent / "bench")
        code = CHILD.format(bench=bench, forgets=forgets)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    assert max(over(False)) < 8 < min(over(True))


FORKING = """
import os, torch
from vqfast.models.tiled_pool import Pool
block = Pool(1 << 20).empty((1, 8, 64, 64), torch.empty(0)).zero_()
values = block.movedim(1, -1).numpy()
child = os.fork()
if not child:
    values[:] = 1
    os._exit(0)
os.waitpid(child, 0)
print(values.any())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_memory_of_its_own():
    child = [sys.executable, "-c", FORKING]
    run = subprocess.run(child, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "False", run.stderr
