"""One process or several under torchrun: the few collective operations that training needs.

torchrun starts one process per device; gloo serves the CPU, nccl CUDA. Gradients go through torch's
own DistributedDataParallel. What is here are the small agreements between the ranks: is this step
finite, shall we stop.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqfast.config import ConfigError
from vqfast.errors import BackendError

__all__ = ["World", "leave", "setup"]


@dataclass(frozen=True)
class World:
    """This process's place: rank, number of processes, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with averaged gradients; it starts with rank 0's weights and buffers.

        After that buffers stay each rank's own: running statistics feed no gradient, and codebook
        averages are reduced by their quantizer.
        """
        if self.size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # torch 2.15 gave the option another name
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return ddp(module, device_ids=ids, **options)

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def max(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """`x` of rank 0, in place."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            seen = torch.cuda.device_count()
            raise BackendError(f"device {name} is not there: torch sees {seen} CUDA devices")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def setup(device: str) -> World:
    """The world that torchrun describes, or this process alone."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return World(0, 1, _device(device, 0))
    place = _device(device, dist.get_node_local_rank(fallback_rank=0))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), place)


def leave(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
