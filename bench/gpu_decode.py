"""Decoding on a GPU: is it right, does a row see its batch, and how long does a step take.

--check     the step against its reference in every format and at many numbers of rows; rows alone
    against rows among others; captured steps against the ordinary loop
--time      ms per step of 576 with random weights, LlamaGen's sizes, against the bytes that a step
    must read; the device's copy bandwidth is measured in the same run
--profile   time of each kernel in one step of the 343 M model, 16 rows
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vqfast import Engine, _dispatch
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.testing import check

DEVICE = "cuda"
STEPS = 576
SIZES = {  # LlamaGen's B, L, XL, XXL: layers, heads, width
    "111M": (12, 12, 768), "343M": (24, 16, 1024), "775M": (36, 20, 1280), "1.4B": (48, 24, 1536),
}  # fmt: skip
GOALS = {("343M", "bf16", 16): 0.55, ("1.4B", "bf16", 16): 1.65}  # ms per step on an H100


def model(layers: int, heads: int, width: int, V: int = 16384, S: int = STEPS) -> GPT:
    """Random weights, made on the device, of a spread that keeps the logits finite."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        gpt = GPT(GPTConfig(V, S, n_layer=layers, n_head=heads, n_embd=width)).eval()
    gpt.requires_grad_(False)
    for p in gpt.parameters():
        p.normal_(0, 0.02)
    return gpt


def conditions(b: int, V: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (b, 1), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# ---- is it right ---------------------------------------------------------------------------------


def step_inputs(gpt: GPT, precision: str, rows: int, length: int) -> tuple:
    """Raw inputs of the op: one token of each of `rows` sequences that have `length`."""
    engine = Engine(gpt, precision, batch=rows)
    g = torch.Generator().manual_seed(rows)
    for cache in (engine._k_cache, engine._v_cache):
        cache.normal_(generator=torch.Generator(DEVICE).manual_seed(length))
        cache[..., length:, :] = float("nan")
    slots = torch.randperm(rows, generator=g).to(DEVICE)
    tokens = torch.randint(gpt.config.vocab_size, (rows,), generator=g).to(DEVICE)
    positions = torch.full_like(slots, length)
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}[precision]
    caches = (engine._k_cache, engine._v_cache)
    return (tokens, slots, positions, *caches, *engine._packed, bits, rows)


def check_budget() -> None:
    for width, heads in ((256, 4), (200, 2), (1024, 16)):
        gpt = model(2, heads, width, V=1031, S=300)
        for precision in ("fp32", "bf16", "int8", "int4"):
            for rows, length in ((1, 0), (7, 127), (16, 128), (33, 299), (65, 5)):
                inputs = step_inputs(gpt, precision, rows, length)
                ok, figure, why = check.check_case("decode_step", inputs, "triton")
                what = f"width {width} {precision} R {rows} length {length}"
                print(f"{what}: {figure:.3g} of the allowed error", flush=True)
                assert ok, f"{what}: {why}"


def check_invariance() -> None:
    gpt = model(2, 16, 1024, V=16384, S=300)
    for precision in ("fp32", "bf16", "int8", "int4"):
        inputs = step_inputs(gpt, precision, 65, 200)
        rows, rest = inputs[:3], inputs[3:-1]
        with _dispatch.backend("triton"):
            step = _dispatch.OPS["decode_step"]
            whole = step(*rows, *rest, 65)
            for n in (1, 2, 8, 16, 17, 32, 33, 64):
                for first in (0, 65 - n):
                    some = tuple(x[first : first + n].clone() for x in rows)
                    logits = step(*some, *rest, n)
                    assert torch.equal(logits, whole[first : first + n]), f"{precision}: {n} rows"
    print("a row has its bits among 1, 2, 8, 16, 17, 32, 33, 64 and 65 rows")


