"""The same network in eager torch with channels last, under autocast on float32 weights."""

from typing import Any

import torch

from baselines import _plain_vqgan

MEASURES = ("encode", "decode")
FORMATS = {"encode": ("bf16", "fp16"), "decode": ("bf16", "fp16")}


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    return _plain_vqgan.contestant(measure, case, inputs, autocast=True)
