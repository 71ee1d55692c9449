"""torch_autocast through torch.compile, at batch 1: each compilation takes a minute."""

from typing import Any

import torch

from baselines import Unsuitable, _plain_vqgan

MEASURES = ("encode", "decode")
FORMATS = {"encode": ("bf16", "fp16"), "decode": ("bf16", "fp16")}


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    if len(inputs[1]) > 1:
        raise Unsuitable("compiled at batch 1 alone")
    return _plain_vqgan.contestant(measure, case, inputs, autocast=True, compiled=True)
