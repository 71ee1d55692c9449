"""The command line: `vqfast VERB ...`, also `python -m vqfast`.

`main` parses, runs one verb and turns what happens into an exit code: 0 done; 1 it failed while
running; 2 bad usage or configuration; 130 interrupted; 143 terminated. Errors are one line on
stderr. A verb is one file here with `run(args) -> Report`; its flags are in `_parser`. The files of
the verbs are loaded when they are used, so that `--help` does not wait for torch.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from vqfast.cli._parser import Report, UsageError, parse

__all__ = ["main"]

_FAILURES = ("CheckpointError", "DataError", "NonFiniteError", "BackendError")


class _Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way takes it for a failure."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        argv: without the program's name; None takes the process's own.
    """
    with _stoppable():
        try:
            code = _run(sys.argv[1:], own=True) if argv is None else _run(list(argv))
        except KeyboardInterrupt:
            code = _say("interrupted", 130)
        except _Terminated:
            code = _say("terminated", 143)
        except BrokenPipeError:  # the reader of our output has left, as `| head` does
            code = 0
        return _flushed(code)


def _run(argv: list[str], own: bool = False) -> int:
    try:
        args = parse(argv)
        with _imports_are_no_garbage() if own else contextlib.nullcontext():
            verb = importlib.import_module(f"vqfast.cli.{args.module}")
        report = verb.run(args)
        _write(report, bool(getattr(args, "json", False)))
    except SystemExit as leave:  # --help, --version, and argparse's own complaints
        return leave.code if isinstance(leave.code, int) else 2
    except UsageError as error:
        return _say(f"error: {error}", 2)
    except FileExistsError as error:
        return _say(f"error: {error}; --overwrite replaces it", 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        return _say(f"error: {_reason(error)}", 1)
    except MemoryError:
        return _say("error: out of memory", 1)
    except Exception as error:  # the last line of defence: a user gets one line, never a traceback
        return _failed(error)
    return report.code


@contextlib.contextmanager
def _imports_are_no_garbage() -> Iterator[None]:
    """Keeps the garbage collector from what is loaded, now and for good; for a process of ours.

    Importing torch makes a million objects that stay. Searching them for garbage, while they are
    made and once more when the process ends, is 0.7 of 1.85 s of CPU time (Xeon, torch 2.14,
    2026-11-25).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _failed(error: Exception) -> int:
    name = type(error).__name__
    if name == "ConfigError":
        return _say(f"error: {error}", 2)
    if name in _FAILURES:
        return _say(f"error: {name}: {error}", 1)
    place = _origin(error.__traceback__)
    return _say(f"error: {name}: {error} ({place})", 1)


def _origin(trace: TracebackType | None) -> str:
    """File and line where an unforeseen error arose, for the report of a bug."""
    frames = traceback.extract_tb(trace)
    ours = [f for f in frames if f"{os.sep}vqfast{os.sep}" in f.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "unknown place"


def _reason(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _say(text: str, code: int) -> int:
    """One line on stderr, whatever the text holds."""
    line = " ".join(text.split())
    with contextlib.suppress(OSError, ValueError):
        print(f"vqfast: {line}", file=sys.stderr, flush=True)
    return code


def _write(report: Report, as_json: bool) -> None:
    text = json.dumps(_finite(report.values), allow_nan=False) if as_json else report.text
    if text and sys.stdout is not None:
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _finite(tree: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _flushed(code: int) -> int:
    """Flushes stdout here: Python would do it on its way out, and print what goes wrong."""
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except OSError as error:  # a reader that left, or a full disk
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            return _say(f"error: standard output: {_reason(error)}", code or 1)
    return code


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT unwind the program, so that temporary files are removed on the way.

    A shell without job control starts background jobs with SIGINT ignored; `kill -INT` reaches
    such a job all the same.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    old: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
        old[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            old[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
