"""The micro suite: one op, one shape, our backends against the opponents, in interleaved rounds.

A contestant of ours is measured only after the op's checks have passed on its backend (the gate).
Every contestant of a search, ours too, is judged by the float64 rule (exactness.py), and the memory
of one call is measured (memory.py).
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import baselines
import exactness
import memory
import prepare
import roofline
import torch
from report import Row, rows_of

import vqfast
from vqfast import _dispatch, ops
from vqfast.testing import check
from vqfast.testing.cases import Case, cases
from vqfast.testing.timing import race

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Measure(NamedTuple):
    """A thing to time: a raw op, forward and backward of the public `quantize`, or the preparation
    of a search.
    """

    name: str
    op: str  # whose file, cases and checks
    inputs: Callable[[Case, torch.dtype, str], tuple]
    cost: Callable[[Case], tuple[float, float]] | None
    remark: Callable[[Row], str] = lambda row: ""  # what the table says beside a row


class Options(NamedTuple):
    """What the command line chose."""

    op: str | None
    case: str | None
    backend: str | None
    dtypes: tuple[str, ...]
    device: str
    rounds: int = 7
    budget_s: float = 20.0
    gate: bool = True
    memory: bool = False  # of a call of a network, too; that of a search is always measured

    def takes(self, case_id: str) -> bool:
        """Is this case among those that were asked for, by an id or a pattern of ids?"""
        return fnmatch.fnmatchcase(case_id, self.case or "*")


def measures(op: str | None) -> list[Measure]:
    """All of the op files, or those of one op. ValueError names the known ops."""
    modules = ops.load_all()
    known = [name for name in modules if cases(name, "bench")]
    if op is not None and op not in known:
        raise ValueError(f"--op must be one of {', '.join(known)}, got {op!r}")
    found = []
    for name in [op] if op else known:
        module = modules[name]
        for raw, inputs in check.variants(module):
            cost = getattr(module, "COST", None) if raw == name else None
            found.append(Measure(raw, name, inputs, cost))
        if name == "quantize":
            found.append(Measure("quantize", "quantize", _quantize_inputs, _quantize_cost))
        if name == "nearest":
            made = Measure(prepare.NAME, "nearest", prepare.inputs, None, prepare.remark)
            found.append(made)
    return found


def _quantize_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple:
    """z near the codes, as in training, the codebook, and the gradient from above."""
    g = torch.Generator().manual_seed(case["N"])
    codebook = torch.randn(case["K"], case["D"], generator=g)
    z = codebook[torch.randint(case["K"], (case["N"],), generator=g)]
    z = z + 0.3 * torch.randn(z.shape, generator=g)
    upstream = torch.randn(z.shape, generator=g)
    return z.to(device, dtype), codebook.to(device, dtype), upstream.to(device, dtype)


def _quantize_cost(case: Case) -> tuple[float, float]:
    """The search, and one pass over z, z_q and both gradients."""
    N, K, D = (case[k] for k in "NKD")
    return 4 * (5 * N * D + 3 * K * D), 2 * N * K * D + 8 * N * D


def runner(measure: Measure, backend: str, inputs: tuple) -> Callable[[], Any]:
    """The op forced onto one backend."""
    if measure.name != "quantize":
        op = _dispatch.OPS[measure.name]

        def run() -> Any:
            with vqfast.backend(backend):
                return op(*inputs)

        return run
    z, codebook, upstream = inputs
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()

    def step() -> Any:
        z.grad = codebook.grad = None
        with vqfast.backend(backend):
            q = vqfast.quantize(z, codebook)
            torch.autograd.backward((q.z_q, q.loss), (upstream, torch.ones_like(q.loss)))
        return q.indices

    return step


def backends(measure: Measure, inputs: tuple, wanted: str | None) -> list[str]:
    """Those that can run these inputs; the reference only if it is asked for or alone."""
    if measure.name == prepare.NAME:
        able = prepare.backends(inputs)
    else:
        op = _dispatch.OPS["nearest" if measure.name == "quantize" else measure.name]
        args = (*inputs[:2], 0) if measure.name == "quantize" else inputs
        able = [name for name, reason in op.explain(*args).items() if reason is None]
    if wanted is not None:
        return [wanted] if wanted in able else []
    return [name for name in able if name != "reference"] or able


class Gate:
    """The checks of each op and backend, run once, before its first number."""

    def __init__(self, device: str, enabled: bool, say: Callable[[str], None]):
        self._device, self._enabled, self._say = device, enabled, say
        self._rows: dict[str, list[check.Row]] = {}
        self.refused: dict[str, str] = {}

    def passes(self, op: str, backend: str, *, part: bool = False) -> bool:
        """True if the checks pass, or if the gate is off.

        An op that is a `part` of a network may have no kernel for this backend: then it runs on the
        reference, or is checked with the network. An op that is measured itself may not.
        """
        if not self._enabled or backend == "reference":
            return True
        made_of = {"quantize": ("nearest", "nearest_quantize", "straight_through", "quantize")}
        parts = made_of.get(op, (op,))
        rows = [row for part in parts for row in self._checks(part) if row.backend == backend]
        bad = [row for row in rows if not row.ok]
        if not bad and (rows or part):
            return True
        first = bad[0] if bad else None
        why = f"{first.op} {first.case} {first.dtype}: {first.reason}" if first else "no check ran"
        self.refused[f"{op} on {backend}"] = f"{len(bad)} of {len(rows)} checks fail; {why}"
        return False

    def require(self, parts: Iterable[str]) -> None:
        """RefusedError unless these ops of a network pass on each native backend of the device."""
        known = ops.load_all()
        native = ("cuda", "triton") if self._device.startswith("cuda") else ("cpu",)
        for op in parts:
            for backend in native:
                if op in known and op in _dispatch.OPS and not self.passes(op, backend, part=True):
                    raise RefusedError("; ".join(f"{k}: {v}" for k, v in self.refused.items()))

    def _checks(self, op: str) -> list[check.Row]:
        if op not in self._rows:
            self._say(f"gate: checking {op} on {self._device}")
            self._rows[op] = list(check.check_ops(self._device, op))
        return self._rows[op]


def ours(measure: Measure, inputs: tuple, names: list[str]) -> dict[str, Callable[[], Any]]:
    """Our contestants on some backends, ready to run.

    A second way to call the search, as against a codebook that was prepared before the clock
    starts, is one more entry here. The opponents prepare theirs outside of the clock in any case.
    """
    if measure.name == prepare.NAME:
        return prepare.contestants(inputs)
    return {f"vqfast {name}": runner(measure, name, inputs) for name in names}


def contestant(name: str, measure: Measure, case: Case, inputs: tuple) -> Callable[[], Any]:
    """One of `ours` or an opponent, by its name."""
    if name in baselines.files():
        return baselines.runner(name, measure.name, case, inputs)
    able = [b for b in _dispatch.BACKENDS if backends(measure, inputs, b)]
    return ours(measure, inputs, able)[name]


class Contest(NamedTuple):
    """One measure on one case, and our backends that take part."""

    measure: Measure
    case: Case
    dtype: str
    device: str
    backends: list[str]

    def sides(self, inputs: tuple) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        """Ours and the opponents by name, ready to run, and why others are missing."""
        peers, missing = baselines.runners(self.measure.name, self.case, inputs, self.device)
        return ours(self.measure, inputs, self.backends), peers, missing

    def misses(self) -> dict[str, dict[str, float]]:
        """name -> kind of data -> part of the rows whose code is not the nearest."""
        found: dict[str, dict[str, float]] = {}
        for kind in exactness.KINDS:
            inputs = exactness.inputs(kind, self.case, DTYPES[self.dtype], self.device)
            judge = exactness.Judge(*inputs[:2])
            mine, peers, _ = self.sides(inputs)
            for name, run in {**mine, **peers}.items():
                answer = run()
                index = answer if isinstance(answer, torch.Tensor) else answer[0]
                found.setdefault(name, {})[kind] = judge.miss_rate(index)
        return found

    def rows(
        self, options: Options, say: Callable[[str], None]
    ) -> tuple[list[Row], dict[str, str]]:
        """Times, and for a search exactness and memory; and who is missing."""
        measure, case, dtype = self.measure, self.case, self.dtype
        inputs = measure.inputs(case, DTYPES[dtype], self.device)
        mine, peers, missing = self.sides(inputs)
        say(f"timing {measure.name} {case.id} {dtype}")
        limits = {"rounds": options.rounds, "budget_s": options.budget_s}
        times = race({**mine, **peers}, device=self.device, **limits)
        notes = {} if options.gate else dict.fromkeys(mine, "UNVERIFIED")
        cost, ceiling = cost_of(measure, case, dtype), roofline.measure(self.device, DTYPES[dtype])
        key = (measure.name, case.id, dtype)
        rows = rows_of(*key, times, set(mine), cost, ceiling, notes)
        rows = [r._replace(note="; ".join(filter(None, (r.note, measure.remark(r))))) for r in rows]
        if measure.name == "nearest":
            say(f"judging {case.id} {dtype}, and the memory of a call")
            misses, runs = self.misses(), {**mine, **peers}
            extra = {n: memory.extra_mib(*key, n, self.device, run) for n, run in runs.items()}
            rows = [
                r._replace(misses=misses.get(r.contestant, {}), extra_mib=extra[r.contestant])
                for r in rows
            ]
        return rows, missing


def run(options: Options, say: Callable[[str], None]) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """Rows of each case as they are measured, and why opponents are missing.

    Raises:
        ValueError: unknown op or case. RefusedError: at the end, if checks failed.
    """
    gate = Gate(options.device, options.gate, say)
    todo = list(chosen(options))
    if not todo:
        raise ValueError(f"--case: no bench case is named {options.case!r}")
    for measure, case, dtype in todo:
        inputs = measure.inputs(case, DTYPES[dtype], options.device)
        able = backends(measure, inputs, options.backend)
        passing = [name for name in able if gate.passes(measure.op, name)]
        if passing:
            yield Contest(measure, case, dtype, options.device, passing).rows(options, say)
    if gate.refused:
        text = "; ".join(f"{k}: {v}" for k, v in gate.refused.items())
        raise RefusedError(text)


class RefusedError(RuntimeError):
    """Numbers that were not taken because the op's checks fail; the text says which."""


def chosen(options: Options) -> Iterable[tuple[Measure, Case, str]]:
    for measure in measures(options.op):
        for case in cases(measure.op, "bench"):
            if options.takes(case.id):
                for dtype in options.dtypes:
                    yield measure, case, dtype


def cost_of(measure: Measure, case: Case, dtype: str) -> tuple[float, float] | None:
    """Bytes and flops; op files count float32, two-byte types move half of that."""
    if measure.cost is None:
        return None
    moved, flops = measure.cost(case)
    return moved * DTYPES[dtype].itemsize / 4, flops
