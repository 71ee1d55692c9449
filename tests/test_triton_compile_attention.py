"""Attention in Triton as compiled for sm_80 and sm_90: instructions, registers, tensor cores; needs
no GPU. What holds of every kernel is in test_triton_compile.py, and so are the shapes."""

import importlib

import pytest

pytest.importorskip("triton")

from test_triton_compile import TENSOR_CORES, compiled  # noqa: E402, F401  (a fixture)

# instructions a pair of row and key in the unmasked loop, d = 64, bfloat16; triton 3.6 and 3.8; may
# only fall
LOOP = {
    90: {"_forward": 8.9, "_backward_q": 7.9, "_backward_kv": 20.0},
    80: {"_forward": 11.0, "_backward_q": 10.8, "_backward_kv": 25.0},
}
# the same for whole programs at T = 256 and the pairs that are seen, forward on sm_90
WHOLE = 23.8


def threads_a_pair(kernel):
    """Threads of a program over the pairs of a tile."""
    pairs = kernel.constants["BLOCK_M"] * kernel.constants["BLOCK_N"]
    return 32 * kernel.options["num_warps"] / pairs


def narrow(compiled, arch):  # noqa: F811
    """The kernels at d = 64 in bfloat16, the first case: {name: kernel}."""
    return {k.name: k for _, k in compiled("causal_attention", arch)[:3]}


def skipped(kernel):
    """Instructions of the second product of the diagonal: a forward jump over tensor cores that
    holds no loop."""
    instructions = kernel.instructions()
    place = {label: i for i, (_, label, _) in enumerate(instructions) if label}
    jumps = [
        (i, place[target])
        for i, (o, _, target) in enumerate(instructions)
        if o.startswith("BRA") and target in place
    ]
    back = [(to, at) for at, to in jumps if to <= at]
    found = [
        to - at - 1
        for at, to in jumps
        if to > at
        and any(o.startswith("HGMMA") for o, _, _ in instructions[at:to])
        and not any(at < a and b < to for a, b in back)
    ]
    assert len(found) == 1, f"{kernel.report}: {found}"
    return found[0]


def test_half_precision_runs_on_wgmma(compiled):  # noqa: F811
    found = [
        k.count("HGMMA") for (q, *_), k in compiled("causal_attention", 90)
        if q.element_size() == 2 and q.shape[-1] <= 128
    ]  # fmt: skip
    assert len(found) == 6 and all(found)
    found = [k.count("HGMMA") for _, k in compiled("full_attention", 90)]
    assert len(found) == 4 and all(found)


@pytest.mark.parametrize("arch", (80, 90))
def test_the_scale_enters_in_the_exponent(compiled, arch):  # noqa: F811
    """One product a score, the running sums'. A scaled score is another."""
    kernel = narrow(compiled, arch)["_forward"]
    products = sum(o.startswith("FMUL") for o in kernel.loop_around(TENSOR_CORES[arch]))
    assert products * threads_a_pair(kernel) < 1.2, kernel.report


@pytest.mark.parametrize("arch", (80, 90))
def test_loops_grow_no_longer(compiled, arch):  # noqa: F811
    kernels = narrow(compiled, arch)
    assert set(kernels) == set(LOOP[arch])
    for name, kernel in kernels.items():
        figure = len(kernel.loop_around(TENSOR_CORES[arch])) * threads_a_pair(kernel)
        assert figure <= LOOP[arch][name], f"{kernel.report}: {figure:.2f} a pair"


def test_a_whole_forward_pass_of_256_tokens_is_short(compiled):  # noqa: F811
    """What lies outside the loop counts as much as the loop at such lengths."""
    kernel = narrow(compiled, 90)["_forward"]
    rows, keys = kernel.constants["BLOCK_M"], kernel.constants["BLOCK_N"]
    loop = len(kernel.loop_around("HGMMA"))
    outside = len(kernel.instructions()) - loop - skipped(kernel)
    blocks = range(0, 256, rows)
    executed = sum(outside + loop * (first // keys) for first in blocks)
    figure = executed * 32 * kernel.options["num_warps"] / (256 * 257 / 2)
    assert figure <= WHOLE, f"{kernel.report}: {figure:.1f} a visible pair"


def test_two_blocks_of_the_forward_pass_share_an_sm(compiled):  # noqa: F811
    kernel = narrow(compiled, 90)["_forward"]
    threads = 32 * kernel.options["num_warps"]
    assert 2 * threads * kernel.registers <= 65536, kernel.report
    assert 2 * (kernel.shared + 1024) <= 228 * 1024, kernel.report


def test_walks_turn_from_masked_to_unmasked_at_a_tile():
    module = importlib.import_module("vqfast.kernels.causal_attention")
    for tables in (module._FORWARD, module._BACKWARD_Q, module._BACKWARD_KV):
        for table in tables.values():
            assert all(own % walked == 0 for own, walked, *_ in table.values())
