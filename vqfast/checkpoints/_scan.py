"""What a pickle asks for, found without running any of it.

`pickletools` splits the stream into opcodes; here their effect on the stack is followed with inert
values, so that each global that the file would import is known by name (GLOBAL, INST and
STACK_GLOBAL, however deeply nested), and each tensor by the storage it wants. Nothing is imported,
called or allocated. Refused besides globals that are not on the list: a storage larger than its
record, a view outside its storage, tuples nested so deeply that hashing them would overflow the C
stack, and opcodes that no tensor file needs.
"""

import _compat_pickle
import math
import pickletools
from collections.abc import Callable, Collection
from typing import IO, Any

from vqfast.errors import CheckpointError

_MAX_TUPLE_DEPTH = 100  # real files stay under 10
_MAX_OPCODES = 3_000_000  # real files stay under 300,000; some seconds of scanning

_ITEM_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
STORAGES = frozenset(f"torch.{name}" for name in _ITEM_BYTES)

_REBUILD = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")
_REFUSED = ("EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")
_MUTATE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_MARK = object()
_OPAQUE = object()


class _Global(str):
    """The dotted name of something that the pickle imports."""


class _Tuple(tuple):
    depth = 1


class _Storage:
    def __init__(self, key: str, numel: int, item_bytes: int):
        self.key, self.numel, self.nbytes = key, numel, numel * item_bytes


class Scan:
    """One pass over one pickle of a stream.

    Args:
        allowed: dotted names that the pickle may ask for.
        record_bytes: size of the record of a storage key, or None when it is not in the file.

    Attributes:
        value: the inert value that the pickle leaves: a constant, a tuple or an opaque object.
        storages: bytes that each storage key asks for.

    Raises (from the constructor):
        CheckpointError: a global that is not allowed (named), a damaged stream, or one of the
            refusals above. The text has no path; the caller puts it in front.
    """

    def __init__(
        self,
        stream: IO[bytes],
        allowed: Collection[str],
        record_bytes: Callable[[str], int | None] = lambda key: None,
    ):
        self._allowed, self._record_bytes = allowed, record_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, int] = {}
        self.value: Any = None
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count > _MAX_OPCODES:
                    raise CheckpointError(f"its pickle has more than {_MAX_OPCODES} operations")
                self._step(opcode, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"its pickle is damaged ({error})") from None

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name, stack = opcode.name, self._stack
        if name in _REFUSED:
            raise CheckpointError(f"its pickle uses {name}, which no tensor file needs")
        if name == "MARK":
            stack.append(_MARK)
        elif name in _PUT:
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _GET:
            stack.append(self._memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            self.value = stack.pop()
        elif name in ("GLOBAL", "INST"):
            if name == "INST":
                self._pop_to_mark()
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._global(str(module), str(attribute)))
        else:
            self._ordinary(opcode, argument)

    def _ordinary(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        taken = self._take(opcode)
        name, stack = opcode.name, self._stack
        if name in _MUTATE:
            stack.append(_OPAQUE if name == "BUILD" else taken[0])
        elif name.startswith("TUPLE") or name == "EMPTY_TUPLE":
            stack.append(self._tuple(taken))
        elif name in ("REDUCE", "NEWOBJ"):
            if taken[0] in _REBUILD:
                self._check_view(taken[1])
            stack.append(_OPAQUE)
        elif name in ("BINPERSID", "PERSID"):
            stack.append(self._storage(taken[0] if taken else argument))
        elif opcode.stack_after:
            constant = opcode.arg is not None or name in ("NONE", "NEWTRUE", "NEWFALSE")
            stack.append(argument if constant else _OPAQUE)

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """What the opcode pops, oldest first; of a slice down to a mark, what lies above and before
        the mark.
        """
        before = opcode.stack_before
        if pickletools.markobject in before:
            above = self._pop_to_mark()
            below = [self._stack.pop() for _ in range(before.index(pickletools.markobject))]
            return below + above
        return [self._stack.pop() for _ in before][::-1]

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _global(self, module: str, attribute: str) -> _Global:
        # protocol 2 writes the names of Python 2
        if (module, attribute) in _compat_pickle.NAME_MAPPING:
            module, attribute = _compat_pickle.NAME_MAPPING[(module, attribute)]
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        name = f"{module}.{attribute}"
        if name not in self._allowed:
            raise CheckpointError(
                f"it asks for the global {name}, which is not on the list of safe ones"
            )
        return _Global(name)

    @staticmethod
    def _tuple(items: list[Any]) -> _Tuple:
        made = _Tuple(items)
        made.depth = 1 + max((i.depth for i in items if isinstance(i, _Tuple)), default=0)
        if made.depth > _MAX_TUPLE_DEPTH:
            raise CheckpointError(f"its pickle nests tuples more than {_MAX_TUPLE_DEPTH} deep")
        return made

    def _storage(self, record: Any) -> _Storage:
        if not isinstance(record, tuple) or len(record) not in (5, 6) or record[0] != "storage":
            raise CheckpointError("its pickle refers to something that is not a storage")
        kind, key, numel = record[1], record[2], record[4]
        if kind not in STORAGES or not isinstance(key, str) or not _is_size(numel):
            raise CheckpointError(f"its storage {key!r} has no plain type or size")
        if len(record) == 6 and record[5] is not None:
            raise CheckpointError(f"its storage {key!r} is a view of another, as PyTorch 0.1 wrote")
        storage = _Storage(key, numel, _ITEM_BYTES[kind.removeprefix("torch.")])
        held = self._record_bytes(key)
        if held is not None and storage.nbytes > held:
            raise CheckpointError(
                f"its storage {key!r} asks for {storage.nbytes} bytes, the file holds {held}"
            )
        self.storages[key] = max(storage.nbytes, self.storages.get(key, 0))
        return storage

    @staticmethod
    def _check_view(arguments: Any) -> None:
        storage, offset, size, stride = arguments[:4]
        plain = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not plain or not all(map(_is_size, (offset, *size, *stride))):
            raise CheckpointError("its pickle describes a tensor whose shape is not plain integers")
        if not isinstance(storage, _Storage):
            raise CheckpointError("its pickle describes a tensor without a storage")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= storage.numel:
            raise CheckpointError(
                f"a tensor of shape {list(size)} reaches element {last} of storage "
                f"{storage.key!r}, which has {storage.numel}"
            )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
