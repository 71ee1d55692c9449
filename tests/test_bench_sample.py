"""The bench's suite `sample`: opponents draw right tokens, and figures follow from times."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from vqfast import GPT, GPTConfig
from vqfast.testing import check
from vqfast.testing.timing import summary

BENCH = Path(__file__).resolve().parent.parent / "bench"
TINY = GPTConfig(128, 12, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def bench(monkeypatch):
    """The folder on the path, as `python bench/run.py` puts it; nothing is compiled."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


@pytest.fixture
def gpt():
    """Weights so large that condition and position decide the tokens."""
    torch.manual_seed(0)
    model = GPT(TINY).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(0, 0.3)
    return model


def _told(dtype="fp32"):
    import baselines

    return baselines.Told("tiny", dtype, "cpu")


@pytest.mark.parametrize("Tc", [1, 3])
def test_static_cache_draws_greedily_what_the_full_pass_would(bench, gpt, Tc):
    from baselines import torch_static_cache as peer

    cond = torch.randint(128, (3, Tc), generator=torch.Generator().manual_seed(1))
    cache = peer.StaticCache(gpt, 3, torch.float32)
    for _ in range(2):  # what the first run left in the buffers is masked
        codes = peer.generate(cache, cond, TINY.block_size - Tc + 1, 1e-5)
        assert torch.equal(codes, gpt(codes, cond).argmax(-1))
        assert codes.unique().numel() > 8
    assert set(dict(gpt.named_parameters())) == set(dict(GPT(TINY).named_parameters()))


def test_static_cache_draws_from_the_top_k_alone(bench, gpt, monkeypatch):
    from baselines import torch_static_cache as peer

    monkeypatch.setattr(peer, "TOP_K", 3)
    cond = torch.zeros(64, 1, dtype=torch.int64)
    codes = peer.generate(peer.StaticCache(gpt, 64, torch.float32), cond, 8)
    logits = gpt(codes, cond)
    rank = (logits > logits.gather(2, codes[:, :, None])).sum(-1)
    assert rank.max() == 2 and (rank > 0).float().mean() > 0.1


def test_a_static_cache_with_wrong_tokens_is_not_timed(bench, gpt, monkeypatch):
    import baselines
    from baselines import torch_static_cache as peer

    right = peer.StaticCache.forward
    monkeypatch.setattr(
        peer.StaticCache, "forward", lambda self, token, at, t: right(self, token, at * 0, t)
    )
    cond = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="greedy tokens"):
        baselines.runner("torch_static_cache", "generate", _told(), (gpt, cond))


@pytest.mark.slow
def test_compiled_static_cache_passes_its_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import baselines

    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(TINY, n_layer=1)).eval().requires_grad_(False)
    cond = torch.randint(128, (2, 1))
    draw = baselines.runner("torch_static_cache", "generate", _told(), (gpt, cond))
    codes = draw(TINY.block_size)
    assert codes.shape == (2, TINY.block_size) and 0 <= codes.min() <= codes.max() < 128


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_opponent_draws_as_many_tokens_as_it_is_asked_for(bench, gpt, dtype):
    import baselines

    cond = torch.tensor([[1], [2]])
    draws, missing = baselines.runners(
        "generate", _told(dtype), (gpt, cond), "cpu", once=lambda draw: draw(2)
    )
    assert "torch_static_cache" in draws and not [x for x in missing.values() if "fails" in x]
    for name, draw in draws.items():
        codes = draw(5)[:, -5:]  # Hugging Face gives the condition, too
        assert codes.shape == (2, 5) and 0 <= codes.min() <= codes.max() < 128, name


def test_opponents_run_in_the_formats_of_the_precisions_or_in_their_only_one(bench):
    import sampling
    from baselines import hf_generate, taming

    for wanted in (("fp32",), ("bf16",), ("fp32", "bf16")):
        assert sampling._formats(hf_generate, wanted) == wanted
        assert sampling._formats(taming, wanted) == ("fp32",)


def test_figures_follow_from_the_time_of_a_step(bench):
    import report
    import sampling

    case = sampling.Case("tiny_batch8", "generate", (), sampling._race, "tiny", 8)
    part = {
        "vqfast int8": sampling.Contestant("int8", print, True),
        "peer bf16": sampling.Contestant("bf16", print, False, "odd"),
    }
    weights = sampling.weights_per_step(TINY)
    assert weights == 2 * 12 * 32**2 + 128 * 32
    steps = {"vqfast int8": summary([1e-3] * 3), "peer bf16": summary([3e-3] * 3)}
    read = summary([0.5e-3 / weights] * 3)  # int8 weights in half a millisecond
    tokens = {"vqfast int8": 12, "peer bf16": 4}
    ours, peer = sampling.rows_of(case, TINY, part, steps, tokens, read)
    assert ours.p50 == pytest.approx(1) and ours.ratios == {"peer bf16": pytest.approx(3)}
    assert ours.tokens_s == pytest.approx(8000) and ours.images_s == pytest.approx(8000 / 12)
    assert ours.of_read == pytest.approx(0.5) and peer.of_read == pytest.approx(1 / 3)
    assert ours.read_gb_s == pytest.approx(weights / 0.5e-3 / 1e9) and not peer.ratios
    text = report.table([ours, peer])
    assert "ms per step" in text and "first 4 of 12 tokens; odd" in text
    assert text.count("first") == 1 and text.count("<") == 1, "only the peer's image is a bound"


