"""The micro suite under pytest-benchmark: python -m pytest bench/bench_ops.py --benchmark-only

One row per raw op, bench case and backend, float32 on the CPU, for its history and comparison
(`--benchmark-save`, `--benchmark-compare`). bench/run.py has the opponents. As there, a backend
whose checks fail gives no number: its rows fail.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import micro  # noqa: E402  found through the line above, as with python bench/run.py

from vqfast.testing.cases import cases  # noqa: E402

_GATE = micro.Gate("cpu", True, lambda text: None)
_ALL = [
    pytest.param(measure, case, id=f"{measure.name}-{case.id}")
    for measure in micro.measures(None)
    for case in cases(measure.op, "bench")
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("measure", "case"), _ALL)
def test_op(benchmark, measure, case, backend):
    pytest.importorskip("pytest_benchmark")
    inputs = measure.inputs(case, torch.float32, "cpu")
    if backend not in micro.backends(measure, inputs, backend):
        pytest.skip(f"{backend} cannot run it")
    assert _GATE.passes(measure.op, backend), _GATE.refused
    benchmark.group = f"{measure.name} {case.id}"
    benchmark.pedantic(micro.runner(measure, backend, inputs), rounds=5, warmup_rounds=1)
