"""Memory of its own for the maps and bands of one image: what is freed is used again or given back.

The allocator of C does neither reliably. Blocks of changing size leave gaps between them that stay
resident: glibc 2.36 held 528 MiB where 230 were in use (decoder, 1024 px, bfloat16, 2026-11-30).
Here every block is a mapping, so that no gap lies between two.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import weakref

import torch
from torch import Tensor

__all__ = ["Pool", "give_back_heap"]

_SMALL = 64 << 10  # bytes; less is left to torch
_LARGE_PAGE = 2 << 20
_SLACK = 8  # a freed block serves requests down to 1 - 1 / _SLACK of its size


class Pool:
    """Tensors on a CPU in up to `limit` bytes, those that are free to be used again included.

    More is given where more is asked for: it is for the plan to ask for no more. On other devices
    torch's own allocator does all this. `mapped` says how many bytes there are.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self.mapped = limit, 0
        self._free: list[mmap.mmap] = []  # the one freed last is last

    def empty(
        self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[B, C, H, W] channels_last, not initialised; in the dtype of `like` if none is given."""
        ours = like.device.type == "cpu"
        device, last = "meta" if ours else like.device, torch.channels_last
        out = torch.empty(shape, dtype=dtype or like.dtype, device=device, memory_format=last)
        return self.place(out) if ours else out

    def copy(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] in memory of its own."""
        return self.empty(tuple(x.shape), x).copy_(x)

    def stacked(self, top: Tensor, below: Tensor) -> Tensor:
        """[1, C, m, W] and [1, C, n, W] -> [1, C, m + n, W]."""
        m, n = top.shape[2], below.shape[2]
        out = self.empty((*below.shape[:2], m + n, below.shape[3]), below)
        out[:, :, :m], out[:, :, m:] = top, below
        return out

    def place(self, wanted: Tensor) -> Tensor:
        """A tensor on the CPU like `wanted`, a dense one on the meta device."""
        size = wanted.numel() * wanted.element_size()
        if size < _SMALL:
            return torch.empty_like(wanted, device="cpu")
        block = self._block(size)
        memory = memoryview(block)
        # the storage keeps the view, and the view the block
        weakref.finalize(memory, self._free.append, block).atexit = False
        flat = torch.frombuffer(memory, dtype=wanted.dtype, count=wanted.numel())
        return flat.as_strided(wanted.shape, wanted.stride())

    def _block(self, size: int) -> mmap.mmap:
        fits = [b for b in self._free if size <= len(b) <= size + size // _SLACK]
        if fits:
            best = min(fits, key=len)
            self._free.remove(best)
            return best
        size = math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
        while self._free and self.mapped + size > self._limit:
            self.mapped -= len(self._free.pop(0))
        self.mapped += size
        return _mapping(size)


def _mapping(size: int) -> mmap.mmap:
    # private: a shared one would be the child's too after a fork, and gets no large pages
    if hasattr(mmap, "MAP_PRIVATE"):
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        block = mmap.mmap(-1, size)
    if size >= _LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that was built without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def give_back_heap() -> None:
    """What malloc holds of freed blocks goes back to the system, where glibc is there to do so.

    Kernels pack weights of a convolution into up to 17 MiB from the heap, and gaps of that size
    stay behind: 65 MiB (decoder, float32, 2026-11-30).
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
