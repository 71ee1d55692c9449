"""Generated: every op x case x dtype x backend. What is special to one op is in its own test
file."""

import functools
import importlib
from types import SimpleNamespace

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


def _same_bits(a, b):
    """Equal values; NaN is where NaN is, as in the slots of a cache that nobody wrote."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


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


def _step_inputs():
    made = importlib.import_module("vqfast.ops.decode_step").sample_inputs
    return made(cases("decode_step", "smoke")[0], torch.float32, "cpu")


def _shift_what_was_written(tokens, slots, positions, k_cache, *rest):
    k_cache[0, slots[0], 0, positions[0]] += 1e-3


def _write_beside(tokens, slots, positions, k_cache, v_cache, *rest):
    v_cache[1, 0, 1, -1] = 0


def _write_nothing(tokens, slots, positions, k_cache, *rest):
    k_cache[:, slots, :, positions] = float("nan")


def _write_an_input(tokens, *rest):
    tokens += 1


@pytest.mark.skipif(not NATIVE, reason="native library not built")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_shift_what_was_written, "output 1"),
        (_write_beside, "output 2"),
        (_write_nothing, "output 1"),
        (_write_an_input, "input 0 was changed"),
    ],
)
def test_a_fault_in_what_a_kernel_writes_in_place_is_found(monkeypatch, fault, says):
    op, inputs = _dispatch.OPS["decode_step"], _step_inputs()
    assert op.writes == (3, 4)
    before = [x.clone() for x in inputs[:9]]
    assert check_case("decode_step", inputs, "cpu")[0]
    assert all(_same_bits(a, b) for a, b in zip(inputs, before, strict=False))
    right = op._launcher("cpu")

    def spoilt(*args):
        right(*args)
        fault(*args)

    monkeypatch.setattr(op, "_launcher", lambda name: spoilt)
    ok, _, why = check_case("decode_step", inputs, "cpu")
    assert not ok and says in why


@pytest.mark.skipif(not NATIVE, reason="native library not built")
def test_scratch_comes_poisoned_after_the_outputs_and_is_no_result(monkeypatch, poison):
    op, inputs, seen = _dispatch.OPS["decode_step"], _step_inputs(), []
    right = op._launcher("cpu")

    def watched(*args):
        seen.extend(args[len(inputs) :])
        assert all(x.isnan().all() for x in seen)
        right(*args)

    monkeypatch.setattr(op, "_launcher", lambda name: watched)
    logits, *written = results("decode_step", inputs)
    assert len(seen) == 2 and seen[0] is not seen[1] and len(written) == 2
    assert logits.data_ptr() == seen[0].data_ptr() and not logits.isnan().any()
    assert seen[1].shape == op.scratch(*inputs)[0].shape
    # a Triton kernel has its own, or none: that of the op is for the others
    module = SimpleNamespace(scratch_decode_step=lambda *given: (given[0].new_empty(3),))
    monkeypatch.setattr(op, "_triton", module)
    assert op._scratch("triton", inputs)[0].shape == (3,)
    monkeypatch.setattr(op, "_triton", SimpleNamespace())
    assert op._scratch("triton", inputs) == ()


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_equal_runs_and_thread_counts_give_equal_bits(raw, sample, case):
    inputs = sample(case, torch.float32, "cpu")
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(results(raw, inputs))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(_same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_opcheck(raw, sample, case, monkeypatch):
    op = getattr(torch.ops.vqfast, raw).default
    # opcheck takes no NaN for equal, so caches are full
    monkeypatch.setattr(_dispatch, "poison", Tensor.zero_)
    inputs = list(sample(case, torch.float32, "cpu"))
    for i in _dispatch.OPS[raw].writes:
        inputs[i] = inputs[i].nan_to_num(7.0)
    # the ops are private and not differentiable: gradients live in the public functions
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, tuple(inputs), test_utils=checks)


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_compiles_without_a_graph_break(raw, sample, case):
    op, inputs = getattr(torch.ops.vqfast, raw).default, sample(case, torch.float32, "cpu")
    rest = [x for x in inputs if not isinstance(x, Tensor)]

    def call(*tensors):
        return op(*tensors, *rest)

    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if any(isinstance(x, Tensor) for x in inputs[len(tensors) :]):
        pytest.skip("scalars stand between tensors")
    torch._dynamo.reset()  # the cases share one code object, and its recompilations are limited
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = results(raw, inputs, lambda *given: compiled(*given[: len(tensors)]))
    for a, b in zip(got, results(raw, inputs), strict=True):
        assert _same_bits(a, b)


@pytest.mark.parametrize(("raw", "sample", "case"), _all("smoke"))
def test_reference_runs_in_float64_and_explains_itself(raw, sample, case):
    op = _dispatch.OPS[raw]
    inputs = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in sample(case, torch.float32, "cpu")
    )
    assert op.choose(*inputs) in ("cpu", "reference")
    with _dispatch.backend("reference"):
        outs = results(raw, inputs)
    assert all(isinstance(t, Tensor) for t in outs)
    assert op.explain(*inputs)["reference"] is None


@functools.cache
def _ops_with_kernels():
    return set(_native.load().kernels()) if NATIVE else set()


@pytest.mark.skipif(not NATIVE, reason="native library not built")
def test_every_op_file_has_a_native_kernel():
    without = [name for name in _dispatch.OPS if name not in _ops_with_kernels()]
    assert not without


def test_every_op_has_generated_tests():
    tested = {param.values[0] for param in _all("smoke")}
    assert tested == set(_dispatch.OPS)


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
