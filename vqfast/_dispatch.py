"""One implementation per call: the only file that knows backends exist.

A file name is a registration. Op `nearest` finds its Triton kernel in `vqfast.kernels.nearest`, its
C++ kernel in `_C` under the name "nearest", its CUDA kernel in `_C_cuda` as symbol
`vqfast_nearest`. Backward ops (`X_backward`) live in the files of `X`. Each candidate answers with
a reason against itself or None; the first without a reason runs. A kernel may need scratch memory,
which is no output: tensors that it takes after those, made by a function of the inputs. That is
`scratch_nearest` in a Triton file, and `Op(scratch=...)` for C++ and CUDA.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vqfast import _native
from vqfast.errors import BackendError

BACKENDS = ("cuda", "triton", "cpu", "reference")
# best first, by device; other devices take the reference alone
CANDIDATES = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "triton", "reference")}
OPS: dict[str, "Op"] = {}

_LIBRARY = torch.library.Library("vqfast", "DEF")
_log = logging.getLogger("vqfast")
_forced: list[
    str
] = []  # innermost last; process-wide, as autograd may run backward in another thread
_logged: set[tuple[str, str, str | None]] = set()
_warned: set[str] = set()
_place: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("_place", default=None)


def _known(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside the block: "cuda", "triton", "cpu" or "reference".

    A forced backend never falls back: an op that it cannot run raises BackendError with every
    reason. The choice is process-wide. `VQFAST_BACKEND` forces one for the whole process.

    Raises:
        ValueError: unknown name.
    """
    _forced.append(_known(name, "backend"))
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """The backend forced by `backend()` or else by VQFAST_BACKEND; None when the choice is
    automatic."""
    if _forced:
        return _forced[-1]
    name = os.environ.get("VQFAST_BACKEND")
    return _known(name, "VQFAST_BACKEND") if name else None


