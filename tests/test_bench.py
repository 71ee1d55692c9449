"""The bench's own rules: opponents by file name, the gate, the table and the last line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vqfast
from vqfast import _dispatch, _native
from vqfast.testing import check
from vqfast.testing.cases import cases
from vqfast.testing.timing import summary

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The folder on the path, as `python bench/run.py` puts it."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.slow
def test_every_opponent_is_found_by_its_file_and_says_what_it_measures(bench):
    import baselines

    files = {p.stem for p in (BENCH / "baselines").glob("[!_]*.py")}
    found = set()
    for measure in (
        "nearest", "nearest_prepare", "quantize", "causal_attention", "group_norm_silu",
        "sample_logits",
    ):  # fmt: skip
        present, absent = baselines.opponents(measure, "cpu")
        found |= set(present) | set(absent)
        assert {"torch_cdist", "chunked_addmm"} <= set(present) or measure != "nearest"
    for measure in ("encode", "decode", "generate", "train_tokenizer", "train_transformer"):
        present, absent = baselines.opponents(measure, "cpu")
        found |= set(present) | set(absent)
    assert found == files


def test_opponents_that_need_a_gpu_are_not_imported_without_one(bench):
    import baselines

    present, absent = baselines.opponents("nearest", "cpu")
    for name in ("flash_kmeans", "faiss_gpu", "cuvs_brute_force", "torch_tf32", "torch_compile"):
        assert absent[name] == "needs cuda"
    assert not {"flash_kmeans", "cuvs"} & set(sys.modules)
    present, absent = baselines.opponents("nearest", "cuda:0")
    assert absent["sklearn"] == "needs cpu" and "torch_tf32" in present


def test_an_opponent_that_fails_is_missing_and_the_others_run(bench, monkeypatch):
    import baselines
    from baselines import torch_cdist

    def fails(measure, case, inputs):
        def run():
            raise RuntimeError("no kernel image\nmore")

        return run

    monkeypatch.setattr(torch_cdist, "make", fails)
    inputs = (torch.randn(5, 3), torch.randn(7, 3), 0)
    ready, missing = baselines.runners("nearest", None, inputs, "cpu")
    assert missing["torch_cdist"] == "fails: RuntimeError: no kernel image"
    assert "chunked_addmm" in ready


def test_misses_are_counted_by_the_float64_rule(bench):
    import baselines
    import exactness

    case = next(c for c in cases("nearest", "bench") if c.id == "vqgan_f16_16384_one_image")
    z, codebook, metric = exactness.inputs("taming", case, torch.float32, "cpu")
    assert float(codebook.abs().max()) <= 1 / case["K"] and metric == 0
    judge, right = exactness.Judge(z, codebook), vqfast.nearest(z, codebook)
    assert judge.miss_rate(right) == 0
    off = right.clone()
    off[:30] = (off[:30] + 1) % len(codebook)
    off[30] = len(codebook)  # outside
    assert judge.miss_rate(off) == pytest.approx(31 / len(z))
    textbook = baselines.runner("taming_formula", "nearest", None, (z, codebook, 0))()
    assert 0 < judge.miss_rate(textbook) < 0.5
    assert judge.miss_rate(right.int()) == 0


@pytest.mark.slow
def test_memory_of_a_call_is_what_the_call_allocates(bench):
    import memory

    block = 64 << 20
    assert 63 < memory.resident_extra_mib(lambda: torch.ones(block // 4)) < 80
    assert memory.resident_extra_mib(lambda: None) < 4
    whole = memory.extra_mib("nearest", "ldm_f4", "fp32", "torch_cdist", "cpu", lambda: None)
    ours = memory.extra_mib("nearest", "ldm_f4", "fp32", "vqfast cpu", "cpu", lambda: None)
    assert whole > 400 and 0 <= ours < 100, (whole, ours)
    assert memory.extra_mib("nearest", "ldm_f4", "fp32", "nobody", "cpu", lambda: None) is None


@pytest.mark.slow
def test_missing_opponent_is_listed_with_its_reason(bench, monkeypatch):
    import baselines

    for name in list(sys.modules):
        if name.split(".")[0] == "faiss":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "faiss", None)
    present, absent = baselines.opponents("nearest", "cpu")
    assert "faiss_cpu" not in present and "faiss" in absent["faiss_cpu"]


def test_opponents_of_the_search_give_the_nearest_codes(bench):
    import baselines

    g = torch.Generator().manual_seed(0)
    codebook = torch.randn(40, 6, generator=g)
    want = torch.randint(40, (64,), generator=g)
    z = codebook[want] + 1e-3 * torch.randn(64, 6, generator=g)
    runs, _ = baselines.runners("nearest", None, (z, codebook, 0), "cpu")
    assert len(runs) >= 3
    for name, run in runs.items():
        assert torch.equal(run().reshape(-1), want), name
    _, refused = baselines.runners("nearest", None, (z, codebook, 2), "cpu")
    assert set(runs) <= set(refused)


def test_opponents_of_the_other_ops_agree_with_the_references(bench):
    import baselines
    import micro

    for measure in micro.measures(None):
        # the opponents of the EMA count bad rows, too, and move averages of their own at every call
        if measure.name in ("nearest", "sample_logits", "ema_stats", "ema_update"):
            continue
        if measure.name not in _dispatch.OPS:  # quantize, and the preparation of a search
            continue
        case = cases(measure.op, "smoke")[0]
        inputs = measure.inputs(case, torch.float32, "cpu")
        want = _dispatch.OPS[measure.name].reference(*inputs)
        want = want if isinstance(want, tuple) else (want,)
        for name, run in baselines.runners(measure.name, case, inputs, "cpu")[0].items():
            got = run()
            got = got if isinstance(got, (tuple, list)) else (got,)
            for a, b in zip(got, want, strict=False):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=f"{measure.name} {name}")


def test_gate_refuses_an_op_whose_checks_fail_and_runs_them_once(bench, monkeypatch):
    import micro

    calls = []

    def failing(device, op):
        calls.append(op)
        yield check.Row(op, "edge_n0", "float32", "cpu", True, 0.0)
        yield check.Row(op, "smoke", "float32", "cpu", False, 9.0, "output 0: 3 differ")

    monkeypatch.setattr(check, "check_ops", failing)
    gate = micro.Gate("cpu", True, lambda text: None)
    assert not gate.passes("nearest", "cpu") and not gate.passes("nearest", "cpu")
    assert calls == ["nearest"]
    assert "1 of 2 checks fail; nearest smoke float32: output 0: 3 differ" in str(gate.refused)
    assert not gate.passes("nearest", "triton"), "a kernel without any check has no number"
    assert micro.Gate("cpu", False, lambda text: None).passes("nearest", "cpu")


def test_table_has_ratios_and_hides_empty_columns(bench):
    import report

    times = {"vqfast cpu": summary([0.010, 0.012, 0.011]), "peer": summary([0.030, 0.024, 0.033])}
    rows = report.rows_of("nearest", "c", "fp32", times, {"vqfast cpu"}, (1e6, 2e9))
    ours, peer = rows
    assert ours.p50 == pytest.approx(11) and ours.ratios == {"peer": pytest.approx(3)}
    assert ours.gflop_s == pytest.approx(2 / 0.011) and not peer.ratios
    text = report.table(rows)
    assert text.splitlines()[3].endswith("3.00x")  # beside the peer, as one of ours is there
    assert "% roof" not in text and "GB/s" in text
    second = ours._replace(contestant="vqfast triton")
    assert report.table([ours, second, peer]).count("3.00x peer") == 2
    search = [ours._replace(misses={"gaussian": 0.0, "taming": 0.0125}, extra_mib=3.25), peer]
    text = report.table(search)
    assert "gaussian 0 %, taming 1.2 %" in text and "+MiB" in text and "3.2" in text
    line = report.record(rows, {"device": "x"}, {}, "passed")
    assert json.loads(json.dumps(line))["rows"][0]["ratios"]["peer"] == pytest.approx(3)


@pytest.mark.skipif(_native.load() is None, reason="native library not built")
def test_preparing_a_codebook_packs_each_code_once_and_has_a_row_of_its_own(bench, each_isa):
    import micro
    import prepare

    (measure,) = (m for m in micro.measures("nearest") if m.name == "nearest_prepare")
    for shape in (
        {"N": 40, "K": 300, "D": 24},  # at 1,000 rows: integers, or float32
        {"N": 40, "K": 5000, "D": 4},  # float32
        {"N": 1100, "K": 8192, "D": 3},  # cells, and float32 for 1,000 of the rows
    ):
        case = cases("nearest", "smoke")[0]._replace(shape=shape)
        z, codebook, metric = measure.inputs(case, torch.float32, "cpu")
        assert len(z) == max(1000, shape["N"])
        codebook[7], codebook[9] = codebook[3], codebook[2]
        runs = prepare.contestants((z, codebook, metric))
        assert len(runs) == (2 if len(z) > 1000 else 1)
        assert {int(run()) for run in runs.values()} == {shape["K"] - 2}
        codebook[0, 1] = float("nan")
        assert {int(run()) for run in runs.values()} == {shape["K"] - 3}
        # a few rows are searched without
        few = prepare.contestants((z[:8], codebook, metric))
        assert {int(run()) for run in few.values()} == {0}
        contest = micro.Contest(measure, case, "fp32", "cpu", ["cpu"])
        rows, _ = contest.rows(
            micro.Options("nearest", None, None, ("fp32",), "cpu", 3, 0.1), print
        )
        ours, peer = [r for r in rows if r.ours], [r for r in rows if not r.ours]
        assert [r.contestant for r in peer] == ["search_1000_rows"] and len(ours) == len(runs)
        assert all("DEARER" in r.note or r.ratios["search_1000_rows"] >= 1 for r in ours)
    row = ours[0]._replace(ratios={"search_1000_rows": 0.5})
    assert prepare.remark(row) == "DEARER than search_1000_rows: 2.00 of it"
    assert micro.backends(measure, tuple(x.to("meta") for x in (z, codebook)) + (0,), None) == []


@pytest.mark.slow
def test_child_times_a_commit_and_passes_its_errors_on():
    case = cases("code_stats", "smoke")[0]
    request = {
        "op": "code_stats", "raw": "code_stats", "shape": case.shape, "id": case.id, "tags": [],
        "dtype": "float32", "device": "cpu", "backend": "reference", "repeats": 2,
    }  # fmt: skip
    lines = [json.dumps(r) for r in (request, {**request, "op": "paint"}, request)]
    command = [sys.executable, BENCH / "child.py", BENCH.parent, "1"]
    run = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert [next(iter(a)) for a in answers] == ["value", "error", "value"], run.stderr
    assert answers[0]["value"] > 0 and "paint" in answers[1]["error"]


@pytest.mark.slow
def test_run_prints_a_table_and_one_json_object_last(tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--case", "vqgan_f16_1024", "--budget", "1", "--rounds", "3", "--no-gate"]
    start = [sys.executable, BENCH / "run.py", "--op"]
    command = [*start, "code_stats", *flags, "--plot", tmp_path / "a.png"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    line = json.loads(run.stdout.splitlines()[-1])
    assert line["gate"] == "UNVERIFIED" and "UNVERIFIED" in run.stdout
    assert {r["contestant"] for r in line["rows"]} >= {"torch_plain"}
    assert (tmp_path / "a.png").stat().st_size > 1000
    bad = subprocess.run([*start, "paint"], capture_output=True, text=True)
    assert bad.returncode == 2 and "nearest" in bad.stderr


def _line(time, device="x", **rows):
    """A ledger line: case=(p50 of ours, p50 of the peer)."""
    made = []
    for case, (mine, theirs) in rows.items():
        row = {"measure": "nearest", "case": case, "dtype": "fp32", "gb_s": 0.1, "p20": 1, "p80": 1}
        ratios = {"peer": theirs / mine}
        figures = {"ours": True, "p50": mine, "gflop_s": 9 / mine, "ratios": ratios}
        made.append({**row, "contestant": "vqfast cpu", **figures})
        figures = {"ours": False, "p50": theirs, "gflop_s": 9 / theirs, "misses": {"taming": 0.1}}
        made.append({**row, "contestant": "peer", **figures})
    where = {"device": device, "threads": 1, "torch": "2"}
    ceilings = {"fp32": {"read": 1e10, "gemm": 1e11}}
    line = {"time": time, "commit": "abc", "environment": where, "rows": made}
    return {**line, "ceilings": ceilings}


def test_picture_takes_the_newest_race_of_each_case_on_one_device(bench, tmp_path):
    pytest.importorskip("matplotlib")
    import picture

    ledger = [_line("1", a=(1, 2), b=(1, 3)), _line("2", "y", a=(1, 9)), _line("3", b=(1, 5))]
    record = picture.newest(ledger)
    ratios = {r["case"]: r["ratios"]["peer"] for r in record["rows"] if r["ours"]}
    assert ratios == {"a": 2, "b": 5} and len(record["rows"]) == 4
    picture.draw(record, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row"):
        picture.draw({**record, "rows": []}, tmp_path / "b.png")
    with pytest.raises(ValueError, match="no line"):
        picture.newest([])


def test_gpu_script_carries_on_after_a_failure_and_collects_everything(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(
        """#!/usr/bin/env bash
case "$*" in
  *is_available*) exit 0 ;;
  *vqfast\\ check*) echo '{"failed": 1}'; exit 3 ;;
  *bench/run.py*) echo "a table"; echo '{"rows": []}' ;;
esac
"""
    )
    fake.chmod(0o755)
    out = tmp_path / "out"
    stages = ["check", "compile", "bench_nearest", "bench_model", "picture"]
    command = ["bash", BENCH / "gpu.sh", out, *stages]
    env = {**os.environ, "PYTHON": str(fake)}
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    summary = (out / "summary.txt").read_text()
    assert "failed (exit 3)" in summary and "1 of 5 stages failed" in summary
    assert (out / "check_cuda.json").read_text() == '{"failed": 1}\n'
    assert (out / "bench.jsonl").read_text() == '{"rows": []}\n' * 2
    packed = subprocess.run(["tar", "tzf", out / "logs.tar.gz"], capture_output=True, text=True)
    assert {"./summary.txt", "./compile.log", "./check.log"} <= set(packed.stdout.split())
    fake.write_text("#!/usr/bin/env bash\nexit 2\n")
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 2 and "no GPU" in run.stderr
