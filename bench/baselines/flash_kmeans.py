"""The assignment step of flash-kmeans (svg-project), a Triton kernel; code norms beforehand."""

from typing import Any

import torch

from baselines import Unsuitable

MEASURES = ("nearest",)
DEVICES = ("cuda",)


def version() -> str:
    from importlib.metadata import version as installed

    from flash_kmeans.assign_euclid_triton import euclid_assign_triton  # noqa: F401  importable?

    return f"flash-kmeans {installed('flash-kmeans')}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    z, codebook, metric = inputs
    if metric != 0:
        raise Unsuitable("l2 only")
    rows, codes = z[None], codebook.to(z.dtype)[None].contiguous()
    code_norms = codes.float().square().sum(-1)

    def search() -> torch.Tensor:
        norms = rows.float().square().sum(-1)
        return euclid_assign_triton(rows, codes, norms, c_sq=code_norms)[0].long()

    return search
