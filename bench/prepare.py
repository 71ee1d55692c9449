"""What a codebook costs before the first row of a search: packing, norms, residuals, cells.

Codes are packed in every call, as a copy would go stale unseen, so this is a part of every time of
`nearest`. The screen depends on the rows: those of the case, and 1,000 of them (few rows are not
worth cutting the codes into cells). It must cost less than a search of 1,000 rows, packing
included (baselines/search_1000_rows.py).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from report import Row

from vqfast import _native
from vqfast.testing.cases import Case

NAME = "nearest_prepare"
ROWS = 1000


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple:
    """Those of `nearest`, with at least 1,000 rows."""
    made = importlib.import_module("vqfast.ops.nearest").sample_inputs
    shape = {**case.shape, "N": max(ROWS, case["N"])}
    return made(case._replace(shape=shape), dtype, device)


def backends(inputs: tuple) -> list[str]:
    """Where the preparation can be run by itself: in C++."""
    return [] if _native.refusal(NAME, inputs) else ["cpu"]


def contestants(inputs: tuple) -> dict[str, Callable[[], torch.Tensor]]:
    """name -> preparation for a number of rows; gives how many codes were packed, [1] int64."""
    z, codebook, metric = inputs
    parts = {"vqfast cpu": z}
    if len(z) > ROWS:
        parts[f"vqfast cpu, {ROWS} rows"] = z[:ROWS]
    return {name: _runner(part, codebook, metric) for name, part in parts.items()}


def _runner(z: torch.Tensor, codebook: torch.Tensor, metric: int) -> Callable[[], torch.Tensor]:
    prepare, codes = _native.launcher(NAME), torch.zeros(1, dtype=torch.int64)

    def run() -> Any:
        prepare(z, codebook, metric, codes)
        return codes

    return run


def remark(row: Row) -> str:
    """Says of a row of ours that the rule does not hold."""
    return "; ".join(
        f"DEARER than {peer}: {1 / ratio:.2f} of it"
        for peer, ratio in row.ratios.items()
        if ratio < 1
    )
