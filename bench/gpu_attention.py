"""Attention on a GPU: ours against torch's, and the table of who runs where.

--measure         every case of CASES, forward alone and with backward: GPU time of ours and of
    scaled_dot_product_attention, in turns; each is checked against float32 first
--write [FILE]    with --measure: the rows in which torch won, for this GPU's capability; rows of
    other capabilities stay. FILE is the table in the package by default
--plans           the forward pass with other tiles, at the lengths of the goals: what the table of
    tiles in kernels/causal_attention.py should say
--spatial         the autoencoder's one head of 512, not causal: each of torch's kernels, and the
    memory it takes
"""

import argparse
import datetime
import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vqfast
from vqfast import ops
from vqfast.ops._attention_choice import PASSES, TABLE

DEVICE = "cuda"
DIMS = (
    ("bfloat16", 64), ("bfloat16", 128), ("float16", 64), ("float16", 128), ("bfloat16", 48),
    ("bfloat16", 80), ("bfloat16", 100), ("float32", 64),
)  # fmt: skip
WIDE = (("bfloat16", 512), ("float16", 512), ("bfloat16", 256))
LENGTHS = (64, 128, 192, 256, 257, 320, 384, 512, 576, 577, 768, 1024, 1025, 2048)
HEADS = ((1, 16), (8, 16), (32, 16))  # B, H; torch must win with each
CASES = {  # dtypes and head dims, lengths, heads, passes
    "causal_attention": (DIMS, LENGTHS, HEADS, PASSES),
    "full_attention": (WIDE, (64, 256, 576, 1024, 4096), ((1, 1), (8, 1)), PASSES[:1]),
}
MARGIN = 1.02  # by so much
ROUNDS, CALLS = 5, 20
PLANS = {  # own rows, keys walked, warps, stages, registers; d = 64 and 128, two bytes
    (64, 2): ((128, 64, 8, 2, 128), (64, 64, 4, 2, 128), (64, 64, 4, 3, None), (128, 64, 8, 3, 128),
              (128, 128, 8, 2, None), (64, 32, 4, 3, 128)),
    (128, 2): ((128, 32, 8, 2, None), (64, 64, 4, 2, None), (64, 32, 4, 2, None),
               (128, 64, 8, 2, None)),
}  # fmt: skip


def qkv(B: int, H: int, T: int, d: int, dtype: torch.dtype, trains: bool) -> list[torch.Tensor]:
    """Views of one packed product, as a transformer has them."""
    g = torch.Generator(DEVICE).manual_seed(0)
    packed = torch.randn(B, T, 3, H, d, generator=g, device=DEVICE, dtype=dtype)
    return [t.transpose(1, 2).requires_grad_(trains) for t in packed.unbind(2)]


