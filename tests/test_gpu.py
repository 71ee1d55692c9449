"""What only a GPU can show: the kernels as launched, on streams, in graphs, under poison. Skipped
without one."""

import pytest
import torch

from vqfast import _dispatch, ops
from vqfast.testing import check
from vqfast.testing.cases import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def calls():
    """(raw op, backend, case id, maker of its inputs) of every GPU kernel."""
    for op, module in ops.load_all().items():
        for case in cases(op, "smoke", "edge"):
            for raw, inputs in check.variants(module):
                for backend in ("cuda", "triton"):
                    yield pytest.param(raw, backend, case, inputs, id=f"{raw}-{backend}-{case.id}")


def run(raw, backend, inputs):
    if (why := _dispatch.OPS[raw].reason(backend, inputs)) is not None:
        pytest.skip(why)
    with _dispatch.backend(backend):
        return check.results(raw, inputs)


def reference(raw, inputs, wide=False):
    if wide:
        inputs = [
            x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in inputs
        ]
    return check.results(raw, tuple(inputs), _dispatch.OPS[raw].reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("raw,backend,case,maker", list(calls()))
def test_kernel_keeps_the_budget(raw, backend, case, maker, dtype, poison):
    inputs = maker(case, dtype, "cuda")
    outs = run(raw, backend, inputs)
    right, figure, why = check.compare_outputs(
        raw, outs, reference(raw, inputs), reference(raw, inputs, wide=True)
    )
    assert right, f"{figure:.3g} of the allowed, {why}"
    for a, b in zip(outs, run(raw, backend, inputs), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", (8, 64, 256, 300))
def test_search_and_lookup_in_one_op_have_the_bits_of_two(D, dtype, poison):
    g = torch.Generator().manual_seed(D)
    z, codebook = torch.randn(1000, D, generator=g), torch.randn(2000, D, generator=g)
    z[::97, 0] = float("nan")
    z[5::31] *= 1e9 if dtype == torch.float32 else 1.0  # no certificate
    z, codebook = z.to("cuda", dtype), codebook.to("cuda", dtype)
    found = run("nearest_quantize", "triton", (z, codebook, z, codebook, 0, 1.25))
    indices, scores = run("nearest", "triton", (z, codebook, 0))
    lookup = run("straight_through", "triton", (z, codebook, indices, 1.25))
    right = (indices, scores, *lookup, torch.bincount(indices, minlength=2000))
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def search_inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randn(300, 32, generator=g).cuda(), torch.randn(1025, 32, generator=g).cuda(), 0


def test_runs_on_the_current_stream():
    inputs = search_inputs()
    right = run("nearest", "triton", inputs)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = inputs[0].flip(0)  # ready only after the sleep
        found = run("nearest", "triton", (late, *inputs[1:]))[0]
    stream.synchronize()
    assert torch.equal(found, right.flip(0))


def test_can_be_captured_in_a_graph():
    z, c, metric = search_inputs()
    right = run("nearest", "triton", (z, c, metric))[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run("nearest", "triton", (z, c, metric))[0]
    z.copy_(z.flip(0))
    graph.replay()
    assert torch.equal(found, right.flip(0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    z, c, metric = search_inputs()
    right = run("nearest", "triton", (z, c, metric))[0]
    assert torch.equal(
        run("nearest", "triton", (z.to("cuda:1"), c.to("cuda:1"), metric))[0].cpu(), right.cpu()
    )


def test_rows_do_not_depend_on_the_batch():
    g = torch.Generator().manual_seed(1)
    q = torch.randn(32, 8, 64, generator=g).cuda().bfloat16()
    k, v = torch.randn(2, 32, 8, 256, 64, generator=g).cuda().bfloat16()
    whole = run("decode_attention", "triton", (q, k, v, 200))[0]
    logits = torch.randn(32, 16384, generator=g).cuda()
    index = torch.arange(32).cuda()
    options = (1.0, 100, 0.9, 7, 3)
    tokens = run("sample_logits", "triton", (logits, index, *options))[0]
    for b in range(32):
        row = slice(b, b + 1)
        alone = run("decode_attention", "triton", (q[row], k[row], v[row], 200))[0]
        assert torch.equal(alone[0], whole[b])
        token = run("sample_logits", "triton", (logits[row], index[row], *options))[0]
        assert int(token[0]) == int(tokens[b])
