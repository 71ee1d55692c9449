"""Peak of the memory that one call of a contestant takes beyond what was there before it.

On a GPU: what torch's allocator says. On the CPU: resident memory, read by a child process that has
called the contestant before (a search on a few rows, a network as it is), so that libraries are
loaded, threads are up, and what is compiled or kept from step to step is there. The least of up to
three calls counts: how the C allocator reuses freed blocks varies from one to the next.

    python bench/memory.py MEASURE CASE DTYPE CONTESTANT THREADS
"""

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_WARM_ROWS = 64
_LIMIT_S = 600
_CALLS, _SECONDS = 3, 10.0


def extra_mib(
    measure: str, case: str, dtype: str, contestant: str, device: str, run: Callable[[], Any]
) -> float | None:
    """MiB; None where the system does not tell. `run` is called here on a GPU only."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    words = [measure, case, dtype, contestant, str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            [sys.executable, Path(__file__).resolve(), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=_LIMIT_S,
        )
        return float(done.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None


def resident_extra_mib(run: Callable[[], Any]) -> float:
    """Highest resident memory while `run` works, less that before; Linux with glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _status_mib("VmRSS")
    result = run()
    del result
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} in /proc/self/status")


def main(measure: str, case: str, dtype: str, contestant: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    run = _prepared(measure, case, dtype, contestant)
    begin, seen = time.monotonic(), [resident_extra_mib(run)]
    while len(seen) < _CALLS and time.monotonic() - begin < _SECONDS:
        seen.append(resident_extra_mib(run))
    print(min(seen))


def _prepared(measure: str, case: str, dtype: str, contestant: str) -> Callable[[], Any]:
    """A contestant that has been called. ValueError: there is no such case."""
    import micro  # which imports this file
    import networks

    if measure in networks.MEASURES:
        run = networks.contestant(contestant, measure, case, dtype)
        run()
        return run
    for found, made, kind in micro.chosen(micro.Options(measure, case, None, (dtype,), "cpu")):
        if found.name == measure:
            z, *rest = found.inputs(made, micro.DTYPES[kind], "cpu")
            micro.contestant(contestant, found, made, (z[:_WARM_ROWS], *rest))()
            return micro.contestant(contestant, found, made, (z, *rest))
    raise ValueError(f"no case {case} of {measure}")


if __name__ == "__main__":
    main(*sys.argv[1:])
