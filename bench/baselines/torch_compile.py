"""taming's formula through torch.compile, compiled for the shape before the clock starts."""

from typing import Any

import torch

from baselines import taming_formula

MEASURES = ("nearest",)
DEVICES = ("cuda",)


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    taming_formula.make(measure, case, inputs)  # refuses what does not fit
    z, codebook = (x.float() for x in inputs[:2])
    search = torch.compile(taming_formula.search, dynamic=False)
    search(z, codebook)
    return lambda: search(z, codebook)
