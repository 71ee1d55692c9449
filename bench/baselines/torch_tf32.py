"""chunked_addmm with its matrix product in TF32, as `set_float32_matmul_precision("high")`."""

from typing import Any

import torch

from baselines import chunked_addmm

MEASURES = ("nearest",)
DEVICES = ("cuda",)


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    in_float32 = chunked_addmm.make(measure, case, inputs)

    def search() -> torch.Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return in_float32()
        finally:
            torch.set_float32_matmul_precision(before)

    return search
