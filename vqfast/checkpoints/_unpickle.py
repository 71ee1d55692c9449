"""Reads what `torch.save` wrote, without running anything that the file asks for. The only caller
of `torch.load`.

First `_scan` lists what the pickle wants, without loading: a global outside `ALLOWED` ends there,
by name. Then `torch.load(weights_only=True)` reads the file with inert stand-ins for the few
globals that old trainers left in theirs. There is no second try without `weights_only`. What comes
back is data: tensors, strings, numbers, containers, and stand-ins that hold nothing of use.
"""

import os
import pickle
import struct
import threading
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from vqfast.checkpoints._scan import STORAGES, Scan
from vqfast.errors import CheckpointError

_MAX_PICKLE_BYTES = 64 << 20  # the pickle holds names and shapes; the weights lie beside it
_LOCK = threading.Lock()  # torch's list of safe globals belongs to the whole process

# what a damaged file makes torch raise
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)

_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
_TORCH_GLOBALS = {
    "collections.OrderedDict",
    "builtins.set",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    # these two load, so that the refusal can name the weight
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    *(f"torch.{name}" for name in _DTYPES),
    *STORAGES,
}


class _Inert:
    """Takes the place of a class: accepts any arguments and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass


class _InertDtype(_Inert):
    """numpy.dtype: its state is a tuple, which torch would otherwise try to put into `__dict__`."""

    def __setstate__(self, state: Any) -> None:
        pass


def _inert_dict(*args: Any) -> dict:
    """builtins.dict and collections.defaultdict: an empty dict, which the pickle may then fill."""
    return {}


_CHECKPOINT_CALLBACKS = (
    "pytorch_lightning.callbacks.model_checkpoint",
    "pytorch_lightning.callbacks.pt_callbacks",
    "lightning.pytorch.callbacks.model_checkpoint",
)
_NUMPY_DTYPES = (
    "Bool",
    *(f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
    *(f"Float{bits}" for bits in (16, 32, 64)),
)
_INERT_CLASSES = (
    *(f"{module}.ModelCheckpoint" for module in _CHECKPOINT_CALLBACKS),
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    *(f"numpy.dtypes.{name}DType" for name in _NUMPY_DTYPES),
    "argparse.Namespace",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "builtins.list",
    "builtins.int",
)
_STAND_INS: list[Any] = [
    *((type(name.rpartition(".")[2], (_Inert,), {}), name) for name in _INERT_CLASSES),
    (_InertDtype, "numpy.dtype"),
    (_inert_dict, "builtins.dict"),
    (_inert_dict, "collections.defaultdict"),
]
ALLOWED = frozenset(_TORCH_GLOBALS) | {name for _, name in _STAND_INS}


def load(path: Path) -> Any:
    """The tree that `torch.save` wrote into `path`, a regular file.

    Tensors of a zip file may be mapped from it: clone what is kept.

    Raises:
        CheckpointError: the file is not one of `torch.save`, is damaged, or asks for a global that
            is not listed; the text begins with the path.
    """
    try:
        with open(path, "rb") as file:
            mapped = _check(file, os.fstat(file.fileno()).st_size) and path.suffix != ".safetensors"
        return _load(path, mapped)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _load(path: Path, mapped: bool) -> Any:
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.serialization.safe_globals(_STAND_INS):
                if mapped:  # optimizer states, often two thirds of a file, are then never read
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
        except _DAMAGE as error:
            # torch's own text tells the reader to try again without weights_only: only its last
            # line is kept
            lines = [
                line for line in str(error).splitlines() if line.strip() and "http" not in line
            ]
            reason = lines[-1].strip() if lines else type(error).__name__
            raise CheckpointError(f"cannot be read: {reason[:200]}") from None


# ---- what the file is, and what it asks for


def _check(file: IO[bytes], size: int) -> bool:
    """Scans every pickle that `torch.load` would run. True for a zip file, False for the older
    layout.
    """
    head = file.read(512)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        _check_zip(file, size)
        return True
    if head[257:262] == b"ustar":
        raise CheckpointError("tar archives of PyTorch 0.1 are not read")
    if head[:1] != b"\x80":
        raise CheckpointError(f"not a checkpoint: it begins with {head[:16]!r}")
    _check_legacy(file, size)
    return False


def _check_zip(file: IO[bytes], size: int) -> None:
    """torch.save since 1.6: one stored record for the pickle (`ROOT/data.pkl`) and one per storage
    (`ROOT/data/KEY`).
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = {i.filename: i for i in archive.infolist()}
            if len(records) != len(archive.infolist()):
                raise CheckpointError("its zip archive holds two records of one name")
            if any(i.compress_type != zipfile.ZIP_STORED for i in records.values()):
                raise CheckpointError("its zip archive is compressed, which torch.save never does")
            if sum(i.file_size for i in records.values()) > size:
                raise CheckpointError("its zip archive claims more bytes than the file has")
            pickles = [name for name in records if name.endswith("data.pkl")]
            if len(pickles) != 1 or records[pickles[0]].file_size > _MAX_PICKLE_BYTES:
                raise CheckpointError("its zip archive does not hold one pickle of a sane size")
            root = pickles[0].removesuffix("data.pkl")

            def record_bytes(key: str) -> int:
                record = records.get(f"{root}data/{key}")
                return record.file_size if record else 0

            with archive.open(pickles[0]) as stream:
                Scan(stream, ALLOWED, record_bytes)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"damaged or cut zip archive ({error})") from None


class _Bounded:
    """The first `_MAX_PICKLE_BYTES` of a stream, so that a damaged length field cannot ask for the
    whole file.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._left = file, _MAX_PICKLE_BYTES

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data

    def read(self, n: int) -> bytes:
        return self._count(self._file.read(min(n, self._left)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left))

    def tell(self) -> int:
        return self._file.tell()


def _check_legacy(file: IO[bytes], size: int) -> None:
    """torch.save before 1.6: pickles of magic number, version, system, object and storage keys;
    then the raw storages.
    """
    stream: Any = _Bounded(file)
    magic = Scan(stream, ALLOWED).value
    if magic != torch.serialization.MAGIC_NUMBER:
        raise CheckpointError("a bare pickle, not a file of torch.save")
    wanted = {}
    for _ in range(4):  # version, system, object, keys
        wanted.update(Scan(stream, ALLOWED).storages)
    left = size - file.tell()
    if sum(wanted.values()) + 8 * len(wanted) > left:
        raise CheckpointError(
            f"cut: its storages need {sum(wanted.values())} bytes, {left} are left"
        )
