"""Loads the native libraries `_C` (C++) and `_C_cuda` on first use, and calls their kernels.

Tensors cross as pointer, dtype, shape and strides: neither library knows torch, so neither is tied
to one version of it. A kernel's signature ("f32|f16 i64? -> f32~") says what it takes: dtypes
joined by `|`, `?` may be None, `~` any strides; all else must be contiguous. From it come the
reasons why a kernel refuses inputs.
"""

import ctypes
import importlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqfast.errors import BackendError

ISAS = ("avx512_vnni", "avx512", "avx2", "base")  # best first; `base` is plain C++ for the target
# codes of csrc/view.h
DTYPES = {
    torch.float32: ("f32", 0),
    torch.float16: ("f16", 1),
    torch.bfloat16: ("bf16", 2),
    torch.float64: ("f64", 3),
    torch.int64: ("i64", 4),
    torch.int32: ("i32", 5),
    torch.int8: ("i8", 6),
    torch.uint8: ("u8", 7),
    torch.bool: ("bool", 8),
}


class Slot(NamedTuple):
    """What one tensor argument of a kernel may be."""

    dtypes: frozenset[str]
    strided: bool
    optional: bool


@cache
def parse_signature(text: str) -> tuple[Slot, ...]:
    """Slots of inputs and outputs, in order."""
    slots = []
    for token in text.replace("->", " ").split():
        kinds = token.rstrip("?~")
        slots.append(Slot(frozenset(kinds.split("|")), "~" in token, "?" in token))
    return tuple(slots)


def signature_refusal(text: str, tensors: list[Tensor | None], device: str) -> str | None:
    """Why these inputs do not fit a signature; outputs are ours, so only inputs are looked at."""
    for i, (slot, t) in enumerate(zip(parse_signature(text), tensors, strict=False)):
        if t is None:
            if not slot.optional:
                return f"tensor {i} is None"
        elif t.device.type != device:
            return f"needs {device}"
        elif DTYPES.get(t.dtype, ("?",))[0] not in slot.dtypes:
            came, takes = str(t.dtype).removeprefix("torch."), "|".join(sorted(slot.dtypes))
            return f"tensor {i} is {came}, takes {takes}"
        elif not slot.strided and not t.is_contiguous():
            return f"tensor {i} is not contiguous"
    return None


def _split(arguments: tuple) -> tuple[list[Tensor | None], list[int | float]]:
    tensors = [x for x in arguments if x is None or isinstance(x, Tensor)]
    return tensors, [x for x in arguments if not (x is None or isinstance(x, Tensor))]


# ---- C++ -----------------------------------------------------------------------------------------


@cache
def _load() -> ModuleType | str:
    """The library, or why there is none. The choice of the instruction set is made here, once a
    process."""
    wanted = os.environ.get("VQFAST_CPU_ISA") or ""
    if wanted and wanted not in ISAS:
        raise BackendError(f"VQFAST_CPU_ISA must be one of {', '.join(ISAS)}, got {wanted!r}")
    try:
        library = importlib.import_module("vqfast._C")
    except ImportError as e:
        built = sorted(p.name for p in Path(__file__).parent.glob("_C.*"))
        if built:
            return f"the native library does not load ({e}); built: {', '.join(built)}"
        return (
            "the native library vqfast._C is not built (it needs a C++17 compiler; "
            "`pip install -e .` builds it)"
        )
    supported = library.supported()
    if wanted and wanted not in supported:
        raise BackendError(f"VQFAST_CPU_ISA={wanted}, but this CPU has only {', '.join(supported)}")
    library.select(wanted or supported[0])
    return library


def load() -> ModuleType | None:
    """`vqfast._C`, or None when it is not built. BackendError when VQFAST_CPU_ISA names what the
    CPU lacks."""
    library = _load()
    return None if isinstance(library, str) else library


def missing() -> str | None:
    """Why there is no native library; None when there is one."""
    library = _load()
    return library if isinstance(library, str) else None


def isa() -> str | None:
    """The instruction set in use, one of ISAS; None without the native library."""
    library = load()
    return library.selected() if library else None


