"""Our GPU kernels, op by op, without the package's benches: what bench/gpu.sh runs under tools.

--smoke        every kernel once at small odd sizes, against the reference; what compute-sanitizer
    watches
--repeat N     N runs of every kernel give equal bits
--large        tensors of more than 2^31 elements: first and last rows against the reference
--time         the search at GPU sizes against plain torch, attention against SDPA, norm against
    torch: p50 of 30 runs
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from vqfast import _dispatch, ops
from vqfast.testing import check
from vqfast.testing.cases import cases

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=DEVICE, dtype=dtype)


def backends(op: str, inputs: tuple) -> list[str]:
    """GPU backends of ours that can run these inputs."""
    return [b for b in ("cuda", "triton") if _dispatch.OPS[op].reason(b, inputs) is None]


def small(op: str) -> Iterator[tuple[str, tuple]]:
    """Inputs of the smoke and edge cases, in all dtypes."""
    module = ops.load_all()[op]
    for case in cases(op, "smoke", "edge"):
        for raw, inputs in check.variants(module):
            for dtype in DTYPES:
                yield raw, inputs(case, dtype, DEVICE)


def call(op: str, backend: str, inputs: tuple) -> tuple:
    with _dispatch.backend(backend):
        return check.results(op, _dispatch.OPS[op], inputs)


def equal(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def smoke(repeat: int) -> int:
    """Kernels that ran; raises when two runs differ or none ran."""
    ran = 0
    for op in ops.load_all():
        for raw, inputs in small(op):
            for backend in backends(raw, inputs):
                first = call(raw, backend, inputs)
                for _ in range(repeat):
                    if not equal(first, call(raw, backend, inputs)):
                        raise SystemExit(f"{raw} on {backend}: two runs differ")
                ran += 1
    torch.cuda.synchronize()
    if ran == 0:
        raise SystemExit("no kernel of ours ran")
    return ran


def large() -> None:
    """Offsets beyond 2^31."""
    N, K, D = 131_073, 16_384, 4
    z, c = normal(N, D), normal(K, D, seed=1)
    found = call("nearest", "triton", (z, c, 0))[0]
    for rows in (slice(0, 99), slice(N - 99, N)):
        right = _dispatch.OPS["nearest"].reference(z[rows], c, 0)[0]
        assert torch.equal(found[rows], right), "nearest beyond 2^31 pairs"

    N, D = (1 << 31) // 256 + 1001, 256
    z = normal(N, D, dtype=torch.float16)
    index = torch.arange(N, device=DEVICE) % 1024
    index[-5:] = 1024
    counts, sums = call("code_stats", "triton", (index, z, 1025))
    assert int(counts[1024]) == 5 and int(counts.sum()) == N
    assert torch.equal(sums[1024], z[-5:].double().sum(0).float()), "code_stats beyond 2^31 values"
    found = call("nearest", "triton", (z, c := normal(300, D, dtype=torch.float16, seed=2), 0))[0]
    right = _dispatch.OPS["nearest"].reference(z[-99:], c, 0)[0]
    assert torch.equal(found[-99:], right), "nearest beyond 2^31 values"
    del z

    V = 16_384
    N = (1 << 31) // V + 7
    x = normal(N, V, dtype=torch.float16)
    targets = torch.randint(V, (N,), device=DEVICE)
    loss = call("cross_entropy", "triton", (x, targets))[0]
    right = F.cross_entropy(x[-9:].float(), targets[-9:], reduction="none")
    assert torch.allclose(loss[-9:], right, atol=1e-4), "cross_entropy beyond 2^31 logits"


def milliseconds(function: Callable[[], object]) -> float:
    """p50 of 30 runs, each timed by events, after 5 that are not."""
    times = []
    for i in range(35):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def contests() -> Iterator[tuple[str, dict[str, Callable[[], object]], float]]:
    """(what, {contestant: call}, work of one call in units of 10^9: pairs, flops or bytes)."""
    for D in (4, 8, 16, 32, 64, 128, 256):
        for dtype in (torch.float32, torch.float16):
            z, c = normal(32_768, D, dtype=dtype), normal(16_384, D, dtype=dtype, seed=1)

            def textbook(z: torch.Tensor = z, c: torch.Tensor = c) -> list[torch.Tensor]:
                half = c.float().square().sum(1) / 2
                return [(half - (part @ c.T)).argmin(1) for part in z.split(4096)]

            inputs = (z, c, 0)
            mine = {
                b: lambda b=b, i=inputs: call("nearest", b, i) for b in backends("nearest", inputs)
            }
            yield f"nearest D{D} {dtype}", {**mine, "torch (inexact)": textbook}, 32_768 * 16_384e-9
    for T in (256, 257, 512, 1024):
        q, k, v = (normal(8, 16, T, 64, dtype=torch.bfloat16, seed=i) for i in range(3))
        inputs = (q, k, v, 0.125)
        mine = {
            b: lambda b=b, i=inputs: call("causal_attention", b, i)
            for b in backends("causal_attention", inputs)
        }
        sdpa = {
            "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        }
        yield f"causal_attention T{T} bf16", {**mine, **sdpa}, 2e-9 * 8 * 16 * T * (T + 1) * 64
    for C, P in ((128, 256), (256, 128), (512, 32)):
        for last in (False, True):
            x = normal(16, C, P, P, dtype=torch.bfloat16)
            x = x.to(memory_format=torch.channels_last) if last else x
            w, b = normal(C), normal(C)
            inputs = (x, w, b, 32, 1e-6)
            mine = {
                n: lambda n=n, i=inputs: call("group_norm_silu", n, i)
                for n in backends("group_norm_silu", inputs)
            }
            plain = {
                "torch": lambda x=x, w=w, b=b: F.silu(F.group_norm(x, 32, w.to(x), b.to(x), 1e-6))
            }
            yield f"group_norm_silu C{C} {P}px last={last}", {**mine, **plain}, 4e-9 * x.numel()
    x, index = normal(16, 16_384), torch.arange(16, device=DEVICE)
    inputs = (x, index, 1.0, 100, 0.9, 1, 2)
    mine = {
        b: lambda b=b, i=inputs: call("sample_logits", b, i)
        for b in backends("sample_logits", inputs)
    }
    yield "sample_logits 16x16384 k100 p0.9", mine, 4e-9 * x.numel()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--repeat", type=int, default=0, metavar="N")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_micro: torch sees no GPU", file=sys.stderr)
        return 2
    rows = []
    if args.smoke or args.repeat:
        print(
            f"{smoke(args.repeat)} kernel calls, each repeated {args.repeat} times with equal bits"
        )
    if args.large:
        large()
        print("right beyond 2^31 elements")
    if args.time:
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
        for what, contestants, work in contests():
            times = {name: milliseconds(function) for name, function in contestants.items()}
            rows.append({"what": what, "giga": work, "ms": times})
            figures = (f"{n} {t:.3f} ms ({work / t:.2f} T/s)" for n, t in times.items())
            print(f"{what}: {', '.join(figures)}", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f)
    return 0


if __name__ == "__main__":
    sys.exit(main())