@contextlib.contextmanager
def results_by(place: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, C++ kernels that this thread calls write into memory that `place` finds.

    Args:
        place: a result as a meta tensor -> a tensor on the CPU of its shape, strides and dtype.
    """
    before = _place.set(place)
    try:
        yield
    finally:
        _place.reset(before)


def poisoned() -> bool:
    """VQFAST_POISON=1: buffers that a kernel has still to write are filled with NaN, or with the
    least integer."""
    return os.environ.get("VQFAST_POISON", "") not in ("", "0")


def poison(t: Tensor) -> Tensor:
    """Fills t in place when VQFAST_POISON is set; returns it."""
    if poisoned():
        t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).min)
    return t


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _describe(inputs: tuple) -> str:
    def one(x: Any) -> str:
        if not isinstance(x, Tensor):
            return repr(x)
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}@{x.device}"

    return ", ".join(map(one, inputs))


class Op:
    """One schema, one reference, any number of kernels found by file name.

    Args:
        schema: as torch.library takes it, "name(Tensor x, int n) -> (Tensor, Tensor)"; mutation as
            `Tensor(a!)`.
        reference: same arguments; returns what the schema says; runs anywhere, also in float64.
        outputs: same arguments; returns the empty results. It is the fake-tensor rule, the
            allocator and the place where tests poison memory.
        cuda_record: ledger line in bench/results that lets the CUDA kernel into the automatic
            choice.
        scratch: same arguments; returns the empty working memory, a tuple, of the C++ and the CUDA
            kernel. The Triton kernel has its own.

    `writes` are the places of the inputs that it mutates.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable,
        outputs: Callable,
        cuda_record: str | None = None,
        scratch: Callable[..., tuple[Tensor, ...]] | None = None,
    ):
        self.name = schema.partition("(")[0]
        self.file = self.name.removesuffix("_backward")
        self.reference, self.outputs, self.cuda_record = reference, outputs, cuda_record
        self.scratch = scratch
        self._triton: Any = None
        _LIBRARY.define(schema)
        torch.library.register_fake(f"vqfast::{self.name}", outputs, lib=_LIBRARY)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self._run, key)
        self._packet = getattr(torch.ops.vqfast, self.name).default
        arguments = self._packet._schema.arguments
        self._defaults = [_stand_in(a.type) for a in arguments]
        self.writes = tuple(
            i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        )
        OPS[self.name] = self

    def __call__(self, *inputs: Any) -> Any:
        return self._packet(*inputs)

    def _run(self, *inputs: Any) -> Any:
        name = self.choose(*inputs)
        if name == "reference":
            with torch.no_grad():
                return self.reference(*inputs)
        place = _place.get() if name == "cpu" else None
        outs = self.outputs(*inputs) if place is None else self._placed(place, inputs)
        each = (outs,) if isinstance(outs, Tensor) else tuple(outs or ())
        scratch = self._scratch(name, inputs)
        for t in (*each, *scratch):
            poison(t)
        self._launcher(name)(*inputs, *each, *scratch)
        return outs

    def _placed(self, place: Callable[[Tensor], Tensor], inputs: tuple) -> Any:
        """The results in memory that `place` finds."""
        meta = (x.to("meta") if isinstance(x, Tensor) else x for x in inputs)
        return tree_map_only(Tensor, place, self.outputs(*meta))

    def _scratch(self, name: str, inputs: tuple) -> tuple[Tensor, ...]:
        """The working memory that the kernel of a backend takes after its outputs."""
        triton = name == "triton"
        make = getattr(self._triton, f"scratch_{self.name}", None) if triton else self.scratch
        return make(*inputs) if make else ()

    def choose(self, *inputs: Any) -> str:
        """The backend that these inputs get. BackendError when a forced one cannot run them."""
        forced = forced_backend()
        if forced is not None:
            if self.reason(forced, inputs) is not None:
                reasons = "; ".join(
                    f"{k}: {v or 'can run'}" for k, v in self.explain(*inputs).items()
                )
                raise BackendError(
                    f"{self.name}({_describe(inputs)}) cannot run on {forced}: {reasons}"
                )
            return forced
        for name in self.candidates(inputs):
            if name == "cuda" and self.cuda_record is None:
                continue
            reason = self.reason(name, inputs)
            self._note(name, reason)
            if reason is None:
                return name
        raise AssertionError("the reference accepts everything")

    def _note(self, name: str, reason: str | None) -> None:
        key = (self.name, name, reason)
        if key not in _logged:
            _logged.add(key)
            _log.info(
                "%s: %s %s", self.name, name, "taken" if reason is None else f"not taken: {reason}"
            )
            if (
                name == "cpu"
                and reason is not None
                and _native.missing()
                and "native" not in _warned
            ):
                _warned.add("native")
                warnings.warn(
                    f"vqfast runs on the pure torch reference, which is slow: {_native.missing()}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    @staticmethod
    def candidates(inputs: tuple) -> tuple[str, ...]:
        device = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
        return CANDIDATES.get(device, ("reference",))

    def explain(self, *inputs: Any) -> dict[str, str | None]:
        """Every backend with the reason why it cannot run these inputs; None means that it can."""
        inputs = inputs + tuple(self._defaults[len(inputs) :])
        return {name: self.reason(name, inputs) for name in BACKENDS}

    def reason(self, name: str, inputs: tuple) -> str | None:
        if name == "reference":
            return None
        if name == "cpu":
            return _native.refusal(self.name, inputs)
        if name == "cuda":
            return _native.cuda_refusal(self.name, inputs)
        return self._triton_refusal(inputs)

    def _triton_refusal(self, inputs: tuple) -> str | None:
        # the device comes first, so that a CPU process never imports triton
        if not _interpreted() and not all(x.is_cuda for x in inputs if isinstance(x, Tensor)):
            return "needs cuda"
        if self._triton is None:
            self._triton = _triton_module(self.file)
        if isinstance(self._triton, str):
            return self._triton
        if not hasattr(self._triton, self.name):
            return f"no triton kernel for {self.name}"
        test = getattr(self._triton, f"unsupported_{self.name}", None)
        return test(*inputs) if test else None

    def _launcher(self, name: str) -> Callable:
        if name == "cpu":
            return _native.launcher(self.name)
        if name == "cuda":
            return _native.cuda_launcher(self.name)
        return getattr(self._triton, self.name)


def _triton_module(file: str) -> Any:
    """The module of Triton kernels, or the reason why there is none."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"vqfast.kernels.{file}") is None:
        return f"no triton kernel for {file}"
    return importlib.import_module(f"vqfast.kernels.{file}")


def _stand_in(kind: Any) -> Any:
    """A scalar for an argument that `explain` was not given."""
    return {"int": 1, "float": 1.0, "bool": False}.get(str(kind))


def explain(op: str, *inputs: Any) -> dict[str, str | None]:
    """Why each backend can or cannot run `op` on these inputs.

    Args:
        op: name of an op, e.g. "nearest".
        inputs: its tensors, in the order of the public function; scalars may be left out.

    Returns:
        {backend: None if it can run, else the reason}. For example
        {"cuda": "not built", "triton": "needs cuda", "cpu": None, "reference": None}.

    Raises:
        ValueError: unknown op.
    """
    importlib.import_module("vqfast.ops").load_all()
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(sorted(OPS))}, got {op!r}")
    return OPS[op].explain(*inputs)
