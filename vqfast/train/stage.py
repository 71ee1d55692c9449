"""What both stages share: the state that is saved, the guard against non-finite steps, gradient
clipping.

A stage trains modules with optimizers. The guard looks at every loss component and at the gradient
norm before any weight moves. A step that is refused leaves no trace: gradients are dropped, and
what a forward pass writes (running statistics, codebook averages) is put back.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.train import state
from vqfast.train.distributed import World
from vqfast.train.ema import EMA

__all__ = ["BadStep", "Stage"]


class BadStep(Exception):
    """A refused step: which component was not finite, and what it was."""

    def __init__(self, component: str, detail: str):
        super().__init__(f"{component}: {detail}")
        self.component, self.detail = component, detail


class Stage:
    """Base of the two stages. A subclass fills `modules`, `optimizers`, `ema` and `extra`, and
    defines the rest.

    modules: name -> module with state; optimizers: name -> (optimizer, the module that it trains).
    ema: average of modules["model"], or None; extra: tensors of the stage's own that a resume
        needs.
    """

    kind: str  # "tokenizer" | "transformer"
    tokens_per_image = 0  # for the rate of tokens; 0: not told

    def __init__(self, world: World):
        self.world = world
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, tuple[torch.optim.Optimizer, nn.Module]] = {}
        self.ema: EMA | None = None
        self.extra: dict[str, Tensor] = {}

    # ---- for a subclass

    def step(self, step: int, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | float]:
        """One update from the batches of `accumulate` passes; metrics by name. BadStep if it was
        refused.
        """
        raise NotImplementedError

    def write_model(self, folder: Path, step: int) -> None:
        """Put the model for use into an open checkpoint folder."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out images, without the prefix `val/`."""
        return {}

    def pictures(self) -> dict[str, Tensor]:
        """Image grids by name, [B, 3, H, W] each."""
        return {}

    def describe(self, batch: Mapping[str, Any]) -> list[str]:
        """Lines for a dry run, after one pass over `batch`."""
        raise NotImplementedError

    # ---- state

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a resume needs, by name."""
        out: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            out |= state.module_tensors(f"weights.{name}", module)
        for name, (optimizer, module) in self.optimizers.items():
            out |= state.optimizer_tensors(f"optimizer.{name}", optimizer, module)
        if self.ema is not None:
            out |= {f"ema.{name}": value for name, value in self.ema.average.items()}
            out["ema_updates"] = torch.tensor(self.ema.updates)
        return out | {f"extra.{name}": value for name, value in self.extra.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Inverse of `tensors`, in place. CheckpointError when they belong to another run."""
        for name, module in self.modules.items():
            state.load_module(f"weights.{name}", module, tensors, what)
        for name, (optimizer, module) in self.optimizers.items():
            state.load_optimizer(f"optimizer.{name}", optimizer, module, tensors, what)
        if self.ema is not None:
            state.load_tensors("ema", self.ema.average, tensors, what)
            self.ema.updates = int(tensors["ema_updates"])
        state.load_tensors("extra", self.extra, tensors, what)

    # ---- the guard

    def untrained(self) -> Iterator[Tensor]:
        """What a forward pass may write: buffers and parameters without gradient."""
        for module in self.modules.values():
            yield from module.buffers()
            yield from (p for p in module.parameters() if not p.requires_grad)

    def snapshot(self) -> list[tuple[Tensor, Tensor]]:
        return [(x, x.detach().clone()) for x in self.untrained()]

    @torch.no_grad()
    def refuse(self, snapshot: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Forget the step: gradients go, written buffers come back."""
        for x, kept in snapshot:
            x.copy_(kept)
        for optimizer, _ in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        """BadStep naming the first component that is not finite on any rank. One host
        synchronisation.
        """
        values = torch.stack([x.detach().float().reshape(()) for x in parts.values()])
        if self.world.size > 1:
            bad = self.world.max((~values.isfinite()).float())
            shown = [float("nan") if b else 0.0 for b in bad.tolist()]
        else:
            shown = values.tolist()
        for name, value in zip(parts, shown, strict=True):
            if not abs(value) < float("inf"):
                component, _, detail = name.partition(" ")
                raise BadStep(component, f"{detail or 'loss'} is {value}")

    def train_mode(self, on: bool) -> None:
        for module in self.modules.values():
            module.train(on)


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """sqrt of the float32 sum of squares: infinite as soon as a second moment would be."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in grads]
    return torch.stack(squares).sum().sqrt()


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale the gradients to a norm of at most `limit`; 0 leaves them."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if limit > 0 and grads:
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
