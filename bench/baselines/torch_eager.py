"""taming's network as one writes it in torch: eager, images as [B, C, H, W] in memory."""

from typing import Any

import torch

from baselines import _plain_vqgan

MEASURES = ("encode", "decode")
FORMATS = {"encode": ("fp32",), "decode": ("fp32",)}  # bf16 is what taming's own classes run


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    return _plain_vqgan.contestant(measure, case, inputs, channels_last=False)
