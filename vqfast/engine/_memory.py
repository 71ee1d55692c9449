"""Memory for weights that every token reads from end to end.

With pages of 4 KiB a CPU spends a tenth of a decoding step on finding them; Linux gives pages of 2
MiB to memory that asks for them before it is first written.
"""

import contextlib
import mmap

import torch
from torch import Tensor

_WORTH_IT = 8 << 20  # bytes; below, the caches of the CPU hold it or the gain is not seen


def empty_bytes(n: int, device: torch.device) -> Tensor:
    """[n] uint8, not initialised; in large pages where there are such."""
    if device.type != "cpu" or n < _WORTH_IT or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # keeps the map alive
