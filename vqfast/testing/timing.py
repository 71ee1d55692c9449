"""One timer for CPU and CUDA, and the line that says where a number comes from.

Functions run in interleaved rounds, so that a drift of the machine hits all of them; quote medians
and ratios.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import vqfast


class Times(NamedTuple):
    """Seconds per call."""

    p50: float
    p20: float
    p80: float
    rounds: tuple[float, ...]


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _seconds(fn: Callable[[], Any], repeats: int, device: str) -> float:
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - start) / repeats


def race(
    runners: dict[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    rounds: int = 7,
    least_s: float = 0.04,
    budget_s: float = 30.0,
    warm: bool = False,
) -> dict[str, Times]:
    """Times each function in interleaved rounds after a warm-up.

    Args:
        runners: name -> function without arguments.
        device: "cpu" or "cuda"; on CUDA events are recorded around the calls.
        rounds: at most; fewer (but at least 3) when `budget_s` would be passed.
        least_s: a round repeats a short function until it takes this long.
        warm: the functions have run before; there is no warm-up.

    Returns:
        name -> Times, with every round's figure, so that ratios can be taken round by round.
    """
    first = {}
    for name, fn in runners.items():
        if not warm:
            fn()
        _synchronise(device)
        first[name] = _seconds(fn, 1, device)
        _synchronise(device)
    repeats = {n: max(1, math.ceil(least_s / max(t, 1e-7))) for n, t in first.items()}
    once = sum(first[n] * repeats[n] for n in runners)
    count = max(3, min(rounds, int(budget_s / max(once, 1e-9))))
    taken: dict[str, list[float]] = {n: [] for n in runners}
    names = list(runners)
    for i in range(count):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(_seconds(runners[name], repeats[name], device))
    return {n: summary(t) for n, t in taken.items()}


def summary(t: list[float]) -> Times:
    """Median and quantiles of the seconds of each round."""
    s = sorted(t)
    at = lambda q: s[min(len(s) - 1, round(q * (len(s) - 1)))]  # noqa: E731
    return Times(statistics.median(s), at(0.2), at(0.8), tuple(t))


def ratio(ours: Times, theirs: Times) -> float:
    """How many times faster we are: the median over rounds of their time / ours."""
    pairs = zip(ours.rounds, theirs.rounds, strict=True)
    return statistics.median(b / a for a, b in pairs)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(
                line.split(":", 1)[1].strip() for line in f if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a reader must know to believe a number: hardware, threads, versions."""
    from vqfast import _native  # the only private name that a bench line needs

    line = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vqfast": vqfast.__version__,
    }
    if device.startswith("cuda"):
        line["cuda"] = torch.version.cuda
    return line
