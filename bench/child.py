"""One commit of vqfast in a process of its own: python child.py ROOT THREADS, requests on stdin.

A request is a JSON line with op, raw, shape, id, tags, dtype, device, backend and repeats; the
answer is {"value": seconds per call} or {"error": text}.
"""

import importlib
import json
import sys
import time
from typing import Any, NamedTuple


class Case(NamedTuple):
    """As vqfast.testing.cases.Case, which an older commit may not have."""

    id: str
    op: str
    shape: dict[str, int]
    tags: frozenset[str]

    def __getitem__(self, letter: str) -> int:  # type: ignore[override]
        return self.shape[letter]


def _prepare(request: dict, torch: Any, vqfast: Any) -> Any:
    """A warmed-up function that runs the raw op once on its backend."""
    module = importlib.import_module(f"vqfast.ops.{request['op']}")
    case = Case(request["id"], request["op"], request["shape"], frozenset(request["tags"]))
    made = "sample_inputs" if request["raw"] == request["op"] else "sample_backward_inputs"
    inputs = getattr(module, made)(case, getattr(torch, request["dtype"]), request["device"])
    op = getattr(torch.ops.vqfast, request["raw"])

    def run() -> None:
        with vqfast.backend(request["backend"]):
            op(*inputs)

    run()
    return run


def main() -> None:
    root, threads = sys.argv[1], int(sys.argv[2])
    sys.path.insert(0, root)
    import torch

    import vqfast
    import vqfast.ops

    torch.set_num_threads(threads)
    if not vqfast.__file__.startswith(root):
        raise SystemExit(f"vqfast came from {vqfast.__file__}, not from {root}")
    ready: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        repeats = request.pop("repeats")
        key = json.dumps(request, sort_keys=True)
        try:
            if key not in ready:
                ready = {key: _prepare(request, torch, vqfast)}
            answer: dict = {"value": _seconds(ready[key], repeats, request["device"], torch)}
        except Exception as error:  # whatever an older commit raises is its answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _seconds(run: Any, repeats: int, device: str, torch: Any) -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - begin) / repeats


if __name__ == "__main__":
    main()
