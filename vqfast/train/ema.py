"""Exponential moving average of a module's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """Average of the trained parameters; buffers and frozen parameters are taken as they are.

        a ← a + (1 − d)·(w − a),   d = min(decay, (1 + n) / (10 + n)) after n updates

    The ramp makes early averages forget the initialisation. Parameter order is the module's.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        self.average = {
            n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = dict(self.module.named_parameters())
        torch._foreach_lerp_(
            list(self.average.values()), [weights[name] for name in self.average], 1 - decay
        )

    def state(self) -> dict[str, Tensor]:
        """The module's state dict with the averages in the place of the trained weights."""
        return {
            name: self.average.get(name, value) for name, value in self.module.state_dict().items()
        }

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averages."""
        weights = dict(self.module.named_parameters())
        kept = {name: weights[name].detach().clone() for name in self.average}
        try:
            _copy(weights, self.average)
            yield
        finally:
            _copy(weights, kept)


@torch.no_grad()
def _copy(into: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
