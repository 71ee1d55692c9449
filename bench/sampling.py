"""The suite sample: cached decoding, and `vqfast sample` from the start of its process.

generate    One race per case of our precisions (--dtype) and the opponents in their own formats,
    together with streaming reads of a large block. Times are per step; tokens and images per second
    follow from them, as does the part of the read bandwidth that reading each weight once per step
    takes. Weights are the blocks' and the head's in the row's format, without scales and biases.
    A contestant draws whole images while its budget allows, else their first tokens, whose steps
    are the cheaper ones; ours draws as many as the opponents even for some times its budget. All
    are there at once: gpt_336m_batch64 takes some 14 GB by count of weights and caches.
cli         Wall time of the whole command: the shipped model, 16 images, one grid on disk.

A further measure is a function like `_race` and its entries in `cases`. The gate is that of every
op that the work runs on.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import baselines
import torch
from micro import Gate, Options, RefusedError
from networks import GPTS
from report import Row

from vqfast import GPT, Engine, GPTConfig
from vqfast.testing.timing import Times, race, ratio, summary

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # of a weight
BUDGET_S = 8.0  # of each contestant of a case
TOP_K = 100  # what taming's users type is 100 to 600
_BATCHES = (1, 8, 64)
# as large as LlamaGen-L, XL and XXL, for images of 24 x 24: only where seconds do for them
_ON_GPU = (("gpt576_336m", 16), ("gpt576_775m", 1), ("gpt576_1b4", 16))
_CALLS = 5  # of race at least: a warm-up, a first look, three rounds
_LEAST_TOKENS = 2
_PATIENCE = 4  # times the budget that ours may take to draw as many tokens as an opponent
_BLOCK = {"cpu": 1 << 30, "cuda": 1 << 32}  # bytes, well beyond any cache
_READS = 4  # of the block, in a round
_IMAGES = 16  # of the command


class Case(NamedTuple):
    """What is measured, on which inputs, and the ops whose checks come first."""

    id: str
    measure: str
    ops: tuple[str, ...]
    rows: Callable[["Case", Options, Callable[[str], None]], tuple[list[Row], dict[str, str]]]
    model: str = ""
    batch: int = 0


class Contestant(NamedTuple):
    """One way to draw n tokens for every sequence of a batch: `run(n)`."""

    dtype: str
    run: Callable[[int], Any]
    ours: bool
    note: str = ""


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    found = []
    drawing = ("decode_step", "sample_logits")
    models = [(name, B) for name in ("gpt_336m", "gpt_small") for B in _BATCHES]
    for name, B in (*models, *(_ON_GPU if device.startswith("cuda") else ())):
        case_id = name if B == 1 else f"{name}_batch{B}"
        found.append(Case(case_id, "generate", drawing, _race, name, B))
    decoding = ("group_norm_silu", "conv3x3")
    found.append(Case(f"emoji64_n{_IMAGES}", "cli", (*drawing, *decoding), _command))
    return found


def run(options: Options, say: Callable[[str], None]) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """As micro.run.

    Raises:
        ValueError: unknown case. RefusedError: an op's checks fail, or the command does.
    """
    known = cases(options.device)
    todo = [c for c in known if options.takes(c.id)]
    if not todo:
        ids = ", ".join(c.id for c in known)
        raise ValueError(f"--case must be one of {ids}, got {options.case!r}")
    gate = Gate(options.device, options.gate, say)
    for case in todo:
        gate.require(case.ops)
        yield case.rows(case, options, say)
        torch.compiler.reset()  # what an opponent compiled for this case


# ---- generate


def _race(
    case: Case, options: Options, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    config, device = GPTS[case.model], options.device
    say(f"preparing {case.measure} {case.id}")
    torch.manual_seed(0)
    with torch.device(device):
        gpt = GPT(config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(2)
    cond = torch.randint(8, (case.batch, 1), generator=g).to(device)
    taking_part, missing = contestants(case.id, gpt, cond, options)
    tokens = _tokens(taking_part, config.block_size, options.budget_s / _CALLS, device)
    runners: dict[str, Callable[[], Any]] = {
        name: lambda c=c, n=tokens[name]: c.run(n) for name, c in taking_part.items()
    }
    block = torch.ones(_BLOCK[device.partition(":")[0]] // 4, device=device)
    runners["read"] = lambda: [block.sum() for _ in range(_READS)]
    say(f"timing {case.measure} {case.id}")
    budget = options.budget_s * len(runners)
    times = race(runners, device=device, rounds=options.rounds, least_s=0.0, budget_s=budget)
    read = _scaled(times.pop("read"), 1 / (_READS * block.numel() * block.element_size()))
    steps = {name: _scaled(t, 1 / tokens[name]) for name, t in times.items()}
    return rows_of(case, config, taking_part, steps, tokens, read), missing


def contestants(
    case_id: str, gpt: GPT, cond: torch.Tensor, options: Options
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Ours in each precision, the opponents in float32 if it is among them and in bfloat16 if
    another is, or in the one format that they have; and why some are missing.
    """
    found = {}
    for precision in options.dtypes:
        engine = Engine(gpt, precision=precision, batch=len(cond))
        note = "" if options.gate else "UNVERIFIED"
        found[f"vqfast {precision}"] = Contestant(precision, _drawing(engine, cond), True, note)
    wanted = {"fp32" if precision == "fp32" else "bf16": None for precision in options.dtypes}
    missing: dict[str, str] = {}
    for dtype in ("fp32", "bf16"):
        told = baselines.Told(case_id, dtype, options.device)
        peers, absent = baselines.runners(
            "generate",
            told,
            (gpt, cond),
            options.device,
            chosen=lambda module, dtype=dtype: dtype in _formats(module, tuple(wanted)),
            once=lambda draw: draw(_LEAST_TOKENS),
        )
        missing |= {f"{name} {dtype}": why for name, why in absent.items()}
        for name, draw in peers.items():
            found[f"{name} {dtype}"] = Contestant(dtype, draw, False, getattr(draw, "note", ""))
    return found, missing