def check_graphs() -> None:
    gpt = model(3, 8, 256, V=1024, S=80)
    for p in gpt.parameters():  # draws that differ
        p.normal_(0, 0.2)
    for precision in ("fp32", "bf16", "int4"):
        for guided in ({}, {"cfg_scale": 2.0, "uncond": conditions(5, 1024, 9)}):
            options = {"seed": 3, "temperature": 1.5, "top_k": 200, "top_p": 0.95, **guided}
            engine, cond = Engine(gpt, precision, batch=5), conditions(5, 1024)
            found = [engine.generate(cond, 79, **options) for _ in range(2)]
            graphs = [s._graphs for s in engine._steps.values()]
            assert graphs and all(graphs), "no step was captured"
            engine._loops = {}
            found.append(engine.generate(cond, 79, **options))
            part = slice(2, 3)
            if guided:
                options["uncond"] = options["uncond"][part]
            alone = engine.generate(cond[part], 79, sample_index=2, **options)
            assert torch.equal(alone, found[0][part]), f"{precision}: a sample saw its batch"
            assert all(torch.equal(f, found[0]) for f in found), f"{precision}: graphs differ"
    print("captured steps draw the codes of the ordinary loop, alone and in a batch")


# ---- how long does it take -----------------------------------------------------------------------


def bandwidth() -> float:
    """Bytes a second of a device copy, read and written, best of 20."""
    x = torch.randn(1 << 28, device=DEVICE)
    y = torch.empty_like(x)
    best = 0.0
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        best = max(best, 2 * x.numel() * 4 / begin.elapsed_time(end) * 1e3)
    return best


def bytes_per_step(engine: Engine, rows: int) -> float:
    """Weights once and half of the cache, on average over all positions."""
    cache = engine._k_cache[:, :1].nbytes * 2
    return engine._packed.weights.nbytes + rows * cache * (STEPS + 1) / 2 / STEPS


def ms_per_step(engine: Engine, b: int, **options: object) -> tuple[float, float, float]:
    """p50, p20 and p80 of 7 whole generations, after two that are not counted."""
    cond, times = conditions(b, 16384), []
    for i in range(9):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        engine.generate(cond, STEPS, seed=1, top_k=100, **options)
        torch.cuda.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - begin) * 1e3 / STEPS)
    cuts = statistics.quantiles(times, n=10)
    return statistics.median(times), cuts[1], cuts[7]


def timings(sizes: list[str]) -> Iterator[dict]:
    copy = bandwidth()
    yield {"what": "copy", "GB_per_s": copy / 1e9, "device": torch.cuda.get_device_name()}
    for size in sizes:
        gpt = model(*SIZES[size])
        for precision in ("bf16", "int8", "int4"):
            engine = Engine(gpt, precision, batch=16)
            for b, guided in ((1, False), (8, True), (16, False)):
                more = {"cfg_scale": 2.0, "uncond": conditions(b, 16384, 5)} if guided else {}
                p50, p20, p80 = ms_per_step(engine, b, **more)
                rows = 2 * b if guided else b
                floor = bytes_per_step(engine, rows) / copy * 1e3
                yield {
                    "what": "decode", "size": size, "precision": precision, "images": b,
                    "rows": rows, "ms": p50, "p20": p20, "p80": p80, "floor_ms": floor,
                    "of_bandwidth": floor / p50, "goal_ms": GOALS.get((size, precision, rows)),
                }  # fmt: skip
        if size == "343M":  # what the graph is worth
            engine._loops = {}
            p50, p20, p80 = ms_per_step(engine, 16)
            yield {"what": "launch by launch", "size": size, "precision": precision, "rows": 16,
                   "ms": p50, "p20": p20, "p80": p80}  # fmt: skip
        del gpt, engine
        torch.cuda.empty_cache()


def profile() -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    engine = Engine(model(*SIZES["343M"]), "bf16", batch=16)
    engine.prefill(conditions(16, 16384).repeat(1, 288))
    token = conditions(16, 16384)[:, 0]
    for _ in range(3):
        engine.step(token)
    with recorded(activities=[ProfilerActivity.CUDA]) as found:
        engine.step(token)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=20))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_decode: torch sees no GPU", file=sys.stderr)
        return 2
    with torch.no_grad():
        if args.check:
            check_budget()
            check_invariance()
            check_graphs()
        if args.time:
            rows = []
            for row in timings(args.sizes):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(rows))
        if args.profile:
            profile()
    return 0


if __name__ == "__main__":
    sys.exit(main())
