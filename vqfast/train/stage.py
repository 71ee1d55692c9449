"""What both stages share: the state that is saved, the guard against non-finite steps, gradient
clipping.

A stage trains modules with optimizers. The guard looks at every loss component and at the gradient
norm before any weight moves. A step that is refused leaves no trace: gradients are dropped, and
what a forward pass writes (running statistics, codebook averages) is put back.

In float16 the losses are multiplied by a scale before the backward pass, so that small gradients do
not vanish. It grows while all goes well and is halved when gradients overflow; such a step is
skipped and counted.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.train import state
from vqfast.train.distributed import World
from vqfast.train.ema import EMA
from vqfast.train.heap import keep_freed_memory

__all__ = ["BadStep", "Stage"]


_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class BadStep(Exception):
    """A refused step: which component was not finite, and what it was.

    overflow: float16 alone was the reason, and the next step has a smaller scale.
    """

    overflow = False

    def __init__(self, component: str, detail: str):
        super().__init__(f"{component}: {detail}")
        self.component, self.detail = component, detail


class Stage:
    """Base of the two stages. A subclass fills `modules`, `optimizers`, `ema` and `extra`, and
    defines the rest.

    modules: name -> module with state; optimizers: name -> (optimizer, the module that it trains).
    ema: average of modules["model"], or None; extra: tensors of the stage's own that a resume
        needs. skipped: steps left out because float16 gradients overflowed.
    """

    kind: str  # "tokenizer" | "transformer"
    tokens_per_image = 0  # for the rate of tokens; 0: not told

    def __init__(self, world: World, precision: str = "fp32"):
        self.world, self._dtype = world, _DTYPES[precision]
        if world.device.type == "cpu":
            keep_freed_memory()
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.skipped = 0
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

    # ---- precision

    def autocast(self) -> contextlib.AbstractContextManager:
        """The networks' arithmetic."""
        on = self._dtype is not None
        return torch.autocast(self.world.device.type, self._dtype or torch.bfloat16, enabled=on)

    def unscaled_norm(self, name: str) -> Tensor:
        """The norm of an optimizer's gradients, after the scale of the losses is taken out of
        them.
        """
        optimizer, _ = self.optimizers[name]
        self.scaler.unscale_(optimizer)
        return gradient_norm([p for group in optimizer.param_groups for p in group["params"]])

    def scaling(self) -> dict[str, float]:
        """Metrics of float16 training; none in other precisions."""
        if not self.scaler.is_enabled():
            return {}
        return {"loss_scale": self.scaler.get_scale(), "skipped_steps": float(self.skipped)}

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
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            values = [scaler["scale"], scaler["_growth_tracker"], self.skipped]
            out["scaler"] = torch.tensor(values, dtype=torch.float64)
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
        if self.scaler.is_enabled() and "scaler" in tensors:  # absent: it ran in another precision
            scale, tracker, skipped = tensors["scaler"].tolist()
            own = {"scale": scale, "_growth_tracker": int(tracker)}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **own})
            self.skipped = int(skipped)
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
    def refuse(self, snapshot: Sequence[tuple[Tensor, Tensor]], error: BadStep) -> None:
        """Forget the step: gradients go, written buffers come back. Marks an overflow as one."""
        for x, kept in snapshot:
            x.copy_(kept)
        for optimizer, _ in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            before = self.scaler.get_scale()
            self.scaler.update()
            # at a scale of 1 it is no overflow of ours: the gradients themselves are not finite
            halved = self.scaler.get_scale() < before and before > 1
            error.overflow = halved and "gradient" in error.detail
            self.skipped += error.overflow

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
