"""Every Triton kernel, compiled for sm_80 and sm_90 as its launcher would launch it; needs no GPU.

The launchers run on meta tensors with `JITFunction.run` replaced, so what is compiled here has the
arguments, specialisations
and options of a real launch. Gates: no spills (STACK 0), shared memory that the machine has, tensor
cores where the kernel
is built on them. A missing tool or a launch that never came fails.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":  # kernels are then no JITFunction
    pytest.skip("compiling needs TRITON_INTERPRET unset", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from vqfast.ops._packed import matrix_bytes  # noqa: E402
from vqfast.ops.decode_step import VECTORS_PER_LAYER, matrices  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def meta(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def tool(name):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    assert path.exists(), f"{name} is not in the triton wheel"
    return str(path)


# ---- what a launcher launches --------------------------------------------------------------------


def _argument(param, value):
    """(type, constant or None, attributes) of one argument, as triton's launcher specialises it."""
    if param.is_constexpr:
        return "constexpr", value, []
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], None, [["tt.divisibility", 16]]
    if param.annotation_type:
        return param.annotation_type, None, []
    if isinstance(value, float):
        return "fp32", None, []
    if value == 1 and not param.do_not_specialize:
        return "constexpr", 1, []
    divisible = value % 16 == 0 and not param.do_not_specialize
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, None, [["tt.divisibility", 16]] if divisible else []


def launches(monkeypatch, arch, op, *inputs):
    """(function, signature, constants, attributes, options) of each kernel that a call launches."""
    from vqfast import _dispatch, ops  # noqa: F401  (registers)

    found = []

    def record(function, *args, grid, warmup, **kwargs):
        assert all(n > 0 for n in grid), f"{function.__name__}: empty grid {grid}"
        names = [p.name for p in function.params]
        values = dict(zip(names, args, strict=False))
        values.update({k: kwargs.pop(k) for k in names if k in kwargs})
        signature, constants, attributes = {}, {}, {}
        for i, p in enumerate(function.params):
            kind, constant, attribute = _argument(p, values[p.name])
            signature[p.name] = kind
            if kind == "constexpr":
                constants[p.name] = constant
            if attribute:
                attributes[(i,)] = attribute
        found.append((function, signature, constants, attributes, kwargs))

    module = importlib.import_module(f"vqfast.kernels.{op.removesuffix('_backward')}")
    for name, part in list(sys.modules.items()):
        if name.startswith("vqfast.kernels.") and hasattr(part, "hopper"):
            monkeypatch.setattr(part, "hopper", lambda t: arch >= 90)
    refuse = getattr(module, f"unsupported_{op}", None)
    assert refuse is None or refuse(*inputs) is None
    outs = _dispatch.OPS[op].outputs(*inputs)
    monkeypatch.setattr(JITFunction, "run", record)
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    monkeypatch.setattr(_dispatch.OPS[op], "_triton", module)
    scratch = _dispatch.OPS[op]._scratch("triton", inputs)
    getattr(module, op)(*inputs, *outs, *scratch)
    monkeypatch.undo()
    assert found, f"{op} launched nothing"
    return found