@cache
def _signatures() -> dict[str, str]:
    library = load()
    return dict(library.kernels()) if library else {}


def refusal(op: str, inputs: tuple) -> str | None:
    """Why the C++ kernel of `op` cannot run these inputs."""
    library = _load()
    if isinstance(library, str):
        return library
    signature = _signatures().get(op)
    if signature is None:
        return f"no C++ kernel for {op}"
    tensors, scalars = _split(inputs)
    fixed = signature_refusal(signature, tensors, "cpu")
    return fixed or library.refuse(op, [_view(t) for t in tensors], scalars) or None


def _view(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype][1], t.shape, t.stride())


@cache
def launcher(op: str) -> Callable[..., None]:
    """Calls the C++ kernel of `op` with inputs and outputs; the GIL is released inside."""
    library = _load()
    assert not isinstance(library, str), library  # `refusal` has said so before
    run = library.launch

    def launch(*arguments: Any) -> None:
        tensors, scalars = _split(arguments)
        run(op, [_view(t) for t in tensors], scalars, torch.get_num_threads())

    return launch


# ---- CUDA ----------------------------------------------------------------------------------------


class _CudaView(ctypes.Structure):
    """View of csrc/view.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
        ("stride", ctypes.c_int64 * 8),
    ]


class _CudaScalar(ctypes.Structure):
    """Scalar of csrc/view.h."""

    _fields_ = [("i", ctypes.c_int64), ("f", ctypes.c_double)]


@cache
def _load_cuda() -> ctypes.CDLL | str:
    found = sorted(Path(__file__).parent.glob("_C_cuda*.so"))
    if not found:
        return "not built (it needs nvcc)"
    try:
        return ctypes.CDLL(str(found[0]))
    except OSError as e:
        return f"does not load: {e}"


def cuda_missing() -> str | None:
    """Why there is no CUDA library; None when there is one."""
    library = _load_cuda()
    return library if isinstance(library, str) else None


@cache
def _cuda_signature(op: str) -> str | None:
    library = _load_cuda()
    if isinstance(library, str):
        return None
    try:
        text = ctypes.c_char_p.in_dll(library, f"vqfast_{op}_signature").value
    except ValueError:
        return None
    return None if text is None else text.decode()


def cuda_refusal(op: str, inputs: tuple) -> str | None:
    """Why the CUDA kernel of `op` cannot run these inputs."""
    why = cuda_missing()
    if why is not None:
        return why
    signature = _cuda_signature(op)
    if signature is None:
        return f"no CUDA kernel for {op}"
    return signature_refusal(signature, _split(inputs)[0], "cuda")


def _cuda_view(t: Tensor | None) -> _CudaView:
    view = _CudaView()
    if t is not None:
        view.data, view.ndim, view.dtype = t.data_ptr(), t.dim(), DTYPES[t.dtype][1]
        view.shape[: t.dim()], view.stride[: t.dim()] = list(t.shape), list(t.stride())
    return view


@cache
def cuda_launcher(op: str) -> Callable[..., None]:
    """Calls the CUDA kernel of `op` on torch's current stream of the tensors' device; it does not
    synchronise."""
    function = getattr(_load_cuda(), f"vqfast_{op}")
    function.restype = ctypes.c_int

    def launch(*arguments: Any) -> None:
        tensors, scalars = _split(arguments)
        views = (_CudaView * len(tensors))(*map(_cuda_view, tensors))
        values = (_CudaScalar * max(1, len(scalars)))(
            *[_CudaScalar(_wrap(s), float(s)) for s in scalars]
        )
        device = next(t for t in tensors if t is not None).device
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            error = function(views, len(tensors), values, len(scalars), stream)
        if error:
            raise RuntimeError(f"CUDA kernel {op} failed with error {error}")

    return launch


def _wrap(s: int | float) -> int:
    """Two's complement of an integer of up to 64 bits; the whole part of a float."""
    value = int(s) & 0xFFFFFFFFFFFFFFFF if isinstance(s, int) else 0
    return value - (1 << 64) if value >= 1 << 63 else value