def contestants(op: str) -> dict[str, Callable]:
    causal = op == "causal_attention"
    return {
        "ours": getattr(ops, op),
        "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }


def one_call(attention: Callable, leaves: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """A pass on our Triton kernels or on torch, with backward where the leaves ask for it."""
    trains = leaves[0].requires_grad
    up = torch.ones_like(leaves[0])

    def call() -> list[torch.Tensor]:
        with vqfast.backend("triton"):  # no table is asked, and torch's kernel does not care
            out = attention(*leaves)
            return [out, *(torch.autograd.grad(out, leaves, up) if trains else ())]

    return call


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """GPU time of a call, the queue full: medians of ROUNDS rounds of CALLS calls, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n, (name, call) in itertools.product(range(-1, ROUNDS), calls.items()):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # the CPU runs ahead meanwhile
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        if n >= 0:
            times[name].append(begin.elapsed_time(end) / CALLS)
    return {name: statistics.median(t) for name, t in times.items()}


def check(op: str, leaves: list[torch.Tensor], what: str) -> None:
    """Ours may be off from float32 by twice (gradients: three times) what torch's is, and an eps
    of the dtype."""
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in leaves]
    eps = torch.finfo(leaves[0].dtype).eps
    # the math kernel: float32 sums without TF32
    with sdpa_kernel(SDPBackend.MATH):
        right = one_call(contestants(op)["torch"], wide)()
    found, plain = (one_call(a, leaves)() for a in contestants(op).values())
    for i, (a, b, c) in enumerate(zip(found, plain, right, strict=True)):
        limit = (3 if i else 2) * (b - c).abs().max() + eps * c.abs().max()
        if not (a - c).abs().max() <= limit:
            raise SystemExit(f"{what}: result {i} is off by {(a - c).abs().max():.3g}")


def won(times: list[dict[str, float]]) -> bool:
    """Whether torch was the faster one by MARGIN with every number of heads."""
    return all(t["torch"] * MARGIN <= t["ours"] for t in times)


def ranges(wins: dict[int, bool]) -> list[tuple[int, int]]:
    """[T_from, T_to] of neighbouring measured lengths that were all won; nothing is said of lengths
    below the first and above the last."""
    found: list[tuple[int, int]] = []
    open_range = False
    for T in sorted(wins):
        if wins[T] and open_range:
            found[-1] = (found[-1][0], T)
        elif wins[T]:
            found.append((T, T))
        open_range = wins[T]
    return found


def measure(op: str) -> list[dict]:
    """The rows of the table for this GPU and an op."""
    import triton

    rows, capability = [], torch.cuda.get_device_capability()
    note = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    note += f", {datetime.date.today()}"
    dims, lengths, heads, passes = CASES[op]
    for (dtype, d), what in itertools.product(dims, passes):
        wins, gains = {}, {}
        for T in lengths:
            times = []
            for B, H in heads:
                leaves = qkv(B, H, T, d, getattr(torch, dtype), what == "training")
                case = f"{op} {what} {dtype} B{B} H{H} T{T} d{d}"
                if heads[0] == (B, H):  # float32 holds T x T
                    check(op, leaves, case)
                calls = {n: one_call(a, leaves) for n, a in contestants(op).items()}
                times.append(milliseconds(calls))
                pairs = T * (T + 1) / 2 if op == "causal_attention" else T * T
                rate = (3.5 if what == "training" else 1) * 4e-9 * B * H * pairs * d
                figures = (f"{n} {t:.4f} ms ({rate / t:.0f} TFLOP/s)" for n, t in times[-1].items())
                print(f"{case}: {', '.join(figures)}", flush=True)
            wins[T] = won(times)
            gains[T] = min(t["ours"] / t["torch"] for t in times)
        for low, high in ranges(wins):
            least = min(gains[T] for T in wins if low <= T <= high)
            row = {"op": op, "capability": list(capability), "dtype": dtype}
            row |= {"d": d, "T_from": low, "T_to": high, "pass": what}
            row["measured"] = f"at least x{least:.2f}; {note}"
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """Puts rows in the place of those of this GPU's capability."""
    kept = json.loads(path.read_text())["torch"] if path.exists() else []
    kept = [row for row in kept if tuple(row["capability"]) != torch.cuda.get_device_capability()]
    lines = ",\n".join(f"    {json.dumps(row)}" for row in [*kept, *rows])
    path.write_text('{\n  "torch": [' + (f"\n{lines}\n  " if lines else "") + "]\n}\n")


def plans() -> None:
    """The forward pass of each plan of tiles."""
    tables = importlib.import_module("vqfast.kernels.causal_attention")._FORWARD
    table = tables[torch.cuda.get_device_capability() >= (9, 0)]
    for (d, size), (B, H), T in itertools.product(PLANS, HEADS[1:], (256, 257, 512, 1024)):
        leaves, kept = qkv(B, H, T, d, torch.bfloat16, False), table[d, size]
        times = {}
        for plan in PLANS[d, size]:
            table[d, size] = plan
            try:
                check("causal_attention", [t[:1] for t in leaves], f"{plan} T{T}")
                times[str(plan)] = milliseconds({"": one_call(ops.causal_attention, leaves)})[""]
            finally:
                table[d, size] = kept
        order = sorted(times, key=lambda name: times[name])
        print(f"plans d{d} B{B} T{T}:", *(f"{n} {times[n]:.4f} ms;" for n in order), flush=True)


def spatial() -> None:
    """torch's kernels for one head of 512; extra memory without gradients, in MiB."""
    for T in (256, 1024, 4096):
        q, k, v = qkv(8, 1, T, 512, torch.bfloat16, False)
        for kind in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(kind):
                try:
                    base = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    F.scaled_dot_product_attention(q, k, v)
                    extra = (torch.cuda.max_memory_allocated() - base) / 2**20
                    call = {"ms": lambda i=(q, k, v): F.scaled_dot_product_attention(*i)}
                    time = milliseconds(call)["ms"]
                except RuntimeError as error:  # torch says so of a kernel that cannot run it
                    print(f"spatial T{T} {kind.name}: no, {str(error).splitlines()[0]}")
                    continue
            print(f"spatial T{T} {kind.name}: {time:.4f} ms, {extra:.0f} MiB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("measure", "plans", "spatial"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--write", nargs="?", type=Path, const=TABLE, metavar="FILE")
    args = parser.parse_args()
    if args.write and not args.measure:
        parser.error("--write needs --measure")
    if not torch.cuda.is_available():
        print("gpu_attention: torch sees no GPU", file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if args.plans:
        plans()
    if args.measure:
        rows = [row for op in CASES for row in measure(op)]
        if args.write:
            write(args.write, rows)
    if args.spatial:
        spatial()
    return 0


if __name__ == "__main__":
    sys.exit(main())
