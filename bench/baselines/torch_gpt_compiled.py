"""The plain GPT of torch_gpt.py through torch.compile, compiled before the clock starts."""

import signal
from collections.abc import Callable
from typing import Any

import torch

from baselines import Unsuitable, torch_gpt

MEASURES = ("train_transformer",)
_LIMIT_S = 120  # to compile forward and backward
_MOST_PARAMETERS = 100_000_000


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Callable[[], torch.Tensor]:
    gpt, idx, cond = inputs
    if sum(p.numel() for p in gpt.parameters()) > _MOST_PARAMETERS:
        raise Unsuitable("left out above 100 M parameters: memory of all contestants at once")
    model = torch_gpt.network(gpt, case.device)
    model.compile(dynamic=False)
    step = torch_gpt.training_step(model, case, idx, cond)
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_LIMIT_S)
    try:
        first = [step()]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)

    def run() -> torch.Tensor:
        # what was compiled has made its first step, and shows the loss of that one
        return first.pop() if first else step()

    run.same_weights = True  # type: ignore[attr-defined]
    return run


def _give_up(*_: Any) -> None:
    raise Unsuitable(f"did not compile within {_LIMIT_S} s")
