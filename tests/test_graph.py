"""The token loop on static buffers, run without a GPU: the codes of the ordinary loop, always."""

import contextlib
import logging

import pytest
import torch

from vqfast import Engine, NonFiniteError, backend
from vqfast.engine import graph
from vqfast.models.gpt import GPT, GPTConfig


def make_gpt():
    torch.manual_seed(4)
    config = GPTConfig(vocab_size=37, block_size=40, n_layer=2, n_head=2, n_embd=32)
    gpt = GPT(config).eval().requires_grad_(False)
    for p in gpt.parameters():
        p.normal_(0, 0.3)
    return gpt


@pytest.fixture(scope="module")
def gpt():
    return make_gpt()


@pytest.fixture
def by_steps(monkeypatch):
    """Turns the loop of this file's subject on for the CPU, or off again."""

    def switch(on):
        if on:
            monkeypatch.setitem(Engine._loops, "cpu", graph.loop)
        else:
            monkeypatch.delitem(Engine._loops, "cpu", raising=False)

    return switch


def _tokens(b, Tc, seed=0):
    return torch.randint(37, (b, Tc), generator=torch.Generator().manual_seed(seed + b))


GUIDED = {"cfg_scale": 2.5, "uncond": _tokens(3, 2, 9)}
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 2.0},
    "filtered": {"temperature": 3.0, "top_k": 20, "top_p": 0.9},
    "elsewhere": {"temperature": 2.0, "position": 17, "sample_index": torch.tensor([5, 2, 2**40])},
    "guided": {"temperature": 2.0, **GUIDED},
    "guided at first": {"temperature": 2.0, **GUIDED, "cfg_interval": (0, 6)},
    "guided later": {"temperature": 2.0, **GUIDED, "cfg_interval": (5, 11)},
    "guided at last": {"temperature": 2.0, **GUIDED, "cfg_interval": (15, 99), "position": 1},
    "guided once": {"temperature": 2.0, **GUIDED, "cfg_interval": (7, 8)},
    "guided nowhere": {"temperature": 2.0, **GUIDED, "cfg_interval": (3, 3)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_give_the_codes_of_the_ordinary_loop(gpt, by_steps, name, poison, each_backend):
    engine, options = Engine(gpt, "bf16", batch=3), {"seed": 3, **OPTIONS[name]}
    found = []
    for on in (False, True, True):
        by_steps(on)
        found.append(engine.generate(_tokens(3, 2), 16, **options))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len(engine._steps) == 1


def test_steps_show_what_the_ordinary_loop_shows(gpt, by_steps):
    engine, shown = Engine(gpt, batch=2), ([], [])
    for on in (False, True):
        by_steps(on)
        engine.generate(_tokens(2, 1), 5, seed=0, sample_index=7, on_step=shown[on].append)
    assert len(shown[True]) == 5
    for a, b in zip(*shown, strict=True):
        assert a[:3] == b[:3] and torch.equal(a.codes, b.codes)


def test_buffers_carry_nothing_from_one_call_to_the_next(gpt, by_steps):
    by_steps(True)
    engine = Engine(gpt, batch=4)
    calls = [
        (_tokens(b, Tc, seed), n, {"seed": 1, "temperature": 2.0, "sample_index": seed, **more})
        for b, Tc, n, seed, more in (
            (2, 1, 40, 0, {}), (2, 3, 5, 1, {}), (4, 1, 9, 2, {}), (2, 1, 40, 3, {}),
            (2, 2, 7, 4, {"cfg_scale": 3.0, "uncond": _tokens(2, 2, 5)}), (2, 1, 1, 0, {}),
            (1, 1, 3, 5, {"top_k": 4}),
        )
    ]  # fmt: skip
    for cond, n, options in calls:
        alone = Engine(gpt, batch=4).generate(cond, n, **options)
        assert torch.equal(engine.generate(cond, n, **options), alone)


def test_only_the_newest_steps_are_kept_and_none_of_another_cache(gpt, by_steps):
    by_steps(True)
    engine = Engine(gpt, batch=1)
    for seed in range(7):
        engine.generate(_tokens(1, 1), 2, seed=seed)
    assert [key[2][3] for key in engine._steps] == [3, 4, 5, 6]
    engine.generate(_tokens(1, 1), 2, seed=4)
    assert [key[2][3] for key in engine._steps] == [3, 5, 6, 4]
    with backend("reference"):  # what is captured is one backend's
        engine.generate(_tokens(1, 1), 2, seed=4)
    assert len(engine._steps) == 4
    engine.generate(_tokens(1, 1), 2, seed=4, cfg_scale=2.0, uncond=_tokens(1, 1))  # two rows
    assert len(engine._steps) == 1


@pytest.mark.parametrize("on", [False, True])
def test_broken_logits_name_the_first_position_and_its_first_sample(by_steps, on):
    by_steps(on)
    gpt = make_gpt()
    gpt.pos_emb[0, 6] = float("nan")
    options = {"seed": 0, "temperature": 2.0, "sample_index": 30, "position": 100}
    engine = Engine(gpt, batch=2)
    with pytest.raises(NonFiniteError, match="sample 30 at position 105"):
        engine.generate(_tokens(2, 2), 20, **options)
    # one row alone: its first token is one that is not a number
    gpt.pos_emb[0, 6] = 0.0
    cond = torch.tensor([[1, 2], [36, 2]])
    clean = Engine(gpt, batch=2).generate(cond, 9, **options)[0]
    gpt.tok_emb.weight[36] = float("inf")
    engine = Engine(gpt, batch=2)
    with pytest.raises(NonFiniteError, match="sample 31 at position 100"):
        engine.generate(cond, 9, **options)
    if 36 not in clean:
        assert torch.equal(engine.generate(cond[:1], 9, **options)[0], clean)


def test_a_refused_capture_is_said_once_and_changes_nothing(gpt, by_steps, monkeypatch, caplog):
    def refused(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    begin = graph.Steps.begin

    def as_on_a_gpu(self, *arguments):
        self._why_not = None if self._why_not and "is on cpu" in self._why_not else self._why_not
        begin(self, *arguments)

    by_steps(False)
    right = Engine(gpt, batch=1).generate(_tokens(1, 1), 30, seed=0)
    by_steps(True)
    monkeypatch.setattr(graph.Steps, "begin", as_on_a_gpu)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", refused)
    with caplog.at_level(logging.WARNING, "vqfast"), backend("reference"):
        Engine(gpt, batch=1).generate(_tokens(1, 1), 30, seed=0)
    assert [r.message for r in caplog.records][-1].endswith("decode_step runs on its reference")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vqfast"):
        engine = Engine(gpt, batch=1)
        for _ in range(2):
            assert torch.equal(engine.generate(_tokens(1, 1), 30, seed=0), right)
    said = [r.message for r in caplog.records]
    assert len(said) == 1 and "without a CUDA graph" in said[0]
