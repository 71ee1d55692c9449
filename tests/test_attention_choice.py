"""Which attention a GPU runs: torch's where the table of measurements says so, else ours. No GPU
here, so the capability is mocked and our side is the CPU kernel."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import vqfast
from vqfast.ops import _attention_choice as choice

HOPPER = (9, 0)
ROW = {
    "op": "causal_attention", "capability": [9, 0], "dtype": "float32", "d": 16,
    "T_from": 10, "T_to": 20, "pass": "forward",
}  # fmt: skip


@pytest.fixture
def torch_calls(monkeypatch):
    """Calls of torch's kernel, on what is said to be a Hopper GPU with an empty table."""
    calls, real = [], choice.torch_attention

    def record(*inputs):
        calls.append(inputs)
        return real(*inputs)

    monkeypatch.delenv("VQFAST_BACKEND", raising=False)
    monkeypatch.setattr(choice, "capability", lambda t: HOPPER)
    monkeypatch.setattr(choice, "TORCH", ())
    for op in ("causal_attention", "full_attention"):
        monkeypatch.setattr(importlib.import_module(f"vqfast.ops.{op}"), "torch_attention", record)
    return calls


def table(monkeypatch, tmp_path, *rows):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"torch": rows}))
    monkeypatch.setattr(choice, "TORCH", choice.read(path))


def qkv(T=13, d=16, dtype=torch.float32, trains=False):
    g = torch.Generator().manual_seed(T)
    return [torch.randn(1, 2, T, d, generator=g).to(dtype).requires_grad_(trains) for _ in range(3)]


def test_the_shipped_table_is_read_and_names_measurements():
    body = json.loads(choice.TABLE.read_text())
    assert len(choice.TORCH) == len(body["torch"])
    assert all(row["measured"] for row in body["torch"])  # device, versions, day and times


def test_what_was_not_measured_runs_on_ours(torch_calls):
    vqfast.causal_attention(*qkv())
    vqfast.causal_attention(*qkv(trains=True))
    vqfast.ops.full_attention(*qkv())
    assert not torch_calls


def test_a_row_runs_on_torch(torch_calls, monkeypatch, tmp_path):
    table(monkeypatch, tmp_path, ROW)
    q, k, v = qkv()
    out = vqfast.causal_attention(q, k, v, scale=0.2)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    assert len(torch_calls) == 1 and torch.equal(out, right)


def test_nothing_is_chosen_off_a_gpu(torch_calls, monkeypatch, tmp_path):
    monkeypatch.undo()
    table(monkeypatch, tmp_path, ROW)
    assert choice.capability(torch.zeros(1)) is None
    assert not choice.takes_torch("causal_attention", *qkv())


def test_a_row_gives_its_range_and_its_pass_to_torch(torch_calls, monkeypatch, tmp_path):
    table(monkeypatch, tmp_path, ROW)
    for T, d, dtype, trains, theirs in (
        (10, 16, torch.float32, False, True),
        (20, 16, torch.float32, False, True),
        (9, 16, torch.float32, False, False),
        (21, 16, torch.float32, False, False),
        (13, 8, torch.float32, False, False),
        (13, 16, torch.bfloat16, False, False),
        (13, 16, torch.float32, True, False),
    ):
        torch_calls.clear()
        vqfast.causal_attention(*qkv(T, d, dtype, trains))
        assert bool(torch_calls) is theirs, (T, d, dtype, trains)
    with torch.no_grad():  # leaves that ask, in a pass that does not
        torch_calls.clear()
        vqfast.causal_attention(*qkv(trains=True))
        assert torch_calls
    torch_calls.clear()
    monkeypatch.setattr(choice, "capability", lambda t: (8, 0))
    vqfast.causal_attention(*qkv())
    assert not torch_calls


def test_each_attention_has_rows_of_its_own(torch_calls, monkeypatch, tmp_path):
    table(monkeypatch, tmp_path, {**ROW, "op": "full_attention"})
    q, k, v = qkv()
    vqfast.causal_attention(q, k, v)
    assert not torch_calls
    out = vqfast.ops.full_attention(q, k, v, scale=0.3)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert len(torch_calls) == 1 and torch.equal(out, right)


