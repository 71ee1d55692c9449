"""Checks of Triton kernels under the interpreter, on machines without a GPU.

TRITON_INTERPRET must be set before triton is imported and would stay set for later tests. So a file
of checks is a script too: a child process runs it and prints a JSON line for each check, which its
tests read.

    check = Checks(__file__)

    @check
    def something_holds(): ...

    @pytest.mark.parametrize("name", check.functions)
    def test_interpreted(name):
        check.passed(name)

    if __name__ == "__main__":
        check.run()          # all, or those named on the command line
"""

import functools
import json
import os
import subprocess
import sys
import time
import traceback

import pytest
import torch

DTYPES = (torch.float32, torch.float16)  # the interpreter has no bfloat16 dots in triton 3.6


class Checks:
    """The checks of one file; calling it with a function registers that."""

    def __init__(self, file):
        self.file, self.functions = file, {}

    def __call__(self, function):
        self.functions[function.__name__] = function
        return function

    def run(self):
        """In the child."""
        torch.set_num_threads(1)
        for name in sys.argv[1:] or self.functions:
            begin = time.process_time()
            try:
                self.functions[name]()
                error = None
            except Exception:
                error = traceback.format_exc()
            seconds = time.process_time() - begin
            print(json.dumps({"name": name, "error": error, "seconds": seconds}), flush=True)

    @functools.cached_property
    def outcomes(self):
        """{name: None or the traceback} of all checks, run by one child."""
        pytest.importorskip("triton")
        env = dict(os.environ, TRITON_INTERPRET="1", VQFAST_POISON="1", OMP_NUM_THREADS="1")
        env.pop("VQFAST_BACKEND", None)
        done = subprocess.run([sys.executable, self.file], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return {line["name"]: line["error"] for line in lines}

    def passed(self, name):
        """Fails with what the child said."""
        assert self.outcomes[name] is None, self.outcomes[name]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed)).to(dtype)


def run(op, *inputs):
    """Outputs of the Triton kernel, on memory filled with NaN, then the inputs that it writes, as
    copies; no input may change."""
    from vqfast import _dispatch, ops  # noqa: F401  (registers)
    from vqfast.testing.check import results

    kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    with _dispatch.backend("triton"):
        found = results(op, inputs)
    for a, b in zip(inputs, kept, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num())
    return found


def plain(op, *inputs):
    """The reference, plain torch, in the dtype of the inputs."""
    from vqfast import _dispatch, ops  # noqa: F401  (registers)
    from vqfast.testing.check import results

    return results(op, inputs, _dispatch.OPS[op].reference)


def exact(op, *inputs):
    """The reference in float64."""
    wide = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    return plain(op, *wide)
