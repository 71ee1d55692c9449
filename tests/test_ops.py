"""Generated: every op x case x dtype x backend. What is special to one op is in its own test
file."""

import functools

import pytest
import torch
from torch import Tensor

from vqfast import _dispatch, _native, ops
from vqfast.testing import cases, check_case
from vqfast.testing.check import results, variants

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NATIVE = _native.load() is not None


def _all(*tags: str) -> list:
    return list(_each(*tags))


def _each(*tags: str):
    for name, module in ops.load_all().items():
        for raw, sample in variants(module):
            for case in cases(name, *tags):
                yield pytest.param(raw, sample, case, id=f"{raw}-{case.id}")


def _on_cpu(raw, inputs):
    reason = _dispatch.OPS[raw].explain(*inputs)["cpu"]
    if reason is not None:
        pytest.skip(reason)


def _tuple(x):
    return (x,) if isinstance(x, Tensor) else tuple(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke", "edge"))
def test_kernel_keeps_the_budget_on_every_isa(raw, sample, case, dtype, each_isa):
    inputs = sample(case, dtype, "cpu")
    _on_cpu(raw, inputs)
    ok, error, why = check_case(raw, inputs, "cpu")
    assert ok, f"{why} (worst {error:.3g})"


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke", "edge"))
def test_every_output_is_written(raw, sample, case, poison):
    inputs = sample(case, torch.float32, "cpu")
    _on_cpu(raw, inputs)
    ok, error, why = check_case(raw, inputs, "cpu")
    assert ok, f"{why} (worst {error:.3g})"


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_equal_runs_and_thread_counts_give_equal_bits(raw, sample, case):
    inputs = sample(case, torch.float32, "cpu")
    op, before, runs = _dispatch.OPS[raw], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(results(raw, op, inputs))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_opcheck(raw, sample, case):
    op = getattr(torch.ops.vqfast, raw).default
    # the ops are private and not differentiable: gradients live in the public functions
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, sample(case, torch.float32, "cpu"), test_utils=checks)


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_compiles_without_a_graph_break(raw, sample, case):
    op, inputs = getattr(torch.ops.vqfast, raw).default, sample(case, torch.float32, "cpu")
    rest = [x for x in inputs if not isinstance(x, Tensor)]

    def call(*tensors):
        return results(raw, op, (*tensors, *rest))

    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if any(isinstance(x, Tensor) for x in inputs[len(tensors) :]):
        pytest.skip("scalars stand between tensors")
    torch._dynamo.reset()  # the cases share one code object, and its recompilations are limited
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*tensors), call(*tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_reference_runs_in_float64_and_explains_itself(raw, sample, case):
    op = _dispatch.OPS[raw]
    inputs = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in sample(case, torch.float32, "cpu")
    )
    assert op.choose(*inputs) in ("cpu", "reference")
    with _dispatch.backend("reference"):
        outs = _tuple(op(*inputs))
    assert all(isinstance(t, Tensor) for t in outs)
    assert op.explain(*inputs)["reference"] is None


@functools.cache
def _ops_with_kernels():
    return set(_native.load().kernels()) if NATIVE else set()


@pytest.mark.skipif(not NATIVE, reason="native library not built")
def test_every_op_file_has_a_native_kernel():
    without = [name for name in _dispatch.OPS if name not in _ops_with_kernels()]
    assert not without


def test_forced_backend_never_falls_back():
    raw, sample, case = _all("smoke")[0].values
    inputs = sample(case, torch.float32, "cpu")
    with pytest.raises(_dispatch.BackendError, match="cuda"), _dispatch.backend("cuda"):
        _dispatch.OPS[raw](*inputs)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="nope"), _dispatch.backend("nope"):
        pass


def test_explain_names_unknown_ops():
    with pytest.raises(ValueError, match="no_such_op"):
        _dispatch.explain("no_such_op", torch.zeros(1))