def test_ours_draws_as_many_tokens_as_any_opponent(bench, monkeypatch):
    import sampling

    clock = [0.0]
    monkeypatch.setattr(sampling.time, "perf_counter", lambda: clock[0])

    def contestant(step, ours):
        def run(n):
            clock[0] += n * step

        return sampling.Contestant("fp32", run, ours)

    part = {
        "fast": contestant(0.01, True),
        "slow": contestant(0.1, True),
        "slowest": contestant(1.0, True),
        "peer": contestant(0.05, False),
        "endless": contestant(9.0, False),
    }
    found = sampling._tokens(part, 80, 1.0001, "cpu")
    assert found == {"fast": 80, "slow": 20, "slowest": 8, "peer": 20, "endless": 2}


def test_suite_refuses_before_it_measures_when_checks_fail(bench, monkeypatch):
    import micro
    import sampling

    def failing(device, op):
        yield check.Row(op, "smoke", "float32", "cpu", False, 9.0, "output 0: 3 differ")

    monkeypatch.setattr(check, "check_ops", failing)
    options = micro.Options(None, "gpt_small", None, ("fp32",), "cpu")
    with pytest.raises(micro.RefusedError, match="decode_step smoke"):
        list(sampling.run(options, lambda text: None))
    with pytest.raises(ValueError, match="gpt_small"):
        list(sampling.run(options._replace(case="paint"), lambda text: None))
    ids = [c.id for c in sampling.cases("cuda")]
    assert set(ids) > {c.id for c in sampling.cases("cpu")} and len(set(ids)) == len(ids)


def test_suite_races_our_precisions_and_the_opponents(bench, monkeypatch):
    import micro
    import report
    import sampling

    monkeypatch.setitem(sampling.GPTS, "gpt_small", TINY)
    monkeypatch.setitem(sampling._BLOCK, "cpu", 1 << 20)
    options = micro.Options(
        None, "gpt_small", None, ("fp32", "int4"), "cpu", rounds=3, budget_s=0.2, gate=False
    )
    ((rows, missing),) = sampling.run(options, lambda text: None)
    names = {r.contestant for r in rows if not r.ours}
    assert {"torch_static_cache fp32", "torch_static_cache bf16"} <= names
    assert [r.dtype for r in rows if r.ours] == ["fp32", "int4"]
    assert not [x for x in missing.values() if "fails" in x]
    for r in rows:
        assert set(r.ratios) == (names if r.ours else set())
        assert r.unit == "step" and r.p50 > 0 and r.of_read > 0 and 2 <= r.tokens <= 12
        assert r.note == ("UNVERIFIED" if r.ours else "")
    line = json.loads(json.dumps(report.record(rows, {}, {}, "UNVERIFIED")))
    assert line["rows"][0]["tokens_s"] > 0 and "gb_s" not in line["rows"][0]


def test_a_command_that_fails_or_draws_nothing_has_no_number(bench):
    import micro
    import sampling

    with pytest.raises(micro.RefusedError, match="torn"):
        sampling._process(["-c", "raise SystemExit('torn')"])
    with pytest.raises(micro.RefusedError, match="no picture"):
        sampling._process(["-c", "pass", "sample"])
    sampling._process(["-c", "pass"])


@pytest.mark.slow
def test_command_is_timed_from_the_start_of_its_process(bench, monkeypatch):
    import micro
    import sampling

    def once(runners, **_):
        return {name: summary([seconds(run)]) for name, run in runners.items()}

    def seconds(run):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    monkeypatch.setattr(sampling, "race", once)
    options = micro.Options(None, "emoji64*", None, ("fp32",), "cpu", gate=False)
    (((row,), _),) = sampling.run(options, lambda text: None)
    assert row.measure == "cli" and row.images_s == pytest.approx(16e3 / row.p50)
    assert "are the start of Python" in row.note and float(row.note.split()[0]) > 0


def _decoding_line(time, dtypes, of_read):
    """A ledger line: ours in some precisions, and one opponent in bf16."""
    row = {"measure": "generate", "case": "c", "p50": 1, "p20": 1, "p80": 1, "of_read": of_read}
    mine = {"ours": True, "contestant": "vqfast", "ratios": {"peer bf16": 2.0}}
    rows = [{**row, **mine, "dtype": d} for d in dtypes]
    rows.append({**row, "ours": False, "contestant": "peer bf16", "dtype": "bf16"})
    where = {"device": "x", "threads": 1, "torch": "2"}
    return {"time": time, "commit": "abc", "environment": where, "rows": rows}


def test_picture_keeps_our_precisions_that_a_later_run_left_out(bench, tmp_path):
    pytest.importorskip("matplotlib")
    import picture

    ledger = [_decoding_line("1", ["bf16", "int8"], 0.5), _decoding_line("2", ["int8"], 0.6)]
    record = picture.newest(ledger)
    found = {(r["contestant"], r["dtype"]): r["of_read"] for r in record["rows"]}
    assert found == {
        ("vqfast", "bf16"): 0.5,
        ("vqfast", "int8"): 0.6,
        ("peer bf16", "bf16"): 0.6,
    }
    picture.draw(record, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
