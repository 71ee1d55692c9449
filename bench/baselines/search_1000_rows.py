"""Our own search of 1,000 rows: what the preparation of its codebook is measured against."""

from collections.abc import Callable
from typing import Any

import torch

import vqfast
from vqfast import _dispatch

MEASURES = ("nearest_prepare",)
DEVICES = ("cpu",)


def version() -> str:
    return vqfast.__version__


def make(measure: str, case: Any, inputs: tuple) -> Callable[[], torch.Tensor]:
    z, codebook, metric = inputs
    z = z[:1000]

    def run() -> torch.Tensor:
        with vqfast.backend("cpu"):
            return _dispatch.OPS["nearest"](z, codebook, metric)[0]

    return run
