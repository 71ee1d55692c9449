"""What a caller sees of a generation while it runs."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """The state of a batch after one step; a callback gets it and may keep it.

    `Engine.generate` steps token by token and knows samples: codes [b, n] on its device. A
    `Pipeline` knows images: codes [b, h, w] on the CPU, those that the request gave included.
    """

    images: tuple[int, ...]  # numbers of the images of the batch, in the order of the rows
    step: int  # steps done, 1..steps
    steps: int  # that the batch takes
    codes: Tensor  # int64, a copy; -1 where none is drawn yet


OnStep = Callable[[Step], object]


def check_on_step(call: object) -> None:
    """TypeError for what is neither None nor callable."""
    if call is not None and not callable(call):
        raise TypeError(f"on_step must be a function or None, got {type(call).__name__}")