def _formats(module: Any, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """In which formats an opponent runs."""
    able = baselines.formats(module, "generate")
    return tuple(f for f in wanted if f in able) or able[:1]


def _drawing(engine: Engine, cond: torch.Tensor) -> Callable[[int], torch.Tensor]:
    def draw(n: int) -> torch.Tensor:
        return engine.generate(cond, n, seed=0, top_k=TOP_K)

    return draw


def _tokens(
    taking_part: Mapping[str, Contestant], most: int, seconds: float, device: str
) -> dict[str, int]:
    """How many tokens each draws in one call of about that many seconds, `most` is an image."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    found = {}
    for name, contestant in taking_part.items():
        contestant.run(_LEAST_TOKENS)
        wait()
        begin = time.perf_counter()
        contestant.run(_LEAST_TOKENS)
        wait()
        step = (time.perf_counter() - begin) / _LEAST_TOKENS
        found[name] = min(most, max(_LEAST_TOKENS, int(seconds / step)))
    # early steps are cheaper, as fewer tokens are attended to: that may flatter them, not us
    theirs = max((n for name, n in found.items() if not taking_part[name].ours), default=0)
    for name in (name for name, contestant in taking_part.items() if contestant.ours):
        found[name] = max(found[name], min(theirs, _PATIENCE * found[name]))
    return found


def _scaled(t: Times, by: float) -> Times:
    return summary([x * by for x in t.rounds])


def weights_per_step(c: GPTConfig) -> int:
    """Weights that every step reads: those of the blocks and the head; embeddings are looked up."""
    return c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd


def rows_of(
    case: Case,
    config: GPTConfig,
    taking_part: Mapping[str, Contestant],
    steps: Mapping[str, Times],
    tokens: Mapping[str, int],
    read: Times,
) -> list[Row]:
    """A row per contestant, ours with its ratio to every opponent.

    Args:
        steps: seconds per step. tokens: drawn in one call. read: seconds per byte of the block.
    """
    rows = []
    for name, c in taking_part.items():
        t, n = steps[name], tokens[name]
        moved = weights_per_step(config) * BYTES[c.dtype]
        ratios = {}
        if c.ours:
            others = {k: ratio(t, steps[k]) for k, peer in taking_part.items() if not peer.ours}
            ratios = dict(sorted(others.items(), key=lambda pair: pair[1]))
        at = (t.p50 * 1e3, t.p20 * 1e3, t.p80 * 1e3)
        rows.append(
            Row(
                case.measure, case.id, c.dtype, "vqfast" if c.ours else name, c.ours, *at,
                ratios=ratios, note=c.note, unit="step", tokens=n, of_tokens=config.block_size,
                tokens_s=case.batch / t.p50, images_s=case.batch / t.p50 / config.block_size,
                of_read=ratio(_scaled(t, 1 / moved), read), read_gb_s=1e-9 / read.p50,
            )
        )  # fmt: skip
    return rows


# ---- cli


def _command(
    case: Case, options: Options, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    say(f"timing {case.measure} {case.id}")
    words = {
        "vqfast": ["-m", "vqfast", "sample", "-n", str(_IMAGES), "--device", options.device],
        "import": ["-c", "import torch"],
    }
    runners = {name: lambda w=w: _process(w) for name, w in words.items()}
    limits = {"rounds": options.rounds, "budget_s": options.budget_s * len(words)}
    times = race(runners, least_s=0.0, **limits)
    t = times["vqfast"]
    notes = [f"{times['import'].p50 * 1e3:.0f} ms are the start of Python and torch"]
    notes += [] if options.gate else ["UNVERIFIED"]
    at = (t.p50 * 1e3, t.p20 * 1e3, t.p80 * 1e3)
    row = Row(
        case.measure, case.id, "auto", "vqfast", True, *at, note=", ".join(notes), unit="run",
        images_s=_IMAGES / t.p50,
    )  # fmt: skip
    return [row], {}


def _process(words: list[str]) -> None:
    """Runs Python with these arguments to its end in an empty folder; `sample` writes a grid
    there.

    Raises:
        RefusedError: it fails, or there is no picture.
    """
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.png"
        writes = "sample" in words
        done = subprocess.run(
            [sys.executable, *words, *(["--grid", str(grid)] if writes else [])],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        drawn = grid.is_file() and grid.read_bytes().startswith(b"\x89PNG")
        if done.returncode or (writes and not drawn):
            why = (done.stderr.strip().splitlines() or ["no picture"])[-1]
            raise RefusedError(f"{' '.join(words)}: {why}")
