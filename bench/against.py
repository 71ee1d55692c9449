"""--base REF: another commit, built in its own worktree and timed in turn with this one.

Both sides run in a child process of the same kind, so neither has an advantage. A child holds one
commit of vqfast; it is asked for one round at a time and answers with the seconds.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import micro
from report import ROOT, Row, rows_of

from vqfast import _dispatch
from vqfast.testing.timing import Times, summary

_CHILD = Path(__file__).resolve().parent / "child.py"


class BaseError(RuntimeError):
    """The other commit cannot be checked out, built or measured; the text says why."""


@contextlib.contextmanager
def _worktree(ref: str) -> Iterator[Path]:
    """A built checkout of `ref`, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        _command([*git, "add", "--detach", str(path), ref], f"check out {ref}")
        try:
            # an installed vqfast.kernels is this commit's: the other one has to find its own
            (path / "vqfast" / "kernels").symlink_to(path / "kernels")
            _command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], "build", path)
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], capture_output=True, check=False)


def _command(command: list[str], what: str, cwd: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BaseError(f"cannot {what}: {last}")


class _Side:
    """A child process that holds one commit."""

    def __init__(self, name: str, root: Path, threads: int):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(_CHILD), str(root), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request. BaseError with the child's words if it failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        except BrokenPipeError:
            answer = {"error": "it ended"}
        if "error" in answer:
            raise BaseError(f"{self.name}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def run(
    ref: str, options: micro.Options, say: Callable[[str], None]
) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """As micro.run, with `ref` as the only opponent. The gate checks this commit."""
    import torch

    gate = micro.Gate(options.device, options.gate, say)
    say(f"building {ref}")
    with _worktree(ref) as path, contextlib.ExitStack() as stack:
        threads = torch.get_num_threads()
        sides = [_Side("vqfast", ROOT, threads), _Side(ref, path, threads)]
        for side in sides:
            stack.callback(side.close)
        for measure, case, dtype in micro.chosen(options):
            inputs = measure.inputs(case, micro.DTYPES[dtype], options.device)
            for backend in micro.backends(measure, inputs, options.backend):
                if measure.name not in _dispatch.OPS or not gate.passes(measure.op, backend):
                    continue
                say(f"timing {measure.name} {case.id} {dtype} {backend}")
                spec = {
                    "op": measure.op,
                    "raw": measure.name,
                    "shape": case.shape,
                    "id": case.id,
                    "tags": sorted(case.tags),
                    "dtype": str(micro.DTYPES[dtype]).removeprefix("torch."),
                    "device": options.device,
                    "backend": backend,
                }
                times = _rounds(sides, spec, options)
                cost = micro.cost_of(measure, case, dtype)
                names = {"vqfast": f"vqfast {backend}"}
                named = {names.get(n, n): t for n, t in times.items()}
                ours = {f"vqfast {backend}"}
                yield rows_of(measure.name, case.id, dtype, named, ours, cost), {}
    if gate.refused:
        raise micro.RefusedError("; ".join(f"{k}: {v}" for k, v in gate.refused.items()))


def _rounds(sides: list[_Side], spec: dict, options: micro.Options) -> dict[str, Times]:
    first = {side.name: side.ask(**spec, repeats=1) for side in sides}
    repeats = {name: max(1, round(0.04 / max(t, 1e-7))) for name, t in first.items()}
    once = sum(first[name] * repeats[name] for name in first)
    count = max(3, min(options.rounds, int(options.budget_s / max(once, 1e-9))))
    taken: dict[str, list[float]] = {side.name: [] for side in sides}
    for i in range(count):
        for side in sides if i % 2 == 0 else reversed(sides):
            taken[side.name].append(side.ask(**spec, repeats=repeats[side.name]))
    return {name: summary(t) for name, t in taken.items()}
