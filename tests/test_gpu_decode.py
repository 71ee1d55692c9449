"""Decoding where only a GPU can show it: any batch, captured steps, no wait inside them. Skipped
without one. bench/gpu_decode.py asks the same at the sizes of real models."""

import pytest
import torch

from vqfast import Engine, NonFiniteError, _dispatch
from vqfast.engine import graph
from vqfast.engine.packing import BITS
from vqfast.models.gpt import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=515, block_size=150, n_layer=2, n_head=4, n_embd=256)
    model = GPT(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.1)
    return model.cuda()


def tokens(b, Tc, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(515, (b, Tc), generator=g).cuda()


def _graphs(engine):
    return [g for steps in engine._steps.values() for g in steps._graphs.values()]


@pytest.mark.parametrize("precision", BITS)
def test_the_step_runs_on_triton(gpt, precision):
    engine = Engine(gpt, precision, batch=3)
    row = torch.zeros(3, dtype=torch.int64, device="cuda")
    inputs = (row, row, row, engine._k_cache, engine._v_cache, *engine._packed, BITS[precision], 3)
    assert _dispatch.OPS["decode_step"].choose(*inputs) == "triton"


@pytest.mark.parametrize("precision", BITS)
def test_rows_have_their_bits_in_any_batch(gpt, precision, poison):
    """Alone, among 15, 16, 17, 33 and 64; one position at a time or all at once."""
    whole = Engine(gpt, precision, batch=65)
    start = tokens(65, 131)
    logits = whole.prefill(start)
    for first, n in ((0, 1), (64, 1), (3, 15), (10, 16), (20, 17), (30, 33), (1, 64)):
        part = slice(first, first + n)
        engine = Engine(gpt, precision, batch=n)
        assert torch.equal(engine.prefill(start[part]), logits[part]), f"{n} rows from {first}"
        engine.prefill(start[part, :126])
        for t in range(126, 131):
            last = engine.step(start[part, t])
        assert torch.equal(last, logits[part]), f"{n} rows from {first}, step by step"


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 100, "top_p": 0.9, "position": 7},
        {"temperature": 2.0, "cfg_scale": 2.0},
        {"temperature": 2.0, "cfg_scale": 2.0, "cfg_interval": (20, 60)},
    ],
    ids=("greedy", "filtered", "guided", "guided in an interval"),
)
def test_captured_steps_draw_what_the_ordinary_loop_draws(gpt, precision, options, monkeypatch):
    if "cfg_scale" in options:
        options = {**options, "uncond": tokens(5, 1, 3)}
    engine, cond = Engine(gpt, precision, batch=5), tokens(5, 1)
    found = [engine.generate(cond, 150, seed=2, **options) for _ in range(2)]
    assert len(_graphs(engine)) == 1 + ("cfg_interval" in options)
    one = {**options, "uncond": options["uncond"][3:4]} if "uncond" in options else options
    alone = engine.generate(cond[3:4], 150, seed=2, sample_index=3, **one)
    monkeypatch.setattr(Engine, "_loops", {})
    right = engine.generate(cond, 150, seed=2, **options)
    assert torch.equal(found[0], right) and torch.equal(found[1], right)
    assert torch.equal(alone[0], right[3])


def test_a_replayed_step_never_waits_for_the_device(gpt):
    engine = Engine(gpt, "bf16", batch=4)
    engine.generate(tokens(4, 1), 40, seed=0)
    (steps,) = engine._steps.values()
    steps.begin(torch.arange(4, device="cuda"), 0, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            steps.run(False, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert (steps.codes[:, :20] >= 0).all()


def test_steps_run_on_the_current_stream(gpt):
    engine, cond = Engine(gpt, "bf16", batch=2), tokens(2, 1)
    right = engine.generate(cond, 60, seed=0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = cond.flip(0)  # ready only after the sleep
        found = engine.generate(late, 60, seed=0, sample_index=torch.tensor([1, 0]).cuda())
    stream.synchronize()
    assert torch.equal(found, right.flip(0))


def test_broken_logits_name_sample_and_position_after_replays(gpt):
    broken = GPT(gpt.config).cuda().eval().requires_grad_(False)
    broken.load_state_dict(gpt.state_dict())
    broken.pos_emb[0, 50] = float("nan")
    with pytest.raises(NonFiniteError, match="sample 8 at position 50"):
        Engine(broken, "bf16", batch=2).generate(tokens(2, 1), 90, seed=0, sample_index=8)


def test_without_a_kernel_steps_go_launch_by_launch(gpt, caplog):
    engine = Engine(gpt, "fp32", batch=1)
    with _dispatch.backend("reference"):
        engine.generate(tokens(1, 1), 15, seed=0)
    assert not _graphs(engine)
    assert any("decode_step runs on its reference" in r.message for r in caplog.records)


def test_loops_of_the_gpu_are_the_captured_ones():
    assert Engine._loops["cuda"] is graph.loop
