"""Learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from vqfast.train.settings import TrainSection

__all__ = ["base_rate", "rate"]


def base_rate(train: TrainSection, batch: int, world: int, default: float) -> float:
    """The absolute rate. `base_learning_rate` is scaled by the global batch, as taming does."""
    if train.learning_rate is not None:
        return train.learning_rate
    if train.base_learning_rate is not None:
        return train.base_learning_rate * batch * world * train.accumulate
    return default


def rate(step: int, base: float, train: TrainSection) -> float:
    """The rate of update `step` (0 is the first): linear warm-up, then constant or cosine to
    `final_lr` at max_steps.
    """
    if step < train.warmup_steps:
        return base * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return base
    length = max(1, train.max_steps - train.warmup_steps)
    done = min(1.0, (step - train.warmup_steps) / length)
    return base * (train.final_lr + (1 - train.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
