"""Every kernel against its reference, on this machine: what `vqfast check` and the bench's gate
run."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqfast import _dispatch, ops
from vqfast.testing import compare, tolerances
from vqfast.testing.cases import Case, cases

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Row(NamedTuple):
    """One kernel on one case. `error` is the part of the budget used, or elements that differ;
    `reason` says why not."""

    op: str
    case: str
    dtype: str
    backend: str
    ok: bool
    error: float
    reason: str = ""


def _as64(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tuple(x: Any) -> tuple:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def variants(module: ModuleType) -> list[tuple[str, Any]]:
    """(op name, function that makes its inputs) of an op file: the forward, and the backward where
    inputs are given."""
    name = module.__name__.rsplit(".", 1)[1]
    found = []
    if name in _dispatch.OPS and hasattr(module, "sample_inputs"):
        found.append((name, module.sample_inputs))
    if f"{name}_backward" in _dispatch.OPS and hasattr(module, "sample_backward_inputs"):
        found.append((f"{name}_backward", module.sample_backward_inputs))
    return found


def compare_outputs(op: str, outs: tuple, plain: tuple, exact: tuple) -> tuple[bool, float, str]:
    """Integers are equal to the reference's; floats keep the budget. (right, worst figure,
    reason)."""
    worst, why = 0.0, ""
    factor = tolerances.BACKWARD if op.endswith("_backward") else tolerances.FORWARD
    for i, (out, p, e) in enumerate(zip(outs, plain, exact, strict=True)):
        if out.is_floating_point():
            figure, bad = compare.budget_ratio(out, p, e, factor), 1.0
        else:
            figure, bad = float(compare.exact_mismatches(out, p)), 0.0
        if not figure <= bad and not why:
            why = (
                f"output {i}: {figure:.3g} of the allowed error"
                if bad
                else f"output {i}: {int(figure)} differ"
            )
        worst = max(worst, figure)
    return not why, worst, why


def results(op: str, inputs: tuple, call: Callable | None = None) -> tuple[Tensor, ...]:
    """Everything that one run gives: the outputs, then the inputs that it writes.

    Those are written in fresh copies, so that runs on the same `inputs` can be compared.

    Args:
        call: takes the op's inputs and gives its outputs; by default the op itself.
    """
    made = _dispatch.OPS[op]
    given = [x.clone() if i in made.writes else x for i, x in enumerate(inputs)]
    return _tuple((call or made)(*given)) + tuple(given[i] for i in made.writes)


def check_case(op: str, inputs: tuple, backend: str) -> tuple[bool, float, str]:
    """Runs one kernel on raw inputs and holds it against the reference at the same dtype and in
    float64."""
    reference = _dispatch.OPS[op].reference
    kept = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    with torch.no_grad(), _dispatch.backend(backend):
        outs = results(op, inputs)
    for i, (a, b) in enumerate(zip(inputs, kept, strict=True)):
        if isinstance(a, Tensor) and not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return False, float("inf"), f"input {i} was changed"
    with torch.no_grad():
        plain = results(op, inputs, reference)
        exact = results(op, tuple(map(_as64, inputs)), reference)
    return compare_outputs(op, outs, plain, exact)


def check_ops(
    device: str = "cpu", op: str | None = None, tags: tuple[str, ...] = ("smoke", "edge")
) -> Iterator[Row]:
    """One row per op, case, dtype and backend that can run it on `device`.

    Raises:
        ValueError: no op of that name.
    """
    modules = ops.load_all()
    if op is not None and op not in modules:
        raise ValueError(f"op must be one of {', '.join(modules)}, got {op!r}")
    for name in [op] if op else modules:
        for raw, sample in variants(modules[name]):
            for case in cases(name, *tags):
                yield from _check_dtypes(raw, sample, case, device)


def _check_dtypes(raw: str, sample: Any, case: Case, device: str) -> Iterator[Row]:
    for dtype in _DTYPES:
        inputs = sample(case, dtype, device)
        for name, reason in _dispatch.OPS[raw].explain(*inputs).items():
            if name == "reference" or reason is not None:
                continue
            row = (raw, case.id, str(dtype).removeprefix("torch."), name)
            try:
                yield Row(*row, *check_case(raw, inputs, name))
            except Exception as e:  # a kernel that raises is a failed row, not the end of the table
                yield Row(*row, False, float("inf"), f"{type(e).__name__}: {e}")
