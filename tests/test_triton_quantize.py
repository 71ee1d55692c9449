"""The Triton kernels around `quantize` and the EMA codebook, under the interpreter (no GPU).

As tests/test_triton_interpret.py: TRITON_INTERPRET must be set before triton is imported, so a
child, this very file, runs the checks and prints a JSON line each.
"""

import json
import os
import subprocess
import sys
import traceback

import pytest
import torch

CHECKS = {}
KINDS = ((torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32))
SPREADS = {
    "few codes": (130, 3, 7), "many codes": (20, 61, 17), "wide": (70, 9, 300), "one": (1, 1, 1),
    "no rows": (0, 5, 3),
}  # fmt: skip


def check(function):
    """Registers a check, run in the child."""
    CHECKS[function.__name__] = function
    return function


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(op, *inputs):
    """Outputs of the Triton kernel, on memory filled with NaN, and the inputs that it writes."""
    from vqfast import _dispatch, ops  # noqa: F401  (registers)
    from vqfast.testing.check import results

    with _dispatch.backend("triton"):
        return results(op, inputs)


def within(what, op, *inputs):
    """The budget rule for every output of the Triton kernel; returns them from a second run, which
    must agree bit for bit."""
    from vqfast.testing.check import check_case

    right, _, why = check_case(op, inputs, "triton")
    assert right, f"{op} {what}: {why}"
    first, again = run(op, *inputs), run(op, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{op} {what}"
    return again


def each_spread():
    """What it is, z [N, D] near its codes, codebook [K, D], indices [N], half of them one code."""
    for what, (N, K, D) in SPREADS.items():
        for dtype, codes_dtype in KINDS:
            codebook = normal(K + D, K, D, dtype=codes_dtype)
            indices = torch.randint(K, (N,), generator=torch.Generator().manual_seed(2))
            indices[: N // 2] = K // 2
            z = (codebook[indices] + 0.3 * normal(N + D, N, D)).to(dtype)
            yield f"{what} {dtype} {codes_dtype}", z, codebook, indices


@check
def straight_through():
    for what, z, codebook, indices in each_spread():
        z_q, loss, _ = within(what, "straight_through", z, codebook, indices, 1.25)
        assert torch.equal(z_q, codebook[indices].to(z.dtype)) and loss.shape == ()
        for upstream in (normal(3, *z.shape, dtype=z.dtype), None):
            inputs = (upstream, torch.tensor(1.7), z, codebook[indices], 0.25)
            within(what, "straight_through_backward", *inputs)


@check
def both_gradients():
    from vqfast.ops import code_order

    for what, z, codebook, indices in each_spread():
        rows = code_order(indices, len(codebook))
        unused = torch.bincount(indices, minlength=len(codebook)) == 0
        for upstream in (normal(3, *z.shape, dtype=z.dtype), None):
            inputs = (upstream, torch.tensor(1.7), z, codebook, *rows, 0.25, 1.0)
            _, grad_codes = within(what, "quantize_backward", *inputs)
            assert not grad_codes[unused].any(), what


@check
def a_gradient_near_the_codes_is_not_lost_in_rounding():
    from vqfast.ops import code_order

    codebook, indices = 1e3 + normal(1, 3, 4), torch.arange(60) % 3
    z = codebook[indices] + 1e-4 * normal(2, 60, 4)
    rows = code_order(indices, 3)
    _, found = run("quantize_backward", None, torch.tensor(120.0), z, codebook, *rows, 0.25, 1.0)
    right = (codebook.double()[:, None] - z.double().view(20, 3, 4).transpose(0, 1)).sum(1)
    assert (found - right).abs().max() < 1e-6 * right.abs().max()


@check
def statistics_leave_bad_rows_out():
    from vqfast.ops import code_order

    for what, z, codebook, indices in each_spread():
        z[1::4, 0], z[2::7, -1] = float("nan"), -float("inf")
        rows = code_order(indices, len(codebook))
        (packed,) = within(what, "ema_stats", z, *rows)
        counts = torch.bincount(indices[z.isfinite().all(1)], minlength=len(codebook))
        assert torch.equal(packed[:, -1], counts.float()), what


@check
def averages_move_in_place():
    from vqfast.ops.ema_update import sample_inputs
    from vqfast.testing import Case

    for N, K, D in ((1, 5, 3), (1, 70, 300), (0, 7, 4), (1, 2100, 2)):
        for decay in (0.99, 0.2, 0.0):
            case = Case("", "ema_update", {"N": N, "K": K, "D": D}, frozenset())
            inputs = (*sample_inputs(case, torch.float32, "cpu")[:4], decay, 1e-5)
            _, *moved = within(f"{K} {D} {decay}", "ema_update", *inputs)
            if N == 0:  # a batch without rows
                assert all(torch.equal(a, b) for a, b in zip(moved, inputs[:3], strict=True))


def _child():
    torch.set_num_threads(1)
    for name, function in CHECKS.items():
        try:
            function()
            error = None
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"name": name, "error": error}), flush=True)


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("triton")
    env = dict(os.environ, TRITON_INTERPRET="1", VQFAST_POISON="1", OMP_NUM_THREADS="1")
    env.pop("VQFAST_BACKEND", None)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line["error"] for line in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(results, name):
    assert results[name] is None, results[name]


if __name__ == "__main__":
    _child()
