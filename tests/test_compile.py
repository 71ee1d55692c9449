"""torch.compile of our own networks: one graph each, the same results, at more than one size."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from vqfast import GPT, VQGAN, GPTConfig, VQGANConfig
from vqfast.nn import known_stats
from vqfast.testing import compare, tolerances

TINY = VQGANConfig(
    ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(16,), resolution=32,
    z_channels=32, embed_dim=8, n_embed=64,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def tok():
    torch.manual_seed(0)
    return VQGAN(TINY).eval()


def _compiled(fn):
    """Dynamo and AOTAutograd for true; a graph break is an error."""
    return torch.compile(fn, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("verb", ["encode", "decode", "encoder", "decoder"])
def test_tokenizer_is_one_graph_and_few_of_them_for_many_sizes(tok, verb, dtype, monkeypatch):
    # a graph finds all statistics by passes of their own, which rounds differently
    monkeypatch.setattr(known_stats, "wanted", lambda: False)
    tok, call = tok.to(dtype), getattr(tok, verb)
    compiled = _compiled(call)
    for batch, side in ((2, 16), (1, 16), (3, 24), (4, 24)):
        if verb == "decode":
            x = torch.randint(64, (batch, side, side))
        else:
            channels, side = (32, side) if verb == "decoder" else (3, 2 * side)
            x = torch.rand(batch, channels, side, side).to(dtype) * 2 - 1
        with torch.no_grad():
            assert torch.equal(compiled(x), call(x))
    # the first shape, a batch of 1, any other batch or side; in bfloat16 attention goes by blocks
    # of 256 positions, and another number of blocks is another graph
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_graph_gives_what_the_network_gives_by_itself(tok, part, dtype):
    network = getattr(tok, part)
    x = torch.rand(2, network.conv_in.in_channels, 64, 64) * 2 - 1
    exact = copy.deepcopy(network).double()(x.to(dtype).double()).detach()
    network, x = network.to(dtype), x.to(dtype)
    with torch.no_grad():
        by_itself, graph = network(x), _compiled(network)(x)
    # by itself it finds statistics in its convolutions: equal up to rounding
    assert compare.budget_ratio(by_itself, graph, exact, tolerances.FORWARD) <= 1
    assert compare.budget_ratio(graph, by_itself, exact, tolerances.FORWARD) <= 1


@pytest.mark.parametrize("code", [-1, 64])
def test_a_compiled_decode_refuses_codes_that_are_not_in_the_table(tok, code):
    codes = torch.full((1, 16, 16), code)
    with pytest.raises(ValueError, match=r"0\.\.63"):
        tok.decode(codes)
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        _compiled(tok.decode)(codes)


def test_loss_of_the_transformer_is_one_graph_with_gradients():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, 32, n_layer=2, n_head=2, n_embd=32))
    compiled = _compiled(lambda idx, cond: gpt.loss(idx, cond))
    for batch, length in ((2, 16), (1, 16), (3, 9), (4, 31)):
        idx, cond = torch.randint(64, (batch, length)), torch.randint(64, (batch, 1))
        found = []
        for call in (compiled, gpt.loss):
            gpt.zero_grad()
            call(idx, cond).backward()
            found.append([p.grad.clone() for p in gpt.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
def test_training_forward_is_one_graph_with_gradients(tok):
    """Dynamo takes half a minute to walk through the convolutions' backward passes."""
    tok.train()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    found = []
    for call in (_compiled(lambda x: tok(x)[:2]), lambda x: tok(x)[:2]):
        tok.zero_grad()
        x_hat, loss = call(x)
        (x_hat.square().mean() + loss).backward()
        found.append([x_hat.detach(), *(p.grad.clone() for p in tok.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