def everywhere(monkeypatch):
    """A table that gives everything to torch."""
    for op in ("causal_attention", "full_attention"):
        monkeypatch.setattr(
            importlib.import_module(f"vqfast.ops.{op}"), "takes_torch", lambda *_: True
        )


def test_info_says_so(torch_calls, monkeypatch):
    monkeypatch.setattr("vqfast._info.takes_torch", lambda *_: True)
    takes = {name: op["takes"] for name, op in vqfast.info()["ops"]["cpu"].items()}
    assert takes["causal_attention"] == takes["full_attention"] == "torch"
    assert takes["causal_attention_backward"] != "torch"


def test_training_has_a_row_of_its_own(torch_calls, monkeypatch, tmp_path):
    table(monkeypatch, tmp_path, {**ROW, "pass": "training"})
    vqfast.causal_attention(*qkv())
    assert not torch_calls
    vqfast.causal_attention(*qkv(trains=True))
    assert torch_calls


def test_a_forced_backend_and_what_torch_may_not_take_stay_ours(torch_calls, monkeypatch, tmp_path):
    table(monkeypatch, tmp_path, ROW, {**ROW, "T_from": 1})
    with vqfast.backend("reference"):
        vqfast.causal_attention(*qkv())
    monkeypatch.setenv("VQFAST_BACKEND", "reference")
    vqfast.causal_attention(*qkv())
    monkeypatch.delenv("VQFAST_BACKEND")
    vqfast.causal_attention(*qkv(dtype=torch.float64))  # would hold T x T
    vqfast.causal_attention(*qkv(T=0))
    assert not torch_calls


def test_gradients_go_through_torch(torch_calls, monkeypatch):
    everywhere(monkeypatch)
    leaves = qkv(37, trains=True)
    up = torch.randn(1, 2, 37, 16, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(vqfast.causal_attention(*leaves, scale=0.3), leaves, up)
    assert len(torch_calls) == 1
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3)
    right = torch.autograd.grad(out, leaves, up)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_the_dtype_stays_under_autocast(torch_calls, monkeypatch):
    everywhere(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert vqfast.causal_attention(*qkv()).dtype == torch.float32
    assert torch_calls


def test_compiles_with_the_choice_in_it(torch_calls, monkeypatch, tmp_path):
    """Guarded: the same compiled function takes the other kernel at another length."""
    table(monkeypatch, tmp_path, {**ROW, "pass": "training"})
    compiled = torch.compile(vqfast.causal_attention, fullgraph=True, backend="aot_eager")
    for T in (13, 30):
        leaves = qkv(T, trains=True)
        right = torch.autograd.grad(vqfast.causal_attention(*leaves).sum(), leaves)
        found = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True)), T


@pytest.mark.parametrize(
    "wrong", ({"pass": "backward"}, {"dtype": "float"}, {"T_from": 30}, {"T_from": 0})
)
def test_a_row_that_says_nothing_is_refused(wrong, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="not a row"):
        table(monkeypatch, tmp_path, {**ROW, **wrong})


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    return importlib.import_module("gpu_attention")


def test_measured_lengths_become_ranges_of_won_neighbours(bench):
    wins = {64: False, 128: True, 256: True, 257: False, 512: True, 1024: False}
    assert bench.ranges(wins) == [(128, 256), (512, 512)]
    assert bench.ranges({64: False}) == []
    assert bench.ranges({64: True, 256: True}) == [(64, 256)]


def test_a_win_is_one_with_every_number_of_heads_and_by_the_margin(bench):
    fast, slow, even = ({"torch": t, "ours": 1.0} for t in (0.9, 1.1, 1 / bench.MARGIN + 1e-3))
    assert bench.won([fast, fast])
    assert not bench.won([fast, slow]) and not bench.won([fast, even])


def test_a_written_table_is_read_and_other_gpus_keep_their_rows(bench, monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    row = {**ROW, "measured": "at least x1.10"}
    for capability in ((8, 0), HOPPER, HOPPER):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        bench.write(path, [{**row, "capability": list(capability)}])
    assert [key[1] for key in choice.read(path)] == [(8, 0), HOPPER]
    bench.write(path, [])
    assert [key[1] for key in choice.read(path)] == [(8, 0)]
