"""The same network in eager torch with channels last: a module of the row's dtype; a training step
in bfloat16 is under autocast.
"""

from typing import Any

import torch

from baselines import _plain_training, _plain_vqgan

MEASURES = ("encode", "decode", "train_tokenizer")


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    if measure == "train_tokenizer":
        return _plain_training.contestant(case, *inputs)
    return _plain_vqgan.contestant(measure, case, inputs)
