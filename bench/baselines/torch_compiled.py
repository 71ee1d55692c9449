"""torch_channels_last through torch.compile, at batch 1: each compilation takes a minute."""

from typing import Any

import torch

from baselines import Unsuitable, _plain_training, _plain_vqgan

MEASURES = ("encode", "decode", "train_tokenizer")


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    if len(inputs[1]) > 1:
        raise Unsuitable("compiled at batch 1 alone")
    if measure == "train_tokenizer":
        return _plain_training.contestant(case, *inputs, compiled=True)
    return _plain_vqgan.contestant(measure, case, inputs, compiled=True)
