"""The search against an oracle of its own on random hard data, until the rows or minutes are up:

    python -m vqfast.testing.fuzz --rows 1e8 --seed 1 --minutes 600

Every search takes one of the machine's instruction sets and one or two threads by chance. Right
means the index that float64 gives by the definition (`oracle`), and its score as float32. The
oracle is held against the plain definition on one row of every search. Progress goes to stderr;
stdout holds one JSON object with the seed and the rows by kind. A failure prints the command that
repeats it; exit status 1 after a wrong answer, 2 when the oracle itself is wrong.
"""

import argparse
import faulthandler
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import vqfast
from vqfast import _native
from vqfast.testing import hostile, oracle

_MOST_FAILURES = 5  # wrong searches that are printed before a run gives up
_REPORT_S = 10.0
Searcher = Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]


class Outcome(NamedTuple):
    """What a run saw: rows checked and their seconds, rows by property, and what was wrong."""

    rows: int
    searches: int
    seconds: float
    counts: dict[str, Counter[str]]
    failures: list[str]


class OracleError(AssertionError):
    """The oracle and the definition disagree; the text says where."""


def search(z: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """What is under test: indices [N] and distances [N]."""
    return vqfast.nearest(z, codebook, metric=metric, return_distance=True)


def run(
    rows: float,
    seed: int,
    minutes: float = float("inf"),
    *,
    first: int = 0,
    count: float = float("inf"),
    searcher: Searcher = search,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Searches `first`, `first` + 1, ... until one of the limits is met or five failed."""
    begin, told, done, index = time.monotonic(), 0.0, 0, first
    kinds = ("kind", "metric", "dtype", "isa", "threads")
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    failures: list[str] = []
    while done < rows and index - first < count and len(failures) < _MOST_FAILURES:
        spent = time.monotonic() - begin
        if spent > 60 * minutes:
            break
        if spent - told > _REPORT_S:
            told = spent
            say(f"{done} rows, {done / spent:.0f} rows/s, search {index}, {len(failures)} wrong")
        one = hostile.case(seed, index)
        place = _place(seed, index, device)
        why = check(one, *place, searcher, device)
        if why:
            failures.append(f"seed {seed} search {index} ({describe(one, *place)}): {why}")
            say(f"WRONG {failures[-1]}")
        labels = {"kind": one.kind, "metric": one.metric, "isa": place[0], "threads": place[1]}
        labels["dtype"] = " against ".join(
            str(t.dtype).removeprefix("torch.") for t in (one.z, one.codebook)
        )
        for name, value in labels.items():
            counts[name][str(value)] += len(one.z)
        done, index = done + len(one.z), index + 1
    return Outcome(done, index - first, time.monotonic() - begin, counts, failures)


def _place(seed: int, index: int, device: str) -> tuple[str, int]:
    """Instruction set and threads of a search."""
    library, r = _native.load(), random.Random(f"{seed}/{index}/place")
    sets = library.supported() if library and device == "cpu" else [device]
    return r.choice(sets), r.choice((1, 2))


@contextmanager
def _at(isa: str, threads: int):
    library = _native.load() if isa in _native.ISAS else None
    before, kept = torch.get_num_threads(), library.selected() if library else ""
    torch.set_num_threads(threads)
    if library:
        library.select(isa)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if library:
            library.select(kept)


def describe(one: hostile.Search, isa: str, threads: int) -> str:
    N, D = one.z.shape
    kinds = f"{one.z.dtype} {one.codebook.dtype}".replace("torch.", "")
    return (
        f"{one.kind} {one.metric} N{N} K{len(one.codebook)} D{D} {kinds}, {isa}, {threads} threads"
    )


def check(one: hostile.Search, isa: str, threads: int, searcher: Searcher, device: str) -> str:
    """What is wrong with the answer to a search; empty if nothing is."""
    z, codebook = one.z.to(device), one.codebook.to(device)
    step = -(-len(z) // one.pieces)
    with _at(isa, threads):
        try:
            parts = [searcher(part, codebook, one.metric) for part in z.split(step)]
        except Exception as error:  # the run goes on, and the failure is shown with its search
            return f"{type(error).__name__}: {error}"
    index, distance = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
    with _at(isa, 1):
        right, score = oracle.nearest(one.z, one.codebook, one.metric)
        row = len(z) // 3
        plain, least = oracle.definition(one.z[row : row + 1], one.codebook, one.metric)
    if plain[0] != right[row] or not np.array_equal(least, score[row : row + 1], equal_nan=True):
        raise OracleError(f"row {row}: {right[row]} {score[row]}, not {plain[0]} {least[0]}")
    return _difference(index, distance, right, score)


def _difference(
    index: np.ndarray, distance: np.ndarray, right: np.ndarray, score: np.ndarray
) -> str:
    wrong = np.flatnonzero(index != right)
    if len(wrong):
        n = wrong[0]
        return (
            f"{len(wrong)} of {len(index)} indices; row {n}: got {index[n]}, right is {right[n]} "
            f"of score {score[n]!r}"
        )
    with np.errstate(over="ignore"):
        want = score.astype(np.float32)
    bad = np.flatnonzero(~((distance == want) | (np.isnan(distance) & np.isnan(want))))
    if len(bad):
        n = bad[0]
        return f"{len(bad)} distances; row {n}: got {distance[n]!r}, right is {want[n]!r}"
    return ""


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rows", type=float, default=1e6, help="rows of z to check (1e6)")
    p.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--case", type=int, help="only the search of this number")
    p.add_argument("--first", type=int, default=0, help="number of the first search")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--backend", help="force one: cuda, triton, cpu or reference")
    args = p.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    first, count = (args.first, float("inf")) if args.case is None else (args.case, 1)
    forced: Any = vqfast.backend(args.backend) if args.backend else nullcontext()
    limits = {"first": first, "count": count, "device": args.device, "say": say}
    try:
        with forced:
            seen = run(args.rows, args.seed, args.minutes, **limits)
    except OracleError as error:
        say(f"the oracle is wrong: {error}")
        return 2
    for text in seen.failures:
        number = text.split()[3]
        say(f"again: python -m vqfast.testing.fuzz --seed {args.seed} --case {number}")
    rate = seen.rows / max(seen.seconds, 1e-9)
    line = {"seed": args.seed, "first": first, **seen._asdict(), "rows_per_s": round(rate)}
    print(json.dumps(line))
    return 1 if seen.failures else 0


if __name__ == "__main__":
    faulthandler.enable()  # a kernel that crashes says where
    sys.exit(main())
