"""What this machine can do at most: measured read bandwidth and GEMM rate, the two lines of a
roofline.
"""

import functools
import time
from typing import NamedTuple

import torch


class Roofline(NamedTuple):
    """Measured ceilings: bytes read per second, flops per second of a square matrix product."""

    read: float
    gemm: float

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """The least time of a piece of work under these ceilings."""
        return max(bytes_moved / self.read, flops / self.gemm)


def _best(fn, device: str, rounds: int = 5, least_s: float = 0.05) -> float:
    """Seconds per call in the best of some rounds: a ceiling, so the fastest counts."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def seconds(repeats: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            fn()
        wait()
        return (time.perf_counter() - begin) / repeats

    seconds(1)
    repeats = max(1, round(least_s / max(seconds(1), 1e-7)))
    return min(seconds(repeats) for _ in range(rounds))


@functools.cache
def measure(device: str, dtype: torch.dtype) -> Roofline:
    """The ceilings of a device, random data, all threads of torch. About a second on a CPU."""
    cuda = device.startswith("cuda")
    x = torch.rand((1 << 30 if cuda else 1 << 26), device=device)  # 4 GiB or 256 MiB
    read = x.numel() * x.element_size() / _best(x.sum, device)
    del x
    n = 8192 if cuda else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    gemm = 2 * n**3 / _best(lambda: a @ b, device)
    return Roofline(read, gemm)