class Compiled:
    """One kernel for one architecture: registers, stack, shared memory, SASS."""

    def __init__(self, launch, arch):
        function, signature, constants, attributes, options = launch
        source = ASTSource(function, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        self.name, self.ttir = function.__name__, kernel.asm["ttir"]
        self.ttgir = kernel.asm["ttgir"]
        self.constants, self.options = constants, options
        self.shared = kernel.metadata.shared
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            usage = subprocess.run(
                [tool("cuobjdump"), "-res-usage", f.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            self.sass = subprocess.run(
                [tool("nvdisasm"), "-c", f.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, f"no resource usage for {self.name}: {usage}"
        self.registers, self.stack = map(int, found.groups())
        use = f"{self.registers} registers, stack {self.stack}, {self.shared} B shared"
        self.report = f"{self.name} sm_{arch}: {use}"

    def instructions(self):
        """[(opcode with its suffixes, label before it or None, label that it names or None)]"""
        found, label = [], None
        for line in self.sass.splitlines():
            if at := re.match(r"(\.L_x_\d+):", line):
                label = at[1]
            pattern = (
                r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
            )
            if at := re.match(pattern, line):
                target = re.search(r"\.L_x_\d+", at[2])
                found.append((at[1], label, target and target[0]))
                label = None
        assert found, f"no instructions in the disassembly of {self.name}"
        return found

    def count(self, opcode):
        return sum(o.startswith(opcode) for o, _, _ in self.instructions())

    def row_sums(self):
        """Layouts of the [8, columns] tiles of float64 that are added up along their columns."""
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", self.ttgir, re.M))
        sums = [t for t in self.ttgir.split('"tt.reduce"')[1:] if "addf" in t.split("}) : (")[0]]
        tiles = [re.search(r"\}\) : \(tensor<(8x\d+)xf64, (#\w+)>\)", t) for t in sums]
        return {(t[1], layouts[t[2]]) for t in tiles if t}

    def loop_around(self, opcode):
        """Opcodes of the shortest loop that holds one."""
        instructions = self.instructions()
        place = {label: i for i, (_, label, _) in enumerate(instructions) if label}
        loops = [
            [o for o, _, _ in instructions[place[target] : i + 1]]
            for i, (o, _, target) in enumerate(instructions)
            if o.startswith("BRA") and target in place and place[target] <= i
        ]
        loops = [body for body in loops if any(o.startswith(opcode) for o in body)]
        assert loops, f"{self.name} has no loop around {opcode}"
        return min(loops, key=len)


# ---- cases: op, inputs on the meta device --------------------------------------------------------


def _cross_entropy():
    x, t, row = meta(2048, 16384, dtype=BF16), meta(2048, dtype=torch.int64), meta(2048)
    yield "cross_entropy", (x, t)
    yield "cross_entropy_backward", (meta(1).expand(2048), x, t, row, row)
    yield "cross_entropy", (meta(64, 1000), t[:64])


def _code_stats():
    for dtype, D in ((F32, 256), (F16, 8), (torch.float64, 3)):
        yield "code_stats", (meta(8192, dtype=torch.int64), meta(8192, D, dtype=dtype), 16384)


def _straight_through():
    for dtype, D in ((F32, 256), (BF16, 256), (F16, 8), (F32, 300)):
        z, codes = meta(8192, D, dtype=dtype), meta(16384, D)
        yield "straight_through", (z, codes, meta(8192, dtype=torch.int64), 1.25)
        yield "straight_through_backward", (z, meta(), z, z, 0.25)
    yield "straight_through_backward", (None, meta(), z, z, 0.25)


def _in_order(N, K):
    return meta(N, dtype=torch.int64), meta(K + 1, dtype=torch.int64)


def _quantize():
    for dtype, D in ((F32, 256), (BF16, 256), (F32, 8), (F16, 300)):
        z, codes = meta(8192, D, dtype=dtype), meta(16384, D)
        yield "quantize_backward", (z, meta(), z, codes, *_in_order(8192, 16384), 0.25, 1.0)
    yield "quantize_backward", (None, meta(), z, codes, *_in_order(8192, 16384), 0.25, 1.0)


def _ema_stats():
    for dtype, D in ((F32, 256), (BF16, 1000), (F16, 8)):
        yield "ema_stats", (meta(8192, D, dtype=dtype), *_in_order(8192, 16384))


def _ema_update():
    for K, D in ((16384, 256), (1024, 8), (300, 500)):
        yield "ema_update", (meta(K), meta(K, D), meta(K, D), meta(K, D + 1), 0.99, 1e-5)


def _causal_attention():
    for d, dtype in ((64, BF16), (64, F32), (128, F16), (256, BF16)):
        packed = meta(2, 257, 3, 4, d, dtype=dtype).transpose(1, 3)
        q, k, v = packed.unbind(2)
        dense, lse = meta(2, 4, 257, d, dtype=dtype), meta(2, 4, 257)
        yield "causal_attention", (q, k, v, 0.125)
        yield "causal_attention_backward", (dense, q, k, v, dense, lse, 0.125)


def _full_attention():
    for d, dtype in ((512, BF16), (256, F16), (100, BF16)):
        q = meta(2, 1, 1024, d, dtype=dtype)  # as a feature map in channels_last gives it
        yield "full_attention", (q, q, q, 0.05)
    q, k, v = meta(2, 1025, 3, 1, 512, dtype=BF16).transpose(1, 3).unbind(2)
    yield "full_attention", (q, k, v, 0.05)


def _group_norm_silu():
    for dtype, last, (B, C, P) in (
        (F32, False, (1, 128, 256)), (BF16, True, (8, 128, 256)), (F32, True, (2, 96, 64)),
    ):  # fmt: skip
        x = meta(B, C, P, P, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        w, s = meta(C), meta(B, 32)
        yield "group_norm_silu", (x, w, w, 32, 1e-6)
        yield "group_norm_silu_backward", (x, x, w, w, s, s, 32)


def _sample_logits():
    index = meta(8, dtype=torch.int64)
    for V, k, p in ((1024, 0, 1.0), (16384, 100, 0.9)):
        yield "sample_logits", (meta(8, V), index, 0.9, k, p, 7, 3)
    yield "sample_logits", (meta(8, V), meta(2, 8, dtype=torch.int64), 0.9, k, p, 7, 0)


def _decode_attention():
    for d, dtype in ((64, F32), (64, BF16), (100, F16), (256, F32)):
        cache = meta(8, 16, 576, d, dtype=dtype)
        yield "decode_attention", (meta(8, 16, d, dtype=dtype), cache, cache, 200)


def _decode_step():
    """Rows, bits, cache, heads, head dim, vocabulary; one layer."""
    for R, bits, dtype, heads, d, V in (
        (16, 16, BF16, 16, 64, 16384), (1, 32, F32, 16, 64, 16384), (64, 8, F32, 16, 64, 1024),
        (64, 32, F32, 16, 64, 16384), (32, 16, BF16, 16, 64, 16384), (20, 4, F16, 10, 100, 1025),
        (100, 16, BF16, 20, 64, 16384),
    ):  # fmt: skip
        E, S, row = heads * d, 576, meta(R, dtype=torch.int64)
        cache = meta(1, R, heads, S, d, dtype=dtype)
        size = sum(matrix_bytes(*shape, bits) for shape in matrices(1, E, V))
        vectors, weights = meta((VECTORS_PER_LAYER + 2) * E), meta(size, dtype=torch.uint8)
        rest = (cache, cache, meta(V, E), meta(S, E), vectors, weights, bits, R)
        yield "decode_step", (row, row, row, *rest)


def _nearest():
    for N, D, dtype in ((32768, 256, F32), (32768, 64, F16), (32768, 16, F16), (32768, 8, F32),
                        (32768, 128, BF16), (256, 256, BF16), (300, 500, F32)):  # fmt: skip
        K = 16384
        yield "nearest", (meta(N, D, dtype=dtype), meta(K, D, dtype=dtype), 0)
    yield "nearest", (meta(32768, 64), meta(16384, 64), 1)
    yield "nearest", (meta(32768, 64), meta(16384, 64), 2)


def _nearest_quantize():
    for N, D, dtype, metric in (
        (32768, 256, F32, 0), (32768, 8, F32, 0), (32768, 64, F16, 1), (256, 256, BF16, 0),
        (300, 300, F32, 2),
    ):  # fmt: skip
        z, codes = meta(N, D, dtype=dtype), meta(16384, D)
        x = meta(N, D) if metric == 1 else z
        yield "nearest_quantize", (z, codes, x, codes, metric, 1.25)


CASES = {
    "causal_attention": _causal_attention,
    "cross_entropy": _cross_entropy,
    "code_stats": _code_stats,
    "ema_stats": _ema_stats,
    "ema_update": _ema_update,
    "full_attention": _full_attention,
    "group_norm_silu": _group_norm_silu,
    "nearest": _nearest,
    "nearest_quantize": _nearest_quantize,
    "quantize": _quantize,
    "sample_logits": _sample_logits,
    "straight_through": _straight_through,
    "decode_attention": _decode_attention,
    "decode_step": _decode_step,
}


def test_every_kernel_file_has_cases():
    kernels = importlib.import_module("vqfast.kernels")
    files = {p.stem for p in Path(kernels.__path__[0]).glob("*.py") if not p.stem.startswith("_")}
    assert files == set(CASES)


@pytest.fixture(scope="module")
def compiled():
    """Compiled kernels of a file for an architecture, [(inputs of the op, Compiled)]; made once."""
    made, once = {}, {}

    def build(launch, arch):
        key = str((launch[0].__name__, *launch[1:], arch))  # layers launch equal kernels
        if key not in once:
            once[key] = Compiled(launch, arch)
        return once[key]

    def of(name, arch):
        if (name, arch) not in made:
            with pytest.MonkeyPatch.context() as patch:
                made[name, arch] = [
                    (inputs, build(launch, arch))
                    for op, inputs in CASES[name]()
                    for launch in launches(patch, arch, op, *inputs)
                ]
        return made[name, arch]

    return of


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("name", CASES)
def test_no_spills_and_shared_memory_that_fits(compiled, name, arch):
    kernels = [k for _, k in compiled(name, arch)]
    bad = [k.report for k in kernels if k.stack or k.shared > SHARED_LIMIT[arch]]
    assert not bad, bad


@pytest.mark.parametrize("name", CASES)
def test_rows_are_addressed_in_int64(compiled, name):
    for _, kernel in compiled(name, 90):
        if kernel.name != "_merge":  # partial sums of 8 rows or more each
            assert re.search(r"arith\.muli .*i64", kernel.ttir), f"{kernel.name}: no int64 product"


# instructions a (row, code) pair in the loop around the tensor cores, {arch: {(D, dtype): most}},
# triton 3.6 and 3.8; may only fall. sm_80 has no three-input minimum.
PER_PAIR = {
    90: {(8, F32): 1.17, (16, F16): 1.17, (64, F16): 1.48, (256, F32): 3.27},
    80: {(8, F32): 2.75, (16, F16): 2.75, (64, F16): 4.0, (256, F32): 8.43},
}
TENSOR_CORES = {90: "HGMMA", 80: "HMMA"}


def screens(compiled, arch):
    """(D, dtype), kernel and pairs a thread has in a tile, of the screens that loop over tiles."""
    found = [(i, k) for i, k in compiled("nearest", arch) if k.name == "screen"]
    assert len(found) == len(list(_nearest()))
    for (z, _, _), k in found:
        pairs = k.constants["BLOCK_M"] * k.constants["BLOCK_K"] / 32 / k.options["num_warps"]
        if k.constants.get("tiles_each") != 1:
            yield (z.shape[1], z.dtype), k, pairs


@pytest.mark.parametrize("arch", (80, 90))
def test_the_screen_runs_on_tensor_cores_and_grows_no_longer(compiled, arch):
    seen = set()
    for case, kernel, pairs in screens(compiled, arch):
        loop = kernel.loop_around(TENSOR_CORES[arch])
        if case in PER_PAIR[arch]:
            seen.add(case)
            gate, figure = PER_PAIR[arch][case], len(loop) / pairs
            assert figure <= gate, f"{kernel.report}: {figure:.2f} a pair, at most {gate}"
        if arch >= 90 and not kernel.constants["STEP"]:
            # one instruction of 64 rows, all codes and 16 columns a warp group
            needed = (kernel.constants["P"] + kernel.constants["Q"]) // 16
            assert sum(o.startswith("HGMMA") for o in loop) == needed, kernel.report
            assert any(o.startswith("LDGSTS") for o in loop), kernel.report
    assert seen == set(PER_PAIR[arch])


def test_group_minima_are_integers_of_three_inputs(compiled):
    for _, kernel, pairs in screens(compiled, 90):
        if not kernel.constants["STEP"]:
            loop = kernel.loop_around("HGMMA")
            three = sum(o.startswith("VIMNMX3") for o in loop) / pairs
            assert three > 0.4 and "SHFL" not in " ".join(loop), f"{kernel.report}: {three:.2f}"


def test_packing_is_paid_once_a_code(compiled):
    """All instructions of a program that packs, times its warps, by its codes: a code of 64 values
    costs what 40 rows cost in the screen."""
    packs = [(i, k) for i, k in compiled("nearest", 90) if k.name == "pack"]
    (kernel,) = (k for (z, _, m), k in packs if z.shape[1] == 64 and z.dtype == F16 and not m)
    per_code = len(kernel.instructions()) * kernel.options["num_warps"] * 32
    assert per_code / kernel.constants["ROWS"] < 4700, kernel.report


@pytest.mark.parametrize("arch", (80, 90))
def test_the_loss_of_a_part_is_added_in_one_order_by_all_who_look_up(compiled, arch):
    """A sum over threads depends on their layout: equal layouts, equal bits."""
    sums = {}
    for name, place in (("straight_through", 0), ("nearest_quantize", 2)):
        for inputs, kernel in compiled(name, arch):
            if kernel.name in ("_forward", "rescore", "score_all"):
                x = inputs[place]
                key = x.dtype, min(x.shape[1], 64), x.shape[1] % 16  # which vectorises loads
                sums.setdefault(key, []).append((kernel.name, kernel.row_sums()))
    assert {name for name, _ in sums[F32, 64, 0]} == {"_forward", "rescore", "score_all"}
    for found in sums.values():
        assert all(layout == found[0][1] and len(layout) == 1 for _, layout in found), found


def test_spills_would_be_seen(monkeypatch):
    """The gate has teeth: a screen with tiles far too large for its warps spills."""
    z, codes = meta(4096, 256), meta(4096, 256)
    found = launches(monkeypatch, 90, "nearest", z, codes, 0)
    (launch,) = (k for k in found if k[0].__name__ == "screen")
    function, signature, constants, attributes, options = launch
    constants = {**constants, "BLOCK_K": 256, "STAGES": 1}
    kernel = Compiled((function, signature, constants, attributes, {**options, "num_warps": 4}), 90)
    assert kernel.stack > 0
